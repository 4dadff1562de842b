"""Feedforward VGGs of timm become nets that settle: the same function first, then states that fit [0, 1]."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vgg import VGG
from torch import nn
from torch.testing import assert_close

from timm_ep import EpVgg, cli
from timm_ep.data.datasets import open_data
from timm_ep.training.assembly import create_model
from timm_ep.training.convert import calibrate, convert
from timm_ep.training.options import TrainingOptions

CFG = (6, "M", 8, "M", 10, 10, "M", 12, 12, "M")


def make_source(norm: bool, seed: int = 0) -> VGG:
    """A narrow VGG in float64 whose filters have means, and its norms statistics, as after training."""
    torch.manual_seed(seed)
    source = VGG(list(CFG), num_classes=5, mlp_ratio=0.01, norm_layer=nn.BatchNorm2d if norm else None).double()
    for module in source.features:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.3 * module.weight[0].numel() ** -0.5, 2 * module.weight[0].numel() ** -0.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.4),
            ):
                nn.init.uniform_(values, low, high)
    return source.eval()


def make_target(**kwargs) -> EpVgg:
    kwargs = {"pool": "max", "center_kernels": False, "num_classes": 3, "dtype": torch.float64, **kwargs}
    return EpVgg(CFG, **kwargs)


def images(seed: int = 1, count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(source: VGG, x: torch.Tensor) -> list[torch.Tensor]:
    """The source's h_l, each after its pooling if it has one, by its own modules."""
    found = []
    for module in source.features:
        x = module(x.clone())
        if isinstance(module, nn.ReLU):
            found.append(x)
        if isinstance(module, nn.MaxPool2d):
            found[-1] = x
    return found


@pytest.mark.parametrize("norm", [False, True])
def test_without_feedback_and_clipping_every_layer_is_the_source_s_over_its_scale(norm):
    source, model, x = make_source(norm), make_target(feedback=0.0), images()
    convert(source, model)
    scales = calibrate(model, x, quantile=1.0)
    states = model.equilibrium(x)
    for state, scale, ours in zip(states, scales, activations(source, x), strict=True):
        assert state.max().item() == pytest.approx(1.0)
        assert_close(scale * state, ours, rtol=1e-9, atol=1e-9)
    assert_close(scales[-1] * states[-1], source.forward_features(x), rtol=1e-9, atol=1e-9)


def test_the_read_out_stays_its_own():
    model = make_target()
    before = model.head.fc.weight.clone()
    convert(make_source(False), model)
    assert torch.equal(model.head.fc.weight, before)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_calibrated_states_lie_inside_their_range_on_other_images_and_with_feedback(pool):
    """In every layer few at 1 and many above 0; the net settles, and EP reaches every parameter."""
    model = make_target(feedback=0.02, pool=pool)
    convert(make_source(True), model)
    uncalibrated = [float((state == 1).double().mean()) for state in model.equilibrium(images(2, 64))]
    calibrate(model, images(1, 64), quantile=0.99)
    states = model.equilibrium(images(2, 64))
    for state in states:
        assert 0 < (state == 1).double().mean() < 0.1
        assert ((state > 0) & (state < 1)).double().mean() > 0.25
    assert max(uncalibrated) > 0.05
    assert model.free_residual(images(2))[-1] < 0.05
    F.cross_entropy(model.output(states), torch.arange(64) % 3).backward()
    assert all(parameter.grad.norm() > 0 for parameter in model.parameters())


def test_calibrating_again_changes_nothing():
    model, x = make_target(), images()
    convert(make_source(False), model)
    calibrate(model, x, quantile=0.99)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert calibrate(model, x, quantile=0.99) == pytest.approx([1.0] * 6)
    for name, value in model.state_dict().items():
        assert_close(value, before[name], rtol=1e-9, atol=1e-12)


