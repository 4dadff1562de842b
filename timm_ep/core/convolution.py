"""The three products of a convolution: forwards, its adjoint, and the gradient of its kernel.

On a CPU, convolutions of small maps spend their time on arranging the kernel, which is larger than what it is applied
to: as matrix products of patches they take a third to a tenth of it. The results are the same up to rounding. For the
smallest maps of all see `timm_ep.core.dense`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

_matrix_products = ContextVar("matrix_products", default=True)  # of each thread

# The matrix product is the faster one where the kernel is so many times as large as the map below, and the map above
# has no more than so many positions: with numbers of four bytes, or of two, whose convolutions are slower for it.
# Measured with batches of 4 to 128 and 64 to 512 channels.
_LARGE_KERNEL, _SMALL_MAP, _SMALL_MAP_OF_TWO_BYTES = 4, 16, 64
# The kernel's gradient is by far the slowest as a convolution: either is enough.
_LARGE_GRADIENT, _SMALL_GRADIENT, _SMALL_GRADIENT_OF_TWO_BYTES = 2, 4, 16

Size = tuple[int, int]


def upper_size(kernel: Tensor, size: Size, stride: int, padding: int) -> Size:
    """Height and width of the map above one of `size`."""
    height, width = (
        (pixels + 2 * padding - taps) // stride + 1 for pixels, taps in zip(size, kernel.shape[-2:], strict=True)
    )
    return height, width


def convolve(below: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """W ⋆ `below` + b: as `F.conv2d`."""
    height, width = upper_size(kernel, (below.shape[-2], below.shape[-1]), stride, padding)
    if not _takes_patches(below, kernel, below.numel(), height * width):
        return F.conv2d(below, kernel, bias, stride, padding)
    out = F.linear(_patches(below, kernel, stride, padding), _as_matrix(kernel), bias)
    return out.view(len(below), height, width, len(kernel)).permute(0, 3, 1, 2)


def adjoint(above: Tensor, kernel: Tensor, size: Size, stride: int, padding: int) -> Tensor:
    """Wᵀ ⋆ `above`, on a map of `size` (height, width), odd ones included: as `F.conv_transpose2d`."""
    height, width = above.shape[-2:]
    rows, columns = kernel.shape[-2:]
    if not _takes_patches(above, kernel, above.shape[0] * kernel.shape[1] * size[0] * size[1], height * width):
        pads = [
            full - ((out - 1) * stride - 2 * padding + taps)
            for full, out, taps in zip(size, (height, width), (rows, columns), strict=True)
        ]
        return F.conv_transpose2d(above, kernel, None, stride, padding, pads)
    patches = (_positions(above) @ _as_matrix(kernel)).view(len(above), height, width, rows, columns, kernel.shape[1])
    padded = patches.new_zeros(len(above), size[0] + 2 * padding, size[1] + 2 * padding, kernel.shape[1])
    for row in range(rows):
        for column in range(columns):
            part = padded[:, row : row + stride * height : stride, column : column + stride * width : stride]
            part.add_(patches[:, :, :, row, column])
    return padded[:, padding : padding + size[0], padding : padding + size[1]].permute(0, 3, 1, 2)


def kernel_gradient(below: Tensor, above: Tensor, kernel: Tensor, stride: int, padding: int) -> Tensor:
    """∂⟨`above`, W ⋆ `below`⟩/∂W, summed over the batch, in the shape of `kernel`."""
    small = above.shape[-2] * above.shape[-1] <= _limit(above, _SMALL_GRADIENT, _SMALL_GRADIENT_OF_TWO_BYTES)
    if not _allowed(above) or not (small or kernel.numel() >= _LARGE_GRADIENT * below.numel()):
        return conv2d_weight(below, list(kernel.shape), above, stride, padding)
    out_chs, in_chs, rows, columns = kernel.shape
    gradient = _positions(above).t() @ _patches(below, kernel, stride, padding)
    return gradient.view(out_chs, rows, columns, in_chs).permute(0, 3, 1, 2)


def matrices_allowed() -> bool:
    """Whether products may be computed otherwise than as convolutions."""
    return _matrix_products.get()


@contextmanager
def convolutions_only() -> Iterator[None]:
    """Every product as a convolution, for those who count them."""
    before = _matrix_products.set(False)
    try:
        yield
    finally:
        _matrix_products.reset(before)


def _takes_patches(operand: Tensor, kernel: Tensor, elements: int, positions: int) -> bool:
    """Whether the matrix product is the faster one, for a map below of so many elements and one above of so many
    positions."""
    small = positions <= _limit(operand, _SMALL_MAP, _SMALL_MAP_OF_TWO_BYTES)
    return _allowed(operand) and small and kernel.numel() >= _LARGE_KERNEL * elements


def _limit(operand: Tensor, of_four_bytes: int, of_two_bytes: int) -> int:
    return of_two_bytes if operand.element_size() == 2 else of_four_bytes


def _allowed(operand: Tensor) -> bool:
    return matrices_allowed() and operand.device.type == "cpu"


def _patches(below: Tensor, kernel: Tensor, stride: int, padding: int) -> Tensor:
    """What the kernel sees at each position, (B · positions, k · k · in)."""
    padded = F.pad(below.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    windows = padded.unfold(1, kernel.shape[2], stride).unfold(2, kernel.shape[3], stride)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel[0].numel())


def _positions(above: Tensor) -> Tensor:
    """(B · positions, out)."""
    return above.permute(0, 2, 3, 1).reshape(-1, above.shape[1])


def _as_matrix(kernel: Tensor) -> Tensor:
    """(out, k · k · in): taps before channels, as in `_patches`."""
    return kernel.permute(0, 2, 3, 1).reshape(len(kernel), -1)
