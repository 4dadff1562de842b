"""Fine-tuning: from trained weights to new classes and channels, whole or with a frozen body."""

import importlib
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from timm.utils import freeze
from torch.testing import assert_close
from torch.utils.data import DataLoader

from timm_ep.core import nudged_phase
from timm_ep.data.datasets import open_data
from timm_ep.data.transforms import run_transform
from timm_ep.hub.cards import RunFacts
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.task import EpTask
from timm_ep.training import loop
from timm_ep.training.assembly import create_model, open_images
from timm_ep.training.checkpoints import CheckpointStore
from timm_ep.training.evaluate import Validate, evaluate, load_run
from timm_ep.training.options import TrainingOptions
from timm_ep.training.trainer import Trainer

SHIPPED = "ep_vgg5_025.ep_digits"
NARROW = {"architecture": [8, "M", 8, "M", 8, "M", 8, "M"]}
QUICK = {"epochs": 1, "batch_size": 16, "quiet": True}


def write_digits(folder: Path, classes: str, count: int | None = None) -> Path:
    """scikit-learn's digits of these classes as class folders of grey PNG files, at most `count` for training."""
    data = open_data("digits")
    for split, part in (("train", data.train), ("test", data.test)):
        chosen = [index for index in range(len(part)) if str(part.targets[index]) in classes]
        for index in chosen[: count if split == "train" else None]:
            image, label = part[index]
            target = folder / split / f"digit-{label}"
            target.mkdir(parents=True, exist_ok=True)
            image.save(target / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """48 training images of three classes, and their test images."""
    folder = write_digits(tmp_path_factory.mktemp("few"), "789", 48)
    return {"dataset": "folder", "data_dir": folder}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run with settings and widths of its own, on grey images of other classes."""
    folder = tmp_path_factory.mktemp("start")
    Trainer(
        **QUICK, model_args={**NARROW, "feedback": 0.03, "pool": "max"}, train_images=64, output=folder / "run"
    ).run()
    return folder / "run"


def body_of(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}


def equal(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_name_with_a_tag_starts_from_its_weights_and_leaves_a_run_like_any_other(few, tmp_path, capsys):
    """Body, mean and std are the shipped ones; the read-out is new; the run can be tested and predicted with."""
    options = TrainingOptions(**QUICK, **few, model=SHIPPED, pretrained=True)
    images, model = open_images(options, open_data(options.dataset, options.data_dir))
    shipped = timm.create_model(SHIPPED, pretrained=True)
    assert (images.mean, images.std) == ((0.449,) * 3, (0.226,) * 3)
    assert model.head.fc.weight.shape == (3, 128)
    assert equal(body_of(model), {k: v for k, v in body_of(shipped).items() if not k.startswith("layers.0")})
    facts = Trainer(**QUICK, **few, model=SHIPPED, pretrained=True, output=tmp_path).run()
    assert facts.architecture == "ep_vgg5_025"
    assert Validate(tmp_path, few["data_dir"]).run().top1 == facts.top1
    assert load_run(tmp_path)[0].pretrained_cfg["label_names"] == ["digit-7", "digit-8", "digit-9"]


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_grey_images_settle_alike_after_the_first_convolution_was_fitted_to_more_channels(channels):
    grey = torch.rand(2, 1, 32, 32)
    ours, theirs = (
        timm.create_model(SHIPPED, pretrained=True, in_chans=n, num_classes=3).equilibrium(grey.expand(-1, n, -1, -1))
        for n in (1, channels)
    )
    assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_colour_weights_fitted_to_one_channel_settle_alike_for_grey_images(tmp_path):
    torch.manual_seed(0)
    colour = timm.create_model("ep_vgg5_025", num_classes=3, **NARROW)
    save_file(colour.state_dict(), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 3}
    fitted = timm.create_model(
        "ep_vgg5_025", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1, **NARROW
    )
    grey = torch.rand(2, 1, 32, 32)
    assert_close(fitted(grey), colour(grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_a_run_is_a_start_with_its_weights_settings_and_preparation(start, few):
    base = {**QUICK, **few, "initial_checkpoint": start}
    images, model = open_images(TrainingOptions(**base), open_data(base["dataset"], base["data_dir"]))
    assert (model.feedback, model.pool, model.gradient) == (0.03, "max", "ep")
    trained, _ = load_run(start)
    assert equal(body_of(model), {k: v for k, v in body_of(trained).items() if not k.startswith("layers.0")})
    assert images.mean == pytest.approx([trained.pretrained_cfg["mean"][0]] * 3)
    changed = create_model(TrainingOptions(**base, model_args={"feedback": 0.01}, gradient="bptt"), images.source)
    assert (changed.feedback, changed.pool, changed.gradient) == (0.01, "max", "bptt")
    of_file = create_model(
        TrainingOptions(**{**base, "initial_checkpoint": start / "model.safetensors"}), images.source
    )
    assert equal(body_of(of_file), body_of(model))


def test_a_file_of_weights_alone_is_a_start(start, few, tmp_path):
    trained, _ = load_run(start)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    options = TrainingOptions(**QUICK, **few, initial_checkpoint=tmp_path / "weights.safetensors", model_args=NARROW)
    images, model = open_images(options, open_data(options.dataset, options.data_dir))
    assert equal(body_of(model), {k: v for k, v in body_of(trained).items() if not k.startswith("layers.0")})
    digits = create_model(options, open_data("digits"))
    assert equal(digits.state_dict(), trained.state_dict())  # read-out and first convolution fit as they are
    assert model.head.fc.weight.shape[0] == len(images.source.classes) == 3


def test_a_tuned_run_is_a_start_again(start, few, tmp_path):
    """Widths and settings go on from run to run."""
    options = {**QUICK, **few, "initial_checkpoint": start, "output": tmp_path / "tuned"}
    facts = Trainer(**options).run()
    assert (facts.settings["feedback"], facts.started_from) == (0.03, str(start))
    again = Trainer(**QUICK, initial_checkpoint=tmp_path / "tuned", train_images=32, output=tmp_path / "again").run()
    assert (again.settings["feedback"], again.settings["pool"]) == (0.03, "max")


def test_another_model_of_timm_starts_from_its_run_too(few, tmp_path):
    Trainer(**QUICK, model="test_resnet", img_size=32, train_images=64, output=tmp_path / "run").run()
    options = TrainingOptions(**QUICK, **few, model="test_resnet", initial_checkpoint=tmp_path / "run")
    trained = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    model = create_model(options, open_data(**{"name": "folder", "data_dir": few["data_dir"]}))
    assert torch.equal(model.layer4[0].conv1.weight, trained.layer4[0].conv1.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "ep_vgg9"}, "holds the weights of ep_vgg5_025, not of ep_vgg9; give --model ep_vgg5_025"),
        ({"pretrained": True}, "both say where to start"),
        ({"freeze_layers": ["body"]}, "'body' is no module of the model; those that are: , layers, layers.0"),
        ({"freeze_layers": ["layers", "head"]}, "leaves nothing of the model to learn"),
    ],
)
def test_starts_that_do_not_fit_are_refused(options, message, start, few, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(**QUICK, **few, initial_checkpoint=start, output=tmp_path / "run", **options).run()
    assert not (tmp_path / "run").exists()


def test_only_checked_safetensors_are_a_start(start, few, tmp_path):
    torch.save({}, tmp_path / "weights.pth")
    (tmp_path / "broken.safetensors").write_bytes((start / "model.safetensors").read_bytes()[:-8])
    for name, error, message in (
        ("weights.pth", ValueError, "announces a header|not a safetensors file|may run code"),
        ("broken.safetensors", ValueError, "not a safetensors file"),
        ("nowhere.safetensors", FileNotFoundError, "nowhere.safetensors does not exist"),
    ):
        with pytest.raises(error, match=message):
            create_model(TrainingOptions(**few, initial_checkpoint=tmp_path / name), open_data("digits"))


def test_the_rate_of_a_layer_falls_by_the_factor_for_every_layer_below_the_read_out(start, few, tmp_path, monkeypatch):
    """0.7^(distance from the read-out), by hand, at every update; signals learn at the read-out's rate."""
    seen = []
    original = loop.TrainingLoop._update

    def noting(self, batches, stop):
        names = {id(p): name for name, p in self.task.trainable_module.named_parameters()}
        seen.append({names[id(p)]: group["lr"] for group in self.optimizer.param_groups for p in group["params"]})
        return original(self, batches, stop)

    monkeypatch.setattr(loop.TrainingLoop, "_update", noting)
    options = {**QUICK, **few, "initial_checkpoint": start, "local_error": 0.1, "lr": 0.01}
    for sched in ("none", "constant"):
        Trainer(**options, sched=sched, opt_kwargs={"layer_decay": 0.7}, output=tmp_path / sched).run()
    assert len(seen) == 6
    for rates in seen:
        assert {name for name in rates if name.startswith("signals.")}
        for name, rate in rates.items():
            distance = 4 - int(name.split(".")[2]) if name.startswith("model.layers.") else 0
            assert rate == pytest.approx(0.01 * 0.7**distance), name
    assert RunFacts.load(tmp_path / "none" / "results.json").top1 > 0
    rows = (tmp_path / "none" / "summary.csv").read_text().splitlines()
    assert float(rows[1].split(",")[1]) == 0.01


@pytest.mark.parametrize("preset", ["fast", "classic"])
def test_a_frozen_body_runs_no_nudged_phase(preset, monkeypatch):
    """The read-out and the signals learn by their own gradient at the free states."""
    calls = []
    for name in ("equilibrium", "live"):
        module = importlib.import_module(f"timm_ep.core.{name}")
        monkeypatch.setattr(
            module, "nudged_phase", lambda *a, **k: calls.append(1) or nudged_phase.nudged_phase(*a, **k)
        )
    torch.manual_seed(0)
    settings = {"free_sweeps": 30, "nudged_sweeps": 3, "init_gain": 0.5} if preset == "classic" else {}
    model = timm.create_model("ep_vgg5_025", num_classes=5, preset=preset, **NARROW, **settings)
    task = EpTask(model, LocalErrors(model, 1.0))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)

    def gradients(loss):
        task.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in task.trainable_module.named_parameters() if p.grad is not None}

    gradients(task(images, labels)["loss"])
    assert calls
    calls.clear()
    freeze(model, ["layers"])
    frozen = gradients(task(images, labels)["loss"])
    assert not calls
    with torch.no_grad():
        states = model.equilibrium(images)
    plain = gradients(task.losses(states, labels)["loss"])
    assert frozen.keys() == plain.keys()
    assert len(frozen) == 2 + 2 * 4  # weight and bias of the read-out and of a classifier on every layer
    for name, gradient in frozen.items():
        assert_close(gradient, plain[name])


