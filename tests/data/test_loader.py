"""Training batches as a function of seed, epoch and position alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_ep.data.datasets import open_data
from timm_ep.data.loader import EpochOrder, Samples, training_loader
from timm_ep.data.transforms import augmentation, image_transform

SHAPE = {"size": 32, "mean": (0.5,), "std": (0.25,)}


def make_samples(seed=0, **options):
    data = open_data("digits").train
    return Samples(data, augmentation(**SHAPE, augment="flip-crop", **options), seed)


def batches(epoch, start=0, workers=0, seed=0, rank=0, world_size=1, batch_size=16, **options):
    options = {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5, "color_jitter": 0.3, **options}
    samples = Samples(open_data("digits").train, augmentation(**SHAPE, augment="rrc", **options), seed)
    order = EpochOrder(150, batch_size, seed, rank, world_size)
    order.epoch, order.start = epoch, start
    return list(training_loader(samples, order, workers))


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_neither_workers_nor_what_went_before_changes_a_batch():
    whole = batches(2)
    torch.manual_seed(99)
    np.random.seed(99)
    assert_equal(batches(2), whole)
    assert_equal(batches(2, workers=2), whole)
    assert_equal(batches(2, start=4), whole[4:])


def test_ranks_share_out_what_one_process_would_see():
    whole, parts = batches(1), [batches(1, rank=rank, world_size=2, batch_size=8) for rank in range(2)]
    assert_equal([[torch.cat(pair) for pair in zip(*each, strict=True)] for each in zip(*parts, strict=True)], whole)


def test_epochs_and_seeds_differ_in_order_and_augmentation():
    (first, _, indices), (_, _, other) = batches(0)[0], batches(1)[0]
    assert not torch.equal(indices, other)
    assert not torch.equal(indices, batches(0, seed=1)[0][2])
    samples = make_samples()
    assert not torch.equal(samples[0, 5][0], samples[1, 5][0])
    assert not torch.equal(samples[0, 5][0], make_samples(seed=1)[0, 5][0])
    assert first.shape == (16, 1, 32, 32)


def test_an_epoch_has_every_image_once_but_for_an_incomplete_update():
    order = EpochOrder(150, 16, 0, accumulate=2)
    indices = [index for batch in order for _, index in batch]
    assert (order.updates, len(order), len(indices), len(set(indices))) == (4, 8, 128, 128)
    order.start = 3
    assert [index for batch in order for _, index in batch] == indices[96:]


def test_persistent_workers_follow_the_order_from_epoch_to_epoch():
    samples, order = make_samples(), EpochOrder(64, 16, 0)
    loader = training_loader(samples, order, workers=1)
    for epoch in (0, 1, 5):
        order.epoch = epoch
        seen = [indices.tolist() for _, _, indices in loader]
        assert seen == [[index for _, index in batch] for batch in order]


@pytest.mark.parametrize("augment", ["crop", "flip-crop", "rrc"])
def test_augmentation_changes_images_and_none_does_not(augment):
    image = Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32))
    plain = image_transform(**SHAPE)(image)
    assert torch.allclose(augmentation(**SHAPE)(image), plain)
    assert any(not torch.equal(augmentation(**SHAPE, augment=augment)(image), plain) for _ in range(20))


@pytest.mark.parametrize(
    "options",
    [{"hflip": 1.0}, {"vflip": 1.0}, {"re_prob": 1.0}, {"color_jitter": 0.9}, {"auto_augment": "rand-m9-n5-p1.0"}],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmentation_of_timm_works_on_its_own_and_on_grey_images(options, channels):
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)[: 2 if channels == 1 else 3], dtype=np.uint8)
    shape = {"size": 32, "mean": (0.5,) * channels, "std": (0.25,) * channels}
    image = Image.fromarray(pixels)
    plain = image_transform(**shape)(image)
    changed = augmentation(**shape, **options)(image)
    assert changed.shape == (channels, 32, 32)
    assert not torch.equal(changed, plain)
    if "hflip" in options:
        assert torch.allclose(changed, plain.flip(2))


TRAINER = """
import multiprocessing, time
from test_loader import EpochOrder, make_samples, training_loader

if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    batches = iter(training_loader(make_samples(), EpochOrder(150, 16, 0), workers=2))
    next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_with_a_trainer_that_was_killed(method, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(method=method))
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **paths}, text=True) as trainer:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(runs, workers))
        trainer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(runs, workers))


def runs(pid):
    """Whether the process is there, and not only waits for somebody to take note of its end."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
