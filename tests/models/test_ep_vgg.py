"""The models keep timm's contract."""

import copy
import json
import math
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import TestTimePoolHead
from timm.models import save_for_hf
from timm.models._features_fx import get_notrace_modules
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

import timm_ep
from conftest import make_batch, make_net
from timm_ep import EpVgg
from timm_ep.hub.repository import load

NAMES = timm.list_models("ep_*")
SMALL = "ep_vgg5_025"


def test_the_family_is_registered():
    assert set(NAMES) == {
        *(f"ep_vgg{depth}" for depth in (5, 7, 8, 9, 11, 13, 16, 19)),
        *(f"ep_vgg{depth}_{width}" for depth in (5, 9, 11, 16) for width in ("025", "050")),
    }
    assert timm.models.is_model_in_modules("ep_vgg16", ["ep_vgg"])


@pytest.mark.parametrize(
    ("name", "depth"),
    [("ep_vgg5", 4), ("ep_vgg7", 6), ("ep_vgg8", 7), ("ep_vgg9", 8), ("ep_vgg16", 13), ("ep_vgg19", 16)],
)
def test_depth_and_width_are_those_of_the_name(name, depth):
    model = timm.create_model(name, device="meta")
    assert len(model.layers) == depth
    assert model.num_features == (256 if name == "ep_vgg7" else 512)
    assert model.get_classifier().out_features == model.num_classes == 1000


