"""What people have in their first hour, and that it comes out right: each row of the table in `first_hour.py`."""

import pytest

import first_hour

SLOW = {first_hour.homes, first_hour.optimizers, first_hour.predictions, first_hour.torchrun}


@pytest.mark.parametrize(
    "item",
    [pytest.param(item, marks=pytest.mark.slow if item in SLOW else ()) for item in first_hour.ITEMS],
    ids=lambda item: item.__name__,
)
def test_it_comes_out_right(item, tmp_path):
    count, wrong = first_hour.wrong(item, tmp_path)
    assert wrong == []
    assert count > 0
