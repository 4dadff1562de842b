"""The published algorithm: live nudging and the classic preset, step by step against a second implementation."""

import copy
import dataclasses
import json
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from conftest import make_batch, make_net
from timm_ep import EpVgg, Settings
from timm_ep.core.free_phase import free_phase, phase_at
from timm_ep.core.nudged_phase import nudged_phase, nudged_states
from timm_ep.core.settings import PRESETS
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.losses import SquaredError, readout_criterion
from timm_ep.signals.task import EpTask
from timm_ep.studies.reference import Classic, Reference
from timm_ep.training.evaluate import Validate
from timm_ep.training.predict import Predict
from timm_ep.training.trainer import Trainer

ARCHITECTURES = {2: (4, "M", 5, "M"), 3: (4, "M", 5, 6, "M"), 4: (4, "M", 5, 5, "M", 6, "M")}
LOSSES = {
    "cross-entropy": lambda output, y: F.cross_entropy(output, y, reduction="none"),
    "squared-error": lambda output, y: 0.5 * (output - torch.eye(5, dtype=output.dtype)[y]).square().sum(1),
}
TOLERANCE = {"atol": 1e-10, "rtol": 0}


def classic(depth=3, gain=3.0, seed=0, **kwargs) -> EpVgg:
    """A narrow classic net in float64, at a gain at which it is still on the move after a few steps."""
    torch.manual_seed(seed)
    settings = {
        "preset": "classic",
        "normalise_kernels": True,
        "beta": 0.4,
        "free_sweeps": 7,
        "nudged_sweeps": 5,
        **kwargs,
    }
    model = EpVgg(ARCHITECTURES[depth], num_classes=5, dtype=torch.float64, **settings)
    with torch.no_grad():
        for conv in model.layers:
            conv.gain.mul_(gain).mul_(torch.empty_like(conv.gain).uniform_(0.8, 1.2))
            conv.bias.uniform_(-0.1, 0.3)
        model.head.fc.weight.mul_(3)
        model.head.fc.bias.uniform_(0.1, 0.5)
    return model


def plain(model, criterion) -> Classic:
    net = Reference.of(model)
    weight, bias = model.head.fc.weight.detach(), model.head.fc.bias.detach()
    if model.readout == "head":
        return Classic(net, LOSSES[criterion], weight, bias)
    return Classic(dataclasses.replace(net, readout=(weight, bias)), LOSSES[criterion])


def parameter_gradients(model, criterion, x, y):
    """Gradients of effective kernels, biases and read-out from `live_loss`."""
    model = copy.deepcopy(model)
    criterion = readout_criterion(model, criterion)
    model.live_loss(x, lambda states: criterion(model.output(states), y))[0].backward()
    return model


@pytest.mark.filterwarnings("ignore:The nudge does not reach")  # one step is compared as well
@pytest.mark.parametrize("readout", ["head", "state"])
@pytest.mark.parametrize("criterion", ["cross-entropy", "squared-error"])
@pytest.mark.parametrize("nudging", ["one-sided", "random-sign", "centered"])
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_gradients_are_those_of_the_published_algorithm(depth, pool, nudging, criterion, readout):
    """Of every parameter, at 1e-10, after a free phase that has not settled and any number of nudged steps."""
    model, (x, y) = classic(depth, pool=pool, nudging=nudging, readout=readout), make_batch()
    assert model.free_residual(x)[-1] > 1e-4
    for nudged_steps in (1, 2, 5):
        model.nudged_sweeps = nudged_steps
        torch.manual_seed(nudged_steps)
        ours = parameter_gradients(model, criterion, x, y)
        torch.manual_seed(nudged_steps)
        sign = -1 if nudging == "random-sign" and torch.rand(()) < 0.5 else 1
        betas = (0.4, -0.4) if nudging == "centered" else (sign * 0.4,)
        free, _, gradients = plain(model, criterion).gradients(x, y, 7, nudged_steps, betas)
        layers = len(model.layers)
        kernels, biases = gradients[: len(free)], gradients[len(free) : 2 * len(free)]
        readouts = gradients[2 * len(free) :] or [kernels[layers], biases[layers]]
        for conv, kernel, bias in zip(ours.layers, kernels, biases, strict=False):
            weight_grad = torch.autograd.grad((conv()[0] * kernel).sum(), (conv.weight, conv.gain))
            assert_close((conv.weight.grad, conv.gain.grad), weight_grad, **TOLERANCE)
            assert_close(conv.bias.grad, bias, **TOLERANCE)
            assert nudged_steps < 5 or kernel.abs().max() > 1e-6  # by then every layer is reached
        assert_close(ours.head.fc.weight.grad, readouts[0], **TOLERANCE)
        assert_close(ours.head.fc.bias.grad, readouts[1], **TOLERANCE)


