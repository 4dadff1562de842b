"""Going on with a run: from what state, and whether the options still ask for the same run."""

import sys
from pathlib import Path
from typing import Any

from timm_ep.base.files import remove_unfinished
from timm_ep.hub.cards import CARD_NAME, CURVES_NAME, LAYERS_NAME, LOG_NAME, RESULTS_NAME, SETTLING_NAME, TWIN_NAME
from timm_ep.hub.export import clean
from timm_ep.hub.repository import CONFIG_NAME, WEIGHTS_NAME
from timm_ep.training.checkpoints import CHECKPOINTS_NAME, CheckpointStore, Newest, UnusableCheckpoint, load_checkpoint
from timm_ep.training.distributed import World
from timm_ep.training.images import BAD_IMAGES_NAME
from timm_ep.training.options import ARGS_NAME, TrainingOptions

__all__ = ["check_resumed", "discard", "earlier_state"]

# What a run writes besides its options and checkpoints, and of that what tells that there is one.
_WRITTEN = (CONFIG_NAME, LOG_NAME, CURVES_NAME, LAYERS_NAME, SETTLING_NAME, BAD_IMAGES_NAME)
_READ = (RESULTS_NAME, TWIN_NAME, WEIGHTS_NAME)


def earlier_state(options: TrainingOptions, world: World, store: CheckpointStore) -> dict[str, Any]:
    """The state to go on from, the same in every process; empty for a new run.

    Raises:
        FileExistsError: the output folder holds a run, and neither `resume` nor `overwrite` says what to do; or a model
            without checkpoints, which cannot be resumed.
        UnusableCheckpoint: there are checkpoints, and none is good.
    """
    if world.primary:
        store.clean()
        clean(options.output)
        for name in (ARGS_NAME, *_WRITTEN, *_READ):
            remove_unfinished(options.output / name)
    if options.overwrite:
        return {}
    newest = Newest(None, {}, [])
    problem: Exception | None = None
    if world.primary:
        try:
            newest = store.newest() if options.resume else newest
            problem = _taken(options, store) if newest.path is None else None
        except UnusableCheckpoint as error:
            problem = error
    world.agree(problem)
    for reason in newest.refused:
        print(f"warning: {reason} Going on from the one before, {newest.path}.", file=sys.stderr)
    path = world.from_primary(newest.path)
    return newest.state if world.primary or path is None else load_checkpoint(path)


def _taken(options: TrainingOptions, store: CheckpointStore) -> FileExistsError | None:
    """What to say of an output folder that is not free for a new run."""
    if store.steps():
        how = "Go on with it by --resume, choose another --output, or discard it by --overwrite."
    elif (options.output / RESULTS_NAME).exists() or (options.output / WEIGHTS_NAME).exists():
        how = "It has no checkpoints to go on from: choose another --output, or discard it by --overwrite."
    elif foreign := _foreign(options.output):
        return FileExistsError(
            f"{options.output} holds {', '.join(foreign)}, which a run would replace, and which no run of this package "
            "wrote: choose another --output, or replace them by --overwrite."
        )
    else:
        return None
    return FileExistsError(f"{options.output} holds a run already. {how}")


def _foreign(folder: Path) -> list[str]:
    """The files that a run would replace and did not write: where it left its options, all others are its own too."""
    options = folder / ARGS_NAME
    if options.is_file() and "\nlocal_error:" in options.read_text(encoding="utf-8", errors="replace"):
        return []
    best = CheckpointStore(folder / CHECKPOINTS_NAME).best.relative_to(folder)
    return [str(name) for name in (ARGS_NAME, *_WRITTEN, best) if (folder / name).exists()]


def discard(options: TrainingOptions, store: CheckpointStore) -> None:
    """Remove what the folder of an earlier run would be resumed or read from, and nothing else."""
    store.discard()
    for name in (*_WRITTEN, *_READ):
        (options.output / name).unlink(missing_ok=True)
    for path in (options.output / "tensorboard").glob("events.out.tfevents.*"):
        path.unlink()
    if (card := options.output / CARD_NAME).exists():
        print(
            f"warning: {card} is of what was here before; write one by: timm-ep card {options.output}", file=sys.stderr
        )


def check_resumed(options: TrainingOptions, state: dict[str, Any], identity: dict[str, Any], world: World) -> None:
    """Refuse to go on with what would give another result; warn where another number of epochs is asked for.

    Args:
        options: of this start.
        state: of a checkpoint.
        identity: what this start has besides options, as in the checkpoint.
        world: the processes of this start.

    Raises:
        ValueError: options, images, classes or processes differ; the message names each.
    """
    earlier, differing = state["identity"], options.differences(state["options"])
    batch = [
        options["batch_size"] * options["grad_accum_steps"] * size
        for options, size in ((state["options"], earlier["world"]), (options.plain(), world.size))
    ]
    # Other ranks or batches of the same updates: equal but for rounding and mixing.
    excused = {"epochs"} | ({"batch_size", "grad_accum_steps"} if batch[0] == batch[1] else set())
    changed = [f"{name}: {change}" for name, change in differing.items() if name not in excused]
    if batch[0] != batch[1] and earlier["world"] != world.size:
        changed.append(f"processes: {earlier['world']} → {world.size}, so that an update has other images")
    for images in ("train_images", "validation_images"):
        if earlier.get(images, identity[images]) != identity[images]:  # runs of before have not all of them
            changed.append(f"{images.replace('_', ' ')}: {earlier[images]} → {identity[images]}")
    if earlier.get("labels", identity["labels"]) != identity["labels"]:
        changed.append("the labels of the images, or their order")
    known = earlier.get("model", {})
    changed += [
        f"{name}: {known[name]} → {value}, of what it starts from"
        for name, value in identity["model"].items()
        if name in known and known[name] != value and name not in differing
    ]
    if earlier["classes"] != identity["classes"]:
        changed.append("the classes")
    if changed:
        raise ValueError(
            f"The run in {options.output} cannot be resumed with other options ({'; '.join(changed)}): it would be no "
            f"run of either. Give those in {options.output / ARGS_NAME}, or start a new run in another --output."
        )
    progress = state["progress"]
    if options.epochs < (begun := progress["epoch"] + bool(progress["update"])):
        raise ValueError(
            f"The run in {options.output} is in epoch {begun} already, and cannot be one of {options.epochs}: give "
            f"--epochs={begun} to end with that one, or more."
        )
    if world.primary and state["options"]["epochs"] != options.epochs:
        print(
            f"warning: epochs: {state['options']['epochs']} → {options.epochs}. The learning rate follows the schedule "
            "of the new number from here on, so this is not the run of that number from the start.",
            file=sys.stderr,
        )
