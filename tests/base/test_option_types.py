"""Options in Python are held to their types as on the command line."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from timm_ep.hub.curves import Plot
from timm_ep.studies.gradcheck import Gradcheck
from timm_ep.training.trainer import Trainer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Trainer(augment="flip_crop"),
            'Trainer: option "augment": Expected .*flip-crop.* value: flip_crop',
        ),
        (lambda: Trainer(bad_images="ignore"), '"bad_images": Expected'),
        (lambda: Trainer(mixup_mode="half", cutmix=1.0), '"mixup_mode": Expected'),
        (lambda: Trainer(amp_dtype="float32"), '"amp_dtype": Expected'),
        (lambda: Trainer(epochs=None), "option epochs is None"),
        (lambda: Trainer(model_args=None), "option model_args is None"),
        (lambda: Trainer(epochs=True), '"epochs": Expected a int. Got value: True'),
        (lambda: Trainer(epochs=1.5), '"epochs": Expected a int. Got value: 1.5'),
        (lambda: Trainer(amp="yes please"), '"amp": Expected a bool'),
        (lambda: Trainer(freeze_layers="layers"), '"freeze_layers": Expected a list'),
        (lambda: Trainer(model_args=["feedback"]), '"model_args": Expected a dict'),
        (lambda: Trainer(gradient="local", model_args={"gradient": "ep"}), "gradient=local and model_args.gradient=ep"),
        (lambda: Plot("runs", kind="bars"), 'Plot: option "kind"'),
        (lambda: Gradcheck("ep_vgg5_025", over="beta", at=0.1), '"at": Expected a list'),
    ],
)
def test_what_an_option_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_strings_become_paths_and_numbers_as_on_the_command_line():
    options = Trainer(
        output="1", data_dir=Path("images"), epochs="3", lr=1, mean=(0.5,), teacher=Path("runs/net"), distill_logits=1
    )
    assert (options.output, options.data_dir) == (Path("1"), Path("images"))
    assert (options.epochs, options.lr, options.mean, options.teacher) == (3, 1.0, [0.5], str(Path("runs/net")))
    assert isinstance(options.lr, float)


def test_values_of_free_form_stay_what_they_are():
    args = {"preset": "strong", "padding": (1, 0), "architecture": "1e3", "readout": "null"}
    options = Trainer(model_args=args, dataset="1", aa="null", data_dir="null", checkpoint_interval="5")
    assert options.model_args == {**args, "padding": [1, 0]}
    assert (options.dataset, options.aa, options.data_dir) == ("1", "null", Path("null"))
    assert options.interval == (5, None)


def test_numbers_of_numpy_and_devices_of_torch_are_pythons(tmp_path):
    options = Trainer(
        lr=np.float32(0.5), epochs=np.int64(3), mean=np.array([0.25]), device=torch.device("cpu"), output=tmp_path
    )
    assert (options.lr, options.epochs, options.mean, options.device) == (0.5, 3, [0.25], "cpu")
    options.save(tmp_path / "args.yaml")
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["lr"] == 0.5
    assert Gradcheck("ep_vgg5_025", over="model", at=[Path("a"), "b"]).at == [str(Path("a")), "b"]


def test_a_subclass_has_a_constructor_and_fields_of_its_own():
    @dataclass
    class Longer(Trainer):
        log: list[str] = field(init=False)

        def __init__(self, times: int) -> None:
            super().__init__(epochs=10 * times)

    assert Longer(3).epochs == 30
    assert replace(Trainer(epochs=3), lr="0.5") == Trainer(epochs=3, lr=0.5)


def test_homes_and_variables_in_paths_are_those_of_the_system(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PICTURES", str(tmp_path / "pictures"))
    names = {"teacher": "local-dir:~/teacher", "dataset": "hfds/~/pets"}
    options = Trainer(output="~/runs", data_dir="$PICTURES/cats", distill_logits=1.0, **names)
    assert (options.output, options.data_dir) == (tmp_path / "runs", tmp_path / "pictures" / "cats")
    assert (options.teacher, options.dataset) == (f"local-dir:{tmp_path}/teacher", f"hfds/{tmp_path}/pets")
    with pytest.raises(ValueError, match=r"\$NOWHERE/x has a user or a variable"):
        Trainer(output="$NOWHERE/x")
