"""Reads files of unknown origin: a bad file is a ValueError.

Python's own readers fail in many ways: deep JSON ends in a RecursionError, a
pipe instead of a file is waited for without end, and an integer of 400 digits
passes as a number until somebody divides by it.
"""

import json
import math
import os
from pathlib import Path

__all__ = ["LARGEST", "is_number", "json_object", "object_in", "text"]

LARGEST = 64 * 2**20  # bytes of a file that is read whole
_DEEPEST = 50  # levels of JSON: its readers may recurse


def text(path: str | os.PathLike, *, largest: int = LARGEST) -> str:
    """Returns the text of a file; bytes that are not UTF-8 are replaced.

    Args:
        path: A file, or a link to one.
        largest: Largest number of bytes.

    Raises:
        OSError: It does not exist, or the system does not let it be read.
        ValueError: It is not a regular file, or is larger.
    """
    return _bytes(path, largest).decode(errors="replace")


def json_object(path: str | os.PathLike, *, largest: int = LARGEST) -> dict:
    """Returns the JSON object that a file holds.

    Args:
        path: A file, or a link to one.
        largest: Largest number of bytes.

    Raises:
        OSError: It does not exist, or the system does not let it be read.
        ValueError: It is not a regular file, larger, not UTF-8, not JSON, not
            an object, or nested more than 50 levels deep.
    """
    return object_in(_bytes(path, largest).decode())


def object_in(line: str) -> dict:
    """Returns the JSON object that a text holds.

    Args:
        line: The text.

    Raises:
        ValueError: It is not JSON, not an object, or nested more than 50 levels
            deep.
    """
    try:
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _within(outer)]
        if not level:
            return content
    raise ValueError("it is nested too deep")


def _within(outer):
    values = outer.values() if isinstance(outer, dict) else outer
    return [value for value in values if isinstance(value, dict | list)]


def _bytes(path, largest):
    path = Path(path)
    status = path.stat()
    # Reading a pipe would wait, and a device may never end.
    if not path.is_file():
        raise ValueError("it is not a regular file")
    if status.st_size > largest:
        raise ValueError(f"it has {status.st_size:,} bytes")
    with path.open("rb") as file:
        return file.read(largest)


def is_number(
    value: object, *, least: float = -1e30, most: float = 1e30
) -> bool:
    """Returns whether a value is a finite number within bounds.

    Args:
        value: Anything; True and False do not count as numbers.
        least: The smallest that it may be.
        most: The largest that it may be.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Comparing integers never overflows; converting to float may.
    return least <= value <= most and math.isfinite(value)
