"""Warnings about deprecated uses."""

import inspect
import warnings

__all__ = ["warn"]


def warn(message: str) -> None:
    """Warns of a use that a later version refuses.

    The warning names the line outside this package that led here: Python
    shows a `DeprecationWarning` only where that line is the user's.

    Args:
        message: What is deprecated, and what to write instead.
    """
    package = __name__.partition(".")[0]
    frame, depth = inspect.currentframe(), 1
    while frame is not None and (
        frame.f_globals.get("__name__", "").partition(".")[0] == package
    ):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, DeprecationWarning, stacklevel=depth)
