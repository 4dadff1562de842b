"""How well a model classifies: on test data while it trains, and again once it is saved."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_ep.base.files import replacing
from timm_ep.base.options import Options
from timm_ep.base.text import same_name
from timm_ep.data.damaged import without_images
from timm_ep.data.datasets import DataSource, open_data
from timm_ep.data.loader import seed_everything
from timm_ep.data.transforms import run_transform
from timm_ep.hub.cards import RESULTS_NAME, RunFacts
from timm_ep.hub.repository import WEIGHTS_NAME, load, named_architecture
from timm_ep.models import EpVgg
from timm_ep.models.named import set_sweeps
from timm_ep.signals.losses import readout_criterion
from timm_ep.training.checkpoints import CHECKPOINTS_NAME, unfinished
from timm_ep.training.distributed import available
from timm_ep.training.images import BAD_IMAGES_NAME, Transformed
from timm_ep.training.options import ARGS_NAME


@dataclass(frozen=True)
class Evaluation:
    """Mean loss (cross-entropy in nats; squared error of a read-out inside the dynamics), accuracies in percent (top5
    None with five classes or fewer), feedback share of every layer (empty where nothing settles)."""

    loss: float
    top1: float
    top5: float | None
    feedback_shares: list[float]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device = "cpu",
    total: Callable[[Sequence[float]], list[float]] = list,
) -> Evaluation:
    """Test a model in eval mode, as it is (its mode is restored).

    Args:
        model: any classifier.
        loader: yields images and labels.
        device: of the model.
        total: sums counts over the processes among which the images are shared out, see `World.sum`.
    """
    was_training = model.training
    model.eval()
    criterion, loss, hits, hits5, seen, classes = readout_criterion(model), 0.0, 0, 0, 0, 0
    shares: list[float] = []
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if not seen and isinstance(model, EpVgg) and model.settings.settles:
            shares = model.feedback_shares(images[:64])
        logits = model(images).float()
        classes = logits.shape[1]
        ranked = logits.topk(min(5, classes)).indices == labels[:, None]
        loss += criterion(logits, labels).item() * len(labels)
        hits += int(ranked[:, 0].sum())
        hits5 += int(ranked.any(1).sum())
        seen += len(labels)
    model.train(was_training)
    loss, correct, correct5, count = total([loss, hits, hits5, seen])
    return Evaluation(loss / count, 100 * correct / count, 100 * correct5 / count if classes > 5 else None, shares)


def load_run(run: str | Path, device: str = "cpu", sweeps: int | None = None) -> tuple[nn.Module, RunFacts | None]:
    """The model in a folder, in eval mode, and the facts of its training: of a run that ended, of one that was stopped,
    or of a model that `timm-ep pull` fetched. Facts that were never written, as of those that did not end, are None.

    Args:
        run: the folder.
        device: for the model.
        sweeps: see `timm_ep.models.named.set_sweeps`.

    Raises:
        FileNotFoundError: no model in the folder.
        ValueError: a folder that does not pass the checks of `timm_ep.hub.repository`, or no such device.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run} does not exist; expected the folder of a run, or of a model that was pulled.")
    if not (run / WEIGHTS_NAME).exists() and (run / CHECKPOINTS_NAME).is_dir():
        raise FileNotFoundError(unfinished(run))
    facts = RunFacts.find(run / RESULTS_NAME)
    model = load(run, facts.architecture if facts else named_architecture(run)).to(available(device))
    set_sweeps(model, sweeps)
    return model, facts


def accuracy_line(top1: float, architecture: str, facts: RunFacts | None) -> str:
    """What training and `timm-ep validate` print last: the test accuracy, in percent, of the run with these facts."""
    known = f", {facts.train_seconds:.0f} s of training" if facts else ""
    return f"accuracy: {top1:.2f} % ({architecture}{known})"


