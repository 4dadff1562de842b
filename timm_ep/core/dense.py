"""Convolutions of maps so small that every position above sees nearly every one below: matrices between whole maps.

On maps of 2×2, those of the last layers of deep nets at 32×32 pixels, half or more of a kernel's taps lie on the
padding, and a convolution spends its time on arranging the kernel. Written out as a matrix once, the same coupling
takes half to a tenth of the time in all three products. The results are the same up to rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ep.core.convolution import Size

_LARGEST_MAP = 4  # positions below. From 3×3 on the matrix is several times as large as the kernel, and gains nothing.


def is_small(size: Size) -> bool:
    """Whether a map below, of `size` (height, width), is small enough."""
    return size[0] * size[1] <= _LARGEST_MAP


def matrix_of(kernel: Tensor, size: Size, stride: int, padding: int) -> tuple[Tensor, Size]:
    """The matrix of a convolution of maps of `size`, and the size of the maps above; differentiable.

    Args:
        kernel: (out, in, k, k).
        size: height and width of the maps below, H and W.
        stride: of the convolution.
        padding: of the convolution.

    Returns:
        (H' · W' · out, H · W · in), with channels last in rows and columns, and (H', W').
    """
    out_chs, in_chs, rows, columns = kernel.shape
    # Which tap joins which two positions: each tap alone, applied to each position alone.
    taps = torch.eye(rows * columns, dtype=kernel.dtype, device=kernel.device).view(-1, 1, rows, columns)
    positions = torch.eye(size[0] * size[1], dtype=kernel.dtype, device=kernel.device).view(-1, 1, *size)
    joins = F.conv2d(positions, taps, stride=stride, padding=padding)  # (H · W, taps, H', W')
    height, width = joins.shape[-2:]
    spread = joins.permute(1, 2, 3, 0).flatten(1)
    matrix = (kernel.flatten(2) @ spread).view(out_chs, in_chs, height * width, len(positions))
    return matrix.permute(2, 0, 3, 1).reshape(height * width * out_chs, len(positions) * in_chs), (height, width)


def convolve(below: Tensor, matrix: Tensor, bias: Tensor | None, size: Size) -> Tensor:
    """W ⋆ `below` + b, on maps of `size`."""
    everywhere = None if bias is None else bias.expand(size[0] * size[1], -1).flatten()
    return _as_maps(F.linear(_flat(below), matrix, everywhere), size)


def adjoint(above: Tensor, matrix: Tensor, size: Size) -> Tensor:
    """Wᵀ ⋆ `above`, on maps of `size`."""
    return _as_maps(_flat(above) @ matrix, size)


def matrix_gradient(below: Tensor, above: Tensor) -> Tensor:
    """∂⟨`above`, W ⋆ `below`⟩/∂W, summed over the batch, of every entry of the matrix by itself."""
    return _flat(above).t() @ _flat(below)


def _flat(maps: Tensor) -> Tensor:
    """(B, H · W · channels): no copy in channels-last format."""
    return maps.permute(0, 2, 3, 1).flatten(1)


def _as_maps(flat: Tensor, size: Size) -> Tensor:
    return flat.view(len(flat), *size, -1).permute(0, 3, 1, 2)