@pytest.mark.parametrize("name", NAMES)
def test_default_init_settles_and_reaches_every_layer(name):
    """On CIFAR-like input: within 2 % of the equilibrium in every layer, and a gradient in every parameter."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 7])
    at_rest = copy.deepcopy(model)
    at_rest.free_sweeps = 24
    assert at_rest.free_residual(x)[-1] < 1e-4
    with torch.no_grad():
        for ours, exact in zip(model.equilibrium(x), at_rest.equilibrium(x), strict=True):
            assert (ours - exact).norm() < 0.02 * exact.norm()
    F.cross_entropy(model(x), y).backward()
    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert all(norm > 1e-6 for norm in norms.values()), norms
    weights = [norm for key, norm in norms.items() if key.endswith("weight") and "head" not in key]
    assert max(weights) < 1000 * min(weights)


def test_meta_device_and_dtype_reach_every_parameter():
    model = timm.create_model(SMALL, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert model(torch.empty(2, 3, 32, 32, device="meta", dtype=torch.bfloat16)).shape == (2, 1000)


def test_bfloat16_parameters_train():
    model = timm.create_model(SMALL, num_classes=10).to(torch.bfloat16)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32, dtype=torch.bfloat16)).float(), torch.arange(4)).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_states_have_the_documented_shapes_and_range():
    model = timm.create_model(SMALL, in_chans=1)
    states = model.equilibrium(torch.randn(2, 1, 37, 50))
    assert [tuple(s.shape) for s in states] == [(2, 32, 18, 25), (2, 64, 9, 12), (2, 128, 4, 6), (2, 128, 2, 3)]
    assert all(((s >= 0) & (s <= 1)).all() for s in states)


def test_head_is_the_last_module_and_optional():
    model = timm.create_model(SMALL, num_classes=7)
    assert [name for name, _ in model.named_parameters()][-2:] == ["head.fc.weight", "head.fc.bias"]
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 128)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert_close(model(x), features.mean((2, 3)))
    model.reset_classifier(0, "")
    assert_close(model(x), features)
    assert timm.create_model(SMALL, num_classes=0)(x).shape == (2, 128)


def test_features_only_taps_the_last_state_of_each_resolution():
    torch.manual_seed(0)
    whole = timm.create_model("ep_vgg9_025")
    features = timm.create_model("ep_vgg9_025", features_only=True)
    features.model.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("head")})
    assert features.feature_info.channels() == [16, 32, 64, 128, 128]
    assert features.feature_info.reduction() == [1, 2, 4, 8, 16]
    x = torch.randn(2, 3, 32, 32)
    states, maps = whole.equilibrium(x), features(x)
    for layer, tapped in zip((0, 2, 4, 6, 7), maps, strict=True):
        assert_close(tapped, states[layer])
    assert len(timm.create_model("ep_vgg9_025", features_only=True, out_indices=(1, 3))(x)) == 2
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in features.parameters())


def test_forward_intermediates():
    model, x = timm.create_model("ep_vgg9_025"), torch.randn(2, 3, 32, 32)
    states = model.equilibrium(x)
    last, maps = model.forward_intermediates(x, indices=2)
    assert_close(last, states[-1])
    assert [m.shape for m in maps] == [states[6].shape, states[7].shape]
    assert len(model.forward_intermediates(x, intermediates_only=True)) == 5
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruning_keeps_the_layers_that_feed_back():
    model, x = timm.create_model("ep_vgg9_025"), torch.randn(2, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert_close(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], expected)
    assert model.num_classes == 0


def test_parameter_groups_follow_depth():
    model = timm.create_model(SMALL)
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5, weight_decay=0.05)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = [scale[id(conv.weight)] for conv in model.layers] + [scale[id(model.head.fc.weight)]]
    assert scales == sorted(scales)
    assert len(set(scales)) > 3
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() > 1}


def test_settings_are_arguments_attributes_and_json():
    model = timm.create_model(SMALL, feedback=0.5, free_sweeps=7, nudging="centered")
    assert (model.feedback, model.free_sweeps, model.nudging) == (0.5, 7, "centered")
    model.gradient = "bptt"
    model.tol = 1e-3
    assert model.settings == timm_ep.Settings(
        feedback=0.5, free_sweeps=7, nudging="centered", gradient="bptt", tol=1e-3
    )
    assert json.loads(json.dumps(asdict(model.settings)))["tol"] == 1e-3
    with pytest.raises(ValueError, match="free_sweeps=-1"):
        model.free_sweeps = -1
    assert model.free_sweeps == 7


def test_timm_saves_the_settings_as_they_are(tmp_path):
    model = timm.create_model("ep_vgg5_025", num_classes=3, in_chans=1, feedback=0.1, padding=0)
    model.free_sweeps = 3
    model.settings = replace(model.settings, tol=0.25, pool="max")
    save_for_hf(model, tmp_path, safe_serialization=True)
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert {**asdict(model.settings), "padding": 0}.items() <= args.items()
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.settings == model.settings
    x = torch.randn(2, 1, 48, 48)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_cap_on_couplings_is_positive():
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="is capped at a positive number"):
            make_net(4).cap_couplings(limit, (32, 32))


def test_torchvisions_features_are_refused_by_name():
    with pytest.raises(TypeError, match="features_only=True"):
        create_feature_extractor(timm.create_model("ep_vgg5_025"), ["layers.0"])


def test_changing_a_setting_changes_the_net():
    model, x = timm.create_model(SMALL), torch.randn(2, 3, 32, 32)
    logits = {0.02: model(x)}
    model.feedback = 0.0
    logits[0.0] = model(x)
    model.gradient, model.feedback = "backprop", 0.02
    assert_close(model(x), logits[0.0])
    assert not torch.allclose(logits[0.0], logits[0.02])
    model.gradient, model.pool = "ep", "max"
    assert not torch.allclose(model(x), logits[0.02])


def test_compiles_deep_copies_and_traces_as_a_leaf():
    model, x = timm.create_model(SMALL, num_classes=10), torch.randn(2, 3, 32, 32)
    expected = model(x)
    assert_close(copy.deepcopy(model)(x), expected)
    compiled = torch.compile(model, backend="eager")
    F.cross_entropy(compiled(x), torch.tensor([0, 1])).backward()
    assert_close(compiled(x), expected)
    assert model.layers[0].weight.grad.norm() > 0

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            return self.body(x) * 2

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return type(module) in get_notrace_modules() or super().is_leaf_module(module, name)

    wrapper = Wrapper()
    graph_module = torch.fx.GraphModule(wrapper, Tracer().trace(wrapper))
    assert_close(graph_module(x), expected * 2)


def test_weights_survive_a_checkpoint(tmp_path):
    from safetensors.torch import save_file

    model, x = timm.create_model(SMALL, num_classes=10), torch.randn(2, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = timm.create_model(SMALL, num_classes=10, checkpoint_path=str(tmp_path / "weights.safetensors"))
    assert_close(loaded(x), model(x))


def test_first_convolution_and_classifier_adapt_to_pretrained_weights(tmp_path):
    from safetensors.torch import save_file

    model = timm.create_model(SMALL)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 1000}
    other = timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1)
    assert other.layers[0].weight.shape[1] == 1
    assert other.head.fc.out_features == 4
    assert_close(other.layers[1].weight, model.layers[1].weight)


@pytest.mark.parametrize("name", ["ep_vgg16", "ep_vgg9_050", "ep_vgg9_050.untrained"])
def test_a_name_without_weights_says_which_have_them(name):
    with pytest.raises(RuntimeError, match="No pretrained weights exist for ep_vgg") as error:
        timm.create_model(name, pretrained=True)
    variant, named = name.partition(".")[0], str(error.value)
    released = [other for other in timm.list_pretrained("ep_*") if name == "ep_vgg16" or other.startswith(variant)]
    assert released
    assert all(other in named for other in released)
    assert f"timm-ep train --model {variant} " in named


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.randn(2, 1, 32, 32), ValueError, r"\(2, 1, 32, 32\); expected \(batch, 3"),
        (torch.randn(3, 32, 32), ValueError, r"\(3, 32, 32\); expected"),
        (torch.randn(2, 3, 8, 32), ValueError, "8×32 pixels are too small: 4 poolings need at least 16×16"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "torch.uint8; expected floating point"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.float64), TypeError, "torch.float64 and the model torch.float32"),
        (torch.full((1, 3, 32, 32), float("nan")), ValueError, "3072 of 3072 pixels are NaN"),
        (torch.zeros(0, 3, 32, 32), ValueError, "batch is empty"),
    ],
)
def test_bad_images_are_named(images, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(SMALL)(images)


def test_images_that_vanish_on_the_way_up_are_too_small():
    """Large paddings would make maps of nothing out of an empty one."""
    model = EpVgg((1, "M", 17, "M"), num_classes=3, padding=[0, 2])
    with pytest.raises(ValueError, match="3×7 pixels are too small: 2 poolings need at least 4×4"):
        model(torch.rand(1, 3, 3, 7))
    assert model(torch.rand(1, 3, 4, 7)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"free_sweeps": False}, TypeError, "free_sweeps=False is a bool; give a number like 6"),
        ({"tol": False}, TypeError, "tol=False is a bool"),
        ({"init_gain": float("nan")}, ValueError, "give one number of at least 0"),
        ({"init_gain": [1.0, -1.0]}, ValueError, "give one number of at least 0"),
    ],
)
def test_arguments_that_are_no_numbers_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        EpVgg((4, "M", 6, "M"), **arguments)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="'lambda_'"):
        timm.create_model(SMALL, lambda_=1)
    with pytest.raises(ValueError, match="feedback=-1"):
        timm.create_model(SMALL, feedback=-1)
    with pytest.raises(ValueError, match="beta=0"):
        timm.create_model(SMALL, beta=0)


def test_reducing_the_loss_by_plain_gradient_descent():
    """Any loop: EP's gradient lowers the loss it was taken of."""
    model, (x, y) = make_net(4, feedback=0.1), make_batch(batch=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


def test_initial_gains_can_be_scaled_and_fixed():
    """The kernel in use is proportional to the gain, so a factor on the gains is one on every kernel."""
    kernels = []
    for factor in (1.0, 0.25):
        torch.manual_seed(0)
        model = timm.create_model("ep_vgg5_025", init_gain=factor, learn_gain=factor == 1)
        kernels.append(model.net().kernels)
        assert {p.requires_grad for name, p in model.named_parameters() if name.endswith("gain")} == {factor == 1}
    for plain, scaled in zip(*kernels, strict=True):
        assert_close(scaled, 0.25 * plain)


def test_registered_names_take_another_architecture():
    model = timm.create_model("ep_vgg16_025", architecture=[4, "M", 5, 6, "M"], features_only=True)
    assert model.feature_info.channels() == [5, 6]
    assert [f.shape[1:] for f in model(torch.rand(2, 3, 16, 16))] == [(5, 8, 8), (6, 4, 4)]


def test_features_are_the_last_states_at_each_resolution():
    model = timm_ep.EpVgg((4, 5, "M", 6, "M", 7, 8), num_classes=3)
    assert model.feature_info == [
        {"num_chs": 4, "reduction": 1, "module": "layers.0"},
        {"num_chs": 5, "reduction": 2, "module": "layers.1"},
        {"num_chs": 8, "reduction": 4, "module": "layers.4"},
    ]
    final, features = model.forward_intermediates(torch.rand(2, 3, 16, 16))
    assert [state.shape[1:] for state in features] == [(4, 16, 16), (5, 8, 8), (8, 4, 4)]
    assert_close(final, features[-1])


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (["M", 4], "item 0 pools, but there is no convolution right before it"),
        ([4, "M", "M", 4], "item 2 pools, but there is no convolution right before it"),
        ([4, "m"], r"item 1 is 'm'; give the output channels .* as in \[64, \"M\", 128, \"M\"\]"),
        ("64,M", "item 0 is '6'"),
        ([4, 0], "item 1 is 0"),
        ([4, 8.0], "item 1 is 8.0"),
        ([4, True], "item 1 is True"),
        ([], "has no convolution; give at least one number of channels"),
    ],
)
def test_what_is_no_architecture_is_refused(architecture, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("ep_vgg9", architecture=architecture)


def test_a_pruned_net_reads_a_lower_state_in_its_own_units():
    """The read-out of a lower state is as large at the start as that of the last was."""
    torch.manual_seed(0)
    model, images = timm.create_model("ep_vgg16_025", preset="strong", num_classes=10), torch.randn(2, 3, 32, 32)
    before = model(images).abs().max()
    model.prune_intermediate_layers([1])
    model.reset_classifier(10, "avg")
    assert before / 30 < model(images).abs().max() < before * 30


def test_a_pruned_net_is_saved_as_it_is(tmp_path):
    """The layer that is read is in no weight: layers of equal width would take each other's read-out."""
    model, images = timm.create_model(SMALL, num_classes=10, features_only=False), torch.randn(2, 3, 32, 32)
    model.prune_intermediate_layers([2])
    model.reset_classifier(10, "avg")
    save_for_hf(model, tmp_path, safe_serialization=True)
    for again in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True), load(tmp_path)):
        assert torch.equal(again(images), model(images))
        assert not torch.equal(again(images), again.forward_head(again.equilibrium(images)[-1]))
    for number in (0, 5):
        with pytest.raises(ValueError, match=f"readout_layer={number}: give one of the 4 convolutions"):
            timm.create_model(SMALL, readout_layer=number)
    with pytest.raises(ValueError, match="with readout='state' it is the last"):
        timm.create_model(SMALL, readout_layer=2, readout="state")
    model = timm.create_model(SMALL, readout_layer=2, readout="state", num_classes=0)
    with pytest.raises(ValueError, match="readout='state' reads the last of 4 convolutions"):
        model.reset_classifier(5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"padding": 1.0}, "whole numbers"),
        ({"padding": [1, 1, 1.0, 1]}, "whole numbers"),
        ({"padding": -1}, "at least 0"),
        ({"num_classes": -1}, "num_classes=-1 must be at least 0"),
        ({"in_chans": 0}, "in_chans=0 at least 1"),
    ],
)
def test_sizes_that_there_are_none_of_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(SMALL, **given)


