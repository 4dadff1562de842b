"""Half precision where the processor has no instructions for it: what is said, and what computes in float32."""

from functools import partial

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, muon

from timm_ep.training import assembly, precision
from timm_ep.training.distributed import World
from timm_ep.training.trainer import Trainer

CPU = torch.device("cpu")
SMALL = {"epochs": 1, "train_images": 32, "batch_size": 16, "img_size": 8, "quiet": True}
SMALL["model_args"] = {"architecture": [4, "M", 6, "M"]}


@pytest.fixture
def lacking(monkeypatch):
    monkeypatch.setattr(precision, "computes", lambda device, dtype: dtype is torch.float32)


def test_torch_says_what_this_processor_computes():
    """The two questions of oneDNN are there, and what computes in float16 computes in bfloat16."""
    assert precision.computes(CPU, torch.bfloat16) >= precision.computes(CPU, torch.float16)
    if torch.backends.cpu.get_cpu_capability() in {"DEFAULT", "AVX2"} and torch.backends.mkldnn.is_available():
        assert not precision.computes(CPU, torch.float16)
    assert precision.computes(torch.device("meta"), torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, []),
        ({"amp": True}, ["amp: this CPU has no instructions for bfloat16"]),
        ({"amp": True, "amp_dtype": "float16"}, ["amp: this CPU has no instructions for float16"]),
        (
            {"model_args": {**SMALL["model_args"], "products": "bfloat16"}},
            ["products: this CPU has no instructions for bfloat16"],
        ),
    ],
)
def test_a_training_says_what_is_slow_here(options, named, tmp_path, lacking, capsys):
    Trainer(**{**SMALL, **options}, output=tmp_path / "run").run()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "instructions" in line]
    assert [line.removeprefix("warning: ").partition(",")[0] for line in warnings] == named


@pytest.mark.parametrize("name", ["muon", "nmuon", "adamuon", "lookahead_muon"])
def test_muon_computes_in_float32_there(name, lacking, monkeypatch):
    """As timm's own iteration does when it is asked for float32, which its optimizer has no option for."""

    def updated(context):
        torch.manual_seed(0)
        model = timm.create_model("ep_vgg5_025", num_classes=4, in_chans=1, architecture=[4, "M", 6, "M"])
        optimizer = create_optimizer_v2(model, opt=name, lr=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        with context:
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    there = updated(precision.optimizer_precision(World(CPU)))
    monkeypatch.setattr(precision, "computes", lambda device, dtype: True)
    here = updated(precision.optimizer_precision(World(CPU)))
    full = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", full)
    assert torch.equal(there, updated(precision.optimizer_precision(World(CPU))))
    assert 0 < (there - here).norm() / here.norm() < 0.05


def test_the_loop_steps_in_that_context(tmp_path, lacking, monkeypatch):
    """The weights of a training are those of one whose iteration was asked for float32."""

    def weights(folder):
        Trainer(**SMALL, opt="muon", output=tmp_path / folder).run()
        return timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True).state_dict()

    there = weights("there")
    monkeypatch.setattr(assembly, "optimizer_precision", lambda world: precision.nullcontext())
    half = weights("half")
    full = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", full)
    asked = weights("asked")
    assert all(torch.equal(there[key], asked[key]) for key in there)
    assert not all(torch.equal(there[key], half[key]) for key in there)
