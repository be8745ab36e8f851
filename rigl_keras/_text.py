"""Text for people: aligned tables, and the first line of an error."""

import textwrap
from collections.abc import Container, Iterable, Sequence

__all__ = [
    "aligned",
    "as_sentence",
    "brief",
    "exact",
    "first_line",
    "grouped",
    "printable",
    "roughly",
    "telling_line",
    "unused_name",
    "wrapped",
]

_MOST_NAMES = 3  # that are listed for one reason


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


def unused_name(name: str, taken: Container[str]) -> str:
    """Returns a name with as many primes as make it a new one.

    Args:
        name: The name.
        taken: Names that others have.
    """
    while name in taken:
        name += "'"
    return name


def as_sentence(error: Exception, *, most: int = 200) -> str:
    """Returns the first line of an error, with a full stop.

    Args:
        error: The error.
        most: Characters that are kept of it.
    """
    line = first_line(error)
    line = line if len(line) <= most else f"{line[:most]} ..."
    return line if line.endswith((".", "!", "?", "...")) else f"{line}."


def grouped(reasons: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns `(names, reason)` for each reason, of many names the first.

    Args:
        reasons: Pairs of a name and a reason.

    >>> grouped([("a", "odd"), ("b", "even"), ("c", "odd")])
    [('a, c', 'odd'), ('b', 'even')]
    """
    found: dict[str, list[str]] = {}
    for name, reason in reasons:
        found.setdefault(reason, []).append(name)
    return [
        (
            ", ".join(names)
            if len(names) <= _MOST_NAMES
            else f"{', '.join(names[:_MOST_NAMES])}, ... ({len(names)} layers)",
            reason,
        )
        for reason, names in found.items()
    ]


def telling_line(error: Exception) -> str:
    """Returns the line of a message of Keras that says what does not fit."""
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


def roughly(seconds: float) -> str:
    """Returns a time in about two digits.

    >>> roughly(40), roughly(700), roughly(11_520), roughly(90_000)
    ('40 s', '12 min', '3.2 h', '25 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if round(seconds / 60) <= 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 9.95 else f"{hours:,.0f} h"


def wrapped(words: str, *, indent: int = 0) -> list[str]:
    """Returns a text as lines of at most 80 columns.

    Args:
        words: The text.
        indent: Spaces before its first line; others have two more.
    """
    return textwrap.wrap(
        words,
        80,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_on_hyphens=False,
        break_long_words=False,
    )