@pytest.mark.filterwarnings("ignore:The nudge does not reach")  # one step is compared as well
@pytest.mark.parametrize("readout", ["head", "state"])
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_states_are_those_of_the_published_algorithm_after_every_step(depth, pool, readout):
    """Free and nudged, towards the label and away from it."""
    model, (x, y) = classic(depth, pool=pool, readout=readout), make_batch()
    reference, criterion = plain(model, "squared-error"), SquaredError()
    net = model.net((16, 16))
    with torch.no_grad():
        states = reference.net.zeros(x)
        for step in range(8):
            free = free_phase(net, x, dataclasses.replace(model.settings, free_sweeps=step))
            assert_close(tuple(free.states), tuple(states), **TOLERANCE)
            last, states = states, reference.net.step(x, states)
        for beta in (0.4, -0.4):
            states = last
            for step in range(1, 7):
                states = reference.net.step(x, states, beta, lambda s: reference.objective(s, y))

                def forces(at):
                    with torch.enable_grad():
                        at = [s.requires_grad_() for s in at]
                        loss = criterion(model.output(at), y) * len(x)
                    return torch.autograd.grad(loss, at, allow_unused=True, materialize_grads=True)

                settings = dataclasses.replace(model.settings, nudged_sweeps=step)
                held = phase_at(net, x, free.states, 1.0)
                nudged = nudged_phase(net, held, forces, settings, beta)
                assert_close(tuple(nudged_states(held, nudged)), tuple(states), **TOLERANCE)


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("update", ["sweep", "odd-even", "synchronous"])
def test_live_and_frozen_forces_agree_at_small_beta(update, feedback):
    """Both have the same limit, that of the EP theorem."""
    model, (x, y) = classic(gain=0.6, feedback=feedback, update=update, pool="avg"), make_batch()
    model.free_sweeps = model.nudged_sweeps = 200
    live = copy.deepcopy(model)
    live.beta, live.nudging = 1e-5, "one-sided"
    live = parameter_gradients(live, "cross-entropy", x, y)
    model.beta, model.nudging = 1e-7, "one-sided"
    F.cross_entropy(model(x), y).backward()
    for (name, ours), other in zip(live.named_parameters(), model.parameters(), strict=True):
        assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_live_nudging_tends_to_bptt_and_the_centered_estimate_faster(pool):
    """The worst cosine of any parameter, as β falls from the literature's.

    Under max pooling it need not rise all the way: a nudge that changes winners finds another piece of the energy.
    """
    exact, (x, y) = classic(gain=0.6, pool=pool, gradient="bptt", free_sweeps=150), make_batch()
    F.cross_entropy(exact(x), y).backward()
    worst = {}
    for nudging in ("one-sided", "centered"):
        for beta in (1.0, 0.1, 0.01):
            model = classic(gain=0.6, pool=pool, beta=beta, nudging=nudging, free_sweeps=150, nudged_sweeps=50)
            ours = parameter_gradients(model, "cross-entropy", x, y)
            pairs = zip(ours.parameters(), exact.parameters(), strict=True)
            worst[nudging, beta] = min(F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), 0) for a, b in pairs)
    for nudging in ("one-sided", "centered"):
        assert pool == "max" or worst[nudging, 1.0] < worst[nudging, 0.1] < worst[nudging, 0.01]
        assert worst[nudging, 0.01] > 0.999
    for beta in (1.0, 0.1):
        assert worst["centered", beta] > worst["one-sided", beta]


