"""What a run's log looks like: learning curves, and what each layer saw."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from timm_ep.base.figures import new_figure, save_figure
from timm_ep.base.options import Options
from timm_ep.hub.cards import CURVES_NAME, LAYERS_NAME, LOG_NAME, RESULTS_NAME, SETTLING_NAME, RunFacts

__all__ = ["Plot"]


@dataclass
class Plot(Options):
    """Draw runs side by side: how they learned, or what each of their layers saw.

    Args:
        runs: a run's folder, or a folder of such folders.
        output: the picture; its suffix chooses the format (png, svg, pdf).
        kind: `curves`: loss and accuracy over the epochs, with each run's test accuracy. `layers`: the nudge of every
            layer (does it vanish with depth?) and the change of the states sweep by sweep (does the net settle?), in
            the first epoch (dashed) and the last.
    """

    runs: Path
    output: Path = Path(CURVES_NAME)
    kind: Literal["curves", "layers"] = "curves"

    def run(self) -> Path:
        """Draw, and return the picture's path.

        Raises:
            FileNotFoundError: no finished run there, or none with layers.
        """
        wanted = RESULTS_NAME if self.kind == "curves" else LAYERS_NAME
        folders = sorted(path.parent for path in self.runs.rglob(wanted))
        if not folders:
            raise FileNotFoundError(f"{self.runs} holds no finished run: no {wanted} in it or below.")
        draw_runs([(folder.name, folder) for folder in folders], self.output, self.kind)
        return self.output


def draw_runs(runs: Sequence[tuple[str, Path]], output: Path, kind: str = "curves") -> None:
    """Draw runs, each under its name, as `Plot` does."""
    figure, (axes,) = new_figure(2)
    (_draw_curves if kind == "curves" else _draw_layers)(runs, *axes)
    save_figure(figure, output)


def _draw_layers(runs: Sequence[tuple[str, Path]], left: Any, right: Any) -> None:
    for number, (name, folder) in enumerate(runs):
        layers, settling = _read(folder / LAYERS_NAME), _read(folder / SETTLING_NAME)
        for epoch, style in {layers[0]["epoch"]: "--", layers[-1]["epoch"]: "-"}.items():
            rows = [row for row in layers if row["epoch"] == epoch]
            nudges = [float(row["scaled_nudge"]) or math.nan for row in rows]
            label = name if epoch == layers[-1]["epoch"] else None
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


def _draw_curves(runs: Sequence[tuple[str, Path]], left: Any, right: Any) -> None:
    for name, folder in runs:
        facts = RunFacts.load(folder / RESULTS_NAME)
        rows = _read(folder / LOG_NAME)[: facts.epochs]  # it may be on its way to more
        epochs = [int(row["epoch"]) for row in rows]
        style = "--" if facts.settings.get("gradient") == "backprop" else "-"
        left.plot(epochs, [float(row["train_loss"]) for row in rows], style)
        label = f"{name}: test {facts.top1:.1f} %"
        (line,) = right.plot(epochs, [float(row["train_accuracy"]) for row in rows], style, label=label)
        if all(row.get("val_accuracy") for row in rows):
            values = [float(row["val_accuracy"]) for row in rows]
            right.plot(epochs, values, ":", color=line.get_color(), label=f"{name}: validation")
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="accuracy, %")
    right.legend(fontsize="x-small")


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
