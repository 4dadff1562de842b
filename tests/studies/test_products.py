"""Recorded products against counts by hand, and against the functions of torch."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from conftest import make_batch
from timm_ep import EpVgg
from timm_ep.studies.measure import Quartiles
from timm_ep.studies.products import Product, multiply_adds, plain_step, recorded_products
from timm_ep.studies.throughput import Throughput


def two_layers(**settings) -> EpVgg:
    torch.manual_seed(0)
    return EpVgg((4, "M", 6), num_classes=5, **settings)


def kinds(counts: Counter[Product]) -> dict[tuple[str, int], int]:
    """How often each kind, by the layer's channels above."""
    found: Counter[tuple[str, int]] = Counter()
    for product, times in counts.items():
        found[product.kind, product.kernel[0]] += times
    return dict(found)


def test_the_products_of_a_step_are_those_counted_by_hand():
    """Two sweeps (down, up) and one nudged sweep down, in a net of two layers.

    The feedforward start computes both layers; in the sweep down, layer 2 still has its product and layer 1 gets
    feedback from above; in the sweep up, that feedback is still good, and layer 2 is computed again. The nudge enters
    at layer 2 and goes down once. The contrast of layer 2 has two terms, that of layer 1 one, as the image is clamped.
    """
    images = make_batch(dtype=torch.float32)[0]  # 3 images of 16×16
    throughput = Throughput(two_layers(free_sweeps=2, nudged_sweeps=1), images)
    free = recorded_products(throughput.steps["free float32"])
    step = recorded_products(throughput.steps["step float32"])
    assert kinds(free) == {("above", 4): 1, ("above", 6): 2, ("below", 6): 1}
    assert kinds(step - free) == {("below", 6): 1, ("kernel", 6): 2, ("kernel", 4): 1}
    # Layer 1 is pooled: 4×4 taps of 3 channels at 8×8 positions; layer 2 has 3×3 taps of 4 channels.
    first, second = 3 * (4 * 8 * 8) * (3 * 4 * 4), 3 * (6 * 8 * 8) * (4 * 3 * 3)
    assert multiply_adds(free) == first + 3 * second
    assert multiply_adds(step) == 2 * first + 6 * second
    assert {product.dtype for product in recorded_products(throughput.steps["step bfloat16"])} == {torch.bfloat16}


def test_products_under_autograd_are_recorded():
    below, kernel = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)
    counts = recorded_products(lambda: F.conv2d(below, kernel, None, 2, 1).sum().backward())
    assert kinds(counts) == {("above", 5): 1, ("below", 5): 1, ("kernel", 5): 1}
    assert multiply_adds(counts) == 3 * (2 * 5 * 4 * 4) * (3 * 3 * 3)
    above, back = torch.randn(2, 5, 4, 4, requires_grad=True), kernel.detach().requires_grad_()
    counts = recorded_products(lambda: F.conv_transpose2d(above, back, None, 2, 1, 1).sum().backward())
    assert kinds(counts) == {("below", 5): 1, ("above", 5): 1, ("kernel", 5): 1}
    assert {(p.above, p.below) for p in counts} == {((2, 5, 4, 4), (2, 3, 8, 8))}


def test_an_unknown_convolution_is_refused():
    image, kernel = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
    with pytest.raises(NotImplementedError, match="mkldnn_convolution"):
        recorded_products(lambda: torch.mkldnn_convolution(image, kernel, None, [0, 0], [1, 1], [1, 1], 1))


@pytest.mark.parametrize("size", [16, 18])  # at 18, pooled maps are odd
def test_the_plain_step_computes_the_same_products(size):
    images = make_batch(size, dtype=torch.float32)[0]
    step = Throughput(two_layers(), images).steps["step float32"]
    expected = recorded_products(step)
    assert recorded_products(plain_step(expected)) == expected


def test_a_share_is_plain_over_settling():
    throughput = Throughput(two_layers(), make_batch(dtype=torch.float32)[0])
    seconds = {name: Quartiles(0.0, 1.0 + name.startswith("plain"), 9.0) for name in throughput.steps}
    assert [share.share for share in throughput.shares(seconds)] == [2.0] * 4
