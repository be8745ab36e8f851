"""The steps of updates, and their drop fractions."""

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from rigl_keras import schedules, scores
from rigl_keras.conventions import ORIGINAL, REPORT

WINDOWS = [
    # frequency, begin, end -> steps below 40, ORIGINAL and REPORT
    (10, 0, 30, [10, 20, 30], [9, 19, 29]),
    (10, 0, 29, [10, 20], [9, 19]),
    (10, 15, 100, [20, 30], [19, 29, 39]),
    (1, 0, 3, [1, 2, 3], [1, 2]),  # never at step 0, before any training
    (50, 0, 100, [], []),
]


@pytest.mark.parametrize("frequency, begin, end, original, report", WINDOWS)
def test_update_steps(frequency, begin, end, original, report):
    for conventions, want in ((ORIGINAL, original), (REPORT, report)):
        window = dict(
            frequency=frequency,
            begin_step=begin,
            end_step=end,
            conventions=conventions,
        )
        due = schedules.is_update_step
        assert [t for t in range(40) if due(t, **window)] == want
        steps = tf.range(40, dtype=tf.int64)
        assert tf.where(due(steps, **window))[:, 0].numpy().tolist() == want
        assert schedules.planned_updates(0, 40, **window) == len(want)


@given(
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(1, 25),
    st.integers(0, 60),
    st.integers(0, 60),
    st.sampled_from([ORIGINAL, REPORT]),
)
def test_planned_updates(first, steps, frequency, begin, end, conventions):
    window = dict(
        frequency=frequency,
        begin_step=begin,
        end_step=begin + end,
        conventions=conventions,
    )
    assert schedules.planned_updates(first, steps, **window) == sum(
        schedules.is_update_step(t, **window)
        for t in range(first, first + steps)
    )


@pytest.mark.parametrize(
    "decay, values",
    [
        ("cosine", [0.4, 0.2, 0.0, 0.0]),
        ("constant", [0.4, 0.4, 0.4, 0.4]),
        ("linear", [0.4, 0.2, 0.0, 0.0]),
        ("polynomial", [0.4, 0.05, 0.0, 0.0]),  # power 3
        ("exponential", [0.4, 0.05, 0.0, 0.0]),
        ("steps", [0.4, 0.4, 0.0, 0.0]),
    ],
)
def test_decays(decay, values):
    for step, value in zip((10, 60, 110, 200), values, strict=True):
        got = schedules.decayed_drop_fraction(
            step, drop_fraction=0.4, begin_step=10, end_step=110, decay=decay
        )
        assert float(got) == pytest.approx(value, abs=1e-12)


def test_report_uses_the_fraction_of_the_step_before():
    # drop_fractions of the trace in tests/data.
    for step, value in ((3, 0.27990381), (7, 0.15), (11, 0.02009619)):
        got = schedules.decayed_drop_fraction(
            tf.constant(step, tf.int64),
            drop_fraction=0.3,
            begin_step=0,
            end_step=12,
            conventions=REPORT,
        )
        assert float(got) == pytest.approx(value, abs=1e-8)


def test_unknown_decay():
    with pytest.raises(ValueError, match="decay must be one of.*'cosin'"):
        schedules.decayed_drop_fraction(
            0, drop_fraction=0.3, begin_step=0, end_step=9, decay="cosin"
        )


def test_scores():
    values = tf.constant([-3.0, 0.5])
    assert scores.magnitude(values).numpy().tolist() == [3.0, 0.5]
    assert scores.gradient_magnitude(values).numpy().tolist() == [3.0, 0.5]
    draws = scores.random([3], key=7, step=2)
    # Fixed numbers: other processes, with other hash seeds, draw the same.
    again = scores.random([3], key=7, step=tf.constant(2, tf.int64))
    assert draws.numpy().tolist() == again.numpy().tolist()
    assert draws.numpy() == pytest.approx(
        [882703587 / 2**32, 344715304 / 2**32, 2515172749 / 2**32], abs=1e-6
    )
    for key, step in ((8, 2), (7, 3)):
        other = scores.random([3], key=key, step=step)
        assert other.numpy().tolist() != draws.numpy().tolist()


