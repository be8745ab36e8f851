"""The figures of a report.

The colours are Okabe and Ito's, which colour-blind people can tell apart.
Markers, line styles and hatches distinguish them without colour.
"""

import itertools
import statistics
from collections.abc import Mapping
from typing import cast

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from rigl_keras._figure_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    TICKS,
    VERMILION,
    dress,
    legend_above,
    legend_below,
    new_figure,
    ticks_at,
)
from rigl_keras._text import exact, printable
from rigl_keras.experiments.protocol import published, rows
from rigl_keras.experiments.protocol.variations import Changes
from rigl_keras.experiments.report import summaries
from rigl_keras.experiments.report.records import Records

__all__ = [
    "LOOKS",
    "OTHER",
    "cost_ticks",
    "equal_flops",
    "finished_rows",
    "methods",
    "safe_text",
]

_LETTERS = 60  # of a name
# Colour, marker and line of a method.
LOOKS = {
    "RigL": (VERMILION, "o", "-"),
    "SET": (BLUE, "s", "--"),
    "SNFS": (PURPLE, "^", "-."),
    "Static": (GREEN, "D", ":"),
    "Pruning": (ORANGE, "v", (0, (5, 1))),
    "Small-Dense": (SKY, "P", (0, (3, 1, 1, 1))),
    "Lottery": (GREY, "X", (0, (1, 1))),
}
OTHER = (GREY, "*", (0, (6, 2, 1, 2)))


def safe_text(name: str) -> str:
    """Returns a name that is not read as a formula and is not too long."""
    name = printable(name)
    if len(name) > _LETTERS:
        name = f"{name[: _LETTERS - 3]}..."
    return name.replace("$", r"\$")


def cost_ticks(low: float, high: float) -> list[float]:
    """Returns where a logarithmic axis of FLOPs ratios has its ticks.

    Args:
        low: The lower end of the axis, positive.
        high: The upper end of the axis.
    """
    steps = (1, 2, 5) if high < 200 * low else (1, 3)
    if high < 4 * low:
        steps = (1, 1.5, 2, 3, 4, 5, 7)
    found = [float(f"{s}e{power}") for power in range(-9, 7) for s in steps]
    return [tick for tick in found if low <= tick <= high]


def finished_rows(records: Records, network: str) -> list[tuple[str, Changes]]:
    """Returns the rows of a network with a result, and their changes."""
    found = {
        (run.gin, run.changes): None
        for run in records.finished
        if not summaries.is_trial(run) and rows.row(run.gin).network == network
    }
    return list(found)


# Accuracy by method.


def methods(records: Records) -> Figure:
    """Draws the test accuracy of each row, all seeds, a panel per density.

    Args:
        records: All runs. At least one is finished and not part of a search.
    """
    blocks = []
    for network in rows.NETWORKS:
        every = finished_rows(records, network)
        masked = [key for key in every if not rows.row(key[0]).dense]
        at = summaries.densities(records, {gin for gin, _ in masked})
        means = {
            density: {
                key: summaries.of(records, key[0], density, key[1]).mean
                for key in masked
            }
            for density in at
        }
        at = [d for d in at if any(m is not None for m in means[d].values())]
        if at:
            blocks.append((network, every, _by_accuracy(masked, means), at))
        elif every:  # dense ones only
            blocks.append((network, every, every, [None]))
    columns = max(len(at) for *_, at in blocks)
    heights = [0.9 + 0.27 * len(shown) for _, _, shown, _ in blocks]
    figure = new_figure(2.2 + 3.2 * columns, 0.6 + sum(heights))
    grid = figure.subplots(
        len(blocks),
        columns,
        squeeze=False,
        height_ratios=heights,
        sharex="row",
    )
    for line, (network, every, shown, at) in zip(grid, blocks, strict=True):
        for axes in line[len(at) :]:
            axes.set_visible(False)
        for axes, density in zip(line, at, strict=False):
            _draw_methods(axes, records, every, shown, density)
            where = "" if density is None else f"density {exact(density)}"
            title = rows.NETWORKS[network].split()[-1] + ", " + where
            dress(axes, title.strip(", "), "test accuracy (%)")
            axes.grid(axis="y", visible=False)
            if axes is not line[0]:
                axes.set_yticklabels([])
    legend_above(figure, ncols=3 if columns > 1 else 2)
    return figure


def _by_accuracy(keys, means):
    """Sorts rows from worst to best, by their distances from the others.

    The mean alone would not do: a row may have no run at some densities.
    """

    def place(key):
        distances = []
        for by_row in means.values():
            present = [mean for mean in by_row.values() if mean is not None]
            if by_row[key] is not None:
                distances.append(by_row[key] - statistics.fmean(present))
        return statistics.fmean(distances) if distances else -np.inf, key

    return sorted(keys, key=place)


_KINDS = {
    "uniform masks": (BLUE, "o"),
    "ERK masks": (VERMILION, "s"),
    "others": (BLACK, "D"),
}


