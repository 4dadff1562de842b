"""In which order the layers move, and which of the products between them are read again.

Each layer needs two products: its drive from the layer below, and the feedback from the layer above. A product is
computed again only once the neighbour it came from has moved. Sweeps alternate their direction, so that one of the two
is always still good: a sweep costs one product per layer and carries news across the whole net.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple


class Visit(NamedTuple):
    """One update of a layer.

    A product is spent if this visit is the last to read it: the neighbour it came from moves before the layer does
    again, or the layer never does. Its map is then free for the result.

    Attributes:
        layer: counted from 0.
        drive_spent: of the product from below.
        feedback_spent: of the product from above.
        last: the layer does not move again.
    """

    layer: int
    drive_spent: bool
    feedback_spent: bool
    last: bool


Sweep = tuple[tuple[Visit, ...], ...]
"""Groups of visits, in order; the layers of a group move at the same time."""


@lru_cache
def schedule(update: str, depth: int, sweeps: range, started: bool | None = None) -> tuple[Sweep, ...]:
    """The visits of every sweep.

    Args:
        update: `sweep`: layer after layer, down in even sweeps and up in odd ones; `odd-even`: two halves;
            `synchronous`: all at once.
        depth: number of layers.
        sweeps: their numbers.
        started: leave out the layer at which the direction turns, where nothing has changed since it moved: in all
            sweeps but the first, and in the first too if a pass upwards went before (True). None: visit all layers.
    """
    order = [_groups(update, depth, sweep) for sweep in sweeps]
    if update == "sweep" and started is not None:
        order = [groups if index == 0 and not started else groups[1:] for index, groups in enumerate(order)]
    upcoming = list(chain.from_iterable(order))
    visits: list[Sweep] = []
    for groups in order:
        visits.append(tuple(tuple(_visit(layer, upcoming[at:]) for layer in group) for at, group in enumerate(groups)))
        upcoming = upcoming[len(groups) :]
    return tuple(visits)


@lru_cache
def arrivals(update: str, depth: int, source: int) -> tuple[int, ...]:
    """With which sweep of a nudged phase, from 1, a force on the state of layer `source` moves it and each below."""
    reached: dict[int, int] = {}
    for number in range(1, depth + 1):
        for group in _groups(update, depth, number - 1):
            reached |= {
                layer: number for layer in group if layer not in reached and (layer == source or layer + 1 in reached)
            }
    return tuple(reached[layer] for layer in range(source + 1))


def _groups(update: str, depth: int, sweep: int) -> list[list[int]]:
    if update == "synchronous":
        return [list(range(depth))]
    if update == "odd-even":
        return [list(range(0, depth, 2)), list(range(1, depth, 2))]
    upwards = [[layer] for layer in range(depth)]
    return upwards if sweep % 2 else upwards[::-1]


def _visit(layer: int, upcoming: Sequence[Sequence[int]]) -> Visit:
    """The visit of a layer that belongs to the first of the upcoming groups."""
    moving = set(upcoming[0])
    for group in upcoming[1:]:
        if layer in group:
            return Visit(layer, layer - 1 in moving, layer + 1 in moving, last=False)
        moving.update(group)
    return Visit(layer, drive_spent=True, feedback_spent=True, last=True)
