"""Chooses the sections and figures of the report, from the runs."""

from collections.abc import Callable

from rigl_keras import _figure_style
from rigl_keras._text import first_line
from rigl_keras.experiments.protocol import published, rows, variations
from rigl_keras.experiments.report import (
    curve_figures,
    panels,
    redistribution_figures,
    search_figures,
    summaries,
)
from rigl_keras.experiments.report.cells import Context
from rigl_keras.experiments.report.page import Picture

__all__ = [
    "HAS",
    "NAMES",
    "PICTURES",
    "RIGL",
    "RIGL_CIFAR100",
    "TITLES",
    "picture_of",
]

NAMES = (
    "methods",
    "differences",
    "costs",
    "curves",
    *published.TABLES,
    "figure1",
    "figure1c",
    "cifar100",
    "figure2",
    "figure3",
    "figure3b",
    "figure4",
    "flops",
    "tuning",
    "runs",
)
PICTURES = (
    "methods",
    "costs",
    "curves",
    "figure1",
    "figure1c",
    "cifar100",
    "figure2",
    "figure3",
    "figure3b",
    "figure4",
    "flops",
    "tuning",
)
TITLES = {
    "methods": "All methods",
    "differences": "Differences from RigL and from static masks",
    "costs": "Accuracy over training FLOPs",
    "curves": "Training curves",
    "table1": "Table 1: CIFAR-10, trained on all 50,000 images",
    "table2": "Table 2: CIFAR-10",
    "table3": "Table 3: CIFAR-100",
    "table4": "Table 4: tuned drop fraction and frequency of RigL",
    "table5": "Table 5: redistribution of layer-wise density",
    "table7": "Table 7 of the journal version: RigL on whole kernels",
    "figure1": "Figure 1: accuracy over density",
    "figure1c": "Figure 1(c): accuracy over density, trained longer",
    "cifar100": "CIFAR-100: accuracy over density (journal: Figure 2)",
    "figure2": "Figure 2: learning rates",
    "figure3": "Figure 3: accuracy at equal training FLOPs",
    "figure3b": "Figure 3 for CIFAR-100 (journal: Figure 4(b))",
    "figure4": "Figure 4: what redistribution does",
    "flops": "Training FLOPs over density",
    "tuning": "The search for drop fraction and frequency",
    "runs": "Every run",
}


# When a section is shown by default.


def _has_row(of_table):
    return _has_any({cell.gin for cell in published.cells(of_table)})


def _has_only(of_table):
    """Of rows that are in no table before it, whose rows it repeats."""
    earlier = {
        cell.gin
        for table in published.TABLES[: published.TABLES.index(of_table)]
        for cell in published.cells(table)
    }
    own = {cell.gin for cell in published.cells(of_table)}
    return _has_any(own - earlier)


RIGL = {"uniform": "rigl_uniform_wrn", "ERK": "rigl_erk_wrn"}
RIGL_CIFAR100 = {
    "uniform": "rigl_uniform_resnet50",
    "ERK": "rigl_erk_resnet50",
}


def _has_any(gins):
    def has(found):
        return any(
            run.row in gins and not run.changes for run in found.finished
        )

    return has


def _has_methods(found):
    return any(
        rows.row(run.row).network and not summaries.is_trial(run)
        for run in found.finished
    )


HAS = {
    "methods": _has_methods,
    "differences": lambda found: any(
        run.density is not None and run.gin.startswith(("rigl_", "static_"))
        for run in found.finished
    ),
    "costs": _has_methods,
    "curves": curve_figures.has_histories,
    **{table: _has_row(table) for table in published.TABLES},
    # Table 2 and Figure 1 have only their reference settings.
    "table4": search_figures.has_trials,
    "table5": _has_only("table5"),
    "table7": _has_only("table7"),
    "figure1": lambda found: bool(panels.panels(found, "wrn")),
    "figure1c": lambda found: bool(panels.longer(found, "wrn")),
    "cifar100": lambda found: bool(panels.of_cifar100(found, "resnet50")),
    "figure2": search_figures.has_learning_rates,
    "figure3": _has_any(RIGL.values()),
    "figure3b": _has_any(RIGL_CIFAR100.values()),
    "figure4": redistribution_figures.has_redistribution,
    # Of the report's two networks, which other presets do not train.
    "flops": lambda found: found.preset == variations.FULL,
    "tuning": search_figures.has_trials,
    "runs": lambda found: bool(found.finished),
}
# Figures.


_ALT = {
    "methods": "Dot plot: test accuracy of each method, every seed a hollow "
    "marker and the mean a bar, a panel for each density; the dense network "
    "is a dashed line.",
    "costs": "Markers: test accuracy over training FLOPs of every row at every "
    "density, with bars of one standard deviation.",
    "curves": "Lines: accuracy over epochs for each row, a panel for each "
    "density; bands reach from the lowest to the highest seed.",
    "cifar100": "Lines: test accuracy over density for each method on "
    "CIFAR-100, by initialisation; the dense network is a horizontal line.",
    "figure1c": "Lines: test accuracy over density on CIFAR-10 for rows that "
    "train twice as long, with RigL and pruning beside them.",
    "flops": "Lines: training FLOPs over density for uniform and for ERK "
    "masks, a panel for each of two networks.",
    "figure3b": "Lines: test accuracy of RigL on CIFAR-100 over training "
    "FLOPs, with uniform and with ERK masks, densities beside the points.",
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
