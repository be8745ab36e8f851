"""Fair comparisons of time on a machine that others use."""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

__all__ = ["Verdict", "interleaved", "rounds_within", "settled", "turns"]

Name = TypeVar("Name", bound=Hashable)
Sides = Mapping[Name, Callable[[], object]]
# Turns in each minimum, and how many minima must agree.
_TURNS, _MINIMA = 5, 3
# Relative variation of a minimum on an idle machine.
_QUIET = 0.1


@dataclasses.dataclass(frozen=True)
class Verdict(Generic[Name]):
    """The result of `settled`.

    Attributes:
        minima: `{name: seconds}` of a call of each side when nothing disturbs
            it.
        medians: `{name: seconds}` of its usual turn.
        spread: How far the minimum of a few turns lies above the least, on
            average, as a fraction of it; the largest of all sides.
        certain: Whether one side was the fastest by each of at least three
            minima, or as fast as the fastest up to the margin.
    """

    minima: Mapping[Name, float]
    medians: Mapping[Name, float]
    spread: float
    certain: bool

    @property
    def busy(self) -> bool:
        """Whether the spread shows that the machine was busy."""
        return self.spread > _QUIET


def settled(
    sides: Sides[Name],
    *,
    seconds: float,
    margin: float = 0.0,
    turn: float = 0.002,
    clock: Callable[[], float] = time.perf_counter,
) -> Verdict[Name]:
    """Times sides in turns until it is certain which of them is the fastest.

    Other work on a machine makes a turn longer, never shorter. So the minimum
    of many short turns is the time of a call. The minima of a few turns each,
    one after the other, tell how far it can be trusted.

    Args:
        sides: `{name: what to time}`; each is called twice before, untimed.
        seconds: Time after which it ends, certain or not. It takes at least
            three rounds.
        margin: Fraction by which minima may differ and still count as equal:
            such sides are not timed any longer.
        turn: As in `interleaved`.
        clock: Returns the time in seconds.

    Returns:
        The verdict.
    """
    calls = {
        name: max(1, math.ceil(turn / once))
        for name, once in _seconds_of_a_call(sides, clock).items()
    }
    taken = {name: [] for name in sides}
    draw, end = random.Random(0), clock() + seconds
    certain = False
    while not certain and (
        clock() < end or len(next(iter(taken.values()))) < _MINIMA
    ):
        _round(sides, calls, taken, draw, clock)
        if len(next(iter(taken.values()))) >= _TURNS * _MINIMA:
            certain = _is_certain([_minima(s) for s in taken.values()], margin)
    least = {name: min(s) for name, s in taken.items()}
    mean = {name: float(np.mean(_minima(s))) for name, s in taken.items()}
    return Verdict(
        minima=least,
        medians={name: float(np.median(s)) for name, s in taken.items()},
        spread=max(mean[name] / least[name] - 1 for name in sides),
        certain=certain,
    )


def _minima(turns: Sequence[float]) -> list[float]:
    """Returns the minimum of every few turns, in order.

    If there are too few turns for that, it returns all.
    """
    if len(turns) < _TURNS * _MINIMA:
        return list(turns)
    starts = range(0, len(turns) - _TURNS + 1, _TURNS)
    return [min(turns[at : at + _TURNS]) for at in starts]


def _is_certain(minima: Sequence[Sequence[float]], margin: float) -> bool:
    """Returns whether one side is the fastest, whichever minima are compared.

    A side that is as fast, up to the margin, may count as the fastest.
    """
    first = min(minima, key=min)
    others = [one for one in minima if one is not first]
    return all(
        max(first) < min(one)
        or max(*first, *one) <= (1 + margin) * min(*first, *one)
        for one in others
    )


def interleaved(
    sides: Sides[Name], *, rounds: int, turn: float = 0.0
) -> dict[Name, float]:
    """Returns the median seconds of a call of each side, timed in turns.

    Args:
        sides, rounds, turn: As in `warm_turns`.

    Returns:
        `{name: median seconds of a call}`.
    """
    seconds = warm_turns(sides, rounds=rounds, turn=turn)
    return {name: float(np.median(s)) for name, s in seconds.items()}


def warm_turns(
    sides: Sides[Name], *, rounds: int, turn: float = 0.0
) -> dict[Name, list[float]]:
    """Returns the seconds of a call of each side in each of its turns.

    In each round every side has one turn, so other work on the machine affects
    all sides alike. Each round has a new random order: a side may be slowed by
    the threads of the previous one, and that must not always be the same one.

    Args:
        sides: `{name: what to time}`; each is called twice before, untimed.
        rounds: How many turns each has, at least 1.
        turn: Shortest turn in seconds: a shorter call is repeated.

    Returns:
        `{name: seconds of a call in each turn}`.
    """
    calls = {
        name: max(1, math.ceil(turn / once))
        for name, once in _seconds_of_a_call(sides, time.perf_counter).items()
    }
    return turns(sides, rounds=rounds, calls=calls)


def turns(
    sides: Sides[Name],
    *,
    rounds: int,
    calls: Mapping[Name, int] | None = None,
) -> dict[Name, list[float]]:
    """Returns the seconds of each turn, in the order of `warm_turns`.

    There is no call beforehand: trace or compile the sides first.

    Args:
        sides: `{name: what to time}`.
        rounds: How many turns each has, at least 1.
        calls: Calls in a turn. None: one.

    Returns:
        `{name: seconds of a call in each turn}`.
    """
    calls = calls or dict.fromkeys(sides, 1)
    seconds = {name: [] for name in sides}
    draw = random.Random(0)
    for _ in range(rounds):
        _round(sides, calls, seconds, draw, time.perf_counter)
    return seconds


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
        seconds: Available time.
        sides, turn: As in `warm_turns`.
        at_least: Smallest result, however long the rounds take.
        at_most: Largest result.

    Returns:
        A number of rounds.
    """
    calls = _seconds_of_a_call(sides, time.perf_counter)
    once = sum(max(turn, s) for s in calls.values())
    return int(min(max(seconds / once, at_least), at_most))


def _round(sides, calls, seconds, draw, clock):
    """Gives each side a turn, in a random order, and records its time."""
    for name in draw.sample(list(sides), len(sides)):
        start = clock()
        for _ in range(calls[name]):
            sides[name]()
        seconds[name].append(max((clock() - start) / calls[name], 1e-9))


def _seconds_of_a_call(sides, clock):
    """Returns the time of the second call of each side."""
    seconds = {}
    for name, run in sides.items():
        run()
        start = clock()
        run()
        seconds[name] = max(clock() - start, 1e-9)
    return seconds