def test_live_loss_has_live_winners_whatever_the_setting():
    """It is asked for by name; `forces` says what `backward` on the states does."""
    x, y = make_batch()
    live, frozen, still = (
        parameter_gradients(classic(beta=1.0, forces=forces), "cross-entropy", x, y)
        for forces in ("live", "frozen", "live")
    )
    for one, other in zip(live.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    still.forces = "frozen"
    still.zero_grad()
    F.cross_entropy(still(x), y).backward()
    assert not torch.allclose(live.layers[0].weight.grad, still.layers[0].weight.grad, rtol=1e-2)


def test_the_gradient_of_the_image_is_that_of_bptt():
    model, (x, y) = classic(gain=0.8, beta=1e-4, free_sweeps=150, nudged_sweeps=150), make_batch()
    x.requires_grad_()
    loss, _ = model.live_loss(x, lambda states: F.cross_entropy(model.output(states), y))
    ours = torch.autograd.grad(loss, x)[0]
    model.gradient = "bptt"
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]
    assert_close(ours, exact, rtol=1e-3, atol=1e-6)


def test_the_task_nudges_by_all_signals_at_once():
    """`EpTask` on a model with live forces: the estimate of `live_loss` for the sum of its losses, signals' own too."""
    model, (x, y) = classic(), make_batch()
    task = EpTask(model, LocalErrors(model, 0.3))
    result = task(x, y)
    result["loss"].backward()
    twin = copy.deepcopy(task)
    twin.zero_grad()
    loss, states = twin.model.live_loss(x, lambda s: twin.losses(s, y)["loss"], twin.signals.parameters())
    loss.backward()
    for (name, ours), other in zip(task.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(ours.grad, other[1].grad), name
        assert ours.grad.norm() > 0, name
    assert_close(result["output"], model(x))
    assert_close(result["loss"], result["output_loss"] + result["local_error"])
    assert_close(tuple(states), tuple(model.equilibrium(x)))
    # The signals' classifiers learn at the nudged states, which are not those of the frozen path.
    model.forces = "frozen"
    frozen = copy.deepcopy(task)
    frozen.zero_grad()
    frozen(x, y)["loss"].backward()
    frozen_classifier = frozen.signals["local_error"].classifiers[0].weight.grad
    assert not torch.allclose(task.signals["local_error"].classifiers[0].weight.grad, frozen_classifier)


def test_without_grad_the_task_reports_the_free_losses():
    model, (x, y) = classic(), make_batch()
    task = EpTask(model, LocalErrors(model, 0.3))
    with torch.no_grad():
        quiet = task(x, y)
    assert_close(quiet["loss"], task(x, y)["loss"])
    assert not quiet["loss"].requires_grad


def test_the_estimate_scales_with_the_incoming_gradient_and_adds_up_over_batches():
    model, (x, y) = classic(), make_batch(batch=4)
    whole = parameter_gradients(model, "cross-entropy", x, y)
    for part in (slice(0, 2), slice(2, 4)):
        loss, _ = model.live_loss(x[part], lambda states, part=part: F.cross_entropy(model.output(states), y[part]))
        (loss * 0.5).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, whole.get_parameter(name).grad)


def test_dropout_is_one_mask_in_both_phases():
    """F = E + βL is one function: with a mask per step the estimate would be noise at small β."""
    model, (x, y) = classic(gain=1.0, drop_rate=0.5, beta=1e-5, free_sweeps=150, nudged_sweeps=150), make_batch()
    torch.manual_seed(3)
    ours = parameter_gradients(model, "cross-entropy", x, y)
    after = torch.rand(3)
    model.gradient = "bptt"
    torch.manual_seed(3)
    F.cross_entropy(model(x), y).backward()
    assert torch.equal(torch.rand(3), after)
    for name, parameter in model.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_signs_are_drawn_from_torchs_generator():
    """Seeds reproduce; both signs come; each estimate is that of its sign."""
    model, (x, y) = classic(nudging="random-sign"), make_batch()
    single = {}
    for sign in (1, -1):
        twin = copy.deepcopy(model)
        twin.nudging, twin.beta = "one-sided", sign * 0.4
        single[sign] = parameter_gradients(twin, "cross-entropy", x, y).layers[0].weight.grad
    seen = []
    for seed in range(8):
        torch.manual_seed(seed)
        grad = parameter_gradients(model, "cross-entropy", x, y).layers[0].weight.grad
        seen.append(next(sign for sign, expected in single.items() if torch.equal(grad, expected)))
        torch.manual_seed(seed)
        assert torch.equal(parameter_gradients(model, "cross-entropy", x, y).layers[0].weight.grad, grad)
    assert set(seen) == {1, -1}


