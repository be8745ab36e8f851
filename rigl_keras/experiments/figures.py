"""The figures of a report.

Colours are Okabe and Ito's, which colour-blind people can tell apart; markers,
line styles and hatches tell them apart without colour.
"""

import io
import itertools
import math
import statistics
import warnings

import numpy as np
from matplotlib import ticker, tri
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D

from rigl_keras.experiments import published, rows, summaries
from rigl_keras.experiments.records import Records
from rigl_keras.experiments.rows import exact
from rigl_keras.reading import printable

__all__ = [
    "across_densities",
    "as_png",
    "equal_flops",
    "has_learning_rates",
    "has_redistribution",
    "has_trials",
    "learning_rates",
    "methods",
    "panels",
    "redistribution",
    "tuning",
]

_TITLE, _TEXT, _TICKS = 10, 9, 8  # sizes of letters
_DPI = 130
_LONGEST, _LARGEST = 400, 5_000  # inches and square inches of a figure
_LETTERS = 60  # of a name
_BLACK, _GREY = "#000000", "#777777"
_ORANGE, _SKY, _GREEN = "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"

# Colour, marker and line of a method.
_LOOKS = {
    "RigL": (_VERMILION, "o", "-"),
    "SET": (_BLUE, "s", "--"),
    "SNFS": (_PURPLE, "^", "-."),
    "Static": (_GREEN, "D", ":"),
    "Pruning": (_ORANGE, "v", (0, (5, 1))),
    "Small-Dense": (_SKY, "P", (0, (3, 1, 1, 1))),
    "Lottery": (_GREY, "X", (0, (1, 1))),
}
_OTHER = (_GREY, "*", (0, (6, 2, 1, 2)))


def as_png(figure: Figure) -> bytes:
    """Returns a figure as the bytes of an image."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        # Names may have letters that its font lacks, which shows boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        # Nothing of the machine, so that the same numbers are the same bytes.
        figure.savefig(
            image, format="png", dpi=_DPI, metadata={"Software": None}
        )
    return image.getvalue()


def _figure(width, height):
    if max(width, height) > _LONGEST or width * height > _LARGEST:
        raise ValueError(
            f"it would be {width:.0f} by {height:.0f} inches: too many panels"
        )
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def _text(name):
    """Returns a name that is not read as a formula, or as large as a figure."""
    name = printable(name)
    if len(name) > _LETTERS:
        name = f"{name[: _LETTERS - 3]}..."
    return name.replace("$", r"\$")


def _dress(axes, title=None, x=None, y=None):
    axes.set_title(title, fontsize=_TITLE, loc="left")
    axes.set_xlabel(x, fontsize=_TEXT)
    axes.set_ylabel(y, fontsize=_TEXT)
    axes.tick_params(labelsize=_TICKS)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _legend_below(axes, ncols=2, down=0.2):
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -down),
            ncols=ncols,
            frameon=False,
            fontsize=_TICKS,
            handlelength=3,
        )


def _legend_above(figure, ncols=None):
    """Says once what all axes show; None: in one line."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(
            *axes.get_legend_handles_labels(), strict=True
        ):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=ncols or len(handles),
        frameon=False,
        fontsize=_TEXT,
    )


def _ticks_at(axis, values):
    """Puts ticks of a logarithmic axis at values, written out."""
    axis.set_major_locator(ticker.FixedLocator(values))
    axis.set_major_formatter(
        ticker.FixedFormatter([exact(value) for value in values])
    )
    axis.set_minor_locator(ticker.NullLocator())


def _finished(records, network):
    """The rows of a network that have a result, each with its changes."""
    found = {
        (run.row, run.changes): None
        for run in records.finished
        if not summaries.is_trial(run) and rows.row(run.row).network == network
    }
    return list(found)


# Accuracy by method.


def methods(records: Records) -> Figure:
    """Draws the test accuracy of each row, all seeds, a panel per density.

    Args:
        records: All runs, at least one of them finished and of no search.
    """
    blocks = []
    for network in rows.NETWORKS:
        every = _finished(records, network)
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
        elif every:  # dense ones alone
            blocks.append((network, every, every, [None]))
    columns = max(len(at) for *_, at in blocks)
    heights = [0.9 + 0.27 * len(shown) for _, _, shown, _ in blocks]
    figure = _figure(2.2 + 3.2 * columns, 0.6 + sum(heights))
    grid = figure.subplots(
        len(blocks), columns, squeeze=False, height_ratios=heights
    )
    for line, (network, every, shown, at) in zip(grid, blocks, strict=True):
        for axes in line[len(at) :]:
            axes.set_visible(False)
        for axes, density in zip(line, at, strict=False):
            _draw_methods(axes, records, every, shown, density)
            where = "" if density is None else f"density {exact(density)}"
            title = rows.NETWORKS[network].split()[-1] + ", " + where
            _dress(axes, title.strip(", "), "test accuracy (%)")
            axes.grid(axis="y", visible=False)
            if axes is not line[0]:
                axes.set_yticklabels([])
    _legend_above(figure, ncols=None if columns > 1 else 3)
    return figure


