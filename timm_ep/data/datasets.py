"""Labelled images: scikit-learn's digits, class folders and tars, the datasets of torchvision and of Hugging Face."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "validation", "eval")


# What Pillow raises for files that are no images, are cut off or damaged, or unpack to an absurd size.
IMAGE_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)


class UnreadableImage(ValueError):
    """A file that should be an image and cannot be read."""

    def __init__(self, message: str) -> None:
        # From a process that loads images it arrives as the last line of a traceback.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


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


class ReaderImages(Dataset[tuple[Any, int]]):
    """RGB images of one of timm's readers. Unlike timm's own dataset it never passes over a file that it cannot read.

    Args:
        dataset: of timm, with a reader.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.reader: Any = dataset.reader
        # timm's tar reader names it differently.
        self.class_to_idx: dict[str, int] = getattr(self.reader, "class_to_idx", None) or self.reader.class_name_to_idx
        self.classes = tuple(sorted(self.class_to_idx, key=self.class_to_idx.__getitem__))
        self.transform: Callable[[Image.Image], Any] | None = None
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self._process != os.getpid():  # a tar that was opened before a fork shares its position with its siblings
            self._process = os.getpid()
            _close_tars(getattr(self.reader, "tar_state", None))
        try:
            file, label = self.reader[index]
            with file:
                image = Image.open(file).convert("RGB")
        except IMAGE_ERRORS as error:
            raise UnreadableImage(
                f"{self.reader.filename(index, absolute=True)} is not an image that Pillow can read ({error}). Repair "
                "or remove it."
            ) from error
        return self.transform(image) if self.transform else image, int(label)

    @property
    def targets(self) -> list[int]:
        """The labels, without reading an image."""
        if hasattr(self.reader, "iter_targets"):
            return [int(label) for label in self.reader.iter_targets()]
        if hasattr(self.reader, "targets"):
            return [int(label) for label in self.reader.targets]
        return [int(label) for _, label in self.reader.samples]


