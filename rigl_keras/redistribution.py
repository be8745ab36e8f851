"""Moving density between layers: SNFS, RigL-SG and RigL-SM.

Layers share the connections that all of them drop in one update: a layer whose
connections are worth more, on average, grows more of them. `mean_shares`
returns the share of each layer, and `grow_counts`, the second step of
`topology.update_masks`, the number of connections. The module computes with one
number for each layer.
"""

from collections.abc import Sequence

import tensorflow as tf

from rigl_keras._tensor_checks import (
    Number,
    TensorLike,
    as_mask,
    as_scores,
)
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions

__all__ = [
    "CRITERIA",
    "corrected",
    "grow_counts",
    "layer_mean",
    "mean_shares",
    "next_correction",
    "nonzero_shares",
    "shares",
    "start_of_correction",
]

CRITERIA = ("gradient", "momentum")
_FULL = 0.99  # largest part of its free entries that a layer grows
_ROUNDS = 1000  # in which the reproduction spreads the overflow


def layer_mean(statistic: TensorLike, mask: TensorLike) -> tf.Tensor:
    """Returns the mean magnitude over the active connections of one layer.

    Dettmers and Zettlemoyer, 2020, section 3.2, use the momentum; the report,
    section 6.2, the gradient or the momentum. The mean is taken before the
    drop.

    Args:
        statistic: Float tensor, the gradient or the momentum of a kernel.
        mask: Tensor of zeros and ones of the same shape.

    Returns:
        float64 scalar, 0 if nothing is active.

    Raises:
        ValueError: An argument is not such a tensor.
    """
    statistic = as_scores("statistic", statistic)
    active = as_mask("mask", mask)
    if not statistic.shape.is_compatible_with(active.shape):
        raise ValueError(
            "statistic and mask must have one shape. Received shapes "
            f"{statistic.shape} and {active.shape}."
        )
    _check_finite("statistic", statistic)
    active = tf.cast(active, tf.float64)
    total = tf.reduce_sum(tf.cast(tf.abs(statistic), tf.float64) * active)
    return tf.math.divide_no_nan(total, tf.reduce_sum(active))


def shares(values: Sequence) -> tf.Tensor:
    """Returns each value over the sum of all.

    Args:
        values: One non-negative number for each layer.

    Returns:
        float64 vector that adds to 1; equal shares if every value is 0.

    Raises:
        ValueError: There are no values, or one is negative or not finite.
    """
    received, values = values, _vector("values", values)
    if values.shape[0] == 0:
        raise ValueError(
            f"There is nothing to share. Received: values={received!r}."
        )
    total = tf.reduce_sum(values)
    _check_finite("sum of values", total)
    equal = tf.ones_like(values) / values.shape[0]
    return tf.where(total > 0, tf.math.divide_no_nan(values, total), equal)


def mean_shares(statistics: Sequence, masks: Sequence) -> tf.Tensor:
    """Returns each layer's share of the mean magnitudes.

    It is the mean of a layer over the sum of all (`layer_mean`, `shares`).

    Args:
        statistics: For each layer a float tensor, the gradient or the momentum
            of its kernel.
        masks: For each layer a tensor of zeros and ones of the same shape.

    Returns:
        float64 vector that adds to 1.

    Raises:
        ValueError: There is not one mask for each statistic, or an argument is
            not such a tensor.
    """
    _check_sequences(statistics=statistics, masks=masks)
    return shares(list(map(layer_mean, statistics, masks)))


def nonzero_shares(kernels: Sequence) -> tf.Tensor:
    """Returns each layer's share of all nonzero weights.

    Without redistribution, these shares decide which layers the reproduction
    spares (`topology.layer_drop_fractions`).

    Args:
        kernels: For each layer a float tensor.

    Returns:
        float64 vector that adds to 1.

    Raises:
        ValueError: There are no kernels, or one is not a tensor of numbers.
    """
    _check_sequences(kernels=kernels)
    return shares(
        [tf.math.count_nonzero(as_scores("kernels", w)) for w in kernels]
    )


