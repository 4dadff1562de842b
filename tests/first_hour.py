"""The first hour with a folder of pictures and a shell: a table of what people have, and what comes of it.

    python tests/first_hour.py                   the table, with the code that is imported
    python tests/first_hour.py --before db085a6  and beside it that of an earlier commit

Each row holds several cases, each with the value that is right. `tests/test_first_hour.py` holds the code to them.
"""

import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

Case = tuple[str, Callable[[], Any], Any]  # what is looked at, how it is had, what is right
TINY = ['--model-args={"architecture": [4, "M", 6, "M"]}', "--img-size=16", "--batch-size=4", "--epochs=1"]
SUFFIXES = ["png", "jpg", "JPEG", "bmp", "webp", "tif", "TIFF", "gif"]


# A server that has imported the package once and forks: a process costs little.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["timm_ep.training.trainer", "timm_ep.training.predict", "matplotlib.figure"])


class Done(NamedTuple):
    """How a command ended. Code -1 stands for a traceback."""

    code: int
    out: str
    err: str


def command(*words: object) -> Done:
    """Run `timm-ep …` in this process."""
    from timm_ep import cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except Exception as error:  # noqa: BLE001  (it is what is shown)
            code = -1
            err.write(f"{type(error).__name__}: {error}")
    return Done(code, out.getvalue(), err.getvalue())


def apart(
    words: list[object], scratch: Path, folder: Path | None = None, unread: bool = False, **environment: str
) -> Done:
    """Run `timm-ep …` in a process of its own, in `folder`; with nobody who reads what it prints if `unread`."""
    out, err = (scratch / f"{time.monotonic_ns()}.{name}" for name in ("out", "err"))
    process = PROCESSES.Process(
        target=_apart, args=([str(word) for word in words], folder, environment, out, err, unread)
    )
    process.start()
    process.join(120)
    process.kill()
    told = err.read_text(errors="replace")
    code = -1 if "Traceback" in told or process.exitcode is None else process.exitcode
    return Done(code, "" if unread else out.read_text(errors="replace"), told)


