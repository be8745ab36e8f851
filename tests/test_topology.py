"""`drop_and_grow` by hand, by sorting, and by its invariants."""

import functools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from rigl_keras import topology
from rigl_keras.conventions import ORIGINAL, REPORT

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


@functools.cache  # one trace serves all rows
def move(mode, fraction):
    def by_fraction(mask, drop, grow):
        return topology.drop_and_grow(mask, drop, grow, drop_fraction=fraction)

    if mode == "eager":
        return by_fraction
    return tf.function(by_fraction, jit_compile=mode == "xla")


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_table(row, mode):
    mask, drop, grow, fraction, new, grown = row
    got = move(mode, fraction)(
        tf.constant(mask, tf.float32),
        tf.constant(drop, tf.float32),
        tf.constant(grow, tf.float32),
    )
    np.testing.assert_array_equal(got[0], new)
    np.testing.assert_array_equal(got[1], grown)


@pytest.mark.parametrize(
    "mask, drop, grow, fraction, new, grown",
    [
        # Two of three are dropped: 0.4 x 3 is rounded up.
        ([1, 1, 1, 0, 0], [1, 2, 3, 0, 0], [0, 0, 0, 8, 9], 0.4,
         [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]),
        # A connection that is dropped and regrown starts again.
        ([1, 1, 0, 0], [3, 1, 0, 0], [0, 9, 2, 5], 0.5,
         [1, 1, 0, 0], [0, 1, 0, 0]),
        # The active zero ties with the inactive one before it: of the two
        # places to fill (one inactive, one dropped) the first two zeros win,
        # which are the inactive entry and the active zero.
        ([0, 1, 1], [0, 0, 2], [7, 0, 0], 0.5, [1, 0, 1], [1, 0, 0]),
        # Here both zeros are inactive, and nothing is dropped.
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
    with pytest.raises(ValueError, match="cannot be ranked.*diverged"):
        topology.drop_and_grow([1, 1, 0], drop, grow, drop_fraction=0.5)
    # A graph cannot raise, so the mask does not change.
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
        # No connection that stayed has a lower score, except regrown ones.
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
        masks, [10 / 21, 9 / 21, 2 / 21], 0.3, conventions=REPORT
    )
    # The first two hold 10 and 9 of 21 nonzeros, more than a third.
    np.testing.assert_allclose(fractions, [0.0, 0.1, 0.3], atol=1e-12)
    assert topology.layer_drop_fractions(
        masks, [10 / 21, 9 / 21, 2 / 21], 0.3, conventions=ORIGINAL
    ) == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(
    "n, fraction, floor, ceil",
    [
        # Products that are whole numbers in double precision, but not with
        # 0.7 or 0.3 in float32 (0.69999999, 0.30000001).
        (10, 0.7, 7, 7),
        (10, 0.3, 3, 3),
        (5, 0.6, 3, 3),
        (10, 0.25, 2, 3),
        (3, 0.0, 0, 0),
        (3, 1.0, 3, 3),
        (0, 0.5, 0, 0),
    ],
)
@pytest.mark.parametrize(
    "number", [float, np.float64, lambda f: tf.constant(f, tf.float64)]
)
def test_drop_count(n, fraction, floor, ceil, number):
    for conventions, want in ((ORIGINAL, floor), (REPORT, ceil)):
        count = topology.drop_count(
            np.ones(n), number(fraction), conventions=conventions
        )
        assert (count.dtype, int(count)) == (tf.int32, want)


@pytest.mark.parametrize(
    "joining, new",
    [
        (0, [1, 0, 0, 0]),
        (1, [1, 0, 0, 1]),
        (3, [1, 1, 1, 1]),  # also the dropped one, after two better ones
        (9, [1, 1, 1, 1]),  # at most the free places
    ],
)
def test_grow_counts(joining, new):
    for count in (joining, tf.constant(joining, tf.int64)):
        got, grown = topology.drop_and_grow(
            [1, 1, 0, 0], [3, 1, 0, 0], [0, 0, 2, 5], drop_fraction=0.5,
            grow_count=count,
        )  # fmt: skip
        np.testing.assert_array_equal(got, new)
        np.testing.assert_array_equal(grown, np.array(new) * [0, 0, 1, 1])


def test_ties_go_by_flat_index():
    mask = [[1, 1], [1, 0], [0, 0]]
    new, grown = topology.drop_and_grow(
        mask, np.ones((3, 2)), np.ones((3, 2)) * [[0], [1], [1]],
        drop_fraction=0.67,
    )  # fmt: skip
    # (0, 0) and (0, 1) are dropped; (1, 1) and (2, 0) have the best scores.
    np.testing.assert_array_equal(new, [[0, 0], [1, 1], [1, 0]])
    np.testing.assert_array_equal(grown, [[0, 0], [0, 1], [1, 0]])


def in_modes(function):
    return [
        function,
        tf.function(function),
        tf.function(function, jit_compile=True),
    ]


# Made once, so that each is compiled once for all examples.
MOVES = {
    name: in_modes(
        lambda mask, drop, grow, fraction, conventions=conventions: (
            topology.drop_and_grow(
                mask, drop, grow, drop_fraction=fraction,
                conventions=conventions,
            )
        )
    )
    for name, conventions in (("ORIGINAL", ORIGINAL), ("REPORT", REPORT))
}  # fmt: skip
SELECTS = in_modes(
    lambda scores, count, among: topology.select_highest(
        scores, count, among=among
    )
)
FEW = st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0, np.inf, -np.inf])


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(bool, (3, 4)),
    hnp.arrays(np.float32, (3, 4), elements=FEW),
    hnp.arrays(np.float32, (3, 4), elements=FEW),
    st.floats(0, 1),
    st.sampled_from([*MOVES]),
)
def test_graph_and_xla_agree_with_eager(mask, drop, grow, fraction, name):
    fraction = tf.constant(fraction, tf.float64)
    eager, *others = (move(mask, drop, grow, fraction) for move in MOVES[name])
    for other in others:
        for mine, theirs in zip(eager, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        np.float32, 12, elements=FEW | st.floats(width=32, allow_nan=False)
    ),
    st.integers(0, 13),
    hnp.arrays(bool, 12),
)
def test_select_highest_in_graph_and_xla(scores, count, among):
    candidates = sorted(np.flatnonzero(among), key=lambda i: (-scores[i], i))
    for select in SELECTS:
        got = select(scores, tf.constant(count), among)
        assert np.flatnonzero(got).tolist() == sorted(candidates[:count])


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("where", ["drop", "grow"])
def test_nan_in_graph_and_xla(name, where):
    mask = np.eye(3, 4) > 0
    scores = {"drop": np.ones((3, 4)), "grow": np.ones((3, 4))}
    scores[where][(1, 1) if where == "drop" else (1, 0)] = NAN
    scores = {k: np.float32(v) for k, v in scores.items()}
    fraction = tf.constant(0.5, tf.float64)
    eager, *others = MOVES[name]
    before = mask.copy()
    with pytest.raises(ValueError, match=f"NaN {where} scores: 1 of"):
        eager(mask, scores["drop"], scores["grow"], fraction)
    np.testing.assert_array_equal(mask, before)
    for move in others:
        new, grown = move(mask, scores["drop"], scores["grow"], fraction)
        np.testing.assert_array_equal(new, mask)
        assert not grown.numpy().any()


