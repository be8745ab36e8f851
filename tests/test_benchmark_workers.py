"""Tests of `bin/benchmark workers`: bytes that workers send, and times."""

import csv
import functools
import types

import pytest

from rigl_keras.experiments import exits
from rigl_keras.experiments.benchmarks import worker_hosts, worker_speed

GIVEN = {
    "model": "wide_resnet",
    "distribution": "uniform",
    "density": 0.1,
    "batch_size": 8,
    "rounds": 3,
    "sides": ["all", "active"],
}


def turns(side, sent, seconds):
    return {"side": side, "gigabits": 0, "bytes": sent, "seconds": seconds}


def test_loopback_counts_both_and_a_bandwidth_is_modelled():
    measured = [
        turns("all", [8e6, 9e6, 8e6], [0.5, 0.25, 0.9]),
        turns("active", [1e6, 1e6, 1e6], [0.5, 0.5, 0.5]),
    ]
    (host, _) = worker_hosts.loopback_hosts()
    found = worker_speed._exchanges(measured, GIVEN, host, [0.032])
    assert [
        (x.gradients, x.gigabits, x.bytes, x.seconds, x.fastest, x.how)
        for x in found
    ] == [
        ("all", 0, 4e6, 0.5, 0.25, "measured"),
        ("active", 0, 0.5e6, 0.5, 0.5, "measured"),
        # 4 MB are 32 Mbit, for which 32 Mbit/s take a second.
        ("all", 0.032, 4e6, 1.5, 1.25, "modelled"),
        ("active", 0.032, 0.5e6, 0.625, 0.625, "modelled"),
    ]


def test_the_table_and_the_file(tmp_path):
    host = worker_hosts.Host("198.18.0.1", "worker", (), apart=True)
    measured = [
        turns("dense", [4e6], [1.0]),
        turns("all", [4e6], [0.5]),
        turns("active", [1e6], [0.25]),
    ]
    found = worker_speed._exchanges(measured, GIVEN, host, [1.0])
    assert [x.bytes for x in found] == [4e6, 4e6, 1e6]
    title, _, *rows, amortised = worker_speed._table(found)
    assert "wide_resnet, density 0.1, uniform, batch 8" in title
    cells = [row.split("  ") for row in rows]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    assert cells == [
        ["Keras without masks", "as it is", "4.000", "1.000x", "1000", "1000"]
        + ["2.000x", "measured"],
        ["masks, all gradients", "as it is", "4.000", "1.000x", "500", "500"]
        + ["1.000x", "measured"],
        ["masks, active gradients", "as it is", "1.000", "0.250x", "250"]
        + ["250", "0.500x", "measured"],
    ]
    assert amortised.endswith(" 0.258x of the bytes")  # 0.99 / 4 + 0.01
    worker_speed._write(found, tmp_path / "workers.csv")
    with open(tmp_path / "workers.csv") as file:
        written = list(csv.DictReader(file))
    assert [row["gradients"] for row in written] == ["dense", "all", "active"]
    assert written[2]["bytes"] == "1e+06" and written[2]["seconds"] == "0.25"


def test_bytes_of_an_interface():
    assert worker_hosts.sent("lo") >= 0
    with pytest.raises(OSError, match="has no interface 'lo0'"):
        worker_hosts.sent("lo0")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model="mlp"), "model must be one of"),
        (dict(densities=["0"]), "densities must be fractions"),
        (dict(densities=["a"]), "--densities takes numbers"),
        (dict(batch_size=1), "batch_size must be an int of at least 2"),
        (dict(gigabits=["0"]), "gigabits must be positive"),
        (dict(rounds=0), "rounds must be an int of at least 1"),
        (dict(distribution="even"), "distribution must be one of"),
        (dict(sides=["none"]), "sides must be one of"),
        (dict(argv=["", "here"]), "There is nothing to name but flags"),
    ],
)
def test_flags_that_are_wrong(capsys, changes, message):
    values = dict(
        model="wide_resnet",
        densities=["0.1"],
        distribution="uniform",
        batch_size=2,
        gigabits=["1"],
        rounds=1,
        sides=["all"],
        argv=[""],
    )
    values.update(changes)
    argv = values.pop("argv")
    given = {name: types.SimpleNamespace(value=v) for name, v in values.items()}
    output = types.SimpleNamespace(value=None)
    run = functools.partial(worker_speed.run, given, output)
    with pytest.raises(SystemExit) as ended:
        exits.one_line("benchmark workers", run)(argv)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"benchmark workers: {message}"), told.err
    assert told.err.count("\n") == 1 and not told.out


@pytest.mark.slow
def test_at_density_one_tenth_a_tenth_travels():
    said = []
    whole, active = worker_speed.measure_exchange(
        batch_size=4,
        gigabits=(),
        rounds=1,
        sides=("all", "active"),
        say=said.append,
    )
    # 1,076,912 weights of kernels, 1 % of other variables, and the network's
    # headers and heartbeats, which are more on a slow machine.
    assert 4 * 1_076_912 < whole.bytes < 1.2 * 4 * 1_076_912
    assert 0.1 * whole.bytes < active.bytes < 0.15 * whole.bytes
    assert worker_speed.MEASURING in said
