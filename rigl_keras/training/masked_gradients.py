"""Whether gradients are dense, or zero where masks are."""

from collections.abc import Sequence

import tensorflow as tf

__all__ = ["seem_masked"]

# Of one layer, so many gradients at least must be zero against expectation
# before it is taken for masked: that it happens by chance to that many is
# less likely than exp(-20).
_ENOUGH = 20.0


def seem_masked(
    masks: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Returns which gradients are zero outside their masks, and should not be.

    Dense gradients may be zero there, too: those of pixels that are always
    black, of units that a ReLU has shut, of a kernel so small that little is
    removed, of a layer that the loss does not depend on. So a gradient is
    expected only between an input and an output that have others, and as
    often as it is found where the mask is 1. A layer is taken for masked if
    20 at least are expected and there is none; where no layer has any, and
    one is expected, all are from which it was.

    Args:
        masks: Tensors of zeros and ones.
        gradients: One of its shape for each.

    Returns:
        A bool for each.
    """
    reached, expected = [], []
    for mask, gradient in zip(masks, gradients, strict=True):
        kept, moved = mask > 0, gradient != 0
        axes = range(len(mask.shape))
        alive = tf.ones_like(kept)
        for axis in axes:
            others = [other for other in axes if other != axis]
            alive &= tf.reduce_any(moved & kept, axis=others, keepdims=True)
        found = tf.math.divide_no_nan(
            _count(alive & kept & moved), _count(alive & kept)
        )
        expected.append(found * _count(alive & ~kept))
        reached.append(tf.reduce_any(moved & ~kept))
    reached, expected = tf.stack(reached), tf.stack(expected)
    none = ~tf.reduce_any(reached) & (tf.reduce_sum(expected) >= 1.0)
    return ~reached & ((expected >= _ENOUGH) | (none & (expected > 0.0)))


def _count(where):
    return tf.reduce_sum(tf.cast(where, tf.float32))
