"""Finished runs side by side: what signals do for accuracy and nudge, over depth or over any setting."""

import csv
import json
import math
import shlex
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from timm_ep.base.figures import new_figure, save_figure
from timm_ep.base.files import replacing
from timm_ep.base.options import Options
from timm_ep.base.text import in_order
from timm_ep.core.settings import SETTING_NAMES, Settings
from timm_ep.hub.cards import LAYERS_NAME, RESULTS_NAME, RunFacts
from timm_ep.training.options import FREE

__all__ = ["Study"]

_GRADIENTS = {"ep": "EP", "bptt": "BPTT", "backprop": "backprop", "local": "local learning"}
_SIGNALS = {"local_error": "local errors", "distill_features": "distillation", "distill_logits": "distillation"}
_MEASURES = ("epoch", "layer", "scaled_nudge", "free_residual")  # others may be empty, as gains of plain kernels are
# Others come after these, each with a colour of its own.
_TRAININGS = ["plain EP", "EP + local errors", "EP + distillation", "EP + both", "backprop"]


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        group: the folder the run lies in, of those that the study compares.
        training: how the gradient was taken, and by what signals, such as `plain EP` or `EP + both`.
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
            ValueError: runs in one cell of the table that are not seeds of the same training.
        """
        output = self.output or self.runs
        folders = sorted(path.parent for path in self.runs.rglob(RESULTS_NAME) if (path.parent / LAYERS_NAME).is_file())
        if not folders:
            raise FileNotFoundError(
                f"{self.runs} holds no finished run of an ep_vgg*: no {RESULTS_NAME} with a {LAYERS_NAME} in it or "
                "below."
            )
        layers = {folder: _read(folder / LAYERS_NAME) for folder in folders}
        facts = [RunFacts.load(folder / RESULTS_NAME) for folder in folders]
        rows = [
            _row(folder, fact, self.runs, layers[folder], self.over)
            for folder, fact in zip(folders, facts, strict=True)
        ]
        _check_seeds(rows, facts, folders, self.over)
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
        return [{name: float(row[name]) for name in _MEASURES} for row in csv.DictReader(file)]


def _row(folder: Path, facts: RunFacts, root: Path, layers: list[dict[str, float]], over: str | None) -> Row:
    first, last = (
        [row for row in layers if row["epoch"] == epoch] for epoch in (layers[0]["epoch"], layers[-1]["epoch"])
    )
    nudges = [row["scaled_nudge"] for row in first]
    return Row(
        group=folder.parent.relative_to(root).as_posix() if folder != root else ".",
        training=_training(facts),
        depth=len(first),
        value=len(first) if over is None else _setting(facts, over),
        feedback=facts.settings["feedback"],
        seed=facts.seed,
        accuracy=facts.top1,
        first_to_last=nudges[0] / nudges[-1] if nudges[-1] else 0.0,
        worst_residual=max(row["free_residual"] for row in last),
        seconds=facts.train_seconds,
    )


def _training(facts: RunFacts) -> str:
    gradient = _GRADIENTS[facts.settings["gradient"]]
    signals = sorted({_SIGNALS.get(name, name) for name in facts.signals})
    if not signals:
        return "plain EP" if gradient == "EP" else gradient
    both = signals == sorted(set(_SIGNALS.values()))
    return f"{gradient} + {'both' if both else ', '.join(signals)}"


def _check_seeds(rows: list[Row], facts: list[RunFacts], folders: list[Path], over: str | None) -> None:
    """What one cell averages over are to be seeds, and nothing else."""
    cells: dict[Any, list[tuple[dict[str, Any], int, Path]]] = defaultdict(list)
    for row, fact, folder in zip(rows, facts, folders, strict=True):
        cell, ours = cells[row.group, row.training, row.value], _told(fact, over)
        for theirs, seed, place in cell:
            apart = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            if apart or fact.seed == seed:
                why = f"differ in {', '.join(apart)}" if apart else f"have the same seed, {fact.seed}"
                raise ValueError(
                    f"{place} and {folder} are both {row.training}, and {why}: the table would average over that. Put "
                    "them into folders of their own, which are compared side by side, or go over a setting (--over)."
                )
        cell.append((ours, fact.seed, folder))


def _told(facts: RunFacts, over: str | None) -> dict[str, Any]:
    """What decides what a run computes, but for its seed: its settings without the one that is gone over; its net, data
    and signals; and all else that its command says."""
    compared = ("architecture", "dataset", "n_train", "signals", "teacher", "started_from")
    told: dict[str, Any] = {name: _setting(facts, name) for name in SETTING_NAMES if name != over}
    told |= {name: getattr(facts, name) for name in compared}
    options = _options(facts.command)
    try:
        model_args = dict(json.loads(options.pop("model_args", "{}")))
    except (ValueError, TypeError):  # whoever wrote it, not the trainer
        model_args = {"": facts.command}
    options |= {f"model_args.{name}": value for name, value in model_args.items()}
    elsewhere = {*FREE, "seed", "gradient", *(f"model_args.{name}" for name in SETTING_NAMES)}
    told |= {name: value for name, value in options.items() if name not in elsewhere}
    return {**told, "data_dir": Path(options.get("data_dir", "")).name}  # wherever it lies


def _options(command: str) -> dict[str, str]:
    """Those of a command line and of its launcher, which says how many processes there were, by name."""
    try:
        words = [part for word in shlex.split(command) for part in word.split("=", 1)]
    except ValueError:  # whoever wrote it, not the trainer
        return {"command": command}
    return {
        word[2:].replace("-", "_"): following for word, following in pairwise([*words, ""]) if word.startswith("--")
    }


def _setting(facts: RunFacts, name: str) -> Any:
    return facts.settings.get(name, getattr(Settings(), name))


def _order(training: str) -> tuple[int, str]:
    return (_TRAININGS.index(training) if training in _TRAININGS else len(_TRAININGS)), training


def _colors(rows: list[Row]) -> dict[str, str]:
    others = {row.training for row in rows}.difference(_TRAININGS)
    return {training: f"C{number}" for number, training in enumerate([*_TRAININGS, *sorted(others)])}


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
        for training in sorted({row.training for row in members}, key=_order):
            of_training = [row for row in members if row.training == training]
            cells = {value: _mean(some) for value, some in _grouped(of_training, lambda row: row.value).items()}
            lines.append(f"| {training} | {' | '.join(cells.get(value, '') for value in values)} |")
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
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="x-small")
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    save_figure(figure, path)


def _accuracy_panel(ax: Any, group: str, rows: list[Row], axis: str) -> None:
    for training, color in _colors(rows).items():
        members = [row for row in rows if (row.group, row.training) == (group, training)]
        if members:
            means = {
                value: statistics.mean(row.accuracy for row in some)
                for value, some in _grouped(members, lambda row: row.value).items()
            }
            style = "-" if "EP" in training else "--"
            ax.plot(list(means), list(means.values()), f"o{style}", color=color, markersize=4, label=training)
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
    colors = _colors(rows)
    for row, table in sorted(zip(rows, layers, strict=True), key=lambda pair: _order(pair[0].training)):
        if (row.group, row.depth) == (group, deepest) and "EP" in row.training:
            first = [one for one in table if one["epoch"] == table[0]["epoch"]]
            ax.semilogy(
                [one["layer"] for one in first],
                [one["scaled_nudge"] or float("nan") for one in first],
                "o-",
                color=colors[row.training],
                markersize=4,
                label=row.training if row.training not in ax.get_legend_handles_labels()[1] else None,
            )
    ax.set(title=f"{group}, {deepest} convolutions", xlabel="layer", ylabel="nudge / (β λ^(N−l)), r.m.s.")
