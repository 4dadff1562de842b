from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import timm_ep  # noqa: F401  (registers the models)
from timm_ep import EpVgg

ARCHITECTURES = {
    4: (4, "M", 6, "M", 6, "M", 8, "M"),
    9: (4, 4, "M", 4, 4, "M", 6, 6, "M", 6, 6, 8),
    13: (4, 4, "M", 4, 4, "M", 6, 6, 6, "M", 6, 6, 6, "M", 8, 8, 8),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of processes side by side none is then left alone with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def make_net(depth: int = 4, gain: float = 1.0, seed: int = 0, **kwargs) -> EpVgg:
    """A narrow net of 4, 9 or 13 convolutions in float64; `gain` scales its kernels, so that λ = 1 can settle too."""
    torch.manual_seed(seed)
    kwargs = {"num_classes": 5, "dtype": torch.float64, **kwargs}
    model = EpVgg(ARCHITECTURES[depth], **kwargs)
    with torch.no_grad():
        for conv in model.layers:
            kernel = conv.weight if conv.gain is None else conv.gain
            spread = torch.empty_like(conv.bias).uniform_(0.8, 1.2)
            kernel.mul_(gain).mul_(spread.view(-1, *[1] * (kernel.dim() - 1)))
            conv.bias.uniform_(-0.1, 0.2)
    return model


def make_batch(size: int = 16, batch: int = 3, seed: int = 1, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (batch, 3, size, size) and labels of 5 classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.arange(batch) % 5


class Convolution(NamedTuple):
    """A convolution of random maps by torch, and autograd's gradients of ⟨above, W ⋆ below + b⟩."""

    below: Tensor
    kernel: Tensor
    bias: Tensor
    result: Tensor
    above: Tensor
    of_below: Tensor
    of_kernel: Tensor


def make_convolution(size: tuple[int, int], taps: int, stride: int, padding: int) -> Convolution:
    """From 3 maps of 5 channels, of `size`, to 7 channels in float64."""
    below = torch.randn(3, 5, *size, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(7, 5, taps, taps, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64)
    result = F.conv2d(below, kernel, bias, stride, padding)
    above = torch.randn_like(result)
    gradients = torch.autograd.grad((result * above).sum(), (below, kernel))
    return Convolution(below, kernel, bias, result, above, *gradients)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
