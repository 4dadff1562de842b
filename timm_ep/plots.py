"""Figures of runs, gradient checks and costs, with matplotlib (`pip install timm_ep[plots]`)."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from timm_ep.cards import RESULTS_NAME, RunFacts
from timm_ep.cost import SweepCost
from timm_ep.files import replacing
from timm_ep.gradcheck import Report
from timm_ep.scaling import AXES, ScalingResult


@dataclass
class Plot:
    """Draw runs side by side: how they learned, or what each of their layers saw.

    Args:
        runs: a run's folder, or a folder of such folders.
        output: the picture; its suffix chooses the format (png, svg, pdf).
        kind: `curves`: loss and accuracy over the epochs, with each run's test accuracy. `layers`: the nudge of every
            layer (does it vanish with depth?) and the change of the states sweep by sweep (does the net settle?), in
            the first epoch (dashed) and the last.
    """

    runs: Path
    output: Path = Path("curves.png")
    kind: Literal["curves", "layers"] = "curves"

    def run(self) -> Path:
        """Draw, and return the picture's path.

        Raises:
            FileNotFoundError: no finished run there, or none with layers.
        """
        wanted = RESULTS_NAME if self.kind == "curves" else "layers.csv"
        folders = sorted(path.parent for path in self.runs.rglob(wanted))
        if not folders:
            raise FileNotFoundError(f"{self.runs} holds no finished run: no {wanted} in it or below.")
        figure, axes = _figure(2)
        (self._draw_curves if self.kind == "curves" else self._draw_layers)(folders, *axes)
        _save(figure, self.output)
        return self.output

    def _draw_layers(self, folders: list[Path], left: Any, right: Any) -> None:
        for number, folder in enumerate(folders):
            layers, settling = _read(folder / "layers.csv"), _read(folder / "settling.csv")
            for epoch, style in {layers[0]["epoch"]: "--", layers[-1]["epoch"]: "-"}.items():
                rows = [row for row in layers if row["epoch"] == epoch]
                nudges = [float(row["scaled_nudge"]) or math.nan for row in rows]
                label = folder.name if epoch == layers[-1]["epoch"] else None
                left.plot([int(row["layer"]) for row in rows], nudges, f".{style}", color=f"C{number}", label=label)
                changes: dict[int, float] = {}
                for row in settling:
                    if row["epoch"] == epoch and row["phase"] == "free":
                        sweep = int(row["sweep"])
                        changes[sweep] = max(changes.get(sweep, 0.0), float(row["residual"]))
                right.plot(list(changes), list(changes.values()), f".{style}", color=f"C{number}")
        left.set(xlabel="layer", ylabel="nudge / (β λ^(N−l)), r.m.s.", yscale="log")
        right.set(xlabel="free sweep", ylabel="largest ‖Δs_l‖/‖s_l‖", yscale="log")
        for axis in (left, right):
            axis.xaxis.get_major_locator().set_params(integer=True)
        left.legend(fontsize="x-small")

    def _draw_curves(self, folders: list[Path], left: Any, right: Any) -> None:
        for folder in folders:
            facts = RunFacts.load(folder / RESULTS_NAME)
            rows = _read(folder / "summary.csv")
            epochs = [int(row["epoch"]) for row in rows]
            style = "--" if facts.settings.get("gradient") == "backprop" else "-"
            left.plot(epochs, [float(row["train_loss"]) for row in rows], style)
            label = f"{folder.name}: test {facts.top1:.1f} %"
            (line,) = right.plot(epochs, [float(row["train_accuracy"]) for row in rows], style, label=label)
            if all(row.get("val_accuracy") for row in rows):
                values = [float(row["val_accuracy"]) for row in rows]
                right.plot(epochs, values, ":", color=line.get_color(), label=f"{folder.name}: validation")
        left.set(xlabel="epoch", ylabel="training loss")
        right.set(xlabel="epoch", ylabel="accuracy, %")
        right.legend(fontsize="x-small")


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw_steps(report: Report, output: Path) -> None:
    """Size and direction of EP's updates in each nudged step, beside BPTT's gradient of that step, for every layer.

    Args:
        report: of a check with steps.
        output: the picture; its suffix chooses the format.

    Raises:
        ValueError: the report has no steps.
    """
    if report.steps is None:
        raise ValueError("The report has no steps to draw; check with gdu=30 or another number of steps.")
    figure, axes = _figure(2)
    sizes, differences = axes
    layers = sorted({row.layer for row in report.steps.rows})
    for layer in layers:
        color = _layer_color(layer, len(layers))
        # Every second step is empty where what comes down to a layer can only come back after two steps.
        rows = [row for row in report.steps.rows if row.layer == layer and not math.isnan(row.cosine)]
        steps = [row.step for row in rows]
        sizes.plot(steps, [row.bptt_norm for row in rows], color=color, lw=1)
        sizes.plot(steps, [row.ep_norm for row in rows], ".", color=color, ms=5)
        relative = [row.difference / row.bptt_norm for row in rows]
        differences.plot(steps, relative, ".-", color=color, lw=1, ms=5)
    sizes.plot([], [], "k.", label="EP: update in nudged step t")
    sizes.plot([], [], "k-", lw=1, label="BPTT: gradient of step T − t")
    sizes.legend(fontsize="small")
    sizes.set(yscale="log", xlabel="step t", ylabel="norm, per kernel")
    differences.set(yscale="log", xlabel="step t", ylabel="‖EP − BPTT‖ / ‖BPTT‖")
    differences.axhline(1, color="0.7", lw=0.8, zorder=0)  # as far off as no update at all
    settings = report.settings
    nudge = f"β={settings['beta']:g} ({settings['nudging']}, {settings['forces']} forces)"
    rest = f"relative change per free step {report.steps.residual:.0e}"
    figure.suptitle(f"{report.model}: λ={settings['feedback']:g}, {nudge}, {rest}", fontsize="medium")
    _layer_bar(figure, differences, len(layers))
    _save(figure, output)


def draw_cosines(reports: Sequence[Report], over: str, output: Path) -> None:
    """The cosine of EP and BPTT per layer: over the values of a setting, or over the layers of several models.

    Args:
        reports: one for each value, or each model.
        over: the setting's name, or `model`.
        output: the picture; its suffix chooses the format.
    """
    figure, (axis,) = _figure(1)
    if over == "model":
        for report in reports:
            label = f"{Path(report.model).name}, relative change per sweep {report.residual:.0e}"
            axis.plot([row.layer for row in report.layers], [row.cosine for row in report.layers], ".-", label=label)
        axis.set(xlabel="layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower center", fontsize="small")
    else:
        depth = len(reports[0].layers)
        values = [report.settings[over] for report in reports]
        for layer in range(depth):
            cosines = [report.layers[layer].cosine for report in reports]
            axis.plot(values, cosines, ".-", color=_layer_color(layer + 1, depth), lw=1)
        if all(isinstance(value, float | int) and value > 0 for value in values):
            axis.set(xscale="log")
        axis.set(xlabel=over, title=reports[0].model)
        _layer_bar(figure, axis, depth)
    axis.set(ylabel="cosine of EP and BPTT")
    _save(figure, output)


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10 if columns > 1 else 6, 4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _layer_color(layer: int, depth: int) -> Any:
    """From dark at the first layer to light at the last."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * (layer - 1) / max(depth - 1, 1))


