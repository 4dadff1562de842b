"""Runs as training leaves them, with random weights."""

import dataclasses
import io
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save
from timm.models import save_for_hf

from timm_ep.hub.cards import RunFacts

SETTINGS = {"feedback": 0.37, "free_sweeps": 7, "nudging": "centered", "beta": 0.002}
LABELS = ["ant", "bee", "<b>cat</b>", "dög"]


def make_facts(**kwargs) -> RunFacts:
    model = timm.create_model("ep_vgg5_025", **SETTINGS)
    return RunFacts(
        **{
            "architecture": "ep_vgg5_025",
            "command": "timm-ep train --dataset torch/cifar10",
            "seed": 3,
            "dataset": "torch/cifar10",
            "n_train": 100,
            "n_test": 50,
            "top1": 61.5,
            "top5": None,
            "epochs": 2,
            "train_seconds": 12.5,
            "machine": "x86_64 CPU, 2 threads",
            "settings": dataclasses.asdict(model.settings),
            "feedback_share": 0.25,
            **kwargs,
        }
    )


def make_run(folder: Path, seed: int = 0, architecture: str = "ep_vgg5_025", **kwargs) -> Path:
    """What training leaves, with random weights."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=4, in_chans=1, **SETTINGS)
    args = {"in_chans": 1, **dataclasses.asdict(model.settings)}
    save_for_hf(model, folder, model_config={"label_names": LABELS}, model_args=args, safe_serialization=True)
    (folder / "summary.csv").write_text("epoch,train_loss,train_accuracy\n1,1.5,40\n2,1.2,60\n")
    make_facts(architecture=architecture, **kwargs).save(folder / "results.json")
    return folder


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def changed_config(run: Path, **changes) -> bytes:
    """config.json of a run with other values."""
    return json.dumps({**json.loads((run / "config.json").read_text()), **changes}).encode()


def changed_weights(run: Path, change) -> bytes:
    """model.safetensors of a run after `change(state_dict)`."""
    state = load_file(run / "model.safetensors")
    change(state)
    return save(state)


def pickled_weights(run: Path, marker: Path) -> bytes:
    """Its weights as a checkpoint of PyTorch that makes the file `marker` when it is unpickled without care."""
    buffer = io.BytesIO()
    torch.save({**load_file(run / "model.safetensors"), "bomb": Bomb(marker)}, buffer)
    return buffer.getvalue()
