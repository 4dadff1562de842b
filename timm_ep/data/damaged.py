"""Which images of a dataset cannot be read, and the dataset without them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset

from timm_ep.data.datasets import DataSource
from timm_ep.data.pictures import Pictures, UnreadableImage

__all__ = ["damaged_images", "without_images"]


class _Reasons(Dataset[str]):
    """Why an image cannot be read; empty where it can."""

    def __init__(self, pictures: Pictures, indices: Sequence[int]) -> None:
        self.pictures, self.indices = pictures, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> str:
        try:
            _ = self.pictures[self.indices[position]]
        except UnreadableImage as error:
            return str(error)
        return ""


def damaged_images(source: DataSource, workers: int = 0, rank: int = 0, size: int = 1) -> dict[str, str]:
    """Try to read every image of files.

    Args:
        source: of images; those that are in memory cannot be damaged.
        workers: processes that read.
        rank: of this process, which looks through one of
        size: equal shares.

    Returns:
        why each image that cannot be read is not, by its part and its name there.
    """
    found: dict[str, str] = {}
    for part, pictures in _parts(source).items():
        indices = range(rank, len(pictures), size)
        reasons = DataLoader(_Reasons(pictures, indices), 64, num_workers=workers, collate_fn=list)
        flat = (reason for batch in reasons for reason in batch)
        found |= {_key(part, pictures, i): reason for i, reason in zip(indices, flat, strict=True) if reason}
    return found


def without_images(source: DataSource, names: Sequence[str]) -> DataSource:
    """The images but those of these names, as from `damaged_images`."""
    left_out = set(names)
    kept: dict[str, Any] = {
        part: Subset(pictures, [i for i in range(len(pictures)) if _key(part, pictures, i) not in left_out])
        for part, pictures in _parts(source).items()
    }
    if source.validation is source.test and "test" in kept:
        kept["validation"] = kept["test"]
    return dataclasses.replace(source, **kept)


def _parts(source: DataSource) -> dict[str, Pictures]:
    parts = {"train": source.train, "test": source.test}
    if source.validation is not source.test:
        parts["validation"] = source.validation
    return {part: pictures for part, pictures in parts.items() if isinstance(pictures, Pictures)}


def _key(part: str, pictures: Pictures, index: int) -> str:
    return f"{part}/{pictures.key(index)}"
