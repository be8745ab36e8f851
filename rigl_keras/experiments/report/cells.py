"""Cells of tables: numbers, with their uncertainty."""

import dataclasses
from collections.abc import Callable

from rigl_keras._text import exact
from rigl_keras.experiments.protocol import published
from rigl_keras.experiments.report import comparisons, summaries
from rigl_keras.experiments.report.records import Records
from rigl_keras.experiments.report.summaries import Summary

__all__ = [
    "Context",
    "Marks",
    "NONE",
    "accuracy_cell",
    "difference_to_published",
    "flops_cells",
    "interval_cell",
    "listed_seeds",
    "train_and_test_cell",
    "percent_cell",
    "ratio_cell",
    "scientific",
    "seeds_cell",
    "signed_cell",
    "updates_cell",
    "accuracy_and_seeds_cell",
]

NONE = "-"


@dataclasses.dataclass(frozen=True)
class Context:
    """The input of each section."""

    records: Records
    comparable: bool  # whether the runs have the report's own setting
    with_published: bool
    planned: Callable[[Summary], tuple[float, float]] | None
    asked: bool
    lines: list
    undrawn: dict  # {the name of a figure: why it cannot be drawn}
    folder: str | None = None  # of the results, seen from the page


# Functions that return the text of cells.


def percent_cell(mean: float | None, std: float | None) -> str:
    if mean is None:
        return NONE
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def accuracy_cell(summary: Summary) -> str:
    if summary.n:
        return percent_cell(summary.mean, summary.std)
    if summary.failed:
        return "failed"
    return "unfinished" if summary.others else NONE


def seeds_cell(summary: Summary) -> str:
    """Returns how many seeds are finished, wanted, failed and collapsed."""
    if not summary.n and not summary.others:
        return NONE
    text = f"{summary.n} of {summary.wanted}"
    if summary.failed:
        text += f", {summary.failed} failed"
    if summary.collapsed:
        text += f", {summary.collapsed} collapsed"
    return text


def signed_cell(difference: float | None) -> str:
    if difference is None:
        return NONE
    return f"{round(difference, 2) + 0.0:+.2f}"  # without -0.00


def interval_cell(difference: comparisons.Difference) -> str:
    """Returns the ends of an interval, or that there is none."""
    if difference.low is None or difference.high is None:
        return NONE
    return f"{signed_cell(difference.low)} to {signed_cell(difference.high)}"


def ratio_cell(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}x"


def flops_cells(context: Context, summary: Summary) -> tuple[str, str]:
    """Returns FLOPs to train and to test; planned ones in brackets."""
    if not summary.n and context.planned is not None:
        planned = context.planned(summary)
        train, test = (f"({ratio_cell(value)})" for value in planned)
        return train, test
    return (
        ratio_cell(summary.training_flops_ratio),
        ratio_cell(summary.inference_flops_ratio),
    )


class Marks:
    """Numbers the notes of a section."""

    def __init__(self):
        self.notes: list[str] = []

    def of(self, note: str) -> str:
        """Returns the mark of a note, or "" for an empty note."""
        if not note:
            return ""
        if note not in self.notes:
            self.notes.append(note)
        return f" [{self.notes.index(note) + 1}]"


def difference_to_published(
    context: Context, summary: Summary, cell: published.Cell | None
) -> float | None:
    """Returns our mean minus the published one, if they are comparable."""
    if not context.comparable or cell is None or summary.mean is None:
        return None
    return summary.mean - cell.accuracy


def scientific(value: float) -> str:
    return f"{value:.2e}".replace("e+0", "e")


def updates_cell(drop_fraction: float, frequency: float) -> str:
    return f"{exact(drop_fraction)}, {exact(frequency)}"


def listed_seeds(found: Records) -> str:
    """Returns the seeds that each row should have, as text."""
    *others, last = map(str, summaries.seeds(found))
    return f"{', '.join(others)} and {last}" if others else last


def train_and_test_cell(train: str, test: str) -> str:
    return NONE if train == test == NONE else f"{train}, {test}"


def accuracy_and_seeds_cell(summary: Summary) -> str:
    """Returns the accuracy, with the number of seeds if some are missing."""
    text = accuracy_cell(summary)
    if summary.n and summary.n < summary.wanted:
        text += f" ({summary.n} of {summary.wanted})"
    return text
