"""Training a model of timm's registry by EP, from options to a folder with weights that timm loads."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from timm_ep.base.files import only_one, replacing
from timm_ep.data.loader import seed_everything
from timm_ep.data.pictures import UnreadableImage
from timm_ep.hub.cards import CURVES_NAME, RESULTS_NAME, RunFacts
from timm_ep.hub.curves import Plot
from timm_ep.hub.export import save
from timm_ep.models import EpVgg
from timm_ep.training.assembly import create_loop, open_images
from timm_ep.training.checkpoints import CHECKPOINTS_NAME, CheckpointStore, load_checkpoint
from timm_ep.training.distributed import World, join_world
from timm_ep.training.evaluate import accuracy_line, evaluate
from timm_ep.training.images import BAD_IMAGES_NAME, RunImages, open_source, plain_loader
from timm_ep.training.logs import RunLog
from timm_ep.training.loop import TrainingLoop
from timm_ep.training.options import ARGS_NAME, TrainingOptions
from timm_ep.training.resume import check_resumed, discard, earlier_state
from timm_ep.training.stopping import Interrupted


@dataclass
class Trainer(TrainingOptions):
    """Train a model: `Trainer(model="ep_vgg5_025", epochs=5).run()`, or `timm-ep train` with the same options."""

    def run(self) -> RunFacts:
        """Train, test, and write the output folder.

        Returns:
            the facts of the run, with the test accuracy in percent.

        Raises:
            FileExistsError: the output folder holds a run, and neither `resume` nor `overwrite` says what to do.
            FloatingPointError: too many updates in a row could not be made; the message says why.
            OSError: a file could not be written; earlier ones are intact.
            SystemExit: SIGTERM or Ctrl-C, after a checkpoint; the code is 143 or 130.
            ValueError: options that do not fit the data, the model or the run that is resumed.
        """
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.deterministic or deterministic)
        try:
            with join_world(self.device) as world, self._alone(world):
                return self._run(world)
        finally:
            torch.use_deterministic_algorithms(deterministic)

    @contextmanager
    def _alone(self, world: World) -> Iterator[None]:
        """Keep other trainings out of the output folder; what the first process finds there, all do."""
        with ExitStack() as stack:
            refused = None
            try:
                if world.primary:
                    stack.enter_context(only_one(self.output))
            except OSError as error:
                refused = error
            world.agree(refused)
            yield

    def _run(self, world: World) -> RunFacts:
        store = CheckpointStore(self.output / CHECKPOINTS_NAME)
        state = earlier_state(self, world, store)
        source, left_out = open_source(self, world, state)
        torch.manual_seed(self.seed)  # of the initial weights; all else is seeded by its position
        images, model = open_images(self, source)
        model = model.to(world.device)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        identity = {
            "train_images": len(images.train),
            "validation_images": 0 if images.validation is None else len(images.validation),
            "labels": images.fingerprint(),
            "classes": list(source.classes),
            "model": _facts_of(model, images),
            "world": world.size,
            "bad_images": left_out,
        }
        if state:
            check_resumed(self, state, identity, world)
        loop = create_loop(self, world, store, images, model, identity, state)
        try:
            if world.primary:
                self.output.mkdir(parents=True, exist_ok=True)
                if self.overwrite:  # only now that the options are known to be good
                    discard(self, store)
                self.save(self.output / ARGS_NAME)
                self._tell(loop.log, images, left_out)
            try:
                loop.run()
            except Interrupted:
                if world.primary:
                    self._save_unless_finished(self._result(loop), images)
                raise
            facts = self._finish(loop, images, model)
        finally:
            loop.log.close()
        world.from_primary(None)  # nobody leaves before the primary process has written everything
        return facts

    def _tell(self, log: RunLog, images: RunImages, left_out: dict[str, str]) -> None:
        """What the user should know of the options and the images before they are trained on."""
        for note in images.source.notes:
            log.warn(note)
        if idle := self.without_effect:
            log.warn(f"without effect: {', '.join(idle)}")
        if images.chooses_by_test:
            log.warn("no test images: the best epoch is chosen by those that it is tested on, which flatters it")
        if left_out:
            listed = self.output / BAD_IMAGES_NAME
            with replacing(listed) as temporary:
                lines = (f"{name}: {reason}\n" for name, reason in sorted(left_out.items()))
                temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
            log.warn(f"{len(left_out)} images cannot be read and are left out; see {listed}")

    def _finish(self, loop: TrainingLoop, images: RunImages, model: Any) -> RunFacts:
        """Test once, and write what the run is for."""
        world, progress = loop.world, loop.progress
        # Without autocast, as the model is saved and as `timm-ep validate` will test it again.
        averaged = self._result(loop)
        if world.primary:
            self._save_unless_finished(averaged, images)
        seed_everything("test", 0)  # for a net with the noise of a device
        loader = plain_loader(self, images.source.test, images, world)
        try:
            tested = evaluate(averaged, loader, world.device, world.sum)
        except UnreadableImage as error:
            raise UnreadableImage(f"{error} The training is done: --resume goes on with its test.") from error
        progress.rows[-1].update(test_loss=tested.loss, test_accuracy=tested.top1)
        start = self.initial_checkpoint or (self.model if self.pretrained else None)
        facts = RunFacts(
            architecture=model.pretrained_cfg["architecture"],
            command=self.command(world.launcher),
            seed=self.seed,
            dataset=self.dataset,
            n_train=len(images.train),
            n_test=len(images.source.test),
            tested_on="validation" if images.chooses_by_test else "test",
            top1=tested.top1,
            top5=tested.top5,
            epochs=progress.epoch,
            train_seconds=progress.seconds,
            machine=world.machine,
            settings=dataclasses.asdict(model.settings) if isinstance(model, EpVgg) else {},
            feedback_share=max(tested.feedback_shares, default=None),
            feedback_shares=tested.feedback_shares,
            couplings=averaged.couplings((images.size, images.size)) if tested.feedback_shares else [],
            signals={name: getattr(self, name) for name in loop.task.signals},
            teacher=", ".join(self.teacher) if isinstance(self.teacher, list) else self.teacher,
            started_from=None if start is None else str(start),
        )
        if world.primary:
            loop.log.write(progress.rows)
            self._save_model(averaged, images)
            facts.save(self.output / RESULTS_NAME)
            self._plot(loop.log)
            print(f"saved to {self.output}\n{accuracy_line(facts.top1, facts.architecture, facts)}")
        return facts

    def _result(self, loop: TrainingLoop) -> Any:
        """The model with what the training is for: the best weights in validation or else the last, averaged or not."""
        progress, task = loop.progress, loop.task
        if progress.best_epoch and (progress.best_epoch != progress.epoch or progress.update):
            best = load_checkpoint(loop.store.best)
            key = "state_dict_ema" if task.has_ema() else "state_dict"
            task.load_checkpoint_state(best[key], best.get("task_state"), ema=task.has_ema())
            loop.log.say(f"the result is that of epoch {progress.best_epoch}, the best in validation")
        model: Any = task.get_eval_model(ema=task.has_ema())
        loop.cap_couplings(model)  # a run that was stopped may be in between two updates that do
        return model

    def _save_unless_finished(self, model: Any, images: RunImages) -> None:
        """So that it can be used as it is; a finished run that is made longer stays what it was, facts and weights."""
        if not (self.output / RESULTS_NAME).exists():
            self._save_model(model, images)

    def _save_model(self, model: Any, images: RunImages) -> None:
        save(self.output, model, images.source.classes, images.size, images.mean, images.std)

    def _plot(self, log: RunLog) -> None:
        if find_spec("matplotlib") is None:
            log.say(f"no {CURVES_NAME}: matplotlib is not installed (pip install timm_ep[plots])")
            return
        Plot(self.output, self.output / CURVES_NAME).run()


def _facts_of(model: Any, images: RunImages) -> dict[str, Any]:
    """What a model has from where it started, and not from the options alone."""
    settings = dataclasses.asdict(model.settings) if isinstance(model, EpVgg) else {}
    return {**settings, "img_size": images.size, "mean": list(images.mean), "std": list(images.std)}