def test_timm_loads_weights_under_the_names_of_its_own_vggs(tmp_path):
    """Also into other classes and, for grey images alike, other channels."""
    source = make_source(True).float()
    save_file(source.state_dict(), tmp_path / "vgg.safetensors")
    overlay = {"file": str(tmp_path / "vgg.safetensors"), "num_classes": 5}
    options = {"architecture": CFG, "pool": "max", "center_kernels": False, "feedback": 0.0, "num_classes": 3}
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay, **options}
    model = timm.create_model("ep_vgg11", **kwargs)
    x = 0.01 * images().float()
    by_hand = make_target(feedback=0.0, dtype=torch.float32)
    convert(source, by_hand)
    assert_close(model.forward_features(x), by_hand.forward_features(x))
    grey = timm.create_model("ep_vgg11", in_chans=1, **kwargs)
    assert_close(
        grey.forward_features(x[:, :1]), model.forward_features(x[:, :1].expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"center_kernels": True}, "create the model with center_kernels=False"),
        ({"architecture": CFG[2:]}, "of 6 convolutions, pooled after 1, 2, 4; this model has 5, pooled after 1, 3, 5"),
        ({"architecture": (6, 8, "M", 10, 10, "M", 12, 12, "M")}, "pooled after 1, 2, 4; this model has 6"),
    ],
)
def test_sources_that_do_not_fit_are_refused(target, message):
    options = {"architecture": CFG, "center_kernels": False, "pool": "max", **target}
    with pytest.raises(ValueError, match=message):
        convert(make_source(False), EpVgg(**options).double())


def test_layers_that_are_never_excited_are_named():
    model = make_target()
    convert(make_source(False), model)
    nn.init.constant_(model.layers[2].bias, -1e9)
    with pytest.raises(ValueError, match="No image excites layer 3"):
        calibrate(model, images())
    with pytest.raises(ValueError, match="quantile=0 must be above 0"):
        calibrate(model, images(), quantile=0)


@pytest.mark.slow
def test_the_command_makes_a_start_that_training_takes(tmp_path, capsys):
    """From a vgg11_bn on disk to a run on grey images, with the pooling and the kernels of the start."""
    torch.manual_seed(0)
    source = timm.create_model("vgg11_bn", num_classes=7, mlp_ratio=0.005)
    licensed = {"pretrained_cfg": {"license": "cc-by-nc-4.0"}}
    save_for_hf(
        source, tmp_path / "vgg", model_config=licensed, model_args={"mlp_ratio": 0.005}, safe_serialization=True
    )
    start, run = tmp_path / "start", tmp_path / "run"
    cli.main(["convert", str(tmp_path / "vgg"), str(start), "--img-size=32", "--images=16"])
    assert "ep_vgg11, λ=0.01: relative change in the last free sweep 0." in capsys.readouterr().out
    config = json.loads((start / "config.json").read_text())
    assert (config["model_args"]["pool"], config["model_args"]["center_kernels"]) == ("max", False)
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["license"] == "cc-by-nc-4.0"  # as the weights are that source's
    model = create_model(TrainingOptions(model="ep_vgg11", initial_checkpoint=start), open_data("digits"))
    assert (model.in_chans, model.center_kernels, model.pool) == (1, False, "max")
    options = ["--model=ep_vgg11", f"--initial-checkpoint={start}", "--train-images=16", "--batch-size=16", "--quiet"]
    cli.main(["train", *options, "--epochs=1", "--lr=0.0001", f"--output={run}"])
    trained = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert (trained.in_chans, trained.center_kernels, trained.pool) == (1, False, "max")
    with pytest.raises(SystemExit):
        cli.main(["convert", str(run), str(tmp_path / "again")])
    assert "is a EpVgg; only VGGs of timm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["convert", str(tmp_path / "vgg"), str(start), "--img-size=32"])
    assert "exists already" in capsys.readouterr().err


def test_biases_come_over_into_the_units_of_the_net():
    torch.manual_seed(0)
    source = timm.create_model("vgg11", num_classes=3)
    with torch.no_grad():
        for module in source.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.bias.uniform_(0.1, 0.2)
    model = timm.create_model("ep_vgg11", num_classes=3, preset="strong", pool="max", center_kernels=False)
    convert(source, model)
    theirs = [module for module in source.features if isinstance(module, torch.nn.Conv2d)]
    for layer, convolution in zip(model.layers, theirs, strict=True):
        kernel, bias = layer()
        torch.testing.assert_close(kernel, convolution.weight)
        torch.testing.assert_close(bias, convolution.bias)
