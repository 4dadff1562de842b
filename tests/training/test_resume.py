"""Runs that are killed and resumed against one that was not: bit for bit the same."""

import csv
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_ep.training import checkpoints, loop, trainer
from timm_ep.training.checkpoints import CheckpointStore, load_checkpoint
from timm_ep.training.evaluate import Evaluation
from timm_ep.training.trainer import Trainer

# A server that has imported the package once and forks: a process costs milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["timm_ep.training.trainer", "sklearn.datasets", "sklearn.model_selection", "matplotlib.figure"]
)

# All whose state could be lost: dropout, augmentation, mixing, signals, averaged weights, accumulation, best epoch.
OPTIONS = {
    "model_args": {"architecture": [8, "M", 8, "M", 12, "M", 12, "M"], "drop_rate": 0.1},
    "train_images": 200,
    "val_split": 0.2,
    "epochs": 3,
    "batch_size": 16,
    "grad_accum_steps": 2,
    "local_error": 0.3,
    "local_error_args": {"final": 0.5},
    "model_ema": True,
    "model_ema_decay": 0.9,
    "mixup": 0.2,
    "cutmix": 0.5,
    "smoothing": 0.1,
    "augment": "flip-crop",
    "aa": "rand-m5",
    "reprob": 0.3,
    "clip_grad": 0.05,
    "clip_mode": "agc",
    "residual_interval": 4,
    "checkpoint_interval": "2",
    "quiet": True,
}
UPDATES = 5  # of an epoch


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(owner, name, count, act=die):
    """Let the call number `count` (from 1) of `owner.name` be preceded by `act`."""
    original, calls = getattr(owner, name), itertools.count(1)

    def patched(*args, **kwargs):
        if next(calls) == count:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def half_written(count):
    """The checkpoint number `count` is cut off in mid-write."""
    original, calls = torch.save, itertools.count(1)

    def patched(state, file):
        if next(calls) == count:
            original(state, file)
            file.truncate(file.tell() // 2)
            file.flush()
            die()
        original(state, file)

    checkpoints.torch.save = patched


# Where in the run SIGKILL strikes. The run's checkpoints: after updates 2, 4, 5 (epoch 1), 6, 8, 10, 12, 14, 15.
KILLS = {
    "before the first checkpoint": lambda: before_call(loop.TrainingLoop, "_update", 2),
    "in mid-epoch after a checkpoint": lambda: before_call(loop.TrainingLoop, "_update", 9),
    "in mid-epoch between checkpoints": lambda: before_call(loop.TrainingLoop, "_update", 8),
    "in mid-update": lambda: before_call(loop.TrainingLoop, "_backward", 14),
    "in the optimizer's step": lambda: before_call(torch.optim.AdamW, "step", 7),
    "half a checkpoint written": lambda: half_written(3),
    "the newest written, not yet as the best too": lambda: before_call(checkpoints.CheckpointStore, "_write", 4),
    "a checkpoint written, not yet renamed": lambda: before_call(os, "replace", 6),
    "a checkpoint renamed, the older still there": lambda: before_call(Path, "unlink", 9),
    "the epoch trained, not yet validated": lambda: before_call(loop.TrainingLoop, "_end_epoch", 2),
    "validated, not yet saved": lambda: before_call(loop.TrainingLoop, "_save", 6),
    "trained, not yet tested": lambda: before_call(trainer.Trainer, "_finish", 1),
    "tested, the model not yet saved": lambda: before_call(trainer, "save", 1),
}


def train(output, kill=None, **options):
    """In a process of its own: train, noting what each update saw, and what the generators are at the end."""
    torch.set_num_threads(1)
    if kill:
        KILLS[kill]()
    original = loop.TrainingLoop._update

    def noting(self, batches, stop):
        seen = [[indices.tolist(), images.double().sum().item()] for images, _, indices in batches]
        with (output / "seen.jsonl").open("a") as file:
            file.write(json.dumps([self.progress.epoch, self.progress.update, seen]) + "\n")
        return original(self, batches, stop)

    finish = Trainer._finish

    def trained(self, *args):  # what comes after is seeded by itself
        generators = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
        (output / "generators.json").write_text(json.dumps(generators))
        return finish(self, *args)

    loop.TrainingLoop._update, Trainer._finish = noting, trained
    Trainer(output=output, **{**OPTIONS, **options}).run()


def in_process(*args, **kwargs):
    """The exit code of `train`; minus the signal that ended it."""
    process = processes.Process(target=train, args=args, kwargs=kwargs)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def final_state(output):
    newest = CheckpointStore(output / "checkpoints").newest()
    state = newest.state
    progress = state["progress"]
    for record in (progress, *progress["rows"]):  # wall-clock time is all that may differ
        for name in ("seconds", "epoch_seconds", "images_per_second"):
            record.pop(name, None)
    state["options"] = {k: v for k, v in state["options"].items() if k not in ("output", "resume", "workers")}
    return state


def assert_same(ours, theirs, path=""):
    assert type(ours) is type(theirs), path
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            assert_same(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), path
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), path
    else:
        assert ours == theirs, path


