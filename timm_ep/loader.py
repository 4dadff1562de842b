"""Batches, in an order and with augmentation that are functions of (seed, epoch, image) alone.

So a run that was interrupted can go on in the middle of an epoch, with any number of loading processes, and several
processes of a distributed run see together what a single one would.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from timm_ep.data import ImageSet

Augment = Literal["none", "crop", "flip-crop", "resized-crop"]
Batch = tuple[Tensor, Tensor]

_ORDER, _AUGMENT = 0, 1  # what a key's random numbers are for


def seed_of(*key: int) -> int:
    """A seed of 63 bits that depends on every number of the key (each ≥ 0), and on their order."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(*key: int) -> None:
    """Seed torch, NumPy and Python from a key."""
    seed = seed_of(*key)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@dataclass(frozen=True)
class Shard:
    """How the images of an epoch are dealt out: to `world` processes of which this is number `rank`."""

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    @property
    def images_per_update(self) -> int:
        """Over all processes and accumulated batches."""
        return self.batch_size * self.accumulate * self.world

    def updates(self, count: int) -> int:
        """Updates in an epoch of `count` images; the incomplete last one is left out."""
        return count // self.images_per_update

    def order(self, count: int, seed: int, epoch: int) -> Tensor:
        """Positions of this process's images, (updates, accumulate, batch_size), of a new shuffle in every epoch.

        The images of an update are the same for any division into processes and accumulated batches.
        """
        generator = torch.Generator().manual_seed(seed_of(seed, epoch, _ORDER))
        used = self.updates(count) * self.images_per_update
        dealt = torch.randperm(count, generator=generator)[:used]
        return dealt.view(-1, self.accumulate, self.world, self.batch_size)[:, :, self.rank]


@dataclass(frozen=True)
class ImageFormat:
    """What the model is given: `size` (height, width), and the pixels' mean and standard deviation per channel."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    @property
    def mode(self) -> str:
        """PIL's name of the channels."""
        return "L" if len(self.mean) == 1 else "RGB"

    def test_transform(self) -> Any:
        """timm's own for these settings: resized on the shorter side, cropped at the centre, normalised."""
        options = {"interpolation": self.interpolation, "mean": self.mean, "std": self.std, "crop_pct": self.crop_pct}
        to_mode = transforms.Lambda(partial(Image.Image.convert, mode=self.mode))
        return transforms.Compose([to_mode, create_transform((len(self.mean), *self.size), **options)])


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images at random. The fields are options of `timm_ep.options.TrainOptions`."""

    augment: Augment = "none"
    rand_augment: str | None = None
    random_erasing: float = 0.0

    @property
    def on_batches(self) -> bool:
        """Whether whole batches of equally small images can be augmented at once."""
        return self.augment != "resized-crop" and not self.rand_augment and not self.random_erasing

    def transform(self, image_format: ImageFormat) -> Any:
        """PIL image → augmented, normalised tensor, with timm's transforms."""
        size = image_format.size
        steps: list[Any] = [partial(Image.Image.convert, mode=image_format.mode)]
        if self.augment == "resized-crop":
            steps.append(RandomResizedCropAndInterpolation(size, interpolation=image_format.interpolation))
        else:
            steps += [transforms.Resize(min(size)), transforms.CenterCrop(size)]
        if self.augment in ("crop", "flip-crop"):
            steps.append(transforms.RandomCrop(size, padding=_padding(size)))
        if self.augment in ("flip-crop", "resized-crop"):
            steps.append(transforms.RandomHorizontalFlip())
        if self.rand_augment:
            fill = tuple(round(255 * value) for value in image_format.mean)
            steps.append(rand_augment_transform(self.rand_augment, {"img_mean": fill if len(fill) > 1 else fill[0]}))
        steps += [transforms.ToTensor(), transforms.Normalize(image_format.mean, image_format.std)]
        if self.random_erasing:
            steps.append(RandomErasing(self.random_erasing, mode="pixel", device="cpu"))
        return transforms.Compose(steps)


def _padding(size: tuple[int, int]) -> int:
    return min(size) // 8


