"""What a training step costs in memory and time, by EP and by BPTT, as the net settles for longer."""

import json
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch

from timm_ep.task import EpTask

__all__ = ["Cost", "StepCost"]

_WARM_UP, _TIMED = 1, 3  # steps


@dataclass(frozen=True)
class StepCost:
    """A training step's cost.

    Attributes:
        gradient: `ep` or `bptt`.
        sweeps: T, of the free phase, and of the nudged phase of EP.
        megabytes: peak memory beyond what the process held before its first step, in 10⁶ bytes.
        seconds: of a step after the first, forward and backward, the fastest of three.
    """

    gradient: str
    sweeps: int
    megabytes: float
    seconds: float


@dataclass
class Cost:
    """Measure a training step of EP and of BPTT for several numbers T of sweeps, each in a process of its own.

    BPTT settles for T sweeps and goes back through all T. EP is given as many nudged sweeps, which is more than it is
    run with, so that both do the same number of them.

    Args:
        model: name of an `ep_vgg*`.
        model_args: further arguments of the model; `{"preset": "classic"}` for the literature's dynamics.
        sweeps: the values of T.
        batch_size: images.
        img_size: side of the images in pixels.
        classes: of the read-out.
        device: `cpu`, `cuda`, …
        plot: a picture to draw (png, svg, pdf).
        json: print JSON and nothing else.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    sweeps: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    batch_size: int = 32
    img_size: int = 32
    classes: int = 10
    device: str = "cpu"
    plot: Path | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if not self.model.startswith("ep_vgg"):
            raise ValueError(f"{self.model} is no ep_vgg*: it does not settle.")
        if not self.sweeps or min(self.sweeps) < 1:
            raise ValueError(f"sweeps={self.sweeps} must be one or more numbers of at least 1, as in [8,16,32].")
        for name in ("batch_size", "img_size", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is too small; it must be at least 1.")

    def run(self) -> list[StepCost]:
        """Print and return the costs."""
        if not self.json:
            print(f"{self.model}, batches of {self.batch_size}: one training step")
        costs = []
        # A fresh process for each: memory that one step has claimed would hide what the next one needs.
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            for sweeps in self.sweeps:
                for gradient in ("ep", "bptt"):
                    costs.append(pool.submit(self.measure, gradient, sweeps).result())
                    if not self.json:
                        cost = costs[-1]
                        print(f"T={sweeps:4d} {gradient:4}: {cost.megabytes:8.1f} MB {cost.seconds:8.3f} s", flush=True)
        if self.json:
            print(json.dumps([asdict(cost) for cost in costs], indent=2))
        if self.plot is not None:
            from timm_ep.plots import draw_costs

            draw_costs(costs, self.model, self.plot)
        return costs

    def measure(self, gradient: str, sweeps: int) -> StepCost:
        """One cost, in this process: of use in a fresh one only."""
        torch.manual_seed(0)
        steps = {"gradient": gradient, "free_sweeps": sweeps, "nudged_sweeps": sweeps, "tol": 0.0}
        model = timm.create_model(self.model, num_classes=self.classes, **{**self.model_args, **steps})
        task = EpTask(model.to(self.device), device=torch.device(self.device))
        images = torch.randn(self.batch_size, model.in_chans, self.img_size, self.img_size, device=self.device)
        labels = torch.arange(self.batch_size, device=self.device) % self.classes
        before, times = _memory(self.device), []
        for _ in range(_WARM_UP + _TIMED):
            started = time.monotonic()
            task(images, labels)["loss"].backward()
            task.zero_grad()
            if self.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.monotonic() - started)
        return StepCost(gradient, sweeps, (_memory(self.device) - before) / 1e6, min(times[_WARM_UP:]))


def _memory(device: str) -> int:
    """The peak so far, in bytes: of the process, or of what torch has allocated on a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage goes on counting the process from which this one was started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