def test_what_is_frozen_stays_through_weight_decay_averaging_and_resuming(start, few, tmp_path):
    """Bit for bit, where the rest learns; a run that was broken off and resumed is the run that never was."""
    options = {
        **{**QUICK, "epochs": 2},
        **few,
        "initial_checkpoint": start,
        "freeze_layers": ["layers.0", "layers.1"],
        "weight_decay": 0.5,
        "model_ema": True,
        "model_ema_decay": 0.5,
        "clip_grad": 1.0,
        "checkpoint_interval": "2",
    }
    Trainer(**options, output=tmp_path / "whole").run()
    trained = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).state_dict()
    before = create_model(TrainingOptions(**few, initial_checkpoint=start), open_data("folder", few["data_dir"]))
    for name, value in before.state_dict().items():
        frozen = name.startswith(("layers.0.", "layers.1."))
        assert torch.equal(trained[name], value) == frozen, name

    original = loop.TrainingLoop._update

    def broken(self, batches, stop):
        if self.updates == 4:
            raise RuntimeError("broken off")
        return original(self, batches, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_update", broken)
        with pytest.raises(RuntimeError, match="broken off"):
            Trainer(**options, output=tmp_path / "parts").run()
    Trainer(**options, output=tmp_path / "parts", resume=True).run()
    names = ("state_dict", "state_dict_ema", "optimizer")
    whole, parts = (CheckpointStore(tmp_path / name / "checkpoints").newest().state for name in ("whole", "parts"))
    for name in names[:2]:
        assert equal(parts[name], whole[name])
    count = sum(len(group["params"]) for group in whole["optimizer"]["param_groups"])
    assert count == len(before.state_dict()) - 6
    with pytest.raises(ValueError, match="freeze_layers"):
        Trainer(**{**options, "freeze_layers": []}, output=tmp_path / "parts", resume=True).run()


@pytest.fixture(scope="module")
def transfer(tmp_path_factory):
    """A run on seven of the ten digits, and 30 training images of the three that it never saw."""
    folder = tmp_path_factory.mktemp("transfer")
    seen = {"dataset": "folder", "data_dir": write_digits(folder / "seen", "0123456")}
    Trainer(**seen, epochs=5, batch_size=32, quiet=True, output=folder / "run").run()
    return folder / "run", write_digits(folder / "unseen", "789", 30)


def by_trainer(run, data_dir, seed, output, frozen=False):
    start = {} if run is None else {"initial_checkpoint": run, "opt_kwargs": {"layer_decay": 0.7}}
    if frozen:
        start = {"initial_checkpoint": run, "freeze_layers": ["layers"], "lr": 0.1}
    options = {"dataset": "folder", "data_dir": data_dir, "epochs": 1, "batch_size": 6, "quiet": True}
    return Trainer(**options, **start, seed=seed, output=output).run().top1


def by_plain_loop(run, data_dir, seed, output, frozen=False):
    torch.manual_seed(seed)
    name = "ep_vgg5_025" if run is None else f"local-dir:{run}"
    model = timm.create_model(name, pretrained=run is not None, num_classes=3)
    if frozen:
        freeze(model, ["layers"])
    data = open_data("folder", data_dir)
    data.train.transform = data.test.transform = run_transform(model)
    decay = 1.0 if run is None or frozen else 0.7
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=decay)
    for group in groups:
        group["lr"] = (0.1 if frozen else 2e-3) * group["lr_scale"]
    optimizer = torch.optim.AdamW(groups)
    for images, labels in DataLoader(data.train, 6, shuffle=True):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return evaluate(model, DataLoader(data.test, 256)).top1


@pytest.mark.slow
@pytest.mark.parametrize("train", [by_trainer, by_plain_loop])
def test_a_trained_body_learns_new_classes_from_less_than_a_new_one_does(train, transfer, tmp_path):
    """Five updates with 30 images of digits that the body never saw, mean of four seeds."""
    run, data_dir = transfer

    def mean_accuracy(name, *args):
        return sum(train(*args[:1], data_dir, seed, tmp_path / f"{name}-{seed}", *args[1:]) for seed in range(4)) / 4

    scratch = mean_accuracy("scratch", None)
    whole, frozen = mean_accuracy("whole", run), mean_accuracy("frozen", run, True)
    print(f"scratch {scratch:.1f} %, whole {whole:.1f} %, frozen body {frozen:.1f} %")
    assert whole > scratch + 12
    assert frozen > scratch + 7
