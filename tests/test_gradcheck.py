import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_net

from timm_ep import cli, gradient_check
from timm_ep.evaluate import feedback_share


def test_rows_are_the_cosine_and_ratio_of_the_two_gradients():
    model, (x, y) = make_net(4, feedback=0.3), make_batch()
    rows = gradient_check(model, x, y, sweeps=30)
    assert model.layers[0].weight.grad is None
    ours, exact = copy.deepcopy(model), copy.deepcopy(model)
    exact.gradient, exact.free_sweeps = "bptt", 30
    for net in (ours, exact):
        F.cross_entropy(net(x), y).backward()
    for row, one, other in zip(rows, ours.layers, exact.layers, strict=True):
        a, b = one.weight.grad, other.weight.grad
        assert row.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))
        assert row.norm_ratio == pytest.approx(float(a.norm() / b.norm()))
    assert [row.layer for row in rows] == [1, 2, 3, 4]


def test_more_sweeps_bring_the_gradient_closer():
    model, (x, y) = make_net(9, feedback=0.1), make_batch()
    worst = []
    for sweeps in (0, 2, 6):
        model.free_sweeps = sweeps
        worst.append(min(row.cosine for row in gradient_check(model, x, y)))
    assert worst == sorted(worst)
    assert worst[0] < 0.99 * worst[-1]


def test_feedback_share_is_that_of_the_states():
    model, (x, _) = make_net(4, feedback=0.3), make_batch()
    with torch.no_grad():
        settled = model.equilibrium(x)
        model.gradient = "backprop"
        plain = model.equilibrium(x)
        model.gradient = "ep"
        expected = max(float((s - p).norm() / s.norm()) for s, p in zip(settled, plain, strict=True))
        assert feedback_share(model, x) == pytest.approx(expected)
    assert model.gradient == "ep"


def test_command_prints_every_layer(capsys):
    cli.main(["gradcheck", "ep_vgg5_025", "--batch-size", "8", "--model-args.feedback", "0.05"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ep_vgg5_025: λ=0.05, feedback share 0.")
    assert len(lines[1].split(": ")[1].split()) == 4
    assert [line.split(":")[0] for line in lines[2:6]] == [f"layer  {layer}" for layer in range(1, 5)]


def test_models_without_settling_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["gradcheck", "test_resnet"])
    assert "test_resnet is no ep_vgg*" in capsys.readouterr().err
