"""The numbers that the report prints, as data.

Source of all: the tables of the ML Reproducibility Challenge 2020 report "[Re]
Rigging the Lottery: Making All Tickets Winners". Tables 1 to 5 are those of
sections 4.2, 5.1, 5.2, 5.3 and 6.2; Table 7 is that of Appendix D of its
journal version (ReScience C, 2021). The bars of Figure 3, and of the half that
the journal version adds, are read from the code that draws them. A cell that
the report leaves ambiguous has a note, and so has a table (`notes`).
"""

import csv
import dataclasses
import functools
from pathlib import Path
from typing import Any

__all__ = ["Cell", "FIGURES", "TABLES", "cells", "notes"]

TABLES = ("table1", "table2", "table3", "table4", "table5", "table7")
FIGURES = ("figure3", "figure3b")  # those whose numbers are published, too
_FILE = Path(__file__).with_name("published.csv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """The numbers of one row of a table at one density.

    Args:
        table: One of `TABLES` or `FIGURES`.
        group: The group of the row, `""` if there are none. The names in Tables
            2 and 3 are this library's.
        row: The row as the table names it.
        gin: The gin file that runs it, without folder and ending.
        density: Fraction of the weights kept. None: the dense baseline.
        accuracy: Test accuracy in percent, mean over the seeds.
        std: Its standard deviation in percent. None: not printed.
        train_flops: Relative to training the dense model. None: not printed or,
            for the dense baseline, printed as a number of FLOPs.
        test_flops: Relative to the dense model's.
        original: Test accuracy in percent that the paper has (Table 1).
        drop_fraction: RigL's (Table 4).
        frequency: RigL's, in steps (Table 4).
        optimal: Whether these two were tuned (Table 4).
        dense_train_flops: Of one sample, of a dense baseline.
        dense_test_flops: Of one sample, of a dense baseline.
        note: What is ambiguous about it, or `""`.
        printed: The accuracy and its deviation, with digits as printed.
    """

    table: str
    group: str
    row: str
    gin: str
    density: float | None
    accuracy: float
    std: float | None
    train_flops: float | None
    test_flops: float | None
    original: float | None
    drop_fraction: float | None
    frequency: int | None
    optimal: bool
    dense_train_flops: float | None
    dense_test_flops: float | None
    note: str
    printed: str


# What is ambiguous about whole tables.
_NOTES = {
    "table1": (
        "The text of the report has lost the densities above the columns. "
        "0.1, 0.2 and 0.5 are those at which the RigL paper has the numbers "
        'under "Original".',
        'Section 4.2 refers to this table as "Table 4".',
        "No spread is printed, and not of how many seeds these are means.",
    ),
    "table2": (
        "The text of the report has lost the densities above the columns. 0.1 "
        "and 0.2 follow from the FLOPs of Static and SET.",
        "The text has lost the line between the two groups, and their names.",
    ),
    "table3": (
        "The text of the report has lost the densities above the columns. 0.1 "
        "and 0.2 follow from the FLOPs of Static and SET.",
        "The text has lost the lines between the groups, and their names; of "
        "them only the first two are referred to.",
    ),
    "table4": (
        'The text of the report has lost what "0.3, 100" counts: drop '
        "fraction and steps between updates, by section 5.3.",
    ),
    "table5": (
        "The text of the report has lost the densities above the columns. 0.1 "
        "and 0.2 follow from the FLOPs of RigL with Random masks.",
    ),
    "figure1": (
        "The numbers of its curves at densities 0.05 and 0.5 are not printed.",
        "SET with Random masks at density 0.05: seeds 1 and 2 had collapsed, "
        "and visualization/main_results.py of the report's repository puts "
        "90.10 and 90.00 in their place by hand.",
    ),
    "table7": (
        "The paper assumes that masks of whole kernels save wall time, and "
        "measures none.",
        "The report's code drops kernels of small |mean w|, in which weights "
        "of opposite signs cancel, and grows those of large |mean gradient|.",
        "Struct ERK stands beside Small-Dense of as many parameters, and costs "
        "1.5 to 2.1 times its FLOPs.",
    ),
    "figure3b": (
        "Figure 4(b) of the journal version. These are the numbers of "
        "visualization/erk_vs_random_FLOPs.py in the report's repository; the "
        "figure prints none.",
        "At density 0.5 ERK is 0.09 below Random, less than either spread: "
        "that Random is better at equal FLOPs is clear at 0.1 and 0.2 alone.",
    ),
    "figure3": (
        "These are the numbers of visualization/erk_vs_random_FLOPs.py in the "
        "report's repository; the figure prints none.",
        "That code passes the dense network's training FLOPs where its formula "
        "takes those of inference, so that the ticks of its x axis are too "
        "large: by 2 / 303 of the dense network's training FLOPs.",
        "At the FLOPs of Random at density 0.5 ERK is above it, 93.28 against "
        "93.27: the text says that Random is better at equal FLOPs, which "
        "these numbers have at 0.1 and 0.2 alone.",
    ),
}


def cells(table: str) -> tuple[Cell, ...]:
    """Returns the cells of a table, in its order.

    Args:
        table: One of `TABLES` or `FIGURES`.

    Raises:
        ValueError: There is no such table.
    """
    _check(table, TABLES + FIGURES)
    return tuple(cell for cell in _all() if cell.table == table)


def notes(table: str) -> tuple[str, ...]:
    """Returns what is ambiguous about a whole table.

    Args:
        table: One of `TABLES` or `FIGURES`, or `"figure1"`, of whose numbers
            none are published.

    Raises:
        ValueError: There is no such table.
    """
    _check(table, _NOTES)
    return _NOTES[table]


def _check(table, known):
    if table not in known:
        raise ValueError(
            f"table must be one of {', '.join(known)}. Received: {table!r}."
        )


@functools.cache
def _all():
    with _FILE.open(newline="", encoding="utf-8") as file:
        return [_cell(line) for line in csv.DictReader(file)]


def _cell(line):
    # Any: some fields are numbers, some may be None.
    numbers: dict[str, Any] = {
        name: float(line[name]) if line[name] else None
        for name in (
            "density",
            "accuracy",
            "std",
            "train_flops",
            "test_flops",
            "original",
            "drop_fraction",
            "dense_train_flops",
            "dense_test_flops",
        )
    }
    printed = line["accuracy"]
    if line["std"]:
        printed += f" ± {line['std']}"
    return Cell(
        **{k: line[k] for k in ("table", "group", "row", "gin", "note")},
        **numbers,
        frequency=int(line["frequency"]) if line["frequency"] else None,
        optimal=line["optimal"] == "yes",
        printed=printed,
    )
