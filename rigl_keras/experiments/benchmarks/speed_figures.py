"""The figures of `bin/benchmark kernels|train|inference`."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rigl_keras._figure_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    TEXT,
    TICKS,
    TITLE,
    VERMILION,
    dress,
    new_figure,
    ticks_at,
)
from rigl_keras.experiments.benchmarks.speed_tables import Line

__all__ = ["speed_ups"]

_LOOKS = (
    (VERMILION, "o", "-"),
    (BLUE, "s", "--"),
    (GREEN, "D", ":"),
    (PURPLE, "^", "-."),
    (ORANGE, "v", (0, (5, 1))),
    (SKY, "P", (0, (3, 1, 1, 1))),
    (GREY, "X", (0, (1, 1))),
)
_NOISE = 1.1  # the ratio by which repeated measurements may differ
_CROSSOVER = {
    "marker": "o",
    "ms": 11,
    "mfc": "none",
    "mew": 1.6,
    "lw": 0,
}


def speed_ups(
    lines: Sequence[Line], *, title: str, rows: str, columns: str, label: str
) -> Figure:
    """Draws speed-ups over density, both on logarithmic scales.

    Args:
        lines: At least one line.
        title: Title of the figure.
        rows, columns, label: Fields of a `Measurement`. Each value of the
            first two has a row or a column of panels; `label` names lines.
    """
    down = _values(lines, rows)
    across = _values(lines, columns)
    figure = new_figure(3.0 + 3.6 * len(across), 1.0 + 2.7 * len(down))
    figure.suptitle(title, fontsize=TITLE, x=0.01, ha="left")
    grid = figure.subplots(
        len(down), len(across), sharex=True, sharey=True, squeeze=False
    )
    for row, panels in zip(down, grid, strict=True):
        of_row = [line for line in lines if getattr(line.first, rows) == row]
        labels = _values(of_row, label)
        for column, axes in zip(across, panels, strict=True):
            for line in of_row:
                if getattr(line.first, columns) == column:
                    look = labels.index(getattr(line.first, label))
                    _draw(axes, line, _LOOKS[look % len(_LOOKS)])
            axes.axhline(1, color=BLACK, ls="--", lw=1, zorder=1)
            heading = ", ".join(filter(None, map(_said, (row, column))))
            dress(axes, heading)
        _legend(panels[-1], labels, any(_crosses(line) for line in of_row))
    _set_scales(grid, lines)
    return figure


def _values(lines, field):
    return list(dict.fromkeys(getattr(line.first, field) for line in lines))


def _said(value):
    return f"batch {value}" if isinstance(value, int) else value


def _crosses(line):
    """Returns whether a line crosses that of the dense side by more than noise.

    It must be a tenth above it before the crossover, and a tenth below after.
    """
    at = line.crossover
    if at is None or not math.isfinite(at):
        return False
    before = [ratio for d, ratio in line.speed_ups.items() if d < at]
    after = [ratio for d, ratio in line.speed_ups.items() if d > at]
    return max(before, default=1) >= _NOISE and min(after, default=1) <= (
        1 / _NOISE
    )


def _draw(axes, line, look):
    colour, marker, style = look
    axes.plot(
        list(line.speed_ups),
        list(line.speed_ups.values()),
        color=colour,
        marker=marker,
        ls=style,
        ms=5,
        lw=1.6,
    )
    if _crosses(line):
        axes.plot([line.crossover], [1], color=colour, **_CROSSOVER)


def _legend(axes, labels, crosses):
    """Draws the legend of a row, at the right of its last panel."""
    handles = [
        Line2D([], [], color=colour, marker=marker, ls=style, ms=5, lw=1.6)
        for colour, marker, style in (
            _LOOKS[i % len(_LOOKS)] for i in range(len(labels))
        )
    ]
    handles.append(Line2D([], [], color=BLACK, ls="--", lw=1))
    labels = [*map(_said, labels), "as fast as dense"]
    if crosses:
        handles.append(Line2D([], [], color=BLACK, **_CROSSOVER))
        labels.append("crossover")
    axes.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.02),
        frameon=False,
        fontsize=TICKS,
        handlelength=3.5,
        labelspacing=0.7,
    )


def _set_scales(grid, lines):
    densities = sorted({d for line in lines for d in line.speed_ups})
    found = [s for line in lines for s in line.speed_ups.values()]
    low = math.floor(math.log2(min(1.0, *found)))
    high = math.ceil(math.log2(max(1.0, *found)))
    for axes in grid.flat:
        axes.set_xscale("log")
        axes.set_yscale("log", base=2)
        axes.margins(x=0.08)
        # A little larger, so that no marker is cut off.
        axes.set_ylim(2 ** (low - 0.15), 2 ** (high + 0.15))
        ticks_at(axes.xaxis, densities)
        ticks_at(axes.yaxis, [2.0**i for i in range(low, high + 1)])
    for axes in grid[-1]:
        axes.set_xlabel("density (1 - sparsity)", fontsize=TEXT)
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up over dense", fontsize=TEXT)
