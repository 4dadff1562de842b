"""Model cards: the facts of a run, and the README of its repository made from them."""

import dataclasses
import html
import json
import os
import platform
import re
import types
import typing
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_ep.files import replacing

__all__ = ["RESULTS_NAME", "RunFacts", "render_card"]

RESULTS_NAME = "results.json"

# What the trainer calls a dataset: its title, and its id on the Hub where it has one.
_DATASETS: dict[str, tuple[str, str | None]] = {
    "digits": ("scikit-learn's handwritten digits", None),
    "torch/cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "torch/cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "torch/mnist": ("MNIST", "ylecun/mnist"),
    "torch/fashion_mnist": ("Fashion-MNIST", "zalando-datasets/fashion_mnist"),
}


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


def render_card(
    config: dict[str, Any], facts: RunFacts, twin: RunFacts | None, *, name: str, source: str, parameters: int
) -> str:
    """The README of a model's repository: Hub metadata, usage, training, results, limits, citation.

    Every text that came from a run is escaped: in the card it is text, whatever it holds.

    Args:
        config: of the model, from `timm_ep.repository.read_config`.
        facts: of the run.
        twin: facts of the backprop twin, if it was trained.
        name: of the model, for example `ep_vgg9.cifar10`.
        source: what `timm.create_model` takes, for example `hf-hub:user/ep_vgg9.cifar10`.
        parameters: how many the model has.

    Returns:
        Markdown with a YAML header.
    """
    cfg, in_chans, classes = config["pretrained_cfg"], config["model_args"].get("in_chans", 3), config["num_classes"]
    input_size = cfg.get("input_size", [in_chans, 224, 224])
    dataset_name, dataset_id = _dataset(facts.dataset)
    accuracies = [("Top-1 accuracy (%)", facts.top1), ("Top-5 accuracy (%)", facts.top5)]
    metadata = ModelCardData(
        library_name="timm",
        license=cfg.get("license") or "apache-2.0",
        tags=["image-classification", "timm", "timm_ep", "equilibrium-propagation"],
        pipeline_tag="image-classification",
        datasets=[dataset_id] if dataset_id else None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset_id or facts.dataset,
                dataset_name=dataset_name,
                dataset_split="test",
                metric_type="accuracy",
                metric_name=metric,
                metric_value=round(value, 2),
            )
            for metric, value in accuracies
            if value is not None
        ],
    )
    texts = {
        "name": name,
        "architecture": facts.architecture,
        "parameters": f"{parameters:,}",
        "input_size": " × ".join(map(str, input_size)),
        "dataset_name": dataset_name,
        "n_train": f"{facts.n_train:,}",
        "n_test": f"{facts.n_test:,}",
        "feedback_share": "none" if facts.feedback_share is None else f"{facts.feedback_share:.1%}",
        "signals": ", ".join(f"{signal} (weight {weight})" for signal, weight in facts.signals.items()) or "none",
        "teacher": facts.teacher or "none",
        "epochs": facts.epochs,
        "seed": facts.seed,
        "machine": facts.machine,
        "timm_ep_version": facts.timm_ep_version,
        "timm_version": facts.timm_version,
        "torch_version": facts.torch_version,
        **_outcome(facts),
    }
    card = ModelCard.from_template(
        metadata,
        template_str=files("timm_ep").joinpath("card_template.md").read_text(encoding="utf-8"),
        **{key: _escaped(text) for key, text in texts.items()},
        settings={key: _escaped(value) for key, value in facts.settings.items()},
        by_ep=facts.settings.get("gradient") == "ep",
        twin=twin and {key: _escaped(text) for key, text in _outcome(twin).items()},
        source=source,
        command=_one_line(facts.command),
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", facts.command)), default=0)),
        num_classes=classes,
        in_chans=in_chans,
        top=min(5, classes),
        image_mode="L" if in_chans == 1 else "RGB",
        batch_shape=", ".join(map(str, (2, *input_size))),
    )
    return str(card).rstrip() + "\n"


def _outcome(facts: RunFacts) -> dict[str, str]:
    minutes, seconds = divmod(round(facts.train_seconds), 60)
    hours, rest = divmod(minutes, 60)
    return {
        "top1": f"{facts.top1:.2f} %",
        "top5": "" if facts.top5 is None else f"{facts.top5:.2f} %",
        "time": f"{hours} h {rest} min" if hours else f"{minutes} min {seconds} s",
    }


def _dataset(name: str) -> tuple[str, str | None]:
    """Title and Hub id; `hfds/OWNER/NAME` names a dataset by its Hub id."""
    if re.fullmatch(r"hfds/[\w.-]+/[\w.-]+", name):
        return name.removeprefix("hfds/"), name.removeprefix("hfds/")
    return _DATASETS.get(name, (_one_line(name), None))


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _escaped(value: Any) -> str:
    """Text that Markdown and HTML show as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", html.escape(_one_line(str(value)), quote=False))
