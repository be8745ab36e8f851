"""Random calls of functions of shapes and steps, and their checks."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from rigl_keras import distributions, schedules
from rigl_keras.conventions import REPORT
from rigl_keras.schedules import SparsityRamp
from support.hostile import RAMP, mixed, names, part, presets, step

# Shapes, densities, counts.

shapes = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    min_size=1,
)
share = st.floats(0.001, 1.0)
given_densities = st.none() | st.dictionaries(
    st.sampled_from("abcd"), share, max_size=2
)


def sizes_of(shapes):
    """Returns the number of weights of each shape."""
    return {name: math.prod(map(int, shape)) for name, shape in shapes.items()}


def check_densities(got, shapes, density, distribution, conventions, densities):
    """Checks densities by layer: their names, range and sum."""
    assert list(got) == list(shapes)
    assert all(type(d) is float and 0 <= d <= 1 for d in got.values())
    sizes = sizes_of(shapes)
    if densities:
        assert all(got[name] == float(d) for name, d in densities.items())
    first, *others = got
    if distribution == "uniform" and first not in (densities or {}):
        assert got[first] == 1
        kept = sum(got[n] * sizes[n] for n in others)
        wanted = float(density) * sum(sizes[n] for n in others)
    else:
        kept = sum(got[n] * sizes[n] for n in got)
        wanted = float(density) * sum(sizes.values())
    # Each layer rounds; the reproduction truncates twice.
    assert kept == pytest.approx(wanted, abs=2 * len(sizes) + 1)


def check_budgets(got, shapes, density, group_sizes, **options):
    """Checks counts by layer, whose sum is rounded once."""
    assert set(got) <= set(shapes)
    sizes = {name: math.prod(shapes[name]) for name in got}
    assert all(0 <= got[name].count <= sizes[name] for name in got)
    kept = sum(budget.count for budget in got.values())
    assert kept == round(float(density) * sum(sizes.values()))


def check_masked_shapes(got, shapes, distribution, densities):
    """Checks that only the first shape is left out, if uniform."""
    first, *others = shapes
    free = distribution == "uniform" and first not in (densities or {})
    assert list(got) == (others if free else [first, *others])


def check_total(got, exact, density, weights):
    """Checks a number of connections."""
    assert got == round(exact) and 1 <= got <= weights


def check_counts(got, sizes, densities, total):
    """Checks numbers of connections by layer."""
    assert sum(got.values()) == total and list(got) == list(sizes)
    for name, count in got.items():
        assert type(count) is int and 0 <= count <= sizes[name]


# Schedules.

window = dict(
    frequency=st.integers(1, 40),
    begin_step=st.integers(0, 100),
    end_step=st.integers(0, 300),
    conventions=presets,
)


def is_due(t, frequency, begin_step, end_step, conventions):
    """Returns whether a step is one of updates."""
    if conventions is REPORT:
        return t > 0 and (t + 1) % frequency == 0 and begin_step <= t < end_step
    return t > 0 and t % frequency == 0 and begin_step <= t <= end_step


def check_due(got, step, **window):
    """Checks which steps are those of updates."""
    # A vector of steps gives the same.
    for t, due in zip(np.ravel(step), np.ravel(got), strict=True):
        assert due == is_due(int(t), **window)


def check_planned(got, first_step, steps, **window):
    """Checks the number of updates of a run."""
    if steps < 1000:
        run = range(int(first_step), int(first_step) + int(steps))
        assert got == sum(is_due(t, **window) for t in run)


def check_last(got, end_step, conventions):
    """Checks the step of the last update."""
    assert got == end_step - (conventions is REPORT)


def check_fraction(got, drop_fraction, **_):
    """Checks the type and the range of a drop fraction."""
    assert got.dtype == tf.float64 and 0 <= float(got) <= drop_fraction


def check_ramp(ramp, **arguments):
    """Checks a ramp at its ends."""
    for t in (0, ramp.begin_step, ramp.end_step, ramp.end_step + 1):
        due, sparsity = ramp(t)
        assert 0 <= float(sparsity) < 1
        assert not due or ramp.begin_step <= t <= ramp.end_step
    assert bool(ramp(ramp.end_step)[0])
    want = 1 - float(arguments["final_density"])
    assert float(ramp.sparsity(ramp.end_step)) == pytest.approx(want)
    assert ramp.lengthened(2).end_step == 2 * ramp.end_step


def check_sparsity(got, schedule, step, conventions):
    """Checks what a schedule plans at a step."""
    due, sparsity = got
    assert 0 <= float(sparsity) < 1 and bool(due) in (True, False)


def check_gathered(got, step, gradient_batches, frequency, **window):
    """Checks whether an update gathers gradients at a step."""
    if not tf.is_tensor(step):
        due = [
            schedules.is_update_step(t, frequency=frequency, **window)
            for t in range(int(step), int(step) + int(gradient_batches))
        ]
        assert bool(got) == any(map(bool, due))


CASES = {
    # Name: the function, its arguments, a check, and the number of calls.
    "layer_densities": (
        distributions.layer_densities,
        mixed(
            shapes=shapes,
            density=share,
            distribution=names,
            conventions=presets,
            densities=given_densities,
        ),
        check_densities,
        1300,
    ),
    "layer_budgets": (
        distributions.layer_budgets,
        mixed(
            shapes=shapes,
            density=share,
            distribution=names,
            conventions=presets,
            densities=given_densities,
            group_sizes=st.none(),
        ),
        check_budgets,
        200,
    ),
    "masked_shapes": (
        distributions.masked_shapes,
        mixed(shapes=shapes, distribution=names, densities=given_densities),
        check_masked_shapes,
        300,
    ),
    "total_count": (
        distributions.total_count,
        mixed(
            exact=st.floats(0, 100),
            density=share,
            weights=st.integers(1, 100),
        ),
        check_total,
        300,
    ),
    "layer_counts": (
        distributions.layer_counts,
        mixed(
            sizes=st.fixed_dictionaries(
                dict(a=st.integers(1, 9), b=st.just(5))
            ),
            densities=st.fixed_dictionaries(dict(a=share, b=share)),
            total=st.integers(0, 14),
        ),
        check_counts,
        1000,
    ),
    "is_update_step": (
        schedules.is_update_step,
        mixed(step=step, **window),
        check_due,
        800,
    ),
    "last_update_step": (
        schedules.last_update_step,
        mixed(end_step=st.integers(0, 99), conventions=presets),
        check_last,
        300,
    ),
    "planned_updates": (
        schedules.planned_updates,
        mixed(
            first_step=st.integers(0, 99), steps=st.integers(0, 300), **window
        ),
        check_planned,
        800,
    ),
    "decayed_drop_fraction": (
        schedules.decayed_drop_fraction,
        mixed(
            step=step,
            drop_fraction=part,
            begin_step=st.integers(0, 100),
            end_step=st.integers(0, 300),
            decay=st.sampled_from(schedules.DECAYS),
            decay_power=st.floats(0.1, 9),
            final_drop_fraction=st.just(0.0),
            conventions=presets,
        ),
        check_fraction,
        500,
    ),
    "SparsityRamp": (
        SparsityRamp,
        mixed(
            final_density=st.floats(0.01, 0.5),
            begin_step=st.integers(0, 50),
            end_step=st.integers(51, 300),
            frequency=st.integers(1, 40),
            initial_density=st.floats(0.5, 1),
            power=st.floats(0.1, 9),
        ),
        check_ramp,
        500,
    ),
    "planned_sparsity": (
        schedules.planned_sparsity,
        mixed(schedule=st.just(RAMP), step=step, conventions=presets),
        check_sparsity,
        200,
    ),
    "is_gathered_step": (
        schedules.is_gathered_step,
        mixed(
            step=st.integers(0, 60),
            gradient_batches=st.integers(1, 5),
            frequency=st.integers(5, 20),
            begin_step=st.integers(0, 30),
            end_step=st.integers(0, 60),
            conventions=presets,
        ),
        check_gathered,
        200,
    ),
}
