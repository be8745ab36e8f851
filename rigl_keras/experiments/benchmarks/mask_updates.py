"""Times a mask update."""

import numpy as np
import tensorflow as tf

from rigl_keras import topology
from rigl_keras._timing import interleaved

__all__ = ["measure_mask_update"]


def measure_mask_update(
    *, density: float = 0.1, rounds: int = 7
) -> dict[str, float]:
    """Times an update of all masks of a ResNet-50, also with full sorts.

    The 54 kernels are those of the ResNet-50 for 32x32 images, and have
    23,652,032 weights. The update with full sorts uses `tf.argsort`.

    Args:
        density: Fraction of the weights kept, uniform.
        rounds: Timed updates of each side.

    Returns:
        `{"selection" | "sort": median seconds}`.
    """
    draw = np.random.default_rng(0)
    layers = []
    for shape in _resnet50_shapes():
        mask = draw.random(shape, np.float32) < density
        weights = draw.standard_normal(shape, np.float32) * mask
        gradient = draw.standard_normal(shape, np.float32)
        layers.append(tuple(map(tf.constant, (mask, weights, gradient))))
    masks, kernels, gradients = zip(*layers, strict=True)

    def update(move):
        # Sums all results, as TensorFlow does not compute unused ones.
        return tf.function(
            lambda: tf.add_n(
                [
                    tf.reduce_sum(new)
                    for new in move(
                        masks,
                        [tf.abs(weights) for weights in kernels],
                        [tf.abs(gradient) for gradient in gradients],
                    )
                ]
            )
        )

    def by_selection(masks, drop_scores, grow_scores):
        return topology.update_masks(
            masks, drop_scores, grow_scores, drop_fraction=0.3
        )[0]

    def by_sorting(masks, drop_scores, grow_scores):
        return map(_drop_and_grow_by_sorting, masks, drop_scores, grow_scores)

    selection, sort = update(by_selection), update(by_sorting)
    # Both do the same work, so the sums agree up to rounding.
    np.testing.assert_allclose(float(selection()), float(sort()), rtol=1e-5)
    return interleaved(
        {
            "selection": lambda: selection().numpy(),
            "sort": lambda: sort().numpy(),
        },
        rounds=rounds,
    )


def _drop_and_grow_by_sorting(mask, drop_scores, grow_scores):
    """Returns the new mask of an update with fraction 0.3, by two sorts."""
    active = tf.reshape(mask, [-1])
    size = tf.size(active)
    ones = tf.math.count_nonzero(active, dtype=tf.int32)
    count = tf.cast(tf.floor(0.3 * tf.cast(ones, tf.float64)), tf.int32)

    def best(scores, among, number):
        scores = tf.where(among, tf.reshape(scores, [-1]), -np.inf)
        order = tf.argsort(scores, direction="DESCENDING", stable=True)
        return tf.scatter_nd(
            order[:number, tf.newaxis], tf.ones([number], tf.bool), [size]
        )

    kept = best(drop_scores, active, ones - count)
    new = kept | best(grow_scores, ~kept, count)
    return tf.reshape(new, tf.shape(mask))


def _resnet50_shapes():
    """Yields the kernel shapes of the report's ResNet-50, 100 classes."""
    yield 3, 3, 3, 64
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield 1, 1, channels, width
            yield 3, 3, width, width
            yield 1, 1, width, 4 * width
            if block == 0:
                yield 1, 1, channels, 4 * width
            channels = 4 * width
    yield channels, 100
