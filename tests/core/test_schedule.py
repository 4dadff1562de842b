"""Orders of update, and what is spent when: against a list of every reading, written down plainly."""

from itertools import pairwise

import pytest

from timm_ep.core.schedule import Visit, schedule


def test_a_sweep_goes_down_and_up():
    down, up = schedule("sweep", 3, range(2))
    assert [[visit.layer for visit in group] for group in down] == [[2], [1], [0]]
    assert [[visit.layer for visit in group] for group in up] == [[0], [1], [2]]
    # Down, the drive of layer 1 is of no use once layer 0 has moved; its feedback is read again on the way up.
    assert down[1] == (Visit(1, drive_spent=True, feedback_spent=False, last=False),)
    assert up[1] == (Visit(1, drive_spent=True, feedback_spent=True, last=True),)


def test_the_other_orders():
    (halves,), (together,) = schedule("odd-even", 5, range(1)), schedule("synchronous", 3, range(7, 8))
    assert [[visit.layer for visit in group] for group in halves] == [[0, 2, 4], [1, 3]]
    assert [[visit.layer for visit in group] for group in together] == [[0, 1, 2]]


@pytest.mark.parametrize(("started", "lengths"), [(None, [4, 4, 4]), (False, [4, 3, 3]), (True, [3, 3, 3])])
def test_the_layer_at_a_turn_has_moved_already(started, lengths):
    sweeps = schedule("sweep", 4, range(3), started)
    assert [len(sweep) for sweep in sweeps] == lengths
    order = [visit.layer for sweep in sweeps for (visit,) in sweep]
    assert (started is None) == any(one == other for one, other in pairwise(order))
    assert schedule("synchronous", 4, range(3), started) == schedule("synchronous", 4, range(3))


@pytest.mark.parametrize("started", [None, False, True])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("update", ["sweep", "odd-even", "synchronous"])
def test_a_product_is_spent_when_no_visit_reads_it_again(update, depth, first, started):
    sweeps = schedule(update, depth, range(first, first + 4), started)
    groups = [group for sweep in sweeps for group in sweep]
    product: dict[tuple[int, int], int] = {}  # of a layer with a neighbour: its number, or missing once the other moved
    readings: list[tuple[Visit, int, int]] = []
    for group in groups:
        for visit in group:
            numbers = []
            for neighbour in (visit.layer - 1, visit.layer + 1):
                numbers.append(product.setdefault((visit.layer, neighbour), len(readings)))
            readings.append((visit, *numbers))
        for visit in group:
            product.pop((visit.layer - 1, visit.layer), None)
            product.pop((visit.layer + 1, visit.layer), None)
    for index, (visit, drive, feedback) in enumerate(readings):
        later = [(one, below, above) for one, below, above in readings[index + 1 :] if one.layer == visit.layer]
        assert visit.last == (not later)
        assert visit.drive_spent == (drive not in [below for _, below, _ in later])
        assert visit.feedback_spent == (feedback not in [above for _, _, above in later])
