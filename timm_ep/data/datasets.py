"""Labelled images: scikit-learn's digits, class folders and tars, the datasets of torchvision and of Hugging Face."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch import Tensor
from torch.utils.data import Dataset, Subset

from timm_ep.data.folders import ClassFolders, ClassTar, passed_over_line
from timm_ep.data.pictures import Pictures

# Folders (or tars, or splits of the Hub) by what they are for.
PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "eval"),
    "test": ("test", "testing"),
}


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


class HubPictures(Pictures):
    """The pictures of a dataset of Hugging Face.

    Args:
        dataset: of timm, with the reader of such datasets.
        title: of dataset and split, for messages.
    """

    def __init__(self, dataset: ImageDataset, title: str) -> None:
        self.reader: Any = dataset.reader
        self.title = title
        names: dict[str, int] = self.reader.class_to_idx
        self.classes = tuple(sorted(names, key=names.__getitem__))
        self.targets = [int(label) for label in self.reader.iter_targets()]

    def open(self, index: int) -> IO[bytes]:
        return self.reader[index][0]

    def name(self, index: int) -> str:
        return f"{self.title} image {index}"


@dataclass(frozen=True)
class DataSource:
    """Training and test images, as PIL images with integer labels; set `transform` on each for tensors.

    Attributes:
        train: training images.
        test: test images; not for choosing anything.
        classes: names in the order of the labels.
        channels: 1 for grey images, else 3.
        validation: images to choose the best epoch by, where there are such; the same as `test` where there are no
            others.
        notes: lines that the user should read: what was passed over.
    """

    train: Any
    test: Any
    classes: tuple[str, ...]
    channels: int
    validation: Any = None
    notes: tuple[str, ...] = ()


def open_data(name: str, data_dir: str | Path | None = None, classes: Sequence[str] | None = None) -> DataSource:
    """Find a dataset.

    Args:
        name: `digits` (embedded); `folder`: class folders (see `timm_ep.data.folders`) in the folders `train`, `test`
            and, to choose the best epoch by, `val` of `data_dir`, or in the tars `train.tar` and so on; `torch/NAME`
            for torchvision's (`torch/cifar10`, `torch/cifar100`, `torch/mnist`, `torch/kmnist`,
            `torch/fashion_mnist`), already in `data_dir`; or `hfds/NAME` for a dataset of the Hugging Face Hub or a
            local folder of one, fetched into `data_dir` or the usual cache.
        data_dir: where the images are; not needed for `digits` and `hfds/`.
        classes: names in the order of the labels, of a model that is to be tested: then of a `folder` only the test
            images are looked for, and `train` is None.

    Raises:
        ValueError: unknown name, a folder for embedded images, or classes that differ between training and test images
            or from `classes`.
        FileNotFoundError: nothing there.
        ModuleNotFoundError: `hfds/` without the package it needs.
    """
    if name == "digits":
        if data_dir is not None:
            raise ValueError(
                f"data_dir={data_dir}, but dataset=digits is embedded: give --dataset folder for class folders or tars "
                "there, torch/NAME or hfds/NAME; or leave data_dir out."
            )
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
        return _open_folder(Path(data_dir), classes)
    try:
        train, test = (create_dataset(name, str(data_dir), split=split) for split in ("train", "validation"))
    except RuntimeError as error:
        raise FileNotFoundError(
            f"No {name} in {data_dir}: {error} Download it there with torchvision first."
        ) from error
    except AssertionError as error:
        raise ValueError(f"dataset={name!r} is not a dataset of torchvision that timm knows.") from error
    if list(train.classes) != list(test.classes):
        raise _differing(train.classes, test.classes, "the training images", "the test images")
    channels = 1 if train[0][0].mode == "L" else 3
    return DataSource(train, test, tuple(train.classes), channels)


def _open_folder(data_dir: Path, known: Sequence[str] | None) -> DataSource:
    paths = _find_parts(data_dir, ("test",) if known else ("train", "test"))
    if known:
        tested = "test" if "test" in paths else "validation"
        paths = {tested: paths[tested]}
    parts: dict[str, Any] = {use: (ClassFolders if path.is_dir() else ClassTar)(path) for use, path in paths.items()}
    classes, whose = (tuple(known), "the model") if known else (parts["train"].classes, paths["train"])
    notes = [line for use, part in parts.items() for line in passed_over_line(paths[use].name, part.passed_over)]
    for use, part in parts.items():
        if set(part.classes) - set(classes):
            raise _differing(classes, part.classes, whose, paths[use])
        if lacking := [name for name in classes if name not in part.classes]:
            notes.append(f"{paths[use].name}: no image of {len(lacking)} classes, such as {lacking[0]}")
        part.renumber(classes)
    return _source(parts, notes, classes)


def _find_parts(data_dir: Path, uses: Sequence[str]) -> dict[str, Path]:
    """The folder or tar of each use; those of `uses` have to be there."""
    found: dict[str, Path] = {}
    for path in sorted(data_dir.iterdir()):  # a folder comes before its tar
        name = path.name.lower()
        stem = name.removesuffix(".tar") if path.is_file() else name
        for use, names in PARTS.items():
            if stem not in names or not (path.is_dir() or name.endswith(".tar")):
                continue
            if use not in found:
                found[use] = path
            elif path.is_dir() or found[use].name.lower() != stem:  # a tar may lie beside what was unpacked from it
                raise ValueError(
                    f"{data_dir} has {found[use].name} and {path.name}, either of which may be the {use} images; keep "
                    "one under such a name."
                )
    for use in uses:
        needed = ("test", "validation") if use == "test" else (use,)
        if not found.keys() & set(needed):
            looked = ", ".join(f"{name}, {name}.tar" for part in needed for name in PARTS[part])
            raise FileNotFoundError(
                f"{data_dir} has none of {looked}; expected one folder (or tar) of class folders with {use} images."
            )
    return found


def _source(parts: dict[str, Any], notes: Sequence[str], classes: tuple[str, ...]) -> DataSource:
    validation = parts.get("validation")
    return DataSource(parts.get("train"), parts.get("test", validation), classes, 3, validation, tuple(notes))


def _differing(train: Sequence[str], other: Sequence[str], train_name: Any, other_name: Any) -> ValueError:
    missing = (
        [
            f"{where} lacks {sorted(lacked)[:10]!a}"  # so that names that look alike do not
            for where, lacked in ((train_name, set(other) - set(train)), (other_name, set(train) - set(other)))
            if lacked
        ]
        or [f"the order is {train[:10]!a} in {train_name}, {other[:10]!a} in {other_name}"]
    )
    return ValueError(f"The classes of the images differ: {'; '.join(missing)}.")


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
    splits = {use: next((split for split in names if split in parts), None) for use, names in PARTS.items()}
    if not splits["train"] or not (splits["test"] or splits["validation"]):
        raise ValueError(f"{name} has the splits {sorted(parts)}; expected train, and test or validation.")
    features = parts[splits["train"]].features
    keys = {
        key: next((column for column, feature in features.items() if isinstance(feature, kind)), None)
        for key, kind in (("input_key", datasets.Image), ("target_key", datasets.ClassLabel))
    }
    if None in keys.values():
        raise ValueError(f"{name} has the columns {dict(features)}; expected one of images and one of class labels.")
    opened = {
        use: HubPictures(create_dataset(name, root, split=split, **keys), f"{name}, split {split},")
        for use, split in splits.items()
        if split
    }
    train = opened["train"]
    for part in opened.values():
        if part.classes != train.classes:
            raise _differing(train.classes, part.classes, train.title, part.title)
    notes = []
    # The Hub's way to hide labels.
    if opened.keys() >= {"test", "validation"} and set(opened["test"].targets) == {-1}:
        notes.append(f"{opened.pop('test').title} has no labels; tested is on the validation images")
    return _source(opened, notes, train.classes)


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
