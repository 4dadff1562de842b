"""The processes of a training: one, or as many as torchrun started."""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.distributed import init_distributed_device_so
from torch import distributed

__all__ = ["World", "available", "is_primary", "join_world"]


@dataclass(frozen=True)
class World:
    """This process among those of the training.

    Attributes:
        device: of this process.
        rank: from 0, over all machines.
        size: processes in all.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def primary(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def machine(self) -> str:
        """The processors that train: the devices, or the CPU and the threads of each process."""
        if self.device.type == "cuda":
            return f"{self.size} × {torch.cuda.get_device_name(self.device)}"
        threads = torch.get_num_threads()
        each = f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
        return each if self.size == 1 else f"{each} in each of {self.size} processes"

    @property
    def launcher(self) -> list[str]:
        """What starts a command of this package in as many processes as there are: it alone, or torchrun."""
        if self.size == 1:
            return ["timm-ep"]
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))  # torchrun's, of one machine
        machines = [] if here == self.size else ["--nnodes", str(self.size // here)]
        return ["torchrun", *machines, "--nproc-per-node", str(here), "-m", "timm_ep"]

    def sum(self, values: Sequence[torch.Tensor | float]) -> list[float]:
        """The sums over all processes, on the host: one transfer, and at most one message, for all of them."""
        packed = torch.stack([torch.as_tensor(value, device=self.device).float() for value in values])
        if self.size > 1:
            distributed.all_reduce(packed)
        return packed.tolist()

    def from_primary(self, value: Any) -> Any:
        """The primary process's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, in every process."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raise the first error that any process had in every one: none is left waiting for another."""
        for each in self.gather(error):
            if each is not None:
                raise each


def is_primary() -> bool:
    """Whether this is the process that prints and writes, where no `World` is at hand."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def available(device: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: there is none.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown to PyTorch; choose cpu, cuda, mps, …") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found.type != "cpu" and (accelerator is None or accelerator.type != found.type):
        raise ValueError(f"device={device} is not available here; choose cpu, or install a PyTorch build that has it.")
    return found


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it did: by NCCL on CUDA devices, by gloo on CPUs.

    Args:
        device: as given by the user; a process group replaces its index by that of the process.

    Raises:
        ValueError: there is no such device.
    """
    available(device)
    joined = init_distributed_device_so(device)
    try:
        yield World(torch.device(joined["device"]), joined["global_rank"], joined["world_size"])
    finally:
        if joined["distributed"]:
            distributed.destroy_process_group()
