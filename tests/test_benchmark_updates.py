"""Tests of `bin/benchmark updates`: requests, tables and rows."""

import contextlib
import csv
import functools

import pytest

from rigl_keras.experiments.benchmarks import update_process, update_speed
from rigl_keras.experiments.exits import FailedError

KINDS = update_process.KINDS


@contextlib.contextmanager
def answers(options, asked, **environment):
    """A process that answers one second more at each request."""
    asked.append((options["method"], options.get("memory", False)))
    assert bool(environment) == options.get("memory", False)
    turns = iter(range(1, 100))

    def ask():
        n = next(turns)
        if environment:
            return {
                "peak": dict.fromkeys(KINDS, n << 20),
                "backward": {"update": n << 21, "step": None},
            }
        return {"seconds": dict.fromkeys(KINDS, float(n))}

    yield ask


def test_updates_are_tables_and_rows(monkeypatch, tmp_path):
    asked, said = [], []
    monkeypatch.setattr(
        update_speed, "_process", functools.partial(answers, asked=asked)
    )
    path = tmp_path / "updates.csv"
    found = update_speed.measure_updates(
        ["dense"],
        size=64,
        rounds=3,
        say=said.append,
        keep=functools.partial(update_speed._write, path=path),
    )
    assert asked == [
        ("GSE", False), ("RigL", False), ("GSE", True), ("RigL", True)
    ]  # fmt: skip
    assert [(one.method, one.kind) for one in found] == [
        (method, kind) for method in ("GSE", "RigL") for kind in KINDS
    ]
    first, _, step, *_ = found
    assert (first.seconds, first.fastest, first.size) == (2, 1, 64)
    assert (first.peak_bytes, first.backward_bytes) == (2 << 20, 4 << 20)
    assert step.backward_bytes is None  # not known
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 6 and rows[0]["backward_bytes"] == "4.1943e+06"
    assert rows[2]["backward_bytes"] == "" and rows[0]["commit"]
    assert any("GSE" in line and "1.00x" in line for line in said)


def test_a_process_that_fails_says_why():
    options = {"network": "dense", "method": "none"}
    with pytest.raises(FailedError, match="KeyError: 'batch_size'"):
        with update_speed._process(options):
            raise AssertionError("it began")


@pytest.mark.parametrize(
    "wrong", [{"networks": ["lenet"]}, {"size": 1}, {"rounds": 0}]
)
def test_what_cannot_be_measured(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        update_speed.measure_updates(**wrong)
