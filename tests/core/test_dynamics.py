import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import make_batch, make_net
from timm_ep.core.energy import energy
from timm_ep.core.equilibrium import with_short_products
from timm_ep.core.free_phase import free_phase
from timm_ep.core.nudged_phase import nudged_phase, nudged_states
from timm_ep.core.settings import Settings
from timm_ep.studies.reference import Reference


def settle(model, x, **kwargs):
    with torch.no_grad():
        return free_phase(model.net(), x, replace(model.settings, **kwargs)).states


@settings(deadline=None, max_examples=25)
@given(
    depth=st.sampled_from([4, 9]),
    feedback=st.floats(0.01, 2.0),
    gain=st.floats(0.1, 2.0),
    seed=st.integers(0, 1000),
    update=st.sampled_from(["sweep", "odd-even"]),
    start=st.sampled_from(["feedforward", "zero"]),
)
def test_energy_never_rises_over_a_sweep(depth, feedback, gain, seed, update, start):
    """With average pooling E is multilinear in the layers, so each layer's update is an exact minimisation."""
    model = make_net(depth, gain, seed, feedback=feedback, update=update, start=start)
    x, _ = make_batch(seed=seed)
    with torch.no_grad():
        before = None
        for sweeps in range(6):
            now = energy(model.net(), x, settle(model, x, free_sweeps=sweeps), feedback)
            if before is not None:
                assert (now <= before + 1e-9 * before.abs()).all()
            before = now


@pytest.mark.parametrize("update", ["sweep", "odd-even", "synchronous"])
@pytest.mark.parametrize("start", ["feedforward", "zero"])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_every_order_and_start_comes_to_rest_where_the_reference_does(update, start, pool):
    """A fixed point of the reference's step; under average pooling, where it is unique here, the same one."""
    model, (x, _) = make_net(4, 0.2, pool=pool, feedback=0.5), make_batch()
    reference = Reference.of(model)
    states = settle(model, x, update=update, start=start, free_sweeps=100)
    expected = reference.settle(x, steps=100) if pool == "avg" else reference.step(x, states)
    for ours, theirs in zip(states, expected, strict=True):
        assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_synchronous_steps_from_zero_are_the_reference_steps(pool):
    """Not only the fixed point: the same trajectory, at λ = 1 and at large gain."""
    model, (x, _) = make_net(4, 1.5, pool=pool, feedback=1.0), make_batch()
    reference, states = Reference.of(model), None
    for steps in range(1, 8):
        states = reference.settle(x, states, steps=1)
        ours = settle(model, x, update="synchronous", start="zero", free_sweeps=steps)
        for mine, theirs in zip(ours, states, strict=True):
            assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("states_only", [False, True])
@pytest.mark.parametrize("update", ["sweep", "odd-even", "synchronous"])
@pytest.mark.parametrize("start", ["feedforward", "zero"])
def test_reused_products_and_maps_change_nothing(start, update, states_only):
    """Sweeps that keep products, and compute in the maps of those that are spent, equal ones that compute all afresh.

    Under max pooling only the fixed point is the same: on the way, winners follow the newest drive.
    """
    model, (x, _) = make_net(9, feedback=0.5, update=update, start=start), make_batch()
    reference = Reference.of(model)
    with torch.no_grad():
        plain = list(settle(model, x, start="feedforward", free_sweeps=0))
        if start == "zero":
            plain = [torch.zeros_like(state) for state in plain]
        up_at = 0 if start == "zero" else 1  # what the feedforward pass was is the first sweep's to do
        for sweep in range(5):
            groups = {
                "synchronous": [list(range(9))],
                "odd-even": [[0, 2, 4, 6, 8], [1, 3, 5, 7]],
                "sweep": [[layer] for layer in (range(9) if sweep % 2 == up_at else reversed(range(9)))],
            }[update]
            for group in groups:
                moved = reference.step(x, plain)
                for layer in group:
                    plain[layer] = moved[layer].detach()
            phase = free_phase(model.net(), x, replace(model.settings, free_sweeps=sweep + 1), states_only=states_only)
            for ours, u, theirs in zip(phase.states, phase.preactivations, plain, strict=True):
                assert_close(ours, theirs, atol=1e-12, rtol=0)
                assert torch.equal(ours, u.clamp(0, 1))


def test_zero_feedback_is_the_feedforward_net():
    model, (x, _) = make_net(4, feedback=0.0), make_batch()
    reference, below = Reference.of(model), x
    for layer, state in enumerate(settle(model, x, free_sweeps=3)):
        below = reference.drive(layer, below).clamp(0, 1)
        assert_close(state, below)


