"""How the cost of a training step grows with batch, pixels, depth, width and sweeps: measured, and fitted."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from scipy.optimize import nnls

from timm_ep.base.figures import new_figure, save_figure
from timm_ep.studies.measure import Machine, Quartiles, in_fresh_process, in_turn, quartiles
from timm_ep.studies.products import multiply_adds, recorded_products
from timm_ep.studies.workload import Workload, make_training_step, training_step

__all__ = ["Fit", "Point", "Scaling", "ScalingResult", "fit_cost", "fit_line"]

AXES = {
    "batch_size": "images",
    "img_size": "pixels of an image",
    "depth": "multiply-adds",
    "width": "multiply-adds",
    "sweeps": "free sweeps",
}
"""What can be varied, and the quantity over which the cost is to be a line."""

_BATCHES, _SIZES, _SWEEPS = (4, 8, 16, 32, 64), (32, 64, 96, 128), (2, 4, 8, 16, 32)
_DEPTHS, _WIDTHS = (5, 9, 11, 13, 16, 19), (0.125, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Fit:
    """A least-squares fit.

    Attributes:
        coefficients: one for each regressor; of a line the slope and the intercept.
        r2: share of the variance that it explains.
        largest_residual: |measured − fitted| / measured, at the point where it is largest.
    """

    coefficients: list[float]
    r2: float
    largest_residual: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Fit:
    """y = slope · x + intercept."""
    columns, scales = _scaled_columns([x, [1.0] * len(x)])
    return _fit(columns, y, np.linalg.lstsq(columns, np.array(y), rcond=None)[0], scales)


def fit_cost(regressors: Sequence[Sequence[float]], values: Sequence[float]) -> Fit:
    """Values, (n,), as a sum of regressors, each (n,), times coefficients that are not negative, as no work costs less
    than nothing."""
    columns, scales = _scaled_columns(regressors)
    return _fit(columns, values, nnls(columns, np.array(values))[0], scales)


def _scaled_columns(regressors: Sequence[Sequence[float]]) -> tuple[Any, Any]:
    """Each in units of its largest value: multiply-adds may stand beside ones."""
    columns = np.array(regressors, dtype=float).T
    scales = np.abs(columns).max(0)
    return columns / scales, scales


def _fit(columns: Any, values: Sequence[float], solution: Any, scales: Any) -> Fit:
    target = np.array(values)
    residuals, spread = target - columns @ solution, target - target.mean()
    r2 = 1 - (residuals @ residuals) / (spread @ spread) if spread.any() else 1.0
    return Fit((solution / scales).tolist(), float(r2), float(np.abs(residuals / target).max()))


@dataclass(frozen=True)
class Point:
    """One measured step.

    Attributes:
        axis: what was varied.
        value: to what.
        x: the quantity of `AXES`.
        multiply_adds: of the step's products.
        state_elements: of the batch's states s_1…s_N.
        parameters: of the model.
        seconds: of a training step, without the optimizer.
        megabytes: its peak memory beyond model and images, in a fresh process.
    """

    axis: str
    value: int | float | str
    x: float
    multiply_adds: int
    state_elements: int
    parameters: int
    seconds: Quartiles
    megabytes: float


@dataclass(frozen=True)
class ScalingResult:
    """All points, and what was fitted to them.

    Attributes:
        model: the net that was varied.
        machine: what it was measured on, with the load at the start.
        points: in the order of the axes.
        seconds: for each axis, the line through the medians.
        megabytes: for each axis, the line through the memory.
        time_model: seconds = a · multiply-adds + b · parameters + c, over all points: what the images cost, what the
            kernels cost once a batch, and the calls.
        memory_model: megabytes = a · state elements + b · parameters + c, over all points.
    """

    model: str
    machine: Machine
    points: list[Point]
    seconds: dict[str, Fit]
    megabytes: dict[str, Fit]
    time_model: Fit
    memory_model: Fit


@dataclass
class Scaling(Workload):
    """Measure a training step over batch, pixels, depth, width and sweeps in turn, and fit lines and the cost model.

    A model argument `gradient` measures `backprop` or `bptt` in the same way.

    Args:
        over: what to vary, each by itself: `batch_size`, `img_size`, `depth` (`ep_vgg5` to `ep_vgg19` at the model's
            width), `width` (an eighth to all of the channels at the model's depth), `sweeps` (of the free phase).
        repeats: rounds over all points, after one that is not counted; at least 2.
        plot: a picture to draw (png, svg, pdf).
        json: print JSON and nothing else.
    """

    batch_size: int = 16
    img_size: int | None = 32
    over: list[str] = field(default_factory=lambda: list(AXES))
    repeats: int = 5
    plot: Path | None = None
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.over or not set(self.over) <= set(AXES):
            raise ValueError(f"over={self.over} must be one or more of {', '.join(AXES)}.")
        if not re.fullmatch(r"ep_vgg\d+(_\d+)?", self.model) or "architecture" in self.model_args:
            raise ValueError(f"{self.model} has no known depth and width to vary; give a name such as ep_vgg9_050.")
        self.at_least(repeats=2)

    def run(self) -> ScalingResult:
        """Print and return points and fits."""
        workloads = {(axis, value): load for axis in self.over for value, load in self._varied(axis).items()}
        made = {str(key): load.make() for key, load in workloads.items()}
        machine = Machine.here(self.device)
        steps = {key: training_step(*parts) for key, parts in made.items()}
        times = in_turn(steps, self.repeats, self.device)
        points = []
        for (axis, value), load in workloads.items():
            key = str((axis, value))
            model, images, _ = made.pop(key)
            products = recorded_products(steps.pop(key))
            with torch.no_grad():
                states = sum(state.numel() for state in model.equilibrium(images))
            work = multiply_adds(products)
            x = {"batch_size": len(images), "img_size": images[0, 0].numel(), "sweeps": model.settings.free_sweeps}
            cost = in_fresh_process(make_training_step, load, {}, device=self.device)
            points.append(
                Point(
                    axis,
                    value,
                    float(x.get(axis, work)),
                    work,
                    states,
                    sum(parameter.numel() for parameter in model.parameters()),
                    quartiles(times[key]),
                    cost.megabytes,
                )
            )
        result = fitted(self.model, machine, points)
        print(json.dumps(asdict(result), indent=2) if self.json else _text(result))
        if self.plot is not None:
            draw_scaling(result, self.plot)
        return result

    def _varied(self, axis: str) -> dict[int | float | str, Workload]:
        base = self.workload
        if axis == "batch_size":
            return {size: replace(base, batch_size=size) for size in _BATCHES}
        if axis == "img_size":
            return {size: replace(base, img_size=size) for size in _SIZES}
        if axis == "sweeps":
            every = {**self.model_args, "tol": 0.0}  # none of which is to be saved
            return {free: replace(base, model_args={**every, "free_sweeps": free}) for free in _SWEEPS}
        _, family, *percent = self.model.split("_")
        width = int(percent[0]) / 100 if percent else 1.0
        if axis == "width":
            return {value: self._of_width(f"ep_{family}", value) for value in _WIDTHS}
        return {name: self._of_width(name, width) for name in (f"ep_vgg{n}" for n in _DEPTHS)}

    def _of_width(self, name: str, width: float) -> Workload:
        """The net of that name with a share of its channels, whether or not it is registered by itself."""
        full = timm.create_model(name, device="meta")
        layers = zip(full.layers, full.pooled, strict=True)
        architecture = [item for layer, pooled in layers for item in (int(len(layer.bias) * width), *"M" * pooled)]
        return replace(self.workload, model=name, model_args={**self.model_args, "architecture": architecture})


def fitted(model: str, machine: Machine, points: list[Point]) -> ScalingResult:
    """The fits to measured points."""
    lines: dict[str, dict[str, Fit]] = {"seconds": {}, "megabytes": {}}
    for axis in dict.fromkeys(point.axis for point in points):
        chosen = [point for point in points if point.axis == axis]
        x = [point.x for point in chosen]
        lines["seconds"][axis] = fit_line(x, [point.seconds.median for point in chosen])
        lines["megabytes"][axis] = fit_line(x, [point.megabytes for point in chosen])
    work, states, parameters = (
        [float(getattr(point, name)) for point in points] for name in ("multiply_adds", "state_elements", "parameters")
    )
    once = [1.0] * len(points)
    return ScalingResult(
        model,
        machine,
        points,
        **lines,
        time_model=fit_cost([work, parameters, once], [point.seconds.median for point in points]),
        memory_model=fit_cost([states, parameters, once], [point.megabytes for point in points]),
    )


def _text(result: ScalingResult) -> str:
    lines = [
        f"{result.model}: a training step over {', '.join(result.seconds)}",
        str(result.machine),
        "",
        f"{'axis':10}  {'value':>12}  {'multiply-adds':>13}  {'seconds (quartiles)':>24}  {'peak memory':>11}",
    ]
    for point in result.points:
        lines.append(
            f"{point.axis:10}  {point.value!s:>8}  {point.multiply_adds:13.3e}  {point.seconds!s:>24}  "
            f"{point.megabytes:8.1f} MB"
        )
    for quantity, fits in {"seconds": result.seconds, "megabytes": result.megabytes}.items():
        lines += ["", f"{quantity} = slope · x + intercept:"]
        lines += [f"  over {axis:10} (x: {AXES[axis] + ')':20} {_numbers(line)}" for axis, line in fits.items()]
    lines += ["", "seconds = a · multiply-adds + b · parameters + c:", f"  {_numbers(result.time_model)}"]
    lines += ["megabytes = a · state elements + b · parameters + c:", f"  {_numbers(result.memory_model)}"]
    return "\n".join(lines)


def _numbers(fit: Fit) -> str:
    coefficients = "  ".join(f"{value:10.3e}" for value in fit.coefficients)
    return f"{coefficients}  R² {fit.r2:.4f}, largest residual {fit.largest_residual:.1%}"


def draw_scaling(result: ScalingResult, output: Path) -> None:
    """Time and memory of a training step over each axis, with the fitted lines.

    Args:
        result: of `timm-ep scaling`.
        output: the picture; its suffix chooses the format.
    """
    axes_names = list(result.seconds)
    figure, grid = new_figure(len(axes_names), rows=2, panel=(3.2, 3))
    for column, name in zip(grid.T, axes_names, strict=True):
        points = [point for point in result.points if point.axis == name]
        x = [point.x for point in points]
        rows = {
            "time of a training step, s": ([point.seconds.median for point in points], result.seconds[name]),
            "peak memory, MB": ([point.megabytes for point in points], result.megabytes[name]),
        }
        for axis, (label, (values, line)) in zip(column, rows.items(), strict=True):
            slope, intercept = line.coefficients
            axis.plot(x, values, "o", ms=4)
            axis.plot([0, max(x)], [intercept, intercept + slope * max(x)], "-", lw=1, color="0.5")
            axis.set(xlabel=f"{name}: {AXES[name]}", ylabel=label, title=f"R² {line.r2:.4f}", ylim=(0, None))
            axis.title.set_size("small")
    figure.suptitle(result.model, fontsize="medium")
    save_figure(figure, output)
