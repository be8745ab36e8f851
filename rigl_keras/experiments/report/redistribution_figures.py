"""The figure of densities that move between layers."""

import math
import statistics
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D

from rigl_keras._figure_style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    TEXT,
    VERMILION,
    dress,
    new_figure,
)
from rigl_keras._text import exact
from rigl_keras.experiments.report import summaries
from rigl_keras.experiments.report.method_figures import safe_text
from rigl_keras.experiments.report.records import Records
from rigl_keras.experiments.report.search_figures import RIGL

__all__ = ["has_redistribution", "redistribution"]

# Redistribution (Figure 4).

_REDISTRIBUTED = {
    "rigl_uniform_wrn": ("RigL (uniform)", BLUE, "--", ""),
    "rigl_erk_wrn": ("RigL (ERK)", VERMILION, "-", "///"),
    "rigl_sg_uniform_wrn": ("RigL-SG (uniform)", GREEN, "-.", "..."),
    "rigl_sm_uniform_wrn": ("RigL-SM (uniform)", ORANGE, ":", "xxx"),
}


def has_redistribution(records: Records) -> bool:
    """Returns whether a run whose density moved is finished."""
    return bool(_redistributed(records))


def _redistributed(records):
    found = {
        (gin, density): summaries.of(records, gin, density)
        for gin in _REDISTRIBUTED
        for density in summaries.densities(records, _REDISTRIBUTED)
    }
    found = {key: summary for key, summary in found.items() if summary.n}
    # Plain RigL has level lines: shown beside the others only.
    moved = {density for gin, density in found if gin not in RIGL.values()}
    return {
        (gin, density): summary
        for (gin, density), summary in found.items()
        if density in moved
    }


def redistribution(records: Records) -> Figure:
    """Draws inference FLOPs over steps, and the densities of layers.

    Args:
        records: All runs. `has_redistribution` must be true.
    """
    found = _redistributed(records)
    densities = sorted({density for _, density in found})
    layers = max(
        (s.finished[0].finished_result["layers"] for s in found.values()),
        key=len,
    )
    names = [layer["name"] for layer in layers]
    wide = 1.2 + 0.27 * len(names)
    figure = new_figure(4.2 + wide, 0.7 + 3.0 * len(densities))
    grid = figure.subplots(
        len(densities), 2, squeeze=False, width_ratios=(3.4, wide)
    )
    bars = {}
    for density, (left, right) in zip(densities, grid, strict=True):
        rows = {
            gin: found[gin, density]
            for gin in _REDISTRIBUTED
            if (gin, density) in found
        }
        _draw_flops(left, rows, f"density {exact(density)}")
        bars |= _draw_layers(right, rows, names)
    _draw_legend(figure, bars)
    return figure


def _draw_flops(axes, rows, title):
    """Draws the inference FLOPs of each run of some rows, over its steps."""
    for gin, summary in rows.items():
        _, colour, style, _ = _REDISTRIBUTED[gin]
        for run in summary.finished:
            axes.step(
                [step for step, _ in run.curve],
                [ratio for _, ratio in run.curve],
                where="post",
                color=colour,
                ls=style,
                lw=1.4,
                alpha=0.9,
            )
    dress(axes, title, "training step", "inference FLOPs / dense")
    top = axes.dataLim.ymax
    if math.isfinite(top) and top > 0:
        axes.set_ylim(0, 1.15 * top)
    else:
        axes.text(
            0.5,
            0.5,
            "no flops.csv can be read",
            ha="center",
            transform=axes.transAxes,
            fontsize=TEXT,
        )
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4))


def _draw_layers(axes, rows, names):
    """Draws the density of each layer at the end; returns bars by label."""
    bars = {}
    width = 0.84 / len(rows)
    for at, (gin, summary) in enumerate(rows.items()):
        label, colour, _, hatch = _REDISTRIBUTED[gin]
        shift = (at - (len(rows) - 1) / 2) * width
        bars[label] = axes.bar(
            np.arange(len(names)) + shift,
            _layer_means(summary, names),
            width,
            color=colour,
            hatch=hatch,
            edgecolor=BLACK,
            linewidth=0.4,
        )
    dress(axes, None, None, "density at the end")
    axes.grid(axis="x", visible=False)
    axes.set_xticks(
        range(len(names)), [safe_text(name) for name in names], rotation=90
    )
    axes.margins(x=0.01)
    return bars


def _draw_legend(figure, bars):
    """Draws one legend: lines and bars share colours, a handle shows both."""
    styles = {label: style for label, _, style, _ in _REDISTRIBUTED.values()}
    colours = {label: c for label, c, _, _ in _REDISTRIBUTED.values()}
    # Matplotlib's annotations omit handles drawn by `handler_map`.
    shown: list[Any] = [
        (Line2D([], [], color=colours[label], ls=styles[label]), drawn[0])
        for label, drawn in bars.items()
    ]
    figure.legend(
        shown,
        bars,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.4)},
        loc="outside upper center",
        ncols=len(bars),
        frameon=False,
        fontsize=TEXT,
        handlelength=5,
        handleheight=1.2,
    )


def _layer_means(summary, names):
    """Returns the density of each layer, the mean over seeds."""
    by_layer = {}
    for run in summary.finished:
        for layer in run.finished_result["layers"]:
            by_layer.setdefault(layer["name"], []).append(layer["density"])
    return [
        statistics.fmean(by_layer[name]) if name in by_layer else 0.0
        for name in names
    ]
