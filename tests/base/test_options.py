"""Options in Python are held to their types as on the command line."""

from pathlib import Path

import pytest

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
    options = Trainer(model_args={"preset": "strong", "padding": (1, 0)}, dataset="1", aa="2")
    assert options.model_args == {"preset": "strong", "padding": (1, 0)}
    assert (options.dataset, options.aa) == ("1", "2")
