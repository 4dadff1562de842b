"""Local errors and distillation: the losses by themselves, and their gradient through one nudged phase."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from conftest import make_batch, make_net
from timm_ep import EpVgg
from timm_ep.signals.distillation import FeatureDistillation, LogitDistillation, _nearest
from timm_ep.signals.layers import layer_weights
from timm_ep.signals.local_errors import LocalErrors, grid_averages
from timm_ep.signals.task import EpTask
from timm_ep.signals.teachers import Teacher

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def make_teacher(dtype=torch.float64):
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=5, pretrained_cfg_overlay={"input_size": (3, 16, 16)})
    return Teacher(model.to(dtype), MEAN, STD).to(dtype)


def make_task(depth=4, gain=0.2, **settings):
    """Every signal at once."""
    settings = {"feedback": 0.5, "free_sweeps": 60, "nudged_sweeps": 60, "beta": 1e-7, **settings}
    model, teacher = make_net(depth, gain, **settings), make_teacher()
    return EpTask(
        model,
        LocalErrors(model, 0.3, layers=[1, 3], pooled_size=2),
        FeatureDistillation(model, teacher, 0.7, layers=[2, 3]),
        LogitDistillation(model, 0.5, 2.0, layers=[1, 4]),
        teacher,
        dtype=torch.float64,
    )


def gradients(task, x, y):
    task.zero_grad()
    task(x, y)["loss"].backward()
    return {name: param.grad for name, param in task.get_trainable_module().named_parameters()}


@pytest.mark.parametrize(("depth", "feedback", "pool"), [(4, 1.0, "avg"), (4, 0.5, "max"), (9, 0.1, "avg")])
def test_all_signals_in_one_nudged_phase_give_the_gradient_of_their_sum(depth, feedback, pool):
    """Against BPTT through the converged settling, in every layer."""
    task, (x, y) = make_task(depth, feedback=feedback, pool=pool), make_batch()
    ours = gradients(task, x, y)
    task.model.gradient = "bptt"
    for name, exact in gradients(task, x, y).items():
        assert F.cosine_similarity(ours[name].flatten(), exact.flatten(), 0) >= 0.9999, name
        assert float(ours[name].norm() / exact.norm()) == pytest.approx(1, abs=0.01), name


def test_the_parameters_of_signals_get_exactly_their_own_gradient():
    """That of their loss on the equilibrium states alone: no nudge and no other layer enters it."""
    task, (x, y) = make_task(), make_batch()
    ours = gradients(task, x, y)
    states = [state.detach() for state in task.model.equilibrium(x)]
    for index, layer in enumerate((1, 3)):
        classify = copy.deepcopy(task.signals["local_error"].classifiers[index])
        classify.zero_grad()
        pooled = torch.stack([part.mean((2, 3)) for part in quarters(states[layer - 1])], 2).flatten(1)
        (0.3 * F.cross_entropy(classify(pooled), y)).backward()
        for name in ("weight", "bias"):
            expected = getattr(classify, name).grad
            torch.testing.assert_close(ours[f"signals.local_error.classifiers.{index}.{name}"], expected)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 2), (1, 3), (4, 4)])
@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_grid_averages_are_those_of_adaptive_pooling(size, side, memory_format):
    """On grids that divide the map, that do not, and that are finer than it; values and gradient."""
    torch.manual_seed(0)
    state = torch.rand(2, 3, *size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    ours, expected = grid_averages(state, side), F.adaptive_avg_pool2d(state, side).flatten(1)
    assert_close(ours, expected)
    pull = torch.randn_like(expected)
    assert_close(*(torch.autograd.grad(averages, state, pull)[0] for averages in (ours, expected)))


def quarters(maps):
    """The four quarters of maps of even size, row by row."""
    height, width = maps.shape[-2] // 2, maps.shape[-1] // 2
    return [maps[:, :, i : i + height, j : j + width] for i in (0, height) for j in (0, width)]


def test_signals_of_weight_zero_change_nothing_bit_for_bit():
    task, (x, y) = make_task(free_sweeps=3, nudged_sweeps=2, beta=1e-3), make_batch()
    plain = gradients(EpTask(task.model), x, y)
    for signal in (task.signals["local_error"], task.signals["distill_features"]):
        signal.weights = [0.0] * len(signal.weights)
    task.signals["distill_logits"].weight = 0.0
    result = task(x, y)
    assert result["loss"].item() == result["output_loss"].item()
    silent = gradients(task, x, y)
    for name, grad in plain.items():
        assert torch.equal(silent[name], grad), name
    assert all(silent[name] is None for name in silent.keys() - plain.keys())


def test_the_weighted_sum_of_cross_entropies():
    """By hand: uniform logits cost ln 5 a layer."""
    model, (x, y) = make_net(4), make_batch()
    signal = LocalErrors(model, [0.1, 0.2, 0.3, 0.4], pooled_size=1, final=0.5)
    for classify in signal.classifiers:
        torch.nn.init.zeros_(classify.weight)
        torch.nn.init.zeros_(classify.bias)
    states = model.equilibrium(x)
    assert signal(states, y).item() == pytest.approx(math.log(5))
    assert signal(states, torch.full((3, 5), 0.2, dtype=torch.float64)).item() == pytest.approx(math.log(5))
    signal.progress = 0.5
    assert signal(states, y).item() == pytest.approx(0.75 * math.log(5))


def test_fixed_classifiers_do_not_learn_but_nudge():
    model, (x, y) = make_net(4), make_batch()
    task = EpTask(model, LocalErrors(model, learned=False))
    found = gradients(task, x, y)
    assert all((grad is None) == name.startswith("signals.") for name, grad in found.items())
    plain = gradients(EpTask(model), x, y)
    assert not torch.allclose(found["model.layers.0.weight"], plain["model.layers.0.weight"], rtol=0.1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [3, 3, 3]), ("early", [3, 2, 1]), ("late", [1, 2, 3]), ("level", [300, 30, 3])],
)
def test_depth_schedules(schedule, expected):
    assert layer_weights(3.0, [0.01, 0.1, 1.0], schedule) == pytest.approx(expected)
    assert layer_weights([3, 3, 3], [0.01, 0.1, 1.0], schedule) == pytest.approx(expected)


@pytest.mark.parametrize("unit", [1.0, 0.5])
def test_level_local_errors_push_every_layer_by_as_much_of_its_states(unit):
    """With the same classifier on like states, −β λ^(N−l) ∂L/∂s_l is the same in units of a layer's states."""
    model = EpVgg((8, 8, 8), num_classes=5, feedback=0.2, unit=unit)
    signal = LocalErrors(model, schedule="level", pooled_size=1).double()
    for classifier in signal.classifiers:
        classifier.load_state_dict(signal.classifiers[0].state_dict())
    like = torch.rand(2, 8, 4, 4, dtype=torch.float64)
    states = [(like * unit**layer).requires_grad_() for layer in (1, 2, 3)]
    forces = torch.autograd.grad(signal(states, torch.tensor([0, 1])), states)
    first, second, third = (0.2 ** (3 - layer) * force / unit**layer for layer, force in enumerate(forces, 1))
    assert third.abs().max() > 0
    assert_close(first, third)
    assert_close(second, third)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_feature_loss_by_hand(loss):
    """Projecting to nothing costs the variance of the normalised feature, 1; projecting to the feature, nothing."""
    model, teacher = make_net(4, unit=0.5), make_teacher()
    signal = FeatureDistillation(model, teacher, 2.0, layers=[2], loss=loss)
    channels, match = teacher.channels[signal.matches[0]], signal.matches[0]
    coarse = torch.rand(3, channels, 4, 4, dtype=torch.float64)
    features = [torch.empty(0)] * match + [coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)]  # finer than s_2
    states = [torch.rand(3, 4, 8, 8, dtype=torch.float64), torch.rand(3, 6, 4, 4, dtype=torch.float64)]
    torch.nn.init.zeros_(signal.projections[0].weight)
    torch.nn.init.zeros_(signal.projections[0].bias)
    assert signal(states, features).item() == pytest.approx(2.0, rel=1e-3)
    signal.projections[0] = torch.nn.Identity()
    mean, std = (moment((1, 2, 3), keepdim=True) for moment in (coarse.mean, coarse.std))
    target = (coarse - mean) / std
    scale = 1 + torch.rand(3, 1, 4, 4) if loss == "cosine" else 1  # the cosine of a cell is blind to its size
    assert signal([states[0], 0.5**2 * scale * target], features).item() == pytest.approx(0, abs=1e-3)


