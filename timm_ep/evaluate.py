"""What a saved run can do: test it again, or classify images with it."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from timm_ep.cards import RESULTS_NAME, RunFacts
from timm_ep.data import channel_values, create_loader, image_transform, open_data
from timm_ep.losses import readout_criterion
from timm_ep.models import EpVgg
from timm_ep.repository import load


@dataclass(frozen=True)
class Evaluation:
    """Mean loss (cross-entropy in nats; squared error of a read-out inside the dynamics), accuracies in percent (top5
    None with five classes or fewer), feedback share."""

    loss: float
    top1: float
    top5: float | None
    feedback_share: float | None


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: str = "cpu") -> Evaluation:
    """Test a model in eval mode, as it is (its mode is restored); `loader` yields images and labels."""
    was_training = model.training
    model.eval()
    criterion, loss, hits, hits5, seen, share, classes = readout_criterion(model), 0.0, 0, 0, 0, None, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        if not seen and isinstance(model, EpVgg) and model.gradient != "backprop":
            share = feedback_share(model, images[:64])
        logits = model(images).float()
        classes = logits.shape[1]
        loss += criterion(logits, labels).item() * len(labels)
        ranked = logits.topk(min(5, classes)).indices == labels[:, None]
        hits += int(ranked[:, 0].sum())
        hits5 += int(ranked.any(1).sum())
        seen += len(labels)
    model.train(was_training)
    return Evaluation(loss / seen, 100 * hits / seen, 100 * hits5 / seen if classes > 5 else None, share)


def feedback_share(model: EpVgg, images: Tensor) -> float:
    """‖s* − s_ff‖ / ‖s*‖, the largest over the layers: how far feedback moves the states from the feedforward pass."""
    twin = copy.deepcopy(model)
    twin.settings = replace(model.settings, gradient="backprop")
    with torch.no_grad():
        pairs = zip(model.equilibrium(images), twin.equilibrium(images), strict=True)
        return max(float((settled - plain).norm() / settled.norm()) for settled, plain in pairs)


def load_run(run: str | Path, device: str = "cpu") -> tuple[nn.Module, RunFacts]:
    """The model that training saved in the folder `run`, in eval mode, and the facts of the run.

    Raises:
        FileNotFoundError: not the folder of a finished run.
        ValueError: a folder that does not pass the checks of `timm_ep.repository`.
    """
    facts = RunFacts.load(Path(run) / RESULTS_NAME)
    return load(run, facts.architecture).to(device), facts


@dataclass
class Validate:
    """Test a saved run again on its test images.

    Args:
        run_folder: folder that `timm-ep train` wrote.
        data_dir: where the images are, if not embedded.
        device: `cpu`, `cuda`, …
    """

    run_folder: Path
    data_dir: Path | None = None
    device: str = "cpu"

    def run(self) -> Evaluation:
        """Print and return the accuracy."""
        model, facts = load_run(self.run_folder, self.device)
        test = open_data(facts.dataset, self.data_dir).test
        test.transform = run_transform(model)
        result = evaluate(model, create_loader(test, 256), self.device)
        print(f"accuracy: {result.top1:.1f} % ({facts.architecture}, {facts.train_seconds:.0f} s of training)")
        return result


@dataclass
class Predict:
    """Classify an image, or all images in a folder, with a saved run; without any, some of the run's test images.

    Args:
        run_folder: folder that `timm-ep train` wrote.
        images: an image file, or a folder, searched through.
        top: classes to name for each image.
        data_dir: where the test images are, if not embedded.
    """

    run_folder: Path
    images: Path | None = None
    top: int = 3
    data_dir: Path | None = None

    def run(self) -> list[list[tuple[str, float]]]:
        """Print and return, for each image, the likeliest classes with their probabilities."""
        model, facts = load_run(self.run_folder)
        transform, names = run_transform(model), _label_names(model)
        answers = []
        for title, image in self._open(facts):
            with torch.inference_mode():
                output = model(transform(image)[None])[0]
            # An output state that squared error pulls to one-hot labels is a probability already.
            probabilities = output if getattr(model, "readout", "head") == "state" else output.softmax(0)
            values, indices = probabilities.topk(min(self.top, len(names)))
            answer = [(names[i], p) for p, i in zip(values.tolist(), indices.tolist(), strict=True)]
            print(f"{title}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in answer))
            answers.append(answer)
        return answers

    def _open(self, facts: RunFacts) -> Iterable[tuple[str, Image.Image]]:
        if self.images is None:
            data = open_data(facts.dataset, self.data_dir)
            for index in range(5):
                image, label = data.test[index]
                yield f"test image {index} (a {data.classes[label]})", image
            return
        if not self.images.exists():
            raise FileNotFoundError(f"{self.images} does not exist; expected an image file or a folder of images.")
        files = [self.images]
        if self.images.is_dir():
            files = sorted(p for p in self.images.rglob("*") if p.suffix.lower() in Image.registered_extensions())
        for file in files:
            try:
                yield str(file), Image.open(file)
            except UnidentifiedImageError as error:
                raise ValueError(f"{file} is not an image that Pillow can read.") from error


def run_transform(model: Any) -> Any:
    """The transform of test images that the model's pretrained cfg describes."""
    cfg = model.pretrained_cfg
    channels = getattr(model, "in_chans", cfg["input_size"][0])
    mean, std = (channel_values(cfg[name], channels) for name in ("mean", "std"))
    return image_transform(cfg["input_size"][-1], mean, std)


def _label_names(model: Any) -> list[str]:
    names = model.pretrained_cfg.get("label_names")
    return list(names) if names else [str(index) for index in range(model.num_classes)]