def _layer_bar(figure: Any, axis: Any, depth: int) -> None:
    """A colour bar that names the layers."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colors = ListedColormap([_layer_color(layer, depth) for layer in range(1, depth + 1)])
    bounds = [layer + 0.5 for layer in range(depth + 1)]
    bar = figure.colorbar(ScalarMappable(BoundaryNorm(bounds, depth), colors), ax=axis, label="layer")
    bar.set_ticks(range(1, depth + 1))
    bar.minorticks_off()


def _save(figure: Any, output: Path) -> None:
    with replacing(output) as temporary:
        figure.savefig(temporary, format=output.suffix.lstrip(".") or "png")


def draw_costs(costs: Sequence[SweepCost], title: str, output: Path) -> None:
    """Memory and time of a training step over the number of sweeps, EP beside BPTT.

    Args:
        costs: of both gradients, and of backprop, which has no sweeps and is drawn as a line.
        title: the model's name.
        output: the picture; its suffix chooses the format.
    """
    figure, axes = _figure(2)
    for gradient, label in {"ep": "EP", "bptt": "BPTT"}.items():
        rows = [cost for cost in costs if cost.gradient == gradient]
        sweeps = [row.sweeps for row in rows]
        axes[0].plot(sweeps, [row.megabytes for row in rows], ".-", label=label)
        axes[1].plot(sweeps, [row.seconds for row in rows], ".-", label=label)
    for row in (cost for cost in costs if cost.gradient == "backprop"):
        for axis, value in zip(axes, (row.megabytes, row.seconds), strict=True):
            axis.axhline(value, color="0.5", lw=0.8, label="backprop, feedforward twin")
    for axis, quantity in zip(axes, ("peak memory of a training step, MB", "time of a training step, s"), strict=True):
        axis.set(xlabel="T: free sweeps, and nudged ones", ylabel=quantity, xscale="log", yscale="log")
        axis.set_xticks(sweeps, [str(value) for value in sweeps])
        axis.set_xticks([], minor=True)
        axis.legend()
    figure.suptitle(title, fontsize="medium")
    _save(figure, output)


def draw_scaling(result: ScalingResult, output: Path) -> None:
    """Time and memory of a training step over each axis, with the fitted lines.

    Args:
        result: of `timm-ep scaling`.
        output: the picture; its suffix chooses the format.
    """
    from matplotlib.figure import Figure

    axes_names = list(result.seconds)
    figure = Figure(figsize=(3.2 * len(axes_names), 6), layout="constrained")
    grid = figure.subplots(2, len(axes_names), squeeze=False)
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
    _save(figure, output)