def seen(output):
    """What each update saw, (epoch, update) → indices and sums of the augmented images; repeats must agree."""
    result = {}
    for line in (output / "seen.jsonl").read_text().splitlines():
        epoch, update, batches = json.loads(line)
        assert result.setdefault((epoch, update), batches) == batches
    return result


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    assert in_process(output) == 0
    return output


def assert_as_if_unbroken(output, unbroken, trained=True):
    assert_same(final_state(output), final_state(unbroken))
    assert seen(output) == seen(unbroken)
    # A start that had nothing left to train has had no use for the generators.
    for name in ("config.json", "model.safetensors", *(["generators.json"] if trained else [])):
        assert (output / name).read_bytes() == (unbroken / name).read_bytes(), name
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (output, unbroken))
    assert (ours["top1"], ours["feedback_share"]) == (theirs["top1"], theirs["feedback_share"])


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_a_run_killed_and_resumed_is_bit_for_bit_the_run_never_killed(kill, unbroken, tmp_path):
    """Weights and their average, signals, optimizer, schedule, generators, order, augmentation, metrics, result."""
    assert in_process(tmp_path, kill) == -signal.SIGKILL
    assert not (tmp_path / "results.json").exists()
    assert in_process(tmp_path, resume=True) == 0
    assert_as_if_unbroken(tmp_path, unbroken, trained="tested" not in kill)
    assert not list((tmp_path / "checkpoints").glob(".*"))  # what was half-written is gone


@pytest.mark.slow
def test_a_run_killed_from_outside_again_and_again_with_workers_is_the_same_too(unbroken, tmp_path):
    """At moments that nobody chose; with worker processes, and without in between."""
    moments, codes = random.Random(time.time_ns()), []
    for workers in (2, 0, 1):
        before = updates_seen(tmp_path)
        process = processes.Process(target=train, args=(tmp_path,), kwargs={"resume": True, "workers": workers})
        process.start()
        deadline = time.monotonic() + 60
        while updates_seen(tmp_path) < before + 2 and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join(60)
        codes.append(process.exitcode)
    # Two of 15 updates in, the first is killed for certain; on a quick machine a later one may have reached the end.
    assert codes[0] == -signal.SIGKILL
    assert set(codes) <= {0, -signal.SIGKILL}
    before = updates_seen(tmp_path)
    assert in_process(tmp_path, resume=True) == 0
    # On a quick machine the last kill can come after the last update.
    assert_as_if_unbroken(tmp_path, unbroken, trained=updates_seen(tmp_path) > before)


def updates_seen(output):
    path = output / "seen.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_update_with_a_checkpoint_and_its_code(number, code, unbroken, tmp_path):
    process = processes.Process(target=train, args=(tmp_path,), kwargs={"checkpoint_interval": None})
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "seen.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    assert load_checkpoint(CheckpointStore(tmp_path / "checkpoints").steps()[0])["progress"]["update"] > 0
    assert in_process(tmp_path, resume=True) == 0
    assert_as_if_unbroken(tmp_path, unbroken)


def options_of(tmp_path, **changes):
    small = {"local_error": 0.0, "aa": None, "model_ema": False, "epochs": 1, "output": tmp_path}
    kept = {name: value for name, value in OPTIONS.items() if name not in ("local_error_args", "model_ema_decay")}
    return {**kept, **small, **changes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    Trainer(**options_of(output)).run()
    return output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.1}, r"lr: 0\.002 → 0\.1"),
        ({"mixup": 0.0, "seed": 5}, r"mixup: 0\.2 → 0\.0; seed: 0 → 5"),
        ({"model_args": {"free_sweeps": 3}}, "model_args"),
        ({"train_images": 190}, "train_images: 200 → 190"),
        ({"batch_size": 8}, "batch_size: 16 → 8"),
    ],
)
def test_a_run_is_not_resumed_as_another(changes, message, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        Trainer(**options_of(finished, **changes, resume=True)).run()
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_a_teacher_that_was_trained_again_ends_the_run(tmp_path):
    """It would be one of neither; so would one of a start that is gone, of which the message says why it is needed."""
    small = {"train_images": 64, "epochs": 1, "batch_size": 32, "quiet": True, "model_args": OPTIONS["model_args"]}
    teacher = tmp_path / "teacher"
    Trainer(**small, output=teacher).run()
    options = {**small, "teacher": str(teacher), "distill_logits": 0.5, "output": tmp_path / "run"}
    Trainer(**options, initial_checkpoint=teacher).run()
    Trainer(**options, initial_checkpoint=teacher, resume=True).run()
    Trainer(**{**small, "seed": 1}, output=teacher, overwrite=True).run()
    with pytest.raises(ValueError, match=r"cannot be resumed: the teacher .* has other weights than when it began"):
        Trainer(**options, initial_checkpoint=teacher, resume=True).run()
    teacher.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="is gone; resuming needs its configuration"):
        Trainer(**options, initial_checkpoint=teacher, resume=True).run()


