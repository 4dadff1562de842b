"""Figures of runs, with matplotlib (`pip install timm_ep[plots]`)."""

import csv
from dataclasses import dataclass
from pathlib import Path

from timm_ep.cards import RESULTS_NAME, RunFacts
from timm_ep.files import replacing


@dataclass
class Plot:
    """Draw the learning curves of runs side by side.

    Args:
        runs: a run's folder, or a folder of such folders.
        output: the picture; its suffix chooses the format (png, svg, pdf).
    """

    runs: Path
    output: Path = Path("curves.png")

    def run(self) -> Path:
        """Draw training loss and accuracy over epochs, with each run's test accuracy, and return the picture's path."""
        from matplotlib.figure import Figure

        folders = sorted(path.parent for path in self.runs.rglob(RESULTS_NAME))
        if not folders:
            raise FileNotFoundError(f"{self.runs} holds no finished run: no {RESULTS_NAME} in it or below.")
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for folder in folders:
            facts = RunFacts.load(folder / RESULTS_NAME)
            with (folder / "summary.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
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
        with replacing(self.output) as temporary:
            figure.savefig(temporary, format=self.output.suffix.lstrip(".") or "png")
        return self.output