def _draw_methods(axes, records, every, shown, density):
    for at, (gin, changes) in enumerate(shown):
        row = rows.row(gin)
        kind = {"uniform": "uniform masks", "ERK": "ERK masks"}.get(
            row.distribution, "others"
        )
        colour, marker = _KINDS[kind]
        summary = summaries.of(
            records, gin, None if row.dense else density, changes
        )
        if at % 2:
            axes.axhspan(at - 0.5, at + 0.5, color="#F4F4F4", zorder=0)
        if not summary.n:
            continue
        axes.plot(
            summary.accuracies,
            np.full(summary.n, at),
            marker,
            color=colour,
            mfc="none",
            ms=5,
            lw=0,
            label=f"a seed, {kind}",
        )
        axes.plot(
            [summary.mean],
            [at],
            "|",
            color=colour,
            ms=13,
            mew=2,
            label="mean" if kind == "others" else None,
        )
    for gin, changes in sorted(every):
        row = rows.row(gin)
        dense = summaries.of(records, gin, None, changes)
        alike = {other for _, other in shown} | {()}
        if density is None or not row.dense or changes not in alike:
            continue
        if row.all_data:
            continue
        label = safe_text(summaries.label(gin, changes))
        axes.axvline(
            dense.mean,
            color=BLACK,
            ls=":" if changes else "--",
            lw=1,
            label=f"{label}, mean",
        )
        axes.axvspan(
            min(dense.accuracies),
            max(dense.accuracies),
            color=BLACK,
            alpha=0.12,
            lw=0,
            label=f"{label}, lowest to highest seed",
        )
    axes.set_ylim(-0.5, len(shown) - 0.5)
    labels = [safe_text(summaries.label(*key)) for key in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))


# Accuracy at equal cost (Figure 3).


def equal_flops(
    records: Records,
    gins: Mapping[str, str],
    table: str,
    *,
    with_published: bool,
) -> Figure:
    """Draws RigL's test accuracy over training FLOPs, uniform and ERK.

    Args:
        records: All runs, with at least one finished run of RigL.
        gins: `{"uniform": row, "ERK": row}` of RigL.
        table: Where its published numbers are.
        with_published: Whether to draw the report's numbers too.
    """
    figure = new_figure(7.2, 4.8)
    axes = figure.subplots()
    points = {}
    for mask, gin in gins.items():
        found = {
            run.density
            for run in records.finished
            if run.row == gin and not run.changes
        }
        points[mask] = [
            summaries.of(records, gin, density)
            for density in sorted(cast(set[float], found))
        ]
        colour, marker, line = {
            "uniform": (BLUE, "o", "--"),
            "ERK": (VERMILION, "s", "-"),
        }[mask]
        axes.errorbar(
            [summary.training_flops_ratio for summary in points[mask]],
            [summary.mean for summary in points[mask]],
            [summary.std or 0.0 for summary in points[mask]],
            ls=line,
            marker=marker,
            color=colour,
            capsize=3,
            lw=1.5,
            ms=6,
            label=f"RigL ({mask})",
        )
        for summary in points[mask]:
            axes.annotate(
                exact(summary.density),
                (summary.training_flops_ratio, summary.mean),
                textcoords="offset points",
                xytext=(-4, 6) if mask == "uniform" else (5, -12),
                ha="right" if mask == "uniform" else "left",
                fontsize=TICKS,
                color=colour,
            )
    label = "pair of equal training FLOPs (within 2 %)"
    for one, other in itertools.product(points["uniform"], points["ERK"]):
        x = one.training_flops_ratio
        if abs(other.training_flops_ratio / x - 1) < 0.02:
            axes.plot(
                [x, other.training_flops_ratio],
                [one.mean, other.mean],
                color=GREY,
                ls=":",
                lw=1.5,
                label=label,
                zorder=0,
            )
            label = None
    if with_published:
        _draw_published(axes, points["uniform"], gins, table)
    dress(
        axes,
        None,
        "training FLOPs / training the dense network",
        "test accuracy (%)",
    )
    axes.margins(0.1)
    axes.set_xscale("log")
    ticks_at(axes.xaxis, cost_ticks(*axes.get_xlim()))
    legend_below(axes, ncols=2, down=0.15)
    return figure


def _draw_published(axes, uniform, gins, table):
    at = {summary.density: summary.training_flops_ratio for summary in uniform}
    looks = {
        gins["uniform"]: (BLUE, "o", "the report, Random"),
        gins["ERK"]: (VERMILION, "s", "the report, ERK at equal FLOPs"),
    }
    for gin, (colour, marker, label) in looks.items():
        cells = [
            cell
            for cell in published.cells(table)
            if cell.gin == gin and cell.density in at
        ]
        if cells:
            axes.errorbar(
                [at[cell.density] for cell in cells],
                [cell.accuracy for cell in cells],
                [cell.std for cell in cells],
                ls="",
                marker=marker,
                mfc="white",
                color=colour,
                capsize=5,
                ms=8,
                lw=0.8,
                label=label,
                zorder=0,
            )
