"""What a list of channels and poolings says of a net: its convolutions, and which of them timm takes features from."""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Convolution", "feature_layers", "read_architecture"]


class Convolution(NamedTuple):
    """One layer.

    Attributes:
        in_channels: of the state below.
        channels: of its own state.
        pooled: whether its state is pooled, to half of the sides.
        reduction: sides of the image over those of its state, up to rounding.
    """

    in_channels: int
    channels: int
    pooled: bool
    reduction: int


def read_architecture(architecture: Sequence[int | str], in_chans: int) -> list[Convolution]:
    """The layers of a net, from the image up.

    Args:
        architecture: output channels of each convolution, "M" for pooling after it, as timm's VGGs are listed.
        in_chans: channels of the image.

    Raises:
        ValueError: anything but positive integers and "M"; no convolution; an "M" at the start or after another, as it
            is the state of a convolution that is pooled.
    """
    layers: list[Convolution] = []
    below, reduction = in_chans, 1
    for position, item in enumerate(architecture):
        if item == "M":
            if position == 0 or architecture[position - 1] == "M":
                raise ValueError(
                    f"architecture={list(architecture)}: item {position} pools, but there is no convolution right "
                    'before it whose state could be. Put "M" after a number of channels.'
                )
            continue
        if not isinstance(item, int) or isinstance(item, bool) or item < 1:
            raise ValueError(
                f"architecture={list(architecture)}: item {position} is {item!r}; give the output channels of each "
                'convolution, and "M" for pooling after it, as in [64, "M", 128, "M"].'
            )
        pooled = list(architecture[position + 1 : position + 2]) == ["M"]
        reduction *= 2 if pooled else 1
        layers.append(Convolution(below, item, pooled, reduction))
        below = item
    if not layers:
        raise ValueError(f"architecture={list(architecture)} has no convolution; give at least one number of channels.")
    return layers


def feature_layers(layers: Sequence[Convolution]) -> list[int]:
    """The last layer at each resolution, counted from 0: those whose states timm calls features."""
    return sorted({layer.reduction: index for index, layer in enumerate(layers)}.values())
