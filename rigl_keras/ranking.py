"""Pruning of several layers by one threshold."""

import math
from collections.abc import Sequence

import tensorflow as tf

from rigl_keras._tensor_checks import Number, count_true
from rigl_keras.layouts import Layout
from rigl_keras.topology import select_highest

__all__ = ["highest_at_density", "highest_of_all"]


def highest_of_all(
    scores: Sequence[tf.Tensor],
    count: Number,
    *,
    among: Sequence[tf.Tensor],
    layouts: Sequence[Layout],
) -> list[tf.Tensor]:
    """Returns the units that stay when all layers share one threshold.

    1. A weight has the score of its unit. The `count` weights of highest score
       are selected over all layers together; ties go to earlier weights.
    2. A unit stays if all of its weights are selected. A unit on the threshold
       may be selected in part.
    3. If groups have separate numbers (`patterns.FanIn`), each keeps its
       highest units: the number nearest to what was selected in the layer, at
       least one.

    Args:
        scores: For each layer a float tensor of its `unit_shape`.
        count: How many weights are selected, an integer scalar.
        among: For each layer a bool tensor of the same shape, True for units
            that may stay.
        layouts: The units and groups of each layer.

    Returns:
        For each layer a bool tensor of its `unit_shape`.

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> layouts = [Element().layout((1, 2)), Kernel().layout((2, 1, 1))]
    >>> worth = [tf.constant([[5.0, 1.0]]), tf.constant([[3.0]])]
    >>> everything = [tf.fill([1, 2], True), tf.fill([1, 1], True)]
    >>> [m.numpy().tolist() for m in highest_of_all(
    ...     worth, 2, among=everything, layouts=layouts)]
    [[[True, False]], [[False]]]
    """
    layers = list(zip(scores, among, layouts, strict=True))
    # Layers of a model in mixed precision may differ in type.
    dtype = max((s.dtype for s in scores), key=lambda dtype: dtype.size)
    worth = [tf.cast(layout.by_element(s), dtype) for s, _, layout in layers]
    free = [layout.by_element(may) for _, may, layout in layers]
    selected = select_highest(_joined(worth), count, among=_joined(free))
    parts = tf.split(selected, [math.prod(layout.shape) for layout in layouts])
    return [
        _whole(tf.reshape(part, layout.shape), score, may, layout)
        for part, (score, may, layout) in zip(parts, layers, strict=True)
    ]


def highest_at_density(
    scores: Sequence[tf.Tensor],
    density: tf.Tensor,
    *,
    among: Sequence[tf.Tensor],
    layouts: Sequence[Layout],
    scope: str = "global",
) -> list[tf.Tensor]:
    """Returns the units that stay at a density.

    Args:
        scores, among, layouts: As in `highest_of_all`.
        density: Fraction of all weights, a float scalar.
        scope: `"global"`: one threshold for all layers whose patterns do not
            fix their numbers. `"layer"`: the same density for each layer. A
            group keeps round(density x units), at least one, or the pattern's
            number.

    Returns:
        For each layer a bool tensor of its `unit_shape`.
    """
    shared = [i for i, layout in enumerate(layouts) if layout.fixed is None]
    kept = {}
    if scope == "global" and shared:
        weights = sum(math.prod(layouts[i].shape) for i in shared)
        found = highest_of_all(
            [scores[i] for i in shared],
            _share(density, weights),
            among=[among[i] for i in shared],
            layouts=[layouts[i] for i in shared],
        )
        kept = dict(zip(shared, found, strict=True))
    for i, layout in enumerate(layouts):
        if i not in kept:
            kept[i] = select_highest(
                scores[i],
                tf.maximum(_share(density, layout.size), layout.fixed or 1),
                among=among[i],
                layout=layout,
            )
    return [kept[i] for i in range(len(layouts))]


def _share(density, size):
    # In the precision of the schedule, as tfmot rounds.
    return tf.cast(tf.round(density * tf.cast(size, density.dtype)), tf.int32)


def _joined(tensors):
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)


def _whole(selected, scores, among, layout):
    """Returns the units of a layer that stay, given its selected weights."""
    if not layout.is_apart:
        return tf.logical_not(layout.units(tf.logical_not(selected)))
    groups = layout.groups
    each = (2 * count_true(selected) + groups) // (2 * groups)
    return select_highest(
        scores, tf.maximum(each, 1), among=among, layout=layout
    )
