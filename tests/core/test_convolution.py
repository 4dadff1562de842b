"""The three products against torch's convolution and its autograd, on small maps (matrix products) and large ones."""

import pytest
import torch
from torch.testing import assert_close

from conftest import make_convolution
from timm_ep.core import convolution
from timm_ep.core.convolution import adjoint, convolve, kernel_gradient


@pytest.mark.parametrize("matrix", [True, False])
@pytest.mark.parametrize("size", [(4, 4), (2, 2), (5, 3), (1, 1), (9, 8)])
@pytest.mark.parametrize(("taps", "stride", "padding"), [(3, 1, 1), (4, 2, 1), (3, 2, 1), (1, 1, 0)])
def test_products_are_those_of_torch(matrix, size, taps, stride, padding, monkeypatch):
    if min(size) + 2 * padding < taps:
        size = (2, 2)
    for times in ("_LARGE_KERNEL", "_LARGE_GRADIENT"):
        monkeypatch.setattr(convolution, times, 0 if matrix else 1000)
    for limit in ("_SMALL_MAP", "_SMALL_GRADIENT"):
        monkeypatch.setattr(convolution, limit, 1000 if matrix else 0)
    below, kernel, bias, expected, above, of_below, of_kernel = make_convolution(size, taps, stride, padding)
    ours = convolve(below, kernel, bias, stride, padding)
    assert_close(ours, expected)
    assert_close(adjoint(above, kernel, below.shape[-2:], stride, padding), of_below)
    assert_close(kernel_gradient(below, above, kernel, stride, padding), of_kernel)
    # BPTT differentiates the products themselves.
    for mine, theirs in zip(
        torch.autograd.grad((ours * above).sum(), (below, kernel)), (of_below, of_kernel), strict=True
    ):
        assert_close(mine, theirs)


def test_small_maps_take_the_matrix_product(monkeypatch):
    def refuse(*_):
        raise AssertionError("a convolution was called")

    monkeypatch.setattr(convolution.F, "conv2d", refuse)
    monkeypatch.setattr(convolution.F, "conv_transpose2d", refuse)
    monkeypatch.setattr(convolution, "conv2d_weight", refuse)
    below, kernel = torch.randn(2, 3, 4, 4), torch.randn(25, 3, 4, 4)
    above = convolve(below, kernel, None, 2, 1)
    adjoint(above, kernel, (4, 4), 2, 1)
    kernel_gradient(below, above, kernel, 2, 1)
    with pytest.raises(AssertionError):  # a large map
        convolve(torch.randn(2, 3, 8, 8), kernel, None, 2, 1)
    with pytest.raises(AssertionError):  # a small kernel
        convolve(torch.randn(9, 3, 4, 4), kernel, None, 2, 1)
