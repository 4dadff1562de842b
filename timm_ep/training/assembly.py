"""From options to a training loop: images, model, signals and teacher, optimizer and schedule."""

import sys
from typing import Any

import timm
import torch
from timm.data import Mixup, resolve_data_config
from timm.scheduler import create_scheduler_v2
from timm.utils import freeze
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import Subset

from timm_ep.base.channels import channel_values
from timm_ep.base.text import same_name
from timm_ep.data.datasets import DataSource, labels_of, limit, split_off
from timm_ep.data.loader import EpochOrder, Samples, training_loader
from timm_ep.data.transforms import augmentation, image_transform
from timm_ep.hub.repository import (
    CONFIG_NAME,
    PICKLES,
    WEIGHTS_NAME,
    tensor_shapes,
    verify,
    verify_weights,
)
from timm_ep.models import EpVgg
from timm_ep.models.named import check_known, create_named, is_ours
from timm_ep.signals.distillation import FeatureDistillation, LogitDistillation
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.losses import readout_criterion
from timm_ep.signals.task import EpTask
from timm_ep.signals.teachers import Teacher, TeacherCache, TeacherEnsemble, create_teacher, fingerprint
from timm_ep.training.checkpoints import CHECKPOINTS_NAME, CheckpointStore, unfinished
from timm_ep.training.distributed import World, is_primary
from timm_ep.training.images import RunImages, plain_loader, with_lost_classes
from timm_ep.training.logs import RunLog
from timm_ep.training.loop import Progress, TrainingLoop
from timm_ep.training.optimizer import create_optimizer
from timm_ep.training.options import TrainingOptions
from timm_ep.training.precision import optimizer_precision, precision_notes

__all__ = ["create_loop", "create_model", "freeze_modules", "open_images"]


def open_images(options: TrainingOptions, source: DataSource) -> tuple[RunImages, nn.Module]:
    """The images and the model for them, checked against each other.

    Raises:
        ValueError: they do not fit, or there are fewer images than one update takes.
    """
    train, validation = limit(source.train, options.train_images), source.validation
    if options.val_split:
        if validation is not source.test and validation is not None:
            raise ValueError(
                f"val_split={options.val_split}, but {options.dataset} has validation images of its own; choose one "
                "(val_split=0 takes those)."
            )
        train, validation = split_off(train, options.val_split)
    source = with_lost_classes(source, source.train, train, "is left to train on")
    if options.patience and validation is None:
        raise ValueError(
            f"patience={options.patience} needs images to judge by: set val_split, for example to 0.1, or have them in "
            "a folder `val` beside `train` and `test`. Test images choose nothing."
        )
    update = options.batch_size * options.grad_accum_steps
    if len(train) < update:
        raise ValueError(
            f"{len(train)} training images are less than a batch of {update}; lower batch_size"
            + (" or grad_accum_steps." if options.grad_accum_steps > 1 else ".")
        )
    model = create_model(options, source)
    freeze_modules(model, options.freeze_layers)
    config = resolve_data_config(pretrained_cfg=getattr(model, "pretrained_cfg", {}))
    if options.max_coupling and not isinstance(model, EpVgg):
        raise ValueError(f"max_coupling={options.max_coupling} is for an ep_vgg*; {options.model} has no couplings.")
    mean = _given("mean", options.mean, source.channels) or channel_values(config["mean"], source.channels)
    std = _given("std", options.std, source.channels) or channel_values(config["std"], source.channels)
    images = RunImages(source, train, validation, options.img_size or config["input_size"][-1], mean, std)
    _check_model(options, model, images)
    return images, model


def _given(name: str, values: list[float] | None, channels: int) -> tuple[float, ...] | None:
    if values is not None and len(values) != channels:
        raise ValueError(f"{name}={values} has {len(values)} values; the images have {channels} channels.")
    return None if values is None else tuple(values)