def test_tolerance_stops_the_sweeps_and_the_trace_sees_them():
    model, (x, _) = make_net(4, 0.5, feedback=0.3), make_batch()
    seen = []
    with torch.no_grad():
        states = free_phase(
            model.net(), x, replace(model.settings, tol=1e-6, free_sweeps=500), trace=lambda c: seen.append(max(c))
        ).states
    assert seen[-1] < 1e-6 <= seen[-3]  # judged after every upward sweep
    assert len(seen) % 2 == 0
    assert len(seen) < 100
    for ours, theirs in zip(states, settle(model, x, free_sweeps=len(seen)), strict=True):
        assert torch.equal(ours, theirs)


def nudge(model, x, beta, **kwargs):
    """Free states, nudged states by the delta form, and the loss whose fixed forces act on every layer."""
    with torch.no_grad():
        settings = replace(model.settings, **kwargs)
        free = free_phase(model.net(), x, settings)
        forces = [torch.randn_like(s) for s in free.states]
        drives = [model.net().drive(i, free.states[i - 1] if i else x) for i in range(4)]
        nudged = nudged_phase(model.net(), free._replace(drives=drives), forces, settings, beta)
    states = nudged_states(free, nudged)
    return free.states, states, lambda at: sum((s * f).sum() for s, f in zip(at, forces, strict=True))


class HeldWinners(Reference):
    """The reference whose max pooling goes on reading the positions that won at some states."""

    def hold(self, x, states):
        self.held = []
        for layer, below in enumerate([x, *states[:-1]]):
            out = F.conv2d(below, self.kernels[layer], self.biases[layer], padding=1)
            self.held.append(F.max_pool2d(out, 2, return_indices=True)[1] if self.pooled[layer] else None)
        return self

    def drive(self, layer, below, kernels=None, biases=None):
        if self.held[layer] is None:
            return super().drive(layer, below, kernels, biases)
        out = F.conv2d(below, (kernels or self.kernels)[layer], (biases or self.biases)[layer], padding=1)
        return out.flatten(2).gather(2, self.held[layer].flatten(2)).view(self.held[layer].shape)


def reference_of(model, x, free, pool, forces):
    return HeldWinners.of(model).hold(x, free) if pool == "max" and forces == "frozen" else Reference.of(model)


POOLING = [("avg", "frozen"), ("max", "frozen"), ("max", "live")]


@pytest.mark.parametrize("beta", [0.3, -0.3, 1e-3])
@pytest.mark.parametrize(("pool", "forces"), POOLING)
def test_delta_form_takes_the_reference_steps(beta, pool, forces):
    """The reference nudges the states themselves; the delta form's synchronous steps are the same at any strength."""
    model, (x, _) = make_net(4, 0.2, pool=pool, feedback=0.5, forces=forces), make_batch()
    for steps in (1, 2, 3, 7):
        torch.manual_seed(steps)
        free, nudged, loss = nudge(model, x, beta, update="synchronous", free_sweeps=200, nudged_sweeps=steps)
        expected = reference_of(model, x, free, pool, forces).settle(x, free, steps, beta, loss)
        for ours, theirs in zip(nudged, expected, strict=True):
            assert_close(ours, theirs, atol=1e-13, rtol=0)


