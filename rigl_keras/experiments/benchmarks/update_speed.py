"""Compares mask updates of GSE, with few gradients, and RigL, with all.

    bin/benchmark updates                     GSE and RigL: WRN-22-2 at density
                                              0.1, a Dense of 8192 x 8192 at
                                              0.01; five minutes
    bin/benchmark updates --output=FOLDER     and writes FOLDER/updates.csv
    bin/benchmark updates --networks=dense --size=4096

Each method trains in a separate process. The two take turns, so that other
work on the machine affects both. Memory is measured in further processes, one
after the other, which return freed memory to the system at once (glibc's
M_MMAP_THRESHOLD). It is the peak of the resident memory, above that before the
step.
"""

import contextlib
import dataclasses
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rigl_keras import _checks
from rigl_keras._text import aligned
from rigl_keras.experiments import exits
from rigl_keras.experiments.benchmarks.csv_files import write_rows
from rigl_keras.experiments.benchmarks.inference_command import check_each_once
from rigl_keras.experiments.benchmarks.kernel_comparison import machine
from rigl_keras.experiments.benchmarks.update_process import (
    KINDS,
    METHODS,
    NETWORKS,
)
from rigl_keras.experiments.runs import provenance

__all__ = ["Update", "measure_updates", "run"]

_DENSITIES = {"wide_resnet": 0.1, "dense": 0.01}
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """A step of training with a method.

    Attributes:
        network: `"wide_resnet"`, or `"dense"` for one layer.
        size: Inputs and outputs of the dense layer; 0 for other networks.
        density: Fraction of the masked weights kept.
        batch_size: Examples in a step.
        method: `"GSE"` or `"RigL"`.
        kind: `"update"`, `"step after it"`, with new masks, or `"step"`.
        seconds: Median time over turns.
        fastest: Minimum time over turns, in seconds.
        peak_bytes: Peak memory of the whole step, above the memory before it,
            median; empty if it is not known.
        backward_bytes: The same for the forward and the backward pass only,
            with all gradients of kernels in memory at the end.
        rounds: Number of turns.
        machine: Instruction set, library of dense products, and cores.
        processor: Name of the processor.
        date: Time of the measurement, UTC.
        commit: Commit of this project.
    """

    network: str
    size: int
    density: float
    batch_size: int
    method: str
    kind: str
    seconds: float
    fastest: float
    peak_bytes: float | None
    backward_bytes: float | None
    rounds: int
    machine: str
    processor: str
    date: str
    commit: str


def measure_updates(
    networks: Sequence[str] = NETWORKS,
    *,
    size: int = 8192,
    batch_size: int = 128,
    rounds: int = 7,
    say: Callable[[str], None] = print,
    keep: Callable[[Sequence[Update]], None] | None = None,
) -> list[Update]:
    """Measures steps with and without an update, of two methods.

    Args:
        networks: Names from `NETWORKS`: a WRN-22-2 at density 0.1, a Dense at
            density 0.01.
        size: Inputs and outputs of the Dense.
        batch_size: Examples in a step.
        rounds: Turns of each method, each an update and two steps.
        say: Called with each line of the tables.
        keep: Called with all measurements so far, after each network.

    Returns:
        An `Update` of each network, method and kind of step.

    Raises:
        ValueError: An argument is out of range.
        FailedError: A process has failed.
    """
    check_each_once({"networks": networks})
    for name in networks:
        _checks.choice("networks", name, NETWORKS)
    _checks.integer("size", size, at_least=16)
    _checks.integer("batch_size", batch_size, at_least=1)
    _checks.integer("rounds", rounds, at_least=1)
    found: list[Update] = []
    for network in networks:
        given = {
            "network": network,
            "size": size if network == "dense" else 0,
            "density": _DENSITIES[network],
            "batch_size": batch_size,
        }
        measured = _measured(given, rounds)
        found += measured
        for line in _table(measured):
            say(line)
        if keep:
            keep(found)
    return found


