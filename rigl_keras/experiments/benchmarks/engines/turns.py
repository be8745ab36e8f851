"""Whether engines agree with a network, and what their calls take."""

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from rigl_keras.experiments.benchmarks.engines.processes import (
    EngineError,
    Process,
)
from rigl_keras.experiments.benchmarks.engines.records import Turn
from rigl_keras.exporting.comparison import difference

__all__ = ["Agreement", "agreement", "timed_turns"]

_LONGEST_CALL = 600.0  # seconds for a turn, whose calls may be slow
_WARM_UP = 0.25  # of the time of a turn


class Agreement:
    """How far the outputs of an engine are from those wanted.

    Args:
        got, wanted: Outputs.

    Attributes:
        difference: The largest one, in units of their spread.
        same_class: Fraction of examples whose largest output is the same one.
    """

    def __init__(self, got: np.ndarray, wanted: np.ndarray):
        self.difference = difference({"": got}, {"": wanted})
        self.same_class = 0.0
        if got.shape == wanted.shape:
            same = got.argmax(-1) == wanted.argmax(-1)
            self.same_class = float(same.mean())


def agreement(
    process: Process,
    inputs: Path,
    wanted: np.ndarray,
    *,
    tolerance: float | None,
) -> Agreement:
    """Returns how far an engine's outputs are from those wanted.

    Args:
        process: It has loaded a network.
        inputs: File of what it computes on, then and in its turns.
        wanted: What comes out of the network.
        tolerance: How much the outputs may differ, in units of their spread.
            None: as much as they do.

    Raises:
        EngineError: They differ by more, or cannot be computed.
    """
    outputs = inputs.with_name("outputs.npy")
    process.ask(
        "compute",
        limit=_LONGEST_CALL,
        inputs=str(inputs),
        outputs=str(outputs),
    )
    found = Agreement(np.load(outputs), wanted)
    outputs.unlink()
    if tolerance is not None and not found.difference <= tolerance:  # or NaN
        raise EngineError(
            "it disagrees with the Keras model: outputs differ by "
            f"{found.difference:.1e} of their spread, and at most "
            f"{tolerance:.0e} is rounding"
        )
    return found


def timed_turns(
    processes: Mapping[str, Process],
    *,
    rounds: int,
    at_least: int,
    seconds: float,
    turn: float,
    lost: Callable[[str, EngineError], None],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[Turn]]:
    """Returns the turns of engines, which take turns in random order.

    In each round every engine has one turn: calls that warm it up, and then
    those that are timed. Each round has a new order, as in
    `_timing.interleaved`. An engine that fails is out, with all its turns.

    Args:
        processes: `{name: process}`; each has loaded a network, and its
            inputs.
        rounds: How many turns each has, at most.
        at_least: How many it has however long they take.
        seconds: After which no round begins.
        turn: Seconds that a turn takes at least: one call, or more.
        lost: Called with a name and an error where an engine fails.
        advance: Called after each turn.

    Returns:
        `{name: turns}` of those that are left, all of the same length.
    """
    turns = {name: [] for name in processes}
    draw = random.Random(0)
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= at_least and time.monotonic() > end:
            break
        order = list(turns)
        draw.shuffle(order)
        for name in order:
            for process in processes.values():
                process.stop()  # whatever may have had it go on
            try:
                taken = processes[name].ask(
                    "run",
                    limit=_LONGEST_CALL,
                    seconds=turn,
                    warm_up=_WARM_UP * turn,
                )["seconds"]
            except EngineError as error:
                lost(name, error)
                del turns[name]
                continue
            turns[name].append(Turn(float(np.median(taken)), min(taken)))
            advance()
    return turns
