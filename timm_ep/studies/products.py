"""The convolution products of a step, recorded while it runs: their number, their multiply-adds, their plain time.

Recorded below autograd, where every convolution of torch passes, so that the count is no formula that could drift from
what the dynamics do.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight
from torch.utils._python_dispatch import TorchDispatchMode

from timm_ep.core.convolution import convolutions_only
from timm_ep.studies.measure import Step

__all__ = ["Product", "multiply_adds", "plain_step", "recorded_products"]

Shape = tuple[int, ...]


class Product(NamedTuple):
    """One product of the maps below and above a coupling and its kernel.

    Attributes:
        kind: which of the three it computes: `above` (the convolution), `below` (its adjoint), `kernel` (the contrast,
            a weight gradient).
        above: (B, out, H', W').
        below: (B, in, H, W).
        kernel: (out, in, k, k).
        stride: of the convolution.
        padding: of the convolution.
        dtype: of all.
    """

    kind: Literal["above", "below", "kernel"]
    above: Shape
    below: Shape
    kernel: Shape
    stride: Shape
    padding: Shape
    dtype: torch.dtype

    @property
    def multiply_adds(self) -> int:
        """For each position and channel above, the taps of its kernel, those on the padding included."""
        return math.prod(self.above) * math.prod(self.kernel[1:])


def multiply_adds(products: Counter[Product]) -> int:
    """Of all products together."""
    return sum(product.multiply_adds * times for product, times in products.items())


def recorded_products(step: Step) -> Counter[Product]:
    """How often each product is computed in a step.

    Raises:
        NotImplementedError: the step uses a convolution that is not known here, and would not be counted.
    """
    with _Recorder() as recorder, convolutions_only():
        step()
    return recorder.products


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            operand, kernel, _, *geometry = args
            transposed = geometry[3]
            above, below = (operand, result) if transposed else (result, operand)
            self._add("below" if transposed else "above", above, below, kernel, geometry)
        elif func is torch.ops.aten.convolution_backward.default:
            above, below, kernel, _, *geometry, wanted = args
            if geometry[3]:  # of a transposed convolution: its output is what lies below
                above, below = below, above
            for kind, needed in zip(("above" if geometry[3] else "below", "kernel"), wanted[:2], strict=True):
                if needed:
                    self._add(kind, above, below, kernel, geometry)
        elif "conv" in func.__name__ and "convert" not in func.__name__:
            raise NotImplementedError(f"{func} is not among the convolutions that are counted; add it here.")
        return result

    def _add(self, kind: Any, above: Tensor, below: Tensor, kernel: Tensor, geometry: list[Any]) -> None:
        stride, padding, _, _, _, groups = geometry
        if groups != 1:
            raise NotImplementedError("Convolutions in groups are not among those that are counted; add them here.")
        shapes = (tuple(above.shape), tuple(below.shape), tuple(kernel.shape))
        self.products[Product(kind, *shapes, tuple(stride), tuple(padding), above.dtype)] += 1


def plain_step(products: Counter[Product], device: str = "cpu") -> Step:
    """A step that computes the same products as often, by `F.conv2d`, `F.conv_transpose2d` and `conv2d_weight` alone.

    On random maps in channels-last format, one for each shape; a kernel is laid out beforehand, as it is in settling.
    """
    maps: dict[tuple[Shape, torch.dtype], Tensor] = {}

    def values(shape: Shape, dtype: torch.dtype) -> Tensor:
        if (shape, dtype) not in maps:
            value = torch.randn(shape, device=device).to(dtype=dtype, memory_format=torch.channels_last)
            maps[shape, dtype] = value
        return maps[shape, dtype]

    calls = [(_plain_call(product, values), times) for product, times in products.items()]

    @torch.no_grad()
    def step() -> None:
        for call, times in calls:
            for _ in range(times):
                call()

    return step


def _plain_call(product: Product, values: Callable[[Shape, torch.dtype], Tensor]) -> Callable[[], Tensor]:
    kind, above_shape, below_shape, kernel_shape, stride, padding, dtype = product
    above, below, kernel = (values(shape, dtype) for shape in (above_shape, below_shape, kernel_shape))
    if kind == "above":
        return lambda: F.conv2d(below, kernel, None, stride, padding)
    if kind == "kernel":
        return lambda: conv2d_weight(below, kernel_shape, above, stride, padding)
    pads = [
        size - ((out - 1) * step - 2 * pad + tap)
        for size, out, step, pad, tap in zip(
            below_shape[2:], above_shape[2:], stride, padding, kernel_shape[2:], strict=True
        )
    ]
    return lambda: F.conv_transpose2d(above, kernel, None, stride, padding, pads)
