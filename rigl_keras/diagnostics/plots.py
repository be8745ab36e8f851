"""Figures of how masks move."""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rigl_keras import _extras, _figure_style
from rigl_keras._figure_style import (
    BLACK,
    BLUE,
    TEXT,
    TICKS,
    VERMILION,
    dress,
    legend_above,
    new_figure,
)
from rigl_keras.diagnostics.table import ALL, read_rows

__all__ = ["figures"]


def figures(
    csv_path: str | os.PathLike, out_dir: str | os.PathLike
) -> list[Path]:
    """Draws the record of `TopologyDiagnostics` from its table.

    Args:
        csv_path: A topology.csv with at least one row.
        out_dir: Folder for the figures; made if it does not exist.

    Returns:
        Paths of the figures: `density.png`, `exploration.png` and
        `dead_units.png`; `churn.png` if there was an update; `loss.png` if
        losses were kept.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The file is not such a table, or is empty.

    Example:

    >>> figures("logs/topology/topology.csv", "figures/")
    """
    _extras.check_installed("A figure of topology", "matplotlib")
    rows = read_rows(csv_path)
    if not rows:
        raise ValueError(f"{str(csv_path)!r} has no complete update to draw.")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # Each update has a block of rows, with the layers in order.
    layers = [row["layer"] for row in rows[: _block(rows)]]
    blocks = [
        rows[i : i + len(layers)] for i in range(0, len(rows), len(layers))
    ]
    drawn = {
        "density.png": _layer_figure(blocks, _DENSITY),
        "exploration.png": _layer_figure(blocks, _EXPLORATION),
        "dead_units.png": _layer_figure(blocks, _DEAD_UNITS),
    }
    if len(blocks) > 1:
        drawn["churn.png"] = _layer_figure(blocks[1:], _CHURN)
    losses = [b[-1] for b in blocks if b[-1]["loss_before"] is not None]
    if losses:
        drawn["loss.png"] = _loss_figure(losses)
    for name, figure in drawn.items():
        _figure_style.save(figure, out_dir / name)
    return [out_dir / name for name in drawn]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Panel:
    """A pair of axes: a line for all layers, and a map of each layer.

    `layer` gets the value from a row; `whole` from a row and the row of all
    layers.
    """

    line_title: str
    whole: Callable[[dict], float | None]
    map_title: str
    layer: Callable[[dict, dict], float | None]
    unit: str
    log: bool = False
    digits: int = 1
    counts: bool = False


def _percent(column):
    return lambda row, *_: 100 * row[column]


def _dead_percent(dead, units):
    return lambda row, _: 100 * row[dead] / row[units]


def _flops_percent(row, whole):
    if row["inference_flops"] is None:
        return None
    return 100 * row["inference_flops"] / whole["inference_flops"]


_DENSITY = [
    _Panel(
        line_title="Density of all masked layers",
        whole=lambda row: row["density"],
        map_title="Density of each layer",
        layer=lambda row, _: row["density"],
        unit="density, logarithmic",
        log=True,
        digits=3,
    ),
    _Panel(
        line_title="Inference FLOPs of the model, for one sample",
        whole=lambda row: row["inference_flops"],
        map_title="Each layer's share of the FLOPs",
        layer=_flops_percent,
        unit="% of the model's FLOPs",
    ),
]
_EXPLORATION = [
    _Panel(
        line_title="Ever active: % of all connections ($R_s$)",
        whole=_percent("ever_active"),
        map_title="Ever active, by layer",
        layer=_percent("ever_active"),
        unit="% of all connections",
    ),
    _Panel(
        line_title="Overlap: % of the initial connections still active",
        whole=_percent("overlap"),
        map_title="Overlap, by layer",
        layer=_percent("overlap"),
        unit="% of the initial connections",
    ),
]
_CHURN = [
    _Panel(
        line_title="Churn: what an update grew, % of the connections before",
        whole=_percent("churn"),
        map_title="Churn, by layer",
        layer=_percent("churn"),
        unit="% of the connections before",
    ),
]
_DEAD_UNITS = [
    _Panel(
        line_title="Outputs without an incoming connection: number",
        whole=lambda row: row["no_incoming"],
        map_title="The same by layer: % of its outputs",
        layer=_dead_percent("no_incoming", "outputs"),
        unit="% of the outputs",
        counts=True,
    ),
    _Panel(
        line_title="Inputs without an outgoing connection: number",
        whole=lambda row: row["no_outgoing"],
        map_title="The same by layer: % of its inputs",
        layer=_dead_percent("no_outgoing", "inputs"),
        unit="% of the inputs",
        counts=True,
    ),
]
# Colour-blind people can distinguish these.
_COLOURS, _NOTHING = "viridis", "#d9d9d9"


