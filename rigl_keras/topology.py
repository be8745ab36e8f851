"""RigL's step: drop the worst connections, grow the best.

`drop_and_grow` is the whole algorithm, on one kernel. It works eagerly, in a
`tf.function` and under XLA, in time linear in the size of the kernel.
"""

from collections.abc import Sequence

import tensorflow as tf

from rigl_keras.arguments import fraction, integer
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions

__all__ = [
    "as_mask",
    "as_scores",
    "drop",
    "drop_and_grow",
    "drop_count",
    "grow",
    "layer_drop_fractions",
    "select_highest",
]


def drop_and_grow(
    mask,
    drop_scores,
    grow_scores,
    *,
    drop_fraction,
    grow_count=None,
    conventions: Conventions = ORIGINAL,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Moves a fraction of one kernel's connections from worst to best.

    Of n active connections:

    1. the k = floor(n x drop_fraction) of lowest `drop_scores` leave;
    2. as many of those now inactive, of highest `grow_scores`, join. A
       connection that has just left may join again.

    Where scores tie, the lower flat index leaves, or joins, first. Evci et
    al., 2020, arXiv:1911.11134, section 3, drop and grow criteria.

    Args:
        mask: Tensor of zeros and ones (or bools), any shape.
        drop_scores: Tensor of the same shape. Read where `mask` is 1.
        grow_scores: Tensor of the same shape. Read where the mask is 0 after
            the drop.
        drop_fraction: Fraction of the active connections, in [0, 1], a
            number or a scalar float tensor.
        grow_count: How many connections join, an integer scalar. None: as
            many as leave.
        conventions: The `REPORT` conventions change rounding, ranking and
            what counts as grown.

    Returns:
        `(new_mask, grown)`, both of `mask`'s shape and dtype. Under
        `ORIGINAL`, and without a `grow_count`, `new_mask` has as many ones as
        `mask`. `grown` is 1 where a connection starts anew: where `new_mask`
        is 1 and `mask` is 0 (under `REPORT` also where a connection left and
        joined again, as its weight restarts at zero). Within a graph, where
        nothing can be raised, a NaN score leaves the mask unchanged and
        `grown` empty.

    Raises:
        ValueError: The shapes differ, an argument is out of range, or a score
            that is read is NaN (when called eagerly).

    Example:

    >>> new, grown = drop_and_grow(
    ...     [1, 1, 0, 0], [3, 1, 0, 0], [0, 0, 2, 5], drop_fraction=0.5)
    >>> new.numpy(), grown.numpy()
    (array([1, 0, 0, 1], dtype=int32), array([0, 0, 0, 1], dtype=int32))
    """
    check_conventions(conventions)
    mask = _tensor("mask", mask)
    active = as_mask("mask", mask)
    drop_scores = as_scores("drop_scores", drop_scores)
    grow_scores = as_scores("grow_scores", grow_scores)
    _check_one_shape(
        mask=active, drop_scores=drop_scores, grow_scores=grow_scores
    )
    drop_fraction = _checked_fraction(drop_fraction)
    if grow_count is not None:
        grow_count = _checked_count("grow_count", grow_count)
    kept = _drop(active, drop_scores, drop_fraction, conventions)
    if grow_count is None:
        grow_count = _size(active) - _size(kept)
    new, grown = _grow(active, kept, grow_scores, grow_count, conventions)

    defined = _defined(drop_scores, active) & _defined(grow_scores, ~kept)
    if tf.executing_eagerly() and not bool(defined):
        raise ValueError(
            "drop_and_grow cannot rank NaN scores; the mask is unchanged. "
            f"NaN drop scores: {_nans(drop_scores, active)} of "
            f"{int(_size(active))} active, NaN grow scores: "
            f"{_nans(grow_scores, ~kept)} of {int(_size(~kept))} inactive. A "
            "NaN gradient means that training has diverged: lower the "
            "learning rate or clip gradients."
        )
    new, grown = tf.where(defined, new, active), grown & defined
    return tf.cast(new, mask.dtype), tf.cast(grown, mask.dtype)


def drop(
    active, scores, drop_fraction, *, conventions: Conventions = ORIGINAL
) -> tf.Tensor:
    """Returns the connections that stay when the worst ones leave.

    The first half of `drop_and_grow`, alone where what joins depends on what
    all layers have dropped.

    Args:
        active: Bool tensor, the mask.
        scores: Float tensor of the same shape, free of NaN.
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
    _check_one_shape(active=active, scores=scores)
    _check_defined("scores", scores, active)
    drop_fraction = _checked_fraction(drop_fraction)
    return _drop(active, scores, drop_fraction, conventions)


def _drop(active, scores, drop_fraction, conventions):
    count = _drop_count(active, drop_fraction, conventions)
    if conventions.drop_ranking == "active":
        return active & ~_select_highest(-scores, count, active)
    ranked = tf.where(active, scores, tf.zeros_like(scores))
    count += _size(~active)
    everything = tf.ones_like(active)
    return active & ~_select_highest(-ranked, count, everything)


def grow(
    active, kept, scores, count, *, conventions: Conventions = ORIGINAL
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the mask with the best connections added, and which are new.

    The second half of `drop_and_grow`.

    Args:
        active: Bool tensor, the mask before the drop.
        kept: Bool tensor, what of it stayed.
        scores: Float tensor of the same shape, free of NaN.
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
    _check_one_shape(active=active, kept=kept, scores=scores)
    _check_defined("scores", scores, ~kept)
    count = _checked_count("count", count)
    return _grow(active, kept, scores, count, conventions)


def _grow(active, kept, scores, count, conventions):
    if conventions.grow_ranking == "inactive":
        joined = _select_highest(scores, count, ~kept)
    else:
        ranked = tf.where(kept, tf.zeros_like(scores), scores)
        joined = _select_highest(ranked, count, tf.ones_like(kept))
    anew = joined if conventions.regrown_value == "zero" else joined & ~active
    return kept | joined, anew


def drop_count(
    mask, drop_fraction, *, conventions: Conventions = ORIGINAL
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
    drop_fraction = _checked_fraction(drop_fraction)
    return _drop_count(as_mask("mask", mask), drop_fraction, conventions)


def _drop_count(active, drop_fraction, conventions):
    exact = tf.cast(_size(active), tf.float64) * drop_fraction
    rounded = (
        tf.floor(exact)
        if conventions.drop_rounding == "floor"
        else tf.math.ceil(exact)
    )
    return tf.cast(rounded, tf.int32)


def layer_drop_fractions(
    masks: Sequence,
    shares: Sequence | None,
    drop_fraction,
    *,
    conventions: Conventions = ORIGINAL,
) -> list:
    """Returns the fraction that each layer drops.

    `drop_fraction` for all, except that with `spare_dense_layers` a layer of
    sparsity s < 0.2 whose share is more than 1 / layers drops
    min(s, drop_fraction) (the reproduction's `adjust_prune_rate`).

    Args:
        masks: One mask for each layer.
        shares: One number for each layer, adding to 1: its share of what
            density is redistributed by, or else of all nonzero weights.
            Read with `spare_dense_layers` only.
        drop_fraction: The update's fraction, in [0, 1].
        conventions: `spare_dense_layers` decides.

    Returns:
        A list of float64 scalars, one for each layer.

    Raises:
        ValueError: An argument is out of range, or there is not one share for
            each mask.
    """
    check_conventions(conventions)
    drop_fraction = _checked_fraction(drop_fraction)
    masks = [as_mask("masks", mask) for mask in masks]
    if not conventions.spare_dense_layers:
        return [drop_fraction] * len(masks)
    received, shares = shares, as_scores("shares", shares)
    if shares.shape.rank != 1 or shares.shape[0] not in (None, len(masks)):
        raise ValueError(
            f"shares must be a number for each of {len(masks)} masks. "
            f"Received: shares={received!r}."
        )
    _check_defined("shares", shares, tf.ones_like(shares, tf.bool))
    fractions = []
    for i, mask in enumerate(masks):
        share = shares[i]
        sparsity = 1 - tf.reduce_mean(tf.cast(mask, tf.float64))
        spared = (sparsity < 0.2) & (share > 1 / len(masks))
        fractions.append(
            tf.where(spared, tf.minimum(sparsity, drop_fraction), drop_fraction)
        )
    return fractions


def select_highest(scores, count, *, among) -> tf.Tensor:
    """Returns which `count` entries among the candidates score highest.

    Exactly `count` are selected (all candidates if there are fewer); ties go
    to the lower flat index. Linear in the number of entries: the score of
    rank `count` is found by bisection on the bits of the floats, which costs
    a sweep per bit and, unlike a partial sort, compiles on every device.

    Args:
        scores: Float tensor, free of NaN where `among` holds.
        count: Integer scalar, at least 0.
        among: Bool tensor of the same shape, True for candidates.

    Returns:
        Bool tensor of the same shape.

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> select_highest([1.0, 3.0, 3.0, 2.0], 2, among=[True] * 4).numpy()
    array([False,  True,  True, False])
    """
    scores, among = as_scores("scores", scores), as_mask("among", among)
    _check_one_shape(scores=scores, among=among)
    _check_defined("scores", scores, among)
    return _select_highest(scores, _checked_count("count", count), among)


def _select_highest(scores, count, among):
    count = tf.minimum(count, _size(among))
    keys = _ordered_bits(scores)
    keys = tf.where(among, keys, keys.dtype.min)
    threshold = _largest(keys, count)
    reached = among & (keys >= threshold)

    def first_of_the_tied():
        above = among & (keys > threshold)
        tied = tf.reshape(reached & ~above, [-1])
        place = tf.cumsum(tf.cast(tied, tf.int32))
        first = tied & (place <= count - _size(above))
        return above | tf.reshape(first, tf.shape(reached))

    return tf.cond(
        tf.equal(_size(reached), count), lambda: reached, first_of_the_tied
    )


def _largest(keys, rank):
    """Returns a threshold that the `rank` largest of integer `keys` reach.

    It is the `rank`-th largest key, or lower where no more than `rank` keys
    reach it, so that no further bisection would change the selection.
    """

    def halve(low, high, reaching):
        # Average without overflow, rounded down.
        one = tf.ones_like(low)
        middle = (
            tf.bitwise.right_shift(low, one)
            + tf.bitwise.right_shift(high, one)
            + (low & high & one)
        )
        size = _size(keys >= middle)
        enough = size >= rank
        return (
            tf.where(enough, middle, low),
            tf.where(enough, high, middle),
            tf.where(enough, size, reaching),
        )

    # Invariant: `reaching` >= rank keys are >= low, fewer are >= high.
    low, _, _ = tf.while_loop(
        lambda low, high, reaching: (low + 1 < high) & (reaching > rank),
        halve,
        (tf.reduce_min(keys), tf.reduce_max(keys) + 1, tf.size(keys)),
    )
    return low


def _ordered_bits(scores):
    """Returns integers that are ordered as the floats `scores` are."""
    integer = tf.int64 if scores.dtype == tf.float64 else tf.int32
    bits = tf.bitcast(scores, integer)
    # -0.0 and 0.0 tie, though their bits differ. (Comparing floats here would
    # make denormals tie as well, on devices that flush them.)
    bits = tf.where(bits == integer.min, tf.zeros_like(bits), bits)
    return tf.where(bits < 0, bits ^ integer.max, bits)


def _size(selected):
    return tf.reduce_sum(tf.cast(selected, tf.int32))


def _defined(scores, where):
    return ~tf.reduce_any(where & tf.math.is_nan(scores))


def _nans(scores, where):
    return int(_size(where & tf.math.is_nan(scores)))


def as_mask(name: str, mask) -> tf.Tensor:
    """Returns a mask as a bool tensor.

    Args:
        name: What the argument is called.
        mask: Tensor of zeros and ones, or of bools.

    Returns:
        Bool tensor.

    Raises:
        ValueError: It cannot be a mask. Within a graph, where values are not
            known, its dtype alone tells.
    """
    mask = _tensor(name, mask)
    if mask.dtype == tf.bool:
        return mask
    values = as_scores(name, mask)
    if tf.executing_eagerly():
        other = values[(values != 0) & (values != 1)]
        if other.shape[0]:
            raise ValueError(
                f"{name} must hold zeros and ones only. Received "
                f"{other[0].numpy()} among its entries."
            )
    return tf.cast(values, tf.bool)


def as_scores(name: str, scores) -> tf.Tensor:
    """Returns scores as a float tensor; whole numbers become float64.

    Args:
        name: What the argument is called.
        scores: Tensor of real numbers.

    Returns:
        float32 or float64 tensor.

    Raises:
        ValueError: They are no numbers.
    """
    scores = _tensor(name, scores)
    dtype = scores.dtype
    if dtype in (tf.float32, tf.float64):
        return scores
    if dtype.is_floating:
        return tf.cast(scores, tf.float32)
    if not (dtype.is_integer or dtype.is_bool) or dtype.is_quantized:
        raise ValueError(
            f"{name} must be a tensor of numbers. Received: {name}={scores!r}."
        )
    return tf.cast(scores, tf.float64)


def _tensor(name, value):
    try:
        return tf.convert_to_tensor(value)
    except (TypeError, ValueError, OverflowError, tf.errors.OpError) as error:
        raise ValueError(
            f"{name} must be a tensor, or an array. Received: {name}={value!r}."
        ) from error


def _check_one_shape(**tensors):
    shapes = [tensor.shape for tensor in tensors.values()]
    if not all(shape.is_compatible_with(shapes[0]) for shape in shapes):
        *names, last = tensors
        *others, shape = [str(shape) for shape in shapes]
        raise ValueError(
            f"{', '.join(names)} and {last} must have one shape. Received "
            f"shapes {', '.join(others)} and {shape}."
        )


def _check_defined(name, scores, where):
    """Refuses NaN where it would be ranked, when called eagerly."""
    if tf.executing_eagerly() and not bool(_defined(scores, where)):
        raise ValueError(
            f"NaN cannot be ranked. Received: {name} with "
            f"{_nans(scores, where)} NaN."
        )


def _checked_fraction(value):
    """Returns a fraction as a float64 scalar tensor."""
    rule = "is a fraction of the active connections and must be in [0, 1]"
    if not (tf.is_tensor(value) or isinstance(value, tf.Variable)):
        return tf.constant(
            fraction("drop_fraction", value, rule=rule), tf.float64
        )
    value = tf.convert_to_tensor(value)
    if not value.dtype.is_floating or value.shape.rank not in (0, None):
        raise ValueError(f"drop_fraction {rule}. Received: {value!r}.")
    value = tf.cast(value, tf.float64)
    if tf.executing_eagerly():
        fraction("drop_fraction", float(value), rule=rule)
    return value


def _checked_count(name, value):
    """Returns a number of connections as an int32 scalar tensor."""
    if tf.is_tensor(value) or isinstance(value, tf.Variable):
        value = tf.convert_to_tensor(value)
        if not value.dtype.is_integer or value.shape.rank not in (0, None):
            raise ValueError(
                f"{name} must be a whole number. Received: {name}={value!r}."
            )
        if not tf.executing_eagerly():
            return tf.cast(value, tf.int32)
        value = value.numpy()
    value = integer(name, value, at_least=0)
    return tf.constant(min(value, tf.int32.max), tf.int32)
