"""`drop_and_grow` by hand, by sorting, and by its invariants."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from rigl_keras import ORIGINAL, REPORT, topology

INF = np.inf
NAN = np.nan

# mask, drop scores, grow scores, fraction -> new mask, grown
TABLE = {
    "worst leaves, best joins": (
        [1, 1, 0, 0], [3, 1, 0, 0], [0, 0, 2, 5], 0.5,
        [1, 0, 0, 1], [0, 0, 0, 1],
    ),
    "of equals the first leaves and the first joins": (
        [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 2], 0.5,
        [0, 1, 1, 0], [0, 0, 1, 0],
    ),
    "one that left joins again": (
        [1, 1, 0, 0], [3, 1, 0, 0], [0, 9, 2, 5], 0.5,
        [1, 1, 0, 0], [0, 0, 0, 0],
    ),
    "nothing at fraction 0": (
        [1, 1, 0, 0], [3, 1, 0, 0], [0, 0, 2, 5], 0.0,
        [1, 1, 0, 0], [0, 0, 0, 0],
    ),
    "everything at fraction 1": (
        [1, 1, 0, 0], [3, 1, 0, 0], [0, 0, 2, 5], 1.0,
        [0, 0, 1, 1], [0, 0, 1, 1],
    ),
    "a full layer": (
        [1, 1, 1], [3, 1, 2], [0, 0, 0], 0.5,
        [1, 1, 1], [0, 0, 0],
    ),
    "an empty layer": (
        [0, 0, 0], [3, 1, 2], [5, 6, 7], 0.5,
        [0, 0, 0], [0, 0, 0],
    ),
    "the count is rounded down": (
        [1, 1, 1, 0], [1, 2, 3, 0], [0, 0, 0, 9], 0.6,
        [0, 1, 1, 1], [0, 0, 0, 1],
    ),
    "an active zero leaves, inactive zeros do not compete": (
        [0, 1, 1, 0], [0, 0, 2, 0], [1, 0, 0, 4], 0.5,
        [0, 0, 1, 1], [0, 0, 0, 1],
    ),
    "negative and infinite growth scores": (
        [1, 1, 0, 0], [3, 1, 0, 0], [0, -INF, -2, -5], 0.5,
        [1, 0, 1, 0], [0, 0, 1, 0],
    ),
    "vanishing gradients never move a connection that stays": (
        [1, 1, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0], 0.5,
        [1, 1, 0, 0], [0, 0, 0, 0],
    ),
    "NaN where it is not read": (
        [1, 1, 0, 0], [3, 1, NAN, NAN], [NAN, 0, 2, 5], 0.5,
        [1, 0, 0, 1], [0, 0, 0, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_table(row, mode):
    mask, drop, grow, fraction, new, grown = row

    def move(mask, drop, grow):
        return topology.drop_and_grow(mask, drop, grow, drop_fraction=fraction)

    if mode != "eager":
        move = tf.function(move, jit_compile=mode == "xla")
    got = move(
        tf.constant(mask, tf.float32),
        tf.constant(drop, tf.float32),
        tf.constant(grow, tf.float32),
    )
    np.testing.assert_array_equal(got[0], new)
    np.testing.assert_array_equal(got[1], grown)


@pytest.mark.parametrize(
    "mask, drop, grow, fraction, new, grown",
    [
        # One of three leaves: 0.4 x 3 is rounded up to two.
        ([1, 1, 1, 0, 0], [1, 2, 3, 0, 0], [0, 0, 0, 8, 9], 0.4,
         [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]),
        # A connection that left and joined again starts anew.
        ([1, 1, 0, 0], [3, 1, 0, 0], [0, 9, 2, 5], 0.5,
         [1, 1, 0, 0], [0, 1, 0, 0]),
        # The active zero ties with the inactive one before it: of the two
        # places to fill (one inactive, one dropped) the first two zeros win,
        # which are the inactive entry and the active zero.
        ([0, 1, 1], [0, 0, 2], [7, 0, 0], 0.5, [1, 0, 1], [1, 0, 0]),
        # Here both places fall on inactive zeros, and nothing is dropped.
        ([0, 0, 1, 1], [0, 0, 0, 2], [7, 8, 0, 0], 0.0,
         [0, 0, 1, 1], [0, 0, 0, 0]),
        # Gradients vanish: the first entry, active, is picked and zeroed,
        # and the layer loses a connection.
        ([1, 1, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0], 0.5,
         [1, 0, 0, 0], [1, 0, 0, 0]),
    ],
)  # fmt: skip
def test_report_table(mask, drop, grow, fraction, new, grown):
    got = topology.drop_and_grow(
        mask, drop, grow, drop_fraction=fraction, conventions=REPORT
    )
    np.testing.assert_array_equal(got[0], new)
    np.testing.assert_array_equal(got[1], grown)


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32", "float16"])
def test_keeps_dtype_and_shape(dtype):
    mask = np.array([[[1, 0], [1, 1]]]).astype(dtype)
    new, grown = topology.drop_and_grow(
        mask, np.ones(mask.shape), np.ones(mask.shape), drop_fraction=0.4
    )
    assert new.dtype == grown.dtype == dtype
    assert new.shape == grown.shape == mask.shape


def test_grow_count():
    new, grown = topology.drop_and_grow(
        [1, 1, 0, 0], [3, 1, 0, 0], [0, 0, 2, 5], drop_fraction=0.5,
        grow_count=2,
    )  # fmt: skip
    np.testing.assert_array_equal(new, [1, 0, 1, 1])
    np.testing.assert_array_equal(grown, [0, 0, 1, 1])


@pytest.mark.parametrize(
    "drop, grow", [([NAN, 1, 0], [0, 0, 1.0]), ([1, 2, 0], [0, 0, NAN])]
)
def test_nan_is_refused(drop, grow):
    with pytest.raises(ValueError, match="cannot rank NaN.*diverged"):
        topology.drop_and_grow([1, 1, 0], drop, grow, drop_fraction=0.5)
    # Nothing can be raised in a graph: the mask stays as it is.
    move = tf.function(topology.drop_and_grow)
    new, grown = move([1, 1, 0], drop, grow, drop_fraction=0.5)
    np.testing.assert_array_equal(new, [1, 1, 0])
    np.testing.assert_array_equal(grown, [0, 0, 0])


def test_bad_arguments():
    for fraction in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            topology.drop_and_grow([1], [1], [1], drop_fraction=fraction)
    with pytest.raises(ValueError, match=r"one shape.*\(2,\), \(1,\)"):
        topology.drop_and_grow([1, 0], [1], [1, 0], drop_fraction=0.5)


def masks_and_scores(draw):
    shape = draw(hnp.array_shapes(max_dims=4, max_side=5))
    scores = hnp.arrays(
        np.float32, shape, elements=st.floats(-4, 4, width=16)
    )  # half precision, so that scores often tie
    return draw(hnp.arrays(bool, shape)), draw(scores), draw(scores)


@settings(max_examples=60, deadline=None)
@given(st.composite(masks_and_scores)(), st.floats(0, 1))
def test_invariants(case, fraction):
    mask, drop, grow = case
    new, grown = topology.drop_and_grow(
        mask, drop, grow, drop_fraction=fraction
    )
    new, grown = new.numpy(), grown.numpy()
    assert new.sum() == mask.sum()
    assert not (grown & mask).any()
    assert (grown == (new & ~mask)).all()
    dropped = mask & ~new
    assert dropped.sum() == grown.sum() <= int(mask.sum() * fraction)
    if dropped.any() and (mask & new).any() and fraction < 1:
        # Nothing that stayed, but for what rejoined, is worse.
        assert drop[dropped].min() >= drop[mask].min()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_select_highest_is_a_sort(data):
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    size = data.draw(st.integers(1, 30))
    width = 32 if dtype is np.float32 else 64
    anything = st.floats(allow_nan=False, width=width) | st.sampled_from(
        [0.0, -0.0, 1.0, np.inf, -np.inf]
    )
    scores = data.draw(hnp.arrays(dtype, size, elements=anything))
    among = data.draw(hnp.arrays(bool, size))
    count = data.draw(st.integers(0, size + 1))
    order = sorted(range(size), key=lambda i: (-scores[i], i))
    want = np.zeros(size, bool)
    want[[i for i in order if among[i]][:count]] = True
    got = topology.select_highest(scores, count, among=among)
    np.testing.assert_array_equal(got, want)


def test_report_spares_dense_layers():
    masks = [np.ones(10), np.r_[np.ones(9), 0], np.r_[np.ones(2), np.zeros(8)]]
    fractions = topology.layer_drop_fractions(
        masks, masks, 0.3, conventions=REPORT
    )
    # The first two hold 10 and 9 of 21 nonzeros, more than a third.
    np.testing.assert_allclose(fractions, [0.0, 0.1, 0.3], atol=1e-12)
    assert topology.layer_drop_fractions(
        masks, masks, 0.3, conventions=ORIGINAL
    ) == [0.3, 0.3, 0.3]
