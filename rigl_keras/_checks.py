"""Checks of arguments that are numbers.

NumPy's numbers are accepted and returned as Python's. Bools, strings and NaN
are refused.
"""

import math
import numbers
from collections.abc import Sequence

import numpy as np

__all__ = ["INT64", "boolean", "choice", "fraction", "integer", "number"]

INT64 = 2**63 - 1  # the largest step


def integer(
    name: str,
    value,
    *,
    at_least: int = -INT64,
    at_most: int = INT64,
    rule: str = "",
) -> int:
    """Returns a whole number as an int.

    Args:
        name: What the argument is called.
        value: What was received.
        at_least: Smallest value.
        at_most: Largest value.
        rule: The rule that the error states. "": made from the bounds.

    Returns:
        The value.

    Raises:
        ValueError: It is not a whole number, or is out of bounds.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not at_least <= int(value) <= at_most:
        if not rule:
            rule = "must be an int" + _bounds(at_least, at_most)
        raise ValueError(f"{name} {rule}. {_received(name, value)}")
    return int(value)


def number(
    name: str,
    value,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    rule: str = "must be a finite number",
) -> float:
    """Returns a finite number as a float.

    Args:
        name: What the argument is called.
        value: What was received.
        at_least: Smallest value.
        above: What it must be greater than.
        at_most: Largest value.
        rule: The rule that the error states.

    Returns:
        The value.

    Raises:
        ValueError: It is not a number, not finite or out of bounds.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        converted = float(value) if real else math.nan
    except OverflowError:  # of a very large int
        converted = math.nan
    # NaN fails each comparison.
    finite = math.isfinite(converted) and converted > above
    if not (finite and at_least <= converted <= at_most):
        raise ValueError(f"{name} {rule}. {_received(name, value)}")
    return converted


def fraction(name: str, value, *, rule: str = "must be in [0, 1]") -> float:
    """Returns a number in [0, 1] as a float.

    Args, Raises: as in `number`.

    Returns:
        The value.
    """
    return number(name, value, at_least=0, at_most=1, rule=rule)


def boolean(name: str, value) -> bool:
    """Returns a bool.

    Args:
        name: What the argument is called.
        value: What was received. "False", a string, would count as true.

    Raises:
        ValueError: It is not a bool of Python or NumPy.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(
            f"{name} must be True or False. {_received(name, value)}"
        )
    return bool(value)


def choice(name: str, value, choices: Sequence) -> None:
    """Raises ValueError unless a value is one of some strings, or None.

    Args:
        name: What the argument is called.
        value: What was received.
        choices: The allowed values.
    """
    # `value in choices` fails for an array.
    if not (isinstance(value, str) or value is None) or value not in choices:
        raise ValueError(
            f"{name} must be one of {tuple(choices)}. {_received(name, value)}"
        )


def _received(name, value):
    return f"Received: {name.rpartition('.')[2]}={value!r}."


def _bounds(at_least, at_most):
    if at_least > -INT64 and at_most < INT64:
        return f" from {at_least} to {at_most}"
    if at_least > -INT64:
        return f" of at least {at_least}"
    return "" if at_most == INT64 else f" of at most {at_most}"
