"""Figures of accuracy across densities, a panel for each distribution."""

from matplotlib.figure import Figure

from rigl_keras._figure_style import (
    BLACK,
    TEXT,
    dress,
    legend_below,
    new_figure,
    ticks_at,
)
from rigl_keras._text import exact
from rigl_keras.experiments.protocol import rows
from rigl_keras.experiments.protocol.variations import Changes
from rigl_keras.experiments.report import summaries
from rigl_keras.experiments.report.method_figures import (
    LOOKS,
    OTHER,
    finished_rows,
    safe_text,
)
from rigl_keras.experiments.report.records import Records

__all__ = ["across_densities", "longer", "of_cifar100", "panels"]

Keys = list[tuple[str, Changes]]
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
    """Returns panels of `across_densities`, by masks: titles, rows, changes.

    Args:
        records: All runs.
        network: One of `rows.NETWORKS`.
    """
    finished = finished_rows(records, network)

    def those(names, changes: Changes = ()) -> Keys:
        return _those(finished, names, network, changes)

    found = {"uniform masks": those(_UNIFORM), "ERK masks": those(_ERK)}
    # Runs that are longer than their row.
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


def longer(records: Records, network: str) -> dict[str, Keys]:
    """Returns the panel of rows that train two or three times as long.

    With RigL (ERK) and pruning beside them, as in Figure 1(c).

    Args:
        records: All runs.
        network: One of `rows.NETWORKS`.
    """
    finished = finished_rows(records, network)
    if not _those(finished, _LONGER, network):
        return {}
    names = (*_LONGER, "rigl_erk", "pruning", "lottery")
    return {"longer runs": _those(finished, names, network)}


def of_cifar100(records: Records, network: str) -> dict[str, Keys]:
    """Returns the panels of the figure of CIFAR-100: by masks, and longer.

    Args:
        records: All runs.
        network: One of `rows.NETWORKS`.
    """
    return panels(records, network) | longer(records, network)


def _those(finished, names, network, changes=()):
    keys = [(f"{name}_{network}", changes) for name in names]
    return [key for key in keys if key in finished]


def across_densities(
    records: Records, network: str, shown: dict[str, Keys]
) -> Figure:
    """Draws test accuracy over density, a panel per initialisation.

    Args:
        records: All runs.
        network: One of `rows.NETWORKS`.
        shown: The panels, such as those of `panels`; one at least.
    """
    figure = new_figure(0.6 + 3.6 * len(shown), 4.6)
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
                color=BLACK,
                lw=1.2,
                label=safe_text(summaries.label(dense.row, of_length)),
            )
        axes.set_xscale("log")
        dress(axes, title, "density (1 - sparsity)")
        ticks_at(axes.xaxis, densities)
        axes.margins(x=0.08)
        legend_below(axes)
    every[0].set_ylabel("test accuracy (%)", fontsize=TEXT)
    return figure


def _draw_row(axes, records, gin, changes, densities, mixed):
    row = rows.row(gin)
    colour, marker, line = LOOKS.get(row.method, OTHER)
    if row.length == 3:
        line = (0, (1, 1))
    # In a panel with several distributions, ERK has hollow markers.
    hollow = mixed and row.distribution == "ERK"
    found = [
        summaries.of(records, gin, density, changes) for density in densities
    ]
    found = [summary for summary in found if summary.n]
    label = safe_text(summaries.label(gin, changes))
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