def shift_and_flip(pixels: Tensor, draws: Tensor, augment: Augment) -> Tensor:
    """Random crops after padding with black by an eighth, and horizontal flips with `flip-crop`.

    Args:
        pixels: (B, C, H, W).
        draws: (B, 3), uniform in [0, 1): the vertical and horizontal shift and the flip of each image.
        augment: `crop` or `flip-crop`.
    """
    height, width = pixels.shape[-2:]
    padding = _padding((height, width))
    top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
    columns = torch.arange(width).expand(len(pixels), -1)
    if augment == "flip-crop":
        columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    rows = torch.arange(height) + top[:, None]
    columns = columns + left[:, None]
    padded = F.pad(pixels, (padding,) * 4)
    batch = torch.arange(len(pixels))[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Loader:
    """Batches of an image set: from memory where the images are small and of one size, else by loading processes.

    Args:
        images: the images.
        image_format: what the model is given.
        workers: processes that load images that are not in memory; 0 loads in this one.
        augmentation: of training images.
        pixels: the decoded images, where `decode_small` gave them.
    """

    def __init__(
        self,
        images: ImageSet,
        image_format: ImageFormat,
        workers: int = 0,
        augmentation: Augmentation | None = None,
        pixels: Tensor | None = None,
    ) -> None:
        self.images, self.format, self.workers = images, image_format, workers
        self.augmentation = augmentation or Augmentation()
        fits = pixels is not None and pixels.shape[-2:] == image_format.size and self.augmentation.on_batches
        self.pixels = pixels if fits else None
        self.labels = torch.from_numpy(images.labels)
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in (image_format.mean, image_format.std))

    def training_batches(self, shard: Shard, seed: int, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """The accumulated batches of each update of an epoch, from update `start` on."""
        order = shard.order(len(self.images), seed, epoch)[start:]
        if self.pixels is not None:
            generator = torch.Generator().manual_seed(seed_of(seed, epoch, _AUGMENT))
            draws = torch.rand(len(self.images), 3, generator=generator)
            for update in order:
                yield [(self._from_memory(chosen, draws[chosen]), self.labels[chosen]) for chosen in update]
            return
        loaded = self._load(order.flatten(0, 1), self.augmentation.transform(self.format), (seed, epoch, _AUGMENT))
        for _ in order:
            yield [next(loaded) for _ in range(shard.accumulate)]

    def test_batches(self, batch_size: int = 256, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """All images in order, without augmentation; of several processes, each takes every `world`-th image."""
        batches = torch.arange(rank, len(self.images), world).split(batch_size)
        if self.pixels is not None:
            yield from ((self._normalised(self.pixels[chosen]), self.labels[chosen]) for chosen in batches)
        else:
            yield from self._load(batches, self.format.test_transform(), None)

    def _from_memory(self, chosen: Tensor, draws: Tensor) -> Tensor:
        pixels = self.pixels[chosen] if self.pixels is not None else torch.empty(0)
        if self.augmentation.augment != "none":
            pixels = shift_and_flip(pixels, draws, self.augmentation.augment)
        return self._normalised(pixels)

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels / 255).sub_(self._mean).div_(self._std)

    def _load(self, batches: Any, transform: Any, key: tuple[int, ...] | None) -> Iterator[Batch]:
        dataset = _Samples(self.images, transform, key)
        chosen = [batch.tolist() for batch in batches]
        return iter(DataLoader(dataset, batch_sampler=chosen, num_workers=self.workers))  # type: ignore[arg-type]


class _Samples(Dataset[tuple[Tensor, int]]):
    """Transformed images; with a key, the random numbers of each are seeded by it and the image's position."""

    def __init__(self, images: ImageSet, transform: Any, key: tuple[int, ...] | None) -> None:
        self.images, self.transform, self.key, self.labels = images, transform, key, images.labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images.image(index)
        if self.key is not None:
            seed_everything(*self.key, index)
        return self.transform(image), int(self.labels[index])


def choose_format(pixels: Tensor | None, model_config: dict[str, Any], channels: int) -> ImageFormat:
    """Size and statistics of the training images themselves where they are in memory, else what the model expects."""
    if pixels is not None:
        flat = pixels.transpose(0, 1).flatten(1).double() / 255
        std = flat.std(1).clamp_min(1 / 255)  # a channel of one value only is not to be divided by zero
        height, width = pixels.shape[-2:]
        return ImageFormat((height, width), tuple(flat.mean(1).tolist()), tuple(std.tolist()))
    mean, std = (_for_channels(model_config[name], channels) for name in ("mean", "std"))
    height, width = model_config["input_size"][-2:]
    return ImageFormat((height, width), mean, std, model_config["crop_pct"], model_config["interpolation"])


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """The model's mean or std for `channels`: averaged for grey images."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
