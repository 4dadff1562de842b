"""Finished runs side by side: what signals do for accuracy and nudge, over depth or over any setting."""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timm_ep.base.figures import new_figure, save_figure
from timm_ep.base.files import replacing
from timm_ep.base.options import Options
from timm_ep.base.text import in_order
from timm_ep.core.settings import SETTING_NAMES, Settings
from timm_ep.hub.cards import RESULTS_NAME, RunFacts

__all__ = ["Study"]

TRAININGS = ("plain EP", "EP + local errors", "EP + distillation", "EP + both", "backprop")


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        group: the folder the run lies in, of those that the study compares.
        training: one of `TRAININGS`.
        depth: convolutions.
        value: of the setting that the study goes over, its default where the run is older; the depth, if none.
        feedback: λ.
        seed: of the run.
        accuracy: on the test images, in percent.
        first_to_last: scaled nudge of the first layer over that of the last, at the end of the first epoch.
        worst_residual: largest free residual of a layer, at the end of training.
        seconds: of training.
    """

    group: str
    training: str
    depth: int
    value: float | str
    feedback: float
    seed: int
    accuracy: float
    first_to_last: float
    worst_residual: float
    seconds: float


@dataclass
class Study(Options):
    """Table and figures of many finished runs of `ep_vgg*`: accuracy and nudge by signals, over depth or a setting.

    Args:
        runs: folder that is searched for runs. Those in the same folder make a group, with a panel of its own.
        output: folder for study.csv (a row a run), study.md (mean ± s.d. over seeds), accuracy.png and nudge.png;
            by default `runs`.
        over: the setting that the table and accuracy.png go over, such as `beta` or `state_noise`; by default the
            depth, in convolutions.
    """

    runs: Path
    output: Path | None = None
    over: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over is not None and self.over not in SETTING_NAMES:
            raise ValueError(f"over={self.over!r} is no setting; choose one of {', '.join(SETTING_NAMES)}.")

    def run(self) -> list[Row]:
        """Write the table and the figures, and return a row for each run.

        Raises:
            FileNotFoundError: no finished run there.
        """
        output = self.output or self.runs
        folders = sorted(
            path.parent for path in self.runs.rglob(RESULTS_NAME) if (path.parent / "layers.csv").is_file()
        )
        if not folders:
            raise FileNotFoundError(
                f"{self.runs} holds no finished run of an ep_vgg*: no {RESULTS_NAME} with a layers.csv in it or below."
            )
        layers = {folder: _read(folder / "layers.csv") for folder in folders}
        rows = [_row(folder, self.runs, layers[folder], self.over) for folder in folders]
        with replacing(output / "study.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        axis = "convolutions" if self.over is None else self.over
        table = _table(rows, axis)
        with replacing(output / "study.md") as temporary:
            temporary.write_text(table, encoding="utf-8")
        _draw(output / "accuracy.png", rows, _accuracy_panel, [rows, axis])
        _draw(output / "nudge.png", rows, _nudge_panel, [rows, [layers[folder] for folder in folders]])
        print(table)
        return rows


def _read(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _row(folder: Path, root: Path, layers: list[dict[str, float]], over: str | None) -> Row:
    facts = RunFacts.load(folder / RESULTS_NAME)
    first, last = (
        [row for row in layers if row["epoch"] == epoch] for epoch in (layers[0]["epoch"], layers[-1]["epoch"])
    )
    nudges = [row["scaled_nudge"] for row in first]
    return Row(
        group=folder.parent.relative_to(root).as_posix() if folder != root else ".",
        training=_training(facts),
        depth=len(first),
        value=len(first) if over is None else facts.settings.get(over, getattr(Settings(), over)),
        feedback=facts.settings["feedback"],
        seed=facts.seed,
        accuracy=facts.top1,
        first_to_last=nudges[0] / nudges[-1] if nudges[-1] else 0.0,
        worst_residual=max(row["free_residual"] for row in last),
        seconds=facts.train_seconds,
    )


def _training(facts: RunFacts) -> str:
    if facts.settings["gradient"] == "backprop":
        return "backprop"
    local, distilled = "local_error" in facts.signals, bool(facts.signals.keys() - {"local_error"})
    return TRAININGS[local + 2 * distilled]


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items(), key=lambda item: in_order(item[0]) if isinstance(item[0], str) else item[0]))


def _table(rows: list[Row], axis: str) -> str:
    """Markdown: for each group, accuracy by training (rows) and value (columns)."""
    lines = []
    for group, members in _grouped(rows, lambda row: row.group).items():
        values = sorted({row.value for row in members})
        lines += [f"| {group}: {axis} | {' | '.join(map(str, values))} |", "|---" * (len(values) + 1) + "|"]
        for training, of_training in _grouped(members, lambda row: TRAININGS.index(row.training)).items():
            cells = {value: _mean(some) for value, some in _grouped(of_training, lambda row: row.value).items()}
            lines.append(f"| {TRAININGS[training]} | {' | '.join(cells.get(value, '') for value in values)} |")
        lines.append("")
    return "\n".join(lines)


def _mean(rows: list[Row]) -> str:
    values = [row.accuracy for row in rows]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _draw(path: Path, rows: list[Row], panel: Callable[..., None], data: list[Any]) -> None:
    """A figure with a panel for each group, three in a row."""
    groups = list(_grouped(rows, lambda row: row.group))
    columns = min(len(groups), 3)
    figure, axes = new_figure(columns, math.ceil(len(groups) / columns))
    for group, ax in zip(groups, axes.flat, strict=False):
        panel(ax, group, *data)
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    axes.flat[0].legend(fontsize="x-small")
    save_figure(figure, path)


def _accuracy_panel(ax: Any, group: str, rows: list[Row], axis: str) -> None:
    for number, training in enumerate(TRAININGS):
        members = [row for row in rows if (row.group, row.training) == (group, training)]
        if members:
            means = {
                value: statistics.mean(row.accuracy for row in some)
                for value, some in _grouped(members, lambda row: row.value).items()
            }
            style = "--" if training == "backprop" else "-"
            ax.plot(list(means), list(means.values()), f"o{style}", color=f"C{number}", markersize=4, label=training)
    positive = [
        row.value for row in rows if row.group == group and isinstance(row.value, float | int) and row.value > 0
    ]
    if positive and max(positive) >= 100 * min(positive):  # over orders of magnitude, and 0
        ax.set_xscale("symlog", linthresh=min(positive))
    # The same tens in every panel, so that they compare.
    tens = [row.accuracy // 10 * 10 for row in rows]
    ax.set(title=group, xlabel=axis, ylabel="test accuracy, %", ylim=(min(tens), max(tens) + 10))


def _nudge_panel(ax: Any, group: str, rows: list[Row], layers: list[list[dict[str, float]]]) -> None:
    """The deepest EP nets of the group, at the end of the first epoch."""
    deepest = max(row.depth for row in rows if row.group == group)
    for row, table in sorted(zip(rows, layers, strict=True), key=lambda pair: TRAININGS.index(pair[0].training)):
        if (row.group, row.depth) == (group, deepest) and row.training != "backprop":
            first = [one for one in table if one["epoch"] == table[0]["epoch"]]
            ax.semilogy(
                [one["layer"] for one in first],
                [one["scaled_nudge"] or float("nan") for one in first],
                "o-",
                color=f"C{TRAININGS.index(row.training)}",
                markersize=4,
                label=row.training,
            )
    ax.set(title=f"{group}, {deepest} convolutions", xlabel="layer", ylabel="nudge / (β λ^(N−l)), r.m.s.")
