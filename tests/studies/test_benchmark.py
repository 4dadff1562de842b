"""The benchmark counts, orders and combines its measurements as it says; what it measures is not asserted."""

import dataclasses
import importlib.util
import json
import sys

import pytest
import torch
from torch.testing import assert_close

from conftest import make_batch, make_net
from runs import make_run
from timm_ep import cli
from timm_ep.core.settings import Settings
from timm_ep.studies import benchmark, classic, measure
from timm_ep.studies.benchmark import Benchmark
from timm_ep.studies.classic import classic_checks, classic_net, classic_parts, extrapolated
from timm_ep.studies.gradcheck import gradient_check
from timm_ep.studies.measure import StepCost
from timm_ep.studies.workload import Workload

SMALL = {"model_args": {"architecture": [4, "M", 4, "M", 4, "M"]}, "batch_size": 4, "repeats": 2}
STEPS = ["ep", "ep bfloat16", "backprop", "backprop bfloat16", "bptt", "classic reference"]
STEPS += ["inference", "inference of the twin"]
SETTLING = ["free float32", "step float32", "free bfloat16", "step bfloat16"]


@pytest.fixture
def memory(monkeypatch):
    """Processes that are not started; the names of what they would have measured."""
    asked = []

    def fresh(make, workload, name, **options):
        asked.append(name)
        assert type(workload) is Workload
        make(workload, name)()  # what it makes can run
        return StepCost(megabytes=10.0 * len(asked), seconds=1.0)

    monkeypatch.setattr(benchmark, "in_fresh_process", fresh)
    return asked


def test_all_rows_from_rounds_in_turn(memory, monkeypatch, capsys):
    rounds = []

    def in_turn(steps, repeats, device):
        rounds.extend([*steps, repeats, device])
        # A training step takes 1 s, 2 s, …, in the order of the table, in both rounds; all parts 1 s.
        return {name: [float(number), float(number)] for number, name in enumerate(steps, 1)}

    monkeypatch.setattr(benchmark, "in_turn", in_turn)
    result = Benchmark(model="ep_vgg5_025", **SMALL).run()
    plain = [f"plain {name}" for name in SETTLING]
    assert rounds == [*STEPS[:5], *STEPS[6:], *SETTLING, *plain, *classic.PARTS, 2, "cpu"]
    assert [row.name for row in result.steps] == memory == STEPS

    rows = {row.name: row for row in result.steps}
    assert [rows[name].seconds.median for name in STEPS[:5]] == [1, 2, 3, 4, 5]
    assert (rows["ep"].ratio, rows["bptt"].ratio, rows["inference"].ratio) == (1 / 3, 5 / 3, 6 / 7)
    assert rows["bptt"].images_per_second == 4 / 5
    assert (rows["ep"].memory_ratio, rows["inference"].memory_ratio) == (10 / 30, 70 / 80)
    # Parts 16, 17 and 18: 250 free steps of 16 s, 2 × 25 nudged ones of 17 s, 2 contrasts of 18 s.
    assert rows["classic reference"].seconds.median == 250 * 16 + 50 * 17 + 2 * 18
    assert result.speedups == {"ep": 4886.0, "ep bfloat16": 2443.0}
    assert [(share.phase + " " + share.dtype) for share in result.shares] == SETTLING
    assert [share.share for share in result.shares] == [12 / 8, 13 / 9, 14 / 10, 15 / 11]

    assert [row.name for row in result.steps if row.layers is None] == STEPS[5:]
    assert all(len(row.layers) == 3 for row in result.steps if row.layers)
    assert rows["bptt"].cosine > 0.999
    assert 0.9 < rows["ep bfloat16"].cosine <= rows["ep"].cosine < 1.0001
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*STEPS, *SETTLING, "4 images of 32×32 (random), 2 rounds"])


def test_rounds_count_all_but_the_first(monkeypatch):
    """With a clock that each step moves by its own amount."""
    now, seen = [0.0], []

    def step(name, seconds):
        def run():
            seen.append(name)
            now[0] += seconds * (100 if len(seen) <= 2 else len(seen))

        return run

    monkeypatch.setattr(measure, "clock", lambda: now[0])
    times = measure.in_turn({"slow": step("slow", 3.0), "quick": step("quick", 1.0)}, 3)
    assert seen == ["slow", "quick"] * 4
    assert times == {"slow": [9.0, 15.0, 21.0], "quick": [4.0, 6.0, 8.0]}
    assert measure.quartiles(times["slow"]) == measure.Quartiles(12.0, 15.0, 18.0)


