"""Patterns: by hand, by brute force, by invariants, and by other libraries."""

import importlib.util
import itertools
import math
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from support.patterns import PATTERNS, brute_force, group_counts

import rigl_keras
from rigl_keras import topology
from rigl_keras.conventions import REPORT
from rigl_keras.layouts import Axes
from rigl_keras.masking.drawing import draw_mask
from rigl_keras.patterns import (
    NM,
    Blocks,
    Element,
    FanIn,
    Kernel,
    as_pattern,
)
from rigl_keras.ranking import highest_of_all


def entries(shape):
    """Returns a tensor of flat indices."""
    return np.arange(math.prod(shape)).reshape(shape)


# The weights that compete.


def test_groups_of_n_of_m_run_along_the_inputs():
    """They run along axis 2 of a convolution, axis 0 of Dense, the last axis
    of a transposed convolution, and the inputs of an EinsumDense in order."""
    dense = NM(2, 4).layout((8, 3))
    assert (dense.groups, dense.size, dense.fixed) == (6, 4, 2)
    # Flat index of (i, o) is 3 i + o.
    np.testing.assert_array_equal(
        dense.grouped(entries((8, 3)))[:3],
        [[0, 3, 6, 9], [12, 15, 18, 21], [1, 4, 7, 10]],
    )
    kernel = entries((2, 1, 4, 3))
    conv = NM(1, 2).layout(kernel.shape)
    for row in conv.grouped(kernel):
        at = np.array(np.unravel_index(row, kernel.shape))
        assert (at[[0, 1, 3]] == at[[0, 1, 3], :1]).all()  # h, w, output
        assert list(at[2]) in ([0, 1], [2, 3])
    transposed = NM(2, 4).layout(Axes((3, 3, 5, 4), (3,), (2,), True))
    np.testing.assert_array_equal(
        transposed.grouped(entries((3, 3, 5, 4)))[0], [0, 1, 2, 3]
    )
    # (heads, size, outputs): heads and size are inputs.
    heads = NM(2, 4).layout(Axes((2, 2, 3), (0, 1), (2,), False))
    np.testing.assert_array_equal(
        heads.grouped(entries((2, 2, 3)))[0], [0, 3, 6, 9]
    )


def test_groups_of_a_fan_in_are_the_inputs_of_a_unit():
    conv = FanIn().layout((2, 1, 2, 3))
    assert (conv.groups, conv.size) == (3, 4)
    np.testing.assert_array_equal(
        conv.grouped(entries((2, 1, 2, 3)))[1], [1, 4, 7, 10]
    )
    # A unit is a pair of channel and multiplier of a depthwise kernel.
    depthwise = FanIn().layout(Axes((3, 3, 4, 2), (2,), (2, 3), True))
    assert (depthwise.groups, depthwise.size) == (8, 9)


@pytest.mark.parametrize(
    "conventions, drops, grows",
    [
        (rigl_keras.ORIGINAL, [2, 1], [3, 2]),
        (rigl_keras.REPORT, [1, 1], [0, 2]),
    ],
)
def test_what_a_kernel_is_worth(conventions, drops, grows):
    """Weights (3, -1) and (1, 1): mean |w| is 2 and 1, |mean w| 1 and 1."""
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), keras.layers.Conv2D(2, (1, 2))]
    )
    model = rigl_keras.sparsify(model, 1.0, granularity="kernel")
    (layer,) = rigl_keras.masked_layers(model)
    layer.kernel.assign([[[[3.0, 1.0]], [[-1.0, 1.0]]]])
    gradient = tf.constant([[[[3.0, -2.0]], [[-3.0, -2.0]]]])
    rigl = rigl_keras.RigL(conventions=conventions)
    step = tf.constant(100, tf.int64)
    for score, want in ((rigl.drop_scores, drops), (rigl.grow_scores, grows)):
        worth = score(layer, gradient, step)
        assert worth.shape == layer.kernel.shape
        np.testing.assert_array_equal(layer.by_unit(worth), [want])


def test_blocks_by_hand():
    """4 x 2 in blocks of 2 x 2: means 2 and 3, so the lower one stays."""
    layout = Blocks(2, 2).layout((4, 2))
    worth = layout.by_unit(tf.constant([[4.0, 2], [1, 1], [3, 3], [3, 3]]))
    np.testing.assert_array_equal(worth, [[[2.0], [3.0]]])
    stays = topology.select_highest(
        worth, 1, among=tf.ones_like(worth, tf.bool), layout=layout
    )
    np.testing.assert_array_equal(
        layout.by_element(stays), [[0, 0], [0, 0], [1, 1], [1, 1]]
    )


