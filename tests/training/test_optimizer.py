"""Learning rates by layer, the images' mean and std, and couplings that are held, as options of a training."""

import csv
import json

import pytest
import torch
from timm.scheduler import create_scheduler_v2

from conftest import make_net
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.task import EpTask
from timm_ep.training.optimizer import create_optimizer
from timm_ep.training.options import TrainingOptions
from timm_ep.training.trainer import Trainer

RATES = [0.4, 0.3, 0.2, 0.1, 0.05]


def by_name(optimizer, module):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def make_optimizer(**options):
    model = make_net(4)
    task = EpTask(model, LocalErrors(model))
    chosen = TrainingOptions(opt="sgd", layer_lr=RATES, weight_decay=0.1, **options)
    optimizer = create_optimizer(chosen, task)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=10, warmup_epochs=0)
    scheduler.step(0)
    return task, by_name(optimizer, task.get_trainable_module())


def test_every_layer_has_its_own_rate():
    """Kernels, gains and biases at that of their layer; read-out and signals at the last; biases and gains keep."""
    task, groups = make_optimizer()
    assert groups.keys() == {name for name, _ in task.get_trainable_module().named_parameters()}
    for layer, rate in enumerate(RATES[:-1]):
        for name in ("weight", "gain", "bias"):
            assert groups[f"model.layers.{layer}.{name}"]["lr"] == pytest.approx(rate)
    for name in ("model.head.fc.weight", "signals.local_error.classifiers.0.weight"):
        assert groups[name]["lr"] == pytest.approx(RATES[-1])
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert {decay[name] for name in decay if name.endswith("weight")} == {0.1}
    assert {decay[name] for name in decay if not name.endswith("weight")} == {0.0}


def test_all_parameters_decay_where_asked_for():
    """As the literature's do: `opt_kwargs={"filter_bias_and_bn": False}`, which is timm's name for it."""
    _, groups = make_optimizer(opt_kwargs={"filter_bias_and_bn": False})
    assert {group["weight_decay"] for group in groups.values()} == {0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_lr": [0.1, 0.2]}, "layer_lr has 2 rates; ep_vgg5_025 has 4 convolutions and a read-out"),
        ({"layer_lr": RATES, "opt_kwargs": {"layer_decay": 0.5}}, "both say how fast each layer learns"),
        ({"layer_lr": [0.1], "model": "test_resnet"}, "layer_lr=\\[0.1\\] is for an ep_vgg"),
        ({"max_coupling": 0.5, "model": "test_resnet"}, "max_coupling=0.5 is for an ep_vgg"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean=\\[0.5, 0.5, 0.5\\] has 3 values; the images have 1 channels"),
        ({"std": [0.0]}, "must hold positive numbers only"),
        ({"layer_lr": [-0.1]}, "must hold positive numbers only"),
        ({"max_coupling": -1}, "max_coupling=-1.0 is too small"),
        ({"sched_kwargs": {"warmup_epochs": 2}}, "sched_kwargs has warmup_epochs, which the training sets itself"),
        ({"sched_kwargs": {"cooldown_epochs": 2}}, "make a schedule of 3 epochs, and the training has 1"),
        ({"sched_kwargs": {"cycle_limit": 2}}, "make a schedule of 2 epochs, and the training has 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(train_images=64, epochs=1, output=tmp_path / "run", quiet=True, **options).run()


def test_cycles_and_cooldown_fit_where_one_cycle_is_given(tmp_path):
    options = {"train_images": 64, "batch_size": 32, "quiet": True, "model_args": {"free_sweeps": 2}, "lr": 0.01}
    schedule = {"num_epochs": 2, "cycle_limit": 2, "cooldown_epochs": 1}
    Trainer(**options, epochs=5, warmup_epochs=0, sched_kwargs=schedule, output=tmp_path).run()
    with (tmp_path / "summary.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates[0] == pytest.approx(0.005, rel=0.01)
    assert rates[1] == pytest.approx(0.001, rel=0.01)  # the second cycle begins, at a tenth
    assert rates[3:] == [0, 0]


def test_what_is_saved_holds_its_couplings_whenever_the_last_update_was(tmp_path):
    """The average of the weights too, of which none but the weights themselves were held."""
    options = {"train_images": 64, "batch_size": 16, "epochs": 1, "quiet": True, "model_ema": True, "lr": 0.05}
    args = {"init_gain": 2.0, "feedback": 1.0, "free_sweeps": 2}
    for interval, decay in ((50, 0.1), (1, 0.9)):
        output = tmp_path / str(interval)
        held = {"max_coupling": 0.05, "residual_interval": interval, "model_ema_decay": decay}
        facts = Trainer(**options, **held, model_args=args, output=output).run()
        assert max(facts.couplings[1:]) <= 0.05 * 1.001


def test_a_run_keeps_mean_and_std_and_holds_its_couplings(tmp_path):
    """mean and std reach the configuration that timm reads; couplings end at the cap, in the log and the results."""
    args = {"init_gain": 2.0, "feedback": 1.0, "unit": 0.2}
    options = {"train_images": 128, "epochs": 1, "quiet": True, "mean": [0.3], "std": [0.9], "model_args": args}
    free = Trainer(**options, output=tmp_path / "free").run()
    facts = Trainer(**options, output=tmp_path / "held", max_coupling=0.4, residual_interval=1).run()
    assert min(free.couplings[1:]) > 0.45
    assert max(facts.couplings[1:]) <= 0.4 * 1.001
    assert facts.couplings[0] > 0.45
    cfg = json.loads((tmp_path / "held" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == ([0.3], [0.9])
    with (tmp_path / "held" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["coupling"]) for row in rows] == pytest.approx(facts.couplings, rel=0.02)
    assert [0 < float(row["feedback_share"]) < 1 for row in rows] == [True] * 4
    assert max(facts.feedback_shares) == facts.feedback_share
    assert torch.isfinite(torch.tensor(facts.feedback_shares)).all()
