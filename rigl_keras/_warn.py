"""Warnings that name the user's line."""

import inspect
import warnings

__all__ = ["deprecated", "warn"]

# Packages whose frames lie between a user's line and what warns.
_BETWEEN = ("rigl_keras", "keras", "tensorflow")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line that led here, outside this package and Keras.

    Python shows a warning once for each such line, and a `DeprecationWarning`
    only where that line is the user's.

    Args:
        message: What is odd, and which argument changes it.
        category: Class of the warning.
    """
    frame, depth = inspect.currentframe(), 1
    while frame is not None and (
        frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN
    ):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, category, stacklevel=depth)


def deprecated(message: str) -> None:
    """Warns of a use that a later version refuses.

    Args:
        message: What is deprecated, and what to write instead.
    """
    warn(message, DeprecationWarning)
