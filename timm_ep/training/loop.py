"""The training loop: updates, epochs, and the state from which both go on."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import Tensor
from torch.utils.data import DataLoader

from timm_ep.data.loader import EpochOrder, seed_everything
from timm_ep.data.pictures import UnreadableImage
from timm_ep.hub.cards import SETTLING_NAME
from timm_ep.models import EpVgg
from timm_ep.signals.task import EpTask
from timm_ep.signals.teachers import TeacherCache
from timm_ep.training.checkpoints import CheckpointStore
from timm_ep.training.diagnostics import diagnose
from timm_ep.training.distributed import World
from timm_ep.training.evaluate import Evaluation, evaluate
from timm_ep.training.guard import Guard, broken_weights
from timm_ep.training.logs import Pulse, RunLog
from timm_ep.training.options import TrainingOptions
from timm_ep.training.stopping import Interrupted, stop_requests

__all__ = ["Progress", "TrainingLoop"]

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass
class Progress:
    """Where a training is; together with weights, optimizer and options, all that it goes on from.

    Random numbers are no part of it: they follow from the position (`timm_ep.data.loader`).

    Attributes:
        epoch: finished epochs.
        update: updates of the epoch under way.
        seconds: of training.
        epoch_seconds: of the epoch under way.
        loss_sum: over the images of the epoch under way,
        correct: how many of them were classified correctly,
        seen: and how many there were, of the updates that were made.
        guard: counts of updates that were not made.
        rows: of summary.csv, one a finished epoch.
        layers: of layers.csv, one a finished epoch and layer.
        settling: of settling.csv, one a finished epoch, phase, sweep and layer.
        best_epoch: with the best validation so far, from 1; 0 for none.
        best: its accuracy in percent, and its loss.
    """

    epoch: int = 0
    update: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    loss_sum: float = 0.0
    correct: float = 0.0
    seen: float = 0.0
    guard: Guard = field(default_factory=Guard)
    rows: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    settling: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best: tuple[float, float] = (0.0, float("inf"))

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """From `dataclasses.asdict`."""
        return cls(**{**state, "guard": Guard(**state["guard"])})


@dataclass
class TrainingLoop:
    """Runs a task to the last epoch, from wherever `progress` says.

    Attributes:
        options: of the training.
        task: model and signals.
        optimizer: of what the task trains.
        scheduler: of timm, stepped at each update; None for none.
        loader: training batches, in the order of
        order: the positions of the batches of this process.
        validation: batches to choose the best epoch by; None for none.
        world: the processes.
        store: of checkpoints.
        log: of the run.
        mixup: of timm; None for none.
        cache: the teacher's answers; None to ask it at each batch.
        identity: what else must be equal when a run goes on, written into checkpoints.
        probe: images and labels, always the same, on which every layer is measured after each epoch.
        optimizer_precision: the context of the optimizer's steps.
        progress: where the training is.
    """

    options: TrainingOptions
    task: EpTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: DataLoader[Any]
    order: EpochOrder
    validation: Iterable[Any] | None
    world: World
    store: CheckpointStore
    log: RunLog
    mixup: Mixup | None
    cache: TeacherCache | None
    identity: dict[str, Any]
    probe: tuple[Tensor, Tensor]
    optimizer_precision: AbstractContextManager[Any]
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        half = self.options.amp and self.options.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=half)
        self._saved_at = time.monotonic()
        self._unreadable: UnreadableImage | None = None

    @property
    def updates(self) -> int:
        """Updates done in all."""
        return self.progress.epoch * self.order.updates + self.progress.update

    def autocast(self) -> Any:
        """The precision that the options ask for."""
        dtype = getattr(torch, self.options.amp_dtype)
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=self.options.amp)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs: tensors, numbers and strings. The weights have timm's keys."""
        return {
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if self.task.has_ema() else {}),
            "optimizer": self.optimizer.state_dict(),
            "amp_scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "options": self.options.plain(),
            "identity": self.identity,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        self.task.load_checkpoint_state(state["state_dict"], state.get("task_state"))
        if self.task.has_ema():
            self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["amp_scaler"])
        self.progress = Progress.of(state["progress"])
        known = self.world.from_primary(self.store.repair_best(state) if self.world.primary else None)
        if self.progress.best_epoch and not known["best_epoch"]:
            self.log.warn(f"{self.store.best} cannot be read: the best is chosen anew, among the epochs to come.")
        self.progress.best_epoch, self.progress.best = known["best_epoch"], known["best"]

    def run(self) -> None:
        """Train to the last epoch, or until validation no longer improves.

        Raises:
            FloatingPointError: too many updates in a row could not be made.
            Interrupted: SIGTERM or Ctrl-C; a checkpoint is written.
            OSError: a checkpoint could not be written; earlier ones are intact.
        """
        with stop_requests() as request:
            while self.progress.epoch < self.options.epochs and not self._exhausted():
                self._train_epoch(request)
                self._end_epoch()
            # One that came since the last update, which no other process knows of.
            terminated, interrupted = self.world.sum([request.number == 15, request.number == 2])
            if terminated or interrupted:
                raise self._stopped(15 if terminated else 2)

    def _exhausted(self) -> bool:
        patience, best = self.options.patience, self.progress.best_epoch
        return patience > 0 and best > 0 and self.progress.epoch - best >= patience

    def _train_epoch(self, request: Any) -> None:
        progress, accumulate = self.progress, self.options.grad_accum_steps
        self.task.train()
        self.task.set_progress(progress.epoch / max(self.options.epochs - 1, 1))
        if self.scheduler is not None:  # again where it is after a resume; the epochs may have become more
            self.scheduler.step_update(self.updates)
        self.order.epoch, self.order.start = progress.epoch, progress.update
        self.log.start_epoch(progress.epoch + 1, progress.update)
        batches = iter(self.loader)
        for _ in range(progress.update, self.order.updates):
            started = time.monotonic()
            stop = self._update(self._load(batches, accumulate), request.number)
            seconds = time.monotonic() - started
            progress.seconds += seconds
            progress.epoch_seconds += seconds
            self.log.update(progress.epoch + 1, progress.update, self._pulse())
            if stop or self._checkpoint_due():
                self._save()
            if stop:
                raise self._stopped(stop)

    def _stopped(self, number: int) -> Interrupted:
        self.log.warn(f"stopped by signal {number} after update {self.updates}; go on with --resume.")
        return Interrupted(number)

    def _load(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        """The batches of an update; blank ones where an image is unreadable, until the other processes learn of it."""
        try:
            return [next(batches) for _ in range(count)]
        except UnreadableImage as error:
            if self.world.size == 1:
                raise
            self._unreadable = error
            images = torch.zeros_like(self.probe[0])
            zeros = torch.zeros(len(images), dtype=torch.long)
            return [(images, zeros, zeros)] * count

    def _update(self, batches: list[Batch], stop: int) -> int:
        """One update; returns the signal that asked any process to stop, or 0."""
        progress, options, device = self.progress, self.options, self.world.device
        loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        damaged, images = False, batches[0][0]
        for number, (images, labels, indices) in enumerate(batches):
            seed_everything(
                "step", options.seed, progress.epoch, progress.update * len(batches) + number, self.world.rank
            )
            layout = torch.channels_last if options.channels_last else torch.preserve_format
            images = images.to(device, non_blocking=True, memory_format=layout)
            labels = labels.to(device, non_blocking=True)
            # Other devices are not to wait here: there the loss shows it. A model may refuse such images, so they go.
            if device.type == "cpu" and not torch.isfinite(images.sum()):
                damaged, images = True, torch.zeros_like(images)
            batch_loss, output = self._backward(images, labels, indices, len(batches), number == len(batches) - 1)
            loss_sum += batch_loss * len(labels)
            correct += (output.argmax(1) == labels).sum()
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.task.get_clip_parameters() if p.grad is not None]
        # Loss scaling meets infinite gradients as a matter of course, and leaves such an update out by itself: as long
        # as it can scale less, which is 1 where there is none.
        # The largest entry tells as well as the 2-norm does, whose squares would overflow first.
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        finite = torch.isfinite(largest) | (self.scaler.get_scale() > 1)
        guard = progress.guard
        if self.updates % options.residual_interval == 0 or guard.in_a_row:
            guard.measure(self.task.model, images)
        unsettled = guard.residual > options.max_residual
        count = sum(len(labels) for _, labels, _ in batches)
        # The one transfer of an update: whether to make it is decided on the host, alike in all processes.
        loss, hits, seen, lost, bad, worst, blown, *stops = self.world.sum(
            [loss_sum, correct, count, self._unreadable is not None, damaged, unsettled, ~finite, stop == 15, stop == 2]
        )
        if lost:
            self.world.agree(self._unreadable)
        reason = guard.judge(loss / seen, bool(bad), not blown, not worst, options)
        if reason is None:
            if options.clip_grad:
                clipped = self.task.get_clip_parameters(exclude_head=options.clip_mode == "agc")
                dispatch_clip_grad(clipped, options.clip_grad, options.clip_mode)
            with self.optimizer_precision:
                self.scaler.step(self.optimizer)
            progress.loss_sum += loss
            progress.correct += hits
            progress.seen += seen
        else:
            where = f"update {self.updates + 1}, epoch {progress.epoch + 1}"
            self.log.warn(f"skipped {where}: {reason}.")
            limit = min(options.skip_limit, self.order.updates)
            if guard.in_a_row >= limit or broken_weights(self.task.model):
                raise FloatingPointError(guard.diagnosis(reason, where, self.task.model, images, options))
        self.scaler.update()
        self.optimizer.zero_grad()
        progress.update += 1
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)
        if reason is None:
            if self.updates % options.residual_interval == 0:
                self.cap_couplings(self.task.model)
            self.task.update_ema(self.updates)
        return 15 if stops[0] else 2 if stops[1] else 0

    def _backward(
        self, images: Tensor, labels: Tensor, indices: Tensor, accumulate: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Add a batch's share to the gradient; processes exchange theirs with the last one. Returns loss and logits."""
        target, off = labels, self.options.mixup_off_epoch
        if self.mixup is not None:
            self.mixup.mixup_enabled = not off or self.progress.epoch < off
            images, target = self.mixup(images, labels)
        taught = None if self.cache is None else self.cache(indices, images.device)
        with nullcontext() if last else self.task.no_sync():
            with self.autocast():
                result = self.task(images, target, taught)
            self.scaler.scale(result["loss"] / accumulate).backward()
        return result["loss"].detach(), result["output"].detach()

    def _pulse(self) -> Pulse:
        progress, seen = self.progress, max(self.progress.seen, 1)
        images = progress.update * self.options.batch_size * self.options.grad_accum_steps * self.world.size
        return Pulse(
            loss=progress.loss_sum / seen,
            accuracy=progress.correct / seen,
            residual=progress.guard.residual,
            sweeps=progress.guard.sweeps,
            rate=images / max(progress.epoch_seconds, 1e-9),
            lr=max(group["lr"] for group in self.optimizer.param_groups),  # the read-out's, with layer_decay
        )

    def _end_epoch(self) -> None:
        """Validate, write the epoch's row, and save."""
        progress, pulse = self.progress, self._pulse()
        for model in filter(None, (self.task.model, self.task.get_eval_model(ema=True))):
            if self.world.size > 1:
                distribute_bn(model, self.world.size, reduce=True)
            self.cap_couplings(model)
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "lr": pulse.lr,
            "train_loss": pulse.loss,
            "train_accuracy": 100 * pulse.accuracy,
            "residual": pulse.residual,
            "sweeps": pulse.sweeps,
            "skipped": progress.guard.skipped,
            "seconds": progress.epoch_seconds,
            "images_per_second": pulse.rate,
            "val_loss": "",
            "val_accuracy": "",
            "test_loss": "",
            "test_accuracy": "",
        }
        best = False
        seed_everything("test", progress.epoch)  # for a net with the noise of a device, and diagnoses of random signs
        if self.validation is not None:
            validated = self.evaluate(self.validation)
            row.update(val_loss=validated.loss, val_accuracy=validated.top1)
            rank, best_rank = (validated.top1, -validated.loss), (progress.best[0], -progress.best[1])
            best = not progress.best_epoch or rank > best_rank
            if best:
                progress.best_epoch, progress.best = progress.epoch + 1, (validated.top1, validated.loss)
        self._diagnose()
        progress.rows.append(row)
        progress.epoch += 1
        progress.update = 0
        progress.epoch_seconds = progress.loss_sum = progress.correct = progress.seen = 0.0
        self.log.end_epoch(progress.rows)
        self.log.write_layers(progress.layers)
        self.log.write(progress.settling, SETTLING_NAME)
        self._save(best)

    def _diagnose(self) -> None:
        """Measure every layer on the probe."""
        if not isinstance(self.task.model, EpVgg):
            return
        with self.task.no_sync():  # each process for itself: nothing is exchanged
            found = diagnose(self.task, *(tensor.to(self.world.device) for tensor in self.probe))
        epoch = {"epoch": self.progress.epoch + 1}
        self.progress.layers += [{**epoch, **dataclasses.asdict(one)} for one in found.layers]
        self.progress.settling += [{**epoch, **dataclasses.asdict(one)} for one in found.settling]

    def cap_couplings(self, model: Any) -> None:
        """Hold the couplings of the model, or of the average, at the limit that the options set, if any."""
        if self.options.max_coupling:
            height, width = self.probe[0].shape[-2:]
            model.cap_couplings(self.options.max_coupling, (height, width))

    def evaluate(self, loader: Iterable[Any]) -> Evaluation:
        """Test what the training would give: the averaged weights if there are any, else the weights."""
        model: Any = self.task.get_eval_model(ema=self.task.has_ema())
        with self.autocast():
            return evaluate(model, loader, self.world.device, self.world.sum)

    def _checkpoint_due(self) -> bool:
        updates, seconds = self.options.interval
        if updates is not None:
            return self.updates % updates == 0
        return seconds is not None and time.monotonic() - self._saved_at >= seconds

    def _save(self, best: bool = False) -> None:
        if self.world.primary:
            self.store.save(self.state(), self.updates, best)
        self._saved_at = time.monotonic()
