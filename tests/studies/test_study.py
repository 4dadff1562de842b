"""The study only counts what runs wrote: checked on runs written here by hand."""

import csv
import dataclasses

import pytest
from PIL import Image

from timm_ep.core.settings import Settings
from timm_ep.hub.cards import RunFacts
from timm_ep.studies.study import Study


def write_run(
    folder,
    accuracy,
    depth=3,
    seed=0,
    gradient="ep",
    feedback=0.5,
    signals=(),
    nudges=(0.5, 1.0, 2.0),
    more=None,
    **settings,
):
    facts = RunFacts(
        architecture="ep_vgg5",
        command="timm-ep train",
        seed=seed,
        dataset="digits",
        n_train=10,
        n_test=10,
        top1=accuracy,
        top5=None,
        epochs=2,
        train_seconds=7.0,
        machine="x86_64 CPU, 2 threads",
        settings=dataclasses.asdict(Settings(gradient=gradient, feedback=feedback, **settings)),
        feedback_share=None,
        signals=dict.fromkeys(signals, 1.0),
    )
    facts = dataclasses.replace(facts, **(more or {}))
    facts.save(folder / "results.json")
    with (folder / "layers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "layer", "scaled_nudge", "free_residual"])
        for epoch in (1, 2):
            for layer in range(depth):
                writer.writerow([epoch, layer + 1, epoch * nudges[layer], 0.1 * layer / epoch])


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "one" / "a", 50.0)
    write_run(tmp_path / "one" / "b", 60.0, seed=1)
    write_run(tmp_path / "one" / "c", 70.0, depth=2, signals=["local_error"])
    write_run(tmp_path / "one" / "d", 75.0, signals=["distill_logits", "distill_features"])
    write_run(tmp_path / "two" / "e", 80.0, signals=["local_error", "distill_features"], nudges=(0.0, 0.0, 0.0))
    write_run(tmp_path / "two" / "f", 90.0, gradient="backprop")
    return tmp_path


