"""The growth of each layer, by hand and compared with a plain loop."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from rigl_keras import redistribution
from rigl_keras.conventions import ORIGINAL, REPORT

TABLE = {
    # Half of 8 for each, but 0.99 x 3 leaves room for 2 in the second.
    "the first takes what the second cannot": (
        [0.5, 0.5], [6, 2], [100, 3], [6, 2],
    ),
    "all room": ([0.25, 0.75], [4, 4], [100, 100], [2, 6]),
    # 3.5 and 3.5: of equal remainders, the earlier is rounded up.
    "ties go to the earlier layer": ([0.5, 0.5], [3, 4], [50, 50], [4, 3]),
    # 10, 10, 80 of 100; the third has room for 9, so 71 are left, 35.5 each.
    "spread equally": (
        [0.1, 0.1, 0.8], [40, 30, 30], [99, 99, 10], [46, 45, 9],
    ),
    # 0.99 x (5 + 5) has room for 8 only, but 9 must be placed.
    "filled to the last entry": ([0.5, 0.5], [4, 5], [5, 5], [5, 4]),
    "nothing dropped": ([0.3, 0.7], [0, 0], [5, 5], [0, 0]),
    "a share of nothing": ([0.0, 1.0], [5, 0], [50, 50], [0, 5]),
    "no room at all": ([0.5, 0.5], [0, 4], [0, 40], [0, 4]),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize(
    "shares, dropped, free, want", TABLE.values(), ids=TABLE
)
def test_table(shares, dropped, free, want, mode):
    grow = redistribution.grow_counts
    if mode != "eager":
        grow = tf.function(grow, jit_compile=mode == "xla")
    got = grow(tf.constant(shares), tf.constant(dropped), tf.constant(free))
    assert got.dtype == tf.int32
    assert got.numpy().tolist() == want


layers = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 1), min_size=n, max_size=n),
        st.lists(st.integers(0, 50), min_size=n, max_size=n),
        st.lists(st.integers(0, 300), min_size=n, max_size=n),
    )
)


@settings(max_examples=200, deadline=None)
@given(layers)
def test_invariants(drawn):
    """As many grow as were dropped, and no layer exceeds its room."""
    values, dropped, zeros = (np.array(part) for part in drawn)
    shares = redistribution.shares(values)
    assert float(tf.reduce_sum(shares)) == pytest.approx(1)
    free = zeros + dropped  # dropped entries may grow again
    got = redistribution.grow_counts(shares, dropped, free).numpy()
    assert got.sum() == dropped.sum()
    assert (got >= 0).all() and (got <= free).all()
    caps = np.floor(0.99 * free)
    if caps.sum() < dropped.sum():
        caps = free
    # Each layer has min(cap, its share + the spread rest), up to rounding.
    wanted = shares.numpy() * dropped.sum()
    open_layers = got < caps
    spread = (got - wanted)[open_layers]
    if open_layers.any():
        assert spread.max() - spread.min() < 1 + 1e-6
        assert (got - wanted)[~open_layers].max(initial=-np.inf) < (
            spread.min() + 1 + 1e-6
        )


def reproduced(shares, total, free):
    """Returns counts by the reproduction's rule (core.py:285-346)."""
    caps = [0.99 * f for f in free]
    counts = [float(round(s * total)) for s in shares]
    for _ in range(1000):
        left = 0.0
        for i, cap in enumerate(caps):
            if counts[i] > cap:
                left += counts[i] - cap
                counts[i] = cap
        if left <= 0:
            break
        counts = [c + left / len(counts) for c in counts]
    # If its correction exceeds all that is dropped, nothing grows.
    return [
        max(0, int(min(c, cap))) for c, cap in zip(counts, caps, strict=True)
    ]


@tf.function  # traced once for each number of layers
def grown_as_in_report(shares, dropped, free, correction):
    return redistribution.grow_counts(
        shares, dropped, free, correction=correction, conventions=REPORT
    )


@settings(max_examples=100, deadline=None)
@given(layers, st.floats(-5, 5))
def test_report_is_a_plain_loop(drawn, correction):
    values, dropped, zeros = (np.array(part) for part in drawn)
    shares = redistribution.shares(values)
    free = zeros + dropped
    got = grown_as_in_report(
        shares, dropped, free, tf.constant(correction, tf.float64)
    )
    want = reproduced(shares.numpy(), dropped.sum() + correction, free)
    # Sums in another order may be rounded to another whole number.
    assert np.abs(got.numpy() - want).max() <= 1


def test_report_loses_connections_where_the_original_does_not():
    shares, dropped, free = [1 / 3] * 3, [3, 3, 4], [50, 50, 50]
    # 10 / 3 rounds to 3 three times.
    got = redistribution.grow_counts(shares, dropped, free, conventions=REPORT)
    assert got.numpy().tolist() == [3, 3, 3]
    got = redistribution.grow_counts(
        shares, dropped, free, conventions=ORIGINAL
    )
    assert got.numpy().tolist() == [4, 3, 3]


def test_correction_by_hand():
    # 8 / 4 + 3/4 x 4 + 1.
    assert float(redistribution.corrected(8.0, 4.0, 1.0)) == 6.0
    got = redistribution.grow_counts(
        [0.5, 0.5], [2, 2], [50, 50], correction=6.0, conventions=REPORT
    )
    assert got.numpy().tolist() == [5, 5]


def test_layer_mean_is_over_active_entries():
    statistic, mask = [[-4.0, 100.0], [2.0, 7.0]], [[1, 0], [1, 0]]
    assert float(redistribution.layer_mean(statistic, mask)) == 3.0
    assert float(redistribution.layer_mean([1.0, 2.0], [0, 0])) == 0.0


def test_shares():
    assert redistribution.shares([1, 3]).numpy().tolist() == [0.25, 0.75]
    assert redistribution.shares([0, 0]).numpy().tolist() == [0.5, 0.5]


def test_mean_shares():
    # Means 3 and 1, over active entries.
    got = redistribution.mean_shares(
        [[-4.0, 2.0, 9.0], [1.0]], [[1, 1, 0], [1]]
    )
    assert got.numpy().tolist() == [0.75, 0.25]
    with pytest.raises(ValueError, match="statistics and masks must"):
        redistribution.mean_shares([[1.0]], [[1], [1]])


def test_nonzero_shares():
    got = redistribution.nonzero_shares([[0.0, 2.0], [[1.0, 0.0], [3.0, 4.0]]])
    assert got.numpy().tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="kernels must be sequences"):
        redistribution.nonzero_shares(None)


def test_state_of_the_correction_by_hand():
    state = redistribution.start_of_correction(100)
    assert state.numpy().tolist() == [0, 0, 0, 100]
    # 4 missing: 0 / 4 + 3/4 x 4 + 4. Then 2 more: 7 / 4 + 3/4 x 2 + 6 / 2.
    state = redistribution.next_correction(state, 96)
    assert state.numpy().tolist() == [7, 4, 1, 100]
    state = redistribution.next_correction(state, tf.constant(98))
    assert state.numpy().tolist() == [6.25, 6, 2, 100]
