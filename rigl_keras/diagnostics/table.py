"""The record of how masks moved, as a table.

`diagnostics.TopologyDiagnostics` writes the rows.
"""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ALL", "COLUMNS", "as_csv", "read_rows"]

ALL = "all"  # stands for all layers together
COLUMNS = (
    "step",
    "layer",
    "density",
    "inference_flops",
    "ever_active",
    "overlap",
    "churn",
    "grown",
    "no_incoming",
    "outputs",
    "no_outgoing",
    "inputs",
    "loss_before",
    "loss_after",
)
_COUNTS = ("step", "grown", "no_incoming", "outputs", "no_outgoing", "inputs")


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Returns the rows of a topology.csv.

    Args:
        path: The file. Incomplete rows of an interrupted run are skipped.

    Returns:
        Dicts with the keys `COLUMNS`; an empty cell is None.

    Raises:
        ValueError: The file has other columns.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    complete = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(complete))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(
            f"{str(path)!r} is not a table of TopologyDiagnostics: its columns "
            f"must be {','.join(COLUMNS)}. Received: {reader.fieldnames}."
        )
    rows = [{k: _cell(k, v) for k, v in row.items()} for row in reader]
    ends = [i for i, row in enumerate(rows, start=1) if row["layer"] == ALL]
    return rows[: ends[-1]] if ends else []


def as_csv(rows: Sequence[dict], *, header: bool = False) -> str:
    """Returns rows as lines of a topology.csv, None as an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _cell(column, text):
    if column == "layer":
        return text
    if not text:
        return None
    return int(text) if column in _COUNTS else float(text)
