"""Model cards: the facts of a run, and the README of its repository made from them."""

import dataclasses
import html
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_ep.base.files import replacing
from timm_ep.base.options import Options
from timm_ep.base.text import duration
from timm_ep.hub.redaction import redacted
from timm_ep.hub.repository import CONFIG_NAME, TEXT_LIMIT, read_config, verify_config
from timm_ep.version import __version__

__all__ = [
    "CARD_NAME",
    "CURVES_NAME",
    "LAYERS_NAME",
    "LOG_NAME",
    "RESULTS_NAME",
    "SETTLING_NAME",
    "TWIN_NAME",
    "Card",
    "RunFacts",
    "render_card",
]

CARD_NAME = "README.md"
RESULTS_NAME = "results.json"
TWIN_NAME = "twin.json"  # results.json of the backprop twin
LOG_NAME = "summary.csv"
LAYERS_NAME = "layers.csv"
SETTLING_NAME = "settling.csv"
CURVES_NAME = "curves.png"

_HUB_ID = r"[\w.-]+/[\w.-]+"

# What the trainer calls a dataset: its title, and its id on the Hub where it has one.
_DATASETS: dict[str, tuple[str, str | None]] = {
    "digits": ("scikit-learn's handwritten digits", None),
    "torch/cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "torch/cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "torch/mnist": ("MNIST", "ylecun/mnist"),
    "torch/kmnist": ("Kuzushiji-MNIST", None),
    "torch/fashion_mnist": ("Fashion-MNIST", "zalando-datasets/fashion_mnist"),
}


