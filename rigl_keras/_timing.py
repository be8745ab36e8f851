"""Seconds that things take, compared fairly on a machine that others use."""

import math
import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np

__all__ = ["interleaved", "rounds_within"]

Name = TypeVar("Name", bound=Hashable)
Sides = Mapping[Name, Callable[[], object]]


def interleaved(
    sides: Sides[Name], *, rounds: int, turn: float = 0.0
) -> dict[Name, float]:
    """Returns the median seconds of a call of each side, which take turns.

    In each round every side has one turn, so that whatever else the machine
    does affects all of them alike. Each round has a new random order: a side
    may be slowed down by the one before it, whose threads still wait for
    work, and that must not always be the same one.

    Args:
        sides: `{name: what to time}`; each is called twice before, untimed.
        rounds: How many turns each has, at least 1.
        turn: Seconds that a turn takes at least: a call that is shorter is
            repeated in it.

    Returns:
        `{name: median seconds of a call}`.
    """
    calls = {
        name: max(1, math.ceil(turn / once))
        for name, once in _seconds_of_a_call(sides).items()
    }
    seconds = {name: [] for name in sides}
    order, draw = list(sides), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            start = time.perf_counter()
            for _ in range(calls[name]):
                sides[name]()
            taken = time.perf_counter() - start
            seconds[name].append(taken / calls[name])
    return {name: float(np.median(s)) for name, s in seconds.items()}


def rounds_within(
    seconds: float,
    sides: Sides,
    *,
    at_least: int,
    at_most: int,
    turn: float = 0.0,
) -> int:
    """Returns how many rounds of all sides fit into some seconds.

    Args:
        seconds: Time that there is.
        sides, turn: As in `interleaved`.
        at_least: Rounds that are worth it however long they take.
        at_most: Rounds that are enough.

    Returns:
        A number of rounds.
    """
    once = sum(max(turn, s) for s in _seconds_of_a_call(sides).values())
    return int(min(max(seconds / once, at_least), at_most))


def _seconds_of_a_call(sides):
    """Returns what the second call of each side takes."""
    seconds = {}
    for name, run in sides.items():
        run()
        start = time.perf_counter()
        run()
        seconds[name] = max(time.perf_counter() - start, 1e-9)
    return seconds