def create_model(options: TrainingOptions, source: DataSource) -> nn.Module:
    """The model for these images: their classes and channels are not the user's to choose."""
    given = {"num_classes": len(source.classes), "in_chans": source.channels}
    for name, value in given.items():
        if options.model_args.get(name, value) != value:
            raise ValueError(
                f"model_args has {name}={options.model_args[name]}, but the images of {options.dataset} have {value}: "
                "leave it out, it follows from the images."
            )
    start = _start(options)
    model: Any = create_named(**start, **{**options.model_args, **given})
    architecture = model.pretrained_cfg["architecture"]
    if options.initial_checkpoint is not None and architecture != _architecture(options):
        raise ValueError(
            f"{options.initial_checkpoint} holds the weights of {architecture}, not of {options.model}; give --model "
            f"{architecture}."
        )
    known, names = model.pretrained_cfg.get("label_names"), list(source.classes)
    if start["pretrained"] and known and len(known) == len(names) and [*map(same_name, known)] != names:
        # As many classes, but others: timm cannot see that, and would keep the read-out of those.
        model.reset_classifier(len(names))
        if is_primary():
            print(f"the read-out is new: the weights know the classes {list(known)[:5]!a}…", file=sys.stderr)
    if isinstance(model, EpVgg):
        model.gradient = options.model_args.get("gradient", options.gradient)
    elif options.gradient != "ep":
        raise ValueError(
            f"gradient={options.gradient} chooses between the gradients of an ep_vgg*; {options.model} has one."
        )
    return model


def _start(options: TrainingOptions) -> dict[str, Any]:
    """The name and the weights that timm is to create the model from; weights on disk are checked before."""
    path = options.initial_checkpoint
    if options.model.startswith("local-dir:") and not options.pretrained and is_primary():
        print(f"warning: the weights in {options.model} are not taken; --pretrained takes them", file=sys.stderr)
    if path is None:
        return {"model_name": options.model, "pretrained": options.pretrained}
    if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).exists():
        path = path.parent
    if options.resume and not path.exists():
        raise FileNotFoundError(
            f"initial_checkpoint={path}, which the run began with, is gone; resuming needs its configuration."
        )
    architecture = _architecture(options)
    if path.is_file() and path.suffix not in (".safetensors", *PICKLES):
        raise ValueError(
            f"initial_checkpoint={path} is no file of weights; give a run's folder, or a .safetensors file."
        )
    if path.suffix in PICKLES:
        raise ValueError(
            f"initial_checkpoint={path} may run code when it is read, and is not opened: only safetensors are. Of a "
            "training of this package give the run's folder; save others' tensors by safetensors.torch.save_file."
        )
    if path.is_dir():
        if not (path / WEIGHTS_NAME).is_file() and (path / CHECKPOINTS_NAME).is_dir():
            raise FileNotFoundError(unfinished(path))
        # timm itself compares the tensors of other models; it must not come to reading a pickle.
        _ = verify(path) if is_ours(architecture) else tensor_shapes(path / WEIGHTS_NAME)
        return {"model_name": f"local-dir:{path}", "pretrained": True}
    check_known(architecture)
    if not is_ours(architecture):
        raise ValueError(f"initial_checkpoint={path}: for {architecture} give a folder with {CONFIG_NAME}, not a file.")
    # A file alone does not say for how many classes and channels it is; its tensors do.
    shapes = tensor_shapes(path)
    cfg = timm.get_pretrained_cfg(architecture)
    classes, _ = shapes.get(f"{cfg.classifier}.weight", (0, 0))
    channels = shapes.get(f"{cfg.first_conv}.weight", (0, 3))[1]
    args = {**options.model_args, "num_classes": classes, "in_chans": channels}
    verify_weights(path, timm.create_model(architecture, device="meta", **args))
    overlay = {"file": str(path), "num_classes": classes, "input_size": (channels, *cfg.input_size[1:])}
    return {"model_name": architecture, "pretrained": True, "pretrained_cfg_overlay": overlay}


def _architecture(options: TrainingOptions) -> str:
    """The name of the model without the tag of trained weights."""
    return options.model.partition(".")[0]


def freeze_modules(model: nn.Module, names: list[str]) -> None:
    """Keep the modules of these names from learning.

    Raises:
        ValueError: a name of no module, or nothing that is left to learn.
    """
    known = dict(model.named_modules())
    for name in names:
        if not name or name not in known:
            raise ValueError(
                f"freeze_layers: {name!r} is no module of the model; those that are: "
                f"{', '.join(known)!s:.300}, … (see model.named_modules())."
            )
    if names:
        freeze(model, names)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze_layers={names} leaves nothing of the model to learn.")