@tf.function(
    input_signature=[
        tf.TensorSpec(None, tf.bool),
        *[tf.TensorSpec(None, tf.float32)] * 2,
        tf.TensorSpec([], tf.float64),
    ]
)
def moved(mask, drop, grow, fraction):
    """Updates a mask of any shape, with a single trace."""
    shape, flat = (
        tf.shape(mask),
        [tf.reshape(x, [-1]) for x in (mask, drop, grow)],
    )
    new, grown = topology.drop_and_grow(*flat, drop_fraction=fraction)
    return tf.reshape(new, shape), tf.reshape(grown, shape)


@settings(max_examples=60, deadline=None)
@given(st.composite(masks_and_scores)(), st.floats(0, 1))
def test_kept_are_left_alone(case, fraction):
    mask, drop, grow = case
    new, grown = (t.numpy() for t in moved(mask, drop, grow, fraction))
    # The best stay, with ties to the higher index. Only the others may be
    # dropped, and only free places filled.
    active = np.flatnonzero(mask)
    worst_first = sorted(active, key=lambda i: (drop.flat[i], i))
    count = int(len(active) * fraction)
    kept = np.zeros(mask.size, bool)
    kept[worst_first[count:]] = True
    kept = kept.reshape(mask.shape)
    assert new[kept].all() and not (grown & kept).any()
    free = np.flatnonzero(~kept)
    joined = sorted(free, key=lambda i: (-grow.flat[i], i))[:count]
    assert np.flatnonzero(new & ~kept).tolist() == sorted(joined)
    again, _ = moved(mask, drop, grow, fraction)
    np.testing.assert_array_equal(again, new)
    still, none = moved(new, drop, grow, 0)
    np.testing.assert_array_equal(still, new)
    assert not none.numpy().any()


def test_unknown_sizes():
    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32)] * 3)
    def move(mask, drop, grow):
        return topology.drop_and_grow(mask, drop, grow, drop_fraction=0.5)

    new, _ = move([[1, 1, 0]], [[2, 1, 0]], [[0, 0, 1]])
    np.testing.assert_array_equal(new, [[1, 0, 1]])


@pytest.mark.parametrize("fraction", [None, "half", [0.1, 0.2]])
def test_drop_fraction_is_a_number(fraction):
    with pytest.raises((TypeError, ValueError), match="drop_fraction"):
        topology.drop_and_grow([1], [1], [1], drop_fraction=fraction)


