"""Checks that engines agree with a network, and times their calls."""

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

_LONGEST_CALL = 600.0  # seconds that a turn of slow calls may take
_WARM_UP = 0.25  # seconds of warm-up for a second of a turn


class Agreement:
    """How far the outputs of an engine are from the expected ones.

    Args:
        got: Outputs of the engine.
        wanted: Expected outputs.

    Attributes:
        difference: The largest difference, in units of the outputs' spread.
        same_class: Fraction of examples with the same largest output.
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
    """Returns how far an engine's outputs are from the expected ones.

    Args:
        process: A process that has loaded a network.
        inputs: File of the inputs, also for its turns later.
        wanted: The expected outputs.
        tolerance: The largest difference allowed, in units of the outputs'
            spread. None: any.

    Raises:
        EngineError: The outputs differ by more, or cannot be computed.
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
            f"{found.difference:.1e} of their spread, but rounding explains "
            f"at most {tolerance:.0e}"
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
    """Times engines in turns of random order.

    In each round every engine has one turn: calls that warm it up, then calls
    that are timed. Each round has a new order, as in `_timing.interleaved`.
    If an engine fails, it is left out, with all its turns.

    Args:
        processes: `{name: process}`. Each has loaded a network and inputs.
        rounds: Turns of each engine, at most.
        at_least: Turns of each engine, however long they take.
        seconds: Seconds after which no further round begins.
        turn: The least seconds of a turn, which has at least one call.
        lost: Called with a name and an error if an engine fails.
        advance: Called after each turn.

    Returns:
        `{name: turns}` of the remaining engines, all with the same number of
        turns.
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
                process.stop()  # in case it was continued from outside
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
