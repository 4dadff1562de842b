"""The cost model: fits against known lines, and what each axis varies. No time is asserted."""

import json

import pytest

from timm_ep import cli
from timm_ep.studies import scaling
from timm_ep.studies.measure import Machine, Quartiles, StepCost
from timm_ep.studies.scaling import Point, Scaling, fit_cost, fit_line, fitted


def test_a_line_is_found_again():
    line = fit_line([1e9, 2e9, 3e9, 4e9], [2.5, 4.5, 6.5, 8.5])
    assert line.coefficients == pytest.approx([2e-9, 0.5])
    assert (line.r2, line.largest_residual) == pytest.approx((1, 0))


def test_residuals_of_points_off_the_line():
    """By hand: through (0, 1), (1, 1), (2, 4) goes y = 1.5 x + 0.5, past them by 0.5, −1 and 0.5 of a spread of 6."""
    line = fit_line([0.0, 1.0, 2.0], [1.0, 1.0, 4.0])
    assert line.coefficients == pytest.approx([1.5, 0.5])
    assert (line.r2, line.largest_residual) == pytest.approx((1 - 1.5 / 6, 1.0))


def test_costs_are_found_again_and_none_is_negative():
    work, elements = [1e9, 2e9, 5e9], [3e6, 1e6, 2e6]
    values = [2e-9 * a + 1e-7 * b for a, b in zip(work, elements, strict=True)]
    assert fit_cost([work, elements], values).coefficients == pytest.approx([2e-9, 1e-7])
    falling = [2e-9 * a - 1e-7 * b for a, b in zip(work, elements, strict=True)]
    cost = fit_cost([work, elements], falling)
    assert min(cost.coefficients) == 0
    assert cost.r2 < 1


def test_points_of_a_known_cost_give_it_back():
    """All axes in one model; each line by itself."""
    machine = Machine.here()
    points = []
    for axis, value, x in (("batch_size", 4, 4.0), ("batch_size", 8, 8.0), ("width", 0.5, 7e9), ("width", 1.0, 9e9)):
        work, states, parameters = int(x * 1e8), int(x**0.5 * 10), len(points) ** 2
        seconds = 3e-9 * work + 5e-1 * parameters + 2
        memory = 4e-6 * states + 8e-6 * parameters + 20
        points.append(Point(axis, value, x, work, states, parameters, Quartiles(0, seconds, 9e9), memory))
    result = fitted("ep_vgg5", machine, points)
    assert result.time_model.coefficients == pytest.approx([3e-9, 5e-1, 2], rel=1e-4)
    assert result.memory_model.coefficients == pytest.approx([4e-6, 8e-6, 20], rel=1e-4)
    assert list(result.seconds) == list(result.megabytes) == ["batch_size", "width"]
    slope = (points[1].seconds.median - points[0].seconds.median) / 4
    assert result.seconds["batch_size"].coefficients[0] == pytest.approx(slope)


@pytest.fixture
def small(monkeypatch):
    """Few points, and no processes."""
    monkeypatch.setattr(scaling, "_BATCHES", (1, 2))
    monkeypatch.setattr(scaling, "_SIZES", (32, 64))
    monkeypatch.setattr(scaling, "_SWEEPS", (2, 4))
    monkeypatch.setattr(scaling, "_DEPTHS", (5, 9))
    monkeypatch.setattr(scaling, "_WIDTHS", (1 / 32, 1 / 16))
    monkeypatch.setattr(scaling, "in_fresh_process", lambda make, load, *_, **__: StepCost(load.batch_size, 1.0))


def test_each_axis_varies_one_thing(small, tmp_path, capsys):
    options = ["--model", "ep_vgg5_025", "--batch-size", "1", "--repeats", "2", "--json"]
    cli.main(["scaling", *options, "--plot", str(tmp_path / "scaling.svg")])
    found = json.loads(capsys.readouterr().out)
    points = {(point["axis"], point["value"]): point for point in found["points"]}
    for axis, expected in {"batch_size": [1, 2], "img_size": [1024, 4096], "sweeps": [2, 4]}.items():
        assert [point["x"] for point in found["points"] if point["axis"] == axis] == expected
    base = points["batch_size", 1]
    for one, many, times in ((base, points["batch_size", 2], 2), (points["img_size", 32], points["img_size", 64], 4)):
        assert many["state_elements"] == times * one["state_elements"]
        assert 1 < many["multiply_adds"] / one["multiply_adds"] < times  # kernels are folded once a batch
        assert many["parameters"] == one["parameters"]
    assert points["depth", "ep_vgg9"]["x"] == points["depth", "ep_vgg9"]["multiply_adds"]
    assert points["width", 1 / 16]["state_elements"] == 2 * points["width", 1 / 32]["state_elements"]
    assert points["sweeps", 4]["multiply_adds"] > points["sweeps", 2]["multiply_adds"]
    assert set(found["seconds"]) == set(found["megabytes"]) == {axis for axis, _ in points}
    assert (tmp_path / "scaling.svg").read_text().rstrip().endswith("</svg>")


def test_the_table_names_axes_and_fits(small, capsys):
    Scaling(model="ep_vgg5", model_args={"free_sweeps": 2}, over=["width"], batch_size=1, repeats=2).run()
    printed = capsys.readouterr().out
    assert "over width      (x: multiply-adds)" in printed
    assert "largest residual" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": ["height"]}, r"over=\['height'\] must be one or more of batch_size"),
        ({"repeats": 1}, "repeats=1 is too small"),
        ({"model_args": {"architecture": [4, "M"]}}, "has no known depth and width to vary"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Scaling(**options)
