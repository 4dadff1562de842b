"""The images of a run: those that can be read, for a model of so many channels; and batches of them, unchanged."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from timm_ep.data.damaged import damaged_images, without_images
from timm_ep.data.datasets import DataSource, labels_of, open_data
from timm_ep.data.pictures import UnreadableImage
from timm_ep.data.transforms import image_transform
from timm_ep.training.distributed import World
from timm_ep.training.options import TrainingOptions

__all__ = ["BAD_IMAGES_NAME", "RunImages", "Transformed", "open_source", "plain_loader", "with_lost_classes"]

BAD_IMAGES_NAME = "bad_images.txt"


class RunImages(NamedTuple):
    """The images of a run, as PIL images, and how the model wants them."""

    source: DataSource
    train: Any
    validation: Any
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def chooses_by_test(self) -> bool:
        """Whether the best epoch is chosen by the very images that the result is tested on."""
        return self.validation is not None and self.validation is self.source.test

    def fingerprint(self) -> int:
        """Of the labels of the images to train on and to choose by, in their order, as far as they are known unread."""
        return zlib.crc32(repr([labels_of(self.train), labels_of(self.validation)]).encode())


def open_source(options: TrainingOptions, world: World, state: dict[str, Any]) -> tuple[DataSource, dict[str, str]]:
    """The images as the model is to see them, and why some are left out, by their names.

    Args:
        options: of the training.
        world: the processes, which share out the search for damaged images.
        state: of the run that is resumed, in which those were left out that it names; empty for a new one.

    Raises:
        ValueError: images of one class, of other channels than grey or colour, or none that can be read.
    """
    source = open_data(options.dataset, options.data_dir)
    channels = options.in_chans or options.model_args.get("in_chans", source.channels)
    if channels not in (1, 3):
        raise ValueError(f"in_chans={channels}, but images are seen in grey (1) or in colour (3).")
    if len(source.classes) < 2:
        raise ValueError(f"{options.dataset} has the one class {source.classes[0]!r}; there is nothing to tell apart.")
    left_out: dict[str, str] = {}
    if options.bad_images == "skip":
        if state:
            left_out = state["identity"]["bad_images"]
        else:
            for found in world.gather(damaged_images(source, options.workers, world.rank, world.size)):
                left_out |= found
        source = _without(source, left_out)
    return replace(source, channels=channels), left_out


def _without(source: DataSource, left_out: dict[str, str]) -> DataSource:
    """The images that can be read.

    Raises:
        ValueError: there are none of a part.
    """
    kept = without_images(source, list(left_out))
    for part, images in {"train": kept.train, "validation": kept.validation, "test": kept.test}.items():
        if images is not None and not len(images):
            reason = next((why for name, why in left_out.items() if name.startswith(f"{part}/")), "there are none.")
            raise ValueError(f"None of the {part} images can be read. {reason}")
    return with_lost_classes(kept, source.train, kept.train, "can be read")


def with_lost_classes(source: DataSource, before: Any, after: Any, what: str) -> DataSource:
    """The source with a note of the classes that have no training image any more.

    Args:
        source: of the images.
        before: training images.
        after: those that are left.
        what: is true of those that are left.
    """
    lost = (set(labels_of(before) or ()) - set(labels_of(after) or ())).intersection(range(len(source.classes)))
    if not lost:
        return source
    names = ", ".join(source.classes[label] for label in sorted(lost))
    return replace(source, notes=(*source.notes, f"none of the training images {what} of: {names}"))


def plain_loader(
    options: TrainingOptions, dataset: Any, images: RunImages, world: World | None = None
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Images without augmentation, in order; with `world` those of this process."""
    shared = world is not None and world.size > 1
    if world is not None and shared:
        dataset = Subset(dataset, range(world.rank, len(dataset), world.size))
    samples = Transformed(dataset, image_transform(images.size, images.mean, images.std))
    loader = DataLoader(samples, options.batch_size, num_workers=options.workers)
    return _Together(loader, world) if world is not None and shared else loader


@dataclass(frozen=True)
class _Together:
    """Batches of each process, after which an image that any could not read is an error in all."""

    loader: Iterable[Any]
    world: World

    def __iter__(self) -> Iterator[Any]:
        failure = None
        try:
            yield from self.loader
        except UnreadableImage as error:
            failure = error
        self.world.agree(failure)


@dataclass(frozen=True)
class Transformed(Dataset[tuple[torch.Tensor, int]]):
    """A dataset's (PIL image, label) with the image as a tensor."""

    dataset: Any
    transform: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label
