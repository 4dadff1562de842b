"""Time and memory of a step: measured in turn with others, or in a process of its own."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from timm_ep.base.malloc import keep_freed_memory
from timm_ep.version import __version__

__all__ = ["Machine", "Quartiles", "Step", "StepCost", "in_fresh_process", "in_turn", "quartiles"]

Step = Callable[[], object]
clock = time.perf_counter
_WEIGHED, _WARM_UP, _TIMED = 2, 1, 3  # steps in a fresh process


@dataclass(frozen=True)
class Quartiles:
    """Seconds."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def quartiles(seconds: list[float]) -> Quartiles:
    """Of two times or more."""
    return Quartiles(*statistics.quantiles(seconds, n=4, method="inclusive"))


def in_turn(steps: Mapping[str, Step], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each step, `repeats` of them, after one that is not counted.

    Round by round over all steps, so that what else the machine does falls on all.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            times[name].append(_seconds(step, device))
    return {name: seconds[1:] for name, seconds in times.items()}


def _seconds(step: Step, device: str) -> float:
    _synchronise(device)
    started = clock()
    step()
    _synchronise(device)
    return clock() - started


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


class StepCost(NamedTuple):
    """What a step costs in a process of its own.

    Attributes:
        megabytes: peak memory beyond what the process held before its first step, in 10⁶ bytes: without the model and
            the images, with the gradients. What is allocated, on a GPU as torch counts it; on Linux, malloc is told to
            give back what is freed, as what it would keep differs by tens of MB from run to run of the same step.
        seconds: of a step after the first, the fastest of three, with a malloc that keeps what is freed.
    """

    megabytes: float
    seconds: float


def in_fresh_process(make: Callable[..., Step], *args: Any, device: str = "cpu") -> StepCost:
    """The cost of the step `make(*args)`, made and run in a new process.

    Memory that one step has claimed would hide what the next one needs.

    Args:
        make: a function of a module, with arguments that can be pickled.
        *args: its arguments.
        device: where the step runs.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_step_cost, make, args, device).result()


def _step_cost(make: Callable[..., Step], args: tuple[Any, ...], device: str) -> StepCost:
    keep_freed_memory(False, override=True)
    step = make(*args)
    _load_code(device)
    _forget_peak(device)
    before = _peak(device)
    for _ in range(_WEIGHED):
        step()
    megabytes = (_peak(device) - before) / 1e6
    keep_freed_memory(True, override=True)
    seconds = [_seconds(step, device) for _ in range(_WARM_UP + _TIMED)]
    return StepCost(megabytes, min(seconds[_WARM_UP:]))


def _load_code(device: str) -> None:
    """The libraries' code, some 20 MB that count as the process's once they have run, is not what a step needs."""
    target = torch.zeros(2, dtype=torch.long, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        layers = nn.Conv2d(3, 8, 4, 2, 1), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.Flatten(), nn.Linear(512, 4)
        net = nn.Sequential(*layers).to(device, dtype).to(memory_format=torch.channels_last)
        images = torch.zeros(2, 3, 8, 8, device=device, dtype=dtype)
        F.cross_entropy(net(images), target).backward()


def _forget_peak(device: str) -> None:
    """Making the step may have needed more than the step does; where the peak cannot be reset, that stays hidden."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not Linux, or a container that forbids it
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> int:
    """The peak so far, in bytes: of the process, or of what torch has allocated on a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage goes on counting the process from which this one was started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # of Unix alone: what does not measure memory runs elsewhere too

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Machine:
    """What a measurement was made on.

    Attributes:
        processor: name of the CPU, or of the GPU.
        cores: that this process may use.
        threads: of torch.
        torch: version.
        timm_ep: version.
        load: processes that ran or wanted to, on average over the minute before; None where the system does not say.
    """

    processor: str
    cores: int
    threads: int
    torch: str
    timm_ep: str
    load: float | None

    def __str__(self) -> str:
        load = "unknown" if self.load is None else f"{self.load:.1f}"
        return f"{self.processor}, {self.threads} threads, torch {self.torch}, load {load}"

    @classmethod
    def here(cls, device: str = "cpu") -> "Machine":
        """This one, now."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        name = _cpu_name() if device == "cpu" else torch.cuda.get_device_name(device)
        return cls(name, cores, torch.get_num_threads(), torch.__version__, __version__, load)


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
