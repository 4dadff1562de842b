"""The recipes in scripts/recipes, and the script that trains released models again."""

import csv
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import timm
import yaml

from timm_ep.data.datasets import open_data
from timm_ep.studies.study import Study
from timm_ep.training.options import TrainingOptions
from timm_ep.training.trainer import Trainer

SCRIPTS = Path(__file__).parents[2] / "scripts"
RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))
LITERATURE = sorted((SCRIPTS / "recipes" / "literature").glob("*.yaml"))

# What stands in for a large machine and data that are not here; all else is the recipe's.
TINY = {"dataset": "folder", "device": "cpu", "epochs": 2, "batch_size": 8, "workers": 1, "img_size": 32, "quiet": True}
ALONE = {"gradient": "backprop", "teacher": None, "local_error": 0.0, "distill_features": 0.0, "distill_logits": 0.0}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, digits = tmp_path_factory.mktemp("images"), open_data("digits")
    for split, part, count in (("train", digits.train, 60), ("test", digits.test, 60)):
        for index in range(count):
            image, label = part[index]
            target = folder / split / str(label)
            target.mkdir(parents=True, exist_ok=True)
            image.save(target / f"{index}.png")
    return folder


@pytest.mark.parametrize("recipe", [*RECIPES, *LITERATURE], ids=lambda path: path.stem)
def test_recipes_are_options_of_today(recipe):
    """Every key is an option and every value in its range; the commands in its comments name options too."""
    values = yaml.safe_load(recipe.read_text())
    options = TrainingOptions(**values)
    assert {name: value for name, value in options.plain().items() if name in values} == values
    named = set(re.findall(r"--([a-z-]+)", "".join(re.findall(r"^#.*$", recipe.read_text(), re.MULTILINE))))
    known = {one.name for one in dataclasses.fields(options)} | {"config", "nproc_per_node"}
    assert {name.replace("-", "_") for name in named} <= known


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_train_a_teacher_and_a_student_of_it(recipe, images, tmp_path):
    """A few steps of the recipe, with a net of its depth and a few channels, on small images: no update is skipped."""
    values = yaml.safe_load(recipe.read_text())
    full = timm.create_model(values["model"], device="meta")
    widths = [[8, "M"] if pooled else [8] for pooled in full.pooled]
    narrow = {"architecture": sum(widths, [])}  # noqa: RUF017
    options = {**values, **TINY, "data_dir": images, "model_args": {**values.get("model_args", {}), **narrow}}
    if "val_split" in values:
        options["val_split"] = 0.2
    Trainer(**{**options, **ALONE, "output": tmp_path / "teacher"}).run()
    student = Trainer(**{**options, "teacher": str(tmp_path / "teacher"), "output": tmp_path / "student"})
    facts = student.run()
    assert facts.signals == {"local_error": 1.0, "distill_features": 1.0, "distill_logits": 1.0}
    assert facts.settings["gradient"] == "ep"
    with (tmp_path / "student" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["skipped"]) for row in rows] == [0, 0]
    with (tmp_path / "student" / "layers.csv").open() as file:
        gradients = [float(row["weight_gradient"]) for row in csv.DictReader(file)]
    assert len(gradients) == 2 * len(full.layers)
    assert min(gradients) > 0


@pytest.mark.parametrize("recipe", LITERATURE, ids=lambda path: path.stem)
def test_the_literature_s_recipes_run(recipe, images, tmp_path):
    """A few updates with a few channels and steps; kernels, rates and the rest are the recipe's. All layers move."""
    values = yaml.safe_load(recipe.read_text())
    full = timm.create_model(values["model"], device="meta", **values["model_args"])
    widths = [[8, "M"] if pooled else [8] for pooled in full.pooled]
    few = {"architecture": sum(widths, []), "free_sweeps": 8, "nudged_sweeps": 8}  # noqa: RUF017
    changes = {**TINY, "epochs": 1, "model_args": {**values["model_args"], **few}, "output": tmp_path}
    changes["log_tensorboard"] = True
    facts = Trainer(**{**values, **changes, "data_dir": images}).run()
    assert (facts.settings["feedback"], facts.settings["forces"]) == (1.0, "live")
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["weight_gradient"]) > 0 for row in rows] == [True] * len(full.layers)
    assert all(row["gain_gradient"] == "" for row in rows)
    assert [row.depth for row in Study(tmp_path).run()] == [len(full.layers)]


def test_every_released_model_has_its_commands():
    script = (SCRIPTS / "reproduce").read_text()
    for name in timm.list_pretrained("ep_*"):
        assert re.search(rf"^{re.escape(name)}\)", script, re.MULTILINE), f"scripts/reproduce does not know {name}"


@pytest.mark.parametrize("script", ["reproduce", "release", "search"])
def test_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)
