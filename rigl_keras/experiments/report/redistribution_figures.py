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
    wide = 1.2 + 0.27 * len(layers)
    figure = new_figure(4.2 + wide, 0.7 + 3.0 * len(densities))
    grid = figure.subplots(
        len(densities), 2, squeeze=False, width_ratios=(3.4, wide)
    )
    handles = {}
    for density, (left, right) in zip(densities, grid, strict=True):
        present = [gin for gin in _REDISTRIBUTED if (gin, density) in found]
        for at, gin in enumerate(present):
            summary = found[gin, density]
            label, colour, style, hatch = _REDISTRIBUTED[gin]
            for run in summary.finished:
                steps = [step for step, _ in run.curve]
                ratios = [ratio for _, ratio in run.curve]
                left.step(
                    steps,
                    ratios,
                    where="post",
                    color=colour,
                    ls=style,
                    lw=1.4,
                    alpha=0.9,
                )
            names = [layer["name"] for layer in layers]
            means = _layer_means(summary, names)
            width = 0.84 / len(present)
            shift = (at - (len(present) - 1) / 2) * width
            bars = right.bar(
                np.arange(len(names)) + shift,
                means,
                width,
                color=colour,
                hatch=hatch,
                edgecolor=BLACK,
                linewidth=0.4,
            )
            handles.setdefault(label, bars)
        dress(
            left,
            f"density {exact(density)}",
            "training step",
            "inference FLOPs / dense",
        )
        top = left.dataLim.ymax
        if math.isfinite(top) and top > 0:
            left.set_ylim(0, 1.15 * top)
        else:
            left.text(
                0.5,
                0.5,
                "no flops.csv can be read",
                ha="center",
                transform=left.transAxes,
                fontsize=TEXT,
            )
        left.xaxis.set_major_locator(ticker.MaxNLocator(4))
        dress(right, None, None, "density at the end")
        right.grid(axis="x", visible=False)
        right.set_xticks(
            range(len(layers)),
            [safe_text(layer["name"]) for layer in layers],
            rotation=90,
        )
        right.margins(x=0.01)
    # Lines and bars share the colours: each handle shows both.
    styles = {label: style for label, _, style, _ in _REDISTRIBUTED.values()}
    colours = {label: c for label, c, _, _ in _REDISTRIBUTED.values()}
    # Matplotlib's annotations omit handles drawn by `handler_map`.
    shown: list[Any] = [
        (Line2D([], [], color=colours[label], ls=styles[label]), bars[0])
        for label, bars in handles.items()
    ]
    figure.legend(
        shown,
        handles,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.4)},
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        fontsize=TEXT,
        handlelength=5,
        handleheight=1.2,
    )
    return figure


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
