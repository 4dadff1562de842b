"""What couples the layers: λ or small kernels, spectral norms, and the bound below which there is one equilibrium."""

import math
from itertools import islice, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.func import hessian
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from conftest import make_batch, make_net
from timm_ep import EpVgg
from timm_ep.core.coupling import coupling_norms
from timm_ep.core.energy import energy
from timm_ep.core.free_phase import phase_at
from timm_ep.core.nudged_phase import nudged_phase
from timm_ep.data.datasets import open_data
from timm_ep.studies.gradcheck import gradient_check

SETTLED = {"free_sweeps": 60, "nudged_sweeps": 30}


def plain_equilibrium(x, kernels, biases, pooled, ranges, steps=300):
    """λ = 1 written plainly, all at once: t_l ← clip(P(V_l ⋆ t_(l−1)) + c_l + V_(l+1)ᵀ ⋆ Pᵀ t_(l+1), 0, range_l)."""

    def drive(layer, below):
        out = F.conv2d(below, kernels[layer], padding=1)
        return F.avg_pool2d(out, 2) if pooled[layer] else out

    states, below = [], x
    for layer in range(len(kernels)):
        below = torch.zeros_like(drive(layer, below))
        states.append(below)
    for _ in range(steps):
        new = []
        for layer in range(len(states)):
            u = drive(layer, states[layer - 1] if layer else x) + biases[layer].view(1, -1, 1, 1)
            if layer + 1 < len(states):
                pull = F.interpolate(states[layer + 1], scale_factor=2) / 4 if pooled[layer + 1] else states[layer + 1]
                u = u + F.conv_transpose2d(pull, kernels[layer + 1], padding=1)
            new.append(u.clamp(0, ranges[layer]))
        states = new
    return states


@pytest.mark.parametrize("depth", [4, 9])
def test_a_net_with_feedback_is_the_classic_net_with_smaller_kernels(depth):
    """t_l = λ^((l−N)/2) s_l is the equilibrium of λ = 1 with kernels √λ W, all else scaled alike; gradients agree."""
    feedback = 0.09
    model, (x, y) = make_net(depth, 0.6, feedback=feedback, **SETTLED), make_batch(32 if depth == 9 else 16)
    net = model.net()
    weights = [layer()[0].detach().requires_grad_() for layer in model.layers]
    scales = [feedback ** ((layer - depth) / 2) for layer in range(depth + 1)]
    states = plain_equilibrium(
        scales[0] * x,
        [feedback**0.5 * weight for weight in weights],
        [scale * bias.detach() for scale, bias in zip(scales[1:], net.biases, strict=True)],
        model.pooled,
        ranges=scales[1:],
    )
    for ours, theirs, scale in zip(model.equilibrium(x), states, scales[1:], strict=True):
        assert theirs.max() > 0
        assert_close(scale * ours, theirs, atol=1e-10, rtol=1e-8)
    exact = torch.autograd.grad(F.cross_entropy(model.forward_head(states[-1]), y), weights)
    loss = F.cross_entropy(model(x), y)
    kernels = [layer.weight for layer in model.layers]
    for ours, of_kernel, layer in zip(torch.autograd.grad(loss, kernels), exact, model.layers, strict=True):
        (theirs,) = torch.autograd.grad(layer()[0], layer.weight, of_kernel)
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.9999
        assert ours.norm() == pytest.approx(theirs.norm().item(), rel=1e-3)


