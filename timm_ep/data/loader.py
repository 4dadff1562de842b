"""Training batches as a pure function of (seed, epoch, position): in what order, and how augmented.

timm's own loader draws the order and the augmentation from generators that run on. Here each is seeded by where it is
in the training. So a run that is resumed in mid-epoch sees what it would have seen, and neither the number of worker
processes nor that of ranks changes an image: W ranks × B images are one process × W·B images.
"""

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["EpochOrder", "Samples", "seed_everything", "training_loader"]

_GRACE_SECONDS = 20  # for the batches of an update that is under way


Stream = Literal["order", "sample", "step", "test"]


def _derived(stream: Stream, *position: int) -> int:
    """A seed for a position: streams and positions that differ in any part give unrelated seeds."""
    return int(np.random.SeedSequence([len(position), *position, *stream.encode()]).generate_state(1)[0])


def seed_everything(stream: Stream, *position: int) -> None:
    """Seed Python's, NumPy's and torch's generators by a position such as (seed, epoch, step).

    Those of CUDA devices are seeded where CUDA is in use.

    Args:
        stream: what the random numbers are for.
        *position: integers ≥ 0.
    """
    seed = _derived(stream, *position)
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which notes a stack trace for every kind of device that was never used: for small images
    # that took longer than loading and augmenting them.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class Samples(Dataset[tuple[Tensor, int, int]]):
    """(image, label, index) by (epoch, index): all that is random in the augmentation follows from seed, epoch, index.

    Args:
        dataset: PIL images with labels.
        transform: PIL image → tensor.
        seed: of the run.
    """

    def __init__(self, dataset: Any, transform: Callable[[Image.Image], Tensor], seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = position
        image, label = self.dataset[index]
        seed_everything("sample", self.seed, epoch, index)
        return self.transform(image), label, index


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """The batches of an epoch for one rank, as positions for `Samples`; those of an incomplete update are left out.

    Args:
        count: training images.
        batch_size: images of one rank in one batch.
        seed: of the run.
        rank: of this process.
        world_size: processes. An update takes `accumulate × world_size × batch_size` images in a row of the epoch's
            order; batch after batch, rank after rank.
        accumulate: batches of an update.

    Attributes:
        epoch: whose order is given, from 0.
        start: update from which it is given, from 0.
        updates: of an epoch.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, accumulate: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.updates = count // (batch_size * world_size * accumulate)
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return (self.updates - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(_derived("order", self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        for batch in range(self.start * self.accumulate, self.updates * self.accumulate):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


def training_loader(samples: Samples, order: EpochOrder, workers: int = 0, pin: bool = False) -> DataLoader[Any]:
    """Batches (images, labels, indices) in the given order, which can be moved on between passes.

    Args:
        samples: the images.
        order: of their batches.
        workers: processes that load, kept from epoch to epoch; 0 loads in this one.
        pin: put batches into page-locked memory, from which they reach a CUDA device faster.
    """
    return DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
        worker_init_fn=_serve_the_trainer,
    )


def _serve_the_trainer(_: int) -> None:
    # Ctrl-C reaches every process of a terminal, and SIGTERM often every one of a job; the batches under way are still
    # wanted. SIGTERM may also be of the trainer, which then waits for the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)
    # torch's own watch is on the parent, which under forkserver is the server, and that lives as long as its children.
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_soon(*_: Any) -> None:
    timer = threading.Timer(_GRACE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _end_with_the_trainer() -> None:
    if trainer := multiprocessing.parent_process():
        trainer.join()
        os._exit(1)
