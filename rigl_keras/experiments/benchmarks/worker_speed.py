"""Measures what two workers send in a training step, and its time.

    bin/benchmark workers                     WRN-22-2 at density 0.1
    bin/benchmark workers --output=FOLDER     and writes FOLDER/wide_resnet.csv
    bin/benchmark workers --densities=0.05,0.1,0.2 --gigabits=1,10

The workers run on this machine, each on half of its cores and, if allowed, in
a separate network namespace, where bytes are counted and the bandwidth is
limited. Otherwise they use loopback, and the time at a bandwidth is modelled
as the measured time plus bytes over bandwidth.
"""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rigl_keras import _checks
from rigl_keras._text import aligned
from rigl_keras.distributions import DISTRIBUTIONS
from rigl_keras.experiments import exits
from rigl_keras.experiments.benchmarks import worker_hosts
from rigl_keras.experiments.benchmarks.csv_files import write_rows
from rigl_keras.experiments.benchmarks.inference_command import (
    check_densities,
)
from rigl_keras.experiments.benchmarks.kernel_comparison import machine
from rigl_keras.experiments.benchmarks.networks import MODELS
from rigl_keras.experiments.benchmarks.worker_process import (
    ACTIVE,
    ALL,
    DENSE,
    MEASURING,
    SIDES,
)

__all__ = ["Exchange", "measure_exchange", "run"]

_UPDATES = 0.01  # fraction of steps that are updates, with all gradients
_SAID = {
    DENSE: "Keras without masks",
    ALL: "masks, all gradients",
    ACTIVE: "masks, active gradients",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """A training step of two workers.

    Attributes:
        model: One of `networks.MODELS`.
        distribution: How density is spread over layers.
        density: Fraction of the masked weights kept.
        batch_size: Images in a step, over both workers together.
        gradients: The gradients that workers exchange: `"active"` or `"all"`
            ones of masked kernels, or those of a `"dense"` model.
        gigabits: Bandwidth in Gbit/s; 0 if it is not limited.
        bytes: Bytes that each worker sends in a step, median.
        seconds: Seconds of a step, median.
        fastest: Seconds of a step, minimum.
        how: `"measured"`, or `"modelled"` by bytes over bandwidth.
        rounds: Number of turns, each of two steps.
        machine: Instruction set and cores.
    """

    model: str
    distribution: str
    density: float
    batch_size: int
    gradients: str
    gigabits: float
    bytes: float
    seconds: float
    fastest: float
    how: str
    rounds: int
    machine: str


def measure_exchange(
    model: str = "wide_resnet",
    densities: Sequence[float] = (0.1,),
    *,
    distribution: str = "erdos_renyi_kernel",
    batch_size: int = 128,
    gigabits: Sequence[float] = (1.0,),
    rounds: int = 7,
    sides: Sequence[str] = SIDES,
    say: Callable[[str], None] = print,
) -> list[Exchange]:
    """Measures RigL's training steps, without updates, on two workers.

    All sides of a density take turns, in one pair of processes.

    Args:
        model: One of `networks.MODELS`.
        densities: Fractions of the masked weights kept.
        distribution: How density is spread over layers.
        batch_size: Images in a step, over both workers together.
        gigabits: Bandwidths to measure, in addition to the machine's.
        rounds: Turns of each side, each of two steps.
        sides: What workers exchange, as in `Exchange.gradients`.
        say: Called with each line of the tables.

    Returns:
        An `Exchange` of each density, bandwidth and side.

    Raises:
        ValueError: An argument is out of range.
        FailedError: A worker has failed.
    """
    _checks.choice("model", model, tuple(MODELS))
    check_densities(densities)
    _checks.choice("distribution", distribution, DISTRIBUTIONS)
    _checks.integer("batch_size", batch_size, at_least=2)
    _checks.integer("rounds", rounds, at_least=1)
    for side in sides:
        _checks.choice("sides", side, SIDES)
    for each in gigabits:
        _checks.number("gigabits", each, above=0, rule="must be positive")
    found = []
    for density in densities:
        given = {
            "model": model,
            "distribution": distribution,
            "density": density,
            "batch_size": batch_size,
            "rounds": rounds,
            "sides": list(sides),
        }
        with _hosts(say) as hosts:
            measured = _run_pair(hosts, given, gigabits, say)
        exchanges = _exchanges(measured, given, hosts[0], gigabits)
        for line in _table(exchanges):
            say(line)
        found += exchanges
    return found


@contextlib.contextmanager
def _hosts(say) -> Iterator[list[worker_hosts.Host]]:
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(worker_hosts.two_hosts())
        except OSError as error:
            say(f"The workers use loopback, because {error}.")
            hosts = worker_hosts.loopback_hosts()
        yield hosts


def _run_pair(hosts, given, gigabits, say):
    """Runs both workers; returns the measurements of the first."""
    ports = _free_ports() if not hosts[0].apart else [2222, 2222]
    workers = [
        f"{host.address}:{port}"
        for host, port in zip(hosts, ports, strict=True)
    ]
    # A limit would also affect other users of loopback.
    limited = list(gigabits) if hosts[0].apart else []
    with contextlib.ExitStack() as stack:
        pair = []
        for index, host in enumerate(hosts):
            config = {
                "cluster": {"worker": workers},
                "task": {"type": "worker", "index": index},
            }
            options = {
                **given,
                "gigabits": [0, *limited],
                "interface": host.interface,
            }
            said, errors = (
                stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)
            )
            with _half_of_the_cores(index):
                process = _started(host, config, options, said, errors)
            stack.callback(process.wait)
            stack.callback(process.kill)
            pair.append((process, said, errors))
        return _last_line(pair, say)