def test_ragged_blocks_average_what_is_there():
    kernel = np.array([[1.0, 1, 5], [1, 1, 7], [2, 4, 9]], np.float32)
    layout = Blocks(2, 2).layout((3, 3))
    assert (layout.groups, layout.size) == (1, 4)
    np.testing.assert_array_equal(
        layout.by_unit(tf.constant(kernel)), [[[1, 6], [3, 9]]]
    )
    whole = layout.by_element(tf.constant([[[1, 2], [3, 4]]]))
    np.testing.assert_array_equal(whole, [[1, 1, 2], [1, 1, 2], [3, 3, 4]])
    # Each position of a convolution has its own blocks.
    conv = Blocks(2, 4).layout((3, 1, 5, 4))
    assert conv.unit_shape == (3, 3, 1) and conv.size == 9
    half = layout.by_unit(tf.cast(kernel, tf.float16))
    assert half.dtype == tf.float16


@pytest.mark.parametrize(
    "name, pattern",
    [
        ("element", Element()),
        ("kernel", Kernel()),
        ("fan_in", FanIn()),
        ("2:4", NM(2, 4)),
        ("1:16", NM(1, 16)),
        ("4x16", Blocks(4, 16)),
    ],
)
def test_names(name, pattern):
    assert as_pattern(name) == pattern == as_pattern(pattern)
    assert pattern.name == name == str(pattern)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: as_pattern("channel"), "granularity must be one of"),
        (lambda: as_pattern("2:4:8"), "granularity must be one of"),
        (lambda: as_pattern("2 : 4"), "granularity must be one of"),
        (lambda: as_pattern(None), "granularity must be one of"),
        (lambda: as_pattern("4:4"), "n must be below m. Received: n=4, m=4"),
        (lambda: as_pattern("0:4"), "n must be an int of at least 1"),
        (lambda: NM(2.0, 4), "n must be an int"),
        (lambda: Blocks(0, 4), "rows must be an int of at least 1"),
        (lambda: NM(2, 4).layout((3, 8)), "3 inputs are not a multiple of 4"),
        (
            lambda: Blocks(2, 2).layout(Axes((3, 3, 4, 1), (2,), (2, 3), True)),
            "no matrix of inputs and outputs",
        ),
        (
            lambda: NM(2, 4).layout(Axes((3, 3, 4, 1), (2,), (2, 3), True)),
            "each unit reads a single channel",
        ),
        (lambda: FanIn().layout((3,)), "at least two axes"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Updates: mask, drop scores, grow scores, fraction, shape and pattern -> new
# mask.
TABLE = {
    "in its group the weakest makes room for the strongest": (
        [1, 1, 0, 0], [5, 1, 0, 0], [0, 0, 2, 7], 0.5, (4, 1), NM(2, 4),
        [1, 0, 0, 1],
    ),
    "what leaves a group is grown there, however weak": (
        # Groups are columns. Two of 4 active ones, in the first, are dropped.
        [[1, 1], [1, 0], [0, 1], [0, 0]], [[1, 9], [2, 0], [0, 8], [0, 0]],
        [[0, 0], [0, 90], [3, 0], [4, 80]], 0.5, (4, 2), NM(2, 4),
        [[0, 1], [0, 0], [1, 1], [1, 0]],
    ),
    "each unit keeps its fan-in": (
        [[1, 0], [1, 1], [0, 1]], [[5, 0], [1, 2], [0, 7]],
        [[0, 3], [8, 1], [9, 0]], 0.5, (3, 2), FanIn(),
        [[1, 1], [0, 0], [1, 1]],
    ),
    "of equals the first in the group": (
        [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 2], 0.5, (4, 1), NM(2, 4),
        [0, 1, 1, 0],
    ),
    "one that left joins again": (
        [1, 1, 0, 0], [3, 1, 0, 0], [0, 9, 2, 5], 0.5, (4, 1), NM(2, 4),
        [1, 1, 0, 0],
    ),
    "all of a group": (
        [1, 1, 1, 1], [3, 1, 2, 5], [0, 9, 2, 5], 0.5, (4, 1), NM(2, 4),
        [1, 1, 1, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_table(row):
    *arguments, fraction, shape, pattern, want = row
    mask, drops, grows, want = (
        np.reshape(np.array(a, np.float32), shape) for a in (*arguments, want)
    )
    new, grown = topology.drop_and_grow(
        mask,
        drops,
        grows,
        drop_fraction=fraction,
        layout=pattern.layout(shape),
    )
    np.testing.assert_array_equal(new, want)
    np.testing.assert_array_equal(grown, (want == 1) & (mask == 0))


def test_another_number_is_shared_out_evenly():
    """Two of three units keep their number, and all have the same."""
    mask = np.array([[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]])
    drops = np.array([[9, 9, 1], [8, 8, 2], [0, 0, 0], [0, 0, 0]])
    grows = np.array([[0, 0, 3], [0, 0, 4], [5, 7, 9], [6, 6, 1]])

    def new_mask(grow_count, pattern=None, fraction=0.34):
        return topology.drop_and_grow(
            mask,
            drops,
            grows,
            drop_fraction=fraction,
            grow_count=grow_count,
            layout=(pattern or FanIn()).layout(mask.shape),
        )[0].numpy()

    # Two of the last unit are dropped. With the same number:
    np.testing.assert_array_equal(
        new_mask(2), [[1, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0]]
    )
    # 4 + 5 are three for each unit; 4 + 4 are rounded to three, too.
    for count in (5, 4):
        np.testing.assert_array_equal(
            new_mask(count), [[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]]
        )
    # 4 + 0 are rounded to one for each: the weaker of two is dropped.
    np.testing.assert_array_equal(
        new_mask(0), [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    )
    # 2:4 stays 2 of 4, whatever a method requests.
    np.testing.assert_array_equal(new_mask(5, NM(2, 4)), new_mask(2))


def test_conventions_that_lose_connections_are_refused():
    mask = np.array([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="but groups keep their numbers"):
        topology.drop_and_grow(
            mask,
            mask,
            mask,
            drop_fraction=0.5,
            layout=FanIn().layout((2, 2)),
            conventions=REPORT,
        )
    for wrong, message in (
        (dict(layouts=[]), "layout for each of 1 masks"),
        (dict(layouts=[FanIn().layout((4, 2))]), r"shape \(4, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            topology.update_masks(
                [mask], [mask], [mask], drop_fraction=0.5, **wrong
            )


SHAPES = {
    "dense": Axes.of((8, 6)),
    "conv": Axes.of((2, 2, 4, 3)),
    "ragged": Axes.of((3, 12, 5)),
    "depthwise": Axes((2, 3, 4, 2), (2,), (2, 3), True),
    "transposed": Axes((2, 2, 5, 8), (3,), (2,), True),
    "einsum": Axes((2, 4, 3, 2), (0, 1), (2, 3), False),
}


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    axes=st.sampled_from(list(SHAPES.values())),
    share=st.floats(0, 1),
    fraction=st.floats(0, 1),
    few=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_drawn_and_updated_masks_keep_the_pattern(
    name, axes, share, fraction, few, seed
):
    """They keep it exactly, and agree with brute force."""
    pattern = PATTERNS[name]
    if pattern.why_not(axes):
        return
    layout = pattern.layout(axes)
    count = layout.fixed or round(share * layout.size)
    mask = draw_mask(layout, count, seed)
    np.testing.assert_array_equal(mask, draw_mask(layout, count, seed))
    assert layout.breach(mask) is None
    assert set(group_counts(pattern, axes, mask)) == {count}
    draw = np.random.default_rng(seed)
    for _ in range(2):
        scores = [
            draw.integers(0, 3, axes.shape).astype(np.float32)
            if few  # for many ties
            else draw.standard_normal(axes.shape).astype(np.float32)
            for _ in range(2)
        ]
        drops, grows = (layout.by_unit(tf.constant(s)) for s in scores)
        units = layout.units(tf.constant(mask))
        new, grown = topology.drop_and_grow(
            units, drops, grows, drop_fraction=fraction, layout=layout
        )
        want = brute_force(
            layout, *(t.numpy() for t in (units, drops, grows)), fraction
        )
        np.testing.assert_array_equal(new, want)
        np.testing.assert_array_equal(grown, want & ~units.numpy())
        mask = layout.by_element(new).numpy()
        assert layout.breach(mask) is None
        assert set(group_counts(pattern, axes, mask)) == {count}


@pytest.mark.parametrize("jit_compile", [False, True])
def test_graph_and_xla_agree_with_eager(jit_compile):
    """All patterns in one update, as for a model with several."""
    axes = SHAPES["conv"]
    layouts = [p.layout(axes) for p in PATTERNS.values()]
    draw = np.random.default_rng(0)
    masks, drops, grows = [], [], []
    for layout in layouts:
        mask = draw_mask(layout, layout.fixed or layout.size // 2, 3)
        masks.append(layout.units(tf.constant(mask)))
        drops.append(draw.standard_normal(layout.unit_shape))
        grows.append(draw.standard_normal(layout.unit_shape))

    def update(masks, drops, grows):
        return topology.update_masks(
            masks, drops, grows, drop_fraction=0.4, layouts=layouts
        )

    want = update(masks, drops, grows)
    got = tf.function(update, jit_compile=jit_compile)(masks, drops, grows)
    for ours, theirs in zip(
        itertools.chain(*got), itertools.chain(*want), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_number_for_each_group():
    """Custom methods may select a different count for each unit."""
    layout = FanIn().layout((3, 2))
    scores = [[1.0, 6], [2, 5], [3, 4]]
    everything = tf.fill([3, 2], True)
    np.testing.assert_array_equal(
        topology.select_highest(
            scores, [1, 2], among=everything, layout=layout
        ),
        [[0, 1], [0, 1], [1, 0]],
    )
    for count, message in (
        ([1, 2, 3], "one for each of 2 groups"),
        ([1, -1], "one for each of 2 groups"),
        ([0.5, 1], "one for each of 2 groups"),
        (-1, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            topology.select_highest(
                scores, count, among=everything, layout=layout
            )


def test_one_threshold_for_layers_of_several_patterns():
    """The first layer keeps 3 of 8, so its units keep 3 / 2, rounded to 2."""
    layouts = [
        FanIn().layout((2, 2)),
        Blocks(2, 2).layout((2, 4)),
        Element().layout((2, 2)),
    ]
    worth = [
        tf.constant([[9.0, 9], [9, 0.0]]),
        tf.constant([[[4.0, 1.0]]]),
        tf.constant([[8.0, 2.0], [0, 0]]),
    ]
    among = [tf.ones_like(w, tf.bool) for w in worth]
    kept = highest_of_all(worth, 8, among=among, layouts=layouts)
    np.testing.assert_array_equal(kept[0], [[1, 1], [1, 1]])
    np.testing.assert_array_equal(kept[1], [[[1, 0]]])
    np.testing.assert_array_equal(kept[2], [[1, 0], [0, 0]])
    # A block at the threshold is only partly above it, and is dropped.
    kept = highest_of_all(worth, 7, among=among, layouts=layouts)
    assert not kept[1].numpy().any()
    # A unit keeps at least one connection.
    none = highest_of_all(worth, 0, among=among, layouts=layouts)
    np.testing.assert_array_equal(none[0], [[1, 1], [0, 0]])
    assert not none[1].numpy().any() and not none[2].numpy().any()


# The tables of google-research/jaxpruner, jaxpruner/mask_calculator_test.py.
# Its axis is the one along which groups run, and its sparsity the removed
# fraction. It pools blocks of kernels with three or more axes differently, and
# keeps the later of equal weights in n:m.
SCORES = [
    [
        [0.69, 0.37, 0.96, 0.81],
        [0.79, 0.55, 0.88, 0.53],
        [0.66, 0.88, 0.4, 0.83],
        [0.13, 0.8, 0.91, 0.96],
    ],
    [
        [0.34, 0.17, 0.07, 0.74],
        [0.13, 0.13, 0.83, 0.76],
        [0.13, 0.92, 0.25, 0.75],
        [0.37, 0.42, 0.65, 0.46],
    ],
]
LAST_AXIS = [
    [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]],
    [[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1]],
]
MIDDLE_AXIS = [
    [[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]],
    [[1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]],
]
FLAT = [0.69, 0.37, 0.96, 0.81, 0.79, 0.55, 0.88, 0.53]
JAXPRUNER = {
    "2:4 along inputs": (SCORES, NM(2, 4), Axes.of((2, 4, 4)), 2, MIDDLE_AXIS),
    "2:4 along the last axis": (
        SCORES, NM(2, 4), Axes((2, 4, 4), (2,), (1,), True), 2, LAST_AXIS,
    ),
    "unstructured": (
        SCORES, Element(), Axes.of((2, 4, 4)), 6,
        [
            [[0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]],
            [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
        ],
    ),
    "unstructured, ties": (
        [[1, 0.5, 0.3, 0.2, 1, 1.5, 1.8, 2.0, 1, 1]] * 2, Element(),
        Axes.of((2, 10)), 10,
        [[1, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]],
    ),
    "blocks of 2 x 3, ragged": (
        np.reshape([[FLAT, [0.66, 0.88, 0.4, 0.83, 0.13, 0.8, 0.91, 0.96]],
                    np.reshape(SCORES[1], (2, 8))], (4, 8)),
        Blocks(2, 3), Axes.of((4, 8)), 5,
        [[1] * 8] * 2 + [[0, 0, 0, 1, 1, 1, 1, 1]] * 2,
    ),
    "blocks of 1 x 3, ragged": (
        [FLAT], Blocks(1, 3), Axes.of((1, 8)), 2, [[0, 0, 0, 1, 1, 1, 1, 1]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", JAXPRUNER.values(), ids=JAXPRUNER)
def test_tables_of_jaxpruner(row):
    scores, pattern, axes, count, want = row
    layout = pattern.layout(axes)
    worth = layout.by_unit(tf.constant(scores, tf.float32))
    kept = topology.select_highest(
        worth, count, among=tf.ones_like(worth, tf.bool), layout=layout
    )
    np.testing.assert_array_equal(layout.by_element(kept), want)


@pytest.fixture(scope="module")
def tfmot_utils():
    """Returns tfmot's mask module, from its file: the package needs Keras 2."""
    spec = importlib.util.find_spec("tensorflow_model_optimization")
    if spec is None or spec.origin is None:
        pytest.skip("tfmot is not installed")
    path = pathlib.Path(spec.origin).parent.joinpath(
        "python", "core", "sparsity", "keras", "pruning_utils.py"
    )
    found = importlib.util.spec_from_file_location("tfmot_utils", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", [(8, 5), (3, 2, 8, 4)])
@pytest.mark.parametrize("zeros, size", [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_same_n_of_m_as_tfmot(tfmot_utils, shape, zeros, size):
    """tfmot zeroes m of each n along the inputs, for dense and convolutions."""
    weights = tf.constant(
        np.random.default_rng(0).standard_normal(shape), tf.float32
    )
    theirs = tfmot_utils.m_by_n_sparsity_mask_prepare(
        tfmot_utils.generate_m_by_n_mask(
            tfmot_utils.weights_rearrange(weights), (zeros, size)
        ),
        weights.shape,
    )
    pattern = NM(size - zeros, size)
    layout = pattern.layout(shape)
    ours = topology.select_highest(
        tf.abs(weights),
        pattern.n,
        among=tf.fill(shape, True),
        layout=layout,
    )
    np.testing.assert_array_equal(ours, theirs)
    assert tfmot_utils.is_pruned_m_by_n(
        weights * tf.cast(ours, tf.float32), (zeros, size)
    )


@pytest.mark.parametrize("block, shape", [((2, 3), (6, 9)), ((1, 4), (5, 8))])
def test_same_blocks_as_tfmot(tfmot_utils, block, shape):
    """Values of blocks and expanded masks agree. tfmot pads blocks at an edge
    on both sides."""
    weights = np.random.default_rng(1).standard_normal(shape)
    layout = Blocks(*block).layout(shape)
    worth = layout.by_unit(tf.constant(np.abs(weights), tf.float32))
    theirs = tfmot_utils.factorized_pool(
        tf.constant(np.abs(weights), tf.float32),
        window_shape=block,
        pooling_type="AVG",
        strides=block,
        padding="SAME",
    )
    np.testing.assert_allclose(worth[0], theirs, rtol=1e-6)
    kept = topology.select_highest(
        worth, layout.size // 2, among=tf.ones_like(worth, tf.bool)
    )
    expanded = tfmot_utils.expand_tensor(tf.cast(kept[0], tf.int32), block)
    np.testing.assert_array_equal(layout.by_element(kept), expanded)
