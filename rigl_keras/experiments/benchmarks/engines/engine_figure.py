"""The figure of `bin/benchmark engines`."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rigl_keras._figure_style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    SKY,
    TEXT,
    TICKS,
    TITLE,
    VERMILION,
    WHITE,
    dress,
    new_figure,
    ticks_at,
)
from rigl_keras._text import exact
from rigl_keras.experiments.benchmarks.engines import catalogue
from rigl_keras.experiments.benchmarks.engines.records import Measurement

__all__ = ["engine_figure"]

_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_SHADES = (VERMILION, ORANGE, SKY, BLUE, GREY)


def engine_figure(measurements: Sequence[Measurement]) -> Figure:
    """Draws the times of calls, a panel for each network and batch size.

    A panel has a row for each engine. A marker for each density shows the
    median, the line through it the quartiles.

    Args:
        measurements: At least one, all from one machine.
    """
    engines = [
        name
        for name in catalogue.ENGINES
        if any(m.engine == name for m in measurements)
    ]
    rows = _each((m.case.model, m.case.distribution) for m in measurements)
    batches = sorted({m.case.batch for m in measurements})
    densities = sorted({m.case.density for m in measurements})
    figure = new_figure(
        2.4 + 3.2 * len(batches), 1.2 + (0.7 + 0.3 * len(engines)) * len(rows)
    )
    figure.suptitle(_title(measurements), fontsize=TITLE, x=0.01, ha="left")
    grid = figure.subplots(len(rows), len(batches), squeeze=False)
    for panels, (model, distribution) in zip(grid, rows, strict=True):
        for axes, batch in zip(panels, batches, strict=True):
            found = [
                m
                for m in measurements
                if m.case[:2] == (model, distribution) and m.case.batch == batch
            ]
            if not found:  # not measured at this batch size
                axes.set_axis_off()
                continue
            _draw(axes, found, engines, densities)
            dress(axes, f"{model}, {distribution}, batch {batch}")
            _label(axes, engines, named=axes is panels[0])
    for axes in grid[-1]:
        axes.set_xlabel("milliseconds of a call", fontsize=TEXT)
    others = any(m.precision != "float32" for m in measurements)
    _legend(figure, densities, other_precisions=others)
    return figure


def _each(values):
    return list(dict.fromkeys(values))


def _title(measurements):
    newest = max(measurements, key=lambda m: m.date)
    commits = ", ".join(_each(m.commit for m in measurements))
    return f"Engines on {newest.machine}; {newest.date[:10]}, commit {commits}"


def _draw(axes, measurements, engines, densities):
    axes.set_xscale("log")
    apart = 0.8 / max(1, len(densities))
    for m in measurements:
        look = densities.index(m.case.density)
        at = engines.index(m.engine) + apart * (look - (len(densities) - 1) / 2)
        colour = _SHADES[look % len(_SHADES)]
        axes.plot(
            [1e3 * m.median],
            [at],
            color=colour,
            marker=_MARKERS[look % len(_MARKERS)],
            mfc=colour if m.precision == "float32" else WHITE,
            ms=5,
            ls="",
        )
        axes.plot(
            [1e3 * x for x in m.quartiles], [at, at], color=colour, lw=1.6
        )


def _label(axes, engines, *, named):
    """Labels the rows and the time axis of a panel; shades our engines."""
    axes.set_ylim(len(engines) - 0.5, -0.5)
    labels = (
        [catalogue.ENGINES[name].label for name in engines] if named else []
    )
    axes.set_yticks(range(len(engines)), labels or [""] * len(engines))
    for name, label in zip(engines, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if name in catalogue.OURS else "normal")
    axes.axhspan(
        -0.5,
        sum(name in catalogue.OURS for name in engines) - 0.5,
        color=BLACK,
        alpha=0.06,
        lw=0,
    )
    low, high = axes.get_xlim()
    steps = range(1, 10) if high / low < 4 else (1, 2, 5)
    if high / low > 100:
        steps = (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    # From text, as 6 x 0.1 is not exactly 0.6.
    places = [float(f"{step}e{power}") for power in powers for step in steps]
    ticks_at(axes.xaxis, [place for place in places if low <= place <= high])


def _legend(figure, densities, *, other_precisions):
    handles = [
        Line2D(
            [],
            [],
            color=_SHADES[i % len(_SHADES)],
            marker=_MARKERS[i % len(_MARKERS)],
            ms=5,
            lw=1.6,
            label=f"density {exact(density)}",
        )
        for i, density in enumerate(densities)
    ]
    if other_precisions:
        handles.append(
            Line2D(
                [],
                [],
                color=BLACK,
                marker="o",
                mfc=WHITE,
                ms=5,
                ls="",
                label="in another precision",
            )
        )
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=len(handles),
        frameon=False,
        fontsize=TICKS,
    )
