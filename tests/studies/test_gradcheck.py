import copy
import dataclasses
import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import make_batch, make_net
from timm_ep import EpVgg, cli, gradient_check
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.losses import readout_criterion
from timm_ep.studies import exact as exact_module
from timm_ep.studies.gdu import step_check
from timm_ep.studies.gradcheck import Gradcheck, exact_gradients
from timm_ep.studies.reference import Reference
from timm_ep.studies.workload import Workload
from timm_ep.training.trainer import Trainer


def test_rows_are_the_cosine_and_ratio_of_the_two_gradients():
    model, (x, y) = make_net(4, feedback=0.3), make_batch()
    rows = gradient_check(model, x, y)
    assert model.layers[0].weight.grad is None
    ours, exact = copy.deepcopy(model), copy.deepcopy(model)
    exact.gradient, exact.free_sweeps = "bptt", 60
    for net in (ours, exact):
        F.cross_entropy(net(x), y).backward()
    for row, one, other in zip(rows, ours.layers, exact.layers, strict=True):
        a, b = one.weight.grad, other.weight.grad
        assert row.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-4)
        assert row.norm_ratio == pytest.approx(float(a.norm() / b.norm()), rel=1e-4)
    assert [row.layer for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "settings",
    [
        {"feedback": 0.3},
        {"feedback": 1.0, "pool": "max"},
        {"feedback": 0.5, "readout": "state"},
        {"feedback": 0.0},
        {"feedback": 0.3, "update": "synchronous", "start": "zero", "free_sweeps": 5, "tol": 0.1},
        {"feedback": 0.3, "gradient": "backprop"},
    ],
)
def test_the_exact_gradient_is_that_of_finite_differences_at_the_equilibrium(settings):
    """Whatever the sweeps, the tolerance and the gradient of the model."""
    model, (x, y) = make_net(4, 0.3, **settings), make_batch()
    criterion = readout_criterion(model)
    signal = LocalErrors(model, 0.5).double()
    exact = exact_gradients(model, x, y, signal=signal)
    assert exact.converged
    rested = copy.deepcopy(model)
    rested.settings = dataclasses.replace(model.settings, gradient="bptt", free_sweeps=300, tol=0.0)

    def loss() -> float:
        states = rested.equilibrium(x)
        return float(criterion(rested.output(states), y) + signal(states, y))

    for layer, gradient in zip(rested.layers, exact.gradients, strict=True):
        direction = torch.randn_like(layer.weight)
        ends = []
        with torch.no_grad():
            for side in (1e-5, -2e-5):
                layer.weight.add_(side * direction)
                ends.append(loss())
            layer.weight.add_(1e-5 * direction)
        expected = (ends[0] - ends[1]) / 2e-5
        assert float(gradient @ direction.flatten()) == pytest.approx(expected, abs=1e-3 * float(gradient.norm()))