@pytest.mark.parametrize(("pool", "padding"), [("avg", 1), ("max", 1), ("avg", [1, 0, 2, 1])])
def test_the_norm_is_the_largest_singular_value_of_the_coupling(pool, padding):
    """Stride, padding and average pooling included; under max pooling that of the convolution alone."""
    torch.manual_seed(0)
    model = EpVgg((3, "M", 4, 4, "M", 5), num_classes=2, feedback=0.25, pool=pool, padding=padding, dtype=torch.float64)
    net, size = model.net(), (10, 8)
    found = coupling_norms(net, size, 0.25, iterations=3000)
    for layer, coupling in enumerate(net.couplings):
        shape = (net.kernels[layer].shape[1], *size)
        basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
        above = coupling.convolve(basis, net.kernels[layer])
        assert found[layer] == pytest.approx(0.5 * torch.linalg.matrix_norm(above.flatten(1), 2).item(), rel=1e-3)
        size = tuple(side // 2 if coupling.max_pool else side for side in above.shape[-2:])


def small_net(limit: float) -> EpVgg:
    torch.manual_seed(0)
    model = EpVgg((3, 4, "M", 4, 5), num_classes=2, feedback=1.0, init_gain=0.5, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.layers:
            layer.bias.uniform_(-0.2, 0.6)
    model.cap_couplings(limit, (4, 4))
    return model


def test_couplings_are_capped():
    """Those above the limit come down to it, the others and the first stay."""
    before = small_net(math.inf).couplings((4, 4))
    limit = sorted(before[1:])[0] * 1.05
    model = small_net(limit)
    after = model.couplings((4, 4))
    assert max(after[1:]) == pytest.approx(limit, rel=1e-6)
    assert after == pytest.approx([before[0], *(min(limit, one) for one in before[1:])], rel=1e-6)


def test_below_a_half_the_energy_is_strictly_convex_and_the_equilibrium_is_one():
    """The Hessian's least eigenvalue is at least 1 − max (c_l + c_(l+1)); any step contracts by that max or more."""
    model = small_net(0.49)
    net, x = model.net(), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    couplings = coupling_norms(net, (4, 4), 1.0, iterations=500)[1:]
    factor = max(a + b for a, b in zip([*couplings, 0], [0, *couplings], strict=True))
    assert 0.8 < factor < 1
    shapes = [state.shape for state in model.equilibrium(x)]
    sizes = [shape.numel() for shape in shapes]

    def states_of(vector):
        return tuple(part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True))

    curvature = hessian(lambda vector: energy(net, x, states_of(vector), 1.0).sum())(torch.rand(sum(sizes)).double())
    least = torch.linalg.eigvalsh(curvature)[0].item()
    assert 1 - factor <= least < 1 - 0.5 * factor  # and the bound is no idle one

    def step(vector):
        return torch.cat([u.clamp(0, 1).flatten() for u in phase_at(net, x, states_of(vector), 1.0).preactivations])

    with torch.no_grad():
        starts = [torch.rand(sum(sizes)).double() for _ in range(4)]
        for one, other in pairwise(starts):
            assert (step(one) - step(other)).norm() <= factor * (one - other).norm()
        for _ in range(400):
            starts = [step(vector) for vector in starts]
        model.free_sweeps = 200
        rest = torch.cat([state.flatten() for state in model.equilibrium(x)])
        assert rest.max() > 0.1
        for vector in starts:
            assert_close(vector, rest, atol=1e-10, rtol=0)


@pytest.mark.parametrize("depth", [4, 9, 13])
def test_the_strong_preset_follows_bptt_at_its_init(depth):
    """λ = 1 at the literature's coupling, in float32: a cosine of 0.99 in every layer, by the sweeps it asks for."""
    torch.manual_seed(0)
    widths = {4: (32, "M", 32, "M", 64, "M", 64, "M"), 9: (16, 16, "M", 16, 16, "M", 32, 32, "M", 32, 32, 32)}
    widths[13] = (16, 16, "M", 16, 16, "M", 32, 32, 32, "M", 32, 32, 32, "M", 32, 32, 32)
    model = EpVgg(widths[depth], num_classes=10, preset="strong")
    assert (model.feedback, model.start, model.update) == (1.0, "feedforward", "sweep")
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    checks = gradient_check(model, x, y)
    assert min(check.cosine for check in checks) >= 0.99
    assert all(0.95 < check.norm_ratio < 1.05 for check in checks)
    assert len(model.free_residual(x)) <= 14


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_the_strong_preset_follows_bptt_while_it_learns(pool):
    """The same after 20, 40 and 60 updates on the digits, while accuracy rises and couplings move."""
    torch.manual_seed(0)
    model = EpVgg((16, 16, "M", 32, 32, "M", 32, 32, "M", 32, 32), 10, in_chans=1, preset="strong", pool=pool)
    before = model.couplings((16, 16))
    data = open_data("digits")
    data.train.transform = v2.Compose([v2.Resize(16), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    batches = iter(DataLoader(data.train, 16, shuffle=True, drop_last=True))
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for update, (images, labels) in enumerate(islice(batches, 60), 1):
        logits = model(images)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        if update % 20 == 0:
            assert min(check.cosine for check in gradient_check(model, images, labels)) >= 0.99
    assert (logits.argmax(1) == labels).float().mean() > 0.5
    assert max(abs(one - other) for one, other in zip(before, model.couplings((16, 16)), strict=True)) > 0.05


def test_units_change_the_parameters_and_not_the_net():
    """A net whose biases and read-out are in units of the states is the net in which they are multiplied out."""
    torch.manual_seed(0)
    settings = {"num_classes": 5, "preset": "strong", "dtype": torch.float64}
    model, (x, _) = EpVgg((4, "M", 6, 6, "M"), **settings), make_batch()
    assert model.unit == pytest.approx(0.5 * 3**-0.5 / 1.8)
    plain = EpVgg((4, "M", 6, 6, "M"), unit=1.0, **settings)
    with torch.no_grad():
        for index, (layer, other) in enumerate(zip(model.layers, plain.layers, strict=True), 1):
            layer.bias.uniform_(-0.2, 0.5)
            other.load_state_dict(layer.state_dict())
            other.bias.mul_(model.unit**index)
        plain.head.load_state_dict(model.head.state_dict())
        plain.head.fc.weight.div_(model.unit**3)
    for ours, theirs in zip(model.equilibrium(x), plain.equilibrium(x), strict=True):
        assert_close(ours, theirs)
    assert_close(model(x), plain(x))


def test_the_nudged_phase_ends_once_it_rests():
    """With `tol` it takes as many sweeps as the net asks for, and ends where all of them would."""
    settings = {"feedback": 0.3, "free_sweeps": 60, "nudged_sweeps": 40}
    model, (x, _) = make_net(4, 0.5, **settings), make_batch()
    net = model.net()
    with torch.no_grad():
        free = phase_at(net, x, model.equilibrium(x), 0.3)
        forces = [None, None, None, torch.randn_like(free.states[-1])]
        ends, counts = [], []
        for tol in (0.0, 1e-3, 0.1):
            seen = []
            model.tol = tol
            ends.append(nudged_phase(net, free, forces, model.settings, 1e-6, watch=seen.append))
            counts.append(len(seen))
    assert counts[0] == 40
    assert counts[0] > counts[1] > counts[2] >= 2
    for rest, early in zip(ends[0].deltas, ends[1].deltas, strict=True):
        assert (early - rest).norm() < 1e-2 * rest.norm()


def test_local_learning_passes_no_gradient_between_layers():
    """`gradient="local"`: the feedforward twin, where a loss on a state reaches its own layer's parameters alone."""
    model, (x, _) = make_net(4, gradient="local"), make_batch()
    local = model.equilibrium(x)
    model.gradient = "backprop"
    for index, (state, twin) in enumerate(zip(local, model.equilibrium(x), strict=True)):
        assert torch.equal(state, twin)
        grads = torch.autograd.grad(state.square().sum(), list(model.layers.parameters()), allow_unused=True)
        reached = {number // 3 for number, grad in enumerate(grads) if grad is not None and grad.abs().max() > 0}
        assert reached == {index}


class Exponential(torch.nn.Module):
    def forward(self, value):
        return value.exp()

    def right_inverse(self, value):
        return value.log()


def test_kernels_of_which_nothing_learns_are_not_capped_and_parametrized_ones_are():
    free, frozen, other = (small_net(math.inf) for _ in range(3))
    frozen.layers[2].requires_grad_(False)
    frozen.layers[3].gain.requires_grad_(False)  # as `learn_gain=False` has it: its weights may couple it more
    for layer in other.layers:
        layer.weight.requires_grad_(False)  # which has no size of its own
        torch.nn.utils.parametrize.register_parametrization(layer, "gain", Exponential())
    limit = min(free.couplings((4, 4))[1:]) * 0.5
    for model in (free, frozen, other):
        model.cap_couplings(limit, (4, 4))
    assert torch.equal(frozen.layers[2].gain, small_net(math.inf).layers[2].gain)
    assert torch.equal(frozen.layers[3].gain, free.layers[3].gain)
    assert other.couplings((4, 4)) == pytest.approx(free.couplings((4, 4)), rel=1e-6)
    other.requires_grad_(False)
    other.cap_couplings(limit / 2, (4, 4))
    assert other.couplings((4, 4)) == pytest.approx(free.couplings((4, 4)), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_kernels_that_hooks_compute_are_capped_by_what_they_are_computed_from():
    def net():
        return EpVgg((4, "M", 5, 6, "M"), num_classes=4, normalise_kernels=False, feedback=1.0)

    images = torch.rand(2, 3, 12, 12)
    for hook in (lambda layer: prune.random_unstructured(layer, "weight", 0.5), torch.nn.utils.weight_norm):
        model = net()
        hook(model.layers[1])
        limit = model.couplings((12, 12))[1] / 2
        model.cap_couplings(limit, (12, 12))
        assert model.couplings((12, 12))[1] == pytest.approx(limit, rel=0.02)
        F.cross_entropy(model(images), torch.tensor([0, 1])).backward()
    model = net()
    torch.nn.utils.spectral_norm(model.layers[1])
    with pytest.raises(NotImplementedError, match="weight is not a parameter"):
        model.cap_couplings(0.01, (12, 12))


def test_an_output_that_settles_is_capped_too():
    model = EpVgg((8, "M", 8, "M"), num_classes=4, readout="state", feedback=1.0)
    with torch.no_grad():
        model.head.fc.weight.mul_(30)
    assert model.couplings((16, 16))[-1] > 1
    model.cap_couplings(0.4, (16, 16))
    assert max(model.couplings((16, 16))[1:]) == pytest.approx(0.4, rel=1e-3)
