"""Chooses the sections and figures of the report, from the runs."""

from collections.abc import Callable

from rigl_keras import _figure_style
from rigl_keras._text import first_line
from rigl_keras.experiments.protocol import published, rows
from rigl_keras.experiments.report import (
    panels,
    redistribution_figures,
    search_figures,
    summaries,
)
from rigl_keras.experiments.report.cells import Context
from rigl_keras.experiments.report.page import Picture

__all__ = ["HAS", "NAMES", "PICTURES", "RIGL", "TITLES", "picture_of"]

NAMES = (
    "methods",
    *published.TABLES,
    "figure1",
    "figure2",
    "figure3",
    "figure4",
    "tuning",
)
PICTURES = (
    "methods",
    "table3",
    "figure1",
    "figure2",
    "figure3",
    "figure4",
    "tuning",
)
TITLES = {
    "methods": "All methods",
    "table1": "Table 1: CIFAR-10, trained on all 50,000 images",
    "table2": "Table 2: CIFAR-10",
    "table3": "Table 3: CIFAR-100",
    "table4": "Table 4: tuned drop fraction and frequency of RigL",
    "table5": "Table 5: redistribution of layer-wise density",
    "figure1": "Figure 1: accuracy over density",
    "figure2": "Figure 2: learning rates",
    "figure3": "Figure 3: accuracy at equal training FLOPs",
    "figure4": "Figure 4: what redistribution does",
    "tuning": "The search for drop fraction and frequency",
}


# When a section is shown by default.


def _has_row(of_table):
    return _has_any({cell.gin for cell in published.cells(of_table)})


RIGL = {"uniform": "rigl_uniform_wrn", "ERK": "rigl_erk_wrn"}
_FIGURE_4 = (
    *RIGL.values(),
    "rigl_sg_uniform_wrn",
    "rigl_sm_uniform_wrn",
)


def _has_any(gins):
    def has(found):
        return any(
            run.row in gins and not run.changes for run in found.finished
        )

    return has


HAS = {
    "methods": lambda found: any(
        rows.row(run.row).network and not summaries.is_trial(run)
        for run in found.finished
    ),
    **{table: _has_row(table) for table in published.TABLES},
    # Table 2 and Figure 1 have only their reference settings.
    "table4": search_figures.has_trials,
    "figure1": lambda found: bool(panels.panels(found, "wrn")),
    "figure2": search_figures.has_learning_rates,
    "figure3": _has_any(RIGL.values()),
    "figure4": redistribution_figures.has_redistribution,
    "tuning": search_figures.has_trials,
}
# Figures.


_ALT = {
    "methods": "Dot plot: test accuracy of each method, every seed a hollow "
    "marker and the mean a bar, a panel for each density; the dense network "
    "is a dashed line.",
    "table3": "Lines: test accuracy over density for each method on "
    "CIFAR-100, by initialisation; the dense network is a horizontal line.",
    "figure1": "Lines: test accuracy over density for each method on "
    "CIFAR-10, by initialisation; the dense network is a horizontal line.",
    "figure2": "Lines: test accuracy over learning rate for each pair of drop "
    "fraction and frequency, a panel for each density and initialisation.",
    "figure3": "Lines: test accuracy of RigL over training FLOPs, with "
    "uniform and with ERK masks, densities beside the points; pairs of equal "
    "FLOPs are joined.",
    "figure4": "Left, lines: inference FLOPs over training steps, with and "
    "without redistribution. Right, bars: the density of each layer at the "
    "end.",
    "tuning": "Contours: validation accuracy over drop fraction and steps "
    "between updates, settings tried as points, the best as a star.",
}


def picture_of(
    context: Context, name: str, draw: Callable, *arguments, **options
) -> Picture | None:
    """Returns a figure, or None if it cannot be drawn, and records why."""
    try:
        png = _figure_style.as_png(draw(*arguments, **options))
    except Exception as error:  # the page must be made in any case
        context.undrawn[name] = first_line(error)[:200].rstrip(".")
        return None
    return Picture(name, png, _ALT[name] + " Numbers: report.csv.")