def _measured(given, rounds):
    seconds: dict[str, list] = {method: [] for method in METHODS}
    with contextlib.ExitStack() as stack:
        ask = {
            method: stack.enter_context(_process({**given, "method": method}))
            for method in METHODS
        }
        draw = random.Random(0)
        for _ in range(rounds):
            for method in draw.sample(list(ask), len(ask)):
                seconds[method].append(ask[method]()["seconds"])
    taken = {}
    for method in METHODS:
        options = {**given, "method": method, "memory": True}
        with _process(options, **_RETURNED) as ask_one:
            taken[method] = [ask_one() for _ in range(min(3, rounds))]
    return [
        Update(
            **given,
            method=method,
            kind=kind,
            seconds=float(np.median([one[kind] for one in seconds[method]])),
            fastest=min(one[kind] for one in seconds[method]),
            peak_bytes=_median([one["peak"][kind] for one in taken[method]]),
            backward_bytes=_median(
                [one["backward"].get(kind) for one in taken[method]]
            ),
            rounds=rounds,
            machine=machine(),
            processor=provenance.processor(),
            date=provenance.now(),
            commit=provenance.commit(),
        )
        for method in METHODS
        for kind in KINDS
    ]


def _median(numbers):
    return None if None in numbers else float(np.median(numbers))


@contextlib.contextmanager
def _process(options, **environment) -> Iterator[Callable[[], dict[str, Any]]]:
    """Starts a side, and yields a function that asks it for a round."""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [
                *(sys.executable, "-m", f"{__package__}.update_process"),
                json.dumps({"memory": False, **options}),
            ],
            env={"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        pipes: Any = process  # Any: its pipes are not None

        def answer():
            line = pipes.stdout.readline()
            if line:
                return json.loads(line)
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            last = (said or "it printed nothing").splitlines()[-1]
            raise exits.FailedError(f"A process has failed: {last}")

        def ask():
            pipes.stdin.write("\n")
            pipes.stdin.flush()
            return answer()

        try:
            answer()  # the process is ready
            yield ask
        finally:
            process.kill()


def _table(measured):
    """Yields a table of one network."""
    first = measured[0]
    name = "WRN-22-2" if first.network == "wide_resnet" else "Dense"
    size = f" {first.size} x {first.size}" if first.size else ""
    yield (
        f"\n{name}{size}, density {first.density:g}, batch "
        f"{first.batch_size}: {first.processor}, {first.machine}"
    )
    rows = [["", "", "ms", "least", "of a step", "peak, MB", "backward, MB"]]
    step = {m.method: m.seconds for m in measured if m.kind == "step"}
    for m in measured:
        rows.append(
            [
                m.method,
                m.kind,
                f"{1e3 * m.seconds:.1f}",
                f"{1e3 * m.fastest:.1f}",
                f"{m.seconds / step[m.method]:.2f}x",
                _megabytes(m.peak_bytes),
                _megabytes(m.backward_bytes),
            ]
        )
    yield from aligned(rows)


def _megabytes(number):
    return "" if number is None else f"{number / 2**20:.0f}"


def _write(updates, path):
    write_rows([dataclasses.asdict(one) for one in updates], path)


def run(given: Mapping[str, Any], output: Any, argv: Sequence[str]) -> None:
    """Runs the command after its flags have been parsed.

    Args:
        given: The flags by name, as `benchmark_flags` defines them.
        output: The flag of the folder to write to.
        argv: The command line without flags.
    """
    exits.check_flags_alone(argv)
    values = {name: flag.value for name, flag in given.items()}
    keep = path = None
    if output.value:
        Path(output.value).mkdir(parents=True, exist_ok=True)
        path = Path(output.value, "updates.csv")
        keep = functools.partial(_write, path=path)
    measure_updates(**values, say=_say, keep=keep)
    if path:
        _say(f"Written: {path}")


def _say(line: str) -> None:
    print(line, flush=True)