def test_random_sign_of_frozen_forces():
    model, (x, y) = classic(nudging="random-sign", forces="frozen"), make_batch()
    grads = set()
    for seed in range(8):
        torch.manual_seed(seed)
        grads.add(torch.autograd.grad(F.cross_entropy(model(x), y), model.layers[0].weight)[0].sum().item())
    assert len(grads) == 2


def test_autocast_settles_in_bfloat16_and_keeps_float32_gradients():
    """The read-out keeps its direction; below it, rounding is what live forces integrate as well."""
    model, (x, y) = classic(gain=1.0, free_sweeps=60, nudged_sweeps=20).float(), make_batch(dtype=torch.float32)
    exact = parameter_gradients(model, "cross-entropy", x, y)
    with torch.autocast("cpu", torch.bfloat16):
        loss, states = model.live_loss(x, lambda states: F.cross_entropy(model.output(states).float(), y))
    loss.backward()
    assert states[0].dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    low, high = model.head.fc.weight.grad, exact.head.fc.weight.grad
    assert F.cosine_similarity(low.flatten(), high.flatten(), 0) > 0.99


def test_the_preset_is_a_set_of_defaults():
    model = timm.create_model("ep_vgg5_025", preset="classic", num_classes=10, beta=0.7)
    assert model.settings == Settings(**{**PRESETS["classic"], "beta": 0.7})
    assert (model.feedback, model.update, model.start, model.pool, model.forces) == (
        1.0,
        "synchronous",
        "zero",
        "max",
        "live",
    )
    assert timm.create_model("ep_vgg5_025", preset="classic", feedback=0.3).feedback == 0.3
    fast = timm.create_model("ep_vgg5_025")
    assert fast.settings == timm.create_model("ep_vgg5_025", preset="fast").settings
    assert (fast.feedback, fast.forces) == (0.02, "frozen")
    with pytest.raises(ValueError, match="preset='quick' is unknown; choose one of 'fast', 'strong', 'classic'"):
        timm.create_model("ep_vgg5_025", preset="quick")
    json.dumps(PRESETS)


def test_classic_nets_settle_from_their_default_init():
    """The preset's own initial gains: λ = 1, max pooling, zero start, the literature's number of steps."""
    model = timm.create_model("ep_vgg5_025", preset="classic", num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    assert model.free_residual(x)[-1] < 1e-4
    assert all((s > 0).float().mean() > 0.05 for s in model.equilibrium(x))


def test_the_output_state_is_part_of_the_dynamics():
    """It comes to rest at clip(W mean(s_N) + b), feeds back, and is what `forward` returns."""
    model, x = classic(gain=0.8, readout="state", free_sweeps=200), make_batch()[0]
    states = model.equilibrium(x)
    assert [tuple(s.shape[1:]) for s in states[-2:]] == [(6, 4, 4), (5, 1, 1)]
    assert_close(model(x), states[-1].flatten(1))
    assert_close(model.forward_head(model.forward_features(x)), model(x))
    assert_close(model(x), (states[-2].mean((2, 3)) @ model.head.fc.weight.T + model.head.fc.bias).clamp(0, 1))
    model.head.fc.weight.data.mul_(-1)
    assert (model.equilibrium(x)[-2] - states[-2]).abs().max() > 1e-3


def test_an_output_state_keeps_timms_contract():
    model = timm.create_model("ep_vgg5_025", readout="state", num_classes=10, feedback=0.5)
    x = torch.randn(2, 3, 32, 32)
    assert [name for name, _ in model.named_parameters()][-2:] == ["head.fc.weight", "head.fc.bias"]
    assert model.get_classifier().out_features == 10
    assert model(x).shape == (2, 10)
    last, maps = model.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == [32, 64, 128, 128]
    assert_close(last, maps[-1])
    features = timm.create_model("ep_vgg5_025", readout="state", num_classes=10, feedback=0.5, features_only=True)
    features.model.load_state_dict(model.state_dict())
    for tapped, state in zip(features(x), maps, strict=True):  # the output stays, and feeds back
        assert_close(tapped, state)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    SquaredError()(model(x), torch.tensor([0, 2])).backward()
    assert all(p.grad.norm() > 0 for p in model.parameters())
    model.reset_classifier(0)
    assert model(x).shape == (2, 128)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 128, 2, 2)
    assert timm.create_model("ep_vgg5_025", readout="state", num_classes=4, device="meta")(
        torch.empty(1, 3, 64, 64, device="meta")
    ).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "tail"}, "readout='tail'"),
        ({"readout": "state", "drop_rate": 0.1}, "drop_rate=0.1"),
        ({"readout": "state", "global_pool": "max"}, "global_pool='max'"),
    ],
)
def test_a_bad_readout_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("ep_vgg5_025", **options)
    if "global_pool" in options:
        with pytest.raises(ValueError, match=message):
            timm.create_model("ep_vgg5_025", readout="state").reset_classifier(3, "max")


