"""What is measured: a model with a batch of images, and the steps that are compared on them."""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_ep.base.options import Options
from timm_ep.core.settings import SETTING_NAMES
from timm_ep.data.datasets import DataSource, limit, open_data
from timm_ep.data.transforms import run_transform
from timm_ep.models import EpVgg
from timm_ep.models.named import check_known, create_named, is_ours
from timm_ep.signals.task import EpTask
from timm_ep.studies.measure import Step
from timm_ep.training.evaluate import load_run

__all__ = ["Workload", "autocast", "changed", "inference_step", "make_training_step", "training_step"]


@dataclass
class Workload(Options):
    """A model and a batch of images, as options: they can be sent to another process, which then makes the same.

    Args:
        model: name of an `ep_vgg*`, at its default init or, with the tag of a release, with its weights; or the folder
            of a run.
        model_args: further arguments of the model; of a run, only settings can be changed.
        dataset: as in training, for test images with their labels; none for random ones.
        data_dir: where the images are, if not embedded.
        batch_size: images.
        img_size: side of the images in pixels; by default that of the model's configuration.
        classes: of the read-out, where there is neither a dataset nor weights to say so.
        device: `cpu`, `cuda`, …
        threads: of torch; by default its own choice.
        seed: of the init, and of what is drawn after it.

    Raises:
        ValueError: no `ep_vgg*`, or a number that is too small.
    """

    model: str = "ep_vgg9_050"
    model_args: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    data_dir: Path | None = None
    batch_size: int = 64
    img_size: int | None = None
    classes: int = 10
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not Path(self.model).is_dir():
            check_known(self.model)
            if not is_ours(self.model.partition(".")[0]):
                raise ValueError(f"{self.model} is no ep_vgg* and no folder of a run: it does not settle.")
        self.at_least(batch_size=1, img_size=1, classes=2, threads=1)

    @property
    def workload(self) -> "Workload":
        """These options alone, of a command that has more."""
        return Workload(**{option.name: getattr(self, option.name) for option in fields(Workload)})

    def make(self) -> tuple[EpVgg, Tensor, Tensor]:
        """The model, the images (B, in_chans, H, W) and the labels (B,), the same in every call.

        Raises:
            ValueError: the run's model does not settle, or the dataset has fewer images than the batch.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        data = open_data(self.dataset, self.data_dir) if self.dataset else None
        model = self._model(data)
        if not isinstance(model, EpVgg):
            raise ValueError(f"{self.model} is no ep_vgg*: it does not settle.")
        size = self.img_size or vars(model)["pretrained_cfg"]["input_size"][-1]
        if data:
            if len(data.test) < self.batch_size:
                raise ValueError(f"{self.dataset} has {len(data.test)} test images; batch_size={self.batch_size}.")
            data.test.transform = run_transform(model, size)
            images, labels = next(iter(DataLoader(limit(data.test, self.batch_size), self.batch_size)))
        else:
            images = torch.randn(self.batch_size, model.in_chans, size, size)
            labels = torch.arange(self.batch_size) % max(model.num_classes, 1)
        return model.to(self.device), images.to(self.device), labels.to(self.device)

    def _model(self, data: DataSource | None) -> nn.Module:
        if Path(self.model).is_dir():
            model = load_run(self.model)[0].train()
            if unknown := self.model_args.keys() - set(SETTING_NAMES):
                raise ValueError(f"model_args {sorted(unknown)} of a run are fixed; change {', '.join(SETTING_NAMES)}.")
            return changed(model, **self.model_args) if isinstance(model, EpVgg) else model
        shape: dict[str, Any] = {}
        pretrained = timm.is_model_pretrained(self.model)
        if data:
            shape = {"num_classes": len(data.classes), "in_chans": data.channels}
            trained = timm.get_pretrained_cfg(self.model)
            if pretrained and (trained.num_classes, trained.input_size[0]) != tuple(shape.values()):
                raise ValueError(
                    f"{self.model} was trained on images of {trained.num_classes} classes in {trained.input_size[0]} "
                    f"channels; {self.dataset} has {len(data.classes)} in {data.channels}. Give the images that it was "
                    "trained on (--dataset and --data-dir)."
                )
        elif not pretrained:
            shape = {"num_classes": self.classes}
        return create_named(self.model, pretrained=pretrained, **shape, **self.model_args)


def autocast(device: str, enabled: bool) -> AbstractContextManager[Any]:
    """To bfloat16."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if enabled else nullcontext()


def changed(model: EpVgg, **settings: Any) -> EpVgg:
    """A copy with some of the settings changed."""
    twin = copy.deepcopy(model)
    twin.settings = replace(model.settings, **settings)
    return twin


def training_step(model: EpVgg, images: Tensor, labels: Tensor, bfloat16: bool = False) -> Step:
    """Forward and backward of the task's loss, without the optimizer."""
    device = str(images.device)
    task = EpTask(model, device=images.device)

    def step() -> None:
        with autocast(device, bfloat16):
            loss = task(images, labels)["loss"]
        loss.backward()
        task.zero_grad()

    return step


def make_training_step(workload: Workload, settings: dict[str, Any]) -> Step:
    """The training step of a workload with some of the model's settings changed."""
    model, images, labels = workload.make()
    return training_step(changed(model, **settings), images, labels)


def inference_step(model: EpVgg, images: Tensor) -> Step:
    """The forward pass alone, in eval mode."""
    model.eval()

    @torch.inference_mode()
    def step() -> None:
        model(images)

    return step
