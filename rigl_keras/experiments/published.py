"""The numbers that the report prints, as data.

Source of all: the tables of the ML Reproducibility Challenge 2020 report
"[Re] Rigging the Lottery: Making All Tickets Winners". Tables 1 to 5 are those
of sections 4.2, 5.1, 5.2, 5.3 and 6.2. A cell that the report leaves ambiguous
has a note that says so.
"""

import csv
import dataclasses
import functools
from pathlib import Path

__all__ = ["TABLES", "Cell", "cells"]

TABLES = ("table1", "table2", "table3", "table4", "table5")
_FILE = Path(__file__).with_name("published.csv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What one row of a table says at one density.

    Args:
        table: One of `TABLES`.
        group: The group of rows it is in, `""` where there are none.
        row: The row as the table names it.
        gin: The gin file that runs it, without folder and ending.
        density: Fraction of the weights kept. None: the dense baseline.
        accuracy: Test accuracy in percent, mean over the seeds.
        std: Its standard deviation in percent. None: not printed.
        train_flops: Over training the dense model once. None: not printed,
            or, of the dense baseline, printed as a number of FLOPs.
        test_flops: Over the dense model's.
        original: Test accuracy in percent that the paper has (Table 1).
        drop_fraction: RigL's (Table 4).
        frequency: RigL's, in steps (Table 4).
        optimal: Whether these two were tuned (Table 4).
        note: What is ambiguous about it, `""` where nothing is.
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
    note: str


def cells(table: str) -> tuple[Cell, ...]:
    """Returns what a table prints, in its order.

    Args:
        table: One of `TABLES`.

    Raises:
        ValueError: There is no such table.
    """
    if table not in TABLES:
        raise ValueError(
            f"table must be one of {', '.join(TABLES)}. Received: {table!r}."
        )
    return tuple(cell for cell in _all() if cell.table == table)


@functools.cache
def _all():
    with _FILE.open(newline="", encoding="utf-8") as file:
        return [_cell(line) for line in csv.DictReader(file)]


def _cell(line):
    numbers = {
        name: float(line[name]) if line[name] else None
        for name in (
            "density",
            "accuracy",
            "std",
            "train_flops",
            "test_flops",
            "original",
            "drop_fraction",
        )
    }
    return Cell(
        **{k: line[k] for k in ("table", "group", "row", "gin", "note")},
        **numbers,
        frequency=int(line["frequency"]) if line["frequency"] else None,
        optimal=line["optimal"] == "yes",
    )