def test_features_are_of_order_one_whatever_the_states_are():
    """So that what timm or others put on them works at λ = 1 as well, where states fall to 1e-12."""
    torch.manual_seed(0)
    model, x = timm.create_model("ep_vgg16_025", preset="strong", num_classes=10).eval(), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert model.equilibrium(x)[-1].max() < 1e-8
        last, maps = model.forward_intermediates(x)
        assert all(0.01 < feature.square().mean().sqrt() < 10 for feature in maps)
        assert torch.equal(last, model.forward_features(x))
        assert_close(model.head(last), model(x))
        logits = model(x)
        assert TestTimePoolHead(model, original_pool=1)(x).std(0).min() > 0.1 * logits.std(0).mean()


def test_no_module_is_lost_behind_a_setting():
    with pytest.raises(TypeError, match="pool is a setting of the model; give the MaxPool2d another name"):
        make_net(4).pool = torch.nn.MaxPool2d(2)


def test_weights_that_lack_some_are_read_if_that_is_asked_for(tmp_path):
    state = timm.create_model(SMALL, num_classes=10).state_dict()
    del state["layers.3.bias"], state["layers.0.gain"]
    save_file(state, tmp_path / "part.safetensors")
    options = {"pretrained": True, "num_classes": 10}
    options["pretrained_cfg_overlay"] = {"file": str(tmp_path / "part.safetensors"), "num_classes": 10}
    with pytest.raises(ValueError, match=r"missing \['layers.0.gain', 'layers.3.bias'\]"):
        timm.create_model(SMALL, **options)
    with pytest.warns(UserWarning, match=r"missing \['layers.0.gain', 'layers.3.bias'\]"):
        model = timm.create_model(SMALL, **options, pretrained_strict=False)
    assert torch.equal(model.layers[3].weight, state["layers.3.weight"])