def _check_model(options: TrainingOptions, model: nn.Module, images: RunImages) -> None:
    """One image through the model: better now than after the teacher, the cache and the first batch."""
    source = images.source
    for use, part in {"training": images.train, "validation": images.validation, "test": source.test}.items():
        labels = labels_of(part)
        if labels and not 0 <= min(labels) <= max(labels) < len(source.classes):
            hidden = "; labels of -1 are hidden ones, with which nothing can be tested" if min(labels) == -1 else ""
            raise ValueError(
                f"The {use} images of {options.dataset} have labels {min(labels)} to {max(labels)}, and it names "
                f"{len(source.classes)} classes{hidden}."
            )
    image = image_transform(images.size, images.mean, images.std)(images.train[0][0])
    try:
        with torch.no_grad():
            logits = model.eval()(image[None])
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{options.model} refuses images of {images.size}×{images.size} pixels ({error}); choose another img_size."
        ) from error
    if logits.shape != (1, len(source.classes)):
        raise ValueError(
            f"{options.model} gives {tuple(logits.shape)} for an image of {source.channels} channels and "
            f"{images.size}×{images.size} pixels; expected (1, {len(source.classes)}), one logit a class."
        )


def create_loop(
    options: TrainingOptions,
    world: World,
    store: CheckpointStore,
    images: RunImages,
    model: nn.Module,
    identity: dict[str, Any],
    state: dict[str, Any],
) -> TrainingLoop:
    """The loop over all that the options ask for.

    Args:
        options: of the training.
        world: the processes.
        store: of checkpoints.
        images: for training and validation.
        model: on the device.
        identity: of the run besides its options, for checkpoints.
        state: to go on from; empty to start.
    """
    transform = _augmentation(options, images)
    samples = Samples(images.train, transform, options.seed)
    order = EpochOrder(len(samples), options.batch_size, options.seed, world.rank, world.size, options.grad_accum_steps)
    if not order.updates:
        raise ValueError(
            f"{len(samples)} training images are less than one update of {world.size} processes; lower batch_size."
        )
    task = _create_task(options, model, images, world)
    if task.teacher is not None:
        identity = {**identity, "teacher": fingerprint(task.teacher)}
        if state and state["identity"].get("teacher", identity["teacher"]) != identity["teacher"]:
            raise ValueError(
                f"The run in {options.output} cannot be resumed: the teacher {options.teacher} has other weights than "
                "when it began. Give it back its weights, or start a new run in another --output."
            )
    optimizer = create_optimizer(options, task)
    if options.model_ema:
        task.setup_ema(options.model_ema_decay, use_warmup=options.model_ema_warmup)
    cache = None
    if options.cache_teacher and task.teacher is not None:
        batches = (batch.to(world.device) for batch, _ in plain_loader(options, images.train, images))
        cache = TeacherCache(task.teacher, batches, len(images.train))
    if options.torchcompile:
        if options.torchcompile not in (backends := torch.compiler.list_backends(exclude_tags=())):
            raise ValueError(f"torchcompile={options.torchcompile!r} is unknown; choose from {', '.join(backends)}.")
        task.compile(backend=options.torchcompile)
    if world.size > 1:
        device_ids = None if world.device.type == "cpu" else [world.device.index]
        task.prepare_distributed(device_ids=device_ids)
    scheduler = _create_scheduler(options, optimizer, order.updates)
    progress = Progress.of(state["progress"]) if state else Progress()
    loop = TrainingLoop(
        options=options,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=training_loader(samples, order, options.workers, pin=world.device.type == "cuda"),
        order=order,
        validation=None if images.validation is None else plain_loader(options, images.validation, images, world),
        world=world,
        store=store,
        log=RunLog(
            options.output,
            options.epochs,
            order.updates,
            options.quiet,
            options.log_tensorboard,
            world.primary,
            done=progress.epoch * order.updates + progress.update,
        ),
        mixup=_create_mixup(options, len(images.source.classes)) if options.mixes else None,
        cache=cache,
        identity=identity,
        probe=_probe(options, images),
        optimizer_precision=optimizer_precision(world),
    )
    for note in precision_notes(options, model, world.device):
        loop.log.warn(note)
    if task.teacher is not None:
        loop.log.say(f"teacher {options.teacher}: {task.teacher.extra_repr()}")
    if state:
        loop.restore(state)
        loop.log.say(f"going on after update {loop.updates}, in epoch {loop.progress.epoch + 1}")
    return loop


