"""Writing a model as timm reads it, and a repository's folder, as it appears on the Hub, from a run or a checkpoint.

Weights and configuration are written by `timm.models.save_for_hf`, so that timm reads them:
`timm.create_model("hf-hub:user/name", pretrained=True)`.
"""

import copy
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import save_for_hf

from timm_ep.base.files import creating, replacing
from timm_ep.hub.cards import (
    CARD_NAME,
    CURVES_NAME,
    LOG_NAME,
    RESULTS_NAME,
    TWIN_NAME,
    RunFacts,
    folder_card,
    is_hub_id,
)
from timm_ep.hub.curves import draw_runs
from timm_ep.hub.redaction import redacted, without_folder, without_folders
from timm_ep.hub.repository import CONFIG_NAME, WEIGHTS_NAME, load, load_checkpoint

__all__ = ["clean", "prepare", "save"]

_TEMPORARY = ".model-"  # begins the name of what is being written


def save(
    folder: str | os.PathLike[str],
    model: Any,
    classes: Sequence[str],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write config.json and model.safetensors into a folder that exists; those that are there are replaced.

    Args:
        folder: to write to.
        model: any of timm's.
        classes: names of its classes.
        size: side of the images in pixels, as `timm_ep.data.transforms.image_transform` prepares them.
        mean: per channel, with which they are normalised.
        std: per channel.
    """
    seen = {
        "input_size": (len(mean), size, size),
        "mean": mean,
        "std": std,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # safetensors takes no other
    with tempfile.TemporaryDirectory(dir=folder, prefix=_TEMPORARY) as temporary, _explained(Path(folder)):
        save_for_hf(
            model,
            temporary,
            model_config={
                **seen,
                "pretrained_cfg": {"tag": ""},  # it names weights that were released; these are others
                "num_classes": len(classes),
                "label_names": list(classes),
            },
            model_args={**_drop_rates(model), "in_chans": len(mean)},
            data_config=seen,
            safe_serialization=True,
        )
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            with replacing(Path(folder) / name) as file:
                file.write_bytes((Path(temporary) / name).read_bytes())


def _drop_rates(model: Any) -> dict[str, Any]:
    """What timm leaves out unless it is told: a training that goes on from here is to drop as much."""
    args: dict[str, Any] = getattr(model, "_model_args", {})
    return {name: value for name, value in args.items() if "drop" in name and name.endswith("_rate")}


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:  # such as that the disk is full
        raise OSError(f"{folder / WEIGHTS_NAME} could not be written: {error}") from error


def clean(folder: str | Path) -> None:
    """Remove what a killed process left of `save`."""
    for left in Path(folder).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)


def prepare(
    run: str | Path,
    folder: str | Path,
    repo_id: str,
    twin: str | Path | None = None,
    dataset_id: str | None = None,
    license: str | None = None,
) -> str:
    """Write a repository's folder: weights, configuration, card, and what is known of the training.

    Args:
        run: folder of a run, or a checkpoint beside its config.json (see `timm_ep.hub.repository.load_checkpoint`).
        folder: to write to; it must not exist, or be empty.
        repo_id: where it will be, `user/name`.
        twin: folder of the same net's run by backprop, for comparison in the card.
        dataset_id: of the data on the Hub, where the run does not know it.
        license: of the weights, as the Hub names licences; by default that of the configuration, which is Apache 2.0
            where nothing else was said, as in timm.

    Returns:
        the architecture.

    Raises:
        FileNotFoundError: no run, no config.json, or no safetensors.
        ValueError: weights or a configuration that do not pass the checks, facts of another model, or a dataset_id that
            is none.
        FileExistsError: `folder` has something in it.
    """
    run = Path(run)
    if dataset_id is not None and not is_hub_id(dataset_id):
        raise ValueError(f"dataset_id={dataset_id!r:.80} is no dataset's id on the Hub; expected user/name.")
    model: Any = load(run) if run.is_dir() else load_checkpoint(run)
    home = run if run.is_dir() else run.parent
    name, labels = repo_id.partition("/")[2], model.pretrained_cfg.get("label_names")
    with creating(folder) as new, _explained(Path(folder)):
        save_for_hf(
            model,
            str(new),
            model_config={
                "pretrained_cfg": {"tag": name.partition(".")[2], **({"license": license} if license else {})},
                **({"label_names": list(labels)} if labels else {}),
            },
            safe_serialization=True,
        )
        config = new / CONFIG_NAME
        config.write_text(redacted(config.read_text(encoding="utf-8")), encoding="utf-8")
        # Of other checkpoints than a run's own weights the run's facts may not be true.
        if (run.is_dir() or run.name == WEIGHTS_NAME) and (home / RESULTS_NAME).exists():
            _add_facts(new, home, model.pretrained_cfg["architecture"], dataset_id)
            known = Path(twin) / RESULTS_NAME if twin else home / TWIN_NAME  # the latter if it was published before
            if twin or known.exists():
                _add_twin(new, RunFacts.load(known))
            _add_curves(new, name, twin)
        elif twin or dataset_id:
            raise ValueError(
                f"No facts of the training of {run} are recorded, to which a twin or dataset_id could add."
            )
        (new / CARD_NAME).write_text(folder_card(new, name, f"hf-hub:{repo_id}"), encoding="utf-8")
    return str(model.pretrained_cfg["architecture"])


def _add_facts(new: Path, home: Path, architecture: str, dataset_id: str | None) -> None:
    facts = RunFacts.load(home / RESULTS_NAME)
    if facts.architecture != architecture:
        raise ValueError(f"{home / RESULTS_NAME} is of {facts.architecture!r}, the weights are of {architecture!r}.")
    _to_publish(facts, dataset_id).save(new / RESULTS_NAME)
    if (home / LOG_NAME).exists():
        _copy_log(home, new, facts.epochs)


def _add_twin(new: Path, twin: RunFacts) -> None:
    facts = RunFacts.load(new / RESULTS_NAME)
    if twin.settings.get("gradient") != "backprop" or (twin.architecture, twin.dataset) != (
        facts.architecture,
        facts.dataset,
    ):
        raise ValueError(
            f"The twin is of {twin.architecture} on {twin.dataset} by {twin.settings.get('gradient')}; expected "
            f"{facts.architecture} on {facts.dataset} by backprop (timm-ep train --gradient backprop)."
        )
    _to_publish(twin).save(new / TWIN_NAME)


def _to_publish(facts: RunFacts, dataset_id: str | None = None) -> RunFacts:
    return dataclasses.replace(
        facts,
        command=without_folders(facts.command),
        dataset=without_folder(facts.dataset),
        teacher=facts.teacher and without_folder(facts.teacher),
        started_from=facts.started_from and without_folder(facts.started_from),
        dataset_id=dataset_id or facts.dataset_id,
    )


def _add_curves(new: Path, name: str, twin: str | Path | None) -> None:
    """The learning curves, with the twin's, under the names that the runs have from now on."""
    if not (new / LOG_NAME).exists():
        return
    runs = [(name, new)]
    if twin and (Path(twin) / LOG_NAME).exists():
        runs.append(("backprop twin", Path(twin)))
    try:
        draw_runs(runs, new / CURVES_NAME)
    except ModuleNotFoundError as error:
        raise ValueError("The learning curves need matplotlib: pip install timm_ep[plots]") from error


def _copy_log(source: Path, target: Path, epochs: int) -> None:
    """The epochs that the facts are of; a finished run that is on its way to more has the log of these too."""
    lines = redacted((source / LOG_NAME).read_text(encoding="utf-8")).splitlines(keepends=True)
    (target / LOG_NAME).write_text("".join(lines[: epochs + 1]), encoding="utf-8")
