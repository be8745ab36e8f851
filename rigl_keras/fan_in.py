"""SRigL's step: drop and grow to a constant fan-in, and ablate weak units.

A matrix has a row for each output unit and a column for each of its inputs.
`update_fan_in` is the step for one matrix. It works eagerly, in a
`tf.function` and under XLA.
"""

from typing import Any

import tensorflow as tf

from rigl_keras._checks import fraction
from rigl_keras._tensor_checks import (
    Number,
    TensorLike,
    as_mask,
    as_scores,
    check_one_shape,
    checked_count,
    checked_fraction,
    count_true,
)
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.topology import drop_count, select_highest

__all__ = ["update_fan_in"]


def update_fan_in(
    mask: TensorLike,
    drop_scores: TensorLike,
    grow_scores: TensorLike,
    *,
    drop_fraction: Number,
    budget: Number | None = None,
    ablation: float | None = None,
    conventions: Conventions = ORIGINAL,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Moves connections to equal numbers per unit, and drops weak units.

    With F inputs, U units, n active connections and a budget of N:

    1. P = floor(drop_fraction x n) connections move and K = n - P stay. If
       fewer than K weights are nonzero, K is their number and P = n - K.
    2. The salient entries are the K active connections of highest `drop_scores`
       and the P entries of highest `grow_scores`, active or not.
    3. A unit with fewer than max(1, floor(ablation x floor(N / U))) salient
       entries is ablated. The floor(N / F) + 1 units with the most stay.
    4. Each of the V remaining units gets k = floor(N / V) connections, from 1
       to F: its salient active ones, by `drop_scores`, and then those of
       highest `grow_scores`.

    Ablation is decided at each update: a unit may come back. Ties go to the
    lower index. Lasby et al., 2024, Dynamic sparse training with structured
    sparsity, arXiv:2305.02299, section 3, and the authors' code
    (rigl_torch/rigl_constant_fan.py). If a unit has more than k active salient
    connections, their code does not define which of them go. After an ablation,
    inactive ones may be salient there by their weight, 0.

    Args:
        mask: Tensor (U, F) of zeros and ones, or bools.
        drop_scores: Tensor of that shape, at least 0, such as |w|.
        grow_scores: Tensor of that shape, such as |dL/dw|.
        drop_fraction: Fraction of the active connections, in [0, 1].
        budget: N, an integer scalar. None: n.
        ablation: gamma, in [0, 1]. None: no unit is ablated.
        conventions: `drop_rounding` rounds P.

    Returns:
        `(new_mask, grown)`, bool tensors of that shape. `grown` is where the
        new mask is 1 and the old one 0.

    Raises:
        ValueError: Shapes differ, or an argument is out of range.

    Example:

    Two units of four inputs; two move. Without ablation each keeps two.

    >>> new, _ = update_fan_in(
    ...     [[1, 1, 0, 0], [1, 1, 0, 0]],
    ...     [[5, 4, 0, 0], [2, 1, 0, 0]],
    ...     [[0, 0, 3, 1], [0, 0, 2, 9]],
    ...     drop_fraction=0.5)
    >>> new.numpy().astype(int).tolist()
    [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    active = as_mask("mask", mask)
    worth = as_scores("drop_scores", drop_scores)
    growth = as_scores("grow_scores", grow_scores)
    check_one_shape(mask=active, drop_scores=worth, grow_scores=growth)
    if active.shape.rank != 2:
        raise ValueError(
            "A mask of fan-ins is a matrix (units, inputs). Received: "
            f"shape={active.shape}."
        )
    shape: Any = active.shape
    units, inputs = shape
    count = count_true(active)
    budget = count if budget is None else checked_count("budget", budget)
    moved = drop_count(
        active, checked_fraction(drop_fraction), conventions=conventions
    )
    stay = tf.minimum(count - moved, count_true(active & (worth > 0)))
    kept = select_highest(worth, stay, among=active)
    left = tf.ones([units, 1], tf.bool)
    if ablation is not None:
        everywhere = tf.ones_like(active)
        salient = kept | select_highest(growth, count - stay, among=everywhere)
        left = _units_left(
            _per_unit(salient),
            budget,
            inputs=inputs,
            ablation=fraction("ablation", ablation),
        )
    each = tf.clip_by_value(
        budget // tf.maximum(count_true(left), 1), 1, inputs
    )
    kept &= left & (_ranks(worth, kept) < each)
    missing = each - _per_unit(kept)
    others = tf.logical_not(kept)
    joined = others & left & (_ranks(growth, others) < missing)
    new = kept | joined
    return new, new & tf.logical_not(active)


def _per_unit(entries):
    return tf.reduce_sum(tf.cast(entries, tf.int32), axis=1, keepdims=True)


def _units_left(salient, budget, *, inputs, ablation):
    """Returns which units are not ablated, a column of bools."""
    units: int = salient.shape[0]
    share = tf.floor(ablation * tf.cast(budget // units, tf.float64))
    threshold = tf.maximum(tf.cast(share, tf.int32), 1)
    descending = tf.sort(tf.reshape(salient, [-1]), direction="DESCENDING")
    # Enough units must stay to hold the budget.
    least = descending[tf.minimum(budget // inputs, units - 1)]
    return salient >= tf.minimum(threshold, least)


def _ranks(scores, among):
    """Returns the rank of each entry within its row, candidates first."""
    lowest = tf.constant(-float("inf"), scores.dtype)
    ranked = tf.where(among, scores, lowest)
    order = tf.argsort(ranked, direction="DESCENDING", stable=True)
    return tf.argsort(order)
