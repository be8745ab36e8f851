"""Figures of training: accuracy over epochs, and over what training costs."""

import csv
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from rigl_keras._figure_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    TEXT,
    VERMILION,
    dress,
    legend_above,
    legend_below,
    new_figure,
    ticks_at,
)
from rigl_keras._text import exact
from rigl_keras.experiments.protocol import rows
from rigl_keras.experiments.report import summaries
from rigl_keras.experiments.report.method_figures import (
    LOOKS,
    cost_ticks,
    finished_rows,
    safe_text,
)
from rigl_keras.experiments.report.records import Records

__all__ = [
    "FLOPS",
    "accuracy_over_flops",
    "flops_over_density",
    "has_histories",
    "training_curves",
]

_COLOURS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY, GREY)
_STYLES = ("-", "--", ":", "-.")
_MARKERS = "*<>pdhH8"  # of methods that have no look of their own
FLOPS = Path(rows.__file__).with_name("flops_by_density.csv")


def has_histories(records: Records) -> bool:
    """Returns whether the curve of any run is known."""
    return bool(_panels(records))


def _panels(records):
    """Returns what is drawn together: `{(network, density, changes): rows}`.

    The dense network is beside each density.
    """
    found: dict[tuple, list] = {}
    for network in rows.NETWORKS:
        keys = finished_rows(records, network)
        for density in summaries.densities(records, {gin for gin, _ in keys}):
            for changes in dict.fromkeys(c for _, c in keys):
                summary = [
                    summaries.of(
                        records,
                        gin,
                        None if rows.row(gin).dense else density,
                        changes,
                    )
                    for gin, own in keys
                    if own == changes and not rows.row(gin).all_data
                ]
                drawn = [
                    s for s in summary if any(r.history for r in s.finished)
                ]
                if any(s.density is not None for s in drawn):
                    found[network, density, changes] = drawn
    return found


def _looks(keys):
    """Returns the look of each `(row, changes)`.

    A method has one colour and one marker; of one colour no two lines are
    alike. Markers of ERK masks are hollow, those of runs that are longer than
    others half filled.
    """
    keys, looks = list(dict.fromkeys(keys)), {}
    lengths = {key: _length(*key) for key in keys}
    methods = dict.fromkeys(rows.row(gin).method for gin, _ in keys)
    unknown = [method for method in methods if method not in LOOKS]
    for gin, changes in keys:
        row = rows.row(gin)
        if row.method in LOOKS:
            colour, marker, _ = LOOKS[row.method]
        else:
            at = unknown.index(row.method)
            colour = _COLOURS[at % len(_COLOURS)]
            marker = _MARKERS[at % len(_MARKERS)]
        colour = BLACK if row.dense else colour
        alike = sum(look["color"] == colour for look in looks.values())
        longer = lengths[gin, changes] > min(lengths.values())
        looks[gin, changes] = {
            "color": colour,
            "ls": _STYLES[alike % len(_STYLES)],
            "marker": marker,
            "fillstyle": "left" if longer else "full",
            "mfc": "white"
            if row.distribution == "ERK" and not longer
            else colour,
        }
    return looks


def _length(gin, changes):
    return rows.row(gin).length * dict(changes).get("train.length", 1)