def _by_accuracy(keys, means):
    """Rows from the worst to the best, by how far they are from the others.

    Not by their mean alone: a row may have no run at one of the densities.
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
    "uniform masks": (_BLUE, "o"),
    "ERK masks": (_VERMILION, "s"),
    "others": (_BLACK, "D"),
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
        if density is None or not row.dense or row.all_data or changes:
            continue
        axes.axvline(dense.mean, color=_BLACK, ls="--", lw=1, label="Dense")
        axes.axvspan(
            min(dense.accuracies),
            max(dense.accuracies),
            color=_BLACK,
            alpha=0.12,
            lw=0,
        )
    axes.set_ylim(-0.5, len(shown) - 0.5)
    labels = [_text(summaries.label(*key)) for key in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))


Keys = list[tuple[str, tuple]]
_UNIFORM = (
    "small_dense",
    "static_uniform",
    "set_uniform",
    "snfs_uniform",
    "rigl_uniform",
    "pruning",
)
_ERK = ("static_erk", "set_erk", "snfs_erk", "rigl_erk", "pruning")
_LONGER = (
    "static_uniform_2x",
    "set_uniform_2x",
    "snfs_uniform_2x",
    "rigl_uniform_2x",
    "rigl_uniform_3x",
    "rigl_erk_2x",
)


def panels(records: Records, network: str) -> dict[str, Keys]:
    """Returns the panels of `across_densities`: titles, rows and changes.

    Args:
        records: All runs.
        network: One of `rows.NETWORKS`.
    """
    finished = _finished(records, network)

    def those(names, changes=()):
        keys = [(f"{name}_{network}", changes) for name in names]
        return [key for key in keys if key in finished]

    found = {"uniform masks": those(_UNIFORM), "ERK masks": those(_ERK)}
    if those(_LONGER):
        found["longer runs"] = those((*_LONGER, "pruning", "lottery"))
    # Runs that were told to be longer than their row.
    every = (*_UNIFORM, *_ERK[:-1])
    lengths = {changes for _, changes in finished if len(changes) == 1}
    for ((name, value),) in sorted(lengths):
        if name == "train.length":
            of_length = those(every, ((name, value),))
            found[f"{exact(value)} times as long"] = of_length
    # Pruning is for comparison.
    return {
        title: keys
        for title, keys in found.items()
        if {gin for gin, _ in keys} - {f"pruning_{network}"}
    }


def across_densities(records: Records, network: str) -> Figure:
    """Draws test accuracy over density, a panel per initialisation.

    Args:
        records: All runs, at least one of them in `panels`.
        network: One of `rows.NETWORKS`.
    """
    shown = panels(records, network)
    figure = _figure(0.6 + 3.6 * len(shown), 4.6)
    every = figure.subplots(
        1, len(shown), sharex=True, sharey=True, squeeze=False
    )[0]
    all_rows = {gin for keys in shown.values() for gin, _ in keys}
    densities = summaries.densities(records, all_rows)
    for axes, (title, keys) in zip(every, shown.items(), strict=True):
        mixed = len({rows.row(gin).distribution for gin, _ in keys} - {""}) > 1
        for gin, changes in keys:
            _draw_row(axes, records, gin, changes, densities, mixed)
        of_length = keys[0][1] if "times" in title else ()
        dense = summaries.of(records, f"dense_{network}", None, of_length)
        if dense.n:
            axes.axhline(
                dense.mean,
                color=_BLACK,
                lw=1.2,
                label=_text(summaries.label(dense.row, of_length)),
            )
        axes.set_xscale("log")
        _dress(axes, title, "density (1 - sparsity)")
        _ticks_at(axes.xaxis, densities)
        axes.margins(x=0.08)
        _legend_below(axes)
    every[0].set_ylabel("test accuracy (%)", fontsize=_TEXT)
    return figure


def _draw_row(axes, records, gin, changes, densities, mixed):
    row = rows.row(gin)
    colour, marker, line = _LOOKS.get(row.method, _OTHER)
    if row.length == 3:
        line = (0, (1, 1))
    # In a panel of several distributions ERK is the hollow one.
    hollow = mixed and row.distribution == "ERK"
    found = [
        summaries.of(records, gin, density, changes) for density in densities
    ]
    found = [summary for summary in found if summary.n]
    label = _text(summaries.label(gin, changes))
    axes.plot(
        [summary.density for summary in found],
        [summary.mean for summary in found],
        ls=line,
        marker=marker,
        ms=6,
        color=colour,
        mfc="white" if hollow else colour,
        lw=1.6,
        label=label if mixed or changes else label.split(" (")[0],
    )
    for summary in found:
        axes.plot(
            [summary.density] * summary.n,
            summary.accuracies,
            lw=0,
            marker=marker,
            ms=3.5,
            mfc="none",
            mew=0.7,
            color=colour,
            alpha=0.8,
        )


# Learning rates (Figure 2).


_RIGL = {"uniform": "rigl_uniform_wrn", "ERK": "rigl_erk_wrn"}
_CYCLE = (
    (_VERMILION, "o", "-"),
    (_BLUE, "s", "--"),
    (_GREEN, "D", ":"),
    (_PURPLE, "^", "-."),
    (_ORANGE, "v", (0, (5, 1))),
    (_SKY, "P", (0, (3, 1, 1, 1))),
    (_GREY, "X", (0, (1, 1))),
)


def has_learning_rates(records: Records) -> bool:
    """Returns whether RigL was trained at several learning rates."""
    return bool(_rates(records))


def _rates(records):
    """Returns what was trained at several learning rates.

    `{(row, density): {(drop fraction, frequency): {rate: summary}}}`.
    """
    lines: dict[tuple, dict] = {}
    for run in records.finished:
        changed = {name for name, _ in run.changes}
        if run.row not in _RIGL.values() or not changed <= {
            "UPDATE_FRACTION",
            "UPDATE_FREQUENCY",
            "sgd.learning_rate",
        }:
            continue
        rate = dict(run.changes).get("sgd.learning_rate", run.learning_rate)
        summary = summaries.of(records, run.row, run.density, run.changes)
        updates = summaries.settings_of(records, summary)
        if rate is not None and None not in updates:
            line = lines.setdefault((run.row, run.density), {})
            line.setdefault(updates, {})[rate] = summary
    # One rate alone shows nothing of it.
    lines = {
        panel: {u: found for u, found in by.items() if len(found) > 1}
        for panel, by in lines.items()
    }
    return {panel: by for panel, by in lines.items() if by}


def learning_rates(records: Records) -> Figure:
    """Draws test accuracy over learning rate, a line per mask updates.

    Args:
        records: All runs, of which `has_learning_rates` is true.
    """
    lines = _rates(records)
    densities = sorted({density for _, density in lines})
    masks = [m for m, gin in _RIGL.items() if gin in {row for row, _ in lines}]
    updates = sorted({u for by in lines.values() for u in by})
    rates = sorted({r for by in lines.values() for f in by.values() for r in f})
    figure = _figure(1.0 + 3.1 * len(densities), 0.8 + 2.6 * len(masks))
    grid = figure.subplots(
        len(masks), len(densities), sharex=True, sharey=True, squeeze=False
    )
    handles = {}
    for mask, line in zip(masks, grid, strict=True):
        for density, axes in zip(densities, line, strict=True):
            by = lines.get((_RIGL[mask], density), {})
            for (fraction, frequency), at in sorted(by.items()):
                look = updates.index((fraction, frequency)) % len(_CYCLE)
                colour, marker, style = _CYCLE[look]
                found = [at[rate] for rate in sorted(at)]
                handle = axes.errorbar(
                    sorted(at),
                    [summary.mean for summary in found],
                    [summary.std or 0.0 for summary in found],
                    ls=style,
                    marker=marker,
                    color=colour,
                    ms=5,
                    lw=1.5,
                    capsize=3,
                )
                label = (
                    f"drop {exact(fraction)}, every {exact(frequency)} steps"
                )
                handles.setdefault(label, handle)
            axes.set_xscale("log")
            _dress(axes, f"{mask}, density {exact(density)}")
            _ticks_at(axes.xaxis, rates)
    for axes in grid[-1]:
        axes.set_xlabel("learning rate", fontsize=_TEXT)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy (%)", fontsize=_TEXT)
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=min(len(handles), 4 if len(densities) > 2 else 2),
        frameon=False,
        fontsize=_TEXT,
    )
    return figure


# Accuracy at equal cost (Figure 3).


def equal_flops(records: Records, *, with_published: bool) -> Figure:
    """Draws RigL's test accuracy over training FLOPs, uniform and ERK.

    Args:
        records: All runs, one of RigL at least finished.
        with_published: Whether the report's numbers are drawn, too.
    """
    figure = _figure(7.2, 4.8)
    axes = figure.subplots()
    points = {}
    for mask, gin in _RIGL.items():
        found = {
            run.density
            for run in records.finished
            if run.row == gin and not run.changes
        }
        points[mask] = [
            summaries.of(records, gin, density) for density in sorted(found)
        ]
        colour, marker, line = {
            "uniform": (_BLUE, "o", "--"),
            "ERK": (_VERMILION, "s", "-"),
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
                fontsize=_TICKS,
                color=colour,
            )
    label = "pair of equal training FLOPs (within 2 %)"
    for one, other in itertools.product(points["uniform"], points["ERK"]):
        x = one.training_flops_ratio
        if abs(other.training_flops_ratio / x - 1) < 0.02:
            axes.plot(
                [x, other.training_flops_ratio],
                [one.mean, other.mean],
                color=_GREY,
                ls=":",
                lw=1.5,
                label=label,
                zorder=0,
            )
            label = None
    if with_published:
        _draw_published(axes, points["uniform"])
    _dress(
        axes,
        None,
        "training FLOPs / training the dense network",
        "test accuracy (%)",
    )
    axes.margins(0.1)
    _legend_below(axes, ncols=2, down=0.15)
    return figure


def _draw_published(axes, uniform):
    at = {summary.density: summary.training_flops_ratio for summary in uniform}
    looks = {
        "rigl_uniform_wrn": (_BLUE, "o", "the report, Random"),
        "rigl_erk_wrn": (_VERMILION, "s", "the report, ERK at equal FLOPs"),
    }
    for gin, (colour, marker, label) in looks.items():
        cells = [
            cell
            for cell in published.cells("figure3")
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


# Redistribution (Figure 4).

_REDISTRIBUTED = {
    "rigl_uniform_wrn": ("RigL (uniform)", _BLUE, "--", ""),
    "rigl_erk_wrn": ("RigL (ERK)", _VERMILION, "-", "///"),
    "rigl_sg_uniform_wrn": ("RigL-SG (uniform)", _GREEN, "-.", "..."),
    "rigl_sm_uniform_wrn": ("RigL-SM (uniform)", _ORANGE, ":", "xxx"),
}


def has_redistribution(records: Records) -> bool:
    """Returns whether a row of `redistribution` is finished."""
    return bool(_redistributed(records))


def _redistributed(records):
    found = {
        (gin, density): summaries.of(records, gin, density)
        for gin in _REDISTRIBUTED
        for density in summaries.densities(records, _REDISTRIBUTED)
    }
    found = {key: summary for key, summary in found.items() if summary.n}
    # RigL alone has level lines: shown beside the others, where there are any.
    moved = {density for gin, density in found if gin not in _RIGL.values()}
    return {
        (gin, density): summary
        for (gin, density), summary in found.items()
        if density in moved or not moved
    }


def redistribution(records: Records) -> Figure:
    """Draws inference FLOPs over steps, and the densities of layers.

    Args:
        records: All runs, of which `has_redistribution` is true.
    """
    found = _redistributed(records)
    densities = sorted({density for _, density in found})
    layers = max(
        (s.finished[0].result["layers"] for s in found.values()), key=len
    )
    wide = 1.2 + 0.27 * len(layers)
    figure = _figure(4.2 + wide, 0.7 + 3.0 * len(densities))
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
                edgecolor=_BLACK,
                linewidth=0.4,
            )
            handles.setdefault(label, bars)
        _dress(
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
                fontsize=_TEXT,
            )
        left.xaxis.set_major_locator(ticker.MaxNLocator(4))
        _dress(right, None, None, "density at the end")
        right.grid(axis="x", visible=False)
        right.set_xticks(
            range(len(layers)),
            [_text(layer["name"]) for layer in layers],
            rotation=90,
        )
        right.margins(x=0.01)
    # Lines and bars share the colours: a handle that shows both.
    styles = {label: style for label, _, style, _ in _REDISTRIBUTED.values()}
    colours = {label: c for label, c, _, _ in _REDISTRIBUTED.values()}
    figure.legend(
        [
            (Line2D([], [], color=colours[label], ls=styles[label]), bars[0])
            for label, bars in handles.items()
        ],
        handles,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.4)},
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        fontsize=_TEXT,
        handlelength=5,
        handleheight=1.2,
    )
    return figure


def _layer_means(summary, names):
    """Returns the density of each layer, the mean over seeds."""
    by_layer = {}
    for run in summary.finished:
        for layer in run.result["layers"]:
            by_layer.setdefault(layer["name"], []).append(layer["density"])
    return [
        statistics.fmean(by_layer[name]) if name in by_layer else 0.0
        for name in names
    ]


# The search for drop fraction and frequency.


def has_trials(records: Records) -> bool:
    """Returns whether any setting of mask updates has been tried."""
    return bool(_searches(records))


def _searches(records):
    found = {}
    for mask, gin in _RIGL.items():
        for density in sorted(
            {run.density for run in records.runs if run.row == gin}
        ):
            tried = summaries.trials(records, gin, density)
            if any(trial.summary.n for trial in tried):
                found[mask, density] = tried
    return found


def tuning(records: Records) -> Figure:
    """Draws validation accuracy over drop fraction and frequency.

    Args:
        records: All runs, of which `has_trials` is true.
    """
    searches = _searches(records)
    masks = [m for m in _RIGL if m in {mask for mask, _ in searches}]
    densities = sorted({density for _, density in searches})
    figure = _figure(0.6 + 3.7 * len(densities), 0.6 + 2.9 * len(masks))
    grid = figure.subplots(len(masks), len(densities), squeeze=False)
    for mask, line in zip(masks, grid, strict=True):
        for density, axes in zip(densities, line, strict=True):
            tried = searches.get((mask, density))
            if tried is None:
                axes.set_visible(False)
                continue
            _draw_search(figure, axes, records, _RIGL[mask], density, tried)
            _dress(
                axes,
                f"{mask}, density {exact(density)}",
                "steps between mask updates",
                "drop fraction",
            )
    _legend_above(figure, ncols=2 if len(densities) == 1 else 4)
    return figure


def _draw_search(figure, axes, records, gin, density, tried):
    complete = [
        t
        for t in tried
        if t.summary.complete and t.summary.validation is not None
    ]
    stopped = [t for t in tried if t not in complete]
    shades = None
    if complete:
        x = np.array([trial.frequency for trial in complete], float)
        y = np.array([trial.drop_fraction for trial in complete], float)
        z = np.array([trial.summary.validation for trial in complete])
        scale = {"cmap": "viridis", "vmin": z.min(), "vmax": z.max() + 1e-9}
        triangles = _triangles(x, y)
        if triangles is not None and np.ptp(z) > 0:
            levels = np.linspace(z.min(), z.max(), 9)
            axes.tricontourf(triangles, z, levels, alpha=0.8, **scale)
        shades = axes.scatter(
            x,
            y,
            c=z,
            s=34,
            edgecolor=_BLACK,
            lw=0.8,
            label="setting tried, all seeds",
            zorder=3,
            **scale,
        )
    if stopped:
        axes.scatter(
            [trial.frequency for trial in stopped],
            [trial.drop_fraction for trial in stopped],
            marker="x",
            color=_BLACK,
            s=30,
            label="stopped early, or unfinished",
            zorder=3,
        )
    reference = summaries.of(records, gin, density)
    fraction, frequency = summaries.settings_of(records, reference)
    if None not in (fraction, frequency):
        axes.scatter(
            [frequency],
            [fraction],
            marker="s",
            s=60,
            fc="none",
            ec=_BLACK,
            lw=1.5,
            label="reference setting",
            zorder=4,
        )
    axes.use_sticky_edges = False  # of the contours, where points would be cut
    best = summaries.best(tried)
    if best is not None:
        axes.scatter(
            [best.frequency],
            [best.drop_fraction],
            marker="*",
            s=190,
            color=_VERMILION,
            edgecolor="white",
            lw=0.9,
            label="best",
            zorder=5,
        )
    axes.margins(0.1)
    if shades is not None:
        bar = figure.colorbar(shades, ax=axes)
        bar.set_label("validation accuracy (%)", fontsize=_TICKS)
        bar.ax.tick_params(labelsize=_TICKS)


def _triangles(x, y):
    """Returns a triangulation of points, or None of few or collinear ones."""
    if len(x) < 4 or not (np.ptp(x) and np.ptp(y)):
        return None
    # In units of their ranges, or triangles would be as thin as lines.
    u, v = (x - x.min()) / np.ptp(x), (y - y.min()) / np.ptp(y)
    centred = np.stack([u - u.mean(), v - v.mean()])
    if np.linalg.svd(centred, compute_uv=False)[1] < 1e-6:
        return None
    if len(set(zip(u, v, strict=True))) < len(u):
        return None
    try:
        found = tri.Triangulation(u, v)
    except (RuntimeError, ValueError):
        return None
    return tri.Triangulation(x, y, found.triangles)
