"""Labelled images to train and test on: scikit-learn's digits, class folders and tars, torchvision's datasets."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "validation", "eval")


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's 1,797 handwritten digits: 8×8 pixels, enlarged three times and padded with black to 32×32.

    The split is fixed: a stratified fifth is for testing.

    Args:
        train: the training part (1,437 images) or the test part (360).
    """

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        self.images, self.targets = parts[not train], parts[2 + (not train)]
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = (self.images[index] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(np.pad(pixels.repeat(3, 0).repeat(3, 1), 4))
        return self.transform(image) if self.transform else image, int(self.targets[index])


@dataclass(frozen=True)
class DataSource:
    """Training and test images, as PIL images with integer labels; set `transform` on each for tensors.

    Attributes:
        train: training images.
        test: test images; not for choosing anything.
        classes: names in the order of the labels.
        channels: 1 for grey images, else 3.
    """

    train: Any
    test: Any
    classes: tuple[str, ...]
    channels: int


def open_data(name: str, data_dir: str | Path | None = None) -> DataSource:
    """Find a dataset.

    Args:
        name: `digits` (embedded), `folder` (class folders or tars in `data_dir`: `train` and `test` or `val`, or
            `train.tar` and so on, read by timm), or `torch/NAME` for torchvision's (`torch/cifar10`, `torch/cifar100`,
            `torch/mnist`, `torch/kmnist`, `torch/fashion_mnist`), already in `data_dir`.
        data_dir: where the images are; not needed for `digits`.

    Raises:
        ValueError: unknown name, or classes that differ between training and test images.
        FileNotFoundError: nothing there.
    """
    if name == "digits":
        return DataSource(Digits(train=True), Digits(train=False), Digits.classes, 1)
    if name != "folder" and not name.startswith("torch/"):
        raise ValueError(f"dataset={name!r} is unknown; choose digits, folder or torch/NAME (such as torch/cifar10).")
    if data_dir is None or not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"dataset={name!r} needs --data-dir, an existing folder with the images; got {data_dir}."
        )
    if name == "folder":
        return _open_folder(Path(data_dir))
    try:
        train, test = (create_dataset(name, str(data_dir), split=split) for split in ("train", "validation"))
    except RuntimeError as error:
        raise FileNotFoundError(
            f"No {name} in {data_dir}: {error} Download it there with torchvision first."
        ) from error
    except AssertionError as error:
        raise ValueError(f"dataset={name!r} is not a dataset of torchvision that timm knows.") from error
    channels = 1 if train[0][0].mode == "L" else 3
    return DataSource(train, test, tuple(train.classes), channels)


def _open_folder(data_dir: Path) -> DataSource:
    parts = []
    for names in (TRAIN_NAMES, TEST_NAMES):
        candidates = [data_dir / f"{name}{suffix}" for name in names for suffix in ("", ".tar")]
        found = next((path for path in candidates if path.exists()), None)
        if found is None:
            looked = ", ".join(path.name for path in candidates)
            raise FileNotFoundError(f"{data_dir} has none of {looked}; expected one folder (or tar) of class folders.")
        try:
            parts.append(create_dataset("", str(found)))
        except RuntimeError as error:
            raise FileNotFoundError(f"{found} has no images in class folders: {error}") from error
    train, test = parts
    # timm's tar reader and folder reader name it differently.
    labels = [getattr(part.reader, "class_to_idx", None) or part.reader.class_name_to_idx for part in parts]
    if labels[0] != labels[1]:
        odd = sorted(labels[0].keys() ^ labels[1].keys())
        raise ValueError(f"The classes of the training and the test images in {data_dir} differ: {odd[:10]}.")
    return DataSource(train, test, tuple(sorted(labels[0], key=labels[0].__getitem__)), 3)


def channel_values(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A mean or std per channel for images of `channels`: averaged where it was of another number."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def image_transform(
    size: int, mean: tuple[float, ...], std: tuple[float, ...], augment: str = "none"
) -> transforms.Compose:
    """PIL image → normalised tensor (channels, size, size); channels is the length of `mean`.

    Args:
        size: in pixels; other images are resized on their shorter side and cropped at the centre.
        mean: per channel, for pixels in [0, 1].
        std: per channel.
        augment: `none`, `crop` (a random crop after padding by an eighth) or `flip-crop` (with horizontal flips too).
    """
    steps: list[Any] = [partial(Image.Image.convert, mode="L" if len(mean) == 1 else "RGB")]
    steps += [transforms.Resize(size), transforms.CenterCrop(size)]
    if augment in ("crop", "flip-crop"):
        steps.append(transforms.RandomCrop(size, padding=size // 8))
    if augment == "flip-crop":
        steps.append(transforms.RandomHorizontalFlip())
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def limit(dataset: Any, count: int | None, seed: int = 0) -> Any:
    """The first `count` images of a fixed shuffle; all if None."""
    if count is None or count >= len(dataset):
        return dataset
    order: Tensor = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:count].tolist())


def create_loader(dataset: Any, batch_size: int, seed: int | None = None, workers: int = 0) -> DataLoader[Any]:
    """Batches (images, labels): shuffled by `seed` without the incomplete last one, or in order and all if None."""
    training = seed is not None
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    return DataLoader(
        dataset, batch_size, shuffle=training, drop_last=training, generator=generator, num_workers=workers
    )
