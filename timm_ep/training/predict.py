"""Classify images with a saved run."""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import torch
from PIL import Image

from timm_ep.base.options import Options
from timm_ep.data.folders import files_below, is_picture, passed_over_line
from timm_ep.data.pictures import IMAGE_ERRORS, open_picture
from timm_ep.data.transforms import run_transform
from timm_ep.hub.cards import RunFacts
from timm_ep.training.evaluate import label_names, load_run, open_tested

Answer = list[tuple[str, float]]


@dataclass
class Predict(Options):
    """Classify an image, or all images in a folder, with a saved run; without any, some of the run's test images.

    In a folder, files that are no pictures by their names are passed over, and links are followed. Pictures that cannot
    be read are listed at the end, once all others are answered; the command then exits with 1.

    Args:
        run_folder: folder that `timm-ep train` or `timm-ep pull` wrote.
        images: an image file, or a folder, searched through.
        top: classes to name for each image.
        output: also write the answers to this file, as they come: `.csv` (one row an image and class) or `.json`.
        data_dir: where the test images are, if they are not embedded or no longer where the run had them.
        batch_size: images at a time, which bounds the memory that it takes.
        device: `cpu`, `cuda`, …
        sweeps: of the free phase, in place of those that it was trained with; 0 takes the feedforward pass alone.
    """

    run_folder: Path
    images: Path | None = None
    top: int = 3
    output: Path | None = None
    data_dir: Path | None = None
    batch_size: int = 64
    device: str = "cpu"
    sweeps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1 or self.batch_size < 1:
            raise ValueError(f"top={self.top} and batch_size={self.batch_size} must be at least 1.")
        if self.output is not None and self.output.suffix not in (".csv", ".json"):
            raise ValueError(f"output={self.output}: give a file name that ends in .csv or .json.")

    def run(self) -> list[Answer]:
        """Print and return, for each image, the likeliest classes with their probabilities.

        Raises:
            FileNotFoundError: no such run, no such images.
            ValueError: a run that does not pass the checks.
            SystemExit: pictures that could not be read; they are listed, and the code is 1.
        """
        model, facts = load_run(self.run_folder, self.device, self.sweeps)
        transform, names = run_transform(model), label_names(model)
        answers: list[Answer] = []
        unreadable: list[str] = []
        opened = self._open(facts, names, unreadable)
        with ExitStack() as stack:
            writer = None
            while batch := list(islice(opened, self.batch_size)):
                inputs = torch.stack([transform(image) for _, image in batch]).to(self.device)
                with torch.inference_mode():
                    output = model(inputs)
                # An output state that squared error pulls to one-hot labels is a probability already.
                probabilities = output if getattr(model, "readout", "head") == "state" else output.softmax(1)
                values, indices = probabilities.topk(min(self.top, len(names)))
                if writer is None and self.output is not None:  # only now that there is something to write
                    writer = _writer(self.output, stack)
                for (title, _), row, classes in zip(batch, values.tolist(), indices.tolist(), strict=True):
                    answer = [(names[index], probability) for index, probability in zip(classes, row, strict=True)]
                    shown = re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", title)  # what would steer the terminal
                    print(f"{shown}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in answer))
                    answers.append(answer)
                    if writer is not None:
                        writer.add(title, answer)
                if writer is not None:
                    writer.file.flush()
        if unreadable:
            lines = "\n".join(unreadable)
            print(f"{len(unreadable)} images could not be read:\n{lines}", file=sys.stderr)
            sys.exit(1)
        return answers

    def _open(
        self, facts: RunFacts | None, names: list[str], unreadable: list[str]
    ) -> Iterator[tuple[str, Image.Image]]:
        if self.images is None:
            data = open_tested(self.run_folder, facts, names, data_dir=self.data_dir)
            for index in range(min(5, len(data.test))):
                image, label = data.test[index]
                yield f"test image {index} (a {data.classes[label]})", image
            return
        if not self.images.exists():
            raise FileNotFoundError(f"{self.images} does not exist; expected an image file or a folder of images.")
        files = [self.images]
        if self.images.is_dir():
            passed_over: Counter[str] = Counter()
            found = [name for name in files_below(self.images, passed_over) if is_picture(name, passed_over)]
            for line in passed_over_line(self.images, passed_over):
                print(f"warning: {line}", file=sys.stderr)
            if not found:
                raise FileNotFoundError(f"{self.images} holds no file with the suffix of an image.")
            files = sorted(self.images / name for name in found)
        for path in files:
            try:
                image = open_picture(path)
            except IMAGE_ERRORS as error:
                unreadable.append(f"{path}: {error}")
                continue
            yield str(path), image


def _writer(output: Path, stack: ExitStack) -> "_Csv | _Json":
    output.parent.mkdir(parents=True, exist_ok=True)
    # Names of files that are no text are written escaped.
    file = stack.enter_context(output.open("w", encoding="utf-8", errors="backslashreplace", newline=""))
    return _Json(file) if output.suffix == ".json" else _Csv(file)


class _Csv:
    """Rows (image, rank, class, probability)."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.rows = csv.writer(file)
        self.rows.writerow(["image", "rank", "class", "probability"])

    def add(self, title: str, answer: Answer) -> None:
        self.rows.writerows([title, rank, name, p] for rank, (name, p) in enumerate(answer, 1))


class _Json:
    """A list that is whole after each image."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.end = file, 0

    def add(self, title: str, answer: Answer) -> None:
        named = {"image": title, "classes": [{"class": name, "probability": p} for name, p in answer]}
        self.file.seek(self.end)
        self.file.write((",\n" if self.end else "[\n") + json.dumps(named, indent=2, ensure_ascii=False))
        self.end = self.file.tell()
        self.file.write("\n]\n")
