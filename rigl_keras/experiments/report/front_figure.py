"""The README's figure: speed and accuracy against density.

The numbers come from two data files: measurements of `bin/benchmark train`, and
the summary of the small runs by `bin/report`.
"""

import csv
import os
from collections import defaultdict
from pathlib import Path

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rigl_keras._figure_style import (
    BLACK,
    BLUE,
    VERMILION,
    dress,
    legend_below,
    new_figure,
    ticks_at,
)
from rigl_keras.experiments.report.method_figures import LOOKS

__all__ = ["front_figure"]

# Sides of `bin/benchmark train`; distributions and how they are drawn.
_SPARSE, _TORCH = "product=auto", "PyTorch, dense and masked"
_DISTRIBUTIONS = {
    "erdos_renyi_kernel": ("RigL, ERK masks", VERMILION, "o", "-"),
    "uniform": ("RigL, uniform masks", BLUE, "s", "--"),
}
# Rows of the results, and the method whose style they use.
_METHODS = {
    "RigL (ERK)": "RigL",
    "Static (ERK)": "Static",
    "Pruning": "Pruning",
    "RigL (ERK) 4x": "RigL",
}


def front_figure(
    training: str | os.PathLike, results: str | os.PathLike
) -> Figure:
    """Draws speed of training and accuracy against density.

    Args:
        training: `train.csv` of `bin/benchmark train`.
        results: `report.csv` of `bin/report`.

    Returns:
        The figure.

    Raises:
        ValueError: A file has none of the rows to draw.
    """
    figure = new_figure(8.5, 3.6)
    left, right = figure.subplots(1, 2)
    _draw_speed(left, _rows(training))
    _draw_accuracy(right, _rows(results))
    return figure


def _rows(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _draw_speed(axes: Axes, rows: list[dict]) -> None:
    curves = defaultdict(list)
    for row in rows:
        if row["side"] == _SPARSE and row["model"] == "wide_resnet":
            point = float(row["density"]), float(row["speed_up"])
            curves[row["distribution"]].append(point)
    if not curves:
        raise ValueError("No training step of wide_resnet was measured.")
    for distribution, (label, color, marker, line) in _DISTRIBUTIONS.items():
        densities, speeds = zip(*sorted(curves[distribution]), strict=True)
        axes.plot(
            densities, speeds, color=color, marker=marker, ls=line, label=label
        )
    axes.axhline(1, color=BLACK, lw=1, ls=":", label="dense Keras")
    axes.set_xscale("log")
    ticks_at(axes.xaxis, sorted({d for c in curves.values() for d, _ in c}))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%gx"))
    title = "Speed of a training step, WRN-22-2"
    dress(axes, title, "density", "times the dense step's speed")
    legend_below(axes, ncols=1)


def _draw_accuracy(axes: Axes, rows: list[dict]) -> None:
    cells = {
        (row["row"], row["density"]): row
        for row in rows
        if row["table"] == "methods" and row["accuracy_mean"]
    }
    dense = cells.get(("Dense", ""))
    if dense is None:
        raise ValueError("The results have no dense network.")
    for name, looks in _METHODS.items():
        color, marker, line = LOOKS[looks]
        points = sorted(
            (float(density), row)
            for (row_name, density), row in cells.items()
            if row_name == name
        )
        if points:
            axes.errorbar(
                [density for density, _ in points],
                [float(row["accuracy_mean"]) for _, row in points],
                [float(row["accuracy_std"] or 0) for _, row in points],
                color=color,
                marker=marker,
                ls=line,
                mfc="white" if name.endswith("x") else color,
                capsize=3,
                label=name.replace("4x", "trained 4 times as long"),
            )
    mean = float(dense["accuracy_mean"])
    axes.axhline(mean, color=BLACK, lw=1, ls=":", label="dense Keras")
    axes.set_xscale("log")
    ticks_at(axes.xaxis, sorted({float(d) for _, d in cells if d}))
    title = "Accuracy of WRN-10-1, 3 epochs of CIFAR-10"
    dress(axes, title, "density", "test accuracy (%)")
    legend_below(axes, ncols=1)