def test_shapes_alone_settle_and_nudge_too():
    """On the meta device and in FakeTensorMode, where a tolerance has nothing to judge by."""
    for where in (torch.device("meta"), FakeTensorMode()):
        with where:
            model = timm.create_model(SMALL, preset="strong", num_classes=4)
            loss = model(torch.randn(2, 3, 32, 32)).sum()
            loss.backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@pytest.mark.parametrize("preset", ["fast", "classic"])
def test_no_parameter_leaves_its_layer(preset):
    """FSDP frees the memory of a layer's parameters after its forward pass."""
    for layer in timm.create_model(SMALL, preset=preset).layers:
        own = {parameter.data_ptr() for parameter in layer.parameters()}
        assert own.isdisjoint(value.data_ptr() for value in layer())


def test_pooling_of_two_kinds_widens_the_read_out():
    model = timm.create_model("ep_vgg5_025", num_classes=3, global_pool="catavgmax")
    pooled = model.forward_head(model.forward_features(torch.rand(1, 3, 32, 32)), pre_logits=True)
    assert model.head_hidden_size == pooled.shape[1] == 2 * model.num_features


def test_a_read_out_inside_the_dynamics_needs_its_pooling_back():
    model = timm_ep.EpVgg((4, "M"), num_classes=3, readout="state")
    model.reset_classifier(0, "")
    with pytest.raises(ValueError, match="it needs global_pool='avg'"):
        model.reset_classifier(3)
    model.reset_classifier(3, "avg")
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize("feature_cls", ["hook", "fx", "list"])
def test_features_come_from_states_alone(feature_cls):
    with pytest.raises(ValueError, match=f"feature_cls='{feature_cls}' would take features from modules"):
        timm.create_model("ep_vgg5_025", features_only=True, feature_cls=feature_cls)


