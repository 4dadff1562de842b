"""Checkpoints: written whole or not at all, checked when read, the one before kept."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from timm_ep.training.checkpoints import CheckpointStore, UnusableCheckpoint, load_checkpoint
from timm_ep.training.trainer import Trainer

SMALL = {"model_args": {"architecture": [8, "M", 8, "M", 8, "M", 8, "M"]}, "train_images": 64, "epochs": 1}


def state(value=0.0):
    return {"weights": torch.full((1000, 100), value), "rows": [{"loss": 1.5}], "name": "a"}


def test_what_is_saved_is_read_again_and_the_two_newest_stay(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in range(1, 5):
        store.save(state(float(step)), step, best=step == 2)
    assert [path.name for path in store.steps()] == ["step-000000004.pt", "step-000000003.pt"]
    path, newest, refused = store.newest()
    assert (path, refused) == (store.steps()[0], [])
    assert torch.equal(newest["weights"], state(4.0)["weights"])
    assert (newest["rows"], newest["name"]) == ([{"loss": 1.5}], "a")
    assert load_checkpoint(store.best)["weights"][0, 0] == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert CheckpointStore(tmp_path / "nothing").newest().path is None


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def one_bit_flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def another_format(path):
    save_file({"weights": torch.ones(3)}, path)


def of_another_training(path):
    torch.save({"state_dict": {"weight": torch.ones(3)}, "epoch": 3}, path)


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


def with_code_inside(path):
    torch.save({"format": "timm_ep training checkpoint 1", "weights": Code()}, path)


DAMAGES = [cut_off, empty, one_bit_flipped, another_format, of_another_training, with_code_inside]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_is_refused_with_the_reason_and_the_one_before_is_taken(damage, tmp_path, capsys):
    store = CheckpointStore(tmp_path)
    store.save(state(1.0), 1)
    damage(store.save(state(2.0), 2))
    path, newest, refused = store.newest()
    assert path.name == "step-000000001.pt"
    assert newest["weights"][0, 0] == 1
    assert len(refused) == 1
    assert str(tmp_path / "step-000000002.pt") in refused[0]
    damage(path)
    with pytest.raises(UnusableCheckpoint, match=r"no good one before\. Start anew"):
        store.newest()
    assert "never run" not in capsys.readouterr().out


def test_a_truncated_checkpoint_is_told_and_the_run_goes_on_from_the_one_before(tmp_path, capsys):
    options = {**SMALL, "batch_size": 16, "checkpoint_interval": "1", "output": tmp_path, "quiet": True}
    facts = Trainer(**options).run()
    cut_off(CheckpointStore(tmp_path / "checkpoints").steps()[0])
    again = Trainer(**options, resume=True).run()
    assert (again.top1, again.feedback_share) == (facts.top1, facts.feedback_share)
    told = capsys.readouterr().err
    assert "step-000000004.pt is cut off" in told
    assert "Going on from the one before" in told


@contextmanager
def room_of(size, folder):
    """Files can hold so many bytes: on a small file system where that can be mounted, else by the process's limit."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_stops_with_a_clear_error_and_earlier_files_are_intact(tmp_path):
    with room_of(1 << 20, tmp_path):
        store = CheckpointStore(tmp_path)
        first = store.save(state(1.0), 1)
        before = first.read_bytes()
        large = {"weights": torch.zeros(1000, 1000)}
        with pytest.raises(OSError, match=r"step-000000002.*(No space left|too large).*step-000000001\.pt is intact"):
            store.save(large, 2)
        assert os.listdir(tmp_path) == [first.name]
        assert first.read_bytes() == before
        assert store.newest().path == first


def test_a_run_on_a_full_disk_exits_with_the_reason_and_can_go_on(tmp_path):
    """The command line says what happened in one line; with room again the run goes on from what was intact."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from timm_ep import cli\n"
        "from timm_ep.training import checkpoints\n"
        "write = checkpoints.CheckpointStore._write\n"
        "def full(self, state, path):\n"
        "    if '00003' in path.name: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))\n"
        "    write(self, state, path)\n"
        "checkpoints.CheckpointStore._write = full\n"
        "import sys; cli.main(sys.argv[1:])"
    )
    options = ["--train-images=64", "--epochs=1", "--batch-size=16", "--checkpoint-interval=1", "--quiet"]
    options += ['--model-args={"architecture": [8, "M", 8, "M", 8, "M", 8, "M"]}', f"--output={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", code, "train", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "step-000000002.pt is intact. Make room, and go on with --resume." in done.stderr.splitlines()[-1]
    assert len(CheckpointStore(tmp_path / "checkpoints").steps()) == 2
    changes = {"batch_size": 16, "checkpoint_interval": "1", "output": tmp_path, "resume": True, "quiet": True}
    assert Trainer(**{**SMALL, **changes}).run().epochs == 1
