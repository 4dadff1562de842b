"""timm's scripts, unmodified, with this package's models: through `timm-ep run`, on class folders.

The scripts are in timm's repository and not in its package; `scripts/test` fetches them with the source release where
it can. What they are made of (models from their options, distillation, ONNX) is in the package, and always tested.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from test_timm_suite import RELEASE
from timm.models import resolve_model_input_args
from timm.task import FeatureDistillationTask, LogitDistillationTask
from timm.utils.onnx import onnx_export
from torch.testing import assert_close

from timm_ep.data.datasets import open_data

SHIPPED = timm.list_pretrained("ep_*")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_of_timms_scripts_is_the_shipped_model(name):
    """They look its configuration up, and give that instead of the tag."""
    options = {"img_size": None, "in_chans": None, "input_size": None}
    theirs = timm.create_model(**resolve_model_input_args(name, options, pretrained=True))
    ours = timm.create_model(name, pretrained=True)
    assert theirs.settings == ours.settings
    images = torch.randn(1, *ours.pretrained_cfg["input_size"])
    assert torch.equal(theirs(images), ours(images))


@pytest.mark.parametrize("kind", [LogitDistillationTask, FeatureDistillationTask])
def test_timms_distillation(kind):
    """Student and teacher of this package in timm's own tasks: the gradient is EP's, of the same loss."""
    student = timm.create_model("ep_vgg5_025", num_classes=10)
    task = kind(student, "ep_vgg16_025.ep_cifar10", distill_loss_weight=0.5, task_loss_weight=0.5, verbose=False)
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    task(images, labels)["loss"].backward()
    assert all(parameter.grad.norm() > 0 for parameter in student.parameters())
    if kind is LogitDistillationTask:
        ep = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
        student.zero_grad()
        with torch.no_grad():
            taught = task.teacher(images).softmax(1)
        logits = student(images)
        distilled = F.kl_div(logits.log_softmax(1), taught, reduction="batchmean")
        (0.5 * F.cross_entropy(logits, labels) + 0.5 * distilled).backward()
        for name, parameter in student.named_parameters():
            assert_close(ep[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_timms_export_to_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = timm.create_model("ep_vgg5_025.ep_digits", pretrained=True)
    onnx_export(model, str(tmp_path / "model.onnx"), batch_size=2, check_forward=True)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    images = torch.randn(7, 1, 32, 32)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Class folders of ten digits, RGB: 80 to train on, 40 to validate."""
    root = tmp_path_factory.mktemp("digits")
    data = open_data("digits")
    for split, part, count in (("train", data.train, 80), ("validation", data.test, 40)):
        for index in range(count):
            image, label = part[index]
            folder = root / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.convert("RGB").save(folder / f"{index}.png")
    return root


def run(script: str, *words, cwd: Path) -> str:
    """What a script of timm prints."""
    if not (RELEASE / script).exists():
        pytest.skip(f"{script} of timm {timm.__version__} is not in {RELEASE}; scripts/test fetches it where it can")
    command = [sys.executable, "-W", "ignore", "-m", "timm_ep", "run", str(RELEASE / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_train_distil_validate_and_infer(folders, tmp_path):
    model = ["--model=ep_vgg5_025", "--num-classes=10"]
    where = ["--device=cpu", "--workers=1", "--batch-size=8"]
    training = [folders, *model, *where, "--epochs=1", "--opt=adamw", "--lr=1e-3", "--output=out", "--experiment=run"]
    if "--kd-model-name" in (RELEASE / "train.py").read_text() if (RELEASE / "train.py").exists() else "":
        training.append("--kd-model-name=ep_vgg16_025.ep_cifar10")
    run("train.py", *training, cwd=tmp_path)
    checkpoint = tmp_path / "out" / "run" / "last.pth.tar"
    assert checkpoint.exists()
    printed = run("validate.py", folders, *model, *where, f"--checkpoint={checkpoint}", cwd=tmp_path)
    assert json.loads(printed.partition("--result")[2].split("}")[0] + "}")["img_size"] == 32
    pytest.importorskip("pandas")
    words = [
        folders / "validation",
        *model,
        *where,
        f"--checkpoint={checkpoint}",
        "--results-dir=out",
        "--label-type=none",
    ]
    run("inference.py", *words, "--include-index", cwd=tmp_path)
    (answers,) = (tmp_path / "out").glob("*.csv")
    assert len(answers.read_text().splitlines()) == 41


@pytest.mark.slow
def test_benchmark_and_onnx_export(tmp_path):
    words = ["--model=ep_vgg5_025", "--device=cpu", "--batch-size=2", "--num-bench-iter=2", "--num-warm-iter=1"]
    assert '"infer_samples_per_sec"' in run("benchmark.py", *words, "--bench=inference", cwd=tmp_path)
    words = ["model.onnx", "--model=ep_vgg9_050.ep_cifar10", "--num-classes=10", "--img-size=32", "--batch-size=2"]
    run("onnx_export.py", *words, "--check-forward", cwd=tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size > 4_000_000