def training_curves(records: Records) -> Figure:
    """Draws accuracy over epochs, a panel for each density.

    Lines are means over seeds; bands reach from the lowest to the highest
    seed.

    Args:
        records: All runs, of which `has_histories` is true.
    """
    panels = _panels(records)
    columns = min(len(panels), 2)
    down = -(-len(panels) // columns)
    looks = _looks(
        (s.row, s.changes) for drawn in panels.values() for s in drawn
    )
    figure = new_figure(
        0.8 + 4.6 * columns, 0.9 + 3.4 * down + 0.12 * len(looks)
    )
    grid = figure.subplots(
        down,
        columns,
        squeeze=False,
        sharey=len({network for network, *_ in panels}) == 1,
    ).ravel()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, ((network, density, changes), drawn) in zip(
        grid, panels.items(), strict=False
    ):
        for summary in drawn:
            look = looks[summary.row, summary.changes]
            _draw_history(axes, summary, look)
        title = (
            f"{rows.NETWORKS[network].split()[-1]}, density {exact(density)}"
        )
        for name, value in changes:
            title += f", {name.split('.')[-1]} {exact(value)}"
        dress(axes, safe_text(title), "epoch", "accuracy (%)")
    legend_above(figure, ncols=min(4, len(looks)))
    return figure


def _draw_history(axes, summary, look):
    by_epoch: dict[int, list[float]] = {}
    for run in summary.finished:
        for epoch, accuracy in run.history:
            by_epoch.setdefault(epoch, []).append(accuracy)
    epochs = sorted(by_epoch)
    axes.plot(
        epochs,
        [statistics.fmean(by_epoch[epoch]) for epoch in epochs],
        ls=look["ls"],
        color=look["color"],
        lw=1.5,
        marker=look["marker"],
        mfc=look["mfc"],
        fillstyle=look["fillstyle"],
        ms=4,
        markevery=max(1, len(epochs) // 8),
        label=safe_text(summaries.label(summary.row)),
    )
    axes.fill_between(
        epochs,
        [min(by_epoch[epoch]) for epoch in epochs],
        [max(by_epoch[epoch]) for epoch in epochs],
        color=look["color"],
        alpha=0.12,
        lw=0,
    )


def accuracy_over_flops(records: Records) -> Figure:
    """Draws the test accuracy of all rows over their training FLOPs.

    A marker is the mean over seeds of a row at a density; its size grows with
    the density. Bars are sample standard deviations.

    Args:
        records: All runs, one of them finished and of no search.
    """
    networks = [n for n in rows.NETWORKS if finished_rows(records, n)]
    figure = new_figure(8.6, 0.3 + 5.6 * len(networks))
    grid = figure.subplots(len(networks), 1, squeeze=False).ravel()
    for axes, network in zip(grid, networks, strict=True):
        keys = finished_rows(records, network)
        every = [
            (gin, changes, density)
            for gin, changes in keys
            for density in sorted(
                {
                    run.density
                    for run in records.finished
                    if (run.row, run.changes) == (gin, changes)
                },
                key=lambda density: density or 0.0,
            )
        ]
        looks = _looks(keys)
        for gin, changes in keys:
            _draw_costs(
                axes,
                [
                    summaries.of(records, gin, density, changes)
                    for one, other, density in every
                    if (one, other) == (gin, changes)
                ],
                looks[gin, changes],
            )
        axes.set_xscale("log")
        axes.margins(0.07)
        dress(
            axes,
            rows.NETWORKS[network].split()[-1],
            "training FLOPs / training the dense network once",
            "test accuracy (%)",
        )
        ticks_at(axes.xaxis, cost_ticks(*axes.get_xlim()))
        legend_below(axes, ncols=3, down=0.13)
    return figure


def _draw_costs(axes, found, look):
    label = safe_text(summaries.label(found[0].row, found[0].changes))
    axes.errorbar(
        [summary.training_flops_ratio for summary in found],
        [summary.mean for summary in found],
        [summary.std or 0.0 for summary in found],
        **look,
        lw=0.8,
        elinewidth=1,
        capsize=2,
        ms=6,
        label=label,
    )
    for summary in found:
        if summary.density is not None:
            axes.annotate(
                exact(summary.density),
                (summary.training_flops_ratio, summary.mean),
                textcoords="offset points",
                xytext=(4, 3),
                fontsize=6,
                color=look["color"],
            )


def flops_over_density() -> Figure:
    """Draws what RigL costs to train over density, uniform and ERK masks."""
    with FLOPS.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    networks = [
        n for n in rows.NETWORKS if any(v["gin"].endswith(n) for v in lines)
    ]
    figure = new_figure(0.6 + 4.0 * len(networks), 3.8)
    grid = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, network in zip(grid, networks, strict=True):
        for masks, colour, style, marker in (
            ("uniform", BLUE, "--", "o"),
            ("erk", VERMILION, "-", "s"),
        ):
            gin = f"rigl_{masks}_{network}"
            own = [line for line in lines if line["gin"] == gin]
            axes.plot(
                [float(line["density"]) for line in own],
                [float(line["training_flops_ratio"]) for line in own],
                ls=style,
                marker=marker,
                ms=4,
                color=colour,
                label=rows.row(gin).label,
            )
        dress(axes, rows.NETWORKS[network], "density (1 - sparsity)")
    grid[0].set_ylabel(
        "training FLOPs / training\nthe dense network", fontsize=TEXT
    )
    legend_above(figure)
    return figure
