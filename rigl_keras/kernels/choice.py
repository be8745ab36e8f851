"""Chooses between two products of a layer: the one that was faster here.

Both are timed once for each shape, batch and range of densities. The times are
kept in the cache of the op library, for other processes.
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import platform
import threading
import time
from pathlib import Path

import tensorflow as tf

from rigl_keras import _files, _timing
from rigl_keras.kernels import (
    lane_operations,
    library,
    matrix_operations,
    operations,
    problems,
    recurrent_operations,
)
from rigl_keras.kernels.operations import dense_library, instruction_set
from rigl_keras.kernels.problems import AnyProblem

__all__ = ["Choice", "choose", "forget", "too_large"]

# Upper ends of the ranges of density. A choice holds for a range. Above the
# last one, products are dense without timing.
_DENSITIES = (
    *(0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.6, 0.75),
)
# Below this number of products, both take no time.
_LEAST_WORK = 1 << 21
# Relative difference below which times count as equal: then the sparse product
# is used, which has fewer FLOPs.
_MARGIN = 0.05
_MOST_FLOATS = 1 << 26  # in random images for timing
_SECONDS = 0.4  # most time for taking turns
# Products that take longer are timed once.
_LONG = 1.0
_log = logging.getLogger("rigl_keras")
_lock = threading.Lock()
_known: dict[str, "Choice"] = {}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen product, and the reason.

    Attributes:
        sparse: Whether the sparse product is chosen.
        reason: A few words: `"3.1x at batch 128"`, `"density above 0.75"`.
        dense_seconds, sparse_seconds: Minimum times of the passes; NaN if not
            timed.
        batch: The batch size that was timed.
    """

    sparse: bool
    reason: str
    dense_seconds: float = math.nan
    sparse_seconds: float = math.nan
    batch: int | None = None

    @classmethod
    def timed(
        cls, dense: float, sparse: float, batch: int, *, busy: bool = False
    ) -> "Choice":
        """Returns the choice from the times of both.

        Args:
            dense, sparse: Seconds of the passes.
            batch: The batch size that was timed.
            busy: Whether the machine was busy meanwhile.
        """
        load = ", on a busy machine" if busy else ""
        return cls(
            sparse=sparse <= (1 + _MARGIN) * dense,
            reason=f"{dense / sparse:.1f}x at batch {batch}{load}",
            dense_seconds=dense,
            sparse_seconds=sparse,
            batch=batch,
        )


