"""The benchmark counts and orders its measurements as it says; what it measures is not asserted."""

import json

import pytest

from timm_ep import benchmark, cli
from timm_ep.benchmark import Benchmark, _quartiles

SMALL = {"model_args": {"architecture": [4, "M", 4, "M", 4, "M"]}, "batch_size": 4, "repeats": 3}


def test_steps_alternate_and_the_first_of_each_is_not_counted(monkeypatch):
    seen = []

    def step(self, task, images, labels):
        seen.append(task.model.gradient)
        assert images.shape == (4, 3, 32, 32)
        return {"ep": 3.0, "backprop": 1.0}[seen[-1]] * (100 if len(seen) <= 2 else len(seen))

    monkeypatch.setattr(benchmark.Benchmark, "_step", step)
    result = Benchmark(model="ep_vgg5_025", **SMALL).run()
    assert seen == ["ep", "backprop"] * 4
    assert result.ep == (12.0, 15.0, 18.0)  # of 9, 15, 21: the quartiles lie between
    assert result.backprop == (5.0, 6.0, 7.0)
    assert result.ratio == 2.5
    assert 0.9 < result.cosine <= 1.0001


def test_quartiles_are_those_of_the_sorted_times():
    assert _quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)


def test_the_command_prints_json(capsys):
    options = ["--model-args.architecture", "[4,M,4,M,4,M]", "--batch-size", "4", "--repeats", "2", "--json"]
    cli.main(["benchmark", "--model", "ep_vgg5_025", *options])
    found = json.loads(capsys.readouterr().out)
    assert found["ratio"] == pytest.approx(found["ep"][1] / found["backprop"][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"model": "resnet18"}, "resnet18 is no ep_vgg"), ({"repeats": 1}, "repeats=1 is too small")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Benchmark(**options)
