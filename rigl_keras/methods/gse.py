"""GSE: growth by gradient within a random subset."""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from rigl_keras import _checks, _keras
from rigl_keras._random import random_bits
from rigl_keras._tensor_checks import count_true
from rigl_keras.masking.kernel_part import KernelPart
from rigl_keras.masking.masked import KernelMask
from rigl_keras.methods.mask_update import MaskUpdate

__all__ = ["GSE", "drawn_positions"]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class GSE(MaskUpdate):
    """Grows the connections of largest gradient among some drawn at random.

    With n active connections of a layer, an update

    1. draws ceil(subset x n) positions of the layer, uniformly and with
       replacement (`drawn_positions`). S are those that are inactive;
    2. drops the k connections of smallest magnitude and grows the k of S of
       largest gradient, where k is the drop fraction of n, or the size of S
       if that is less. What has just been dropped does not return.

    Heddes et al., 2024, Always-sparse training by growing connections with
    guided stochastic exploration, arXiv:2401.06898, Algorithm 2, with its
    uniform sampling, in each layer separately. Gradients are needed at the
    active connections and at S alone, a number in proportion to n. Sparse
    products compute no others (`sparsify(product="sparse")`, or
    `"auto"` where they are faster), on one device without XLA, for gradients
    of one batch: so an update costs about what a step does. Masks are the
    same either way.

    Defaults are those of the authors' code. It ranks the connections of all
    layers together, so that density moves between them, takes every entry of
    a layer of density above 1/2 for S, rounds k up, and sums gradients over
    ceil(10 classes / 128) batches (`gradient_batches`); here each layer keeps
    its density, as in the algorithm. Its sampling in proportion to
    activations (GraBo, GraEst) is not here.

    Args:
        subset: gamma, how many positions are drawn for each active
            connection, positive.
        others: As in `MaskUpdate`, but `end_step=None` is three fifths of the
            run.

    Raises:
        ValueError: As in `MaskUpdate`, or `subset` is not positive.

    Example:

    >>> model.fit(train, epochs=200, callbacks=[GSE()])
    """

    subset: float = 1.0
    frequency: int = 1000
    drop_fraction: float = 0.2

    end_share = 0.6

    def __post_init__(self):
        super().__post_init__()
        self.subset = _checks.number(
            "subset", self.subset, above=0, rule="must be positive"
        )

    def grow_scores(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        kept = layer.units(tf.convert_to_tensor(layer.mask.value))
        drawn = self._drawn(layer, kept, step)
        # A connection that was dropped is worth less than any of S, the more
        # the larger its weight: where S is too small, the last to be dropped
        # return, which is as if fewer had been dropped.
        weight = layer.by_unit(self.magnitudes(layer, layer.kernel.value))
        worth = layer.by_unit(self.magnitudes(layer, gradient))
        never = tf.constant(-math.inf, worth.dtype)
        found = tf.where(drawn, worth, never)
        left = -1 / (1 + tf.cast(weight, worth.dtype))
        return layer.by_element(tf.where(kept, left, found))

    def _drawn(self, layer, kept, step):
        if isinstance(layer, KernelPart):
            return tf.ones_like(kept)  # the rest is not in it
        positions = self.positions(layer, step)
        drawn = tf.scatter_nd(
            positions[:, tf.newaxis],
            tf.ones_like(positions, tf.int32),
            [math.prod(layer.layout.unit_shape)],
        )
        return tf.reshape(drawn > 0, kept.shape)

    def looks_at(self, layer: KernelMask, step: tf.Tensor) -> tf.Tensor | None:
        if self._is_another():
            return None
        return layer.looked_at(self.positions(layer, step))

    def _is_another(self):
        """Returns whether a child's rule may read gradients elsewhere."""
        return any(
            getattr(type(self), name) is not getattr(GSE, name)
            for name in (
                "change_masks",
                "drop_scores",
                "first_weights",
                "grow_scores",
            )
        )

    @property
    def changes_parts(self) -> bool:
        # Nothing that is read, ranked or counted is outside the parts.
        conventions = self.conventions
        return (
            self.redistribution is None
            and self.grow_init == "zeros"
            and not conventions.spare_dense_layers
            and conventions.drop_ranking == "active"
            and conventions.grow_ranking == "inactive"
            and conventions.unit_score == "mean_of_magnitudes"
            and not self._is_another()
        )

    def positions(self, layer: KernelMask, step: tf.Tensor) -> tf.Tensor:
        """Returns where an update looks at gradients, active ones included.

        Args:
            layer: The masked layer.
            step: The optimizer step, an int64 scalar.

        Returns:
            int64 vector of flat positions among the units of the mask, which
            for single weights are those of the kernel. Some may come twice.
        """
        return drawn_positions(
            math.prod(layer.layout.unit_shape),
            self._draws(layer),
            key=layer.draw_key ^ self.seed,
            step=step,
        )

    def _draws(self, layer):
        """Returns ceil(subset x n)."""
        if getattr(self._attached.model, "jit_compile", False):
            # XLA needs an int: that of the time of tracing.
            with tf.init_scope():
                mask = tf.convert_to_tensor(_keras.stored_value(layer.mask))
                active = int(np.count_nonzero(layer.units(mask)))
            return max(math.ceil(self.subset * active), 1)
        active = count_true(layer.units(tf.convert_to_tensor(layer.mask.value)))
        drawn = tf.math.ceil(self.subset * tf.cast(active, tf.float64))
        return tf.maximum(tf.cast(drawn, tf.int32), 1)


def drawn_positions(
    size: int, draws: int | tf.Tensor, *, key: int, step: tf.Tensor
) -> tf.Tensor:
    """Returns uniform draws of positions, with replacement.

    They depend on `key` and `step` only, so that runs repeat, resumed runs
    continue and replicas agree.

    Args:
        size: How many positions there are, at least 1.
        draws: How many are drawn.
        key: Int that tells these draws from others.
        step: The optimizer step, an int64 scalar.

    Returns:
        int64 vector of `draws` numbers from 0 to size - 1.
    """
    seed = tf.stack([tf.constant(key, tf.int64), tf.cast(step, tf.int64)])
    bits = random_bits([2, draws], seed, dtype=tf.uint32)
    # 53 bits of a float64 in [0, 1): as good as even for any kernel.
    high, low = tf.unstack(tf.cast(tf.bitwise.right_shift(bits, 5), tf.float64))
    unit = (high + low * 2.0**-27) * 2.0**-27
    return tf.minimum(tf.cast(unit * size, tf.int64), size - 1)
