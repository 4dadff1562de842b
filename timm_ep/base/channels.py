"""A mean or std for images in grey, from one of colours, and the other way round."""

from collections.abc import Sequence

__all__ = ["channel_values"]


def channel_values(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A mean or std per channel for images of `channels`: averaged where it was of another number."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