def test_rows_and_table_are_those_of_the_runs(runs):
    rows = Study(runs).run()
    assert [(row.group, row.training, row.depth, row.accuracy) for row in rows] == [
        ("one", "plain EP", 3, 50.0),
        ("one", "plain EP", 3, 60.0),
        ("one", "EP + local errors", 2, 70.0),
        ("one", "EP + distillation", 3, 75.0),
        ("two", "EP + both", 3, 80.0),
        ("two", "backprop", 3, 90.0),
    ]
    assert rows[0].first_to_last == 0.25
    assert rows[4].first_to_last == 0.0
    assert rows[0].worst_residual == pytest.approx(0.1)
    lines = (runs / "study.md").read_text().splitlines()
    assert lines[0] == "| one: convolutions | 2 | 3 |"
    assert lines[2] == "| plain EP |  | 55.0 ± 7.1 |"
    assert lines[3] == "| EP + local errors | 70.0 |  |"
    assert "| backprop | 90.0 |" in lines
    with (runs / "study.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in dataclasses.asdict(row).items()} for row in rows] == written


def test_over_a_setting(tmp_path):
    for name, noise, accuracy, seed in (("a", 0.0, 80.0, 0), ("b", 0.001, 70.0, 0), ("c", 0.001, 60.0, 1)):
        write_run(tmp_path / "4" / name, accuracy, seed=seed, state_noise=noise)
    write_run(tmp_path / "4" / "d", 75.0, state_noise=0.001, signals=["local_error"])
    rows = Study(tmp_path, over="state_noise").run()
    assert [row.value for row in rows] == [0.0, 0.001, 0.001, 0.001]
    lines = (tmp_path / "study.md").read_text().splitlines()
    assert lines[0] == "| 4: state_noise | 0.0 | 0.001 |"
    assert lines[2:4] == ["| plain EP | 80.0 | 65.0 ± 7.1 |", "| EP + local errors |  | 75.0 |"]
    with pytest.raises(ValueError, match="over='noises' is no setting"):
        Study(tmp_path, over="noises")
    with pytest.raises(ValueError, match="both plain EP, and differ in state_noise: the table would average over that"):
        Study(tmp_path, over="pool").run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feedback": 1.0}, "differ in feedback"),
        ({"free_sweeps": 20, "beta": 1e-3}, "differ in free_sweeps, beta"),
        ({"seed": 0}, "have the same seed, 0"),
        ({"more": {"dataset": "torch/cifar10"}}, "differ in dataset"),
        ({"more": {"started_from": "runs/one", "n_train": 5}}, "differ in n_train, started_from"),
        ({"more": {"command": "torchrun -m timm_ep train --lr=0.1 --output=b"}}, "differ in lr"),
        ({"more": {"command": "timm-ep train '--model-args={\"padding\": 0}'"}}, "differ in model_args"),
        ({"more": {"command": "timm-ep train --lr 0.1 --output b"}}, "differ in lr"),
        ({"more": {"command": "timm-ep train --data-dir=/images/pets"}}, "differ in data_dir"),
        ({"more": {"command": "torchrun --nproc-per-node 2 -m timm_ep train"}}, "differ in nproc_per_node"),
        ({"more": {"command": 'whatever I typed, "'}}, "differ in command"),
        ({"more": {"command": "timm-ep train '--model-args=[1]'"}}, "differ in model_args"),
        ({"more": {"command": "timm-ep train --seed=1 --output=b --device=cuda", "epochs": 1}}, ""),
        ({"free_sweeps": 6, "more": {"command": "timm-ep train '--model-args={\"free_sweeps\": 6}'"}}, ""),
        ({}, ""),
    ],
)
def test_only_seeds_are_averaged(tmp_path, change, message):
    write_run(tmp_path / "one" / "a", 50.0)
    write_run(tmp_path / "one" / "b", 60.0, **{"seed": 1, **change})
    if not message:
        assert len(Study(tmp_path).run()) == 2
        return
    with pytest.raises(ValueError, match=f"both plain EP, and {message}.* folders of their own"):
        Study(tmp_path).run()
    assert not (tmp_path / "study.md").exists()


def test_every_kind_of_training_has_a_row_of_its_own(tmp_path):
    kinds = [
        ("BPTT", "bptt", []),
        ("local learning + local errors", "local", ["local_error"]),
        ("backprop + both", "backprop", ["local_error", "distill_logits"]),
        ("EP + sparsity", "ep", ["sparsity"]),
        ("plain EP", "ep", []),
    ]
    for number, (_, gradient, signals) in enumerate(kinds):
        write_run(tmp_path / "one" / str(number), 50.0 + number, gradient=gradient, signals=signals)
    assert [row.training for row in Study(tmp_path).run()] == [name for name, *_ in kinds]
    rows = [line.split(" | ")[0] for line in (tmp_path / "study.md").read_text().splitlines()[2:] if line]
    known, others = ["plain EP"], sorted(name for name, *_ in kinds if name != "plain EP")
    assert rows == [f"| {name}" for name in (*known, *others)]


def test_a_run_from_before_a_setting_has_its_default(tmp_path):
    write_run(tmp_path / "4" / "a", 80.0)
    facts = RunFacts.load(tmp_path / "4" / "a" / "results.json")
    del facts.settings["state_noise"]
    facts.save(tmp_path / "4" / "a" / "results.json")
    assert [row.value for row in Study(tmp_path, over="state_noise").run()] == [0.0]


def test_figures_have_a_panel_for_each_group(runs, tmp_path):
    Study(runs, tmp_path / "figures").run()
    for name in ("accuracy.png", "nudge.png"):
        with Image.open(tmp_path / "figures" / name) as image:
            assert image.width == 1000


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished run of an ep_vgg"):
        Study(tmp_path).run()


def test_one_run_is_a_study_too(runs):
    (row,) = Study(runs / "one" / "a").run()
    assert (row.group, row.accuracy) == (".", 50.0)
