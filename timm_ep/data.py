"""Labelled images to train and test on: digits, class folders and tars, torchvision's datasets, Hugging Face's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "eval")
TEST_NAMES = ("test", "testing")

# Images up to this many pixels a side, all of one size, are decoded once and kept in memory.
SMALL_IMAGE = 64


class ImageSet:
    """Images that are opened when asked for, and their labels.

    Args:
        open_image: PIL image of an index.
        labels: integer of each image.
        describe: what to call an image in a message, from its index; its number by default.
        indices: those of the images in the set; all by default.
    """

    def __init__(
        self,
        open_image: Callable[[int], Image.Image],
        labels: Sequence[int],
        describe: Callable[[int], str] = "image {}".format,
        indices: np.ndarray | None = None,
    ) -> None:
        self._open, self._labels, self._describe = open_image, np.asarray(labels, dtype=np.int64), describe
        self._indices = np.arange(len(self._labels)) if indices is None else indices

    @property
    def labels(self) -> np.ndarray:
        """Label of each image, (n,)."""
        return self._labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int, mode: str | None = None) -> Image.Image:
        """The image, converted to PIL's `mode` unless None.

        Raises:
            ValueError: it cannot be read, with its name. Leaving it out silently would change what a run has seen.
        """
        number = int(self._indices[index])
        try:
            image = self._open(number)
            image.load()
            return image.convert(mode) if mode else image
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self._describe(number)} cannot be read as an image ({error}). Repair it or remove it."
            ) from error

    def select(self, positions: np.ndarray) -> "ImageSet":
        """The images at these positions."""
        return ImageSet(self._open, self._labels, self._describe, self._indices[positions])

    def limit(self, count: int | None) -> "ImageSet":
        """The first `count` of a fixed shuffle; all if None."""
        if count is None or count >= len(self):
            return self
        return self.select(_fixed_shuffle(len(self))[:count])

    def split(self, fraction: float) -> tuple["ImageSet", "ImageSet"]:
        """What remains, and a `fraction` taken evenly from every class: always the same images, whatever the seed."""
        order = _fixed_shuffle(len(self))
        labels = self.labels[order]
        taken = np.zeros(len(self), dtype=bool)
        for label in np.unique(labels):
            members = order[labels == label]
            taken[members[: round(fraction * len(members))]] = True
        return self.select(np.flatnonzero(~taken)), self.select(np.flatnonzero(taken))


def _fixed_shuffle(count: int) -> np.ndarray:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()


@dataclass(frozen=True)
class DataSource:
    """The parts of a dataset.

    Attributes:
        train: training images.
        val: images for choosing (the best epoch, when to stop); None for no choosing.
        test: test images, never seen in training and never used for choosing.
        classes: names in the order of the labels.
        channels: 1 for grey images, else 3.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    classes: tuple[str, ...]
    channels: int

    @property
    def mode(self) -> str:
        """PIL's name of the channels."""
        return "L" if self.channels == 1 else "RGB"


def open_data(
    name: str,
    data_dir: str | Path | None = None,
    val_fraction: float = 0.1,
    train_images: int | None = None,
) -> DataSource:
    """Find a dataset.

    Args:
        name: `digits` (embedded: scikit-learn's), `folder` (class folders or tars in `data_dir`: `train`, `test` and
            `val`, each a folder or a `.tar`; or one folder or tar of classes), `torch/NAME` for torchvision's
            (`torch/cifar10`, `torch/cifar100`, `torch/mnist`, `torch/kmnist`, `torch/fashion_mnist`) already in
            `data_dir`, or `hfds/NAME` for the Hugging Face Hub's.
        data_dir: where the images are; not needed for `digits` and `hfds/…`.
        val_fraction: of the training images, for validation where the dataset has none of its own; 0 for none. Where
            there are no test images, as many are set aside for testing.
        train_images: use a fixed random subset of this many training images (before the validation images are taken).

    Raises:
        ValueError: unknown name, classes that differ between parts, or a fraction outside [0, 1).
        FileNotFoundError: nothing there.
        ModuleNotFoundError: `hfds/…` without the package `datasets`.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be at least 0 and below 1, for example 0.1.")
    if name == "digits":
        source = _open_digits()
    elif name.startswith("hfds/"):
        source = _open_hfds(name, data_dir)
    elif name == "folder" or name.startswith("torch/"):
        if data_dir is None or not Path(data_dir).exists():
            raise FileNotFoundError(f"dataset={name!r} needs --data-dir, where the images are; got {data_dir}.")
        source = _open_folder(Path(data_dir), val_fraction) if name == "folder" else _open_torch(name, Path(data_dir))
    else:
        raise ValueError(
            f"dataset={name!r} is unknown; choose digits, folder, torch/NAME (such as torch/cifar10) or hfds/NAME."
        )
    train = source.train.limit(train_images)
    if source.val is None and val_fraction:
        train, val = train.split(val_fraction)
        return replace(source, train=train, val=val if len(val) else None)
    return replace(source, train=train)


def _open_digits() -> DataSource:
    """1,797 digits of 8×8 pixels, enlarged three times and padded with black to 32×32; a stratified fifth for tests."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()

    def open_image(index: int) -> Image.Image:
        pixels = (digits.images[index] * (255 / 16)).astype(np.uint8)
        return Image.fromarray(np.pad(pixels.repeat(3, 0).repeat(3, 1), 4))

    everything = ImageSet(open_image, digits.target)
    parts = train_test_split(np.arange(1797), test_size=0.2, stratify=digits.target, random_state=0)
    train, test = (everything.select(part) for part in parts)
    return DataSource(train, None, test, tuple("0123456789"), 1)