def test_of_teacher_features_equally_near_the_deeper_is_taken():
    assert _nearest(4, [2, 8]) == 1


def test_states_meet_the_teacher_features_of_their_reduction():
    model, teacher = make_net(13, num_classes=10), make_teacher(torch.float32)
    signal = FeatureDistillation(model, teacher)
    assert signal.layers == [1, 3, 6, 9, 13]  # the last at each resolution, 1 to 16
    assert [teacher.reductions[match] for match in signal.matches] == [2, 2, 4, 8, 16]


def test_logit_distillation_is_the_divergence_from_the_teacher():
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])

    def plainly(temperature):
        total = 0.0
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
            p = [math.exp(v / temperature) for v in t]
            q = [math.exp(v / temperature) for v in s]
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        return temperature**2 * total / 2

    for temperature in (1.0, 4.0):
        found = LogitDistillation(torch.nn.Flatten(), 0.5, temperature)([], student, teacher).item()
        assert found == pytest.approx(0.5 * plainly(temperature), rel=1e-5)
        model = make_net(4, num_classes=2, dtype=torch.float32)
        signal = LogitDistillation(model, 0.5, temperature, layers=[1, 3])
        states = model.equilibrium(torch.rand(2, 3, 16, 16))
        for classify in signal.classifiers.classifiers:  # uniform answers, whatever the state
            torch.nn.init.zeros_(classify.weight)
            classify.bias.data = torch.zeros(2)
        uniform = LogitDistillation(torch.nn.Flatten(), 0.5, temperature)([], torch.zeros(2, 2), teacher).item()
        assert signal(states, student, teacher).item() == pytest.approx(found + 2 * uniform, rel=1e-5)


