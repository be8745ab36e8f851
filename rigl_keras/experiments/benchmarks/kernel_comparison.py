"""What the comparisons of sparse and dense kernels share.

    bin/benchmark kernels                     the layers of WRN-22-2
    bin/benchmark kernels --model=resnet50    those of ResNet-50
    bin/benchmark kernels --model=lstm        an LSTM; or vision_transformer,
                                              or dense, one layer
    bin/benchmark kernels --granularities=element,kernel,4x16,fan_in
                                              masks of several patterns
    bin/benchmark train                       a training step, by density
    bin/benchmark train --torch               and one of PyTorch
    bin/benchmark inference                   a call of the model, by batch
    bin/benchmark train --output=speed        writes speed/train.csv and .png

A dense side and its sparse ones take turns in one process, so other work on the
machine affects all of them; medians of their times are compared. `--densities`
and `--rounds` determine how long it takes.
"""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import tensorflow as tf

from rigl_keras import _checks, kernels
from rigl_keras._timing import warm_turns
from rigl_keras.distributions import DISTRIBUTIONS
from rigl_keras.experiments.benchmarks.inference_command import (
    check_densities,
    check_each_once,
)
from rigl_keras.experiments.benchmarks.networks import MODELS
from rigl_keras.experiments.benchmarks.speed_tables import (
    Measurement,
    lines_of,
    table_row,
)
from rigl_keras.experiments.progress_bar import ProgressBar
from rigl_keras.experiments.runs import provenance

__all__ = [
    "DENSE",
    "Keep",
    "TURN",
    "UPDATES",
    "check",
    "check_same_outputs",
    "machine",
    "measurements",
    "timed_in_turns",
]

FORWARD, BOTH = "forward", "forward + backward"
AUTO, MASKED = "product=auto", "product=dense"
UPDATE, AMORTISED = f"{AUTO}, a mask update", f"{AUTO}, 1 update in 100"
TORCH = "PyTorch, dense and masked"
CALLED, SERVED = "masked model", "served"
DENSE = "dense", None  # the side that whole networks are compared with
_TOLERANCE = 1e-4  # difference of outputs, in units of the largest
TURN = 0.02  # the least seconds of a turn
UPDATES = 0.01  # fraction of steps that are updates, at RigL's frequency of 100
Say = Callable[[str], None]
Keep = Callable[[Sequence[Measurement]], None]


def machine() -> str:
    """Returns a description such as "avx2 against Eigen, 2 cores"."""
    found = "no sparse kernels"
    if kernels.load() is not None:
        found = f"{kernels.instruction_set()} against {kernels.dense_library()}"
    cores = cast(int, os.cpu_count())
    return f"{found}, {cores} core{'s' if cores > 1 else ''}"


def timed_in_turns(
    sides: Mapping[Hashable, Callable[[], object]],
    rounds: int,
    doing: str,
    turn: float = 0.0,
) -> dict[Hashable, list[float]]:
    """Returns seconds, as `warm_turns` does, and shows the progress."""
    # Each has two calls before, and one turn that is not timed.
    total = None if turn else len(sides) * (2 + rounds)
    with ProgressBar(unit="calls", total=total, doing=doing) as bar:

        def counted(call):
            def run():
                call()
                bar.advance()

            return run

        return warm_turns(
            {key: counted(call) for key, call in sides.items()},
            rounds=rounds,
            turn=turn,
        )


def measurements(
    seconds: Mapping[Any, Sequence[float]],
    dense: Mapping[str, Hashable],
    densities: Sequence[float],
    say: Say,
    **about,
) -> list[Measurement]:
    """Returns a `Measurement` of each side and density, and reports them.

    Args:
        seconds: `{(side, density): seconds of each turn}`.
        dense: `{side: key of the dense side to compare with}`.
        densities: The densities of each side.
        say: Called with a line for each side.
        **about: Fields that all measurements share.
    """
    measured = [
        Measurement(
            side=side,
            density=density,
            dense_seconds=float(np.median(seconds[dense[side]])),
            dense_fastest=min(seconds[dense[side]]),
            seconds=float(np.median(seconds[side, density])),
            fastest=min(seconds[side, density]),
            machine=machine(),
            processor=provenance.processor(),
            date=provenance.now(),
            commit=provenance.commit(),
            **about,
        )
        for side in dense
        for density in densities
    ]
    for line in lines_of(measured):
        say(table_row(line))
    return measured


def check_same_outputs(got: tf.Tensor, wanted: tf.Tensor) -> None:
    """Raises ValueError unless two outputs are the same, up to rounding."""
    largest = float(tf.reduce_max(tf.abs(wanted)))
    difference = float(tf.reduce_max(tf.abs(got - wanted)))
    if not difference <= _TOLERANCE * largest:  # true for NaN, too
        raise ValueError(
            "A sparse side must compute what the dense one does, up to "
            f"{_TOLERANCE:.0e} of the largest output. Received outputs that "
            f"differ by {difference:.1e}, the largest being {largest:.1e}. "
            "This is a defect of the kernels."
        )


def check(
    model: str,
    densities: Sequence[float],
    rounds: int,
    names: Sequence[str] = ("uniform",),
    *,
    batch_sizes: Sequence[int],
    networks: Mapping[str, object] = MODELS,
) -> None:
    """Raises ValueError for arguments that cannot be measured."""
    _checks.choice("model", model, tuple(networks))
    check_each_once(
        {
            "densities": densities,
            "distributions": names,
            "batch_sizes": batch_sizes,
        }
    )
    check_densities(densities)
    for name in names:
        _checks.choice("distributions", name, DISTRIBUTIONS)
    for batch_size in batch_sizes:
        _checks.integer("batch_size", batch_size, at_least=1)
    _checks.integer("rounds", rounds, at_least=1)
