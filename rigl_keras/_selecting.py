"""The highest of many scores, row by row, in linear time."""

import itertools

import tensorflow as tf

__all__ = ["count_rows", "highest_of_rows"]


def count_rows(selected: tf.Tensor) -> tf.Tensor:
    """Returns how many entries of each row of a bool matrix are True.

    Args:
        selected: Bool tensor (rows, size).

    Returns:
        int32 tensor (rows, 1).
    """
    ones = tf.cast(selected, tf.int32)
    return tf.reduce_sum(ones, axis=-1, keepdims=True)


def highest_of_rows(
    scores: tf.Tensor, counts: tf.Tensor, among: tf.Tensor
) -> tf.Tensor:
    """Returns which candidates score highest, `counts` of each row.

    Exactly `counts` are selected (all candidates if there are fewer); ties go
    to the lower index. In long rows, bisection on the bits of the floats finds
    the score of that rank, for all rows at once. It costs a sweep per bit and,
    unlike a partial sort, compiles on every device.

    Args:
        scores: Float tensor (rows, size), without NaN where `among` is True.
        counts: int32 tensor (rows, 1), or of one entry for all rows.
        among: Bool tensor (rows, size), True for candidates.

    Returns:
        Bool tensor (rows, size).
    """
    given = scores, counts, among
    if tf.executing_eagerly():
        return _selection(*given)
    if _is_short(scores):
        return _traced_selection(*given)
    of_any_size = _traced_selection.get_concrete_function(
        *map(_spec_of_any_size, given)
    )
    selected = of_any_size(*given)
    selected.set_shape(scores.shape)
    return selected


def _is_short(rows):
    return 0 < (rows.shape[1] or 0) <= _SHORT


def _spec_of_any_size(tensor):
    """Returns what other kernels' tensors match as well; one row stays one."""
    shape = [size if size == 1 else None for size in tensor.shape]
    return tf.TensorSpec(shape, tensor.dtype)


def _selection(scores, counts, among):
    keys = _ordered_bits(scores)
    keys = tf.where(among, keys, keys.dtype.min)
    if _is_short(keys):
        return among & (_ranks(keys) < counts)
    counts = tf.minimum(counts, count_rows(among))
    threshold = _largest(keys, counts)
    reached = among & (keys >= threshold)

    def first_of_the_tied():
        above = among & (keys > threshold)
        tied = reached & ~above
        place = tf.cumsum(tf.cast(tied, tf.int32), axis=-1)
        return above | (tied & (place <= counts - count_rows(above)))

    return tf.cond(
        tf.reduce_all(tf.equal(count_rows(reached), counts)),
        lambda: reached,
        first_of_the_tied,
    )


# Graphs call it up to twice per layer. It is traced once for kernels of every
# size (and for each shape of short rows), not once for each call.
_traced_selection = tf.function(_selection, autograph=False)


# The longest row in which all pairs are compared.
_SHORT = 8


def _ranks(keys):
    """Returns, for each key, how many keys of its row come before it.

    In short rows this takes a tenth of the time of bisection.
    """
    columns = tf.unstack(keys, axis=1)
    ranks = [tf.zeros_like(column, tf.int32) for column in columns]
    for i, j in itertools.combinations(range(len(columns)), 2):
        first = tf.cast(columns[i] >= columns[j], tf.int32)
        ranks[j] += first
        ranks[i] += 1 - first
    return tf.stack(ranks, axis=1)


def _largest(keys, ranks):
    """Returns thresholds that the largest integers of each row reach.

    Each is the `rank`-th largest key of its row, or a lower value that no more
    than `rank` keys reach: further bisection would not change the selection.
    """

    def is_open(low, high, reaching):
        return (low + 1 < high) & (reaching > ranks)

    def halve(low, high, reaching):
        # Average without overflow, rounded down.
        one = tf.ones_like(low)
        middle = (
            tf.bitwise.right_shift(low, one)
            + tf.bitwise.right_shift(high, one)
            + (low & high & one)
        )
        size = count_rows(keys >= middle)
        up = size >= ranks
        down = ~up
        if keys.shape[0] != 1:  # some may be done
            still = is_open(low, high, reaching)
            up, down = still & up, still & down
        return (
            tf.where(up, middle, low),
            tf.where(down, middle, high),
            tf.where(up, size, reaching),
        )

    # Invariant: `reaching` >= rank keys are >= low, fewer are >= high.
    low, _, _ = tf.while_loop(
        lambda *state: tf.reduce_any(is_open(*state)),
        halve,
        (
            tf.reduce_min(keys, axis=-1, keepdims=True),
            tf.reduce_max(keys, axis=-1, keepdims=True) + 1,
            tf.fill([tf.shape(keys)[0], 1], tf.shape(keys)[1]),
        ),
    )
    return low


def _ordered_bits(scores):
    """Returns integers in the same order as the floats `scores`."""
    integer = tf.int64 if scores.dtype == tf.float64 else tf.int32
    bits = tf.bitcast(scores, integer)
    # -0.0 and 0.0 tie, though their bits differ. (Comparing floats here would
    # make denormals tie as well, on devices that flush them.)
    bits = tf.where(bits == integer.min, tf.zeros_like(bits), bits)
    return tf.where(bits < 0, bits ^ integer.max, bits)