@dataclass(frozen=True)
class RunFacts:
    """What a finished run states about itself: `results.json` in its folder, from which its card is made.

    Attributes:
        architecture: model name in timm's registry, for example `ep_vgg9`.
        command: the command line that repeats the run.
        seed: of the run.
        dataset: name as given to the trainer, for example `torch/cifar10` or `hfds/uoft-cs/cifar10`.
        n_train: training images.
        n_test: test images, never seen in training or, unless `tested_on` says so, for choosing anything.
        top1: test accuracy in percent.
        top5: test accuracy in percent of the label being among the five likeliest; None with five classes or fewer.
        epochs: trained.
        train_seconds: wall-clock seconds of training.
        machine: the processors it was trained on.
        settings: the model's EP settings, `dataclasses.asdict(model.settings)`.
        feedback_share: ‖s* − s_ff‖ / ‖s*‖ on test images, how far feedback moves the states from the feedforward pass;
            None where there is no feedback (`gradient="backprop"`).
        feedback_shares: the same of every layer; the largest of them is `feedback_share`.
        couplings: √λ‖P_l W_l‖ of every layer (`timm_ep.core.coupling`), which says how recurrent the net is.
        signals: weight of each intermediate error signal by name; empty for plain EP.
        teacher: timm name of the distillation teacher, if any.
        started_from: the trained weights that the run started from, a name or a folder; None for random ones. Epochs
            and seconds are those after them.
        torch_version: of PyTorch.
        timm_version: of timm.
        timm_ep_version: of this package.
        dataset_id: of the data on the Hub, such as `uoft-cs/cifar10`, where `dataset` does not tell.
        tested_on: `test`, or `validation` where there are no other images than those that chose the best epoch.
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
    machine: str
    settings: dict[str, Any]
    feedback_share: float | None
    feedback_shares: list[float] = field(default_factory=list)
    couplings: list[float] = field(default_factory=list)
    signals: dict[str, float] = field(default_factory=dict)
    teacher: str | None = None
    started_from: str | None = None
    torch_version: str = field(default_factory=lambda: torch.__version__)
    timm_version: str = timm.__version__
    timm_ep_version: str = __version__
    dataset_id: str | None = None
    tested_on: str = "test"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON to `path`, atomically and without access tokens, wherever one was typed."""
        with replacing(path) as temporary:
            temporary.write_text(redacted(json.dumps(dataclasses.asdict(self), indent=2)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RunFacts":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or fields that are missing (without a default), unknown or of the wrong type.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; training writes it at the end, with the run's facts.")
        if path.stat().st_size > TEXT_LIMIT:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes; the facts of a run have at most {TEXT_LIMIT:,}."
            )
        try:
            values = json.loads(redacted(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); expected the facts that training writes.") from error
        _check_fields(cls, values, path)
        return cls(**values)

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> "RunFacts | None":
        """Read what `save` wrote, or None where there is no such file."""
        return cls.load(path) if os.path.exists(path) else None


def _check_fields(cls: type, values: Any, path: Path) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected an object with the facts of a run.")
    hints = typing.get_type_hints(cls)
    needed = {
        option.name
        for option in dataclasses.fields(cls)
        if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
    }
    unknown, missing = sorted(values.keys() - hints.keys()), sorted(needed - values.keys())
    if unknown or missing:
        raise ValueError(f"{path} does not describe a run: unknown fields {unknown}, missing fields {missing}.")
    for name in hints.keys() & values.keys():
        hint = hints[name]
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple(typing.get_origin(kind) or kind for kind in allowed)
        value = values[name]
        right_kind = isinstance(value, (*kinds, int) if float in kinds else kinds) and not isinstance(value, bool)
        if not right_kind or (isinstance(value, int | float) and not abs(value) < 1e15):
            raise ValueError(f"{path}: {name} is {value!r}; expected {' or '.join(kind.__name__ for kind in kinds)}.")
        if isinstance(value, list) and not all(type(item) in (int, float) and abs(item) < 1e15 for item in value):
            raise ValueError(f"{path}: {name} is {value!s:.100}; expected a list of numbers.")


def render_card(
    config: dict[str, Any],
    facts: RunFacts | None,
    twin: RunFacts | None = None,
    *,
    name: str,
    source: str,
    parameters: int,
    files_beside: Sequence[str] = (),
) -> str:
    """The README of a model's repository: Hub metadata, usage, training, results, limits, citation.

    Every text that came from a run is escaped: in the card it is text, whatever it holds.

    Args:
        config: of the model, from `timm_ep.hub.repository.read_config`.
        facts: of the run; None where only weights are at hand.
        twin: facts of the backprop twin, if it was trained.
        name: of the model, for example `ep_vgg9.cifar10`.
        source: what `timm.create_model` takes, for example `hf-hub:user/ep_vgg9.cifar10`.
        parameters: how many the model has.
        files_beside: names of the repository's other files; the card shows the curves and names the log if there.

    Returns:
        Markdown with a YAML header.
    """
    cfg, in_chans, classes = config["pretrained_cfg"], config["model_args"].get("in_chans", 3), config["num_classes"]
    input_size = cfg.get("input_size", [in_chans, 224, 224])
    settings = {**config["model_args"], **(facts.settings if facts else {})}
    card = ModelCard.from_template(
        _metadata(cfg, facts, name),
        template_str=files("timm_ep.hub").joinpath("card_template.md").read_text(encoding="utf-8"),
        name=_escaped(name),
        source=source,
        architecture=config["architecture"],
        parameters=f"{parameters:,}",
        input_size=" × ".join(map(str, input_size)),
        num_classes=classes,
        in_chans=in_chans,
        top=min(5, classes),
        image_mode="L" if in_chans == 1 else "RGB",
        batch_shape=", ".join(map(str, (2, *input_size))),
        settings={key: _escaped(value) for key, value in settings.items()},
        gradient=settings.get("gradient", "ep"),
        output_settles=config["model_args"].get("readout") == "state",
        facts=facts and _fact_texts(facts),
        twin=twin and _fact_texts(twin),
        curves=CURVES_NAME if CURVES_NAME in files_beside else None,
        log=LOG_NAME if LOG_NAME in files_beside else None,
    )
    return redacted(str(card).rstrip()) + "\n"


def _metadata(cfg: dict[str, Any], facts: RunFacts | None, name: str) -> ModelCardData:
    licence, results, dataset_id = cfg.get("license") or "apache-2.0", [], None
    if facts:
        title, dataset_id = _dataset(facts)
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset_id or html.escape(_one_line(facts.dataset)),
                dataset_name=html.escape(title, quote=False),
                dataset_split="validation" if facts.tested_on == "validation" else "test",
                metric_type="accuracy",
                metric_name=metric,
                metric_value=round(value, 2),
            )
            for metric, value in (("Top-1 accuracy (%)", facts.top1), ("Top-5 accuracy (%)", facts.top5))
            if value is not None
        ]
    return ModelCardData(
        library_name="timm",
        license=licence if re.fullmatch(r"[\w.+-]+", licence) else "other",
        tags=["image-classification", "timm", "timm_ep", "equilibrium-propagation", "arxiv:2508.15989"],
        pipeline_tag="image-classification",
        datasets=[dataset_id] if dataset_id else None,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _fact_texts(facts: RunFacts) -> dict[str, Any]:
    """The facts as the template shows them, each escaped but the command, which has a fence of its own."""
    texts = {
        **dataclasses.asdict(facts),
        "dataset": _dataset(facts)[0],
        "n_train": f"{facts.n_train:,}",
        "n_test": f"{facts.n_test:,}",
        "top1": f"{facts.top1:.2f} %",
        "top5": "–" if facts.top5 is None else f"{facts.top5:.2f} %",
        "time": duration(facts.train_seconds),
        "feedback_shares": " ".join(f"{share:.1%}" for share in facts.feedback_shares),
        "couplings": " ".join(f"{coupling:.2f}" for coupling in facts.couplings),
        "feedback_share": "none" if facts.feedback_share is None else f"{facts.feedback_share:.1%}",
        "signals": ", ".join(f"{signal} (weight {weight})" for signal, weight in facts.signals.items()) or "none",
        "teacher": facts.teacher or "none",
        "started_from": facts.started_from or "random weights",
    }
    longest = max(map(len, re.findall("`+", facts.command)), default=0)
    return {
        **{key: _escaped(text) for key, text in texts.items()},
        "command": _one_line(facts.command),
        "fence": "`" * max(3, longest + 1),
    }


def _dataset(facts: RunFacts) -> tuple[str, str | None]:
    """Title and Hub id; `hfds/OWNER/NAME` names a dataset by its Hub id."""
    title, dataset_id = _DATASETS.get(facts.dataset, (_one_line(facts.dataset), None))
    if re.fullmatch(rf"hfds/{_HUB_ID}", facts.dataset):
        title = dataset_id = facts.dataset.removeprefix("hfds/")
    if facts.dataset_id and is_hub_id(facts.dataset_id):
        dataset_id = facts.dataset_id
        title = {known: name for name, known in _DATASETS.values()}.get(dataset_id, dataset_id)
        if facts.dataset == "folder":  # a copy, of which not every pixel need be that of the original
            title = f"{title}, a copy as image files"
    return title, dataset_id


def is_hub_id(text: str) -> bool:
    """Whether it is the id of a repository or a dataset on the Hub, user/name."""
    return re.fullmatch(_HUB_ID, text) is not None


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _escaped(value: Any) -> str:
    """Text that Markdown and HTML show as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", html.escape(_one_line(str(value)), quote=False))


def folder_card(folder: str | os.PathLike[str], name: str, source: str) -> str:
    """The card of a repository's folder, from config.json, and results.json and twin.json where they are there.

    Args:
        folder: with at least config.json.
        name: of the model.
        source: see `render_card`.
    """
    folder = Path(folder)
    model = verify_config(folder / CONFIG_NAME)
    return render_card(
        read_config(folder / CONFIG_NAME),
        RunFacts.find(folder / RESULTS_NAME),
        RunFacts.find(folder / TWIN_NAME),
        name=name,
        source=source,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        files_beside=[path.name for path in folder.iterdir()],
    )


@dataclass
class Card(Options):
    """Write the model card of a folder, README.md, from its config.json, results.json and twin.json.

    What was written to be published, or pulled, keeps the name that it has on the Hub.

    Args:
        folder: of a run, or of a model in `model_cards/`.
        check: only compare: fail if README.md is not what would be written.
    """

    folder: Path
    check: bool = False

    def run(self) -> Path:
        """Write or compare the card, and return its path.

        Raises:
            ValueError: with `check`, a card that has drifted from the facts or the template.
        """
        name, path = self.folder.resolve().name, self.folder / CARD_NAME
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        source = name if timm.is_model_pretrained(name) else f"local-dir:{self.folder}"
        if published := re.search(rf'create_model\("hf-hub:({_HUB_ID})"', before):
            name, source = published[1].partition("/")[2], f"hf-hub:{published[1]}"
        text = folder_card(self.folder, name, source)
        if not self.check:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        elif before != text:
            raise ValueError(f"{path} has drifted from its facts; write it again with: timm-ep card {self.folder}")
        print(f"{path} {'is up to date' if self.check else 'written'}")
        return path