def test_the_command_prints_json_of_a_run_on_its_images(memory, tmp_path, capsys):
    run = make_run(tmp_path / "run")  # of 4 classes; random images of its size
    options = ["--model", str(run), "--model-args.free_sweeps", "2", "--batch-size", "3", "--repeats", "2", "--json"]
    cli.main(["benchmark", *options, "--checked", "2"])
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["steps"]] == STEPS
    assert set(found["steps"][0]["seconds"]) == {"low", "median", "high"}
    assert [layer["layer"] for layer in found["steps"][0]["layers"]] == [1, 2, 3, 4]
    assert (found["model"], found["batch_size"], found["checked"]) == (str(run), 3, 2)
    assert (found["settings"]["free_sweeps"], found["settings"]["feedback"]) == (2, 0.37)
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert all(share["products"] > 0 and share["multiply_adds"] > 0 for share in found["shares"])


def test_a_workload_of_a_dataset_has_its_images_and_classes():
    workload = Workload("ep_vgg5_025", SMALL["model_args"], dataset="digits", batch_size=7, img_size=24)
    model, images, labels = workload.make()
    assert images.shape == (7, 1, 24, 24)
    assert (model.in_chans, model.num_classes) == (1, 10)
    again = workload.make()
    assert torch.equal(images, again[1])
    assert torch.equal(labels, again[2])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again[0].parameters(), strict=True))


def test_the_extrapolation_is_that_of_the_literature_s_step():
    assert classic.PARTS == {"free step": 250, "nudged step": 50, "contrast": 2}
    times = {"free step": [1.0, 2.0], "nudged step": [0.1, 0.2], "contrast": [10.0, 20.0]}
    assert extrapolated(times) == [275.0, 550.0]


def test_the_parts_are_the_steps_of_the_classic_algorithm(monkeypatch):
    """Free steps, then a contrast with nudged states that went on from the start of the free ones."""
    model, (images, labels) = make_net(4, gain=0.5), make_batch()
    net, seen = classic_net(model), []
    start = net.net.settle(images, steps=3)
    monkeypatch.setattr(classic, "classic_net", lambda model: net)
    monkeypatch.setattr(net, "estimate", lambda *args: seen.extend(args))
    parts = classic_parts(model, images, labels)
    for name, times in {"free step": 3, "nudged step": 2, "contrast": 1}.items():
        for _ in range(times):
            parts[name]()
    nudged = net.net.settle(images, start, 2, classic.CLASSIC.beta, lambda states: net.objective(states, labels))
    assert_close(seen, [images, labels, nudged, net.net.settle(images, steps=6), classic.CLASSIC.beta])


@pytest.mark.parametrize(
    ("own", "pool"),
    [({"gain": 0.5}, "max"), ({"gain": 0.05, "feedback": 1.0, "unit": 0.9, "padding": [1, 2, 1, 1]}, "avg")],
)
def test_the_classic_reference_agrees_with_the_package_s_own_classic_preset(own, pool, monkeypatch):
    """Both beside the exact gradient of the same net, at few steps; a net that is at λ = 1 is taken as it is."""
    few = Settings.preset("classic", free_sweeps=60, nudged_sweeps=30, beta=0.1)
    monkeypatch.setattr(classic, "CLASSIC", few)
    monkeypatch.setattr(classic, "_BETAS", (0.1, -0.1))
    model, (images, labels) = make_net(4, **own), make_batch()
    rows = classic_checks(model, images, labels)
    model.settings = dataclasses.replace(few, pool=pool)
    for row, ours in zip(rows, gradient_check(model, images, labels), strict=True):
        assert_close((row.cosine, row.norm_ratio), (ours.cosine, ours.norm_ratio), rtol=1e-6, atol=1e-6)
    assert min(row.cosine for row in rows) > 0.99


@pytest.mark.slow
def test_memory_is_measured_in_a_fresh_process():
    """A step that holds a hundred megabytes for a moment; what making it needed is not counted."""
    cost = measure.in_fresh_process(make_hungry_step, 100)
    assert 95 < cost.megabytes < 130
    assert cost.seconds > 0


def test_where_memory_cannot_be_asked_for_all_else_runs(monkeypatch):
    """`resource` is of Unix alone; this module is imported with the package."""
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.find_spec("timm_ep.studies.measure")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def make_hungry_step(megabytes: int) -> measure.Step:
    assert torch.ones(75_000_000).sum()  # 300 MB
    return lambda: torch.ones(megabytes * 250_000).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet18"}, "resnet18 is no ep_vgg"),
        ({"repeats": 1}, "repeats=1 is too small"),
        ({"threads": 0}, "threads=0 is too small"),
        ({"checked": 0}, "checked=0 is too small"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Benchmark(**options)


def test_what_a_run_cannot_change_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"model_args \['in_chans'\] of a run are fixed"):
        Workload(str(run), {"in_chans": 3}).make()
    with pytest.raises(ValueError, match="digits has 360 test images; batch_size=361"):
        Workload("ep_vgg5_025", dataset="digits", batch_size=361).make()
