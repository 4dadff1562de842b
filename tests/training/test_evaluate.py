"""What is done with a saved model: tested and asked, with its own sweeps or others."""

import json

import pytest
import timm
import torch

from conftest import make_batch, make_net
from timm_ep.hub.export import save
from timm_ep.models.named import set_sweeps
from timm_ep.training.evaluate import images_of, load_run


def test_other_sweeps_than_those_of_the_training(tmp_path):
    """As if the model had been created with them; 0 is the twin. Other models have none."""
    model = timm.create_model("ep_vgg5_025", num_classes=10, in_chans=1, feedback=0.3).eval()
    save(tmp_path, model, [str(digit) for digit in range(10)], 32, (0.4,), (0.3,))
    images = torch.randn(2, 1, 32, 32)
    answers = {sweeps: load_run(tmp_path, sweeps=sweeps)[0](images) for sweeps in (None, 0, 3)}
    assert torch.equal(answers[None], model(images))
    model.free_sweeps = 3
    assert torch.equal(answers[3], model(images))
    model.gradient = "backprop"
    assert torch.equal(answers[0], model(images))
    classic, twin = (make_net(4, preset="classic", tol=0.1, gradient=gradient) for gradient in ("ep", "backprop"))
    set_sweeps(classic, 0)
    assert torch.equal(classic(make_batch()[0]), twin(make_batch()[0]))
    set_sweeps(classic, 7)
    assert (classic.free_sweeps, classic.tol) == (7, 0)
    with pytest.raises(ValueError, match="free_sweeps=-1 is too small"):
        load_run(tmp_path, sweeps=-1)
    with pytest.raises(ValueError, match="sweeps=3: a ResNet does not settle"):
        set_sweeps(timm.create_model("test_resnet"), 3)


@pytest.mark.parametrize("text", ["[1]", "dataset: [", "dataset: 3", ""])
def test_options_that_cannot_be_read_are_named(text, tmp_path):
    (tmp_path / "args.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"args\.yaml (is not YAML|does not hold the options of a training)"):
        images_of(tmp_path, None)


@pytest.mark.parametrize(
    ("name", "rates"),
    [("ep_vgg5_025", {"drop_rate": 0.25}), ("test_efficientnet", {"drop_rate": 0.25, "drop_path_rate": 0.5})],
)
def test_a_saved_model_drops_as_much_when_it_trains_on(name, rates, tmp_path):
    """timm leaves these rates out of a configuration, unless it is told."""
    model = timm.create_model(name, num_classes=2, **rates)
    save(tmp_path, model, ["a", "b"], 32, (0.4, 0.5, 0.6), (0.3, 0.3, 0.3))
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert rates.items() <= args.items()
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).drop_rate == 0.25