def grow_counts(
    shares: TensorLike,
    dropped: TensorLike,
    free: TensorLike,
    *,
    correction: Number = 0.0,
    conventions: Conventions = ORIGINAL,
) -> tf.Tensor:
    """Returns how many connections each layer grows.

    1. The share of layer l is q_l = share_l x (all connections dropped).
    2. No layer grows more than c_l = 0.99 x its free entries. The excess is
       spread equally over the layers with room until none is left: layer l
       grows min(c_l, q_l + r), where r preserves the sum.
    3. Counts are rounded so that exactly as many grow as were dropped: down,
       then those of largest remainder up.

    If all layers together have less room than that, they are filled to the last
    entry. Dettmers and Zettlemoyer, 2020, section 3.2 and their code.

    The reproduction (`redistribution_total="corrected"`) rounds each q_l alone,
    spreads the excess over full layers too, in at most 1000 rounds, and
    truncates (core.py:285-346). `corrected` makes up for the connections that
    this loses or gains.

    Args:
        shares: Float vector, one for each layer, adding to 1.
        dropped: Integer vector, the connections that each layer dropped.
        free: Integer vector, the inactive entries after the drop.
        correction: Connections added to the total, in the reproduction only.
        conventions: `redistribution_total` decides.

    Returns:
        int32 vector. Each count is between 0 and `free`.

    Raises:
        ValueError: An argument is out of range, more is dropped than there are
            free entries, or the vectors differ in length.

    Example:

    >>> grow_counts([0.5, 0.5], [6, 2], [100, 3]).numpy()  # the second is full
    array([6, 2], dtype=int32)
    """
    check_conventions(conventions)
    shares = _vector("shares", shares)
    dropped, free = _counts("dropped", dropped), _counts("free", free)
    correction = tf.cast(as_scores("correction", correction), tf.float64)
    _check_together(shares, dropped, free, correction)
    total = tf.reduce_sum(dropped)
    if conventions.redistribution_total == "corrected":
        return _as_reproduced(shares, total + correction, free)
    caps = tf.floor(_FULL * free)
    caps = tf.where(tf.reduce_sum(caps) < total, free, caps)
    return _rounded(_spread(shares * total, caps), total, caps)


def corrected(
    correction: Number, missing: Number, mean_missing: Number
) -> tf.Tensor:
    """Returns the reproduction's correction of its next update.

        correction <- correction / 4 + 3/4 missing + mean of all missing

    core.py:763-773 there.

    Args:
        correction: The correction of this update.
        missing: Connections at the start of training minus those after this
            update.
        mean_missing: Mean of `missing` over all updates so far.

    Returns:
        Float scalar, the correction of the next update.
    """
    correction = _finite_number("correction", correction)
    missing = _finite_number("missing", missing)
    mean_missing = _finite_number("mean_missing", mean_missing)
    return 0.25 * correction + 0.75 * missing + mean_missing


def start_of_correction(connections: Number) -> tf.Tensor:
    """Returns the state of the correction before the first update.

    Args:
        connections: The active connections of all layers at the start of
            training, a whole number.

    Returns:
        float64 vector: the correction (0), the sum of what was missing after
        each update (0), updates so far (0), and `connections`.
    """
    connections = _finite_number("connections", connections)
    zero = tf.zeros_like(connections)
    return tf.stack([zero, zero, zero, connections])


def next_correction(state: TensorLike, connections: Number) -> tf.Tensor:
    """Returns the state of the correction after an update.

    Args:
        state: The state before it, as `start_of_correction` returns it.
        connections: The active connections of all layers after the update.

    Returns:
        float64 vector. Its first entry, by `corrected`, is the `correction`
        that `grow_counts` takes at the next update.
    """
    connections = _finite_number("connections", connections)
    received, state = state, tf.cast(as_scores("state", state), tf.float64)
    if state.shape != (4,):
        raise ValueError(
            "state must be what start_of_correction or next_correction "
            f"returned. Received: state={received!r}."
        )
    correction, missing_so_far, updates, start = tf.unstack(state)
    missing = start - connections
    missing_so_far += missing
    updates += 1
    correction = corrected(correction, missing, missing_so_far / updates)
    return tf.stack([correction, missing_so_far, updates, start])


def _check_sequences(**sequences):
    try:
        numbers = {len(each) for each in sequences.values()}
    except TypeError:
        numbers = set()
    if len(numbers) != 1 or 0 in numbers:
        received = [f"{name}={each!r}" for name, each in sequences.items()]
        raise ValueError(
            f"{' and '.join(sequences)} must be sequences, an entry for "
            f"each layer. Received: {', '.join(received)}."
        )


