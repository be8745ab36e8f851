"""Text for people: aligned tables, and the first line of an error."""

from collections.abc import Sequence

__all__ = ["aligned", "brief", "exact", "first_line", "last_line", "printable"]


def exact(value: float) -> str:
    """Returns a number as text, with as many digits as it needs.

    Args:
        value: The number.

    Returns:
        At most six digits if these are exact, otherwise all: numbers that
        differ never give the same text.

    >>> exact(0.1), exact(0.1234561), exact(0.1234562)
    ('0.1', '0.1234561', '0.1234562')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def brief(value: object, length: int = 80) -> str:
    """Returns a value as Python writes it, cut where it is long."""
    shown = repr(value)
    if len(shown) > length:
        shown = f"{shown[: length - 20]}... ({len(shown):,} characters)"
    return shown


def printable(words: str) -> str:
    """Returns text that any terminal, file and page can show.

    It escapes all but letters, digits, signs and spaces as Python does: control
    characters, and bytes of file names that are not UTF-8.

    >>> printable("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    if words.isprintable():
        return words
    return "".join(
        letter
        if letter.isprintable()
        else letter.encode("unicode_escape").decode()
        for letter in words
    )


def first_line(error: Exception) -> str:
    """Returns the first line of an error, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def last_line(error):
    """Returns Keras's message about the first layer that does not fit."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "shape" in line or "expected" in line]
    return (telling or lines or [type(error).__name__])[0]


def aligned(rows: Sequence[Sequence[str]], *, left: int = 2) -> list[str]:
    """Returns the rows of a table as lines, the first columns to the left.

    Args:
        rows: Cells, equally many in each row.
        left: How many columns are aligned to the left.

    Returns:
        A line for each row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