def _open_torch(name: str, data_dir: Path) -> DataSource:
    try:
        parts = [create_dataset(name, str(data_dir), split=split) for split in ("train", "validation")]
    except RuntimeError as error:
        raise FileNotFoundError(
            f"No {name} in {data_dir}: {error} Download it there with torchvision first."
        ) from error
    except AssertionError as error:
        raise ValueError(f"dataset={name!r} is not a dataset of torchvision that timm knows.") from error
    train, test = (ImageSet(_FirstOf(part), part.targets) for part in parts)
    return DataSource(train, None, test, tuple(parts[0].classes), 1 if train.image(0).mode == "L" else 3)


@dataclass(frozen=True)
class _FirstOf:
    """The image of a dataset of (image, label); a class so that data-loading processes can be sent it."""

    pairs: Any

    def __call__(self, index: int) -> Image.Image:
        return self.pairs[index][0]


@dataclass(frozen=True)
class _FromReader:
    """The image of a timm reader's file."""

    reader: Any

    def __call__(self, index: int) -> Image.Image:
        return Image.open(self.reader[index][0])


def _open_hfds(name: str, data_dir: str | Path | None) -> DataSource:
    try:
        import datasets  # noqa: F401  (timm's reader needs it)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"dataset={name!r} needs the package datasets: pip install datasets, or choose another dataset."
        ) from error
    parts = []
    for split in ("train", "test"):
        try:
            parts.append(create_dataset(name, str(data_dir) if data_dir else None, split=split).reader)
        except ValueError as error:
            raise ValueError(f"{name} has no split {split!r}: {error}") from error
    train, test = (ImageSet(_FromReader(part), part.dataset[part.label_key]) for part in parts)
    classes = tuple(parts[0].dataset.features[parts[0].label_key].names)
    return DataSource(train, None, test, classes, 1 if train.image(0).mode == "L" else 3)


def _open_folder(data_dir: Path, val_fraction: float) -> DataSource:
    found = {names[0]: _find_part(data_dir, names) for names in (TRAIN_NAMES, VAL_NAMES, TEST_NAMES)}
    if found["train"] is None and any(found.values()):
        looked = ", ".join(f"{name}{suffix}" for name in TRAIN_NAMES for suffix in ("", ".tar"))
        raise FileNotFoundError(f"{data_dir} has none of {looked}; expected training images beside the others.")
    train, classes = _read_folder(found["train"] or data_dir)
    parts = {"train": train}
    for name in ("val", "test"):
        path = found[name]
        if path is None:
            continue
        parts[name], others = _read_folder(path)
        if others != classes:
            odd = sorted(set(classes) ^ set(others))
            raise ValueError(f"The classes of {found['train']} and {path} differ: {odd[:10]}.")
    if "test" not in parts and "val" in parts:
        # As in ImageNet: the only other part is for testing, whatever its name.
        parts["test"] = parts.pop("val")
    if "test" not in parts:
        if not val_fraction:
            raise FileNotFoundError(
                f"{data_dir} has no test images, and val_fraction=0 sets none aside; add a folder test or set "
                "val_fraction=0.1."
            )
        parts["train"], parts["test"] = train.split(val_fraction)
    return DataSource(parts["train"], parts.get("val"), parts["test"], classes, 3)


def _find_part(data_dir: Path, names: Sequence[str]) -> Path | None:
    candidates = (data_dir / f"{name}{suffix}" for name in names for suffix in ("", ".tar"))
    return next((path for path in candidates if path.exists()), None)


def _read_folder(path: Path) -> tuple[ImageSet, tuple[str, ...]]:
    """Images of class folders, or of a tar of them, and the names of the classes."""
    # An open tar is not shared with the processes that load images: each would move the others' place in it.
    options = {"cache_tarfiles": False} if path.suffix == ".tar" else {}
    nothing = FileNotFoundError(f"{path} has no images in class folders; expected {path.name}/CLASS/IMAGE.")
    try:
        reader = create_dataset("", str(path), search_split=False, **options).reader
    except RuntimeError as error:  # the folder reader, without images
        raise nothing from error
    except ValueError as error:  # the tar reader, without images
        raise nothing from error
    # timm's tar reader and folder reader name these differently.
    classes = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    labels = reader.targets if hasattr(reader, "targets") else [label for _, label in reader.samples]
    names = tuple(sorted(classes, key=classes.__getitem__))
    if len(names) < 2:
        raise ValueError(f"{path} has the one class {names[0]!r}; expected a folder for each of at least two classes.")
    return ImageSet(_FromReader(reader), labels, lambda index: f"{reader.filename(index)} in {path}"), names


def decode_small(images: ImageSet, mode: str) -> Tensor | None:
    """All images as pixels, uint8 (n, channels, height, width); None if they are large or not of one size."""
    size = images.image(0).size
    if max(size) > SMALL_IMAGE:
        return None
    channels = len(mode) if mode == "RGB" else 1
    pixels = np.empty((len(images), size[1], size[0], channels), dtype=np.uint8)
    for index in range(len(images)):
        image = images.image(index, mode)
        if image.size != size:
            return None
        pixels[index] = np.asarray(image).reshape(size[1], size[0], channels)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