def test_all_layers_at_once():
    """Each layer is updated as if alone, if it grows as many as it drops."""
    draw = np.random.default_rng(0)
    shapes = [(3, 4), (5,), (2, 2, 3)]
    masks = [draw.random(shape) < 0.5 for shape in shapes]
    leaving, joining = (
        [draw.standard_normal(shape) for shape in shapes] for _ in range(2)
    )
    for conventions in (ORIGINAL, REPORT):
        together = topology.update_masks(
            masks, leaving, joining, drop_fraction=0.4, conventions=conventions
        )
        alone = [
            topology.drop_and_grow(
                *layer, drop_fraction=0.4, conventions=conventions
            )
            for layer in zip(masks, leaving, joining, strict=True)
        ]
        for one, other in zip(together, zip(*alone, strict=True), strict=True):
            for mine, theirs in zip(one, other, strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_connections_move_between_layers():
    asked = []

    def all_to_the_second(dropped, free):
        asked.append((dropped.numpy().tolist(), free.numpy().tolist()))
        return [0, tf.reduce_sum(dropped)]

    new, grown = topology.update_masks(
        [[1, 1, 0, 0], [1, 1, 0, 0, 0]],
        [[3, 1, 0, 0], [1, 2, 0, 0, 0]],
        [[0, 0, 2, 5], [0, 0, 7, 8, 9]],
        drop_fraction=0.5,
        grow_counts=all_to_the_second,
    )
    assert asked == [([1, 1], [3, 4])]
    assert [mask.numpy().tolist() for mask in new] == [
        [1, 0, 0, 0],
        [0, 1, 0, 1, 1],
    ]
    assert [mask.numpy().tolist() for mask in grown] == [
        [0, 0, 0, 0],
        [0, 0, 0, 1, 1],
    ]


def test_spared_layers_drop_less():
    """The first layer, of sparsity 0.1, has 9 of 11 nonzeros; it drops one."""
    masks = [np.r_[np.ones(9), 0], np.r_[np.ones(2), np.zeros(8)]]
    leaving = [np.arange(10.0) + 1, np.arange(10.0) + 1]
    joining = [np.zeros(10), np.zeros(10)]
    for shares, dropped in (([9 / 11, 2 / 11], [1, 2]), (None, [9, 2])):
        seen = []

        def note(dropped, free, seen=seen):
            seen.append(dropped.numpy().tolist())
            return dropped

        topology.update_masks(
            masks,
            leaving,
            joining,
            drop_fraction=1.0,
            shares=shares,
            grow_counts=note,
            conventions=REPORT,
        )
        assert seen == [dropped]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_nan_in_one_layer_moves_none(layer):
    masks = np.float32([[1, 1, 0, 0], [1, 1, 0, 0]])
    joining = np.float32([[0, 0, 2, 5], [0, 0, 2, 5]])
    joining[layer, 2] = NAN
    with pytest.raises(ValueError, match="NaN grow scores: 1 of 6 inactive"):
        topology.update_masks(masks, masks, joining, drop_fraction=0.5)

    @tf.function
    def move(joining):
        return topology.update_masks(masks, masks, joining, drop_fraction=0.5)

    new, grown = move(tf.constant(joining))
    np.testing.assert_array_equal(new, masks)
    np.testing.assert_array_equal(grown, np.zeros_like(masks))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], [], []), "for each of one or more layers.*0 masks"),
        (([[1]], [[1], [1]], [[1]]), "1 masks, 2 drop_scores"),
        (([[1]], [[1]], 1), "grow_scores must be a sequence"),
        (([[1, 0]], [[1, 0]], [[1]]), r"one shape.*\(2,\), \(2,\) and \(1,\)"),
    ],
)
def test_bad_layers(arguments, message):
    with pytest.raises(ValueError, match=message):
        topology.update_masks(*arguments, drop_fraction=0.5)


@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [0.5, 1], [-1, 1], 3])
def test_bad_grow_counts(counts):
    with pytest.raises(ValueError, match="grow_counts"):
        topology.update_masks(
            [[1, 0], [1, 0]],
            [[1, 0], [1, 0]],
            [[1, 0], [1, 0]],
            drop_fraction=0.5,
            grow_counts=lambda dropped, free: counts,
        )


def test_each_layer_may_drop_a_fraction_of_its_own():
    """1 of 2 and none of 2 are dropped; grow scores decide what grows."""
    new, grown = topology.update_masks(
        [[1, 1, 0], [1, 1, 0]],
        [[3, 1, 0], [3, 1, 0]],
        [[0, 0, 5], [0, 0, 5]],
        drop_fraction=[0.5, 0.0],
    )
    assert [m.numpy().tolist() for m in new] == [[1, 0, 1], [1, 1, 0]]
    assert [m.numpy().tolist() for m in grown] == [[0, 0, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match="1 masks.*0.5, 0.1"):
        topology.update_masks(
            [[1, 0]], [[1, 0]], [[0, 1]], drop_fraction=[0.5, 0.1]
        )