def _apart(
    words: list[str], folder: Path | None, environment: dict[str, str], out: Path, err: Path, unread: bool
) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    if unread:
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(writer, 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  (the one of before takes it for what it was)
    if words[0] == "killed":
        with interrupted(1, lambda loop: os.kill(os.getpid(), signal.SIGKILL)):
            train(Path(words[1]), Path(words[2]), "--checkpoint-interval=1")
    from timm_ep import cli

    cli.main(words)


def shell(words: list[object], **environment: str) -> Done:
    """Run a program that has to import the package itself."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return Done(-1 if "Traceback" in done.stderr else done.returncode, done.stdout, done.stderr)


def picture(path: Path, value: int = 100, size: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, 0, 255 - value)).save(path)
    return path


def folders(root: Path, *names: str, splits: tuple[str, ...] = ("train", "test"), count: int = 4) -> Path:
    for split in splits:
        for label, name in enumerate(names or ("cat", "dog")):
            for index in range(count):
                picture(root / split / name / f"{index}.png", 200 * label + index)
    return root


def train(data: Path, run: Path, *words: object) -> Done:
    return command("train", "--dataset=folder", f"--data-dir={data}", *TINY, f"--output={run}", *words)


def opened(data: Path) -> Any:
    from timm_ep.data.datasets import open_data

    return open_data("folder", data)


def shape(data: Path) -> Any:
    """Classes, training images and their labels."""
    source = opened(data)
    return source.classes, len(source.train), [source.train[index][1] for index in range(len(source.train))]


def split_named_classes(folder: Path) -> Iterator[Case]:
    """1. Class folders named like splits"""
    for pair in (("invalid", "valid"), ("evaluation", "val"), ("test", "train")):
        data = folders(folder / pair[0], *pair)
        yield " ".join(pair), lambda data=data: shape(data), (pair, 8, [0] * 4 + [1] * 4)


def nested_folders(folder: Path) -> Iterator[Case]:
    """2. Nested folders"""
    data = folders(folder, "cat/2023", "cat/2024/may", "dog/2023", "dog")
    yield "cat/2023, dog/2023", lambda: shape(data), (("cat", "dog"), 16, [0] * 8 + [1] * 8)


def kinds_of_files(folder: Path) -> Iterator[Case]:
    """3. .bmp, .webp, .tif, upper case; what is not read is said"""
    data = folders(folder / "data", count=0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for suffix in SUFFIXES:
                picture(data / split / name / f"a.{suffix}")
            (data / split / name / "b.heic").write_bytes(b"no")
    run = folder / "run"
    yield "files trained on", lambda: shape(data)[1], 16
    yield "what is not read is said", lambda: "train: passed over 2 .heic" in train(data, run).err, True
    answers = lambda: command("predict", run, f"--images={data / 'test'}")  # noqa: E731
    yield "files predicted", lambda: len(answers().out.splitlines()), 16
    yield "and what is not is said", lambda: "passed over 2 .heic" in answers().err, True


def hidden_files(folder: Path) -> Iterator[Case]:
    """4. Hidden and stray files"""
    data = folders(folder / "data")
    for name in (".ipynb_checkpoints/1.png", "cat/._3.png", "cat/.ipynb_checkpoints/0.png", "stray.png"):
        picture(data / "train" / name)
    for name in (".DS_Store", "cat/Thumbs.db"):
        (data / "train" / name).write_bytes(b"x")
    yield "classes and images", lambda: shape(data), (("cat", "dog"), 8, [0] * 4 + [1] * 4)
    line = "warning: train: passed over 5 hidden, 1 picture beside the class folders\n"
    yield "one line", lambda: line in train(data, folder / "run").err, True


def validation_folders(folder: Path) -> Iterator[Case]:
    """5. val/, valid/, validation/"""

    def validated(run: Path) -> Any:
        with (run / "summary.csv").open() as file:
            return bool(next(csv.DictReader(file))["val_accuracy"])

    for name in ("val", "valid", "validation"):
        data = folders(folder / name, splits=("train", "test", name))
        run = folder / f"{name}-run"
        yield f"train, test, {name}", lambda data=data, run=run: train(data, run, "--patience=1").code, 0
        yield f"{name} is what patience judges by", lambda run=run: validated(run), True
    data = folders(folder / "two", splits=("train", "test", "val", "valid"))
    yield "val and valid: refused", lambda: train(data, folder / "r").code, 2
    only = folders(folder / "only", splits=("train", "valid"))
    told = lambda: train(only, folder / "only-run", "--overwrite")  # noqa: E731
    yield "train and valid: trained", lambda: told().code, 0
    yield "and said", lambda: "no test images" in told().err, True


def names_of_classes(folder: Path) -> Iterator[Case]:
    """6. Unicode in names of classes"""
    data = folders(folder / "forms", splits=("train", "test"), count=0)
    for split, form in (("train", "NFC"), ("test", "NFD")):
        folders(data, unicodedata.normalize(form, "é"), "dog", splits=(split,))
    yield "é in two forms", lambda: shape(data)[0], ("dog", "é")
    names = ("a\u00a0b", "c\u3000d", "👩\u200d🔬")
    data, run = folders(folder / "names", *names), folder / "run"
    yield "trained", lambda: train(data, run).code, 0
    yield "validated", lambda: command("validate", run, f"--data-dir={data}").code, 0
    yield "predicted", lambda: command("predict", run, f"--data-dir={data}", "--top=1").code, 0
    hub = folder / "hub"
    yield "published", lambda: command("publish", run, "--repo-id=a/ep_vgg5", "--dry-run", f"--output={hub}").code, 0
    yield "as it will be pulled", lambda: command("predict", hub, f"--images={data / 'test'}").code, 0
    other = folders(folder / "other", "a b", *names[1:])
    shown = lambda: command("validate", run, f"--data-dir={other}")  # noqa: E731
    yield "a difference can be seen", lambda: "a\\xa0b" in shown().err, True


def links(folder: Path) -> Iterator[Case]:
    """7. Links and loops"""
    real = folders(folder / "real")
    data = folder / "data"
    for split in ("train", "test"):
        (data / split).mkdir(parents=True)
        (data / split / "cat").symlink_to(real / split / "cat")
        (data / split / "dog").mkdir()
        for index in range(4):
            (data / split / "dog" / f"{index}.png").symlink_to(real / split / "dog" / f"{index}.png")
        (data / split / "dog" / "loop").symlink_to(data / split)
        (data / split / "dog" / "self").symlink_to("self")
    run = folder / "run"
    yield "images", lambda: shape(data), (("cat", "dog"), 8, [0] * 4 + [1] * 4)
    yield "trained", lambda: train(data, run).code, 0
    yield "predicted", lambda: len(command("predict", run, f"--images={data / 'test'}").out.splitlines()), 8


def few_images(folder: Path) -> Iterator[Case]:
    """8. Few images, one class, an empty one"""
    few = folders(folder / "few", count=1)
    yield "fewer than a batch: said", lambda: "lower batch_size" in train(few, folder / "a").err, True
    yield "one in a class", lambda: train(few, folder / "b", "--batch-size=2").code, 0
    one = folders(folder / "one", "cat")
    yield "one class: refused", lambda: (train(one, folder / "c").code, (folder / "c").exists()), (2, False)
    empty = folders(folder / "empty")
    (empty / "train" / "fish").mkdir()
    done = lambda: train(empty, folder / "d", "--overwrite")  # noqa: E731
    yield "an empty class", lambda: (done().code, "'fish'" in done().err), (0, True)
    lacking = folders(folder / "lacking", "cat", "dog")
    folders(lacking, "fox", splits=("train",))
    last = lambda: (opened(lacking).classes, opened(lacking).test[4][1])  # noqa: E731
    yield "a class without test images", last, (("cat", "dog", "fox"), 1)


def shown(path: Path) -> Any:
    """The first pixel in training, in prediction and of what a user opens by Pillow, as values of 0 to 255."""
    from timm_ep.data import transforms
    from timm_ep.training import predict

    opener = getattr(predict, "open_picture", Image.open)
    data = path.parents[2]
    source = opened(data)
    to_tensor = transforms.image_transform(4, (0.0,) * 3, (1.0,) * 3)
    pixels = [to_tensor(image)[:, 0, 0] for image in (source.train[0][0], opener(path), Image.open(path))]
    return [[round(float(value) * 255) for value in pixel] for pixel in pixels]


def modes_of_pictures(folder: Path) -> Iterator[Case]:
    """9. 16 bits, palettes, transparency, CMYK, 1 bit, EXIF, animations"""
    grey16 = Image.fromarray(np.full((4, 4), 257 * 100, np.uint16))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    cmyk = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    corner = Image.new("RGB", (4, 4))
    corner.putpixel((0, 3), (0, 255, 0))  # which is at the top left once it is turned clockwise
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.new("L", (4, 4), value) for value in (40, 250)]
    kinds: dict[str, tuple[Image.Image, dict[str, Any], int | list[int]]] = {
        "16bit.png": (grey16, {}, 100),
        "16bit.tif": (grey16, {}, 100),
        "palette.png": (palette, {}, [10, 20, 30]),
        "palette-clear.png": (palette, {"transparency": 1}, 255),
        "rgba.png": (clear, {}, 255),
        "rgba.webp": (clear, {"lossless": True}, 255),
        "grey-clear.png": (Image.new("LA", (4, 4), (0, 128)), {}, 127),
        "cmyk.tif": (cmyk, {}, [0, 255, 255]),
        "1bit.png": (Image.new("1", (4, 4), 1), {}, 255),
        "exif.png": (corner, {"exif": turned}, [0, 255, 0]),
        "exif.tif": (corner, {"exif": turned}, [0, 255, 0]),
        "animated.gif": (frames[0], {"save_all": True, "append_images": frames[1:]}, 40),
    }
    for name, (image, options, value) in kinds.items():
        data = folders(folder / name, splits=("test",))
        path = data / "train" / "cat" / name
        path.parent.mkdir(parents=True)
        picture(data / "train" / "dog" / "0.png")
        image.save(path, **options)
        pixel = [value] * 3 if isinstance(value, int) else value
        yield name, lambda path=path: shown(path), [pixel] * 3


def grey_images(folder: Path) -> Iterator[Case]:
    """10. Grey folders for nets of one channel"""
    data, run = folders(folder / "data"), folder / "run"
    yield "--in-chans 1", lambda: train(data, run, "--in-chans=1").code, 0
    size = lambda: json.loads((run / "config.json").read_text())["pretrained_cfg"]["input_size"]  # noqa: E731
    yield "its input", size, [1, 16, 16]
    yield "validated", lambda: command("validate", run, f"--data-dir={data}").code, 0
    args = '--model-args={"architecture": [4, "M", 6, "M"], "in_chans": 1}'
    yield "from the model", lambda: train(data, folder / "b", args).code, 0


def damaged_files(folder: Path) -> Iterator[Case]:
    """11. Damaged files"""
    data = folders(folder / "data", count=8)
    for name in ("train/cat/2.png", "test/dog/1.png"):
        (data / name).write_bytes(b"no picture")
    stopped = lambda: train(data, folder / "a", "--overwrite")  # noqa: E731
    yield (
        "stop is what happens by itself, with the name",
        lambda: (stopped().code, "cat/2.png" in stopped().err),
        (
            2,
            True,
        ),
    )
    words, run = ["--bad-images=skip", "--epochs=2", "--checkpoint-interval=1"], folder / "run"
    yield "skip", lambda: train(data, run, *words).code, 0
    names = lambda: [line.split(":")[0] for line in (run / "bad_images.txt").read_text().splitlines()]  # noqa: E731
    yield "listed", names, ["test/dog/1.png", "train/cat/2.png"]
    facts = lambda: json.loads((run / "results.json").read_text())  # noqa: E731
    yield "counted", lambda: (facts()["n_train"], facts()["n_test"]), (15, 15)

    def resumed() -> bool:
        broken = folder / "broken"
        with interrupted(3):
            train(data, broken, *words)
        picture(data / "train/cat/2.png")  # repaired in between: it is left out all the same
        train(data, broken, *words, "--resume")
        return (run / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()

    yield "resumed with the same", resumed, True


@contextlib.contextmanager
def interrupted(update: int, act: Callable[[Any], None] | None = None) -> Iterator[None]:
    """Break off before update number `update`, from 0."""
    from timm_ep.training.loop import TrainingLoop

    original = TrainingLoop._update

    def patched(self, batches, stop):
        if self.updates == update:
            if act is None:
                raise RuntimeError("broken off")
            act(self)
        return original(self, batches, stop)

    TrainingLoop._update = patched  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainingLoop._update = original  # type: ignore[method-assign]


def stopped(data: Path, run: Path, update: int, *words: object) -> Done:
    """A training that is asked to stop, as by SIGTERM, at update number `update`."""
    with interrupted(update, lambda loop: os.kill(os.getpid(), signal.SIGTERM)):
        # The request is seen one update later.
        return train(data, run, *words)


def predictions(folder: Path) -> Iterator[Case]:
    """12. predict among other files"""
    data, run = folders(folder / "data"), folder / "run"
    yield "trained", lambda: train(data, run).code, 0
    mixed = folders(folder / "mixed", splits=("a",))
    (mixed / "a" / "cat" / "2.png").write_bytes(b"no picture")
    (mixed / "notes.txt").write_text("no picture")
    done = lambda: command("predict", run, f"--images={mixed}", f"--output={folder / 'a.csv'}")  # noqa: E731
    yield "all others are answered", lambda: (done().code, len(done().out.splitlines())), (1, 7)
    yield "the unreadable are listed", lambda: str(mixed / "a" / "cat" / "2.png") in done().err, True
    yield "and written", lambda: len((folder / "a.csv").read_text().splitlines()), 1 + 2 * 7
    odd = os.fsencode(folders(folder / "odd", splits=("a",)) / "a") + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes((mixed / "a" / "cat" / "0.png").read_bytes())
    odds = ["predict", run, "--images", folder / "odd"]
    yield "names that are not UTF-8", lambda: "\\udcff.png" in apart(odds, folder).out, True
    headed = lambda: apart(["predict", run, f"--images={data}"], folder, unread=True)  # noqa: E731
    yield "| head", lambda: headed()[::2], (141, "")
    sizes = []

    def seen() -> Any:
        from torch.utils.data import DataLoader

        def noting(self, dataset, batch_size=1, **options):
            if "batch_sampler" not in options:
                sizes.append(batch_size)
            original(self, dataset, batch_size, **options)

        original = DataLoader.__init__
        with mock.patch.object(DataLoader, "__init__", noting):
            train(data, folder / "b")
        return max(sizes)

    yield "the trainer's tests take batches of --batch-size", seen, 4


def paths_and_numbers(folder: Path) -> Iterator[Case]:
    """13. ~, variables and 1e-3"""
    data = folders(folder / "data")
    environment = {"HOME": str(folder), "PETS": "data"}
    words = ["train", "--dataset=folder", "--data-dir=~/$PETS", *TINY, "--quiet", "--output=~/run"]
    yield "after =", lambda: apart(words, folder, folder, **environment).code, 0
    yield "where it was meant", lambda: (folder / "run" / "results.json").exists(), True
    (folder / "a.yaml").write_text(
        "data_dir: ~/${PETS}\noutput: ~/yaml\ndataset: folder\nepochs: 1\nbatch_size: 4\nquiet: true\nimg_size: 16\n"
        "lr: 1e-3\nmodel_args: {architecture: [4, M, 6, M], beta: 2e-3}\n"
    )
    yield "in YAML", lambda: apart(["train", "--config=~/a.yaml"], folder, folder, **environment).code, 0
    beta = lambda: json.loads((folder / "yaml" / "config.json").read_text())["model_args"]["beta"]  # noqa: E731
    yield "a number in nested arguments", beta, 0.002
    unset = lambda: train(data, folder / "$NOWHERE" / "x")  # noqa: E731
    yield "a variable that is not set", lambda: (unset().code, (folder / "$NOWHERE").exists()), (2, False)


def mistakes(folder: Path) -> Iterator[Case]:
    """14. No traceback for a mistake"""
    data, run = folders(folder / "data"), folder / "run"
    for words in (
        ["--model=ep_vgg6"],
        ["--model=ep_vgg5", "--pretrained"],
        ["--aa=nonsense"],
        ["--torchcompile=nonsense"],
        ["--model=vit_tiny_patch16_224", "--model-args={}"],
        ["--opt=fusedsgd"],
        ["--opt=adahessian"],
        [f"--output={picture(folder / 'file.png')}"],
        ["--output=/proc/nothing"],
        ["--teacher=nonsense", "--distill-logits=1"],
    ):
        done = lambda words=words: train(data, run, *words)  # noqa: E731
        ends = lambda done=done: ((it := done()).code, it.err.count("\n"))  # noqa: E731
        yield words[0].replace(str(folder), "…"), ends, (2, 1)
    yield "similar names", lambda: "ep_vgg5" in train(data, run, "--model=ep_vgg6").err, True
    yield "trained", lambda: train(data, run).code, 0
    here = lambda: command("publish", run, "--repo-id=a/ep_vgg5", "--dry-run", f"--output={folder}")  # noqa: E731
    yield "publish into a folder in use", lambda: (here().code, here().err.count("\n")), (2, 1)
    (folder / "empty").mkdir()
    words = ["publish", run, "--repo-id=a/ep_vgg5", "--dry-run", "--output=."]
    yield "publish into the empty folder one is in", lambda: apart(words, folder, folder / "empty").code, 0
    yield "--debug", lambda: train(data, run, "--debug").code, -1


def notebooks(folder: Path) -> Iterator[Case]:
    """15. Trainer in a notebook"""
    data = folders(folder / "data")
    options: dict[str, Any] = {"model_args": {"architecture": [4, "M", 6, "M"]}, "img_size": 16, "batch_size": 4}

    def cell() -> tuple[str, str]:
        from timm_ep import Trainer

        err = io.StringIO()
        host = mock.patch.object(sys, "argv", ["ipykernel_launcher.py", "--f=kernel.json"])
        kernel = mock.patch.dict(sys.modules, ipykernel=types.ModuleType("ipykernel"))
        with host, kernel, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            facts = Trainer(dataset="folder", data_dir=data, epochs=1, output=folder / "run", **options).run()
        return facts.command, err.getvalue()

    done = cell()
    yield "the host's words are not recorded", lambda: "kernel.json" in done[0], False
    yield "its own options are", lambda: f"--data-dir={data}" in done[0] and "--epochs=1" in done[0], True
    yield "progress", lambda: "epoch 1/1" in done[1], True

    def repeated() -> bool:
        command(*shlex.split(done[0])[1:], f"--output={folder / 'again'}")
        files = [folder / name / "model.safetensors" for name in ("run", "again")]
        return files[0].read_bytes() == files[1].read_bytes()

    yield "the command repeats the run", repeated, True


def homes(folder: Path) -> Iterator[Case]:
    """16. No home, no cache, no fsync of folders, no permissions"""
    data = folders(folder / "data")
    home = {"HOME": "/proc/nothing", "XDG_CACHE_HOME": "/proc/nothing", "HF_HOME": "/proc/nothing/hf"}
    words = ["train", "--dataset=folder", f"--data-dir={data}", *TINY, f"--output={folder / 'a'}"]
    yield "unwritable HOME", lambda: shell([sys.executable, "-m", "timm_ep", *words], **home).code, 0

    def without(name: str) -> Any:
        import stat
        import warnings

        original = getattr(os, name)

        def refusing(target, *args, **kwargs):
            if name != "fsync" or stat.S_ISDIR(os.fstat(target).st_mode):
                raise OSError(95, "Operation not supported")
            return original(target, *args, **kwargs)

        setattr(os, name, refusing)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                return train(data, folder / name).code, any("Operation not supported" in str(w.message) for w in said)
        finally:
            setattr(os, name, original)

    yield "no fsync of folders: a warning", lambda: without("fsync"), (0, True)
    yield "no chmod: a warning", lambda: without("chmod"), (0, True)


def two_at_once(folder: Path) -> Iterator[Case]:
    """17. Two trainings into one folder"""
    data, run = folders(folder / "data"), folder / "run"
    second = []
    with interrupted(1, lambda loop: second.append(train(data, run, "--resume"))):
        first = train(data, run)
    yield "the second is refused", lambda: (second[0].code, "Another process" in second[0].err), (2, True)
    yield "the first ends well", lambda: first.code, 0
    yield "and then another may begin", lambda: train(data, run, "--resume").code, 0
    yield "killed", lambda: apart(["killed", data, folder / "killed"], folder).code, -9
    yield "a dead owner's lock is none", lambda: train(data, folder / "killed", "--resume").code, 0


def stopped_runs(folder: Path) -> Iterator[Case]:
    """18. Runs that were stopped"""
    data, run = folders(folder / "data", count=8), folder / "run"
    yield "stopped in epoch 2 of 3", lambda: stopped(data, run, 5, "--epochs=3").code, 143
    fewer = lambda: train(data, run, "--epochs=1", "--resume")  # noqa: E731
    yield "resumed with fewer epochs", lambda: (fewer().code, "--epochs=2" in fewer().err), (2, True)
    yield "no result under that name", lambda: (run / "results.json").exists(), False
    yield "validated", lambda: command("validate", run, f"--data-dir={data}").code, 0
    yield "predicted with", lambda: command("predict", run, f"--images={data / 'test'}").code, 0
    start = f"--initial-checkpoint={run}"
    yield "started from", lambda: train(data, folder / "next", start).code, 0
    yield "resumed", lambda: train(data, run, "--epochs=3", "--resume").code, 0
    killed = folder / "killed"
    with interrupted(5):
        train(data, killed, "--epochs=3")
    told = lambda: command("validate", killed, f"--data-dir={data}")  # noqa: E731
    yield "killed: the line says how", lambda: (told().code, "--resume" in told().err), (2, True)


def starts(folder: Path) -> Iterator[Case]:
    """19. --initial-checkpoint"""
    from safetensors.torch import load_file, save_file

    data, run = folders(folder / "data"), folder / "run"
    yield "trained", lambda: train(data, run, "--lr=0.1").code, 0
    others = folders(folder / "others", "ant", "bee")

    def heads(images: Path, name: str) -> bool:
        done = train(images, folder / name, f"--initial-checkpoint={run}", "--lr=0", "--weight-decay=0")
        assert done.code == 0, done.err
        states = [load_file(where / "model.safetensors") for where in (run, folder / name)]
        return torch.equal(*(state["head.fc.weight"] for state in states))

    yield "the same classes: the read-out stays", lambda: heads(data, "same"), True
    yield "as many others: it is new", lambda: heads(others, "new"), False
    for prefix in ("module.", "_orig_mod."):

        def prefixed(prefix=prefix) -> int:
            state = load_file(run / "model.safetensors")
            path = folder / f"{prefix}safetensors"
            save_file({prefix + name: value for name, value in state.items()}, path)
            return train(data, folder / prefix, f"--initial-checkpoint={path}").code

        yield prefix, prefixed, 0
    torch.save({}, folder / "weights.pt")
    refused = lambda: train(data, folder / "pt", f"--initial-checkpoint={folder / 'weights.pt'}")  # noqa: E731
    yield "a .pt", lambda: (refused().code, "may run code" in refused().err), (2, True)


def optimizers(folder: Path) -> Iterator[Case]:
    """20. Resuming is exact for every optimizer"""
    data = folders(folder / "data", count=8)

    def exact(name: str, *words: str) -> bool:
        words = (f"--opt={name}", "--epochs=2", "--checkpoint-interval=1", "--model-ema", "--lr=1e-3", *words)
        train(data, folder / f"{name}-a", *words)
        with interrupted(6):
            train(data, folder / f"{name}-b", *words)
        train(data, folder / f"{name}-b", *words, "--resume")
        files = [folder / f"{name}-{which}" / "model.safetensors" for which in "ab"]
        return files[0].read_bytes() == files[1].read_bytes()

    for name in ("lookahead_adamw", "adopt", "lion", "adafactor", "muon", "momentum"):
        yield name, lambda name=name: exact(name), True
    yield "compiled", lambda: exact("sgd", "--torchcompile=eager"), True


def torchrun(folder: Path) -> Iterator[Case]:
    """21. A corrupt image in a torchrun of two"""
    data = folders(folder / "data", count=16)
    # One, which one of them meets; not the first, which every process looks at before.
    (data / "train" / "dog" / "5.png").write_bytes(b"no picture")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [PROCESSES.Process(target=as_rank, args=(rank, port, data, folder)) for rank in range(2)]
    started = time.monotonic()
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(max(0.0, 40 - (time.monotonic() - started)))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    yield "both end", lambda: codes, [2, 2]
    named = lambda: ["dog/" in (folder / f"{rank}.err").read_text() for rank in range(2)]  # noqa: E731
    yield "and name it", named, [True, True]


def as_rank(rank: int, port: int, data: Path, folder: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    done = train(data, folder / "run")
    (folder / f"{rank}.err").write_text(done.err)
    sys.exit(done.code)


def pushed_by_timm(folder: Path) -> Iterator[Case]:
    """22. What timm's push_to_hf_hub wrote"""
    import timm
    from timm.models import save_for_hf

    data, hub = folders(folder / "data", "0", "1"), folder / "hub"
    hub.mkdir()
    save_for_hf(timm.create_model("ep_vgg5_025", num_classes=2, feedback=0.3), str(hub), safe_serialization="both")
    yield "validated", lambda: command("validate", hub, "--dataset=folder", f"--data-dir={data}").code, 0
    yield "predicted with", lambda: command("predict", hub, f"--images={data / 'test'}").code, 0


ITEMS = [
    split_named_classes,
    nested_folders,
    kinds_of_files,
    hidden_files,
    validation_folders,
    names_of_classes,
    links,
    few_images,
    modes_of_pictures,
    grey_images,
    damaged_files,
    predictions,
    paths_and_numbers,
    mistakes,
    notebooks,
    homes,
    two_at_once,
    stopped_runs,
    starts,
    optimizers,
    torchrun,
    pushed_by_timm,
]


def wrong(item: Callable[[Path], Iterator[Case]], folder: Path) -> tuple[int, list[str]]:
    """How many cases an item has, and what is wrong with those that are not right."""
    found, count = [], 0
    try:
        for name, get, right in item(folder):
            count += 1
            try:
                value = get()
            except Exception as error:  # noqa: BLE001  (it is what is shown)
                value = f"{type(error).__name__}: {error}"
            if value != right:
                found.append(f"{name}: {value!s:.1000}, not {right}")
    except Exception as error:  # noqa: BLE001  (it is what is shown)
        found.append(f"{type(error).__name__}: {error!s:.100}")
        count += 1
    return count, found


def table() -> dict[str, tuple[int, list[str]]]:
    result = {}
    for item in ITEMS:
        with tempfile.TemporaryDirectory() as folder:
            result[str(item.__doc__)] = wrong(item, Path(folder))
    return result


def table_of(commit: str) -> dict[str, tuple[int, list[str]]]:
    """The table of an earlier commit, by this script."""
    home = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        subprocess.run(["git", "-C", str(home), "worktree", "add", "--detach", str(code), commit], check=True)
        try:
            output = Path(folder) / "table.json"
            subprocess.run(
                [sys.executable, __file__, "--json", str(output)],
                check=True,
                cwd=code,
                env={**os.environ, "PYTHONPATH": str(code)},
                stdout=subprocess.DEVNULL,
            )
            return json.loads(output.read_text())
        finally:
            subprocess.run(["git", "-C", str(home), "worktree", "remove", "--force", str(code)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--json", help="write the table to this file")
    options = parser.parse_args()
    columns = {"after": table()}
    if options.json:
        Path(options.json).write_text(json.dumps(columns["after"]))
    if options.before:
        columns = {"before": table_of(options.before), **columns}
    print(f"| what people have | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for item in ITEMS:
        cells = [(count - len(bad), count) for count, bad in (found[str(item.__doc__)] for found in columns.values())]
        print(f"| {item.__doc__} | {' | '.join(f'{right} of {count} right' for right, count in cells)} |")
    for title, found in columns.items():
        for name, (_, bad) in found.items():
            for line in bad:
                print(f"{title}: {name}: {line}")


if __name__ == "__main__":
    main()