def test_a_run_is_not_overwritten_unasked(finished, tmp_path):
    with pytest.raises(FileExistsError, match=r"holds a run already.*--resume.*--overwrite"):
        Trainer(**options_of(finished)).run()
    Trainer(**options_of(tmp_path)).run()
    with pytest.raises(ValueError, match="num_classes=7"):
        Trainer(**options_of(tmp_path, model_args={"num_classes": 7}, overwrite=True)).run()
    assert (tmp_path / "results.json").exists()  # what cannot start discards nothing
    (tmp_path / "twin.json").write_text("of the run that is discarded")
    (tmp_path / "README.md").write_text("whose it is nobody knows")
    kept = {
        "README.md",
        "checkpoints",
        "args.yaml",
        "config.json",
        "model.safetensors",
        "results.json",
        "summary.csv",
        "layers.csv",
    }
    Trainer(**options_of(tmp_path, lr=0.1, overwrite=True)).run()
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "settling.csv", "curves.png", ".lock"}
    assert load_checkpoint(CheckpointStore(tmp_path / "checkpoints").steps()[0])["options"]["lr"] == 0.1
    with pytest.raises(ValueError, match="choose one"):
        Trainer(resume=True, overwrite=True)


def test_a_finished_run_says_its_result_again_and_takes_more_epochs_with_a_warning(tmp_path, capsys):
    facts = Trainer(**options_of(tmp_path, resume=True)).run()  # resume of nothing is a start
    assert Trainer(**options_of(tmp_path, resume=True)).run().top1 == facts.top1
    assert "warning" not in capsys.readouterr().err
    more = Trainer(**options_of(tmp_path, resume=True, epochs=2)).run()
    assert more.epochs == 2
    assert "epochs: 1 → 2" in capsys.readouterr().err
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 3


def stopped_by(number, at):
    """SIGTERM or Ctrl-C noted by the time of the update number `at`, or after the last one."""
    original, calls = loop.TrainingLoop._update, itertools.count(1)

    def patched(self, batches, stop):
        return original(self, batches, number if next(calls) == at else stop)

    return patched


def test_a_finished_run_that_is_stopped_on_its_way_to_more_epochs_stays_finished(tmp_path, monkeypatch):
    """Facts of some weights beside others would be published together."""
    Trainer(**options_of(tmp_path)).run()
    names = ("results.json", "model.safetensors", "config.json")
    before = [(tmp_path / name).read_bytes() for name in names]
    with monkeypatch.context() as patched:
        patched.setattr(loop.TrainingLoop, "_update", stopped_by(15, 2))
        with pytest.raises(SystemExit):
            Trainer(**options_of(tmp_path, resume=True, epochs=2)).run()
    assert before == [(tmp_path / name).read_bytes() for name in names]
    assert Trainer(**options_of(tmp_path, resume=True, epochs=2)).run().epochs == 2
    assert before != [(tmp_path / name).read_bytes() for name in names]


def test_a_signal_during_the_last_validation_stops_the_run_too(tmp_path, monkeypatch):
    original = loop.TrainingLoop._end_epoch

    def signalled(self):
        os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    with monkeypatch.context() as patched:
        patched.setattr(loop.TrainingLoop, "_end_epoch", signalled)
        with pytest.raises(SystemExit) as stopped:
            Trainer(**options_of(tmp_path)).run()
    assert stopped.value.code == 143
    assert not (tmp_path / "results.json").exists()
    assert Trainer(**options_of(tmp_path, resume=True)).run().epochs == 1


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["results.json", "model.safetensors"])
def test_a_model_without_checkpoints_is_not_trained_over(name, resume, tmp_path):
    (tmp_path / name).write_text("of a run whose checkpoints are gone, or of a model that was pulled")
    with pytest.raises(FileExistsError, match="no checkpoints to go on from: choose another --output"):
        Trainer(**options_of(tmp_path, resume=resume)).run()
    assert (tmp_path / name).read_text().startswith("of a run")