def _close_tars(state: Any) -> None:
    for each in state.values() if isinstance(state, dict) else [state] if state else []:
        each.reset()
        _close_tars(each.children)


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
        name: `digits` (embedded); `folder` (class folders or tars in `data_dir`: `train` and `test` or `val`, or
            `train.tar` and so on, read by timm); `torch/NAME` for torchvision's (`torch/cifar10`, `torch/cifar100`,
            `torch/mnist`, `torch/kmnist`, `torch/fashion_mnist`), already in `data_dir`; or `hfds/NAME` for a dataset
            of the Hugging Face Hub or a local folder of one, fetched into `data_dir` or the usual cache.
        data_dir: where the images are; not needed for `digits` and `hfds/`.

    Raises:
        ValueError: unknown name, or classes that differ between training and test images.
        FileNotFoundError: nothing there.
        ModuleNotFoundError: `hfds/` without the package it needs.
    """
    if name == "digits":
        return DataSource(Digits(train=True), Digits(train=False), Digits.classes, 1)
    if name.startswith("hfds/"):
        return _open_hugging_face(name, data_dir)
    if name != "folder" and not name.startswith("torch/"):
        raise ValueError(
            f"dataset={name!r} is unknown; choose digits, folder, torch/NAME (such as torch/cifar10) or hfds/NAME "
            "(such as hfds/uoft-cs/cifar10)."
        )
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
    parts: list[ReaderImages] = []
    found: list[str] = []
    for names in (TRAIN_NAMES, TEST_NAMES):
        candidates = [data_dir / f"{name}{suffix}" for name in names for suffix in ("", ".tar")]
        path = next((path for path in candidates if path.exists()), None)
        if path is None:
            looked = ", ".join(path.name for path in candidates)
            raise FileNotFoundError(f"{data_dir} has none of {looked}; expected one folder (or tar) of class folders.")
        try:
            parts.append(ReaderImages(create_dataset("", str(path))))
        except RuntimeError as error:
            raise FileNotFoundError(f"{path} has no images in class folders: {error}") from error
        found.append(str(path))
    return _matched(parts[0], parts[1], *found)


def _matched(train: ReaderImages, test: ReaderImages, train_name: str, test_name: str) -> DataSource:
    """Both parts, if they have the same classes."""
    if train.class_to_idx != test.class_to_idx:
        missing = [
            f"{where} lacks {sorted(lacked)[:10]}"
            for where, lacked in (
                (train_name, test.class_to_idx.keys() - train.class_to_idx.keys()),
                (test_name, train.class_to_idx.keys() - test.class_to_idx.keys()),
            )
            if lacked
        ]
        raise ValueError(f"The classes of the training and the test images differ: {'; '.join(missing)}.")
    return DataSource(train, test, train.classes, 3)


def _open_hugging_face(name: str, data_dir: str | Path | None) -> DataSource:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"dataset={name!r} needs the datasets package: pip install timm_ep[hf].") from error
    root = None if data_dir is None else str(data_dir)
    try:
        parts = datasets.load_dataset(name.removeprefix("hfds/"), cache_dir=root)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"No dataset {name}: {error}") from error
    splits = [next((split for split in names if split in parts), None) for names in (TRAIN_NAMES, TEST_NAMES)]
    if None in splits:
        raise ValueError(f"{name} has the splits {sorted(parts)}; expected train, and test or validation.")
    features = parts[splits[0]].features
    keys = {
        key: next((column for column, feature in features.items() if isinstance(feature, kind)), None)
        for key, kind in (("input_key", datasets.Image), ("target_key", datasets.ClassLabel))
    }
    if None in keys.values():
        raise ValueError(f"{name} has the columns {dict(features)}; expected one of images and one of class labels.")
    train, test = (ReaderImages(create_dataset(name, root, split=split, **keys)) for split in splits)
    return _matched(train, test, *(f"{name}, split {split}," for split in splits))


def labels_of(dataset: Any) -> list[int] | None:
    """The labels of a dataset where they can be had without reading the images, else None."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else [labels[index] for index in dataset.indices]
    targets = getattr(dataset, "targets", None)
    return None if targets is None else [int(label) for label in targets]


def limit(dataset: Any, count: int | None, seed: int = 0) -> Any:
    """The first `count` images of a fixed shuffle; all if None."""
    if count is None or count >= len(dataset):
        return dataset
    order: Tensor = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:count].tolist())


def split_off(dataset: Any, share: float, seed: int = 0) -> tuple[Any, Any]:
    """Set a share of the images aside for validation: the same one in every run, so that runs can be compared.

    Stratified, so that every class has its share, where the labels are known without reading the images and no class is
    too small for it.

    Args:
        dataset: the training images.
        share: of them, between 0 and 1, for validation.
        seed: of the choice.

    Returns:
        the images for training and for validation.

    Raises:
        ValueError: one of the two would be empty.
    """
    count = round(share * len(dataset))
    if not 0 < count < len(dataset):
        raise ValueError(
            f"val_split={share} of {len(dataset)} training images leaves nothing to train on, or to validate on."
        )
    labels = labels_of(dataset)
    sizes = np.unique(labels, return_counts=True)[1] if labels else np.zeros(0)
    stratify = labels if sizes.size and sizes.min() > 1 and min(count, len(dataset) - count) >= sizes.size else None
    from sklearn.model_selection import train_test_split

    parts = train_test_split(np.arange(len(dataset)), test_size=count, random_state=seed, stratify=stratify)
    train, validation = (Subset(dataset, sorted(part.tolist())) for part in parts)
    return train, validation


def create_loader(dataset: Any, batch_size: int, workers: int = 0) -> DataLoader[Any]:
    """Batches (images, labels) in order, for testing; training's are in `timm_ep.data.loader`."""
    return DataLoader(dataset, batch_size, num_workers=workers)
