"""Seconds that things take, compared fairly on a machine that others use."""

import time
from collections.abc import Callable

import numpy as np

__all__ = ["interleaved", "rounds_within"]


def interleaved(
    sides: dict[str, Callable[[], object]], *, rounds: int
) -> dict[str, float]:
    """Returns the median seconds of each side, run in turn.

    The sides alternate, so that whatever else the machine does falls on all
    of them alike.

    Args:
        sides: `{name: what to time}`; each is run once before, untimed.
        rounds: How often each is timed, at least 1.

    Returns:
        `{name: median seconds}`.
    """
    for run in sides.values():
        run()
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(s)) for name, s in seconds.items()}


def rounds_within(
    seconds: float,
    sides: dict[str, Callable[[], object]],
    *,
    at_least: int,
    at_most: int,
) -> int:
    """Returns how many rounds of all sides fit into some seconds.

    Args:
        seconds: Time that there is.
        sides: As in `interleaved`; each is run twice, once to warm up.
        at_least: Rounds that are worth it however long they take.
        at_most: Rounds that are enough.

    Returns:
        A number of rounds.
    """
    for run in sides.values():
        run()
    start = time.perf_counter()
    for run in sides.values():
        run()
    once = max(time.perf_counter() - start, 1e-9)
    return int(min(max(seconds / once, at_least), at_most))
