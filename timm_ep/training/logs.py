"""What a training shows while it runs, and the logs it leaves: a progress bar or lines, a CSV, TensorBoard."""

import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # in a notebook, its own kind of bar

from timm_ep.base.files import replacing
from timm_ep.base.text import duration
from timm_ep.hub.cards import LAYERS_NAME, LOG_NAME

__all__ = ["Pulse", "RunLog"]

_LINE_INTERVAL = 60.0  # seconds between lines where there is no terminal to redraw


@dataclass(frozen=True)
class Pulse:
    """Where an epoch is: means over its updates so far, the last residual, and images a second."""

    loss: float
    accuracy: float
    residual: float
    sweeps: int
    rate: float
    lr: float


class RunLog:
    """The log of a run. Only the primary process shows and writes anything.

    Args:
        folder: of the run.
        epochs: of the run.
        updates: of an epoch.
        quiet: show warnings only.
        tensorboard: write event files too.
        primary: whether this process is the one that logs.
        done: updates done before, whose events are already there.

    Raises:
        ModuleNotFoundError: TensorBoard is wanted and not installed.
    """

    def __init__(
        self,
        folder: Path,
        epochs: int,
        updates: int,
        quiet: bool = False,
        tensorboard: bool = False,
        primary: bool = True,
        done: int = 0,
    ) -> None:
        self.folder, self.epochs, self.updates, self.primary = folder, epochs, updates, primary
        self.shown = primary and not quiet
        self.terminal = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.bar: Any = None
        self.events: Any = None
        self.started, self.first = time.monotonic(), done
        self.last_line = self.started
        if tensorboard and primary:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "log_tensorboard needs the tensorboard package: pip install timm_ep[logging]."
                ) from error
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def say(self, text: str) -> None:
        """A line of information, unless quiet."""
        if self.shown:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """A line that is shown even when quiet."""
        if self.primary:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def start_epoch(self, epoch: int, done: int) -> None:
        """Begin epoch number `epoch`, from 1, of which so many updates are done."""
        if self.shown and self.terminal:
            self.bar = tqdm(total=self.updates, initial=done, desc=f"epoch {epoch}/{self.epochs}", leave=False)

    def update(self, epoch: int, done: int, pulse: Pulse) -> None:
        """Show and log the state after an update: `done` of epoch `epoch`."""
        total = (epoch - 1) * self.updates + done
        if self.events is not None:
            for name in ("loss", "accuracy", "residual", "rate", "lr"):
                self.events.add_scalar(f"train/{name}", getattr(pulse, name), total)
        if not self.shown:
            return
        now = time.monotonic()
        seconds = (now - self.started) / max(total - self.first, 1) * (self.epochs * self.updates - total)
        shown = {
            "loss": f"{pulse.loss:.3f}",
            "accuracy": f"{pulse.accuracy:.1%}",
            **({"residual": f"{pulse.residual:.1e}/{pulse.sweeps}"} if pulse.sweeps else {}),
            "images/s": f"{pulse.rate:.0f}",
            "left": duration(seconds),
        }
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
        elif now - self.last_line > _LINE_INTERVAL:
            self.last_line = now
            words = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"epoch {epoch}/{self.epochs}, update {done}/{self.updates}: {words}")

    def end_epoch(self, rows: list[dict[str, Any]]) -> None:
        """Show the last row, and write all of them."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.write(rows)
        row, done = rows[-1], rows[-1]["epoch"] * self.updates
        seconds = (time.monotonic() - self.started) / max(done - self.first, 1) * (self.epochs * self.updates - done)
        validated = "" if row["val_accuracy"] == "" else f", validation {row['val_accuracy']:.1f} %"
        settled = f", residual {row['residual']:.1e} after {row['sweeps']} sweeps" if row["sweeps"] else ""
        self.say(
            f"epoch {row['epoch']}/{self.epochs}: loss {row['train_loss']:.3f}, accuracy {row['train_accuracy']:.1f} %"
            f"{validated}{settled}, {row['images_per_second']:.0f} images/s, {duration(row['seconds'])}, "
            f"{duration(seconds)} left"
        )
        if self.events is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "epoch":
                    self.events.add_scalar(f"epoch/{name}", value, row["epoch"])
            self.events.flush()

    def write_layers(self, rows: list[dict[str, Any]]) -> None:
        """Write layers.csv, and the rows of the last epoch as events: a curve for each quantity and layer."""
        self.write(rows, LAYERS_NAME)
        if self.events is not None and rows:
            epoch = rows[-1]["epoch"]
            for row in rows:
                if row["epoch"] == epoch:
                    for name, value in row.items():
                        if value is not None and name not in ("epoch", "layer"):  # plain kernels have no gains
                            self.events.add_scalar(f"{name}/layer_{row['layer']:02d}", value, epoch)
            self.events.flush()

    def write(self, rows: list[dict[str, Any]], name: str = LOG_NAME) -> None:
        """Write a table of the run under this name."""
        if self.primary and rows:
            names = dict.fromkeys(name for row in rows for name in row)
            with replacing(self.folder / name) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(names), restval="")
                writer.writeheader()
                writer.writerows(rows)

    def close(self) -> None:
        """Close the bar and the event files."""
        for each in (self.bar, self.events):
            if each is not None:
                each.close()
