"""Figures of learning rates and of searches."""

import numpy as np
from matplotlib import tri
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
    TICKS,
    VERMILION,
    dress,
    legend_above,
    new_figure,
    ticks_at,
)
from rigl_keras._text import exact
from rigl_keras.experiments.report import summaries
from rigl_keras.experiments.report.records import Records

__all__ = [
    "RIGL",
    "has_learning_rates",
    "has_trials",
    "learning_rates",
    "tuning",
]

# Learning rates (Figure 2).


RIGL = {"uniform": "rigl_uniform_wrn", "ERK": "rigl_erk_wrn"}
_CYCLE = (
    (VERMILION, "o", "-"),
    (BLUE, "s", "--"),
    (GREEN, "D", ":"),
    (PURPLE, "^", "-."),
    (ORANGE, "v", (0, (5, 1))),
    (SKY, "P", (0, (3, 1, 1, 1))),
    (GREY, "X", (0, (1, 1))),
)


def has_learning_rates(records: Records) -> bool:
    """Returns whether RigL was trained at several learning rates."""
    return bool(_rates(records))


def _rates(records):
    """Returns the runs at several learning rates.

    `{(row, density): {(drop fraction, frequency): {rate: summary}}}`.
    """
    lines: dict[tuple, dict] = {}
    for run in records.finished:
        changed = {name for name, _ in run.changes}
        if run.row not in RIGL.values() or not changed <= {
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
    # A single rate shows nothing.
    lines = {
        panel: {u: found for u, found in by.items() if len(found) > 1}
        for panel, by in lines.items()
    }
    return {panel: by for panel, by in lines.items() if by}


def learning_rates(records: Records) -> Figure:
    """Draws test accuracy over learning rate, one line per update setting.

    Args:
        records: All runs. `has_learning_rates` must be true.
    """
    lines = _rates(records)
    densities = sorted({density for _, density in lines})
    masks = [m for m, gin in RIGL.items() if gin in {row for row, _ in lines}]
    updates = sorted({u for by in lines.values() for u in by})
    rates = sorted({r for by in lines.values() for f in by.values() for r in f})
    figure = new_figure(1.0 + 3.1 * len(densities), 0.8 + 2.6 * len(masks))
    grid = figure.subplots(
        len(masks), len(densities), sharex=True, sharey=True, squeeze=False
    )
    handles = {}
    for mask, line in zip(masks, grid, strict=True):
        for density, axes in zip(densities, line, strict=True):
            by = lines.get((RIGL[mask], density), {})
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
            dress(axes, f"{mask}, density {exact(density)}")
            ticks_at(axes.xaxis, rates)
    for axes in grid[-1]:
        axes.set_xlabel("learning rate", fontsize=TEXT)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy (%)", fontsize=TEXT)
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=min(len(handles), 4 if len(densities) > 2 else 2),
        frameon=False,
        fontsize=TEXT,
    )
    return figure


# The search for drop fraction and frequency.


def has_trials(records: Records) -> bool:
    """Returns whether any setting of mask updates was tried."""
    return bool(_searches(records))


def _searches(records):
    found = {}
    for mask, gin in RIGL.items():
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
        records: All runs. `has_trials` must be true.
    """
    searches = _searches(records)
    masks = [m for m in RIGL if m in {mask for mask, _ in searches}]
    densities = sorted({density for _, density in searches})
    figure = new_figure(0.6 + 3.7 * len(densities), 0.6 + 2.9 * len(masks))
    grid = figure.subplots(len(masks), len(densities), squeeze=False)
    for mask, line in zip(masks, grid, strict=True):
        for density, axes in zip(densities, line, strict=True):
            tried = searches.get((mask, density))
            if tried is None:
                axes.set_visible(False)
                continue
            _draw_search(figure, axes, records, RIGL[mask], density, tried)
            dress(
                axes,
                f"{mask}, density {exact(density)}",
                "steps between mask updates",
                "drop fraction",
            )
    legend_above(figure, ncols=2 if len(densities) == 1 else 4)
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
            edgecolor=BLACK,
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
            color=BLACK,
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
            ec=BLACK,
            lw=1.5,
            label="reference setting",
            zorder=4,
        )
    axes.use_sticky_edges = False  # contours have them, and would cut points
    best = summaries.best(tried)
    if best is not None:
        axes.scatter(
            [best.frequency],
            [best.drop_fraction],
            marker="*",
            s=190,
            color=VERMILION,
            edgecolor="white",
            lw=0.9,
            label="best",
            zorder=5,
        )
    axes.margins(0.1)
    if shades is not None:
        bar = figure.colorbar(shades, ax=axes)
        bar.set_label("validation accuracy (%)", fontsize=TICKS)
        bar.ax.tick_params(labelsize=TICKS)


def _triangles(x, y):
    """Returns a triangulation of points, or None if few or collinear."""
    if len(x) < 4 or not (np.ptp(x) and np.ptp(y)):
        return None
    # In units of their ranges, otherwise triangles would be too thin.
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
