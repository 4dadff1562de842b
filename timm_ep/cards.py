"""Model cards: the facts of a run, and the README of its repository made from them."""

import dataclasses
import json
import os
import platform
import types
import typing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from timm_ep.files import replacing

__all__ = ["RunFacts"]

RESULTS_NAME = "results.json"


def machine_description() -> str:
    """The processor that trains here: the GPU if there is one, else the CPU and the threads torch uses."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class RunFacts:
    """What a finished run states about itself: `results.json` in its folder, from which its card is made.

    Attributes:
        architecture: model name in timm's registry, for example `ep_vgg9`.
        command: the command line that repeats the run.
        seed: of the run.
        dataset: name as given to the trainer, for example `torch/cifar10` or `hfds/uoft-cs/cifar10`.
        n_train: training images.
        n_test: test images, never seen in training or for choosing anything.
        top1: test accuracy in percent.
        top5: test accuracy in percent of the label being among the five likeliest; None with five classes or fewer.
        epochs: trained.
        train_seconds: wall-clock seconds of training.
        settings: the model's EP settings, `dataclasses.asdict(model.settings)`.
        feedback_share: ‖s* − s_ff‖ / ‖s*‖ on test images, how far feedback moves the states from the feedforward pass;
            None where there is no feedback (`gradient="backprop"`).
        signals: weight of each intermediate error signal by name; empty for plain EP.
        teacher: timm name of the distillation teacher, if any.
        machine: the processor it was trained on.
        torch_version: of PyTorch.
        timm_version: of timm.
        timm_ep_version: of this package.
    """

    architecture: str
    command: str
    seed: int
    dataset: str
    n_train: int
    n_test: int
    top1: float
    top5: float | None
    epochs: int
    train_seconds: float
    settings: dict[str, Any]
    feedback_share: float | None
    signals: dict[str, float] = field(default_factory=dict)
    teacher: str | None = None
    machine: str = field(default_factory=machine_description)
    torch_version: str = field(default_factory=lambda: torch.__version__)
    timm_version: str = field(default_factory=lambda: version("timm"))
    timm_ep_version: str = field(default_factory=lambda: version("timm_ep"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON to `path`, atomically."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RunFacts":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or fields that are missing, unknown or of the wrong type.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; training writes it at the end, with the run's facts.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); expected the facts that training writes.") from error
        _check_fields(cls, values, path)
        return cls(**values)


def _check_fields(cls: type, values: Any, path: Path) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected an object with the facts of a run.")
    hints = typing.get_type_hints(cls)
    unknown, missing = sorted(values.keys() - hints.keys()), sorted(hints.keys() - values.keys())
    if unknown or missing:
        raise ValueError(f"{path} does not describe a run: unknown fields {unknown}, missing fields {missing}.")
    for name, hint in hints.items():
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple(typing.get_origin(kind) or kind for kind in allowed)
        value = values[name]
        if not isinstance(value, (*kinds, int) if float in kinds else kinds) or isinstance(value, bool):
            raise ValueError(f"{path}: {name} is {value!r}; expected {' or '.join(kind.__name__ for kind in kinds)}.")