def test_what_others_wrote_is_neither_replaced_nor_discarded(tmp_path):
    """Files in the output folder that have the names of a run's, of timm's training for example."""
    for name, text in {
        "args.yaml": "model: resnet18\n",
        "summary.csv": "epoch\n",
        "config.json": "{}",
        "curves.png": "mine",
    }.items():
        (tmp_path / name).write_text(text)
        for resume in (False, True):
            with pytest.raises(FileExistsError, match=f"holds {name}, which a run would replace, and which no run"):
                Trainer(**options_of(tmp_path, resume=resume)).run()
        assert (tmp_path / name).read_text() == text
        (tmp_path / name).unlink()
    others = [tmp_path / "checkpoints" / "mine.ckpt", tmp_path / "tensorboard" / "mine.txt"]
    for path in others:
        path.parent.mkdir()
        path.write_text("mine")
    Trainer(**options_of(tmp_path)).save(tmp_path / "args.yaml")  # of a run that was killed before its first checkpoint
    (tmp_path / "summary.csv").write_text("epoch\n")
    Trainer(**options_of(tmp_path)).run()
    Trainer(**options_of(tmp_path, lr=0.1, overwrite=True)).run()
    assert [path.read_text() for path in others] == ["mine", "mine"]
    left = CheckpointStore(tmp_path / "checkpoints").steps()
    assert {load_checkpoint(checkpoint)["options"]["lr"] for checkpoint in left} == {0.1}


def test_a_run_that_stopped_early_takes_more_patience_and_no_other_images(tmp_path):
    first = Trainer(**options_of(tmp_path, val_split=0.2, patience=1, lr=1e-30, epochs=4)).run()
    assert first.epochs < 4  # nothing improves
    more = Trainer(**options_of(tmp_path, val_split=0.2, patience=2, lr=1e-30, epochs=4, resume=True)).run()
    assert more.epochs == first.epochs + 1
    (path, *_) = CheckpointStore(tmp_path / "checkpoints").steps()
    state = load_checkpoint(path)
    for name, message in {"validation_images": "validation images: 7 → ", "labels": "the labels of the images"}.items():
        changed = {**state["identity"], name: 7}
        CheckpointStore(tmp_path / "checkpoints").save({**state, "identity": changed}, 999)
        with pytest.raises(ValueError, match=message):
            Trainer(**options_of(tmp_path, val_split=0.2, patience=2, lr=1e-30, epochs=4, resume=True)).run()


def test_a_start_is_not_discarded(tmp_path):
    for start in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match="overwrite would discard initial_checkpoint="):
            Trainer(output=tmp_path, initial_checkpoint=start, overwrite=True)
    for teacher in (str(tmp_path), ["resnet18", f"local-dir:{tmp_path}"]):
        with pytest.raises(ValueError, match=r"overwrite would discard teacher=.*; choose another output"):
            Trainer(output=tmp_path, teacher=teacher, distill_logits=1.0, overwrite=True)
    with pytest.raises(ValueError, match="overwrite would discard model=local-dir:"):
        Trainer(output=tmp_path, model=f"local-dir:{tmp_path}", pretrained=True, overwrite=True)
    Trainer(output=tmp_path, teacher="resnet18", distill_logits=1.0, overwrite=True)