def test_losses_that_are_no_function_of_the_states_are_refused():
    model, (x, _) = classic(), make_batch()
    with pytest.raises(ValueError, match=r"shape \(3,\); expected a scalar"):
        model.live_loss(x, lambda states: states[0].flatten(1).sum(1))
    with pytest.raises(ValueError, match="depends on no state"):
        model.live_loss(x, lambda states: model.head.fc.bias.sum() * 0 + states[0].detach().sum())
    model.gradient = "bptt"
    with pytest.raises(ValueError, match="gradient='bptt'"):
        model.live_loss(x, lambda states: states[0].mean())


def test_squared_error_is_half_the_squared_distance():
    output, y = torch.rand(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    expected = sum(0.5 * ((output[i] - torch.eye(3, dtype=torch.float64)[y[i]]) ** 2).sum() for i in range(4)) / 4
    assert_close(SquaredError()(output, y), expected)
    assert_close(SquaredError()(output, F.one_hot(y, 3)), expected)
    model = timm.create_model("ep_vgg5_025", readout="state")
    assert isinstance(readout_criterion(model), SquaredError)
    assert isinstance(readout_criterion(model, "cross-entropy"), torch.nn.CrossEntropyLoss)
    with pytest.raises(ValueError, match="'hinge' is unknown; choose cross-entropy or squared-error"):
        readout_criterion(model, "hinge")
    with pytest.raises(ValueError, match=r"'smoothing': 0\.1"):
        readout_criterion(model, smoothing=0.1)


@pytest.mark.parametrize("readout", ["head", "state"])
def test_the_trainer_takes_the_live_path_and_saves_the_same_net(readout, tmp_path, monkeypatch):
    """`model_args={"preset": "classic"}` is all it needs; the folder holds every setting, should presets change."""
    calls = []
    real = EpVgg.live_loss
    monkeypatch.setattr(EpVgg, "live_loss", lambda *args: calls.append(args) or real(*args))
    steps = {"free_sweeps": 8, "nudged_sweeps": 4, "beta": 0.5}
    options = {"train_images": 128, "epochs": 1, "batch_size": 32, "local_error": 0.1, "quiet": True}
    facts = Trainer(output=tmp_path, model_args={"preset": "classic", "readout": readout, **steps}, **options).run()
    assert len(calls) >= 4  # four steps, and what else measures the task
    assert facts.settings == dataclasses.asdict(Settings(**{**PRESETS["classic"], **steps}))
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert {key: args[key] for key in facts.settings} == facts.settings
    monkeypatch.setitem(PRESETS, "classic", {})
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert model.settings == Settings(**facts.settings)
    assert model.readout == readout
    assert Validate(tmp_path).run().top1 == facts.top1
    assert 0 <= Predict(tmp_path, top=1).run()[0][0][1] <= 1


@pytest.mark.slow
def test_squared_error_trains_an_output_inside_the_dynamics(tmp_path):
    """Chance is 10 %. At a small learning rate: an output that a large one drives below 0 for all images is stuck."""
    options = {"train_images": 640, "epochs": 4, "lr": 5e-4, "quiet": True}
    assert Trainer(output=tmp_path / "one", model_args={"readout": "state"}, **options).run().top1 > 30
    with pytest.raises(ValueError, match=r"'smoothing': 0\.1} are of cross-entropy"):
        Trainer(output=tmp_path / "other", model_args={"readout": "state"}, smoothing=0.1, train_images=64).run()


@pytest.mark.parametrize("nudging", ["one-sided", "centered"])
def test_a_read_out_that_is_parametrized_learns_under_a_cache_too(nudging):
    """`parametrize.cached()` computes its weight once, in the first call of the loss."""
    model, (x, y) = make_net(4, 0.5, preset="classic", nudging=nudging, free_sweeps=20), make_batch()
    torch.nn.utils.parametrizations.weight_norm(model.head.fc)
    found = []
    for context in (nullcontext(), torch.nn.utils.parametrize.cached()):
        model.zero_grad()
        with context:
            loss, _ = model.live_loss(x, lambda states: F.cross_entropy(model.output(states), y))
            loss.backward()
        found.append([parameter.grad for parameter in model.head.parameters()])
    assert all(gradient.norm() > 0 for gradient in found[0])
    assert_close(found[1], found[0])


def test_a_loss_that_is_no_tensor_is_named():
    model, (x, _) = make_net(4, 0.5, preset="classic", free_sweeps=2), make_batch()
    with pytest.raises(ValueError, match="The loss is a float; expected a scalar tensor"):
        model.live_loss(x, lambda states: states[-1].mean().item())


@pytest.mark.parametrize(("feedback", "drowns"), [(1.0, False), (0.02, True), (0.0, False)])
def test_a_nudge_that_rounding_would_drown_is_refused(feedback, drowns):
    """At λ = 0.02 and β = 1e-6 the first of four layers is nudged by 8e-12, less than float32 can say of a state."""
    beta = 1e-3 if feedback == 1 else 1e-6
    model = EpVgg(ARCHITECTURES[4], num_classes=5, forces="live", feedback=feedback, beta=beta)
    x, y = make_batch(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"Live forces would drown: feedback=0\.02") if drowns else nullcontext():
        model.live_loss(x, lambda states: F.cross_entropy(model.output(states), y))[0].backward()


def test_parts_of_a_loss_with_dropout_add_up():
    model = classic(drop_rate=0.5)
    task = EpTask(model, LocalErrors(model, 0.3), dtype=torch.float64)
    losses = task(*make_batch())
    assert_close(losses["output_loss"] + losses["local_error"], losses["loss"].detach())


def test_a_live_nudge_that_does_not_come_down_is_told():
    """By the number of layers without a gradient; one more sweep for each that is to have one."""
    model, (x, y) = classic(nudged_sweeps=1), make_batch()
    for sweeps in range(1, len(model.layers)):
        model.nudged_sweeps = sweeps
        model.zero_grad()
        with pytest.warns(
            UserWarning, match=f"does not reach {len(model.layers) - sweeps} of {len(model.layers)} layers"
        ):
            model.live_loss(x, lambda states: F.cross_entropy(model.output(states), y))[0].backward()
        assert [layer.bias.grad.norm() > 0 for layer in model.layers].count(True) == sweeps


@pytest.mark.parametrize("settings", [{"state_noise": 0.01, "beta": 0.1}, {"products": "bfloat16"}])
def test_live_forces_are_not_for_devices_and_short_products(settings):
    model, (x, y) = make_net(4, 0.5, feedback=1.0, **settings), make_batch()
    with pytest.raises(ValueError, match=r"forces='live'|live forces"):
        model.live_loss(x, lambda states: F.cross_entropy(model.output(states), y))


def test_the_criterions_own_parameters_learn():
    """By the gradient at the nudged states, as those of a read-out; in both kinds of forces."""

    class Tempered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, output, target):
            return F.cross_entropy(output * self.temperature, target)

    found = {}
    settled = {"gain": 1.0, "free_sweeps": 100}  # so that what is nudged is what the loss is of
    nets = {"live": classic(beta=1e-4, **settled), "frozen": classic(forces="frozen", beta=1e-7, **settled)}
    for name, net in nets.items():
        x, y = make_batch()
        task = EpTask(net, criterion=Tempered())
        task(x, y)["loss"].backward()
        found[name] = float(task.criterion.temperature.grad)
    assert found["live"] == pytest.approx(found["frozen"], rel=0.02)
    assert found["frozen"] != 0


def test_the_gradient_of_the_image_has_live_forces_whatever_learns():
    model, (x, y) = classic(), make_batch()
    task, found = EpTask(model), []
    for learns in (True, False):
        model.requires_grad_(learns)
        images = x.clone().requires_grad_()
        task(images, y)["loss"].backward()
        found.append(images.grad)
    torch.testing.assert_close(*found)
