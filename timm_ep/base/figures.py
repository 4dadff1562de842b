"""Figures with matplotlib (`pip install timm_ep[plots]`), which is imported only when one is drawn."""

from pathlib import Path
from typing import Any

from timm_ep.base.files import replacing

__all__ = ["add_layer_bar", "layer_color", "new_figure", "save_figure"]


def new_figure(columns: int, rows: int = 1, panel: tuple[float, float] = (5, 4)) -> tuple[Any, Any]:
    """A figure and its axes, an array of `rows` × `columns`, each about `panel` inches large."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(panel[0] * columns, 6), panel[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def layer_color(layer: int, depth: int) -> Any:
    """From dark at the first layer to light at the last."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * (layer - 1) / max(depth - 1, 1))


def add_layer_bar(figure: Any, axis: Any, depth: int) -> None:
    """A colour bar that names the layers."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colors = ListedColormap([layer_color(layer, depth) for layer in range(1, depth + 1)])
    bounds = [layer + 0.5 for layer in range(depth + 1)]
    bar = figure.colorbar(ScalarMappable(BoundaryNorm(bounds, depth), colors), ax=axis, label="layer")
    bar.set_ticks(range(1, depth + 1))
    bar.minorticks_off()


def save_figure(figure: Any, output: Path) -> None:
    """Write a figure whole or not at all; the suffix of `output` chooses the format (png, svg, pdf)."""
    with replacing(output) as temporary:
        figure.savefig(temporary, format=output.suffix.lstrip(".") or "png")
