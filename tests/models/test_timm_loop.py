"""The models in timm's own training loop: its task, optimizers, schedulers, EMA, mixup, clipping and scaler."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler, accuracy, dispatch_clip_grad
from torch.utils.data import DataLoader

from timm_ep.data.datasets import open_data
from timm_ep.data.transforms import image_transform
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.task import EpTask

ACCUMULATE = 2


def create(task_kind):
    torch.manual_seed(0)
    # Small, as bfloat16 takes fifty times as long on a CPU without instructions for it.
    model = timm.create_model("ep_vgg5_025", num_classes=10, in_chans=1, architecture=[16, "M", 32, "M"])
    if task_kind is ClassificationTask:
        return ClassificationTask(model, criterion_kwargs={"soft_targets": True}, verbose=False)
    return EpTask(model, LocalErrors(model, 0.1), criterion_kwargs={"soft_targets": True})


@pytest.mark.parametrize(
    ("task_kind", "extra"),
    [(ClassificationTask, "plain"), (ClassificationTask, "compiled"), (EpTask, "compiled"), (EpTask, "scaled")],
)
def test_a_plain_loop_of_timms_parts_learns(task_kind, extra):
    """bf16 autocast, EMA, mixup, AGC, accumulation; also compiled by the eager backend, and with a loss scaler."""
    data = open_data("digits")
    data.train.transform = data.test.transform = image_transform(8, (0.45,), (0.225,))
    loader = DataLoader(data.train, 16)
    task = create(task_kind)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-2, weight_decay=0.05)
    task.setup_ema(decay=0.8)
    scaler = NativeScaler("cpu") if extra == "scaled" else None
    if extra == "compiled":
        task.compile(backend="eager")
    updates = len(loader) // ACCUMULATE
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=1, step_on_epochs=False, updates_per_epoch=updates)
    mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=0.0, label_smoothing=0.1, num_classes=10)
    task.train()
    step, losses = 0, []
    for number, (images, labels) in enumerate(loader):
        if len(images) % 2:
            continue
        images, target = mixup(images, labels)
        update = (number + 1) % ACCUMULATE == 0
        with nullcontext() if update else task.no_sync():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = task(images, target)
            loss = result["loss"] / ACCUMULATE
            if scaler is not None:
                parameters = task.get_clip_parameters(exclude_head=True)
                scaler(loss, optimizer, 0.1, "agc", parameters, need_update=update)
            else:
                loss.backward()
                if update:
                    dispatch_clip_grad(task.get_clip_parameters(exclude_head=True), 0.1, mode="agc")
                    optimizer.step()
        losses.append(result["output"].float().log_softmax(1).mul(target).sum(1).mean().neg().item())
        if update:
            optimizer.zero_grad()
            step += 1
            task.update_ema(step)
            scheduler.step_update(step)
    assert epochs == 1
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    images, labels = next(iter(DataLoader(data.test, 360)))
    for ema in (False, True):
        model = task.get_eval_model(ema=ema).eval()
        with torch.no_grad():
            assert accuracy(model(images), labels)[0] > 30  # chance is 10
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    fresh = create(task_kind)
    fresh.load_checkpoint_state(state["state_dict"], state.get("task_state"))
    with torch.no_grad():
        model = task.get_eval_model().eval()
        assert torch.equal(fresh.get_eval_model().eval()(images), model(images))


SCRIPT = """
import argparse, sys
import timm, torch
parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--num-classes", type=int)
args = parser.parse_args()
import beside
model = timm.create_model(args.model, num_classes=args.num_classes)
if __name__ == "__main__":
    print(type(model).__name__, tuple(model(torch.zeros(1, 3, 32, 32)).shape), beside.VALUE, sys.argv[0])
"""


def test_timms_scripts_run_unmodified(tmp_path):
    """A script that knows nothing of this package creates its models, and finds the files beside it."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("VALUE = 7")
    words = [str(script), "--model", "ep_vgg5_025", "--num-classes", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "timm_ep", "run", *words], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split("\n")[0] == f"EpVgg (1, 4) 7 {script}"
