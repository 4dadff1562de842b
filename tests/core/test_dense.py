"""Small maps: the matrix of a convolution against torch's, its autograd, and the net of convolutions it stands for."""

from contextlib import nullcontext
from threading import Barrier, Thread

import pytest
import timm
import torch
from torch.testing import assert_close

from conftest import make_batch, make_convolution, make_net
from timm_ep.core import dense
from timm_ep.core.convolution import convolutions_only, matrices_allowed
from timm_ep.core.energy import Coupling
from timm_ep.core.equilibrium import prepared

GEOMETRIES = [
    ((2, 2), 3, 1, 1),
    ((2, 2), 4, 2, 1),
    ((1, 1), 3, 1, 1),
    ((1, 4), 3, 1, 1),
    ((3, 1), 3, 2, 1),
    ((2, 2), 2, 1, 0),
]


@pytest.mark.parametrize(("size", "taps", "stride", "padding"), GEOMETRIES)
def test_products_with_the_matrix_are_those_of_the_convolution(size, taps, stride, padding):
    below, kernel, bias, expected, above, of_below, of_kernel = make_convolution(size, taps, stride, padding)

    matrix, upper = dense.matrix_of(kernel, size, stride, padding)
    assert upper == expected.shape[-2:]
    coupling = Coupling(stride, padding, dense=upper)
    assert_close(coupling.convolve(below, matrix, bias), expected)
    assert_close(coupling.adjoint(above, matrix, size), of_below)
    of_matrix = coupling.kernel_gradient(below, above, matrix)
    assert of_matrix.shape == matrix.shape
    (through_matrix,) = torch.autograd.grad(matrix, kernel, of_matrix)
    assert_close(through_matrix, of_kernel)


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("size", [16, 18, (17, 16)])
def test_the_net_written_out_settles_and_learns_as_its_convolutions(pool, size):
    """Four poolings: the last coupling meets maps of 2×2, the ones before larger maps."""
    size = (size, size) if isinstance(size, int) else size
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    model = make_net(4, pool=pool, feedback=0.3, free_sweeps=4, nudged_sweeps=3)
    for gradient in ("ep", "bptt", "backprop"):
        model.gradient, results = gradient, []
        for as_convolutions in (False, True):
            model.zero_grad()
            with convolutions_only() if as_convolutions else nullcontext():
                net, _ = prepared(model.net(size), x)
                assert [kernel.dim() == 2 for kernel in net.kernels] == [False] * 3 + [not as_convolutions]
                model(x).square().sum().backward()
            results.append([parameter.grad.clone() for parameter in model.parameters()])
        for mine, theirs in zip(*results, strict=True):
            assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_large_maps_are_left_as_they_are():
    model = timm.create_model("ep_vgg16_025", num_classes=5)
    x = make_batch(32, dtype=torch.float32)[0]
    net, _ = prepared(model.net((32, 32)), x)
    assert [kernel.dim() for kernel in net.kernels] == [4] * 10 + [2] * 3
    again, _ = prepared(net, x)
    assert all(mine is theirs for mine, theirs in zip(net.kernels, again.kernels, strict=True))
    larger, _ = prepared(model.net((64, 64)), make_batch(64, dtype=torch.float32)[0])
    assert all(kernel.dim() == 4 for kernel in larger.kernels)


def test_what_one_thread_asks_for_is_not_for_the_others():
    """Two of them inside at once, the first of which leaves first, as threads that answer requests do."""
    inside, others, allowed = Barrier(2), Barrier(2), []

    def first():
        with convolutions_only():
            inside.wait()
        others.wait()
        allowed.append(matrices_allowed())

    def second():
        allowed.append(matrices_allowed())
        inside.wait()
        with convolutions_only():
            others.wait()
        allowed.append(matrices_allowed())

    threads = [Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert allowed == [True] * 3
    assert matrices_allowed()