def test_a_twin_has_no_feedback_to_measure():
    model, images = timm_ep.EpVgg((4, "M", 4, "M"), num_classes=3, gradient="backprop"), torch.rand(2, 3, 8, 8)
    assert model.feedback_shares(images) == [0.0, 0.0]
    assert model.free_residual(images) == []


def test_float16_is_refused_where_states_are_too_small_for_it():
    images = torch.rand(2, 3, 32, 32)
    for model, autocast in (
        (timm.create_model("ep_vgg9_025", preset="strong", products="float16"), nullcontext()),
        (timm.create_model("ep_vgg9_025", preset="strong"), torch.autocast("cpu", torch.float16)),
    ):
        with autocast, pytest.raises(TypeError, match=r"whose states fall to 4e-07 .* Use bfloat16"):
            model(images)
    with torch.autocast("cpu", torch.bfloat16):
        timm.create_model("ep_vgg9_025", preset="strong")(images)
    timm.create_model("ep_vgg9_025", products="float16")(images)
    # Four layers fall to 7e-4, which a product can hold, if not all that is settled with.
    torch.manual_seed(0)
    full, short = (timm.create_model("ep_vgg5_025", preset="strong", num_classes=3) for _ in range(2))
    short.load_state_dict(full.state_dict())
    short.products = "float16"
    for model in (full, short):
        F.cross_entropy(model(images), torch.tensor([0, 2])).backward()
    for ours, exact in zip(short.layers, full.layers, strict=True):
        assert F.cosine_similarity(ours.weight.grad.flatten(), exact.weight.grad.flatten(), 0) > 0.99
