"""What a training does about numbers that are not finite and nets that do not settle."""

import csv

import pytest
import torch

from timm_ep.models import EpVgg
from timm_ep.training.checkpoints import CheckpointStore
from timm_ep.training.guard import Guard, layer_residuals
from timm_ep.training.loop import TrainingLoop
from timm_ep.training.options import TrainingOptions
from timm_ep.training.trainer import Trainer

OPTIONS = {
    "model_args": {"architecture": [8, "M", 8, "M", 8, "M", 8, "M"]},
    "train_images": 128,
    "batch_size": 16,
    "epochs": 1,
    "quiet": True,
}


def spoil(monkeypatch, updates, how):
    """Let `how(loop, batches)` act before the updates with these numbers, from 0."""
    original = TrainingLoop._update

    def patched(self, batches, stop):
        if self.updates in updates:
            how(self, batches)
        return original(self, batches, stop)

    monkeypatch.setattr(TrainingLoop, "_update", patched)


def nan_pixels(loop, batches):
    batches[0][0][3, 0, 5, 5] = float("nan")


def nan_loss(loop, batches):
    loop.task._objective.criterion.register_forward_hook(lambda module, inputs, loss: loss * float("nan"))


def skipped(output):
    with (output / "summary.csv").open() as file:
        return [int(row["skipped"]) for row in csv.DictReader(file)]


def test_a_batch_with_nan_pixels_is_skipped_counted_and_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {2, 5}, nan_pixels)
    Trainer(**OPTIONS, output=tmp_path).run()
    told = capsys.readouterr().err
    assert [f"skipped update {n}, epoch 1: pixels of its images are NaN" in told for n in (3, 4, 6)] == [1, 0, 1]
    assert skipped(tmp_path) == [2]


def test_a_skipped_update_changes_no_weight_and_no_average(tmp_path, monkeypatch):
    seen = []

    def note(loop, batches):
        seen.append([value.clone() for value in loop.task.state_dict().values()])
        if loop.updates == 3:
            nan_pixels(loop, batches)

    spoil(monkeypatch, range(8), note)
    Trainer(**OPTIONS, model_ema=True, model_ema_decay=0.5, local_error=0.3, output=tmp_path).run()
    assert all(torch.equal(*pair) for pair in zip(seen[3], seen[4], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(seen[4], seen[5], strict=True))


def test_a_gradient_whose_squares_overflow_is_finite_all_the_same(tmp_path, monkeypatch):
    norms = []

    def enlarge(loop, batches):
        loop.task._objective.criterion.register_forward_hook(lambda module, inputs, loss: loss * 1e25)
        loop.optimizer.register_step_pre_hook(
            lambda *_: norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in loop.task.parameters()])))
        )

    spoil(monkeypatch, {2}, enlarge)
    Trainer(**OPTIONS, opt="lion", output=tmp_path).run()
    assert norms[0] == float("inf")
    assert skipped(tmp_path) == [0]


@pytest.mark.parametrize("mode", ["float32", "float16"])
def test_too_many_skips_in_a_row_stop_the_run_with_a_diagnosis(mode, tmp_path, monkeypatch):
    """Naming the layer that settles worst, its residual, and the settings to change; the checkpoint before stays."""
    spoil(monkeypatch, {4}, nan_loss)
    options = {**OPTIONS, "skip_limit": 3, "checkpoint_interval": "2"}
    if mode == "float16":
        options |= {"amp": True, "amp_dtype": "float16"}
    with pytest.raises(FloatingPointError) as raised:
        Trainer(**options, output=tmp_path).run()
    text = str(raised.value)
    assert "3 updates in a row were skipped, the last (update 7, epoch 1) because the loss is nan" in text
    assert "of 4 settles worst: its state changes by" in text
    assert "Lower lr=0.002, or set clip_grad; " in text
    assert "lower feedback=0.02 or raise free_sweeps=6" in text
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    assert newest.path.name == "step-000000006.pt"
    assert all(value.isfinite().all() for value in newest.state["state_dict"].values())


def test_a_gradient_that_no_scale_makes_finite_is_noticed_in_float16_too(tmp_path, monkeypatch):
    """From 2¹⁶ it takes 16 updates to scale no more; until then infinite gradients are the scaler's own business."""

    def nan_gradient(loop, batches):
        loop.task.model.layers[0].bias.register_hook(lambda gradient: gradient * float("nan"))

    spoil(monkeypatch, {0}, nan_gradient)
    options = {**OPTIONS, "epochs": 4, "skip_limit": 3, "amp": True, "amp_dtype": "float16"}
    with pytest.raises(FloatingPointError, match=r"update 19, epoch 3\) because the gradient is not finite"):
        Trainer(**options, output=tmp_path).run()
    assert skipped(tmp_path) == [0, 0]


def test_a_net_that_does_not_settle_is_not_trained(tmp_path, capsys):
    """λ = 1 and large gains: the free phase swings."""
    options = {**OPTIONS, "model_args": {**OPTIONS["model_args"], "feedback": 3.0, "init_gain": 2.0}}
    options |= {"skip_limit": 4, "max_residual": 0.05}
    told = r"4 updates in a row.*free residual .* is above max_residual=0\.05.*Raise max_residual=0\.05, or lower feed"
    with pytest.raises(FloatingPointError, match=told):
        Trainer(**options, output=tmp_path).run()
    assert capsys.readouterr().err.count("skipped") == 4


def test_the_diagnosis_names_the_layer_that_settles_worst_and_broken_weights():
    model = EpVgg((4, "M", 6, "M", 6), num_classes=3, feedback=0.5)
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        model.layers[0].bias.fill_(5.0)  # saturated, so that it hardly changes
    last = layer_residuals(model, images)[-1]
    worst = int(last.argmax()) + 1
    assert last.max() > 2 * last.min()
    text = Guard(in_a_row=3).diagnosis("of this", "update 9", model, images, TrainingOptions())
    assert f"Layer {worst} of 3 settles worst: its state changes by {float(last.max()):.2g} of its size" in text
    assert "3 updates in a row were skipped, the last (update 9) because of this" in text
    assert "not finite any more" not in text
    model.layers[1].gain.data[2] = float("inf")
    text = Guard().diagnosis("of this", "update 9", model, images, TrainingOptions(clip_grad=1.0))
    assert "Weights are not finite any more, first layers.1.gain" in text
    assert "set clip_grad" not in text


def test_residuals_by_layer_agree_with_the_models_own():
    model = EpVgg((4, "M", 6, "M"), num_classes=3, feedback=0.5)
    images = torch.randn(8, 3, 16, 16)
    assert layer_residuals(model, images).amax(1).tolist() == pytest.approx(model.free_residual(images))
    model.gradient = "backprop"
    assert layer_residuals(model, images).numel() == 0
