"""Training a model of timm's registry by EP, from options to a folder with weights that timm loads."""

import csv
import dataclasses
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_ep.cards import RESULTS_NAME, RunFacts
from timm_ep.data import DataSource, channel_values, create_loader, image_transform, limit, open_data
from timm_ep.diagnostics import diagnose
from timm_ep.evaluate import evaluate
from timm_ep.files import replacing
from timm_ep.losses import readout_criterion
from timm_ep.models import EpVgg
from timm_ep.signals import FeatureDistillation, LocalErrors, LogitDistillation
from timm_ep.task import EpTask
from timm_ep.teachers import create_teacher

_RESIDUAL_INTERVAL = 50  # steps between measurements of the free residual: each costs a free phase of 8 images


@dataclass
class Trainer:
    """Train a model: `Trainer(model="ep_vgg5_025", epochs=5).run()`, or `timm-ep train` with the same options.

    Args:
        model: name in timm's registry; an `ep_vgg*`, or any other, trained by its own backward pass.
        output: folder for the run: model.safetensors and config.json (which timm loads by `local-dir:`), summary.csv
            (by epoch), layers.csv and settling.csv (by epoch and layer, see `timm_ep.diagnostics`), results.json.
        dataset: `digits` (embedded), `folder` (class folders or tars under `data_dir`) or `torch/NAME`.
        data_dir: where the images are.
        model_args: further arguments of the model, such as `feedback` or `free_sweeps`; `{"preset": "classic"}` trains
            by the literature's algorithm, live forces included.
        gradient: how the gradient is taken: `ep`, `bptt` (autograd through the settling) or `backprop` (the feedforward
            twin). Only for `ep_vgg*`.
        local_error: weight of the local errors, classifiers on the layers' states; 0 for none.
        local_error_args: further arguments of `timm_ep.signals.LocalErrors`, such as `layers` or `schedule`.
        teacher: what to distil from, as for `timm_ep.teachers.create_teacher`: a name of timm, `hf-hub:…`,
            `local-dir:…`, or the folder of a run.
        teacher_checkpoint: weights for the model that `teacher` names.
        distill_features: weight of the teacher's features as targets of the states; 0 for none.
        distill_features_args: further arguments of `timm_ep.signals.FeatureDistillation`.
        distill_logits: weight of the teacher's logits beside the labels, at the read-out and at every layer; 0 for
            none.
        distill_logits_args: further arguments of `timm_ep.signals.LogitDistillation`, such as `temperature`.
        cache_teacher: ask the teacher once for each image and keep its answers in memory; not with augmentation.
        epochs: passes over the training images.
        batch_size: images a step.
        optimizer: name of a timm optimizer.
        lr: peak learning rate; follows a cosine to zero after the warmup.
        weight_decay: on kernels and the classifier, not on gains and biases.
        warmup_epochs: of linearly rising learning rate.
        criterion: `cross-entropy` or `squared-error` of the output; by default squared error for a read-out inside the
            dynamics (`model_args={"readout": "state"}`), else cross-entropy.
        smoothing: label smoothing, for cross-entropy.
        clip_norm: clip the gradient to this norm; none by default.
        augment: `none`, `crop` or `flip-crop`.
        img_size: side of the images in pixels; by default the model's.
        train_images: train on a fixed random subset of this size.
        seed: of weights, order and augmentation.
        device: `cpu`, `cuda`, `cuda:1`, …
        workers: processes that load images; 0 loads in the main process, best for small images on few cores.
        quiet: print the result only. Progress bars appear on a terminal only.
    """

    model: str = "ep_vgg5_025"
    output: Path = Path("runs/train")
    dataset: str = "digits"
    data_dir: Path | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    gradient: Literal["ep", "bptt", "backprop"] = "ep"
    local_error: float = 0.0
    local_error_args: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    teacher_checkpoint: Path | None = None
    distill_features: float = 0.0
    distill_features_args: dict[str, Any] = field(default_factory=dict)
    distill_logits: float = 0.0
    distill_logits_args: dict[str, Any] = field(default_factory=dict)
    cache_teacher: bool = False
    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 1
    criterion: Literal["cross-entropy", "squared-error"] | None = None
    smoothing: float = 0.0
    clip_norm: float | None = None
    augment: Literal["none", "crop", "flip-crop"] = "none"
    img_size: int | None = None
    train_images: int | None = None
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 1, "lr": 0, "weight_decay": 0, "warmup_epochs": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; it must be at least {least}.")
        if self.warmup_epochs >= self.epochs:
            self.warmup_epochs = self.epochs - 1  # the cosine needs an epoch of its own
        self.output = Path(self.output)
        distils = self.distill_features or self.distill_logits
        if distils and self.teacher is None:
            raise ValueError("Distillation needs a teacher (--teacher): a name of timm, or the folder of a run.")
        if self.teacher is not None and not distils:
            raise ValueError(
                f"teacher={self.teacher} has nothing to teach: set the weight of distill_features or distill_logits."
            )
        if self.cache_teacher and self.augment != "none":
            raise ValueError(
                f"cache_teacher keeps one answer for each image, but augment={self.augment} changes the images; "
                "turn one of the two off."
            )

    def run(self) -> RunFacts:
        """Train, test, and write the output folder.

        Returns:
            the facts of the run, with the test accuracy in percent.

        Raises:
            FloatingPointError: the loss is no longer finite.
            ValueError: fewer training images than a batch, or options of the wrong kind.
        """
        torch.manual_seed(self.seed)
        data = open_data(self.dataset, self.data_dir)
        model = self._create_model(data).to(self.device)
        config = resolve_data_config(model=model)
        size = self.img_size or config["input_size"][-1]
        mean, std = (channel_values(config[k], data.channels) for k in ("mean", "std"))
        data.train.transform = image_transform(size, mean, std, self.augment)
        data.test.transform = image_transform(size, mean, std)
        train = limit(data.train, self.train_images)
        if len(train) < self.batch_size:
            raise ValueError(
                f"{len(train)} training images are less than a batch of {self.batch_size}; lower batch_size."
            )
        loader = create_loader(train, self.batch_size, self.seed, self.workers)

        task = self._create_task(model, data, mean, std)
        started = time.monotonic()
        layers: list[dict[str, Any]] = []
        settling: list[dict[str, Any]] = []
        rows = list(self._epochs(task, loader, layers, settling))
        seconds = time.monotonic() - started
        tested = evaluate(model, create_loader(data.test, 256, workers=self.workers), self.device)
        rows[-1].update(test_loss=tested.loss, test_accuracy=tested.top1)

        facts = RunFacts(
            architecture=self.model,
            command=shlex.join(["timm-ep", *sys.argv[1:]]),
            seed=self.seed,
            dataset=self.dataset,
            n_train=len(train),
            n_test=len(data.test),
            top1=tested.top1,
            top5=tested.top5,
            epochs=self.epochs,
            train_seconds=seconds,
            settings=dataclasses.asdict(model.settings) if isinstance(model, EpVgg) else {},
            feedback_share=tested.feedback_share,
            signals={
                name: getattr(self, name)
                for name in ("local_error", "distill_features", "distill_logits")
                if getattr(self, name)
            },
            teacher=self.teacher,
        )
        tables = {"summary": rows, "layers": layers, "settling": settling}
        self._save(model, data, (data.channels, size, size), mean, std, tables, facts)
        print(
            f"saved to {self.output}\naccuracy: {facts.top1:.1f} % ({facts.architecture}, {seconds:.0f} s of training)"
        )
        return facts

    def _create_model(self, data: DataSource) -> nn.Module:
        settings = {"gradient": self.gradient} if self.model.startswith("ep_vgg") else {}
        return timm.create_model(
            self.model, num_classes=len(data.classes), in_chans=data.channels, **{**settings, **self.model_args}
        )

    def _create_task(
        self, model: nn.Module, data: DataSource, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> EpTask:
        teacher = local_errors = features = logits = None
        if self.local_error:
            local_errors = LocalErrors(model, self.local_error, **self.local_error_args)
        if self.teacher is not None:
            classes = data.classes if self.distill_logits else None
            teacher = create_teacher(self.teacher, mean, std, self.teacher_checkpoint, classes).to(self.device)
            if self.distill_features:
                features = FeatureDistillation(model, teacher, self.distill_features, **self.distill_features_args)
            if self.distill_logits:
                logits = LogitDistillation(model, self.distill_logits, **self.distill_logits_args)
        return EpTask(
            model,
            local_errors,
            features,
            logits,
            teacher,
            criterion=readout_criterion(model, self.criterion, smoothing=self.smoothing),
            device=torch.device(self.device),
        )

    def _epochs(
        self,
        task: EpTask,
        loader: DataLoader[Any],
        layers: list[dict[str, Any]],
        settling: list[dict[str, Any]],
    ) -> Iterator[dict[str, Any]]:
        model, trained = task.model, task.get_trainable_module()
        optimizer = create_optimizer_v2(trained, opt=self.optimizer, lr=self.lr, weight_decay=self.weight_decay)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            num_epochs=self.epochs,
            warmup_epochs=self.warmup_epochs,
            warmup_lr=self.lr / 100,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=len(loader),
        )
        quiet, step, residual = self.quiet or not sys.stderr.isatty(), 0, float("nan")
        for epoch in range(1, self.epochs + 1):
            task.train()
            task.set_progress((epoch - 1) / max(self.epochs - 1, 1))
            started, loss_sum, correct, seen = time.monotonic(), 0.0, 0, 0
            bar = tqdm(loader, f"epoch {epoch}/{self.epochs}", disable=quiet, leave=False)
            for images, labels in bar:
                images, labels = images.to(self.device), labels.to(self.device)
                result = task(images, labels)
                loss = result["loss"].item()
                if step % _RESIDUAL_INTERVAL == 0 and isinstance(model, EpVgg):
                    residual = (model.free_residual(images[:8]) or [0.0])[-1]
                if not abs(loss) < float("inf"):
                    raise FloatingPointError(
                        f"The loss is {loss} at step {step} (epoch {epoch}, free residual {residual:.3g}): lower "
                        f"lr={self.lr} or set clip_norm; above a residual of about 0.1 lower feedback or raise "
                        "free_sweeps with model_args."
                    )
                optimizer.zero_grad()
                result["loss"].backward()
                if self.clip_norm:
                    nn.utils.clip_grad_norm_(task.get_clip_parameters(), self.clip_norm)
                optimizer.step()
                step += 1
                scheduler.step_update(step)
                seen += len(labels)
                loss_sum += loss * len(labels)
                correct += int((result["output"].argmax(1) == labels).sum())
                bar.set_postfix(
                    loss=f"{loss_sum / seen:.3f}", accuracy=f"{correct / seen:.1%}", residual=f"{residual:.1e}"
                )
            row = {
                "epoch": epoch,
                "lr": optimizer.param_groups[0]["lr"],
                "train_loss": loss_sum / seen,
                "train_accuracy": 100 * correct / seen,
                "residual": residual,
                "seconds": time.monotonic() - started,
                "test_loss": "",
                "test_accuracy": "",
            }
            if not self.quiet:
                print(
                    f"epoch {epoch}/{self.epochs}: loss {loss_sum / seen:.3f}, accuracy {correct / seen:.1%}, "
                    f"residual {residual:.1e}, {row['seconds']:.1f} s",
                    flush=True,
                )
            if isinstance(model, EpVgg):
                found = diagnose(task, images, labels)  # on the last batch of the epoch
                layers += [{"epoch": epoch, **dataclasses.asdict(one)} for one in found.layers]
                settling += [{"epoch": epoch, **dataclasses.asdict(one)} for one in found.settling]
            yield row

    def _save(
        self,
        model: nn.Module,
        data: DataSource,
        input_size: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        tables: dict[str, list[dict[str, Any]]],
        facts: RunFacts,
    ) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        # All keys as arguments: the run is to be the same model after a default of the package changes.
        model_args = {**facts.settings, **self.model_args, "in_chans": data.channels}
        config = {
            "input_size": input_size,
            "mean": mean,
            "std": std,
            "num_classes": len(data.classes),
            "label_names": list(data.classes),
        }
        with tempfile.TemporaryDirectory(dir=self.output) as folder:
            save_for_hf(model, folder, model_config=config, model_args=model_args, safe_serialization=True)
            for name in ("model.safetensors", "config.json"):
                with replacing(self.output / name) as temporary:
                    temporary.write_bytes((Path(folder) / name).read_bytes())
        for table, rows in tables.items():
            if rows:
                with replacing(self.output / f"{table}.csv") as temporary, temporary.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0].keys())
                    writer.writeheader()
                    writer.writerows(rows)
        facts.save(self.output / RESULTS_NAME)
