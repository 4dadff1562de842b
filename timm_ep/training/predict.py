"""Classify images with a saved run."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from timm_ep.base.files import replacing
from timm_ep.data.datasets import IMAGE_ERRORS, open_data
from timm_ep.data.transforms import run_transform
from timm_ep.hub.cards import RunFacts
from timm_ep.training.evaluate import label_names, load_run

Answer = list[tuple[str, float]]


@dataclass
class Predict:
    """Classify an image, or all images in a folder, with a saved run; without any, some of the run's test images.

    Args:
        run_folder: folder that `timm-ep train` wrote.
        images: an image file, or a folder, searched through.
        top: classes to name for each image.
        output: also write the answers to this file: `.csv` (one row an image and class) or `.json`.
        data_dir: where the test images are, if not embedded.
        batch_size: images at a time.
        device: `cpu`, `cuda`, …
    """

    run_folder: Path
    images: Path | None = None
    top: int = 3
    output: Path | None = None
    data_dir: Path | None = None
    batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.top < 1 or self.batch_size < 1:
            raise ValueError(f"top={self.top} and batch_size={self.batch_size} must be at least 1.")
        if self.output is not None and Path(self.output).suffix not in (".csv", ".json"):
            raise ValueError(f"output={self.output}: give a file name that ends in .csv or .json.")

    def run(self) -> list[Answer]:
        """Print and return, for each image, the likeliest classes with their probabilities.

        Raises:
            FileNotFoundError: no such run, no such images.
            ValueError: a file that is no image.
        """
        model, facts = load_run(self.run_folder, self.device)
        transform, names = run_transform(model), label_names(model)
        titles: list[str] = []
        answers: list[Answer] = []
        opened = self._open(facts)
        while batch := list(islice(opened, self.batch_size)):
            inputs = torch.stack([transform(image) for _, image in batch]).to(self.device)
            with torch.inference_mode():
                output = model(inputs)
            # An output state that squared error pulls to one-hot labels is a probability already.
            probabilities = output if getattr(model, "readout", "head") == "state" else output.softmax(1)
            values, indices = probabilities.topk(min(self.top, len(names)))
            for (title, _), row, classes in zip(batch, values.tolist(), indices.tolist(), strict=True):
                answer = [(names[index], probability) for index, probability in zip(classes, row, strict=True)]
                print(f"{title}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in answer))
                titles.append(title)
                answers.append(answer)
        if self.output is not None:
            self._write(titles, answers, self.output)
        return answers

    def _write(self, titles: list[str], answers: list[Answer], output: Path) -> None:
        with replacing(output) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            if output.suffix == ".json":
                named = [
                    {"image": title, "classes": [{"class": name, "probability": p} for name, p in answer]}
                    for title, answer in zip(titles, answers, strict=True)
                ]
                json.dump(named, file, indent=2, ensure_ascii=False)
                return
            writer = csv.writer(file)
            writer.writerow(["image", "rank", "class", "probability"])
            for title, answer in zip(titles, answers, strict=True):
                writer.writerows([title, rank, name, p] for rank, (name, p) in enumerate(answer, 1))

    def _open(self, facts: RunFacts) -> Iterator[tuple[str, Image.Image]]:
        if self.images is None:
            data = open_data(facts.dataset, self.data_dir)
            for index in range(min(5, len(data.test))):
                image, label = data.test[index]
                yield f"test image {index} (a {data.classes[label]})", image
            return
        if not self.images.exists():
            raise FileNotFoundError(f"{self.images} does not exist; expected an image file or a folder of images.")
        files = [self.images]
        if self.images.is_dir():
            files = sorted(p for p in self.images.rglob("*") if p.suffix.lower() in Image.registered_extensions())
            if not files:
                raise FileNotFoundError(f"{self.images} holds no file with the suffix of an image.")
        for path in files:
            try:
                with Image.open(path) as image:
                    image.load()
            except IMAGE_ERRORS as error:
                raise ValueError(f"{path} is not an image that Pillow can read ({error}).") from error
            yield str(path), image
