"""The figure of layer densities in TensorBoard."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rigl_keras._figure_style import BLACK, BLUE, TEXT, TICKS, TITLE, WHITE
from rigl_keras.flops.counting import LayerCount

__all__ = ["density_figure"]

_DPI = 120
_MOST_INCHES = 200  # the largest height; Agg draws up to 500


def density_figure(
    layers: Sequence[LayerCount],
    connections: Mapping[str, int],
    *,
    first: Mapping[str, int],
    step: int,
) -> np.ndarray:
    """Returns an image of the density of each layer.

    Args:
        layers: The layers of `flops.count`, at least one.
        connections: `{layer: active connections}` of the masked layers.
        first: The same at the start; marked where it differs.
        step: The optimizer step, for the title.

    Returns:
        uint8 array of shape (height, width, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    now, before = (_densities(layers, c) for c in (connections, first))
    # Sizes in inches: matplotlib's automatic layout takes most of a second.
    left = 0.3 + 0.075 * max(len(layer.name) for layer in layers)
    width, above, below = left + 5.6, 0.85, 0.5
    height = min(above + below + 0.2 * len(layers), _MOST_INCHES)
    figure = Figure(figsize=(width, height), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (
            left / width,
            below / height,
            4.9 / width,
            (height - above - below) / height,
        )
    )
    handles = _draw_bars(axes, layers, connections, now, before)
    _draw_scale(axes, layers, now)
    figure.text(
        0.15 / width,
        1 - 0.12 / height,
        f"Density of each layer at step {step:,}",
        fontsize=TITLE,
        va="top",
    )
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.1 / width, 1 - 0.38 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=TEXT,
        borderaxespad=0,
        columnspacing=1.2,
        handlelength=1.8,
    )
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _draw_bars(axes, layers, connections, now, before):
    """Draws a bar for each layer; returns the handles of the legend."""
    from matplotlib.patches import Patch

    masked = [layer for layer in layers if layer.name in connections]
    rows = np.arange(len(layers))
    handles = []
    for is_masked, label, look in (
        (True, "masked", {"facecolor": BLUE}),
        (False, "without a mask", {"facecolor": WHITE, "hatch": "////"}),
    ):
        shown = [(layer in masked) == is_masked for layer in layers]
        look: dict[str, Any] = look | {"edgecolor": BLACK, "linewidth": 0.6}
        axes.barh(rows[shown], now[shown], 0.72, **look)
        if any(shown):
            handles.append(Patch(label=label, **look))
    if masked:
        ones = sum(connections[layer.name] for layer in masked)
        overall = ones / sum(np.prod(layer.shape) for layer in masked)
        handles.append(
            axes.axvline(
                overall,
                color=BLACK,
                lw=1.2,
                ls="--",
                label=f"all masked layers: {overall:.3f}",
            )
        )
    moved = now != before
    if moved.any():
        handles += axes.plot(
            before[moved],
            rows[moved],
            ls="none",
            marker="D",
            ms=4.5,
            mfc=WHITE,
            mec=BLACK,
            label="at the start",
        )
    return handles


def _draw_scale(axes, layers, now):
    """Writes names of layers at the left, and their densities at the right."""
    rows = np.arange(len(layers))
    at = axes.get_yaxis_transform()
    for row, density in zip(rows, now, strict=True):
        axes.text(
            1.1,
            row,
            f"{density:.3f}",
            transform=at,
            fontsize=TICKS,
            ha="right",
            va="center",
        )
    axes.set_xlim(0, 1.02)
    axes.set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top
    axes.set_yticks(rows, [layer.name for layer in layers], fontsize=TICKS)
    axes.tick_params(axis="x", labelsize=TICKS)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("density", fontsize=TEXT)


def _densities(layers, connections):
    """Returns the density of each layer; 1 for a layer without a mask."""
    return np.array(
        [
            connections.get(layer.name, np.prod(layer.shape))
            / np.prod(layer.shape)
            for layer in layers
        ]
    )
