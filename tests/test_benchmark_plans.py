"""Tests of `bin/benchmark plans`: the memory of sparse kernels."""

import functools
import types

import pytest

from rigl_keras import kernels
from rigl_keras.experiments import exits
from rigl_keras.experiments.benchmarks import plan_memory

pytestmark = pytest.mark.skipif(
    kernels.load() is None, reason="there are no sparse kernels here"
)


def test_the_table():
    said = []
    found = plan_memory.measure_plans(
        sizes=5, channels=8, filters=16, density=0.5, say=said.append
    )
    assert [(kept.call, kept.sizes) for kept in found] == [
        (call, sizes)
        for call in ("inference", "training step")
        for sizes in (2, 4, 5)
    ]
    for kept in found:
        assert 400 < kept.weights < 750  # of 1152
        # Eight bytes for each weight and plan; three plans or more in training.
        assert 8 * kept.weights < kept.plan_bytes < 15 * 9 * kept.weights
        assert kept.new_seconds > 0 and kept.known_seconds > 0
    assert "3x3, 8 channels to 16" in said[0] and len(said) == 2 + len(found)
    assert said[-1].split()[:3] == ["training", "step", "5"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sizes=1), "sizes must be an int of at least 2"),
        (dict(filters=0), "filters must be an int of at least 1"),
        (dict(density=0.0), "density must be in"),
        (dict(argv=["", "here"]), "There is nothing to name but flags"),
    ],
)
def test_flags_that_are_wrong(capsys, changes, message):
    values = dict(sizes=2, channels=4, filters=4, density=0.5, argv=[""])
    values.update(changes)
    argv = values.pop("argv")
    given = {name: types.SimpleNamespace(value=v) for name, v in values.items()}
    run = functools.partial(plan_memory.run, given, None)
    with pytest.raises(SystemExit) as ended:
        exits.one_line("benchmark plans", run)(argv)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"benchmark plans: {message}"), told.err
    assert told.err.count("\n") == 1 and not told.out
