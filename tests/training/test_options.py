"""What the options of a training do, and which are refused."""

import csv
import importlib.util

import pytest
import timm
import torch

from timm_ep.signals import teachers
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.training import assembly, loop, trainer
from timm_ep.training.checkpoints import CheckpointStore, load_checkpoint
from timm_ep.training.options import TrainingOptions
from timm_ep.training.trainer import Trainer

OPTIONS = {
    "model_args": {"architecture": [8, "M", 8, "M", 8, "M", 8, "M"]},
    "train_images": 128,
    "batch_size": 16,
    "epochs": 1,
    "quiet": True,
}


def rows_of(output):
    with (output / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def weights_of(output):
    return timm.create_model(f"local-dir:{output}", pretrained=True).state_dict()


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_best_epoch_in_validation_is_the_result_and_training_stops_when_it_no_longer_improves(
    tmp_path, monkeypatch
):
    """Accuracies of 10, 30, 20, 25 % with a patience of 2: epoch 2 of 4 is saved, and epoch 5 never runs."""
    accuracies = iter([10.0, 30.0, 20.0, 25.0, 90.0])
    original, tests = loop.evaluate, []

    def scripted(model, loader, *rest):
        result = original(model, loader, *rest)
        if len(loader.dataset) == 360:
            tests.append({name: value.clone() for name, value in model.state_dict().items()})
            return result
        return type(result)(result.loss, next(accuracies), result.top5, result.feedback_shares)

    for module in (loop, trainer):  # validation, and the final test
        monkeypatch.setattr(module, "evaluate", scripted)
    facts = Trainer(**{**OPTIONS, "epochs": 9}, val_split=0.25, patience=2, output=tmp_path).run()
    assert facts.epochs == 4
    assert [float(row["val_accuracy"]) for row in rows_of(tmp_path)] == [10, 30, 20, 25]
    assert facts.n_train == 96
    store = CheckpointStore(tmp_path / "checkpoints")
    best, last = load_checkpoint(store.best), load_checkpoint(store.steps()[0])
    assert (best["progress"]["epoch"], last["progress"]["epoch"]) == (2, 4)
    assert same(weights_of(tmp_path), best["state_dict"])
    assert not same(weights_of(tmp_path), last["state_dict"])
    assert len(tests) == 1  # test images are looked at once
    assert same(tests[0], best["state_dict"])


def test_averaged_weights_are_what_is_tested_and_saved(tmp_path):
    Trainer(**OPTIONS, model_ema=True, model_ema_decay=0.5, output=tmp_path).run()
    state = CheckpointStore(tmp_path / "checkpoints").newest().state
    assert same(weights_of(tmp_path), state["state_dict_ema"])
    assert not same(state["state_dict_ema"], state["state_dict"])


def test_accumulated_batches_are_the_large_batch(tmp_path):
    options = {**OPTIONS, "opt": "sgd", "lr": 0.01, "augment": "crop", "local_error": 0.1}
    Trainer(**{**options, "batch_size": 32}, output=tmp_path / "one").run()
    Trainer(**{**options, "batch_size": 8, "grad_accum_steps": 4}, output=tmp_path / "four").run()
    ours, theirs = weights_of(tmp_path / "one"), weights_of(tmp_path / "four")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mode", "bound"), [("norm", 1e-3), ("value", 1e-6), ("agc", 1e-4)])
def test_clipping_bounds_what_the_optimizer_sees(mode, bound, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.SGD.step

    def noting(self, *args, **kwargs):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", noting)
    Trainer(**OPTIONS, opt="sgd", clip_grad=bound, clip_mode=mode, output=tmp_path).run()
    for gradients in seen:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        if mode == "norm":
            assert flat.norm() <= bound * 1.001
        elif mode == "value":
            assert flat.abs().max() <= bound * 1.001
        else:  # kernels alone; the read-out is left out
            assert all(gradient.norm() < 0.01 for gradient in gradients if gradient.dim() == 4)


@pytest.mark.parametrize(
    "options",
    [
        {"amp": True},
        {"amp": True, "amp_dtype": "float16"},
        {"channels_last": True},
        {"torchcompile": "eager", "local_error": 0.1},
        {"deterministic": True},
        {"workers": 1},
        {"sched": "poly", "sched_kwargs": {"decay_rate": 2.0}, "opt": "lamb", "warmup_epochs": 0},
        {"sched": "none", "opt_kwargs": {"betas": [0.8, 0.99]}},
    ],
)
def test_every_mode_trains_saves_and_resumes(options, tmp_path):
    facts = Trainer(**OPTIONS, **options, output=tmp_path).run()
    assert facts.top1 > 0
    row = rows_of(tmp_path)[0]
    assert int(row["skipped"]) == 0
    assert float(row["train_loss"]) < 5
    assert Trainer(**OPTIONS, **options, output=tmp_path, resume=True).run().top1 == facts.top1
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options",
    [{}, {"amp": True}, {"amp": True, "amp_dtype": "float16", "channels_last": True}, {"deterministic": True}],
)
def test_training_resuming_and_testing_on_cuda(options, tmp_path):
    options = {**OPTIONS, **options, "device": "cuda", "model_ema": True, "mixup": 0.2, "local_error": 0.1}
    facts = Trainer(**options, output=tmp_path).run()
    assert Trainer(**{**options, "epochs": 2}, output=tmp_path, resume=True).run().top1 >= 0
    assert facts.top1 > 0
    assert int(rows_of(tmp_path)[0]["skipped"]) == 0


def test_half_precision_is_close_to_float32(tmp_path):
    losses = {}
    for name, options in {"float32": {}, "bfloat16": {"amp": True}}.items():
        Trainer(**OPTIONS, **options, output=tmp_path / name).run()
        losses[name] = float(rows_of(tmp_path / name)[0]["train_loss"])
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_the_learning_rate_warms_up_and_ends_at_zero(tmp_path, monkeypatch):
    rates = []
    original = loop.TrainingLoop._update

    def noting(self, batches, stop):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return original(self, batches, stop)

    monkeypatch.setattr(loop.TrainingLoop, "_update", noting)
    Trainer(**{**OPTIONS, "epochs": 3}, lr=1e-2, output=tmp_path).run()
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[8] == pytest.approx(1e-2)
    assert rates[:9] == sorted(rates[:9])
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert float(rows_of(tmp_path)[-1]["lr"]) < 1e-6


def test_the_teacher_is_asked_once_for_each_image_and_its_answers_are_its_own(tmp_path, monkeypatch):
    teacher_run = tmp_path / "teacher"
    Trainer(**OPTIONS, output=teacher_run).run()
    asked, checked = [], []
    forward, train = teachers.Teacher.forward, loop.EpTask.forward

    def counting(self, images):
        asked.append(len(images))
        return forward(self, images)

    def checking(self, images, target, taught=None):
        said = forward(self.teacher, images)
        torch.testing.assert_close(taught.logits, said.logits, rtol=2e-3, atol=2e-3)
        for ours, theirs in zip(taught.features, said.features, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        checked.append(len(images))
        return train(self, images, target, taught)

    monkeypatch.setattr(teachers.Teacher, "forward", counting)
    monkeypatch.setattr(loop.EpTask, "forward", checking)
    options = {**OPTIONS, "epochs": 2, "teacher": str(teacher_run), "distill_logits": 0.5, "distill_features": 0.1}
    facts = Trainer(**options, cache_teacher=True, val_split=0.25, output=tmp_path / "student").run()
    assert sum(asked[:6]) == facts.n_train == 96
    assert asked[6:] == [16, 16]  # the images on which the layers are measured after each epoch
    assert sum(checked) == 192 + 2 * 16
    assert facts.signals == {"distill_features": 0.1, "distill_logits": 0.5}


def test_several_teachers_answer_together(tmp_path, capfd):
    runs = [tmp_path / name for name in ("first", "second")]
    for seed, run in enumerate(runs):
        Trainer(**OPTIONS, seed=seed, output=run).run()
    teaching = {"teacher": [str(run) for run in runs], "teacher_args": {"free_sweeps": 0}, "distill_logits": 0.5}
    facts = Trainer(**{**OPTIONS, "quiet": False}, **teaching, output=tmp_path / "student").run()
    assert facts.teacher == f"{runs[0]}, {runs[1]}"
    assert capfd.readouterr().out.count("shown 32×32 pixels in 1 channels") == 2
    assert """'--teacher-args={"free_sweeps": 0}'""" in facts.command
    with pytest.raises(ValueError, match="TeacherEnsemble gives no features"):
        Trainer(**OPTIONS, **teaching, distill_features=1.0, output=tmp_path / "features").run()


def test_tensorboard_has_every_update_once_though_the_run_broke_off_and_was_resumed(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {**OPTIONS, "log_tensorboard": True, "checkpoint_interval": "3", "output": tmp_path}
    original = loop.TrainingLoop._update

    def broken(self, batches, stop):
        if self.updates == 5:
            raise RuntimeError("broken off")
        return original(self, batches, stop)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_update", broken)
        with pytest.raises(RuntimeError, match="broken off"):
            Trainer(**options).run()
    Trainer(**options, resume=True).run()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    tags = {"train/residual", "train/lr", "epoch/train_accuracy", "scaled_nudge/layer_01", "saturated/layer_04"}
    assert tags <= set(events.Tags()["scalars"])


def test_a_finished_run_does_not_fail_for_want_of_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "find_spec", lambda name: None if name == "matplotlib" else importlib.util.find_spec)
    Trainer(**{**OPTIONS, "quiet": False}, output=tmp_path).run()
    assert "no curves.png: matplotlib is not installed (pip install timm_ep[plots])" in capsys.readouterr().out
    assert (tmp_path / "results.json").exists()
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"val_split": 1.5}, r"val_split=1\.5 is no share"),
        ({"mixup": 0.2, "batch_size": 15}, "batch_size=15 is odd"),
        ({"checkpoint_interval": "soon"}, "checkpoint_interval='soon' is unknown; give updates, like 500, or seconds"),
        ({"checkpoint_interval": "-5"}, "checkpoint_interval='-5'"),
        ({"model_ema_decay": 1.0}, r"model_ema_decay=1\.0"),
        ({"distill_logits": 0.5}, "Distillation needs a teacher"),
        ({"teacher": "resnet18"}, "teacher=resnet18 has nothing to teach"),
        ({"teacher": ["a", "b"], "teacher_checkpoint": "c", "distill_logits": 1.0}, "teacher_checkpoint=c is of one"),
        ({"teacher": "x", "distill_logits": 1.0, "cache_teacher": True, "mixup": 0.1}, r"but mixup=0\.1 changes"),
        ({"teacher": "x", "distill_logits": 1.0, "cache_teacher": True, "augment": "crop"}, "but augment=crop changes"),
    ],
)
def test_bad_options_are_named_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_images": 10}, "10 training images are less than a batch of 16"),
        ({"grad_accum_steps": 9}, "128 training images are less than a batch of 144; lower batch_size or grad_accum"),
        ({"model_args": {"num_classes": 7}}, "model_args has num_classes=7, but the images of digits have 10"),
        ({"model_args": {"in_chans": 5}}, "in_chans=5, but images are seen in grey"),
        ({"model_args": {"in_chans": 1}, "in_chans": 3}, "model_args has in_chans=1, but the images of digits have 3"),
        ({"patience": 3}, "patience=3 needs images to judge by: set val_split"),
        ({"model": "test_resnet", "model_args": {}, "gradient": "bptt"}, "gradient=bptt chooses between"),
        ({"img_size": 8}, "too small: 4 poolings need at least 16×16"),
        ({"model": "no_such_model"}, "no_such_model"),
    ],
)
def test_model_and_images_are_checked_against_each_other_before_training(options, message, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=message):
        Trainer(**{**OPTIONS, **options}, output=tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_a_model_of_other_classes_is_refused(tmp_path, monkeypatch):
    """A registered model that ignores what it is asked for."""
    monkeypatch.setattr(
        assembly, "create_model", lambda *_: timm.create_model("test_resnet", num_classes=7, in_chans=1)
    )
    with pytest.raises(ValueError, match=r"gives \(1, 7\) for an image of 1 channels .* expected \(1, 10\)"):
        Trainer(**OPTIONS, output=tmp_path).run()


def test_the_schedule_of_local_errors_ends_with_the_training(tmp_path, monkeypatch):
    """At a learning rate of 0 every epoch has the same images and weights, and only the schedule changes the loss."""
    losses, forward = {}, LocalErrors.forward

    def watched(signal, states, target):
        loss = forward(signal, states, target)
        losses.setdefault(signal.progress, float(loss.detach()))
        return loss

    monkeypatch.setattr(LocalErrors, "forward", watched)
    options = {**OPTIONS, "train_images": 32, "batch_size": 32, "epochs": 3, "lr": 0.0}
    Trainer(**options, local_error=0.5, local_error_args={"final": 0.0}, output=tmp_path).run()
    first, *others = losses.values()
    assert first > 0.5
    assert others == [pytest.approx(first / 2, rel=1e-4), 0]


def test_options_without_effect_are_named(tmp_path, capsys):
    idle = {
        "clip_mode": "agc",
        "local_error_args": {"final": 0},
        "mixup_prob": 0.5,
        "sched": "none",
        "warmup_epochs": 3,
    }
    Trainer(**{**OPTIONS, "train_images": 16}, **idle, output=tmp_path).run()
    told = capsys.readouterr().err
    assert "without effect: local_error_args (without local_error), clip_mode (without clip_grad), " in told
    assert "mixup_prob (without mixup or cutmix), warmup_epochs (without a sched)" in told
    assert TrainingOptions(clip_mode="agc", clip_grad=0.1, mixup=0.2, mixup_prob=0.5).without_effect == []


def test_seconds_and_updates_between_checkpoints():
    assert TrainingOptions(checkpoint_interval="500").interval == (500, None)
    assert TrainingOptions(checkpoint_interval="1.5s").interval == (None, 1.5)
    assert TrainingOptions().interval == (None, None)