@dataclass
class Validate(Options):
    """Test a saved run again on its test images.

    Args:
        run_folder: folder that `timm-ep train` wrote.
        data_dir: where the images are, if they are not embedded or no longer where the run had them; of a dataset
            `folder` the test images alone will do.
        dataset: other images to test on, named as in training; by default those of the run.
        batch_size: images at a time, which bounds the memory that it takes.
        device: `cpu`, `cuda`, …
        workers: processes that load images.
        sweeps: of the free phase, in place of those that it was trained with; 0 tests the feedforward pass alone.
        output: also write the figures to this file, as JSON.
    """

    run_folder: Path
    data_dir: Path | None = None
    dataset: str | None = None
    batch_size: int = 64
    device: str = "cpu"
    workers: int = 0
    sweeps: int | None = None
    output: Path | None = None

    def run(self) -> Evaluation:
        """Print and return the accuracy.

        Raises:
            ValueError: images of other classes than the model's.
        """
        model, facts = load_run(self.run_folder, self.device, self.sweeps)
        names = label_names(model)
        data = open_tested(self.run_folder, facts, names, self.dataset, self.data_dir)
        if list(data.classes) != names:
            raise ValueError(
                f"{self.run_folder} knows the classes {names[:10]!a}; the images have {data.classes[:10]!a}."
            )
        seed_everything("test", 0)  # for a net with the noise of a device: the same answer each time
        images = Transformed(data.test, run_transform(model))
        loader = DataLoader(images, self.batch_size, num_workers=self.workers)
        result = evaluate(model, loader, self.device)
        architecture = str(cast(Any, model).pretrained_cfg["architecture"])
        if self.output is not None:
            with replacing(self.output) as temporary:
                values = {"architecture": architecture, "n_test": len(data.test), **asdict(result)}
                temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        print(accuracy_line(result.top1, architecture, facts))
        return result


def label_names(model: Any) -> list[str]:
    """The names of a model's classes; their numbers where it has none."""
    names = model.pretrained_cfg.get("label_names")
    return [same_name(name) for name in names] if names else [str(index) for index in range(model.num_classes)]


def open_tested(
    run: Path, facts: RunFacts | None, names: list[str], dataset: str | None = None, data_dir: Path | None = None
) -> DataSource:
    """The images to test a run on, and a word on what of them is left out.

    Args:
        run: its folder.
        facts: of the run, if it ended.
        names: of the model's classes.
        dataset: others than those of the run.
        data_dir: where they are, if not where the run had them.

    Raises:
        ValueError: the dataset is not known, its classes differ, or none of it could be read in training; see
            `timm_ep.data.datasets.open_data`.
    """
    data = open_data(*images_of(run, facts, dataset, data_dir), names)
    if dataset is None and data_dir is None:
        data = _without_bad_images(data, run)
    for note in data.notes:
        print(f"warning: {note}", file=sys.stderr)
    return data


def _without_bad_images(data: DataSource, run: Path) -> DataSource:
    """The run's images but those that it left out as they could not be read, which is noted.

    Raises:
        ValueError: there are no others.
    """
    listed = run / BAD_IMAGES_NAME
    if not listed.is_file():
        return data
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = without_images(data, [line[: colon.start()] for line in lines for colon in re.finditer(": ", line)])
    if not (count := len(data.test) - len(kept.test)):
        return data
    if not len(kept.test):
        raise ValueError(f"None of the test images could be read in training, see {listed}; name others by --dataset.")
    return replace(kept, notes=(*kept.notes, f"{count} test images are left out, as in training: see {listed}"))


def images_of(
    run: Path, facts: RunFacts | None, dataset: str | None = None, data_dir: Path | None = None
) -> tuple[str, Path | None]:
    """The name of the images to test on and where they are: as chosen, or else those of the run.

    Raises:
        ValueError: the name is not known.
    """
    if dataset:
        return dataset, data_dir
    options = run / ARGS_NAME  # of one that was trained here, be it to its end or not
    told: Any = {}
    if options.exists():
        try:
            told = yaml.safe_load(options.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{options} is not YAML: {error}") from error
        if not isinstance(told, dict) or not all(
            isinstance(told.get(key, ""), str | None) for key in ("dataset", "data_dir")
        ):
            raise ValueError(f"{options} does not hold the options of a training; give --dataset and --data-dir.")
    dataset = facts.dataset if facts else told.get("dataset")
    if not dataset:
        raise ValueError(f"{run} does not say what images it was trained on; give --dataset, such as folder.")
    if data_dir is None and dataset != "digits":  # which are embedded, whatever else was said
        data_dir = told.get("data_dir")
    return dataset, None if data_dir is None else Path(data_dir)