def test_a_net_that_does_not_come_to_rest_has_no_exact_gradient(capsys, monkeypatch):
    monkeypatch.setattr(exact_module, "_MOST_STEPS", 1)
    model, (x, y) = make_net(4, feedback=1.0), make_batch()
    with pytest.warns(UserWarning, match="does not come to rest in hundreds of sweeps"):
        gradient_check(model, x, y)
    cli.main(["gradcheck", "ep_vgg5_025", "--batch-size", "2", "--over", "feedback", "--at", "[0.0001,1]"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("feedback 1: the net does not come to rest")


def test_other_gradients_than_eps_are_compared(capsys):
    options = ["gradcheck", "ep_vgg5_025", "--batch-size", "4", "--model-args.feedback", "0.05", "--json"]
    cli.main([*options, "--over", "gradient", "--at", "[ep,bptt,backprop,local]"])
    ep, bptt, backprop, local = json.loads(capsys.readouterr().out)
    assert min(row["cosine"] for row in ep["layers"]) > 0.9
    assert min(row["cosine"] for row in bptt["layers"]) > min(row["cosine"] for row in backprop["layers"])
    assert [row["norm_ratio"] for row in local["layers"]][:3] == [0, 0, 0]
    cli.main([*options, "--model-args.gradient", "backprop"])
    assert json.loads(capsys.readouterr().out)[0]["layers"] == backprop["layers"]


def test_dropout_and_frozen_layers_change_nothing():
    model, (x, y) = make_net(4, feedback=0.3), make_batch()
    expected = gradient_check(model, x, y)
    model.head.drop.p = model.drop_rate = 0.5
    model.train().layers[1].requires_grad_(False)
    with torch.no_grad():
        assert gradient_check(model, x, y) == expected
    assert model.training
    assert not model.layers[1].weight.requires_grad


@pytest.mark.parametrize("device", [{"state_noise": 1e-3}, {"weight_bits": 6}, {"feedback_mismatch": 0.1}])
def test_a_device_is_compared_with_the_ideal_net(device, capsys):
    model, (x, y) = make_net(4, feedback=0.3), make_batch()
    ideal = exact_gradients(model, x, y).gradients
    disturbed = make_net(4, feedback=0.3, **device, nudged_sweeps=9, beta=0.1)
    for ours, theirs in zip(exact_gradients(disturbed, x, y).gradients, ideal, strict=True):
        assert torch.equal(ours, theirs)
    cosines = [row.cosine for row in gradient_check(disturbed, x, y)]
    assert all(abs(cosine) < 1 - 1e-6 for cosine in cosines)
    assert cosines[-1] > 0.5
    cli.main(["gradcheck", "ep_vgg5_025", "--batch-size", "2", "--over", "state_noise", "--at", "[0,0.001]"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_gradient_that_is_no_number_has_not_converged():
    model, (x, y) = make_net(4), make_batch()
    assert not exact_gradients(model, x, y, lambda output, _: output.sum() * math.nan).converged


def test_what_does_not_settle_is_refused():
    with pytest.raises(ValueError, match="ResNet does not settle; expected an ep_vgg"):
        gradient_check(timm.create_model("test_resnet"), *make_batch())


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
        assert max(model.feedback_shares(x)) == pytest.approx(expected)


def test_command_prints_every_layer(capsys):
    cli.main(["gradcheck", "ep_vgg5_025", "--batch-size", "8", "--model-args.feedback", "0.05"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ep_vgg5_025: λ=0.05, feedback share 0.")
    assert len(lines[1].split(": ")[1].split()) == 6
    assert [line.split(":")[0] for line in lines[2:6]] == [f"layer  {layer}" for layer in range(1, 5)]


def test_images_have_the_size_asked_for(monkeypatch):
    seen = []
    shares = EpVgg.feedback_shares
    monkeypatch.setattr(EpVgg, "feedback_shares", lambda model, x: seen.append(x.shape) or shares(model, x))
    cli.main(["gradcheck", "ep_vgg5_025", "--batch-size", "2", "--img-size", "16"])
    assert seen == [(2, 1, 16, 16)]


def test_models_without_settling_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["gradcheck", "test_resnet"])
    assert "test_resnet is no ep_vgg*" in capsys.readouterr().err


@pytest.mark.parametrize("free_steps", [150, 10])
def test_every_step_is_bptts_by_autograd_through_the_unrolled_net(free_steps):
    """Against one unrolling with a copy of the kernels for each step: BPTT's side always, EP's at rest and tiny β."""
    model, (x, y) = make_net(4, 0.2, feedback=0.6, pool="max", start="zero", beta=1e-7), make_batch()
    steps = 8
    checks = step_check(model, x, y, steps=steps, free_steps=free_steps)
    assert (checks.residual < 1e-10) == (free_steps == 150)
    reference = Reference.of(model)
    plain = reference.settle(x, steps=free_steps - steps)
    copies = [[k.clone().requires_grad_() for k in reference.kernels] for _ in range(steps)]
    for kernels in copies:
        drives = [reference.drive(i, plain[i - 1] if i else x, kernels) for i in range(4)]
        backs = [
            torch.autograd.functional.vjp(
                lambda below, i=i, kernels=kernels: reference.drive(i + 1, below, kernels),
                plain[i],
                plain[i + 1],
                create_graph=True,
            )[1]
            for i in range(3)
        ]
        plain = [(d + (0.6 * backs[i] if i < 3 else 0)).clamp(0, 1) for i, d in enumerate(drives)]
    F.cross_entropy(model.forward_head(plain[-1]), y).backward()
    rows = {(row.layer, row.step): row for row in checks.rows}
    assert len(rows) == 4 * steps
    reached = 0
    for step, kernels in enumerate(reversed(copies)):
        for layer, kernel in enumerate(kernels, 1):
            row, exact = rows[layer, step], 0.0 if kernel.grad is None else kernel.grad.norm().item()
            assert row.bptt_norm == pytest.approx(exact, rel=1e-6, abs=1e-12)
            if row.bptt_norm and free_steps == 10:
                reached += 1
            elif row.bptt_norm:
                reached += 1
                assert row.cosine > 0.9999
                assert row.ep_norm == pytest.approx(row.bptt_norm, rel=1e-3)
                assert row.difference < 1e-3 * row.bptt_norm
            else:  # not there yet; or layer 1, below which nothing moves, so that news comes every second step
                assert step < 4 - layer or (layer == 1 and step % 2 == 0)
                assert math.isnan(row.cosine)
    assert reached == 5 + 6 + 7 + 8 - 2


@pytest.mark.filterwarnings("ignore:The nudge does not reach")  # the first steps are compared as well
@pytest.mark.parametrize(
    "settings",
    [
        {"feedback": 0.3},
        {"feedback": 0.3, "nudging": "centered"},
        {"preset": "classic"},
        {"preset": "classic", "readout": "state"},
    ],
)
def test_the_updates_are_those_of_the_code_that_trains(settings):
    """Δ_EP(t) is what the gradient of a backward pass gains from one more nudged step."""
    model, (x, y) = make_net(4, 0.4, **{**settings, "update": "synchronous", "free_sweeps": 100}), make_batch()
    checks = step_check(model, x, y, steps=6, free_steps=100)
    assert {row.layer for row in checks.rows} == set(range(1, 6 if model.readout == "state" else 5))
    net, criterion = model.net((16, 16)), readout_criterion(model)
    kernels = [kernel.detach().requires_grad_() for kernel in net.kernels]
    model.net = lambda size: net._replace(kernels=tuple(kernels))
    before = [torch.zeros_like(kernel) for kernel in kernels]
    for step in range(6):
        model.nudged_sweeps = step + 1
        if model.settings.live:
            loss, _ = model.live_loss(x, lambda states: criterion(model.output(states), y))
        else:
            loss = criterion(model(x), y)
        after = torch.autograd.grad(loss, kernels)
        for layer, pair in enumerate(zip(after, before, strict=True), 1):
            row = next(row for row in checks.rows if (row.layer, row.step) == (layer, step))
            assert row.ep_norm == pytest.approx((pair[0] - pair[1]).norm().item(), rel=1e-6, abs=1e-12)
        before = after


def test_a_signal_reaches_every_layer_in_the_first_step():
    model, (x, y) = make_net(4, 0.3, feedback=0.3), make_batch()
    signal = LocalErrors(model, 0.5)
    weight = signal.classifiers[0].weight
    assert weight.dtype == torch.float64
    alone = {(row.layer, row.step): row for row in step_check(model, x, y, steps=6).rows}
    rows = {(row.layer, row.step): row for row in step_check(model, x, y, signal=signal.float(), steps=6).rows}
    assert signal.classifiers[0].weight.dtype == torch.float32
    assert alone[1, 0].bptt_norm == 0
    for row in rows.values():
        assert row.cosine > 0.9999
        assert row.ep_norm == pytest.approx(row.bptt_norm, rel=1e-3)


def test_the_steps_are_all_taken_whatever_the_tolerance():
    """A phase that would end early, as it rests, is one of fewer steps; here every step is looked at."""
    model, (x, y) = make_net(4, 0.4), make_batch()
    rows = step_check(model, x, y, steps=6, free_steps=60).rows
    model.tol = 0.5
    assert repr(step_check(model, x, y, steps=6, free_steps=60).rows) == repr(rows)  # NaN equals NaN


def test_step_check_needs_steps_to_look_back_on():
    model, (x, y) = make_net(4), make_batch()
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        step_check(model, x, y, steps=0)
    with pytest.raises(ValueError, match="free_steps=3 at least as many"):
        step_check(model, x, y, steps=5, free_steps=3)
    assert model.layers[0].weight.dtype == torch.float64
    assert model.layers[0].weight.grad is None


def test_live_models_are_checked_by_live_nudging():
    model, (x, y) = make_net(4, 0.4, preset="classic", free_sweeps=60), make_batch()
    rows = gradient_check(model, x, y)
    ours, exact = copy.deepcopy(model), copy.deepcopy(model)
    ours.live_loss(x, lambda states: F.cross_entropy(ours.output(states), y))[0].backward()
    exact.gradient, exact.free_sweeps = "bptt", 250
    F.cross_entropy(exact(x), y).backward()
    for row, one, other in zip(rows, ours.layers, exact.layers, strict=True):
        cosine = F.cosine_similarity(one.weight.grad.flatten(), other.weight.grad.flatten(), 0)
        assert row.cosine == pytest.approx(cosine.item(), abs=1e-4)


def test_signals_enter_both_gradients():
    model, (x, y) = make_net(4, 0.3, feedback=0.3, free_sweeps=60, nudged_sweeps=60), make_batch()
    signal = LocalErrors(model, 3.0, schedule="level")
    for row in gradient_check(model, x, y, signal=signal):
        assert row.cosine > 0.9999
        assert row.norm_ratio == pytest.approx(1, abs=0.01)
    exact, plain = (exact_gradients(model, x, y, signal=given).gradients for given in (signal, None))
    twin = copy.deepcopy(model)
    twin.settings = dataclasses.replace(model.settings, gradient="bptt")
    states = twin.equilibrium(x)
    (F.cross_entropy(twin.output(states), y) + signal(states, y)).backward()
    for layer, ours, alone in zip(twin.layers, exact, plain, strict=True):
        assert F.cosine_similarity(ours, layer.weight.grad.flatten(), 0) > 0.9999
        assert F.cosine_similarity(ours, alone, 0) < 0.99


def test_command_takes_local_errors(capsys):
    model = ["gradcheck", "ep_vgg5_025", "--batch-size", "4", "--json"]
    cli.main([*model, "--local-error", "1", "--local-error-args.schedule", "level"])
    with_errors = json.loads(capsys.readouterr().out)
    cli.main(model)
    without = json.loads(capsys.readouterr().out)
    assert with_errors[0]["layers"][0]["cosine"] > 0.99
    assert with_errors[0]["layers"][0]["cosine"] != without[0]["layers"][0]["cosine"]


def test_command_sweeps_a_setting_and_writes_json_and_a_plot(tmp_path, capsys):
    options = ["--batch-size", "4", "--over", "beta", "--at", "[0.1,0.001]"]
    cli.main(["gradcheck", "ep_vgg5_025", *options, "--plot", str(tmp_path / "beta.png")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["beta", "0.1", "0.001"]
    with Image.open(tmp_path / "beta.png") as image:
        assert image.width == 600
    cli.main(["gradcheck", "ep_vgg5_025", *options, "--json", "true"])
    reports = json.loads(capsys.readouterr().out)
    assert [report["settings"]["beta"] for report in reports] == [0.1, 0.001]
    for line, report in zip(lines[1:], reports, strict=True):
        assert float(line.split()[3]) == pytest.approx(min(row["cosine"] for row in report["layers"]), abs=1e-4)


def test_command_draws_the_steps_and_compares_depths(tmp_path, capsys):
    cli.main(["gradcheck", "ep_vgg5_025", "--batch-size", "2", "--gdu", "5", "--plot", str(tmp_path / "steps.svg")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[7].startswith("step by step (relative change ")
    assert [line.split(":")[0] for line in lines[8:]] == [f"layer  {layer}" for layer in range(1, 5)]
    assert (tmp_path / "steps.svg").read_text().rstrip().endswith("</svg>")
    options = ["--batch-size", "2", "--over", "model", "--at", "[ep_vgg9_025]", "--plot", str(tmp_path / "depth.png")]
    cli.main(["gradcheck", "ep_vgg5_025", *options])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "ep_vgg5_025", "ep_vgg9_025"]
    assert [len(line.split()) for line in lines[1:]] == [4 + 4, 4 + 8]
    cli.main(["gradcheck", "ep_vgg5_025", "--batch-size", "2", "--gdu", "3", "--json", "true"])
    assert json.loads(capsys.readouterr().out)[0]["steps"]["rows"][0]["cosine"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--over", "color", "--at", "[1]"], "over='color' is unknown"),
        (["--over", "beta"], "belong together"),
        (["--at", "[1]"], "belong together: --over beta --at"),
        (["--img-size", "0"], "img_size=0 is too small"),
        (["--gdu", "0"], "gdu=0"),
        (["--over", "beta", "--at", "[0]"], "beta=0"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["gradcheck", "ep_vgg5_025", *options])
    assert message in capsys.readouterr().err


def test_a_run_is_measured_on_its_own_images(tmp_path, monkeypatch):
    run = Trainer(model="ep_vgg5_025", train_images=16, batch_size=8, epochs=1, quiet=True, output=tmp_path / "run")
    facts = dataclasses.replace(run.run(), dataset="torch/fake")
    facts.save(tmp_path / "run" / "results.json")
    with pytest.raises(FileNotFoundError, match="torch/fake"):
        Gradcheck(str(tmp_path / "run"), batch_size=2).run()
    (report,) = Gradcheck(str(tmp_path / "run"), dataset="digits", batch_size=2).run()
    assert report.accuracy == facts.top1
    (report,) = Gradcheck(str(tmp_path / "run"), dataset="digits", batch_size=2, over="beta", at=[1e-3]).run()
    assert report.accuracy is None  # it is that of another β


def test_a_release_is_not_measured_with_another_read_out(capsys):
    with pytest.raises(SystemExit):
        cli.main(["gradcheck", "ep_vgg8.ep_cifar100"])
    message = capsys.readouterr().err
    assert "trained on images of 100 classes in 3 channels; digits has 10 in 1" in message
    cli.main(["gradcheck", "ep_vgg5_025.ep_digits", "--batch-size", "2"])


def test_a_release_is_measured_with_its_weights():
    model, images, _ = Workload("ep_vgg5_025.ep_digits", batch_size=2).make()
    released = timm.create_model("ep_vgg5_025.ep_digits", pretrained=True)
    assert torch.equal(model.layers[0].weight, released.layers[0].weight)
    assert images.shape == (2, 1, 32, 32)
    assert Workload("ep_vgg5_025", classes=7, batch_size=2).make()[0].num_classes == 7