def test_a_best_checkpoint_of_others_is_not_replaced(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds checkpoints/best\.pt, .*no run of this package wrote"):
        Trainer(**options_of(tmp_path)).run()
    assert (tmp_path / "checkpoints" / "best.pt").read_text() == "mine"


def test_a_run_whose_start_has_changed_is_not_gone_on_with(tmp_path, monkeypatch):
    """The settings are those of the folder that it started from, where the options do not say."""
    args = OPTIONS["model_args"]
    start = {**options_of(tmp_path / "start"), "train_images": 64}
    Trainer(**start).run()
    options = options_of(tmp_path / "run", initial_checkpoint=tmp_path / "start")
    with monkeypatch.context() as patched:
        patched.setattr(loop.TrainingLoop, "_update", stopped_by(15, 2))
        with pytest.raises(SystemExit):
            Trainer(**options).run()
    Trainer(**{**start, "overwrite": True, "model_args": {**args, "feedback": 0.5}, "mean": [0.25]}).run()
    with pytest.raises(ValueError, match=r"feedback: 0\.02 → 0\.5, of what it starts from; mean: .* → \[0\.25\]"):
        Trainer(**options, resume=True).run()
    Trainer(**{**start, "overwrite": True}).run()
    Trainer(**options, resume=True).run()


def test_a_card_of_before_is_told(tmp_path, capsys):
    Trainer(**options_of(tmp_path)).run()
    (tmp_path / "README.md").write_text("a card")
    Trainer(**options_of(tmp_path, overwrite=True)).run()
    assert "README.md is of what was here before; write one by: timm-ep card" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "a card"


def test_the_best_is_what_its_checkpoint_says(tmp_path):
    def saved(epoch, best_epoch, update=0):
        progress = {"epoch": epoch, "update": update, "best_epoch": best_epoch, "best": (50.0 + best_epoch, 1.0)}
        return {"progress": progress}

    store = CheckpointStore(tmp_path)
    store.save(saved(1, 1), 5, best=True)
    assert store.repair_best(saved(2, 1)) == saved(1, 1)["progress"]
    # Killed before the second was written as the best: it is written now.
    assert store.repair_best(saved(2, 2)) == saved(2, 2)["progress"]
    assert load_checkpoint(store.best)["progress"] == saved(2, 2)["progress"]
    # The newest is damaged, and the run goes on from an earlier one: the best is one that it has yet to reach again.
    assert store.repair_best(saved(1, 1, update=3)) == saved(2, 2)["progress"]
    assert store.repair_best(saved(1, 1)) == saved(2, 2)["progress"]
    # No validation, no best.
    assert store.repair_best(saved(1, 0))["best_epoch"] == 0
    store.best.write_text("damaged")
    assert store.repair_best(saved(3, 2))["best_epoch"] == 0
    assert store.repair_best(saved(2, 2)) == saved(2, 2)["progress"]
    assert load_checkpoint(store.best)["progress"] == saved(2, 2)["progress"]


@pytest.mark.parametrize("patience", [0, 2])
def test_a_run_whose_best_checkpoint_is_damaged_can_be_ended(patience, tmp_path, monkeypatch, capsys):
    """The best is then chosen among the epochs to come: here that which begins again, as validation gets ever worse."""
    accuracies = itertools.count(90, -1)
    worse = lambda *args: Evaluation(1.0, next(accuracies), None, [])  # noqa: E731
    options = {**options_of(tmp_path), "patience": patience, "resume": True}
    monkeypatch.setattr(loop, "evaluate", worse)
    Trainer(**{**options, "epochs": 2}).run()
    (tmp_path / "checkpoints" / "best.pt").write_bytes(b"damaged")
    Trainer(**{**options, "epochs": 2}).run()
    assert "best.pt cannot be read: the best is chosen anew" in capsys.readouterr().err
    Trainer(**{**options, "epochs": 4}).run()
    assert CheckpointStore(tmp_path / "checkpoints").newest().state["progress"]["epoch"] == 4
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt")["progress"]["best_epoch"] == 3


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".model-abc").mkdir()
    (tmp_path / ".model-abc" / "model.safetensors").write_text("half")
    for name in ("model-abcd_123.safetensors", "config-abcd1234.json", "summary-12345678.csv", "args-abcdefgh.yaml"):
        (tmp_path / f".{name}").write_text("half")
    others = {".config-mine.json", ".notes-12345678.csv", ".config-abcd1234.yaml"}
    for name in others:
        (tmp_path / name).write_text("not of a run")
    Trainer(**options_of(tmp_path)).run()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == {*others, ".lock"}


def test_validation_on_a_noisy_device_does_not_depend_on_the_kill(tmp_path, monkeypatch):
    noisy = {"val_split": 0.2, "model_args": {**OPTIONS["model_args"], "state_noise": 0.3}}
    Trainer(**options_of(tmp_path / "unbroken", **noisy)).run()
    with monkeypatch.context() as patched:
        patched.setattr(loop.TrainingLoop, "_update", stopped_by(15, UPDATES))
        with pytest.raises(SystemExit):
            Trainer(**options_of(tmp_path / "broken", **noisy)).run()
    Trainer(**options_of(tmp_path / "broken", **noisy, resume=True)).run()
    rows = []
    for name in ("unbroken", "broken"):
        with (tmp_path / name / "summary.csv").open() as file:
            (row,) = csv.DictReader(file)
        rows.append({name: value for name, value in row.items() if name not in ("seconds", "images_per_second")})
    assert rows[0] == rows[1]
