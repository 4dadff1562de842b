"""Several processes are one with a batch as large as theirs together: gradients, weights, checkpoints, interruption."""

import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_resume import assert_same, final_state, train, updates_seen
from torch.testing import assert_close

from conftest import make_batch, make_net
from timm_ep.data.loader import EpochOrder
from timm_ep.hub.cards import RunFacts
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.task import EpTask
from timm_ep.training import loop
from timm_ep.training.distributed import World, join_world
from timm_ep.training.trainer import Trainer

processes = multiprocessing.get_context("forkserver")


def start(target, *args, size=2, **kwargs):
    """Start `target` in as many processes as torchrun would, with the environment that it would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [processes.Process(target=as_rank, args=(rank, size, port, target, args, kwargs)) for rank in range(size)]
    for process in ranks:
        process.start()
    return ranks


def as_rank(rank, size, port, target, args, kwargs):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    target(*args, **kwargs)


def codes(ranks):
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def gradients(path=None, count=1, weight=0.3, gradient="ep"):
    """Gradients of net and local errors on this process's share of 16 images, in `count` accumulated batches."""
    with join_world("cpu") as world:
        settings = {"feedback": 0.5, "beta": 0.1, "nudged_sweeps": 3, "gradient": gradient}
        model, (images, labels) = make_net(4, 0.5, **settings), make_batch(batch=16)
        torch.manual_seed(3)
        layers = [3, 4] if gradient == "local" else None
        task = EpTask(model, LocalErrors(model, weight, layers=layers))
        if world.size > 1:
            task.prepare_distributed()
        mine = slice(world.rank, None, world.size)
        shares = list(zip(images[mine].chunk(count), labels[mine].chunk(count), strict=True))
        for batch, target in shares[:-1]:
            with task.no_sync():
                (task(batch, target)["loss"] / count).backward()
        (task(*shares[-1])["loss"] / count).backward()
        result = {name: p.grad for name, p in [*model.named_parameters(), *task.signals.named_parameters()]}
        if path is not None and world.primary:
            torch.save(result, path)
        return result


@pytest.mark.parametrize("count", [1, 2])
def test_two_processes_give_the_gradient_of_one_with_the_whole_batch(count, tmp_path):
    """Float64, to 1e-10, at a nudging strength far from its limit; accumulated batches too."""
    assert codes(start(gradients, tmp_path / "grads.pt", count)) == [0, 0]
    theirs, ours = torch.load(tmp_path / "grads.pt"), gradients()
    assert_close(theirs, ours, rtol=1e-10, atol=1e-12)
    assert len(ours) > 15
    for name, grad in ours.items():
        assert grad.abs().max() > 0, name


def test_classifiers_without_a_weight_do_not_hold_up_the_others(tmp_path):
    """Their gradients never come, and DDP is not to wait for them."""
    weight = [0.3, 0.0, 0.3, 0.0]
    assert codes(start(gradients, tmp_path / "grads.pt", 2, weight)) == [0, 0]
    theirs, ours = torch.load(tmp_path / "grads.pt"), gradients(count=2, weight=weight)
    without = {f"local_error.classifiers.{index}.{name}" for index in (1, 3) for name in ("weight", "bias")}
    assert {name for name, grad in ours.items() if grad is None} == without
    assert_close(theirs, ours, rtol=1e-10, atol=1e-12)


def test_layers_that_nothing_teaches_do_not_hold_up_the_others_either(tmp_path):
    assert codes(start(gradients, tmp_path / "grads.pt", gradient="local")) == [0, 0]
    theirs, ours = torch.load(tmp_path / "grads.pt"), gradients(gradient="local")
    assert ours["layers.0.weight"] is None
    assert_close(theirs, ours, rtol=1e-10, atol=1e-12)


def test_two_processes_have_the_weights_of_one_after_twenty_steps_in_float64(tmp_path):
    assert codes(start(weights, tmp_path / "weights.pt")) == [0, 0]
    assert_close(torch.load(tmp_path / "weights.pt"), weights(), rtol=1e-8, atol=1e-10)


def weights(path=None):
    """Of a net after 20 steps on this process's share of 8 images."""
    with join_world("cpu") as world:
        model = make_net(4, 0.5, feedback=0.5, beta=0.1, nudged_sweeps=3)
        task = EpTask(model)
        if world.size > 1:
            task.prepare_distributed()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
        for step in range(20):
            images, labels = make_batch(batch=8, seed=step)
            mine = slice(world.rank, None, world.size)
            optimizer.zero_grad()
            task(images[mine], labels[mine])["loss"].backward()
            optimizer.step()
        if path is not None and world.primary:
            torch.save(model.state_dict(), path)
        return model.state_dict()


