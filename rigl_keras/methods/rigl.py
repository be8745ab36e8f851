"""RigL, SET and SNFS: how each scores connections."""

import dataclasses

import tensorflow as tf

from rigl_keras import scores
from rigl_keras._tensor_checks import count_true
from rigl_keras.masking.masked import KernelMask
from rigl_keras.methods.mask_update import MaskUpdate
from rigl_keras.training import optimizer_state

__all__ = ["RigL", "SET", "SNFS"]


class RigL(MaskUpdate):
    """Grows the connections of largest gradient magnitude.

    Evci et al., 2020, Rigging the Lottery, arXiv:1911.11134. With
    `redistribution="gradient"` it is the report's RigL-SG, with `"momentum"`
    its RigL-SM (section 6.2).

    In-time over-parameterization (Liu et al., 2021, arXiv:2102.02887) is RigL
    with rare updates that never stop. A connection has time to grow before it
    is judged, and more of them are ever active: `TopologyDiagnostics` has their
    share R_s as `ever_active`. The arguments of the second example are those of
    the authors' code, for CIFAR with batches of 128. That code takes the step
    first (`Conventions(update_replaces_step=False)`) and rounds counts up.

    Args, Raises: as in `MaskUpdate`.

    Example:

    >>> model.fit(train, epochs=250, callbacks=[RigL()])
    >>> itop = RigL(
    ...     frequency=4_000, drop_fraction=0.5, final_drop_fraction=0.005,
    ...     end_step=88_000)  # the whole run
    """

    def grow_scores(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        return self.magnitudes(layer, gradient)


class SET(MaskUpdate):
    """Grows connections at random.

    Mocanu et al., 2018, Scalable training of artificial neural networks with
    adaptive sparse connectivity. With `"bernoulli"` sampling, as in the
    report's code, the number grown is random too.

    Args, Raises: as in `MaskUpdate`.
    """

    dense_gradients = "never"

    def grow_scores(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        return scores.random(
            layer.kernel.shape, key=layer.draw_key ^ self.seed, step=step
        )

    def grow_count(
        self, layer: KernelMask, dropped: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        if self.conventions.sampling == "exact":
            return dropped
        # Each inactive unit joins with probability dropped / inactive: the
        # number that join is binomial, and their choice is uniform.
        mask = layer.units(tf.convert_to_tensor(layer.mask.value))
        inactive = tf.size(mask) - count_true(mask) + dropped
        key = tf.constant(layer.draw_key ^ self.seed ^ 1, tf.int64)
        seed = tf.stack([key, step])
        return tf.random.stateless_binomial(
            [],
            seed,
            counts=tf.cast(inactive, tf.float32),
            probs=tf.cast(dropped, tf.float32)
            / tf.cast(tf.maximum(inactive, 1), tf.float32),
            output_dtype=tf.int32,
        )


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SNFS(MaskUpdate):
    """Grows the connections of largest momentum, where momentum is largest.

    Gradients are dense at every step, so the optimizer's momentum covers every
    entry, active or not. An update grows connections by its magnitude, and
    layers grow in proportion to its mean over active connections; the
    optimizer's memory is not reset. Dettmers and Zettlemoyer, 2020, Sparse
    networks from scratch, arXiv:1907.04840, section 3, with the optimizer's
    momentum as in their code. It costs a dense backward pass at every step.

    Args, Raises: as in `MaskUpdate`. The optimizer must keep momentum
        (`optimizer_state.momentum`).
    """

    redistribution: str | None = "momentum"

    dense_gradients = "always"
    needs_momentum = True

    def __post_init__(self):
        super().__post_init__()
        # In SNFS, connections that are dropped and grown again keep their
        # weights, even in the reproduction (funcs/grow.py:45-55).
        self.conventions = dataclasses.replace(
            self.conventions, regrown_value="kept"
        )

    @property
    def name(self) -> str:
        other = {"momentum": "", "gradient": "-SG", None: " (fixed)"}
        return type(self).__name__ + other[self.redistribution]

    def grow_scores(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        momentum = optimizer_state.momentum(self.optimizer, layer.kernel)
        return self.magnitudes(layer, momentum)