MODEL = make_net(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalErrors(MODEL, layers=[0, 1]), r"layers=\[0, 1\] .* layers 1 to 4"),
        (lambda: LocalErrors(MODEL, layers=[2, 2]), "each once"),
        (lambda: LocalErrors(MODEL, layers=[]), "is no choice of layers"),
        (lambda: LocalErrors(MODEL, weight=[1.0, 2.0]), "2 weights were given for 4 layers"),
        (lambda: LocalErrors(MODEL, weight=-1.0), "at least 0"),
        (lambda: LocalErrors(MODEL, weight=[1.0, math.nan, 1.0, 1.0]), "must all be numbers"),
        (lambda: LocalErrors(MODEL, schedule="odd"), "'odd' is unknown; choose constant, early, late, level"),
        (lambda: LocalErrors(make_net(4, feedback=0.0), schedule="level"), "schedule='level' needs feedback"),
        (lambda: LocalErrors(MODEL, pooled_size=0), "pooled_size=0 is too small"),
        (lambda: LocalErrors(make_net(4, num_classes=0)), "num_classes=0"),
        (lambda: LocalErrors(timm.create_model("test_resnet")), "ResNet has no states"),
        (lambda: FeatureDistillation(MODEL, make_teacher(), loss="l1"), "choose mse or cosine"),
        (lambda: FeatureDistillation(MODEL, Teacher(torch.nn.Flatten(), MEAN, STD)), "Flatten gives no features"),
        (lambda: LogitDistillation(MODEL, layers=[9]), "layers 1 to 4"),
        (lambda: LogitDistillation(torch.nn.Flatten(), layers=[1]), "Flatten has no states"),
        (lambda: LocalErrors(MODEL, final=-1.0), "final=-1.0 must be a number of at least 0"),
        (lambda: LogitDistillation(MODEL, weight=math.nan), "weight=nan must be at least 0"),
        (lambda: EpTask(torch.compile(MODEL)), "got a OptimizedModule, which hides the states"),
        (lambda: EpTask(torch.nn.DataParallel(MODEL)), "itself, then call task.compile"),
        (lambda: LogitDistillation(MODEL, weight=-1), "weight=-1"),
        (lambda: LogitDistillation(MODEL, temperature=0), "temperature=0"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_alone_is_no_teacher():
    resnet = timm.create_model("test_resnet", num_classes=5)
    for make in (
        lambda: FeatureDistillation(MODEL, resnet),
        lambda: EpTask(MODEL, distill_logits=LogitDistillation(MODEL), teacher=resnet),
    ):
        with pytest.raises(TypeError, match=r"The teacher is a ResNet; expected what timm_ep.create_teacher"):
            make()
    teacher = torch.compile(Teacher(resnet, MEAN, STD), backend="eager")
    assert EpTask(MODEL, distill_logits=LogitDistillation(MODEL), teacher=teacher).teacher is teacher


def test_an_average_of_weights_settles_as_the_model_does():
    task = EpTask(make_net(4), dtype=torch.float64)
    average = task.setup_ema(decay=0.5).module
    task.model.free_sweeps = 0
    task.model.feedback = 0.3
    task.update_ema(1)
    assert average.settings == task.model.settings
    x, _ = make_batch()
    assert torch.equal(average(x), task.model(x))


def test_the_loss_of_an_output_state_is_the_squared_error():
    model, (x, y) = make_net(4, 0.5, readout="state"), make_batch()
    output = model(x)
    expected = 0.5 * (output - F.one_hot(y, 5)).square().sum(1).mean()
    assert_close(EpTask(model, dtype=torch.float64)(x, y)["loss"], expected)


def test_what_a_criterion_learns_is_clipped_and_saved_with_the_signals():
    def tempered():
        criterion = torch.nn.CrossEntropyLoss()
        criterion.register_parameter("temperature", torch.nn.Parameter(torch.rand(())))
        return EpTask(model, LocalErrors(model), criterion=criterion)

    model = make_net(4)
    task, other, plain = tempered(), tempered(), EpTask(model, LocalErrors(model))
    assert task.criterion.temperature in set(task.get_clip_parameters())
    assert len(task.get_clip_parameters()) == len(plain.get_clip_parameters()) + 1
    other.load_checkpoint_state(*task.get_checkpoint_state().values())
    assert torch.equal(other.criterion.temperature, task.criterion.temperature)
    assert plain.get_task_state().keys() == task.get_task_state().keys() - {"criterion.temperature"}


def test_hooks_that_the_task_would_not_call_are_refused():
    model, (x, y) = make_net(4), make_batch()
    passes = (model.register_forward_pre_hook, model.register_forward_hook)
    for register in (*passes, model.register_full_backward_pre_hook, model.register_full_backward_hook):
        handle = register(lambda *given: None)
        with pytest.raises(ValueError, match="hooks on its forward or backward pass, which EpTask does not call"):
            EpTask(model)(x, y)
        handle.remove()
    EpTask(model)(x, y)


def test_signals_take_a_model_of_which_anything_is_pruned():
    model, (x, y) = make_net(4, 0.5), make_batch()
    torch.nn.utils.prune.random_unstructured(model.layers[0], "bias", 0.5)
    teacher = make_teacher()
    EpTask(model, LocalErrors(model), FeatureDistillation(model, teacher), teacher=teacher, dtype=torch.float64)(x, y)


def test_signals_take_a_model_whose_kernels_are_parametrised():
    """Gradients are those of the net with the kernels that come out, as autograd through the settling has them."""
    model, (x, y) = make_net(4, 0.2, feedback=0.5, free_sweeps=60, nudged_sweeps=60, beta=1e-7), make_batch()
    torch.nn.utils.parametrizations.weight_norm(model.layers[1], "weight")
    task = EpTask(model, LocalErrors(model, 0.3), dtype=torch.float64)
    ours = gradients(task, x, y)
    model.gradient = "bptt"
    for name, exact in gradients(task, x, y).items():
        assert_close(ours[name], exact, rtol=0.01, atol=1e-3 * float(exact.abs().max()))
