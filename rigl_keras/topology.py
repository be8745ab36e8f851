"""RigL's step: drop the worst connections, grow the best.

`update_masks` is the whole algorithm (Algorithm 1 of the paper) for all layers
of a model at once, and what the callbacks run. `drop_and_grow` does the same
for one kernel. Below them are the two halves, and a search for the highest of
many scores in linear time. All work eagerly, in a `tf.function` and under XLA.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import tensorflow as tf

from rigl_keras._selecting import count_rows, highest_of_rows
from rigl_keras._tensor_checks import (
    Number,
    TensorLike,
    as_mask,
    as_scores,
    as_tensor,
    check_defined,
    check_one_shape,
    checked_count,
    checked_fraction,
    count_nan,
    count_true,
    no_nan_within,
)
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions
from rigl_keras.layouts import Layout

__all__ = [
    "drop",
    "drop_and_grow",
    "drop_count",
    "grow",
    "layer_drop_fractions",
    "select_highest",
    "update_masks",
]


def update_masks(
    masks: Sequence,
    drop_scores: Sequence,
    grow_scores: Sequence,
    *,
    drop_fraction: Number | Sequence,
    shares: TensorLike | None = None,
    grow_counts: Callable[[tf.Tensor, tf.Tensor], TensorLike] | None = None,
    layouts: Sequence[Layout | None] | None = None,
    conventions: Conventions = ORIGINAL,
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Moves a fraction of the connections of every layer from worst to best.

    1. Drop: of the n active connections of a layer, the
       k = floor(n x drop_fraction) with the lowest `drop_scores` leave.
    2. Share out: each layer grows as many as it dropped, or what `grow_counts`
       returns.
    3. Grow: that many inactive connections, with the highest `grow_scores`,
       join. A connection that has just left may join again.

    A layer whose connections compete in groups (`patterns`) drops as above, and
    then grows in each group as many as left it. If `grow_counts` returns
    another number, all groups keep the same number, the nearest possible, with
    the highest scores. A pattern that fixes the number, such as 2:4, keeps it.

    On ties, the lower flat index leaves or joins first. Evci et al., 2020,
    arXiv:1911.11134, Algorithm 1 and section 3, drop and grow criteria. Step 2
    is where SNFS, RigL-SG and RigL-SM move connections between layers
    (`redistribution.grow_counts`).

    Args:
        masks: For each layer a tensor of zeros and ones (or bools), of any
            shape.
        drop_scores: For each layer a tensor with its mask's shape. Used where
            the mask is 1.
        grow_scores: For each layer a tensor with its mask's shape. Used where
            the mask is 0 after the drop.
        drop_fraction: Fraction of the active connections, in [0, 1], a
            number or a scalar float tensor, or a list of one for each layer.
        shares: Decides which layers are spared (`layer_drop_fractions`).
        grow_counts: Function of two int32 vectors: how many connections each
            layer dropped, and how many of its entries are inactive then. It
            returns a whole number for each layer, how many to grow. None: as
            many as it dropped.
        layouts: For each layer the groups within which its connections compete.
            Masks and scores then have its `unit_shape`. None, also for one of
            them: all connections of a layer compete.
        conventions: The `REPORT` conventions change rounding, ranking and
            what counts as grown.

    Returns:
        `(new_masks, grown)`, two lists of tensors with the shapes and dtypes of
        `masks`. `grown` is 1 where the new mask is 1 and the old one 0 (under
        `REPORT` also where a connection left and joined again, as its weight
        restarts at zero). A graph cannot raise: there a NaN score leaves all
        masks unchanged and `grown` empty.

    Raises:
        ValueError: There is not one mask and one score of each kind for every
            layer, shapes differ, an argument is out of range, a score that is
            used is NaN (when called eagerly), or the conventions break the
            groups of a layer.

    Example:

    The first layer drops its second connection and grows its fourth; the
    second layer drops floor(1 x 0.5) = 0.

    >>> new, grown = update_masks(
    ...     [[1, 1, 0, 0], [1, 0]],
    ...     [[3, 1, 0, 0], [7, 0]],
    ...     [[0, 0, 2, 5], [0, 9]],
    ...     drop_fraction=0.5)
    >>> [mask.numpy().tolist() for mask in new]
    [[1, 0, 0, 1], [1, 0]]
    >>> [mask.numpy().tolist() for mask in grown]
    [[0, 0, 0, 1], [0, 0]]
    """
    check_conventions(conventions)
    if grow_counts is not None and not callable(grow_counts):
        raise ValueError(
            "grow_counts must be a function of the connections dropped and of "
            f"the entries free. Received: grow_counts={grow_counts!r}."
        )
    dtypes, active, drop_scores, grow_scores = _checked_layers(
        masks, drop_scores, grow_scores
    )
    of_layers = _checked_layouts(layouts, active, conventions)
    fractions = layer_drop_fractions(
        active, shares, drop_fraction, conventions=conventions
    )
    kept = [
        _drop(mask, scores, fraction, conventions)
        for mask, scores, fraction in _layers(active, drop_scores, fractions)
    ]

    left = [mask & ~stays for mask, stays in _layers(active, kept)]
    dropped = tf.stack([count_true(leaves) for leaves in left])
    free = tf.stack([count_true(~stays) for stays in kept])
    counts = dropped if grow_counts is None else grow_counts(dropped, free)
    counts = _checked_counts(counts, len(active))

    moved = [
        _grow(mask, stays, grows, count, conventions)
        if layout is None or not layout.is_apart
        else _grow_groups(mask, stays, drops, grows, count, layout, conventions)
        for mask, stays, drops, grows, count, layout in _layers(
            active, kept, drop_scores, grow_scores, counts, of_layers
        )
    ]
    defined = _check_ranked(active, drop_scores, kept, grow_scores)
    new_masks = [
        tf.cast(tf.where(defined, new, mask), dtype)
        for (new, _), mask, dtype in _layers(moved, active, dtypes)
    ]
    grown = [
        tf.cast(joined & defined, dtype)
        for (_, joined), dtype in _layers(moved, dtypes)
    ]
    return new_masks, grown


