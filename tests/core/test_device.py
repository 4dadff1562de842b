"""EP on a device, against the equations of `timm_ep.core.device` written plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from conftest import make_batch, make_net
from timm_ep import EpVgg, Settings
from timm_ep.core import equilibrium as of_equilibrium
from timm_ep.core.device import rounded

SYNCHRONOUS = {"update": "synchronous", "free_sweeps": 25, "nudged_sweeps": 15, "feedback": 0.3}
DISTURBANCES = {
    "few bits": {"state_bits": 10, "weight_bits": 5, "beta": 2.0},
    "mismatched feedback": {"feedback_mismatch": 0.2},
    "from zero": {"start": "zero", "state_bits": 10, "beta": 2.0},
    "neurons that differ": {
        "noise": "frozen",
        "state_noise": 0.02,
        "relative_state_noise": 0.1,
        "drive_noise": 0.05,
        "relative_drive_noise": 0.2,
    },
}


def fixed(shape, place):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(place), dtype=torch.float64)


def quantised(values, bits, low, high):
    return ((values - low) / (high - low) * (2**bits - 1)).round() / (2**bits - 1) * (high - low) + low


def read_out(model, states, y):
    return F.cross_entropy(model.forward_head(states[-1]), y)


def with_signals(model, states, y):
    """Every layer has a loss of its own, those of lower layers so large that their push is the largest."""
    local = [7**-layer * (state - 0.3).square().mean() for layer, state in enumerate(states)]
    return read_out(model, states, y) + sum(local)


def plain_gradient(model, x, y, loss):
    """dL/dW of every kernel in use by both phases of the device, all layers at once, from the feedforward states."""
    s, pooled = model.settings, model.pooled
    weights = [layer()[0].detach() for layer in model.layers]
    biases = [layer()[1].detach().view(1, -1, 1, 1) for layer in model.layers]
    depth = len(weights)

    def fold(kernel):  # average pooling in the kernel, as what is written to the device is the kernel in use
        return sum(F.pad(kernel, (a, 1 - a, b, 1 - b)) for a in (0, 1) for b in (0, 1)) / 4

    used = [fold(weight) if pool else weight for weight, pool in zip(weights, pooled, strict=True)]
    if s.weight_bits:
        used = [quantised(kernel, s.weight_bits, -kernel.abs().max(), kernel.abs().max()) for kernel in used]
    back = [
        kernel * (1 + s.feedback_mismatch * fixed(kernel.shape, 1_000_000 + place)) for place, kernel in enumerate(used)
    ]

    def drive(layer, below, kernel):
        return F.conv2d(below, kernel, stride=2 if pooled[layer] else 1, padding=1)

    def show(u, layer):
        u = u + (s.drive_noise + s.relative_drive_noise * u.abs()) * fixed((1, *u.shape[1:]), 2 * layer)
        state = u.clamp(0, 1)
        spread = s.state_noise + s.relative_state_noise * state
        state = (state + spread * fixed((1, *u.shape[1:]), 2 * layer + 1)).clamp(0, 1)
        return quantised(state, s.state_bits, 0, 1) if s.state_bits else state

    def settle(states, steps, forces):
        for _ in range(steps):
            new = []
            for layer, state in enumerate(states):
                u = drive(layer, states[layer - 1] if layer else x, used[layer]) + biases[layer]
                if layer + 1 < depth:
                    inner = state.detach().requires_grad_()
                    product = (drive(layer + 1, inner, back[layer + 1]) * states[layer + 1]).sum()
                    u = u + s.feedback * torch.autograd.grad(product, inner)[0]
                new.append(show(u - forces[layer], layer))
            states = new
        return states

    states, below = [], x
    for layer in range(depth):
        below = (drive(layer, below, used[layer]) + biases[layer]).clamp(0, 1)
        states.append(below)
    if s.start == "zero":
        states = [torch.zeros_like(state) for state in states]
    free = settle(states, s.free_sweeps, [0.0] * depth)
    leaves = [state.clone().requires_grad_() for state in free]
    forces = torch.autograd.grad(loss(model, leaves, y), leaves, materialize_grads=True)
    pushes = [s.feedback ** (depth - layer) * force for layer, force in enumerate(forces, 1)]
    largest = torch.stack([push.abs().amax((1, 2, 3), keepdim=True) for push in pushes]).amax(0)
    nudged = settle(free, s.nudged_sweeps, [s.beta * push / largest for push in pushes])
    gradients = []
    for layer, kernel in enumerate(used):
        total = 0.0
        for sample in range(len(x)):
            leaf = kernel.clone().requires_grad_()
            values = []
            for phase in (free, nudged):
                below = phase[layer - 1] if layer else x
                product = drive(layer, below[sample : sample + 1], leaf) * phase[layer][sample : sample + 1]
                values.append(s.feedback ** (layer + 1 - depth) * product.sum())
            # E has the products with a minus.
            total = total + torch.autograd.grad((values[0] - values[1]) / s.beta, leaf)[0] * largest[sample]
        gradients.append(total)
    return free, gradients


@pytest.mark.parametrize("loss", [read_out, with_signals])
@pytest.mark.parametrize("name", DISTURBANCES)
def test_both_phases_are_those_of_the_equations(name, loss):
    model, (x, y) = make_net(4, 0.5, **{"beta": 0.2, **SYNCHRONOUS, **DISTURBANCES[name]}), make_batch()
    free, gradients = plain_gradient(model, x, y, loss)
    for ours, theirs in zip(model.equilibrium(x), free, strict=True):
        assert_close(ours, theirs, atol=1e-10, rtol=0)
    net = model.net()
    kernels = [kernel.detach().requires_grad_() for kernel in net.kernels]
    model.net = lambda size: net._replace(kernels=tuple(kernels))
    for ours, theirs in zip(torch.autograd.grad(loss(model, model.equilibrium(x), y), kernels), gradients, strict=True):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_hardly_disturbed_it_is_ideal_ep(pool):
    """With next to no mismatch and a small nudge, both ways, the gradient is the exact one."""
    settled = {"free_sweeps": 80, "nudged_sweeps": 60, "feedback": 0.3, "pool": pool}
    model, (x, y) = make_net(4, 0.5, beta=1e-4, nudging="centered", feedback_mismatch=1e-12, **settled), make_batch()
    kernels = [layer.weight for layer in model.layers]
    ours = torch.autograd.grad(F.cross_entropy(model(x), y), kernels)
    model.settings = Settings(gradient="bptt", **settled)
    for gradient, exact in zip(ours, torch.autograd.grad(F.cross_entropy(model(x), y), kernels), strict=True):
        assert F.cosine_similarity(gradient.flatten(), exact.flatten(), 0) > 0.999


def test_fresh_noise_is_independent_and_as_large_as_asked_for():
    model, (x, _) = make_net(4, 0.3, state_noise=0.01, free_sweeps=6), make_batch()
    with torch.no_grad():
        one, other = model.equilibrium(x), model.equilibrium(x)
        inside = (one[0] > 0.1) & (one[0] < 0.9)
        assert inside.sum() > 100
        assert (one[0] - other[0])[inside].std().item() == pytest.approx(0.01 * 2**0.5, rel=0.2)
        model.noise = "frozen"
        assert torch.equal(model.equilibrium(x)[0], model.equilibrium(x)[0])


def test_stochastic_rounding_of_states_is_drawn_anew_and_right_on_average():
    once = {"update": "synchronous", "free_sweeps": 1}
    model, (x, _) = make_net(4, 0.3, state_bits=4, rounding="stochastic", **once), make_batch()
    with torch.no_grad():
        drawn = [model.equilibrium(x)[0] for _ in range(200)]
        model.state_bits = 0
        exact = model.equilibrium(x)[0]
    assert len(drawn[0].unique()) <= 16
    assert not torch.equal(drawn[0], drawn[1])
    assert (torch.stack(drawn).mean(0) - exact).abs().max() < 0.2 / 15 + 3 / 15 / 200**0.5


def test_rounding():
    """2^bits levels, the nearest one; stochastic rounding is right on average."""
    values = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    nearest = rounded(values, 3, False, -1.0, 1.0)
    assert len(nearest.unique()) == 8
    assert (nearest - values).abs().max() <= 1 / 7 + 1e-12
    mean = torch.stack([rounded(values, 3, True, -1.0, 1.0) for _ in range(400)]).mean(0)
    assert (mean - values).abs().max() < 0.06
    assert_close(rounded(nearest, 3, True, -1.0, 1.0), nearest)


def test_it_takes_nothing_where_nothing_is_asked_for(monkeypatch):
    def never(*args):
        raise AssertionError("the device ran")

    monkeypatch.setattr(of_equilibrium, "device_free_phase", never)
    monkeypatch.setattr(of_equilibrium, "device_nudged_phase", never)
    model, (x, y) = make_net(4), make_batch()
    F.cross_entropy(model(x), y).backward()
    model.state_bits = 4
    with pytest.raises(AssertionError, match="the device ran"):
        model(x)


@pytest.mark.parametrize("other", [{"forces": "live"}, {"products": "bfloat16"}, {"tol": 0.01}])
def test_what_a_device_cannot_do_is_refused(other):
    with pytest.raises(ValueError, match="settles for a fixed time under frozen forces"):
        EpVgg((4, "M"), state_bits=4, **other)


def test_noise_is_not_negative_and_there_is_feedback_to_disturb():
    with pytest.raises(ValueError, match="is too small; it must be at least 0"):
        Settings(state_noise=-0.1)
    model = EpVgg((4, "M", 6), num_classes=3, state_noise=0.1, feedback=0, beta=0.1)
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"feedback=0 sends nothing down.*gradient='backprop'"):
        model(x)
    with torch.no_grad():
        assert model(x).shape == (2, 3)
    model.gradient = "backprop"
    model(x).sum().backward()


def test_weights_are_written_once_for_both_phases():
    """Rounded to one of two steps at random: written again in the nudged phase they would be another device, and what
    is the same in both phases would be no difference of ±β any more."""
    model, (x, y) = make_net(4, 0.5, feedback=0.3, weight_bits=6, nudging="centered", beta=0.2), make_batch()
    model.rounding = "stochastic"
    gradients = []
    for loss in (read_out, lambda *args: 0 * read_out(*args)):
        model.zero_grad()
        torch.manual_seed(3)
        loss(model, model.equilibrium(x), y).backward()
        gradients.append([layer.weight.grad for layer in model.layers])
    ideal = make_net(4, 0.5, feedback=0.3)
    read_out(ideal, ideal.equilibrium(x), y).backward()
    for ours, none, layer in zip(*gradients, ideal.layers, strict=True):
        assert F.cosine_similarity(ours.flatten(), layer.weight.grad.flatten(), 0) > 0.8
        assert none.abs().max() < 1e-12


def test_a_kernel_of_zeros_can_be_written():
    model, (x, _) = make_net(4, 0.0, weight_bits=4), make_batch()
    assert all(state.isfinite().all() for state in model.equilibrium(x))


def test_what_was_made_once_does_not_depend_on_the_default_device():
    model, (x, _) = make_net(4, 0.5, feedback_mismatch=0.2), make_batch()
    expected = [state.detach() for state in model.equilibrium(x)], model.couplings((16, 16))
    with torch.device("meta"):
        found = [state.detach() for state in model.equilibrium(x)], model.couplings((16, 16))
    assert_close(found, expected)