def choose(
    problem: AnyProblem,
    density: float,
    *,
    backward: bool = True,
    in_lanes: bool = False,
) -> Choice:
    """Returns the faster product, timed once on this machine.

    Dense and sparse products take turns on random images of the problem's
    shape, forwards and backwards, at the upper end of the range of densities.
    If both are equally fast, the sparse one is chosen.

    Args:
        problem: What the layer computes.
        density: Density of the kernel, in [0, 1].
        backward: Whether to time gradients too, or inference only.
        in_lanes: Whether images are in lanes (`lane_operations`), so that a
            dense product must convert them, and its outputs back. Not for
            matrices. If that takes too much memory, they are not in lanes.

    Returns:
        The choice.
    """
    densities = (*_DENSITIES, 1.0) if in_lanes else _DENSITIES
    at = bisect.bisect_left(densities, density)
    if at == len(densities):
        return Choice(False, f"density above {_DENSITIES[-1]}")
    if problem.products < _LEAST_WORK:
        return Choice(in_lanes, "too small to matter")
    if library.load() is None:
        return Choice(False, library.unavailable() or "no op library")
    if in_lanes and too_large(problem, backward=backward, in_lanes=True):
        return choose(problem, density, backward=backward)
    why = None if in_lanes else too_large(problem, backward=backward)
    if why is not None:
        return Choice(False, why)
    batch = problem.batch
    # Sixteen images are computed side by side.
    limit = max(16, _MOST_FLOATS // max(1, problem.numbers))
    batch = max(1, min(batch, limit))
    problem = problem.of_batch(batch)
    # It is timed now, even while a graph is being traced.
    with _lock, tf.init_scope():
        key = _key(problem, densities[at], backward, in_lanes)
        if key not in _known:
            # If several processes ask at once, one times, and all agree.
            with _locked():
                _known.update(_read())
                if key not in _known:
                    _announce()
                    # In another thread nothing is being traced, and gradients
                    # are recorded; an `init_scope` would not record them.
                    with concurrent.futures.ThreadPoolExecutor(1) as thread:
                        dense, sparse, busy = thread.submit(
                            _seconds, problem, densities[at], backward, in_lanes
                        ).result()
                    _known[key] = Choice.timed(dense, sparse, batch, busy=busy)
                    if not busy:
                        _write({**_read(), key: _known[key]})
        return _known[key]


def forget() -> int:
    """Forgets the times on this machine that are kept for all processes.

    Running processes keep their choices.

    Returns:
        The number of choices.

    Raises:
        OSError: The cache cannot be written.
    """
    with _lock, _locked():
        _known.clear()
        kept = len(_read())
        _path().unlink(missing_ok=True)
        return kept


def too_large(
    problem: AnyProblem, *, backward: bool = True, in_lanes: bool = False
) -> str | None:
    """Returns why sparse kernels should not compute a problem, or None.

    They should not if they need more memory than their limit (`scratch_bytes`),
    as with large dilations, or if shapes do not fit, since TensorFlow's message
    is better.

    Args:
        problem: What the layer computes. The op library must be available.
        backward: Whether gradients are computed as well.
        in_lanes: Whether images are in lanes (`lane_operations`).
    """
    with tf.init_scope():
        if not tf.executing_eagerly():  # in a graph of TensorFlow 1
            return None
        taken = _taken(problem, in_lanes)
    if taken is None:
        return "its images do not fit its kernel"
    *passes, limit = taken
    most = passes[backward]
    if most <= limit:
        return None
    return (
        f"{math.ceil(most / 2**20)} MB of scratch memory a thread, above "
        f"{limit >> 20}"
    )


@functools.lru_cache(maxsize=1024)
def _taken(problem, in_lanes):
    return problem.taken(in_lanes)


@functools.cache  # once in each process
def _announce():
    """Logs once that timing takes a while."""
    _log.warning(
        "Timing dense and sparse products, once for each kind of layer on "
        "this machine ...",
        extra={"progress": True},
    )


def _key(problem, density, backward, in_lanes):
    """Returns everything that times depend on, except the machine's load.

    Machines of several kinds, and versions of this program, may share the cache
    in a home folder on a network. Each finds its own times.
    """
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    return " ".join(
        str(part)
        for part in (
            instruction_set(),
            dense_library(),
            _processor(),
            f"{_cores()} cores",
            f"{threads} threads",
            *problem.words,
            density,
            "both passes" if backward else "forward",
            *(["in lanes"] if in_lanes else []),
            f"timed by {_program()}",
        )
    )


@functools.cache
def _processor():
    """Returns the model of this machine's processor, without spaces."""
    wanted = ("model name", "CPU implementer", "CPU part")  # of x86, of ARM
    found = {}
    with contextlib.suppress(OSError):  # other systems than Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                found.setdefault(name.strip(), value)
    words = " ".join(found.values()).split()
    return "_".join(words or platform.processor().split()) or "processor"


def _cores():
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


@functools.cache
def _program():
    """Returns a digest of the code that takes and compares times."""
    digest = hashlib.sha256()
    for part in (
        __file__,
        _timing.__file__,
        lane_operations.__file__,
        operations.__file__,
        matrix_operations.__file__,
        problems.__file__,
        recurrent_operations.__file__,
    ):
        digest.update(Path(part).read_bytes())
    return digest.hexdigest()[:12]


def _seconds(problem, density, backward, in_lanes=False):
    """Returns the times of the passes, and whether the machine was busy."""
    sides = problem.sides(density, backward=backward, in_lanes=in_lanes)
    try:
        sides["dense"]()
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError):
        # On a CPU, TensorFlow lacks this product, or its gradient.
        return math.inf, 1.0, False
    sides["sparse"]()  # it is traced, as the other one was
    once = {}
    for name, run in sides.items():
        start = time.perf_counter()
        run()
        once[name] = time.perf_counter() - start
    if max(once.values()) > _LONG:  # dense dilated convolutions may be slow
        return once["dense"], once["sparse"], False
    found = _timing.settled(sides, seconds=_SECONDS, margin=_MARGIN)
    return found.minima["dense"], found.minima["sparse"], found.busy


# The cache: {key: [dense seconds, sparse seconds, batch]}. Without it, each
# process times again.


def _path():
    return library.cache_folder() / "choices.json"


@contextlib.contextmanager
def _locked():
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(_files.lock(_path().with_suffix(".lock")))
        yield


def _read():
    try:
        written = json.loads(_path().read_text())
        return {key: _kept(*given) for key, given in written.items()}
    # The file is missing or invalid: everything is timed again.
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ):
        return {}


def _kept(dense, sparse, batch):
    """Returns a choice from its entry in the cache."""
    # A missing dense product has infinite time.
    if not (dense > 0 and 0 < sparse < math.inf and batch > 0):
        raise ValueError("these are not times")
    return Choice.timed(float(dense), float(sparse), int(batch))


def _write(choices):
    """Writes choices to the cache, for other processes."""
    kept = {
        key: [c.dense_seconds, c.sparse_seconds, c.batch]
        for key, c in choices.items()
    }
    with contextlib.suppress(OSError):
        _files.write(_path(), json.dumps(kept, indent=0))
