"""The CSV files of benchmarks."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rigl_keras import _files

__all__ = ["write_rows"]


def write_rows(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike
) -> None:
    """Writes rows as CSV with a header, whole or not at all.

    Floats are rounded to six digits.

    Args:
        rows: At least one row. All have the names of the first.
        path: The file.
    """
    file = io.StringIO()
    table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow(
            {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in row.items()
            }
        )
    _files.write(path, file.getvalue())
