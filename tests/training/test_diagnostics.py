import pytest
import timm
import torch

from conftest import make_batch, make_net
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.task import EpTask
from timm_ep.studies.reference import Reference
from timm_ep.training.diagnostics import diagnose


def make_task(pool="avg", feedback=0.5, **kwargs):
    model = make_net(4, 0.2, pool=pool, feedback=feedback, free_sweeps=60, nudged_sweeps=60, **kwargs)
    return EpTask(model, LocalErrors(model, 0.3)), *make_batch()


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_the_nudge_is_the_distance_of_the_two_equilibria(pool):
    """Against the reference, settled from the model's equilibrium under the same forces at the same β."""
    task, x, y = make_task(pool, beta=1e-4)
    reference, depth = Reference.of(task.model), 4
    free = reference.settle(x, [state.detach() for state in task.model.equilibrium(x)], steps=200)
    leaves = [state.requires_grad_() for state in free]
    forces = torch.autograd.grad(task.losses(leaves, y)["loss"], leaves)
    largest = torch.stack([force.abs().amax((1, 2, 3), keepdim=True) for force in forces]).amax(0)  # of each sample

    def loss(states):
        return sum((force / largest * state).sum() for force, state in zip(forces, states, strict=True))

    nudged = reference.settle(x, free, steps=200, beta=1e-4, loss=loss)
    for row, one, other in zip(diagnose(task, x, y).layers, nudged, free, strict=True):
        expected = float((one - other.detach()).square().mean().sqrt())
        assert row.nudge == pytest.approx(expected, rel=1e-5)
        assert row.scaled_nudge == pytest.approx(expected / (1e-4 * 0.5 ** (depth - row.layer)), rel=1e-5)
        assert row.saturated == pytest.approx(float(((other == 0) | (other == 1)).double().mean()))


def test_gradient_norms_are_those_of_training():
    task, x, y = make_task()
    rows = diagnose(task, x, y).layers
    task(x, y)["loss"].backward()
    for row, layer in zip(rows, task.model.layers, strict=True):
        for name in ("weight", "gain", "bias"):
            assert getattr(row, f"{name}_gradient") == pytest.approx(float(getattr(layer, name).grad.norm()))


def test_settling_is_recorded_sweep_by_sweep():
    task, x, y = make_task(feedback=0.1)
    task.model.free_sweeps, task.model.nudged_sweeps = 5, 3
    found = diagnose(task, x, y)
    assert [len([s for s in found.settling if s.phase == p]) for p in ("free", "nudged")] == [5 * 4, 3 * 4]
    for sweep, expected in enumerate(task.model.free_residual(x), 1):
        rows = [s.residual for s in found.settling if (s.phase, s.sweep) == ("free", sweep)]
        assert max(rows) == pytest.approx(expected)
    for row in found.layers:
        last = {s.phase: s.residual for s in found.settling if s.layer == row.layer}
        assert (row.free_residual, row.nudged_residual) == (last["free"], last["nudged"])


def test_the_vanishing_nudge_shows_and_local_errors_mend_it():
    """Nine layers at λ = 1: the last layer's loss alone hardly moves the first layer; its own loss does."""
    model, (x, y) = make_net(9, 0.2, feedback=1.0, free_sweeps=30, nudged_sweeps=30), make_batch()
    plain, helped = (
        diagnose(task, x, y).layers for task in (EpTask(model), EpTask(model, LocalErrors(model, weight=1.0)))
    )
    assert plain[0].nudge < 1e-3 * plain[-1].nudge
    assert helped[0].nudge / helped[-1].nudge > 30 * plain[0].nudge / plain[-1].nudge
    assert helped[0].weight_gradient > 30 * plain[0].weight_gradient


@pytest.mark.parametrize("gradient", ["ep", "backprop"])
def test_nothing_is_changed_by_looking(gradient):
    task, x, y = make_task(gradient=gradient)
    task.train()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    diagnose(task, x, y)
    assert task.training
    assert all(param.grad is None for param in task.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_models_without_states_are_refused():
    with pytest.raises(ValueError, match="ResNet has no states"):
        diagnose(EpTask(timm.create_model("test_resnet", num_classes=5)), *make_batch(dtype=torch.float32))
    with pytest.raises(TypeError, match=r"EpTask\(model, …\), as signals nudge too; got a EpVgg"):
        diagnose(make_net(4), *make_batch())


def test_frozen_layers_have_no_gradient():
    task, x, y = make_task()
    task.model.layers[1].requires_grad_(False)
    rows = diagnose(task, x, y).layers
    assert rows[1].weight_gradient == rows[1].bias_gradient == 0
    assert rows[0].weight_gradient > 0


def test_a_layer_that_no_loss_reaches_has_no_gradient():
    """With `gradient="local"`, one without a signal."""
    model, (x, y) = make_net(4, 0.2, gradient="local"), make_batch()
    rows = diagnose(EpTask(model, LocalErrors(model, 0.3, layers=[2])), x, y).layers
    assert [row.weight_gradient > 0 for row in rows] == [False, True, False, True]
