import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from conftest import make_batch, make_net
from timm_ep.core.energy import Coupling, Net, energy, fold_average_pool, max_pool
from timm_ep.studies.reference import Reference

F64 = {"dtype": torch.float64}
COUPLINGS = {
    "none": Coupling(),
    "stride": Coupling(stride=2),
    "avg": Coupling(stride=2),
    "max": Coupling(max_pool=True),
    "unpadded": Coupling(padding=0),
}


def one_layer(kind: str) -> Net:
    kernel = torch.randn(5, 3, 3, 3, **F64)
    return Net((COUPLINGS[kind],), (fold_average_pool(kernel) if kind == "avg" else kernel,), (torch.randn(5, **F64),))


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (7, 11), (2, 3)])
def test_folded_kernel_is_convolution_then_average_pooling(size):
    x, kernel = torch.randn(2, 3, *size, **F64), torch.randn(5, 3, 3, 3, **F64)
    folded = F.conv2d(x, fold_average_pool(kernel), stride=2, padding=1)
    assert_close(folded, F.avg_pool2d(F.conv2d(x, kernel, padding=1), 2))


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (7, 11)])
@pytest.mark.parametrize("kind", COUPLINGS)
def test_feedback_is_the_adjoint_of_drive(kind, size):
    """⟨P(W ⋆ s), t⟩ = ⟨s, Wᵀ ⋆ Pᵀ t⟩ for any s and t, and the same s for every odd size."""
    net, below = one_layer(kind), torch.randn(2, 3, *size, **F64)
    drive = net.drive(0, below)
    above = torch.randn_like(drive.value)
    back = net.feedback(0, drive.route(above), below)
    assert back.shape == below.shape
    without_bias = drive.value - net.biases[0][:, None, None]
    assert_close((without_bias * above).sum(), (below * back).sum())


@pytest.mark.parametrize("kind", COUPLINGS)
def test_kernel_contrast_is_the_derivative_of_the_coupling(kind):
    net, below = one_layer(kind), torch.randn(2, 3, 9, 8, **F64)
    drive = net.drive(0, below)
    above = torch.randn_like(drive.value)
    kernel = net.kernels[0].clone().requires_grad_()
    (net._replace(kernels=(kernel,)).drive(0, below).value * above).sum().backward()
    assert_close(net.kernel_contrast(0, below, drive.route(above)), kernel.grad)


def test_values_at_winners_are_the_pooled_values():
    unpooled = torch.randn(2, 3, 7, 6)
    drive = max_pool(unpooled)
    assert_close(drive.at_winners(unpooled), F.max_pool2d(unpooled, 2))


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("depth", [4, 9])
def test_energy_is_minus_the_reference_phi(depth, pool, feedback):
    model, (x, _) = make_net(depth, pool=pool, feedback=feedback), make_batch()
    states = [torch.rand_like(s) for s in model.equilibrium(x)]
    assert_close(energy(model.net(), x, states, feedback), -Reference.of(model).phi(x, states))