def _finite_number(name, value):
    """Returns a number as a float64 scalar tensor."""
    received, value = value, tf.cast(as_scores(name, value), tf.float64)
    if value.shape.rank:
        raise ValueError(
            f"{name} must be a number. Received: {name}={received!r}."
        )
    _check_finite(name, value)
    return value


def _vector(name, values):
    """Returns non-negative numbers as a float64 vector."""
    received = values
    if isinstance(values, (list, tuple)) and values:
        # Scalars of several types.
        values = [tf.cast(as_scores(name, v), tf.float64) for v in values]
        flat = all(value.shape.rank in (0, None) for value in values)
        values = tf.stack(values) if flat else tf.zeros([0, 0])
    values = tf.cast(as_scores(name, values), tf.float64)
    if values.shape.rank not in (1, None):
        raise ValueError(
            f"{name} must be a vector, a number for each layer. Received: "
            f"{name}={received!r}."
        )
    _check_finite(name, values)
    if tf.executing_eagerly() and bool(tf.reduce_any(values < 0)):
        raise ValueError(
            f"{name} must not be negative. Received: {name}={received!r}."
        )
    return values


def _counts(name, values):
    counts = _vector(name, values)
    broken = tf.executing_eagerly() and bool(
        tf.reduce_any(counts != tf.floor(counts))
    )
    if broken:
        raise ValueError(
            f"{name} must be whole numbers. Received: {name}={values!r}."
        )
    return counts


def _check_together(shares, dropped, free, correction):
    lengths = [v.shape[0] for v in (shares, dropped, free)]
    if len(set(lengths) - {None}) > 1 or 0 in lengths:
        raise ValueError(
            "shares, dropped and free must be of one length, a number for "
            f"each layer. Received lengths: {lengths}."
        )
    _check_finite("correction", correction)
    if not tf.executing_eagerly():
        return
    if abs(float(tf.reduce_sum(shares)) - 1) > 1e-6:
        raise ValueError(f"shares must add to 1. Received: shares={shares!r}.")
    total, room = (float(tf.reduce_sum(v)) for v in (dropped, free))
    if total > room or room > tf.int32.max:
        raise ValueError(
            "No more can be dropped than there are free entries. Received: "
            f"dropped={dropped!r}, free={free!r}."
        )
    if correction.shape.rank:
        raise ValueError(
            f"correction must be a number. Received: correction={correction!r}."
        )


def _check_finite(name, values):
    """Refuses NaN and infinity, when called eagerly."""
    if tf.executing_eagerly():
        finite = tf.math.is_finite(values)
        if not bool(tf.reduce_all(finite)):
            raise ValueError(f"{name} must be finite. Received: {values!r}.")


def _spread(quotas, caps):
    """Returns min(cap, quota + r), with the same sum as the quotas."""
    total = tf.reduce_sum(quotas)

    def spread(counts):
        still_open = tf.cast(counts < caps, tf.float64)
        excess = total - tf.reduce_sum(counts)
        each = tf.math.divide_no_nan(excess, tf.reduce_sum(still_open))
        return (tf.minimum(caps, counts + each * still_open),)

    # Each round except the last fills a layer.
    (counts,) = tf.while_loop(
        lambda counts: tf.reduce_sum(counts) < total,
        spread,
        (tf.minimum(quotas, caps),),
        maximum_iterations=caps.shape[0],
    )
    return counts


def _rounded(counts, total, caps):
    """Rounds by largest remainder; ties go to the earlier layer."""
    down = tf.floor(counts)
    remainders = tf.where(down < caps, counts - down, -1.0)
    order = tf.argsort(remainders, direction="DESCENDING", stable=True)
    place = tf.math.invert_permutation(order)
    short = total - tf.reduce_sum(down)
    up = tf.cast(tf.cast(place, tf.float64) < short, tf.float64)
    return tf.cast(down + up, tf.int32)


def _as_reproduced(shares, total, free):
    caps = _FULL * free

    def spread(counts, residual):
        counts += residual / caps.shape[0]
        kept = tf.where(counts > caps, caps, counts)
        return kept, tf.reduce_sum(counts - kept)

    counts, _ = tf.while_loop(
        lambda counts, residual: residual > 0,
        spread,
        spread(tf.round(shares * total), tf.zeros([], tf.float64)),
        maximum_iterations=_ROUNDS - 1,
    )
    # A correction may exceed the number of dropped connections.
    return tf.cast(tf.maximum(counts, 0), tf.int32)