def test_ranks_share_out_the_batches_of_one_process():
    whole, halves = EpochOrder(100, 16, 7), [EpochOrder(100, 8, 7, rank, 2) for rank in range(2)]
    for order in (whole, *halves):
        order.epoch, order.start = 3, 2
    joined = [first + second for first, second in zip(*halves, strict=True)]
    assert list(whole) == joined
    assert len(joined) == 4


@pytest.mark.slow
def test_torchrun_trains_as_one_process_and_only_the_first_rank_talks(tmp_path):
    """2 × 32 images against 1 × 64: 20 updates, the same weights within float32 rounding."""
    options = {"train_images": 640, "epochs": 2, "augment": "crop", "local_error": 0.3, "opt": "sgd", "lr": 0.005}
    words = [f"--{name}={value}" for name, value in options.items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "timm_ep", "train"]
    done = subprocess.run(
        [sys.executable, *launcher, *words, "--batch-size", "32", "--output", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "find_unused_parameters" not in done.stderr  # DDP's warning that it looked for them in vain
    assert [len(re.findall(text, done.stdout)) for text in ("epoch 1/2", "accuracy: ")] == [1, 1]
    facts = Trainer(**options, batch_size=64, output=tmp_path / "one", quiet=True).run()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.manual_seed(0)
    start = timm.create_model("ep_vgg5_025", num_classes=10, in_chans=1).state_dict()
    assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    for name, weight in ours.items():
        moved = (weight - start[name]).norm()
        assert (theirs[name] - weight).norm() < 0.01 * moved, name  # which is not for want of learning
        assert moved > 1e-4, name
    assert f"accuracy: {facts.top1:.2f} %" in done.stdout.splitlines()[-1]
    both = RunFacts.load(tmp_path / "two" / "results.json")
    assert both.command.startswith("torchrun --nproc-per-node 2 -m timm_ep train --")
    assert both.machine.endswith("CPU, 1 thread in each of 2 processes")


def test_a_training_says_what_started_it(monkeypatch):
    cpu = torch.device("cpu")
    assert World(cpu).launcher == ["timm-ep"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert World(cpu, 0, 8).launcher == ["torchrun", "--nnodes", "2", "--nproc-per-node", "4", "-m", "timm_ep"]
    assert World(cpu).machine.endswith(f"CPU, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Name of {device}")
    assert World(torch.device("cuda:1"), 1, 8).machine == "8 × Name of cuda:1"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    assert codes(start(train, output, **TWO)) == [0, 0]
    return output


TWO = {"batch_size": 8, "epochs": 2}


def assert_as_if_unbroken(output, unbroken):
    assert_same(final_state(output), final_state(unbroken))
    assert (output / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_of_two_processes_that_are_killed_is_resumed_bit_for_bit(unbroken, tmp_path):
    ranks = start(train, tmp_path, "in mid-epoch between checkpoints", **TWO)
    ranks[0].join(120)
    assert ranks[0].exitcode == -signal.SIGKILL
    ranks[1].kill()
    ranks[1].join(60)
    assert codes(start(train, tmp_path, resume=True, **TWO)) == [0, 0]
    assert_as_if_unbroken(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_process_stops_all_at_the_same_update(rank, unbroken, tmp_path):
    ranks = start(train, tmp_path, checkpoint_interval=None, **TWO)
    deadline = time.monotonic() + 60
    while updates_seen(tmp_path) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(ranks[rank].pid, signal.SIGTERM)
    assert codes(ranks) == [143, 143]
    assert codes(start(train, tmp_path, resume=True, **TWO)) == [0, 0]
    assert_as_if_unbroken(tmp_path, unbroken)


def test_other_processes_are_refused_unless_an_update_has_the_same_images(unbroken, capsys):
    options = {**TWO, "output": unbroken, "resume": True}
    from test_resume import OPTIONS

    with pytest.raises(ValueError, match="processes: 2 → 1"):
        Trainer(**{**OPTIONS, **options}).run()
    Trainer(**{**OPTIONS, **options, "batch_size": 16}).run()


def test_an_absent_device_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="device=cuda is not available"):
        Trainer(device="cuda").run()


def train_with_a_late_signal(output, **options):
    """SIGTERM to the second process alone, once the last update is made."""
    original = loop.TrainingLoop._end_epoch

    def signalled(self):
        if self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    loop.TrainingLoop._end_epoch = signalled
    train(output, **options)


@pytest.mark.slow
def test_a_signal_during_the_last_validation_stops_all_processes(tmp_path):
    options = {**TWO, "epochs": 1}
    assert codes(start(train_with_a_late_signal, tmp_path, **options)) == [143, 143]
    assert codes(start(train, tmp_path, resume=True, **options)) == [0, 0]


@pytest.mark.slow
def test_checkpoints_that_are_all_damaged_end_every_process(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*.pt"):
        path.write_text("damaged")
    assert codes(start(train, tmp_path / "run", resume=True, **TWO)) == [1, 1]
