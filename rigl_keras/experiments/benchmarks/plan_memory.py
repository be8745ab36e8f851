"""Measures the memory of sparse kernels for images of many sizes.

    bin/benchmark plans                  a 3x3 convolution of 512 channels to
                                         512, at density 0.3: 700,000 weights;
                                         64 sizes of images
    bin/benchmark plans --sizes=256      more sizes

Sparse kernels process the weights of a layer in an order, their plan, which
depends on the size of the images. Plans are kept for the next images of the
same size, and shared by sizes that are cut into the same tiles.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from rigl_keras import _checks, kernels
from rigl_keras.experiments import exits

__all__ = ["Kept", "measure_plans", "run"]

Say = Callable[[str], None]
_CALLS = ("inference", "training step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """Memory and times after calls on images of some sizes.

    Attributes:
        call: `"inference"` or `"training step"`.
        sizes: Number of image sizes so far.
        weights: Active weights of the layer.
        plan_bytes: Bytes of the plans that are kept.
        process_bytes: Bytes by which the process has grown since the first
            size; 0 if this is not known.
        new_seconds: Mean time of a call on a new size.
        known_seconds: Time of a second call on the last size.
    """

    call: str
    sizes: int
    weights: int
    plan_bytes: int
    process_bytes: int
    new_seconds: float
    known_seconds: float


def measure_plans(
    *,
    sizes: int = 64,
    channels: int = 512,
    filters: int = 512,
    density: float = 0.3,
    say: Say = print,
) -> list[Kept]:
    """Measures the memory that one layer keeps for images of many sizes.

    The layer is a 3x3 convolution. Images have 4 rows, and 4 columns in the
    first call, 5 in the second, and so on.

    Args:
        sizes: Number of sizes, at least 2.
        channels: Channels of the images.
        filters: Filters of the layer.
        density: Fraction of the weights kept, in (0, 1].
        say: Called with each line of the table.

    Returns:
        The memory after 2, 4, 8, ... and after all sizes, first at inference
        and then in a training step.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: There are no sparse kernels.
    """
    _checks.integer("sizes", sizes, at_least=2)
    for name, value in (("channels", channels), ("filters", filters)):
        _checks.integer(name, value, at_least=1)
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1]. Received: {density!r}.")
    draw = np.random.default_rng(0)
    mask = draw.random((3, 3, channels, filters), np.float32) < density
    mask = mask.astype(np.float32)
    weights = int(mask.sum())
    say(
        f"3x3, {channels} channels to {filters}, {weights:,} weights "
        f"({mask.nbytes / 2**20:.1f} MB dense)"
    )
    say(
        f"{'':15}{'sizes':>6}{'plans, MB':>11}{'process, MB':>13}"
        f"{'new, ms':>10}{'known, ms':>11}"
    )
    calls = (_inference(mask), _training_step(mask))
    found = []
    for name, call in zip(_CALLS, calls, strict=True):
        found += _kept(name, call, sizes, channels, weights, say)
    return found


def _inference(mask):
    mask = tf.constant(mask)
    return lambda images: kernels.sparse_conv2d(images, mask, mask)


def _training_step(mask):
    mask = tf.constant(mask)

    def call(images):
        with tf.GradientTape() as tape:
            tape.watch([images, mask])
            outputs = kernels.sparse_conv2d(images, mask, mask)
        return outputs, tape.gradient(outputs, [images, mask])

    return call


def _kept(name, call, sizes, channels, weights, say):
    """Returns a `Kept` after 2, 4, 8 ... sizes, and after all."""
    operations: Any = kernels.load()  # its names exist only at run time

    def plan_bytes():
        return int(operations.rigl_keras_plan_bytes())

    def timed(columns):
        images = tf.ones((1, 4, columns, channels))
        start = time.perf_counter()
        run(images)
        return time.perf_counter() - start

    run = tf.function(
        call,
        input_signature=[tf.TensorSpec((None, None, None, channels))],
        autograph=False,
    )
    before = plan_bytes()
    timed(3)  # traces the function
    process = _process_bytes()
    found, new = [], 0.0
    for seen in range(1, sizes + 1):
        new += timed(3 + seen)
        if seen & (seen - 1) == 0 and seen > 1 or seen == sizes:
            kept = Kept(
                call=name,
                sizes=seen,
                weights=weights,
                plan_bytes=plan_bytes() - before,
                process_bytes=_process_bytes() - process,
                new_seconds=new / seen,
                known_seconds=timed(3 + seen),
            )
            say(
                f"{name:15}{seen:6}{kept.plan_bytes / 2**20:11.1f}"
                f"{kept.process_bytes / 2**20:13.1f}"
                f"{1e3 * kept.new_seconds:10.1f}"
                f"{1e3 * kept.known_seconds:11.1f}"
            )
            found.append(kept)
    return found


def _process_bytes():
    """Returns the memory of the process, or 0 if it is not known."""
    try:
        with open("/proc/self/status") as status:
            (line,) = (one for one in status if one.startswith("VmRSS:"))
    except (OSError, ValueError):
        return 0
    return 1024 * int(line.split()[1])


def run(given: Mapping[str, Any], output: Any, argv: Sequence[str]) -> None:
    """Runs the command after its flags have been parsed.

    Args:
        given: The flags by name, as `benchmark_flags` defines them.
        output: Not used: this part writes no files.
        argv: The command line without flags.
    """
    exits.check_flags_alone(argv)
    if kernels.load() is None:
        raise ValueError(
            f"There are no sparse kernels to measure: {kernels.unavailable()}."
        )
    measure_plans(**{name: flag.value for name, flag in given.items()})