def drop_and_grow(
    mask: TensorLike,
    drop_scores: TensorLike,
    grow_scores: TensorLike,
    *,
    drop_fraction: Number,
    grow_count: Number | None = None,
    layout: Layout | None = None,
    conventions: Conventions = ORIGINAL,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Moves a fraction of one kernel's connections from worst to best.

    It is `update_masks` for a single layer.

    Args:
        mask: Tensor of zeros and ones (or bools), any shape.
        drop_scores: Tensor of the same shape. Used where `mask` is 1.
        grow_scores: Tensor of the same shape. Used where the mask is 0 after
            the drop.
        drop_fraction: Fraction of the active connections, in [0, 1], a
            number or a scalar float tensor.
        grow_count: How many connections join, an integer scalar. None: as
            many as leave.
        layout: The groups within which connections compete, as in
            `update_masks`. None: all compete.
        conventions: As in `update_masks`.

    Returns:
        `(new_mask, grown)`, both of `mask`'s shape and dtype, as in
        `update_masks`. Under `ORIGINAL`, without `grow_count`, `new_mask` has
        as many ones as `mask`.

    Raises:
        ValueError: As in `update_masks`.

    Example:

    >>> new, grown = drop_and_grow(
    ...     [1, 1, 0, 0], [3, 1, 0, 0], [0, 0, 2, 5], drop_fraction=0.5)
    >>> new.numpy(), grown.numpy()
    (array([1, 0, 0, 1], dtype=int32), array([0, 0, 0, 1], dtype=int32))
    """
    if grow_count is not None:
        grow_count = checked_count("grow_count", grow_count)
    (new,), (grown,) = update_masks(
        [mask],
        [drop_scores],
        [grow_scores],
        drop_fraction=drop_fraction,
        grow_counts=None if grow_count is None else lambda *_: [grow_count],
        layouts=None if layout is None else [layout],
        conventions=conventions,
    )
    return new, grown


def _layers(*of_each):
    return zip(*of_each, strict=True)


def _checked_layers(masks, drop_scores, grow_scores):
    """Returns the dtypes of masks, and masks and scores as tensors."""
    masks = _as_list("masks", masks)
    drop_scores = _as_list("drop_scores", drop_scores)
    grow_scores = _as_list("grow_scores", grow_scores)
    numbers = [len(each) for each in (masks, drop_scores, grow_scores)]
    if len(set(numbers)) > 1 or not masks:
        raise ValueError(
            "There must be a mask, drop scores and grow scores for each of "
            "one or more layers. Received: {} masks, {} drop_scores and {} "
            "grow_scores.".format(*numbers)
        )
    masks = [as_tensor("mask", mask) for mask in masks]
    active = [as_mask("mask", mask) for mask in masks]
    drop_scores = [as_scores("drop_scores", scores) for scores in drop_scores]
    grow_scores = [as_scores("grow_scores", scores) for scores in grow_scores]
    for mask, drops, grows in _layers(active, drop_scores, grow_scores):
        check_one_shape(mask=mask, drop_scores=drops, grow_scores=grows)
    return [mask.dtype for mask in masks], active, drop_scores, grow_scores


def _checked_counts(counts, layers):
    checked = [
        checked_count("grow_counts", count)
        for count in _as_list("grow_counts", counts)
    ]
    if len(checked) != layers:
        raise ValueError(
            f"grow_counts must return a count for each of {layers} layers. "
            f"Received: {counts!r}."
        )
    return checked


def _checked_layouts(layouts, masks, conventions):
    """Returns a layout, or None, for each mask."""
    layouts = [None] * len(masks) if layouts is None else list(layouts)
    if len(layouts) != len(masks):
        raise ValueError(
            f"There must be a layout for each of {len(masks)} masks. Received: "
            f"{len(layouts)} layouts."
        )
    for layout, mask in _layers(layouts, masks):
        if layout is None:
            continue
        _check_units(layout, mask)
        if layout.is_apart and conventions.grow_ranking != "inactive":
            raise ValueError(
                "With grow_ranking='all', fewer connections may grow than were "
                "dropped, but groups keep their numbers. Received: "
                f"grow_ranking={conventions.grow_ranking!r} with "
                f"{layout.groups} groups of a layer. Pass conventions with "
                "grow_ranking='inactive', or granularity='element'."
            )
    return layouts


def _check_units(layout, tensor):
    if not tensor.shape.is_compatible_with(layout.unit_shape):
        raise ValueError(
            "Masks and scores must have a value for each unit of the layout, "
            f"shape {layout.unit_shape}. Received: shape {tensor.shape}."
        )


def _as_list(name, of_each):
    """Returns a sequence with an entry for each layer as a list."""
    if tf.is_tensor(of_each) and of_each.shape.rank:
        return tf.unstack(of_each)
    try:
        return list(of_each)
    except TypeError as error:
        raise ValueError(
            f"{name} must be a sequence, an entry for each layer. Received: "
            f"{name}={of_each!r}."
        ) from error


def _check_ranked(active, drop_scores, kept, grow_scores):
    """Returns whether no score that is used is NaN; raises when eager."""
    read = {
        "active": list(_layers(drop_scores, active)),
        "inactive": [(s, ~stays) for s, stays in _layers(grow_scores, kept)],
    }
    defined = tf.reduce_all(
        [no_nan_within(*layer) for layers in read.values() for layer in layers]
    )
    if tf.executing_eagerly() and not bool(defined):
        nan_drops, nan_grows = (
            f"{sum(count_nan(scores, where) for scores, where in layers)} of "
            f"{sum(int(count_true(where)) for _, where in layers)} {entries}"
            for entries, layers in read.items()
        )
        raise ValueError(
            "NaN scores cannot be ranked; the masks are unchanged. NaN drop "
            f"scores: {nan_drops}, NaN grow scores: {nan_grows}. A NaN "
            "gradient means that training has diverged: lower the learning "
            "rate or clip gradients."
        )
    return defined


def drop(
    active: TensorLike,
    scores: TensorLike,
    drop_fraction: Number,
    *,
    conventions: Conventions = ORIGINAL,
) -> tf.Tensor:
    """Returns the connections that stay when the worst leave.

    The first step of `update_masks`, for one layer.

    Args:
        active: Bool tensor, the mask.
        scores: Float tensor of the same shape, without NaN.
        drop_fraction: Fraction of the active connections, in [0, 1].
        conventions: `drop_rounding` and `drop_ranking` apply.

    Returns:
        Bool tensor, the part of `active` that stays.

    Raises:
        ValueError: An argument is out of range.
    """
    check_conventions(conventions)
    active = as_mask("active", active)
    scores = as_scores("scores", scores)
    check_one_shape(active=active, scores=scores)
    check_defined("scores", scores, active)
    drop_fraction = checked_fraction(drop_fraction)
    return _drop(active, scores, drop_fraction, conventions)


def _drop(active, scores, drop_fraction, conventions):
    count = _drop_count(active, drop_fraction, conventions)
    if conventions.drop_ranking == "active":
        leaves = _select_highest(-scores, count, active)
        return active & tf.logical_not(leaves)
    ranked = tf.where(active, scores, tf.zeros_like(scores))
    count += count_true(~active)
    leaves = _select_highest(-ranked, count, tf.ones_like(active))
    return active & tf.logical_not(leaves)


def grow(
    active: TensorLike,
    kept: TensorLike,
    scores: TensorLike,
    count: Number,
    *,
    conventions: Conventions = ORIGINAL,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the mask with the best connections added, and which are new.

    The last step of `update_masks`, for one layer.

    Args:
        active: Bool tensor, the mask before the drop.
        kept: Bool tensor, the part of it that stayed.
        scores: Float tensor of the same shape, without NaN.
        count: How many connections join, an integer scalar.
        conventions: `grow_ranking` and `regrown_value` apply.

    Returns:
        `(new, grown)`, bool tensors as in `drop_and_grow`.

    Raises:
        ValueError: An argument is out of range.
    """
    check_conventions(conventions)
    active, kept = as_mask("active", active), as_mask("kept", kept)
    scores = as_scores("scores", scores)
    check_one_shape(active=active, kept=kept, scores=scores)
    check_defined("scores", scores, tf.logical_not(kept))
    count = checked_count("count", count)
    return _grow(active, kept, scores, count, conventions)


def _grow(active, kept, scores, count, conventions):
    if conventions.grow_ranking == "inactive":
        joined = _select_highest(scores, count, ~kept)
    else:
        ranked = tf.where(kept, tf.zeros_like(scores), scores)
        joined = _select_highest(ranked, count, tf.ones_like(kept))
    restarts_at_zero = conventions.regrown_value == "zero"
    return kept | joined, joined if restarts_at_zero else joined & ~active


def _grow_groups(
    active, kept, drop_scores, grow_scores, count, layout, conventions
):
    """Returns the result of `_grow` with equal numbers in all groups."""
    before, stays, drops, grows = (
        layout.grouped(t) for t in (active, kept, drop_scores, grow_scores)
    )
    wanted = count_rows(before)
    if layout.fixed is None:
        remains = count_true(stays)
        # If the count does not change, groups keep their numbers unrounded.
        each = (2 * (remains + count) + layout.groups) // (2 * layout.groups)
        changes = remains + count != count_true(before)
        wanted = tf.where(changes, each, wanted)
        stays = tf.cond(
            tf.reduce_any(count_rows(stays) > wanted),
            lambda: highest_of_rows(drops, wanted, stays),
            lambda: stays,
        )
    free = tf.logical_not(stays)
    joined = highest_of_rows(grows, wanted - count_rows(stays), free)
    grown = joined
    if conventions.regrown_value != "zero":
        grown = joined & tf.logical_not(before)
    return layout.ungrouped(stays | joined), layout.ungrouped(grown)


def drop_count(
    mask: TensorLike,
    drop_fraction: Number,
    *,
    conventions: Conventions = ORIGINAL,
) -> tf.Tensor:
    """Returns how many connections an update of `mask` drops.

    Args:
        mask: Tensor of zeros and ones (or bools), n of them ones.
        drop_fraction: Fraction of the active connections, in [0, 1].
        conventions: `drop_rounding` rounds n x drop_fraction.

    Returns:
        int32 scalar tensor, at most n.

    Raises:
        ValueError: An argument is out of range.
    """
    check_conventions(conventions)
    drop_fraction = checked_fraction(drop_fraction)
    return _drop_count(as_mask("mask", mask), drop_fraction, conventions)


def _drop_count(active, drop_fraction, conventions):
    exact = tf.cast(count_true(active), tf.float64) * drop_fraction
    rounded = (
        tf.floor(exact)
        if conventions.drop_rounding == "floor"
        else tf.math.ceil(exact)
    )
    return tf.cast(rounded, tf.int32)


def layer_drop_fractions(
    masks: Sequence,
    shares: TensorLike | None,
    drop_fraction: Number | Sequence,
    *,
    conventions: Conventions = ORIGINAL,
) -> list:
    """Returns the fraction that each layer drops.

    It is `drop_fraction`, except that with `spare_dense_layers` a layer of
    sparsity s < 0.2 whose share is more than 1 / layers drops min(s,
    drop_fraction) (the reproduction's `adjust_prune_rate`).

    Args:
        masks: One mask for each layer.
        shares: One number for each layer, adding to 1: its share in the
            redistribution, or of all nonzero weights. Used with
            `spare_dense_layers` only. None: no layer is spared.
        drop_fraction: In [0, 1], or a list of one for each layer.
        conventions: `spare_dense_layers` decides.

    Returns:
        A list of float64 scalars, one for each layer.

    Raises:
        ValueError: An argument is out of range or has the wrong length.
    """
    check_conventions(conventions)
    masks = [as_mask("masks", mask) for mask in masks]
    several = isinstance(drop_fraction, (list, tuple))
    each: Any = drop_fraction if several else [drop_fraction] * len(masks)
    if len(each) != len(masks):
        raise ValueError(
            "drop_fraction must be a number, or a list of one for each of "
            f"{len(masks)} masks. Received: drop_fraction={drop_fraction!r}."
        )
    each = [checked_fraction(fraction) for fraction in each]
    if shares is None or not conventions.spare_dense_layers:
        return each
    received, shares = shares, as_scores("shares", shares)
    if shares.shape.rank != 1 or shares.shape[0] not in (None, len(masks)):
        raise ValueError(
            f"shares must be a number for each of {len(masks)} masks. "
            f"Received: shares={received!r}."
        )
    check_defined("shares", shares, tf.ones_like(shares, tf.bool))
    fractions = []
    for i, mask in enumerate(masks):
        share = shares[i]
        sparsity = 1 - tf.reduce_mean(tf.cast(mask, tf.float64))
        spared = (sparsity < 0.2) & (share > 1 / len(masks))
        fractions.append(
            tf.where(spared, tf.minimum(sparsity, each[i]), each[i])
        )
    return fractions


def select_highest(
    scores: TensorLike,
    count: TensorLike,
    *,
    among: TensorLike,
    layout: Layout | None = None,
) -> tf.Tensor:
    """Returns which `count` entries among the candidates score highest.

    Exactly `count` are selected (all candidates if there are fewer); ties go to
    the lower flat index. It is linear in the number of entries: bisection on
    the bits of the floats finds the score of rank `count`. It costs a sweep per
    bit and, unlike a partial sort, compiles on every device.

    Args:
        scores: Float tensor, without NaN where `among` is True.
        count: Integer scalar, at least 0. With a layout of several groups it
            may be a vector, one number for each group.
        among: Bool tensor of the same shape, True for candidates.
        layout: The groups; `count` is selected in each, and the tensors have
            its `unit_shape`. None: all entries are one group.

    Returns:
        Bool tensor of the same shape.

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> select_highest([1.0, 3.0, 3.0, 2.0], 2, among=[True] * 4).numpy()
    array([False,  True,  True, False])
    """
    scores, among = as_scores("scores", scores), as_mask("among", among)
    check_one_shape(scores=scores, among=among)
    check_defined("scores", scores, among)
    if layout is None:
        whole = checked_count("count", cast(Number, count))
        return _select_highest(scores, whole, among)
    _check_units(layout, scores)
    counts = _group_counts(count, layout)
    return layout.ungrouped(
        highest_of_rows(layout.grouped(scores), counts, layout.grouped(among))
    )


def _group_counts(count, layout):
    """Returns an int32 tensor (groups, 1), or (1, 1) for all groups."""
    counts = as_tensor("count", count)
    if counts.shape.rank == 0:
        return tf.reshape(checked_count("count", counts), [1, 1])
    whole = counts.dtype.is_integer and counts.shape == (layout.groups,)
    if not whole or (
        tf.executing_eagerly() and bool(tf.reduce_any(counts < 0))
    ):
        raise ValueError(
            "count must be a whole number, or one for each of "
            f"{layout.groups} groups. Received: count={count!r}."
        )
    return tf.reshape(tf.cast(counts, tf.int32), [-1, 1])


def _select_highest(scores, count, among):
    rows = [1, -1]
    selected = highest_of_rows(
        tf.reshape(scores, rows), count, tf.reshape(among, rows)
    )
    return tf.reshape(selected, tf.shape(scores))