def _create_scheduler(options: TrainingOptions, optimizer: torch.optim.Optimizer, updates: int) -> Any:
    """timm's schedule over the whole training, of so many updates an epoch; None to leave the learning rate alone."""
    own = {
        "sched": options.sched,
        "warmup_epochs": options.warmup,
        "warmup_prefix": True,
        "step_on_epochs": False,
        "updates_per_epoch": updates,
    }
    if taken := sorted(own.keys() & options.sched_kwargs):
        raise ValueError(
            f"sched_kwargs has {', '.join(taken)}, which the training sets itself, by the options sched and "
            "warmup_epochs."
        )
    defaults = {
        "num_epochs": options.epochs - options.warmup,
        "warmup_lr": max(options.layer_lr, default=options.lr) / 100,
    }
    scheduler, epochs = create_scheduler_v2(optimizer, **own, **{**defaults, **options.sched_kwargs})
    # With a number of its own it may be longer than the training, as the literature has it.
    if epochs != options.epochs and "num_epochs" not in options.sched_kwargs:
        raise ValueError(
            f"sched_kwargs={options.sched_kwargs} make a schedule of {epochs} epochs, and the training has "
            f"{options.epochs}: give with sched_kwargs the num_epochs of one cycle, without warmup ({options.warmup}) "
            "and cooldown."
        )
    if scheduler is None:  # in timm it is the schedule that applies the scale of layer_decay
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return scheduler


def _augmentation(options: TrainingOptions, images: RunImages) -> Any:
    try:
        return augmentation(
            images.size,
            images.mean,
            images.std,
            options.augment,
            hflip=options.hflip,
            vflip=options.vflip,
            color_jitter=options.color_jitter,
            auto_augment=options.aa,
            re_prob=options.reprob,
        )
    except (AssertionError, KeyError, IndexError) as error:
        raise ValueError(
            f"aa={options.aa!r} is no automatic augmentation of timm ({error}); such are rand-m9-mstd0.5, "
            "augmix-m5-w4, original, originalr, v0, v0r and 3a."
        ) from error


def _create_mixup(options: TrainingOptions, classes: int) -> Mixup:
    return Mixup(
        options.mixup,
        options.cutmix,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=classes,
    )


def _create_task(options: TrainingOptions, model: nn.Module, images: RunImages, world: World) -> EpTask:
    teacher = local_errors = features = logits = None
    if options.local_error:
        local_errors = LocalErrors(model, options.local_error, **options.local_error_args)
    if options.teacher:
        teacher = _create_teacher(options, images).to(world.device)
        if options.distill_features:
            features = FeatureDistillation(model, teacher, options.distill_features, **options.distill_features_args)
        if options.distill_logits:
            logits = LogitDistillation(model, options.distill_logits, **options.distill_logits_args)
    task = EpTask(
        model,
        local_errors,
        features,
        logits,
        teacher,
        criterion=readout_criterion(model, options.criterion, smoothing=options.smoothing, soft_targets=options.mixes),
        device=world.device,
    )
    return task.to(world.device)


def _create_teacher(options: TrainingOptions, images: RunImages) -> Teacher | TeacherEnsemble:
    names = [options.teacher] if isinstance(options.teacher, str) else options.teacher or []
    teachers = [
        create_teacher(
            name,
            images.mean,
            images.std,
            options.teacher_checkpoint,
            images.source.classes if options.distill_logits else None,
            options.teacher_img_size,
            options.teacher_args,
        )
        for name in names
    ]
    return teachers[0] if len(teachers) == 1 else TeacherEnsemble(teachers)


def _probe(options: TrainingOptions, images: RunImages) -> tuple[torch.Tensor, torch.Tensor]:
    """The first training images, as many as a batch, with targets as the criterion takes them."""
    few = Subset(images.train, range(min(options.batch_size, len(images.train))))
    pictures, labels = next(iter(plain_loader(options, few, images)))
    return pictures, one_hot(labels, len(images.source.classes)).float() if options.mixes else labels