def _layer_figure(blocks, panels):
    """Returns a figure with lines for all layers above maps."""
    layers = [row["layer"] for row in blocks[0][:-1]]
    steps = [block[-1]["step"] for block in blocks]
    edges = np.array([*steps, steps[-1] + _typical_gap(steps)])
    height = 0.6 + 0.2 * max(len(layers), 7)
    figure = new_figure(1.8 + 5.2 * len(panels), 2.2 + height)
    axes = figure.subplots(
        2,
        len(panels),
        sharex=True,
        squeeze=False,
        height_ratios=[1.5, height],
    )
    for panel, (line, heat) in zip(panels, axes.T, strict=True):
        whole = _array([panel.whole(block[-1]) for block in blocks])
        _draw_line(line, edges, whole, panel)
        values = _array(
            [[panel.layer(row, b[-1]) for row in b[:-1]] for b in blocks]
        ).T
        image = _draw_map(heat, edges, values, panel)
        bar = figure.colorbar(image, ax=heat, pad=0.1, aspect=30)
        bar.set_label(panel.unit, fontsize=TEXT)
        bar.ax.tick_params(labelsize=TICKS)
        if panel.log:
            _plain_ticks(bar, image.norm)
    axes[1, 0].set_yticklabels(layers, fontsize=TICKS)
    return figure


def _draw_line(axes, edges, values, panel):
    from matplotlib.ticker import EngFormatter, MaxNLocator

    # A value holds until the next update.
    axes.step(
        edges, np.append(values, values[-1]), where="post", color=BLUE, lw=1.8
    )
    dress(axes, panel.line_title)
    axes.margins(x=0)
    finite = values[np.isfinite(values)]
    top = 1.15 * finite.max() if finite.size else 0
    axes.set_ylim(0, top or 1)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=panel.counts))
    if top > 1000:
        axes.yaxis.set_major_formatter(EngFormatter())


def _draw_map(axes, edges, values, panel):
    from matplotlib.colors import LogNorm, Normalize

    shown = np.ma.masked_invalid(values)
    if panel.log:
        shown = np.ma.masked_less_equal(shown, 0)
    low, high = (shown.min(), shown.max()) if shown.count() else (1.0, 1.0)
    if panel.log:
        norm = LogNorm(low if low < high else high / 10, high)
    else:
        norm = Normalize(0, high or 1)
    axes.set_facecolor(_NOTHING)
    image = axes.pcolormesh(
        edges,
        np.arange(len(values) + 1),
        shown,
        norm=norm,
        cmap=_COLOURS,
        rasterized=True,
    )
    axes.invert_yaxis()
    dress(axes, panel.map_title, x="optimizer step")
    axes.grid(False)
    axes.set_yticks(np.arange(len(values)) + 0.5, [])
    at = axes.get_yaxis_transform()
    style = dict(transform=at, fontsize=TICKS - 1, ha="right")
    axes.text(1.09, -0.15, "last", va="bottom", style="italic", **style)
    for row, value in enumerate(values[:, -1]):
        if np.isfinite(value):
            text = f"{value:.{panel.digits}f}"
            axes.text(1.09, row + 0.5, text, va="center", **style)
    return image


def _plain_ticks(bar, norm):
    """Labels a logarithmic scale at 1, 2 and 5 of each decade."""
    first, last = (
        math.floor(math.log10(norm.vmin)),
        math.ceil(math.log10(norm.vmax)),
    )
    ticks = [
        digit * 10.0**decade
        for decade in range(first, last + 1)
        for digit in (1, 2, 5)
    ]
    ticks = [t for t in ticks if norm.vmin <= t <= norm.vmax * (1 + 1e-9)]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()


def _loss_figure(rows):
    """Returns a figure of the loss of an update's batch, before and after."""
    steps = [row["step"] for row in rows]
    before, after = (
        _array([row[column] for row in rows])
        for column in ("loss_before", "loss_after")
    )
    figure = new_figure(7.5, 5.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for values, label, colour, marker in (
        (before, "before the update", BLUE, "o"),
        (after, "after the update", VERMILION, "^"),
    ):
        top.plot(
            steps, values, label=label, color=colour, marker=marker, ms=3, lw=1
        )
    dress(
        top,
        "Loss of an update's batch, by the masks before and after it",
        y="loss",
    )
    bottom.axhline(0, color=BLACK, lw=0.8)
    bottom.plot(steps, after - before, color=BLACK, marker=".", ms=4, lw=0.8)
    dress(bottom, "What an update cost", x="optimizer step", y="after - before")
    legend_above(figure)
    return figure


def _typical_gap(steps):
    gaps = np.diff(steps)
    return max(float(np.median(gaps)), 1.0) if gaps.size else 1.0


def _array(values):
    """Returns floats; unknown values are NaN."""
    return np.array(values, dtype=float)


def _block(rows):
    """Returns the number of rows of an update."""
    return next(i for i, row in enumerate(rows, start=1) if row["layer"] == ALL)
