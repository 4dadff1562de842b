"""How long a training step by EP takes beside backprop, BPTT and the literature's algorithm, and how good each is."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from timm_ep.models import EpVgg
from timm_ep.studies.classic import CLASSIC, classic_checks, classic_parts, extrapolated, make_classic_step
from timm_ep.studies.gradcheck import LayerCheck, compared, exact_gradients, weight_gradients
from timm_ep.studies.measure import Machine, Quartiles, Step, in_fresh_process, in_turn, quartiles
from timm_ep.studies.throughput import Share, Throughput
from timm_ep.studies.workload import Workload, autocast, changed, inference_step, training_step

__all__ = ["Benchmark", "BenchmarkResult", "StepResult"]

# Training steps by name: the model's gradient, and whether under bfloat16 autocast.
_TRAINING = {
    "ep": ("ep", False),
    "ep bfloat16": ("ep", True),
    "backprop": ("backprop", False),
    "backprop bfloat16": ("backprop", True),
    "bptt": ("bptt", False),
}
_INFERENCE = {"inference": "ep", "inference of the twin": "backprop"}
_CLASSIC = "classic reference"


@dataclass(frozen=True)
class StepResult:
    """What one kind of step costs, and how good its gradient is.

    Attributes:
        name: `ep`, `backprop` (of the feedforward twin), `bptt` (through the model's free sweeps), each in float32;
            those that end in `bfloat16` under autocast; `classic reference`; `inference` and that of the twin.
        seconds: forward and backward, without the optimizer; extrapolated for the classic reference.
        ratio: of the medians, over that of `backprop` (float32), or of the twin's inference.
        images_per_second: at the median.
        megabytes: peak memory beyond model and images, in a fresh process.
        memory_ratio: over that of `backprop`, or of the twin's inference.
        layers: the gradient beside the exact one, of the net that `ep` trains. For the classic reference, which is
            another net, beside its own exact one, and None unless asked for; None for inference, and where the net
            does not come to rest, so that there is no exact gradient.
    """

    name: str
    seconds: Quartiles
    ratio: float
    images_per_second: float
    megabytes: float
    memory_ratio: float
    layers: list[LayerCheck] | None

    @property
    def cosine(self) -> float | None:
        """Of the worst layer."""
        return None if self.layers is None else min(layer.cosine for layer in self.layers)


@dataclass(frozen=True)
class BenchmarkResult:
    """All of a benchmark, measured in one process, round by round.

    Attributes:
        model: name, or folder of a run.
        settings: of the model.
        batch_size: images.
        img_size: their height.
        dataset: of the images; None for random ones.
        checked: images of the gradient check.
        machine: what it was measured on, with the load at the start.
        repeats: rounds.
        steps: one of each kind.
        shares: of the settling in float32 and bfloat16.
        speedups: how many times faster than the classic reference, extrapolated, EP is in float32 and bfloat16.
    """

    model: str
    settings: dict[str, Any]
    batch_size: int
    img_size: int
    dataset: str | None
    checked: int
    machine: Machine
    repeats: int
    steps: list[StepResult]
    shares: list[Share]
    speedups: dict[str, float]


@dataclass
class Benchmark(Workload):
    """Time the steps of EP, backprop, BPTT and the literature's EP in turn, and check their gradients and memory.

    Args:
        checked: images of the gradient check, which settles until it rests; at most the batch.
        classic_cosine: also run the classic reference in full on these images, beside its own exact gradient: hundreds
            of steps.
        repeats: rounds over all kinds of step, after one that is not counted; at least 2.
        json: print JSON and nothing else.
    """

    checked: int = 16
    classic_cosine: bool = False
    repeats: int = 9
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(checked=1, repeats=2)

    def run(self) -> BenchmarkResult:
        """Print and return all of it."""
        model, images, labels = self.make()
        machine = Machine.here(self.device)
        steps = {name: _step(name, model, images, labels) for name in (*_TRAINING, *_INFERENCE)}
        throughput = Throughput(model, images)
        steps |= throughput.steps
        times = in_turn({**steps, **classic_parts(model, images, labels)}, self.repeats, self.device)
        times[_CLASSIC] = extrapolated(times)
        seconds = {name: quartiles(values) for name, values in times.items()}
        del steps, throughput.steps  # the checks and the other processes need the memory

        count = min(self.checked, len(images))
        result = BenchmarkResult(
            self.model,
            asdict(model.settings),
            len(images),
            images.shape[-2],
            self.dataset,
            count,
            machine,
            self.repeats,
            self._steps(seconds, self._checks(model, images[:count], labels[:count])),
            throughput.shares(seconds),
            {name: seconds[_CLASSIC].median / seconds[name].median for name in ("ep", "ep bfloat16")},
        )
        print(json.dumps(asdict(result), indent=2) if self.json else _text(result))
        return result

    def _checks(self, model: EpVgg, images: Tensor, labels: Tensor) -> dict[str, list[LayerCheck] | None]:
        exact = exact_gradients(model, images, labels)
        checks: dict[str, list[LayerCheck] | None] = {}
        for name, (gradient, bfloat16) in _TRAINING.items() if exact.converged else ():
            with autocast(self.device, bfloat16):
                checks[name] = compared(weight_gradients(model, images, labels, gradient=gradient), exact.gradients)
        if self.classic_cosine:
            checks[_CLASSIC] = classic_checks(model, images, labels)
        return checks

    def _steps(self, seconds: dict[str, Quartiles], checks: dict[str, list[LayerCheck] | None]) -> list[StepResult]:
        names = [*_TRAINING, _CLASSIC, *_INFERENCE]
        memory = {}
        for name in names:
            cost = in_fresh_process(make_step, self.workload, name, device=self.device)
            memory[name] = cost.megabytes
        results = []
        for name in names:
            unit = "inference of the twin" if name in _INFERENCE else "backprop"
            median = seconds[name].median
            results.append(
                StepResult(
                    name,
                    seconds[name],
                    median / seconds[unit].median,
                    self.batch_size / median,
                    memory[name],
                    memory[name] / memory[unit],
                    checks.get(name),
                )
            )
        return results


def make_step(workload: Workload, name: str) -> Step:
    """The step of that name, in a process of its own."""
    return make_classic_step(workload) if name == _CLASSIC else _step(name, *workload.make())


def _step(name: str, model: EpVgg, images: Tensor, labels: Tensor) -> Step:
    if name in _INFERENCE:
        return inference_step(changed(model, gradient=_INFERENCE[name]), images)
    gradient, bfloat16 = _TRAINING[name]
    return training_step(changed(model, gradient=gradient), images, labels, bfloat16)


def _text(result: BenchmarkResult) -> str:
    images = f"{result.batch_size} images of {result.img_size}×{result.img_size}"
    lines = [
        f"{result.model}, {images} ({result.dataset or 'random'}), {result.repeats} rounds",
        str(result.machine),
        "",
        f"{'step':22} {'seconds (quartiles)':>24}  {'ratio':>7}  {'images/s':>8}  {'peak memory':>17}  worst cosine",
    ]
    for row in result.steps:
        cosine = "-" if row.cosine is None else f"{row.cosine:.4f}"
        lines.append(
            f"{row.name:22} {row.seconds!s:>24}  {row.ratio:6.2f}×  {row.images_per_second:8.1f}  "
            f"{row.megabytes:7.1f} MB {row.memory_ratio:5.2f}×  {cosine:>12}"
        )
    lines += [
        "",
        f"classic reference ({'the same net' if result.settings['feedback'] == 1 else 'λ = 1, max pooling'}): "
        f"extrapolated to {CLASSIC.free_sweeps} free steps, 2 × {CLASSIC.nudged_sweeps} nudged ones "
        "and 2 contrasts from one of each a round;",
        *(f"  {name} is {times:.0f} times as fast" for name, times in result.speedups.items()),
        f"cosines: to the exact gradient at rest, on {result.checked} images; none where the net does not come to rest",
        "",
        f"{'settling':16} {'products':>8}  {'multiply-adds':>13}  {'seconds':>8}  {'plain':>8}  share",
    ]
    for share in result.shares:
        lines.append(
            f"{share.phase + ' ' + share.dtype:16} {share.products:8d}  {share.multiply_adds:13.3e}  "
            f"{share.settling.median:8.3f}  {share.plain.median:8.3f}  {share.share:5.0%}"
        )
    return "\n".join(lines)
