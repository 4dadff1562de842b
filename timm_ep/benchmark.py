"""How long a training step by EP takes beside one of its backprop twin, and how good its gradient is."""

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor

from timm_ep.gradcheck import gradient_check
from timm_ep.task import EpTask

__all__ = ["Benchmark", "BenchmarkResult"]

_CHECKED = 8  # images of the gradient check, which stores every sweep of them


@dataclass(frozen=True)
class BenchmarkResult:
    """Seconds of a step (quartiles: first, median, third), the ratio of the medians, and the worst layer's cosine.

    Attributes:
        ep: of a step by EP, forward and backward, without the optimizer.
        backprop: of a step of the feedforward twin.
        ratio: of the medians, EP over backprop.
        cosine: of EP's gradient and BPTT's through the converged settling, in the layer where it is lowest, at init.
    """

    ep: tuple[float, float, float]
    backprop: tuple[float, float, float]
    ratio: float
    cosine: float


@dataclass
class Benchmark:
    """Time training steps by EP and by backprop in turn, so that what else the machine does falls on both.

    Args:
        model: name of an `ep_vgg*`.
        model_args: further arguments of the model.
        batch_size: images.
        img_size: side of the images in pixels.
        classes: of the read-out.
        repeats: timed steps of each, after one that is not counted; at least 2.
        device: `cpu`, `cuda`, …
        json: print JSON and nothing else.
    """

    model: str = "ep_vgg9_050"
    model_args: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    img_size: int = 32
    classes: int = 10
    repeats: int = 9
    device: str = "cpu"
    json: bool = False

    def __post_init__(self) -> None:
        if not self.model.startswith("ep_vgg"):
            raise ValueError(f"{self.model} is no ep_vgg*: it is not trained by EP.")
        for name, least in {"batch_size": 1, "img_size": 1, "classes": 2, "repeats": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; it must be at least {least}.")

    def run(self) -> BenchmarkResult:
        """Print and return the times and the cosine."""
        torch.manual_seed(0)
        model = timm.create_model(self.model, num_classes=self.classes, **self.model_args).to(self.device)
        images = torch.randn(self.batch_size, model.in_chans, self.img_size, self.img_size, device=self.device)
        labels = torch.arange(self.batch_size, device=self.device) % self.classes
        task = EpTask(model, device=torch.device(self.device))
        times: dict[str, list[float]] = {"ep": [], "backprop": []}
        for _ in range(self.repeats + 1):
            for gradient, seconds in times.items():
                model.gradient = gradient
                seconds.append(self._step(task, images, labels))
        model.gradient = "ep"
        ep, backprop = (_quartiles(seconds[1:]) for seconds in times.values())
        cosine = min(row.cosine for row in gradient_check(model, images[:_CHECKED], labels[:_CHECKED]))
        result = BenchmarkResult(ep, backprop, ep[1] / backprop[1], cosine)
        print(json.dumps(asdict(result), indent=2) if self.json else self._text(result))
        return result

    def _step(self, task: EpTask, images: Tensor, labels: Tensor) -> float:
        started = time.perf_counter()
        task(images, labels)["loss"].backward()
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        task.zero_grad()
        return seconds

    def _text(self, result: BenchmarkResult) -> str:
        lines = [f"{self.model}, {self.batch_size} images of {self.img_size}×{self.img_size}: one training step"]
        for name, (low, median, high) in (("EP", result.ep), ("backprop twin", result.backprop)):
            lines.append(f"{name:13}: {median:.3f} s (quartiles {low:.3f} to {high:.3f})")
        return "\n".join(
            [*lines, f"ratio {result.ratio:.2f}, worst layer's cosine to BPTT at init {result.cosine:.4f}"]
        )


def _quartiles(seconds: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, median, high