def _started(host, config, options, said, errors):
    return subprocess.Popen(
        [
            *host.prefix,
            *(sys.executable, "-m", f"{__package__}.worker_process"),
            json.dumps(options),
        ],
        env={
            **os.environ,
            "TF_CONFIG": json.dumps(config),
            "TF_CPP_MIN_LOG_LEVEL": "2",
        },
        stdout=said,
        stderr=errors,
    )


def _last_line(pair, say):
    """Waits for two workers, and returns the last line of the first."""
    measuring = False
    while any(process.poll() is None for process, *_ in pair):
        time.sleep(0.1)
        if not measuring and MEASURING in _lines(pair[0][1]):
            measuring = True
            say(MEASURING)
        for process, _, errors in pair:
            if process.poll():  # the other would wait for it
                lines = ["it printed nothing", *_lines(errors)]
                # The line that names the error, if there is one.
                named = [line for line in lines if "Error: " in line]
                raise exits.FailedError(
                    f"A worker has failed: {(named or lines)[-1]}"
                )
    return json.loads(_lines(pair[0][1])[-1])


def _lines(file):
    file.seek(0)
    return file.read().decode(errors="replace").strip().splitlines()


@contextlib.contextmanager
def _half_of_the_cores(index):
    """Gives processes that are started in the context every other core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[index::2] or cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _free_ports():
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in (one, two)]


def _exchanges(measured, given, host, gigabits):
    """Returns an `Exchange` of each side and bandwidth."""
    about = {k: v for k, v in given.items() if k != "sides"}
    each = 1 if host.apart else 2  # loopback counts the bytes of both
    found = [
        Exchange(
            **about,
            gradients=turns["side"],
            gigabits=float(turns["gigabits"]),
            bytes=float(np.median(turns["bytes"])) / each,
            seconds=float(np.median(turns["seconds"])),
            fastest=min(turns["seconds"]),
            how="measured",
            machine=machine(),
        )
        for turns in measured
    ]
    if host.apart:
        return found
    return found + [
        dataclasses.replace(
            one,
            gigabits=limited,
            seconds=one.seconds + one.bytes * 8e-9 / limited,
            fastest=one.fastest + one.bytes * 8e-9 / limited,
            how="modelled",
        )
        for limited in gigabits
        for one in found
    ]


def _table(exchanges):
    """Yields a table of one density."""
    first = exchanges[0]
    yield (
        f"\n{first.model}, density {first.density:g}, {first.distribution}, "
        f"batch {first.batch_size} on two workers: {first.machine}"
    )
    rows = [["", "bandwidth", "MB sent", "", "step, ms", "fastest", "", ""]]
    for one in exchanges:
        whole = next(
            (
                other
                for other in exchanges
                if (other.gradients, other.gigabits) == (ALL, one.gigabits)
            ),
            one,
        )
        rows.append(
            [
                _SAID[one.gradients],
                f"{one.gigabits:g} Gbit/s" if one.gigabits else "as it is",
                f"{one.bytes / 1e6:.3f}",
                f"{one.bytes / whole.bytes:.3f}x",
                f"{1e3 * one.seconds:.0f}",
                f"{1e3 * one.fastest:.0f}",
                f"{one.seconds / whole.seconds:.3f}x",
                one.how,
            ]
        )
    yield from aligned(rows)
    sent = {one.gradients: one.bytes for one in exchanges if not one.gigabits}
    if ALL in sent and ACTIVE in sent:
        mean = (1 - _UPDATES) * sent[ACTIVE] + _UPDATES * sent[ALL]
        yield (
            "With an update every 100 steps, which exchanges all gradients: "
            f"{mean / sent[ALL]:.3f}x of the bytes"
        )


def _write(exchanges, path):
    write_rows([dataclasses.asdict(one) for one in exchanges], path)


def run(given: Mapping[str, Any], output: Any, argv: Sequence[str]) -> None:
    """Runs the command after its flags have been parsed.

    Args:
        given: The flags by name, as `benchmark_flags` defines them.
        output: The flag of the folder to write to.
        argv: The command line without flags.
    """
    exits.check_flags_alone(argv)
    values = {name: flag.value for name, flag in given.items()}
    for name in ("densities", "gigabits"):
        values[name] = exits.numbers(name, values[name], float)
    if output.value:
        Path(output.value).mkdir(parents=True, exist_ok=True)
    found = measure_exchange(**values)
    if output.value:
        path = Path(output.value, f"{values['model']}.csv")
        _write(found, path)
        print(f"Written: {path}")