def test_steps_of_every_kind():
    window = dict(frequency=10, begin_step=0, end_step=30)
    assert schedules.is_update_step(20, **window) is True
    assert schedules.is_update_step(0, **window) is False
    for dtype in ("int32", "int64"):
        step = tf.constant(20, dtype)
        assert schedules.is_update_step(step, **window).dtype == tf.bool
        assert bool(schedules.is_update_step(step, **window))
        due = tf.function(schedules.is_update_step)
        assert bool(due(step, **window)) and not bool(due(step + 1, **window))


def test_last_update_step():
    assert schedules.last_update_step(30) == 30
    assert schedules.last_update_step(30, conventions=REPORT) == 29


@pytest.mark.parametrize("decay", schedules.DECAYS)
def test_decays_of_every_kind_of_step(decay):
    window = dict(drop_fraction=0.4, begin_step=10, end_step=110, decay=decay)
    for step in (0, 10, 37, 110, 500):
        want = schedules.decayed_drop_fraction(step, **window)
        assert want.dtype == tf.float64 and 0 <= float(want) <= 0.4
        for number in (tf.constant(step), tf.constant(step, tf.int64)):
            got = tf.function(schedules.decayed_drop_fraction)(number, **window)
            assert float(got) == pytest.approx(float(want), abs=1e-15)
        # REPORT's value is ORIGINAL's of the step before.
        after = schedules.decayed_drop_fraction(
            step + 1, **window, conventions=REPORT
        )
        assert float(after) == float(want)


def test_decay_of_a_window_of_one_step():
    for step, want in ((4, 0.3), (5, 0.3), (6, 0.0)):
        got = schedules.decayed_drop_fraction(
            step, drop_fraction=0.3, begin_step=5, end_step=5
        )
        assert float(got) == pytest.approx(want, abs=1e-15)


def test_decay_by_steps():
    """It halves after three quarters of the window, as in MEST."""
    for step, want in ((84, 0.4), (85, 0.2), (109, 0.2), (110, 0.0)):
        got = schedules.decayed_drop_fraction(
            step, drop_fraction=0.4, begin_step=10, end_step=110, decay="steps"
        )
        assert float(got) == pytest.approx(want, abs=1e-12)


def test_decay_with_the_learning_rate():
    """It is 0.3 at the peak rate of 0.1, and 0.03 at 0.01."""
    for ratio, want in ((1.0, 0.3), (0.1, 0.03), (0.0, 0.0)):
        got = schedules.decayed_drop_fraction(
            7,
            drop_fraction=0.3,
            begin_step=0,
            end_step=9,
            decay="learning_rate",
            rate_ratio=tf.constant(ratio),
        )
        assert float(got) == pytest.approx(want, abs=1e-7)


def test_decay_to_more_than_zero():
    """0.005 + 0.495 / 2 in the middle of a cosine from 0.5."""
    window = dict(drop_fraction=0.5, begin_step=0, end_step=100)
    for step, want in ((0, 0.5), (50, 0.2525), (100, 0.005), (500, 0.005)):
        got = schedules.decayed_drop_fraction(
            step, **window, final_drop_fraction=0.005
        )
        assert float(got) == pytest.approx(want, abs=1e-12)
    with pytest.raises(ValueError, match="final_drop_fraction.*drop_fraction="):
        schedules.decayed_drop_fraction(0, **window, final_drop_fraction=0.6)


def test_decay_power():
    got = schedules.decayed_drop_fraction(
        50,
        drop_fraction=0.4,
        begin_step=0,
        end_step=100,
        decay="polynomial",
        decay_power=2.0,
    )
    assert float(got) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "count, factor, expected",
    [(90, 0.7, 63), (250, 0.2, 50), (98, 0.5, 49), (99, 0.5, 49), (3, 2, 6)],
)
def test_runs_of_other_lengths(count, factor, expected):
    """90 * 0.7 is a little below 63."""
    assert schedules.lengthened(count, factor) == expected
    ramp = schedules.SparsityRamp(
        final_density=0.1, begin_step=0, end_step=count, frequency=1
    )
    assert ramp.lengthened(factor).end_step == expected