@pytest.mark.parametrize("beta", [0.3, -0.3, 1e-3])
@pytest.mark.parametrize("update", ["sweep", "odd-even", "synchronous"])
@pytest.mark.parametrize(("pool", "forces"), POOLING)
def test_every_order_comes_to_rest_under_the_nudge(beta, update, pool, forces):
    """A fixed point of the reference's nudged step; the same one where it is unique here: unless winners move."""
    model, (x, _) = make_net(4, 0.2, pool=pool, feedback=0.5, forces=forces), make_batch()
    free, nudged, loss = nudge(model, x, beta, update=update, free_sweeps=200, nudged_sweeps=200)
    reference = reference_of(model, x, free, pool, forces)
    steps = (free, 200) if forces == "frozen" else (nudged, 1)
    for ours, theirs in zip(nudged, reference.settle(x, *steps, beta, loss), strict=True):
        assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_no_force_gives_exactly_zero():
    model, (x, _) = make_net(4, 3.0, feedback=0.5), make_batch()
    with torch.no_grad():
        free = free_phase(model.net(), x, model.settings)
        zeros = [torch.zeros_like(s) for s in free.states]
        nudged = nudged_phase(model.net(), free, zeros, model.settings, 1e-3)
        nothing = nudged_phase(model.net(), free, [None] * 4, model.settings, 1e-3)
    assert all((d == 0).all() for d in nudged.deltas)
    assert nothing.deltas == [None] * 4


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"feedback": -0.1}, ValueError, "feedback=-0.1"),
        ({"feedback": float("nan")}, ValueError, "feedback=nan"),
        ({"feedback": "weak"}, TypeError, "feedback='weak'"),
        ({"beta": 0}, ValueError, "beta=0"),
        ({"beta": float("inf")}, ValueError, "beta=inf"),
        ({"free_sweeps": -1}, ValueError, "free_sweeps=-1"),
        ({"free_sweeps": 2.5}, TypeError, "free_sweeps=2.5"),
        ({"nudged_sweeps": 0}, ValueError, "nudged_sweeps=0"),
        ({"tol": -1e-3}, ValueError, "tol=-0.001"),
        ({"nudging": "both"}, ValueError, "'one-sided', 'centered'"),
        ({"update": "random"}, ValueError, "'sweep', 'odd-even', 'synchronous'"),
        ({"start": "one"}, ValueError, "'feedforward', 'zero'"),
        ({"pool": "none"}, ValueError, "'avg', 'max'"),
        ({"products": "int8"}, ValueError, "'full', 'bfloat16', 'float16'"),
        ({"gradient": "sgd"}, ValueError, "'ep', 'bptt', 'backprop'"),
        ({"products": "bfloat16", "forces": "live"}, ValueError, "products='bfloat16' would drown live forces"),
    ],
)
def test_a_bad_setting_is_named(option, error, message):
    with pytest.raises(error, match=message):
        Settings(**option)


def test_reference_bptt_is_autograd_of_the_reference_steps():
    """`gradient="bptt"` against autograd through the reference's own synchronous steps."""
    model, (x, y) = make_net(4, 0.8, feedback=1.0, update="synchronous", start="zero", free_sweeps=6), make_batch()
    model.gradient = "bptt"
    F.cross_entropy(model(x), y).backward()
    kernels = [conv()[0].detach().requires_grad_() for conv in model.layers]
    reference = Reference.of(model)
    reference.kernels = kernels
    states = reference.zeros(x)
    for _ in range(6):
        drives = [reference.drive(i, states[i - 1] if i else x) for i in range(4)]
        backs = []
        for i in range(3):
            at = states[i].detach().requires_grad_()
            product = (reference.drive(i + 1, at) * states[i + 1]).sum()
            backs.append(torch.autograd.grad(product, at, create_graph=True)[0])
        states = [(d + (backs[i] if i < 3 else 0)).clamp(0, 1) for i, d in enumerate(drives)]
    F.cross_entropy(model.forward_head(states[-1]), y).backward()
    for conv, kernel in zip(model.layers, kernels, strict=True):
        expected = torch.autograd.grad((conv()[0] * kernel.grad).sum(), conv.weight)[0]
        assert_close(conv.weight.grad, expected)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_short_products_keep_the_states_and_the_gradient(pool):
    """All products but the feedforward pass in bfloat16: far closer to float64 than all in bfloat16.

    Under max pooling rounding also changes a winner here and there, and with it a part of the gradient.
    """
    model, (x, y) = make_net(9, feedback=0.05, pool=pool, free_sweeps=8), make_batch()
    exact = settle(model, x)
    net = with_short_products(model.net(), replace(model.settings, products="bfloat16"))
    with torch.no_grad():
        mixed = free_phase(net, x, model.settings).states
        low, low_x = copy.deepcopy(model).bfloat16(), x.bfloat16()
        rounded = free_phase(low.net(), low_x, model.settings).states
    for ours, short, theirs in zip(mixed, rounded, exact, strict=True):
        assert ours.dtype == torch.float64
        assert (ours - theirs).norm() < 0.2 * (short - theirs).norm()
        assert not torch.equal(ours, theirs)

    def gradient(**settings):
        twin = copy.deepcopy(model)
        twin.settings = replace(model.settings, **settings)
        return torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))

    for ours, theirs in zip(gradient(products="bfloat16"), gradient(), strict=True):
        assert ours.dtype == torch.float64
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > {"avg": 0.999, "max": 0.9}[pool]


def test_changes_are_on_the_device_of_the_states():
    """Also those of layers that a nudge from below has not reached, as one number is taken of all."""
    model, x = make_net(4, feedback=0.5, update="odd-even").to("meta"), make_batch()[0].to("meta")
    seen = []
    with torch.no_grad():
        net = model.net()
        free = free_phase(net, x, model.settings)
        forces = [torch.ones_like(free.states[0]), None, None, None]
        nudged_phase(net, free, forces, model.settings, 0.1, trace=seen.append)
    assert {change.device.type for changes in seen for change in changes} == {"meta"}
