"""The options of a training: declared here once, for the command line, YAML and Python; named as in timm's train.py."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from timm_ep.base.files import replacing
from timm_ep.base.options import Options
from timm_ep.core.settings import Gradient
from timm_ep.data.transforms import Augment

__all__ = ["ARGS_NAME", "FREE", "TrainingOptions"]

ARGS_NAME = "args.yaml"  # the options of a run, in its folder

# What may differ when a run goes on: where things are and how they are shown, but not what is computed.
FREE = {
    "output",
    "patience",  # how long it goes on, as the number of epochs
    "data_dir",
    "device",
    "workers",
    "resume",
    "overwrite",
    "checkpoint_interval",
    "skip_limit",
    "log_tensorboard",
    "quiet",
}
_ONCE = {"resume", "overwrite"}  # for this start of the run alone


@dataclass
class TrainingOptions(Options):
    """All that a training can be told.

    Args:
        model: name in timm's registry; an `ep_vgg*`, or any other, trained by its own backward pass. `hf-hub:…` and
            `local-dir:FOLDER` (with `pretrained`) start from the weights there.
        pretrained: start from the trained weights that the name stands for. The read-out is new where the number of
            classes differs, and the first convolution is fitted to the images' channels; mean and std stay those of
            the weights.
        initial_checkpoint: start from these weights instead, likewise: the folder of a run (or of `timm-ep pull` or
            `convert`) with its settings, which `model_args` overrides, or a safetensors file of the model.
        freeze_layers: modules that are not to learn, by name: `[layers]` is the body of an `ep_vgg*`, `[layers.0]` its
            first convolution.
        output: folder for the run: model.safetensors and config.json (which timm loads by `local-dir:`), args.yaml (for
            `--config`), summary.csv (by epoch), layers.csv and settling.csv (by epoch and layer, see
            `timm_ep.training.diagnostics`), curves.png, results.json, and checkpoints/.
        dataset: `digits` (embedded), `folder` (class folders or tars under `data_dir`), `torch/NAME` or `hfds/NAME`.
        data_dir: where the images are.
        train_images: train on a fixed random subset of this size.
        val_split: share of the training images to set aside, to choose the best epoch by. 0 keeps all for training;
            where the dataset has no validation images of its own, the last epoch is the result. Test images choose
            nothing and are looked at once, at the end; only where there are none, the validation images are those
            tested on too.
        bad_images: what to do with damaged images: `stop` at the first, naming it; or `skip` them: all are looked
            through before training, and those that cannot be read are left out and listed in `output`/bad_images.txt.
        img_size: side of the images in pixels; by default the model's.
        in_chans: 1 to see the images in grey, 3 in colour; by default as they are (those in files in colour).
        mean: of the pixels in [0, 1], for each channel, taken away from the images; by default the model's.
        std: by which they are divided then. The literature divides by 3 × the standard deviation.
        model_args: further arguments of the model, such as `feedback` or `free_sweeps`; `{"preset": "classic"}` trains
            by the literature's algorithm, live forces included.
        gradient: how the gradient is taken: `ep`, `bptt` (autograd through the settling) or `backprop` (the feedforward
            twin) or `local` (the twin, without credit between layers). Only for `ep_vgg*`.
        local_error: weight of the local errors, classifiers on the layers' states; 0 for none.
        local_error_args: further arguments of `timm_ep.LocalErrors`, such as `layers` or `schedule`.
        teacher: what to distil from, as for `timm_ep.signals.teachers.create_teacher`: a name of timm, `hf-hub:…`,
            `local-dir:…`, or the folder of a run. Of several, `[A, B]`, the mean of their probabilities is distilled.
        teacher_args: further arguments of the teacher's model: `{"free_sweeps": 0}` has an `ep_vgg*` answer by a single
            pass, at the price of its feedback.
        teacher_checkpoint: weights for the model that `teacher` names.
        teacher_img_size: side of the images that the teacher is shown, in pixels; by default its own.
        distill_features: weight of the teacher's features as targets of the states; 0 for none.
        distill_features_args: further arguments of `timm_ep.FeatureDistillation`.
        distill_logits: weight of the teacher's logits beside the labels, at the read-out and at every layer; 0 for
            none.
        distill_logits_args: further arguments of `timm_ep.LogitDistillation`, such as `temperature`.
        cache_teacher: ask the teacher once for each image, before training, and keep its answers in memory; not with
            augmentation.
        epochs: passes over the training images.
        batch_size: images of one process in one batch.
        grad_accum_steps: batches of an update.
        opt: name of a timm optimizer.
        opt_kwargs: its further arguments, such as `momentum`, `betas` or `layer_decay`: a factor on the learning rate
            for every layer further from the read-out.
        lr: peak learning rate.
        layer_lr: peak learning rates of the layers, from the first convolution to the read-out, in place of `lr`, as
            the literature has them; signals learn at the read-out's. Only for `ep_vgg*`.
        max_coupling: hold the coupling √λ‖W_l‖ of every layer but the first at or below this, by scaling kernels down,
            at every `residual_interval`-th update and in what is tested and saved; 0 for never. Below 0.5 a net with
            linear pooling has one equilibrium for any states and weights (`timm_ep.core.coupling`). Only for `ep_vgg*`.
        weight_decay: on kernels and the classifier, not on gains and biases. The default suits decay apart from the
            gradient (AdamW, Muon, Lion); SGD's, which is added to it, wants about 5e-4.
        sched: timm's schedule of the learning rate, which changes at each update.
        sched_kwargs: further arguments of `timm.scheduler.create_scheduler_v2`, such as `min_lr` or `decay_rate`.
        warmup_epochs: of linearly rising learning rate, before the schedule.
        criterion: `cross-entropy` or `squared-error` of the output; by default squared error for a read-out inside the
            dynamics (`model_args={"readout": "state"}`), else cross-entropy.
        smoothing: label smoothing, for cross-entropy of the output; local errors see it where images are mixed, whose
            labels are soft for all.
        clip_grad: clip the gradient at this value; none by default.
        clip_mode: what is clipped: the `norm` of the whole gradient, each `value`, or by `agc` each unit's gradient
            relative to its weights.
        mixup: α of mixup; 0 for none.
        cutmix: α of cutmix; 0 for none.
        mixup_prob: share of the batches (or images) that are mixed.
        mixup_switch_prob: share of cutmix where both are on.
        mixup_mode: mix with one ratio a `batch`, `pair` or `elem`.
        mixup_off_epoch: epoch from which nothing is mixed; 0 for never.
        augment: `none`, `crop` (random, after padding by an eighth), `flip-crop` (with horizontal flips too) or `rrc`
            (timm's random resized crop, with flips).
        hflip: share of images flipped left to right; by default as `augment` says.
        vflip: share flipped upside down.
        color_jitter: strength of the colour jitter.
        aa: timm's automatic augmentation, such as `rand-m9-mstd0.5` or `original`.
        reprob: share of images of which a random rectangle is erased.
        model_ema: average the weights over the updates; the average is what is tested and saved.
        model_ema_decay: share of the average that stays at each update.
        model_ema_warmup: begin with a faster average.
        amp: settle and compute in half precision where that is safe. A CPU needs instructions for it (x86: AVX-512),
            without which it is far slower than in float32: a warning says so.
        amp_dtype: `bfloat16`, or `float16` with loss scaling.
        channels_last: keep images and kernels in that memory format. The settling always does.
        torchcompile: compile the model by this backend, such as `inductor`. For an `ep_vgg*` that is the read-out and
            the signals: the settling is a few large convolutions, and is left as it is.
        patience: stop after so many epochs without a better validation accuracy; 0 for never.
        max_residual: skip the update of a batch whose free phase ends with a larger relative change ‖Δs_l‖/‖s_l‖ a
            sweep in any layer. Above 1 a layer does not settle at all.
        residual_interval: updates between measurements of the residual: each costs a free phase of 8 images. After one
            above the limit it is measured at every update.
        skip_limit: stop, with a diagnosis, after so many updates in a row (or an epoch of them) were skipped because
            the loss, the gradient or the residual was not finite or too large.
        seed: of weights, order and augmentation.
        deterministic: use deterministic algorithms alone. On the CPU a run repeats itself exactly without.
        device: `cpu`, `cuda`, `cuda:1`, … Under torchrun each process takes its own.
        workers: processes that load images; 0 loads in the main process, best for small images on few cores.
        resume: go on from the newest good checkpoint in `output`; from the start if there is none.
        overwrite: start anew in an `output` that holds a run.
        checkpoint_interval: also write a checkpoint every so many updates (`500`) or seconds (`600s`), not only after
            each epoch.
        log_tensorboard: write `output`/tensorboard too.
        quiet: print the result and warnings only. Progress bars appear on a terminal only.
    """

    model: str = "ep_vgg5_025"
    pretrained: bool = False
    initial_checkpoint: Path | None = None
    freeze_layers: list[str] = field(default_factory=list)
    output: Path = Path("runs/train")
    dataset: str = "digits"
    data_dir: Path | None = None
    train_images: int | None = None
    val_split: float = 0.0
    bad_images: Literal["stop", "skip"] = "stop"
    img_size: int | None = None
    in_chans: Literal[1, 3] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    gradient: Gradient = "ep"
    local_error: float = 0.0
    local_error_args: dict[str, Any] = field(default_factory=dict)
    teacher: list[str] | str | None = None
    teacher_args: dict[str, Any] = field(default_factory=dict)
    teacher_checkpoint: Path | None = None
    teacher_img_size: int | None = None
    distill_features: float = 0.0
    distill_features_args: dict[str, Any] = field(default_factory=dict)
    distill_logits: float = 0.0
    distill_logits_args: dict[str, Any] = field(default_factory=dict)
    cache_teacher: bool = False
    epochs: int = 10
    batch_size: int = 64
    grad_accum_steps: int = 1
    opt: str = "adamw"
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    lr: float = 2e-3
    layer_lr: list[float] = field(default_factory=list)
    max_coupling: float = 0.0
    weight_decay: float = 0.05
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"] = "cosine"
    sched_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_epochs: int = 1
    criterion: Literal["cross-entropy", "squared-error"] | None = None
    smoothing: float = 0.0
    clip_grad: float | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    mixup_off_epoch: int = 0
    augment: Augment = "none"
    hflip: float | None = None
    vflip: float = 0.0
    color_jitter: float | None = None
    aa: str | None = None
    reprob: float = 0.0
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    amp: bool = False
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    channels_last: bool = False
    torchcompile: str | None = None
    patience: int = 0
    max_residual: float = 1.0
    residual_interval: int = 50
    skip_limit: int = 10
    seed: int = 0
    deterministic: bool = False
    device: str = "cpu"
    workers: int = 0
    resume: bool = False
    overwrite: bool = False
    checkpoint_interval: int | str | None = None
    log_tensorboard: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(**_LEAST)
        if min([*self.layer_lr, *(self.std or [1])]) <= 0:
            raise ValueError(f"layer_lr={self.layer_lr} and std={self.std} must hold positive numbers only.")
        for name in ("val_split", "smoothing", "hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is no share; it must be between 0 and 1.")
        if self.smoothing == 1:
            raise ValueError("smoothing=1 leaves nothing of the labels; it must be below 1, such as 0.1.")
        if not 0 <= self.model_ema_decay < 1:
            raise ValueError(f"model_ema_decay={self.model_ema_decay} must be at least 0 and below 1.")
        self._check_teaching()
        of_model = self.model_args.get("gradient", self.gradient)
        if self.gradient not in ("ep", of_model):
            raise ValueError(
                f"gradient={self.gradient} and model_args.gradient={of_model} both say how it is taken; choose one."
            )
        if self.pretrained and self.initial_checkpoint is not None:
            raise ValueError(
                f"pretrained and initial_checkpoint={self.initial_checkpoint} both say where to start; choose one."
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} is odd; mixup and cutmix pair the images of a batch.")
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with the run in the output folder and overwrite discards it; choose one.")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} is too large; it must be below 2**63.")
        if self.overwrite:
            self._check_discarded()
        _ = self.interval

    def _check_discarded(self) -> None:
        """What a run reads may lie in the folder of an earlier one, but not in that which it discards."""
        teachers = self.teacher if isinstance(self.teacher, list) else [self.teacher]
        read = [("teacher", teacher) for teacher in teachers]
        for name in ("model", "initial_checkpoint", "teacher_checkpoint"):
            read.append((name, getattr(self, name)))
        for name, value in read:
            path = Path(str(value).removeprefix("local-dir:")).resolve()
            lies_there = path.is_relative_to(self.output.resolve())
            if lies_there and value is not None and (isinstance(value, Path) or path.exists()):  # else a name of timm
                raise ValueError(
                    f"overwrite would discard {name}={value}, in output={self.output}; choose another output."
                )

    def _check_teaching(self) -> None:
        distils = self.distill_features or self.distill_logits
        if distils and not self.teacher:
            raise ValueError("Distillation needs a teacher (--teacher): a name of timm, or the folder of a run.")
        if self.teacher and not distils:
            raise ValueError(
                f"teacher={self.teacher} has nothing to teach: set the weight of distill_features or distill_logits."
            )
        for name in ("teacher_checkpoint", "teacher_img_size", "teacher_args", "cache_teacher"):
            if getattr(self, name) and not self.teacher and not self.resume:  # as an older run may have it
                raise ValueError(f"{name}={getattr(self, name)} is of a teacher, and there is none; give --teacher.")
        if isinstance(self.teacher, list) and self.teacher_checkpoint is not None:
            raise ValueError(
                f"teacher_checkpoint={self.teacher_checkpoint} is of one teacher, not of {self.teacher}; name the "
                "folders of runs, or weights that timm finds by their names."
            )
        changes = {"augment": "none", "mixup": 0, "cutmix": 0, "hflip": None, "vflip": 0, "color_jitter": None}
        for name, harmless in {**changes, "aa": None, "reprob": 0}.items():
            if self.cache_teacher and getattr(self, name) not in (harmless, 0):
                raise ValueError(
                    f"cache_teacher keeps one answer for each image, but {name}={getattr(self, name)} changes the "
                    "images; turn one of the two off."
                )

    @property
    def warmup(self) -> int:
        """Epochs of warmup: the schedule needs an epoch of its own."""
        return min(self.warmup_epochs, self.epochs - 1)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def without_effect(self) -> list[str]:
        """What is given and changes nothing, as what it belongs to is off."""
        derived, defaults = {"mixup or cutmix": self.mixes, "a sched": self.sched != "none"}, TrainingOptions()
        return [
            f"{name} (without {needed})"
            for needed, names in _BELONGS.items()
            if not (derived[needed] if needed in derived else getattr(self, needed))
            for name in names
            if getattr(self, name) != getattr(defaults, name)
        ]

    @property
    def interval(self) -> tuple[int | None, float | None]:
        """Updates, and seconds, between checkpoints.

        Raises:
            ValueError: neither a number of updates nor one of seconds.
        """
        if self.checkpoint_interval is None:
            return None, None
        text = str(self.checkpoint_interval)
        number, kind = (text[:-1], float) if text.endswith("s") else (text, int)
        try:
            value = kind(number)
        except ValueError:
            value = 0
        if not value > 0:
            raise ValueError(f"checkpoint_interval={text!r} is unknown; give updates, like 500, or seconds, like 600s.")
        return (None, float(value)) if kind is float else (int(value), None)

    def command(self, launcher: Sequence[str]) -> str:
        """The command line that does the same, wherever the options came from, after what starts the package."""
        defaults = TrainingOptions().plain()
        changed = {k: v for k, v in self.plain().items() if k not in _ONCE and v != defaults[k]}
        words = [
            f"--{name.replace('_', '-')}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in changed.items()
        ]
        return shlex.join([*launcher, "train", *words])

    def plain(self) -> dict[str, Any]:
        """The options as numbers, strings, lists and dicts."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def save(self, path: Path) -> None:
        """Write them as YAML, for `--config`; the switches for this one start of the run are left out."""
        values = {name: value for name, value in self.plain().items() if name not in _ONCE}
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def differences(self, earlier: dict[str, Any]) -> dict[str, str]:
        """The options that change what is computed and differ from those of an earlier start, as `old → new`."""
        known = {**TrainingOptions().plain(), **earlier}
        return {
            name: f"{known[name]} → {value}"
            for name, value in self.plain().items()
            if name not in FREE and value != known[name]
        }


# What changes nothing while what it belongs to is off.
_BELONGS = {
    "local_error": ("local_error_args",),
    "distill_features": ("distill_features_args",),
    "distill_logits": ("distill_logits_args",),
    "clip_grad": ("clip_mode",),
    "model_ema": ("model_ema_decay", "model_ema_warmup"),
    "amp": ("amp_dtype",),
    "mixup or cutmix": ("mixup_prob", "mixup_switch_prob", "mixup_mode", "mixup_off_epoch"),
    "a sched": ("sched_kwargs", "warmup_epochs"),
}

_LEAST = {
    "train_images": 1,
    "img_size": 1,
    "teacher_img_size": 1,
    "epochs": 1,
    "batch_size": 1,
    "grad_accum_steps": 1,
    "lr": 0,
    "max_coupling": 0,
    "weight_decay": 0,
    "warmup_epochs": 0,
    "clip_grad": 0,
    "mixup": 0,
    "cutmix": 0,
    "mixup_off_epoch": 0,
    "patience": 0,
    "max_residual": 0,
    "residual_interval": 1,
    "skip_limit": 1,
    "seed": 0,
    "workers": 0,
}
