"""A run goes on exactly as it would have, whatever optimizer of timm's it is."""

import io
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers

from timm_ep.training.precision import _Float32
from timm_ep.training.trainer import Trainer

# What needs packages or devices that need not be here, or second derivatives.
ELSEWHERE = [name for name in list_optimizers() if name.startswith(("bnb", "fused"))] + ["adahessian"]
NAMES = [name for name in list_optimizers() if name not in ELSEWHERE]
LOOKAHEAD = [f"lookahead_{name}" for name in ("adamw", "sgd", "muon", "adopt", "lion")]


def make(name):
    torch.manual_seed(0)
    model = timm.create_model("ep_vgg5_025", num_classes=4, in_chans=1, architecture=[4, "M", 6, "M"])
    return model, create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.05)


def steps(model, optimizer, numbers, context=None):
    for number in numbers:
        torch.manual_seed(number)
        images, labels = torch.randn(6, 1, 8, 8), torch.randint(0, 4, (6,))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with context or nullcontext():
            optimizer.step()


def assert_resumes(name):
    """7 + 5 steps, in the midst of a cycle of lookahead, through a file that is read without unpickling."""
    model, optimizer = make(name)
    steps(model, optimizer, range(7))
    start = [value.clone() for value in model.parameters()]
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    steps(model, optimizer, range(7, 12))
    state = torch.load(file, weights_only=True)
    again, resumed = make(name)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    steps(again, resumed, range(7, 12))
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()
    assert any(not torch.equal(ours, before) for ours, before in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("name", [*NAMES, *LOOKAHEAD])
def test_every_optimizer_steps_where_there_is_no_half_precision(name):
    with torch.compiler.set_stance("force_eager"):
        model, optimizer = make(name)
        steps(model, optimizer, range(2), _Float32())
    assert all(value.isfinite().all() for value in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *LOOKAHEAD])
def test_every_optimizer_resumes_exactly(name):
    with torch.compiler.set_stance("force_eager"):  # kron compiles itself, which takes longer than all of this
        assert_resumes(name)


@pytest.mark.parametrize("name", ["adahessian", "fusedsgd", "bnbsgd", "nonsense"])
def test_others_are_refused_by_name(name, tmp_path):
    with pytest.raises((ValueError, ModuleNotFoundError), match=name):
        Trainer(opt=name, train_images=64, img_size=16, output=tmp_path / "run").run()
