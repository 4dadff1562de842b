"""Locality: what an update may know, audited on the very calls that a backward pass makes.

The contrast of the two phases is intercepted inside `loss.backward()`, everything it is handed that belongs to other
layers is replaced by noise, and the real function goes on from there. The updates must not change in a single bit.
"""

import copy
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from conftest import make_batch, make_net
from timm_ep.core.energy import Drive
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.losses import readout_criterion
from timm_ep.signals.task import EpTask

MODULES = [import_module(name) for name in ("timm_ep.core.equilibrium", "timm_ep.core.live")]
SETTINGS = {
    "fast": {"feedback": 0.3},
    "fast, centered": {"feedback": 0.3, "nudging": "centered"},
    "fast, max pooling": {"feedback": 0.3, "pool": "max", "nudged_sweeps": 3},
    "classic": {"preset": "classic", "free_sweeps": 20, "nudged_sweeps": 8},
    "classic, output inside": {"preset": "classic", "free_sweeps": 20, "nudged_sweeps": 8, "readout": "state"},
}


def gradients(model, x, y, monkeypatch, disturb=None):
    """The gradients of all parameters, with what the contrast is handed passed through `disturb`."""
    model = copy.deepcopy(model)
    real = MODULES[0].contrast

    def between(net, x, free, nudged, *others):
        return real(*(disturb or (lambda *same: same))(net, x, free, nudged), *others)

    with monkeypatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "contrast", between)
        criterion = readout_criterion(model)
        if model.settings.live:
            model.live_loss(x, lambda states: criterion(model.output(states), y))[0].backward()
        else:
            criterion(model(x), y).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def noise(value):
    if isinstance(value, Drive):
        return Drive(*(noise(part) for part in value))
    if value is None or not value.is_floating_point():
        return value if value is None else torch.zeros_like(value)  # winners, which are indices
    return torch.randn_like(value)


def everywhere_but(kept):
    """Replaces states, pre-activations, differences, drives and kernels of all layers but those kept (from 0; −1: x).

    The drive of a layer, from which come the winners of max pooling, is a function of the state below, so it is kept
    only with it.
    """

    def disturb(net, x, free, nudged):
        def spoil(values, drives=False):
            return [
                value if layer in kept and (not drives or layer - 1 in kept) else noise(value)
                for layer, value in enumerate(values)
            ]

        free = free._replace(
            states=spoil(free.states),
            preactivations=[noise(value) for value in free.preactivations],
            drives=spoil(free.drives, drives=True),
        )
        nudged = nudged._replace(deltas=spoil(nudged.deltas), drives=spoil(nudged.drives, drives=True))
        net = net._replace(kernels=tuple(map(noise, net.kernels)), biases=tuple(map(noise, net.biases)))
        return net, x if -1 in kept else noise(x), free, nudged

    return disturb


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_update_of_a_kernel_knows_the_two_layers_it_joins(settings, monkeypatch):
    """W_l: the two phases' states of layers l−1 and l; b_l: those of layer l. Not even a kernel is read."""
    model, (x, y) = make_net(4, 0.5, **settings), make_batch()
    whole = gradients(model, x, y, monkeypatch)
    for layer in range(4):
        spoilt = gradients(model, x, y, monkeypatch, everywhere_but({layer - 1, layer}))
        for name, _ in model.layers[layer].named_parameters():
            assert torch.equal(spoilt[f"layers.{layer}.{name}"], whole[f"layers.{layer}.{name}"])
        bias_only = gradients(model, x, y, monkeypatch, everywhere_but({layer}))
        assert torch.equal(bias_only[f"layers.{layer}.bias"], whole[f"layers.{layer}.bias"])
    if model.readout == "state":
        spoilt = gradients(model, x, y, monkeypatch, everywhere_but({3, 4}))
        assert torch.equal(spoilt["head.fc.weight"], whole["head.fc.weight"])
        assert torch.equal(spoilt["head.fc.bias"], whole["head.fc.bias"])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_audit_sees_what_is_read(settings, monkeypatch):
    """The same interception does change an update once one of its own two layers is replaced: it is not blind."""
    model, (x, y) = make_net(4, 0.5, **settings), make_batch()
    whole = gradients(model, x, y, monkeypatch)
    for layer in range(4):
        for missing in (layer - 1, layer):
            kept = {*range(-1, len(model.layers) + 1)} - {missing}
            spoilt = gradients(model, x, y, monkeypatch, everywhere_but(kept))
            assert not torch.equal(spoilt[f"layers.{layer}.weight"], whole[f"layers.{layer}.weight"])


def test_the_force_of_a_signal_on_a_layer_knows_that_layers_state_alone():
    """∂L/∂s_l of local errors, and the gradient of the classifier at l, with all other states replaced by noise."""
    model, (x, y) = make_net(4, 0.5), make_batch()
    task = EpTask(model, LocalErrors(model, 0.3, layers=[1, 2, 3]))
    states = [s.detach() for s in model.equilibrium(x)]

    def forces_and_updates(at):
        leaves = [s.clone().requires_grad_() for s in at]
        classifiers = task.signals["local_error"].classifiers
        parameters = [p for classifier in classifiers for p in classifier.parameters()]
        grads = torch.autograd.grad(task.losses(leaves, y)["loss"], [*leaves, *parameters])
        return grads[:4], grads[4:]

    forces, updates = forces_and_updates(states)
    for layer in range(4):
        others, theirs = forces_and_updates([s if i == layer else torch.rand_like(s) for i, s in enumerate(states)])
        assert torch.equal(others[layer], forces[layer])
        if layer < 3:
            assert torch.equal(theirs[2 * layer], updates[2 * layer])
            assert torch.equal(theirs[2 * layer + 1], updates[2 * layer + 1])
        for other in {0, 1, 2, 3} - {layer}:
            assert not torch.equal(others[other], forces[other])


def test_a_channel_that_is_silent_in_both_phases_learns_nothing():
    """No activity, no update; the other channels of its layer learn on."""
    model, (x, y) = make_net(4, 0.5, feedback=0.3), make_batch()
    with torch.no_grad():
        model.layers[1].bias[2] = -50.0
    F.cross_entropy(model(x), y).backward()
    for parameter in (model.layers[1].bias, model.layers[1].gain, model.layers[1].weight):
        learns = parameter.grad.flatten(1).norm(dim=1) if parameter.dim() > 1 else parameter.grad.abs()
        assert learns[2] == 0
        assert (learns[[0, 1, 3, 4, 5]] > 0).all()
