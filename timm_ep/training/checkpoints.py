"""Checkpoints of a training: what is written, how none is ever half-written, and which one a run goes on from.

timm's `CheckpointSaver` keeps the best and the last as well, but it does not sync what it writes before it renames it,
removes older files before the new one is safe, and its files need unpickling of arbitrary objects (`args`). Ours hold
tensors, numbers and strings alone, and load by `torch.load(weights_only=True)`.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from timm_ep.base.files import replacing
from timm_ep.training.options import ARGS_NAME

__all__ = ["CHECKPOINTS_NAME", "CheckpointStore", "Newest", "UnusableCheckpoint", "load_checkpoint", "unfinished"]

CHECKPOINTS_NAME = "checkpoints"  # folder of a run
FORMAT = "timm_ep training checkpoint 1"


class UnusableCheckpoint(ValueError):
    """A file that is no whole checkpoint of this package."""


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `CheckpointStore.save` wrote to `path`, on the CPU; every byte is checked, and nothing is unpickled.

    Raises:
        UnusableCheckpoint: cut off, damaged, or written by something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UnusableCheckpoint(f"{path} is damaged: the checksum of {damaged} does not match.")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise UnusableCheckpoint(f"{path} is cut off, or no checkpoint at all: {error}.") from error
    except UnusableCheckpoint:
        raise
    except Exception as error:
        raise UnusableCheckpoint(f"{path} cannot be loaded as a checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UnusableCheckpoint(
            f"{path} was not written by the trainer of this version; expected a {FORMAT!r}. To start from the weights "
            "of another training, give its folder as --initial-checkpoint."
        )
    return state


@dataclass(frozen=True)
class CheckpointStore:
    """The folder of a run's checkpoints: `step-N.pt` after N updates, and `best.pt`.

    Attributes:
        folder: is created when the first is saved.
        keep: newest to keep, at least 2: the one before the newest is never removed, in case that one is damaged.
    """

    folder: Path
    keep: int = 2

    @property
    def best(self) -> Path:
        """The one with the best validation accuracy."""
        return self.folder / "best.pt"

    def steps(self) -> list[Path]:
        """Those by step, newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def save(self, state: dict[str, Any], step: int, best: bool = False) -> Path:
        """Write, sync and rename; only then remove what is older than the `keep` newest.

        Args:
            state: tensors, numbers, strings, and lists and dicts of them.
            step: updates done.
            best: write it as `best.pt` too.

        Raises:
            OSError: not written, for example for want of space; what was there before is intact.
        """
        path = self.folder / f"step-{step:09d}.pt"
        for target in (path, self.best) if best else (path,):  # of the newest the best can be made, see `repair_best`
            self._write({"format": FORMAT, **state}, target)
        for old in [other for other in self.steps() if other != path][self.keep - 1 :]:
            old.unlink()
        return path

    def _write(self, state: dict[str, Any], path: Path) -> None:
        try:
            # Through a file of Python's, whose error names the cause; torch's own writer only says that it failed.
            with replacing(path) as temporary, temporary.open("wb") as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:
            intact = next((f"{other} is intact" for other in self.steps()), "no earlier one was there")
            raise OSError(
                f"The checkpoint {path} could not be written ({_cause(error)}); {intact}. Make room, and go on with "
                "--resume."
            ) from error

    def repair_best(self, state: dict[str, Any]) -> dict[str, Any]:
        """The progress that `best.pt` was written with, for a run that goes on from `state`.

        It may be another than the state knows of. A kill may have come between the two files: then the state is itself
        the best, and is written again. Or the newest was damaged: then `best.pt` is of an epoch to come, and stands.
        Where it cannot be read, none is the best: that of the epochs to come is, and the last without any.
        """
        progress = state["progress"]
        if not progress["best_epoch"]:
            return progress
        try:
            found = load_checkpoint(self.best)["progress"] if self.best.is_file() else None
        except UnusableCheckpoint:
            found = None
        is_best = progress["best_epoch"] == progress["epoch"] and not progress["update"]
        if is_best and (found is None or found["best_epoch"] < progress["best_epoch"]):
            self._write({"format": FORMAT, **state}, self.best)
            return progress
        return found or {**progress, "best_epoch": 0, "best": (0.0, float("inf"))}

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        for left in self.folder.glob(".*-*.pt"):
            left.unlink()

    def discard(self) -> None:
        """Remove all of them, and the folder if nothing else is in it."""
        self.clean()
        for path in (*self.steps(), self.best):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def newest(self) -> "Newest":
        """The newest that is good.

        Raises:
            UnusableCheckpoint: there are some, and none is good.
        """
        refused: list[str] = []
        for path in self.steps():
            try:
                return Newest(path, load_checkpoint(path), refused)
            except UnusableCheckpoint as error:
                refused.append(str(error))
        if refused:
            raise UnusableCheckpoint(
                f"{' '.join(refused)} There is no good one before. Start anew with --overwrite, or in another --output "
                f"than {self.folder.parent}."
            )
        return Newest(None, {}, [])


class Newest(NamedTuple):
    """The newest good checkpoint and what it holds (None: there is none), and why newer ones were refused."""

    path: Path | None
    state: dict[str, Any]
    refused: list[str]


def unfinished(run: Path) -> str:
    """What to do about a run that left checkpoints and no weights: it ended before it could write them."""
    return (
        f"{run} is of a training that was broken off, and has checkpoints but no weights. Go on with it: timm-ep train "
        f"--config {run / ARGS_NAME} --resume; stopped by Ctrl-C or SIGTERM, or at its end, it writes them."
    )


def _cause(error: Exception) -> str:
    """The first cause: torch wraps the error of the system, and says little itself."""
    while isinstance(error.__cause__ or error.__context__, Exception):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error)
