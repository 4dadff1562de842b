"""EP's gradient against autograd through the settling, finite differences and the plain reference."""

import copy
import re
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.testing import assert_close

from conftest import make_batch, make_net
from timm_ep import EpVgg
from timm_ep.studies.reference import Reference


def gradients(model, x, y, gradient="ep", scale=1.0, **settings):
    """dL/dx and the gradient of every parameter, for a loss with an error signal on every second state too."""
    model = copy.deepcopy(model)
    for name, value in {"gradient": gradient, **settings}.items():
        setattr(model, name, value)
    x = x.detach().clone().requires_grad_()
    states = model.equilibrium(x)
    loss = F.cross_entropy(model.forward_head(states[-1]), y) + sum(s.square().mean() for s in states[::2])
    (loss * scale).backward()
    return {"x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}


def cosines(ours, exact):
    return {
        name: F.cosine_similarity(ours[name].flatten().double(), grad.flatten().double(), 0).item()
        for name, grad in exact.items()
    }


@pytest.mark.parametrize("depth", [4, 9])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize(("piece", "feedback"), [(2**17, 1.0), (2**17, 0.5), (2**17, 0.1), (16, 0.5)])
def test_one_sided_gradient_is_exact(piece, pool, feedback, depth, monkeypatch):
    """Cosine ≥ 0.9999 and norm within 1 % of autograd through the converged settling, for every parameter and x;
    whether maps are summed as a whole, as small ones are, or piece by piece."""
    monkeypatch.setattr("timm_ep.core.nudged_phase._PIECE", piece)
    model, (x, y) = make_net(depth, 0.2, pool=pool, feedback=feedback, beta=1e-6), make_batch()
    model.free_sweeps = model.nudged_sweeps = 200
    assert model.free_residual(x)[-1] < 1e-10
    ours, exact = gradients(model, x, y), gradients(model, x, y, "bptt")
    for name, cosine in cosines(ours, exact).items():
        assert cosine >= 0.9999, name
        assert abs(ours[name].norm() / exact[name].norm() - 1) < 0.01, name


def test_a_tie_for_the_maximum_does_not_blow_up_the_gradient():
    """Pixels that differ by 1e-9 compete for the maximum, so that any nudge would change the winner.

    What jumps with it, divided by β, would be a gradient of order 1/β: at β = 1e-6 the 500 times larger update by which
    a net at the literature's couplings was lost.
    """
    settings = {"pool": "max", "feedback": 0.5, "free_sweeps": 0, "nudged_sweeps": 4}
    model = EpVgg((4, 4, "M", 6), num_classes=5, normalise_kernels=False, **settings).double()
    blocks = torch.randn(2, 3, 4, 4, dtype=torch.float64).repeat_interleave(2, 2).repeat_interleave(2, 3)
    x, y = blocks + 1e-9 * torch.randn_like(blocks), torch.tensor([0, 1])
    with torch.no_grad():
        for conv in model.layers[:2]:  # pixel by pixel, or the borders would tell the pixels of a block apart
            conv.weight.mul_(torch.eye(3)[1].outer(torch.eye(3)[1]))
            conv.bias.fill_(0.3)
    ours, smaller = (gradients(model, x, y, beta=beta) for beta in (1e-6, 1e-8))
    for name, gradient in ours.items():
        assert_close(gradient, smaller[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("depth", [4, 9])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_centered_gradient_at_large_beta(pool, depth):
    """Off the bounds, β = 0.1 leaves a bias of order β² only, smaller than the one-sided estimate's."""
    model, (x, y) = make_net(depth, 0.15, pool=pool, feedback=0.5, beta=0.1, nudged_sweeps=100), make_batch()
    model.free_sweeps = 150
    for conv in model.layers:
        conv.bias.data.add_(0.4)
    exact = gradients(model, x, y, "bptt")
    centered = cosines(gradients(model, x, y, nudging="centered"), exact)
    one_sided = cosines(gradients(model, x, y, nudging="one-sided"), exact)
    assert min(centered.values()) >= 0.99
    assert min(centered.values()) > min(one_sided.values())


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_gradient_is_that_of_finite_differences(pool):
    model, (x, y) = make_net(4, 0.3, pool=pool, feedback=0.7, beta=1e-6), make_batch(batch=2)
    model.free_sweeps, model.nudged_sweeps = 100, 100
    ours = gradients(model, x, y)

    def loss(model, x):
        with torch.no_grad():
            states = model.equilibrium(x)
            return F.cross_entropy(model.forward_head(states[-1]), y) + sum(s.square().mean() for s in states[::2])

    step = 1e-5
    for name, grad in ours.items():
        direction = torch.randn_like(grad)
        values = []
        for sign in (1, -1):
            moved, at = copy.deepcopy(model), x
            if name == "x":
                at = x + sign * step * direction
            else:
                with torch.no_grad():
                    moved.get_parameter(name).add_(direction, alpha=sign * step)
            values.append(loss(moved, at))
        slope = (values[0] - values[1]) / (2 * step)
        assert_close((grad * direction).sum(), slope, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_contrast_is_the_difference_of_the_reference_energies():
    """At any β the contrast of the two phases is that of Φ's parameter derivatives at the two states."""
    beta = 0.2
    model, (x, y) = make_net(4, 0.3, feedback=0.5, free_sweeps=100, nudged_sweeps=100, beta=beta), make_batch()
    reference = Reference.of(model)
    free = reference.settle(x, steps=200)
    leaf = free[-1].clone().requires_grad_()
    force = torch.autograd.grad(F.cross_entropy(model.forward_head(leaf), y), leaf)[0]
    parts = []
    for i in range(len(x)):
        one, rest, pull = x[i : i + 1], [state[i : i + 1] for state in free], force[i : i + 1]
        strength = beta / pull.abs().max()  # the package nudges by β relative to a sample's largest force
        nudged = reference.settle(one, rest, 200, strength, lambda states, pull=pull: (states[-1] * pull).sum())
        parts.append(reference.contrast(one, nudged, rest, strength))
    kernels, biases = ([sum(layer) for layer in zip(*each, strict=True)] for each in zip(*parts, strict=True))
    ours = copy.deepcopy(model)
    F.cross_entropy(ours(x), y).backward()
    for conv, kernel, bias in zip(ours.layers, kernels, biases, strict=True):
        assert_close(conv.bias.grad, bias, rtol=1e-6, atol=1e-10)
        expected = torch.autograd.grad((conv()[0] * kernel).sum(), conv.weight)[0]
        assert_close(conv.weight.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_a_batch_gives_the_gradient_of_its_samples_at_any_nudging_strength(pool):
    """The estimate of a sample does not depend on the samples beside it, though β is far from its limit."""
    model, (x, y) = make_net(4, 0.3, feedback=0.5, beta=0.3, pool=pool, nudged_sweeps=3), make_batch(batch=4)
    whole = gradients(model, x, y)
    parts = [gradients(model, x[i : i + 1], y[i : i + 1]) for i in range(4)]
    for name, grad in whole.items():
        each = [part[name] / 4 for part in parts]
        assert_close(grad, torch.cat(each) if name == "x" else sum(each), rtol=1e-10, atol=1e-14)


def test_no_feedback_is_backpropagation():
    model, (x, y) = make_net(9, feedback=0.0, beta=1e-9), make_batch()
    ours, exact = gradients(model, x, y), gradients(model, x, y, "backprop")
    for name, grad in exact.items():
        assert_close(ours[name], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_linear_in_the_scale_of_the_loss(dtype):
    model, (x, y) = make_net(9, dtype=dtype), make_batch(dtype=dtype)
    once = gradients(model, x, y)
    for exponent in range(-8, 9, 2):
        scaled = gradients(model, x, y, scale=10.0**exponent)
        for name, grad in once.items():
            tolerance = 1e-5 if dtype == torch.float32 else 1e-10
            assert (scaled[name] / 10.0**exponent - grad).norm() <= tolerance * grad.norm(), (name, exponent)


def test_samples_without_a_loss_do_not_drown_the_others_in_short_products():
    """float16 begins at 6e-8: weights of samples are relative to the largest magnitude, whatever the others have."""
    model = make_net(4, feedback=0.02, dtype=torch.float32)
    x, y = make_batch(dtype=torch.float32)
    y[0] = -100
    exact = gradients_of_read_out(model, x, y, 1e-6)
    model.products = "float16"
    for name, ours in gradients_of_read_out(model, x, y, 1e-6).items():
        assert_close(ours, exact[name], rtol=0, atol=0.01 * exact[name].abs().max().item())


def gradients_of_read_out(model, x, y, scale):
    loss = scale * F.cross_entropy(model(x), y)
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def test_zero_in_zero_out():
    model, (x, y) = make_net(4), make_batch()
    for name, grad in gradients(model, x, y, scale=0.0).items():
        assert (grad == 0).all(), name


def test_a_loss_on_a_lower_state_reaches_the_layers_above_through_feedback_only():
    """∂s_1/∂W_4 goes through feedback; with λ = 0 there is none."""
    for feedback in (0.3, 0.0):
        model, (x, _) = make_net(4, feedback=feedback, nudged_sweeps=9, free_sweeps=9), make_batch()
        model.equilibrium(x)[0].sum().backward()
        assert bool(model.layers[3].weight.grad.abs().sum()) == (feedback > 0)


def test_every_layer_gets_a_gradient_from_one_nudged_sweep():
    model, (x, y) = make_net(13, nudged_sweeps=1), make_batch()
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm() > 0, name


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.99), (torch.bfloat16, 0.95)])
def test_low_precision_keeps_the_direction(dtype, least):
    """The delta form at λ = 0.1 in 13 layers, against itself in float64."""
    model, (x, y) = make_net(13, 0.5, feedback=0.1, free_sweeps=8, nudged_sweeps=8), make_batch(batch=8, size=32)
    exact = gradients(model, x, y)
    low = gradients(copy.deepcopy(model).to(dtype), x.to(dtype), y)
    for name, cosine in cosines(low, exact).items():
        if name != "x":
            assert cosine >= least, name


def test_autocast_settles_in_bfloat16_and_keeps_float32_gradients():
    model, (x, y) = make_net(9, 0.5, dtype=torch.float32), make_batch(batch=8, size=32, dtype=torch.float32)
    exact = gradients(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.equilibrium(x)[0].dtype == torch.bfloat16
        low = gradients(model, x, y)
    for name, cosine in cosines(low, exact).items():
        assert low[name].dtype == torch.float32
        assert cosine >= 0.95, name


def test_odd_sizes_and_memory_formats_agree():
    model, (x, y) = make_net(4, feedback=0.3, free_sweeps=30, nudged_sweeps=30), make_batch(size=19)
    plain, exact = gradients(model, x, y), gradients(model, x, y, "bptt")
    last = gradients(model, x.to(memory_format=torch.channels_last), y)
    for name, cosine in cosines(plain, exact).items():
        assert cosine >= 0.999, name
        assert_close(plain[name], last[name])


@pytest.mark.parametrize("gradient", ["bptt", "backprop"])
def test_recomputation_changes_no_gradient(gradient):
    model, (x, y) = make_net(4, feedback=0.3), make_batch()
    stored = gradients(model, x, y, gradient)
    model.set_grad_checkpointing()
    for name, grad in gradients(model, x, y, gradient).items():
        assert_close(grad, stored[name])


@pytest.mark.parametrize("live", [False, True])
def test_second_derivatives_are_refused_where_there_are_none(live):
    model, (x, y) = make_net(4, forces="live" if live else "frozen", feedback=1.0, beta=0.1), make_batch()

    def objective(states):
        return F.cross_entropy(model.output(states), y)

    def loss():
        return model.live_loss(x, objective)[0] if live else objective(model.equilibrium(x))

    with pytest.raises(NotImplementedError, match=r"first derivatives.*bptt"):
        torch.autograd.grad(loss(), model.layers[0].weight, create_graph=True)
    loss().backward()
    assert model.layers[0].weight.grad.norm() > 0


def test_many_gradients_as_one_are_refused():
    model, (x, _) = make_net(4), make_batch()
    for vectorise in (
        lambda: torch.autograd.functional.jacobian(model, x[:1], vectorize=True),
        lambda: torch.autograd.grad(
            logits := model(x), x, torch.ones(2, *logits.shape).double(), is_grads_batched=True
        ),
    ):
        x.requires_grad_()
        with pytest.raises(NotImplementedError, match="takes one gradient at a time"):
            vectorise()


def test_second_derivatives_of_bptt_are_those_of_finite_differences():
    model, (x, y) = make_net(4, gradient="bptt"), make_batch()
    weight = model.layers[1].weight
    step = torch.randn(weight.shape, dtype=weight.dtype)

    def gradient(**kwargs):
        return torch.autograd.grad(F.cross_entropy(model(x), y), weight, **kwargs)[0]

    product = torch.autograd.grad((gradient(create_graph=True) * step).sum(), weight)[0]
    ends = []
    with torch.no_grad():
        for side in (1e-6, -2e-6):
            weight.add_(side * step)
            with torch.enable_grad():
                ends.append(gradient())
    assert_close(product, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-8)


def test_inference_mode_and_no_grad_give_the_same_logits():
    model, (x, _) = make_net(4), make_batch()
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert expected.requires_grad


def test_frozen_parameters_get_no_gradient():
    model, (x, y) = make_net(4), make_batch()
    model.layers[1].requires_grad_(False)
    model.layers[2].bias.requires_grad_(False)
    exact = gradients(model, x, y, "bptt", free_sweeps=30)
    ours = gradients(model, x, y, free_sweeps=30, nudged_sweeps=30)
    missing = {name for name, grad in ours.items() if grad is None}
    assert missing == {"layers.1.weight", "layers.1.gain", "layers.1.bias", "layers.2.bias"}
    assert missing == {name for name, grad in exact.items() if grad is None}


@pytest.mark.parametrize("update", ["synchronous", "odd-even"])
@pytest.mark.parametrize("depth", [4, 9])
def test_a_nudge_that_does_not_come_down_is_told(update, depth):
    """By the number of sweeps with which it does, in the warning; with one less it does not."""
    model, (x, y) = make_net(depth, 0.5, feedback=0.3, update=update), make_batch()
    reached = 2 if update == "odd-even" and depth % 2 else 1  # by the first sweep, whose second half sees its first
    with pytest.warns(UserWarning, match=f"does not reach {depth - reached} of {depth} layers") as told:
        F.cross_entropy(model(x), y).backward()
    needed = int(re.search(r"to (\d+) or more", str(told[0].message))[1])
    for sweeps, reached in ((needed - 1, False), (needed, True)):
        model.zero_grad()
        model.nudged_sweeps = sweeps
        with nullcontext() if reached else pytest.warns(UserWarning, match="does not reach"):
            F.cross_entropy(model(x), y).backward()
        assert (model.layers[0].weight.grad.norm() > 0) == reached


def test_a_backward_pass_that_brings_no_gradient_is_none():
    """As of DDP, which hands on that an output had none."""

    class Sink(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.set_materialize_grads(False)
            return tuple(tensor.view_as(tensor) for tensor in tensors)

        @staticmethod
        def backward(ctx, *grads):
            return grads

    model, (x, y) = make_net(4, 0.5), make_batch()
    outputs = Sink.apply(model(x), model(x + 1))
    F.cross_entropy(outputs[0], y).backward()
    ours = [layer.weight.grad for layer in model.layers]
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert_close(ours, [layer.weight.grad for layer in model.layers])


def test_only_layers_that_learn_are_waited_for():
    """A frozen one needs no nudge; on a device, whose states all move, it is the same."""
    model, (x, y) = make_net(4, 0.5, feedback=0.3, update="synchronous", nudged_sweeps=2), make_batch()
    for changes in ({}, {"state_noise": 1e-9, "beta": 0.1}):
        for name, value in changes.items():
            setattr(model, name, value)
        model.requires_grad_(True)
        with pytest.warns(UserWarning, match=r"does not reach 2 of 4 layers.* to 4 or more"):
            F.cross_entropy(model(x), y).backward()
        model.layers[:2].requires_grad_(False)
        F.cross_entropy(model(x), y).backward()
    model.state_noise = 0
    model.layers[:2].requires_grad_(False)
    for parts in (("weight", "gain"), ("bias",)):  # either part of a coupling is worth waiting for, and so are images
        for part in parts:
            getattr(model.layers[1], part).requires_grad_(True)
        with pytest.warns(UserWarning, match="does not reach 1 of 4 layers"):
            F.cross_entropy(model(x), y).backward()
        model.layers[:2].requires_grad_(False)
    with pytest.warns(UserWarning, match="does not reach 1 of 4 layers"):
        F.cross_entropy(model(x.clone().requires_grad_()), y).backward()


@pytest.mark.parametrize("update", ["synchronous", "odd-even", "sweep"])
@pytest.mark.parametrize("pulled", [[0], [1, 4], [0, 2, 5], [2, 3, 8]])
def test_layers_between_forces_are_missed_as_well(update, pulled):
    """The warning counts the layers that have next to nothing of their exact gradient, wherever they lie."""
    model, (x, _) = make_net(9, 0.5, feedback=1e-6, update=update, nudged_sweeps=1), make_batch()
    norms = {}
    for gradient in ("bptt", "ep"):
        model.gradient = gradient
        model.zero_grad()
        states = model.equilibrium(x)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sum(states[layer].square().sum() for layer in pulled).backward()
        norms[gradient] = [layer.bias.grad.norm() for layer in model.layers[: pulled[-1] + 1]]
    missed = [ours < 1e-3 * exact for ours, exact in zip(norms["ep"], norms["bptt"], strict=True)]
    assert [f"does not reach {sum(missed)} of 9 layers" in str(each.message) for each in told] == [True] * any(missed)


def test_forward_mode_is_refused():
    model, (x, _) = make_net(4, 0.5), make_batch()
    live = make_net(4, 0.5, preset="classic")
    with forward_ad.dual_level():
        moved = forward_ad.make_dual(x, torch.ones_like(x))
        for call in (model, lambda x: live.live_loss(x, lambda states: states[-1].mean())):
            with pytest.raises(NotImplementedError, match=r"forward_ad.*gradient = 'bptt'"):
                call(moved)
