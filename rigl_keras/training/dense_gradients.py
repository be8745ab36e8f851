"""The gradients that an update uses: of one batch or several, and checks.

They are dense: dL/d(masked kernel) at every entry, also where the mask is zero,
without regularisation (Evci et al., 2020, arXiv:1911.11134, section 3).
"""

from collections.abc import Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from rigl_keras import replicas
from rigl_keras.masking.masked import KernelMask
from rigl_keras.masking.tracing import zero_outside
from rigl_keras.training.attachment import Attachment, variable_key

__all__ = [
    "GradientBuffers",
    "check_unread",
    "kernel_gradients",
    "masked_gradients",
    "seem_masked",
]


class GradientBuffers:
    """Sums of the gradients of several batches, for updates by the mean.

    Args:
        masked: The masked layers.
    """

    def __init__(self, masked: Sequence[KernelMask]):
        self._kernels = [m.kernel for m in masked]
        # The number of gradients in each sum, and the number (counted by the
        # optimizer) of the batch that must come next.
        self._gathered = tf.Variable(tf.zeros([2], tf.int64), trainable=False)
        self._sums = [
            tf.Variable(tf.zeros_like(kernel.value), trainable=False)
            for kernel in self._kernels
        ]

    @property
    def variables(self) -> list[tf.Variable]:
        """The state for a run to resume between two updates."""
        return [self._gathered, *self._sums]

    def are_for(self, masked: Sequence[KernelMask]) -> bool:
        """Returns whether these buffers are for the kernels of some layers."""
        return [id(k) for k in self._kernels] == [id(m.kernel) for m in masked]

    def add(
        self,
        layers: Sequence[KernelMask],
        gradients: Sequence[tf.Tensor],
        batches: tf.Tensor,
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Adds the gradients of a batch to those of earlier batches.

        Args:
            layers: The layers that have a gradient.
            gradients: One for each layer, with its kernel's shape.
            batches: Number of batches that the optimizer has seen, a scalar.

        Returns:
            `(sums, count)`: the sums so far, and their numbers of gradients.
            The sums start again if batches were skipped, as after another run.
        """
        count, following = tf.unstack(self._gathered)
        goes_on = (count > 0) & tf.equal(following, batches)
        count = tf.where(goes_on, count, 0) + 1
        self._gathered.assign([count, tf.cast(batches, tf.int64) + 1])
        of = dict(zip(map(id, self._kernels), self._sums, strict=True))
        sums = []
        for layer, gradient in zip(layers, gradients, strict=True):
            buffer = of[id(layer.kernel)]
            before = tf.where(goes_on, buffer, tf.zeros_like(buffer))
            sums.append(before + tf.cast(gradient, buffer.dtype))
            buffer.assign(sums[-1])
        return sums, count

    def mean(
        self,
        layers: Sequence[KernelMask],
        gradients: Sequence[tf.Tensor],
        batches: tf.Tensor,
    ) -> list[tf.Tensor]:
        """Adds the gradients of the last batch, and returns the mean of all.

        Args: as in `add`.

        Returns:
            The mean gradient of each layer. The next sums start at zero.
        """
        sums, count = self.add(layers, gradients, batches)
        self._gathered.assign([0, 0])
        return [total / tf.cast(count, total.dtype) for total in sums]


def kernel_gradients(
    attached: Attachment,
    gradients: Sequence[tf.Tensor | None],
    variables: Sequence[keras.Variable],
    *,
    method: str,
) -> tuple[list[KernelMask], list[tf.Tensor]]:
    """Returns the layers that have a gradient, and dL/d(masked kernel).

    Args:
        attached: What is trained.
        gradients: The optimizer's gradients, for each of `variables`.
        variables: The variables of these gradients.
        method: Name of the method.

    Returns:
        `(layers, gradients)`: sums over replicas, without loss scale and
        regularisation. Both are empty if all masked layers are frozen.

    Raises:
        ValueError: No masked layer has a gradient, though some are trainable.
    """
    if not attached.trainable():
        return [], []
    of = {variable_key(v): g for v, g in zip(variables, gradients, strict=True)}
    found = [
        (m, gradient)
        for m in attached.masked
        for gradient in [of.get(variable_key(m.kernel))]
        if gradient is not None
    ]
    layers = [m for m, _ in found]
    if not layers:
        raise ValueError(
            f"{method} needs the gradient of a masked kernel. Received "
            f"gradients of {[v.name for v in variables]}: does the loss "
            "depend on the masked layers?"
        )
    scale = attached.optimizer.loss_scale_factor or 1.0  # a fixed scale
    summed = replicas.summed(
        [tf.convert_to_tensor(gradient) for _, gradient in found]
    )
    dense = [
        gradient / tf.cast(scale, gradient.dtype)
        - _regularisation_gradient(m.kernel)
        for gradient, m in zip(summed, layers, strict=True)
    ]
    return layers, dense


def _regularisation_gradient(kernel) -> Any:
    """Returns the gradient of a kernel's penalty, or 0 without one."""
    if kernel.regularizer is None:
        return 0.0
    value = tf.convert_to_tensor(kernel.value)
    with tf.GradientTape() as tape:
        tape.watch(value)
        penalty = kernel.regularizer(value)
    return tape.gradient(
        penalty, value, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )


def masked_gradients(
    masked: Collection[KernelMask],
    gradients: Sequence[tf.Tensor | None],
    variables: Sequence[keras.Variable],
) -> list[tf.Tensor | None]:
    """Returns gradients that are zero outside the masks.

    Args:
        masked: The layers whose gradients are masked.
        gradients: One for each of `variables`.
        variables: The variables of these gradients.

    Returns:
        The gradients for the optimizer in an ordinary step.
    """
    masks = {variable_key(m.kernel): m.mask for m in masked}

    def within(gradient, variable):
        if gradient is None:
            return None
        if variable_key(variable) not in masks:
            # The optimizer uses all gradients of a branch, or none.
            return tf.identity(gradient)
        return zero_outside(masks[variable_key(variable)], gradient)

    return [within(g, v) for g, v in zip(gradients, variables, strict=True)]


# A layer seems masked if at least this many gradients are zero against
# expectation. By chance this is less likely than exp(-20).
_ENOUGH = 20.0


def seem_masked(
    masks: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Returns which gradients seem masked: zero outside masks by mistake.

    Dense gradients may also be zero there: for pixels that are always black,
    units that a ReLU has shut off, a kernel so small that little is removed, or
    a layer that does not affect the loss. So a gradient is expected only
    between an input and an output that have other gradients, as often as there
    is one where the mask is 1. A layer seems masked if at least 20 are expected
    and there is none. If no layer has any, and at least one is expected in
    total, each layer that expects some seems masked.

    Args:
        masks: Bool tensors, or tensors of zeros and ones.
        gradients: A tensor of the same shape for each mask.

    Returns:
        A bool for each.
    """
    reached, expected = [], []
    for mask, gradient in zip(masks, gradients, strict=True):
        kept, moved = tf.cast(mask, tf.bool), gradient != 0
        axes = range(len(mask.shape))
        alive = tf.ones_like(kept)
        for axis in axes:
            others = [other for other in axes if other != axis]
            alive &= tf.reduce_any(moved & kept, axis=others, keepdims=True)
        found = tf.math.divide_no_nan(
            _count(alive & kept & moved), _count(alive & kept)
        )
        removed = tf.logical_not(kept)
        expected.append(found * _count(alive & removed))
        reached.append(tf.reduce_any(moved & removed))
    reached, expected = tf.stack(reached), tf.stack(expected)
    nowhere = tf.logical_not(tf.reduce_any(reached))
    none = nowhere & (tf.reduce_sum(expected) >= 1.0)
    enough = (expected >= _ENOUGH) | (none & (expected > 0.0))
    return tf.logical_not(reached) & enough


def _count(where):
    return tf.reduce_sum(tf.cast(where, tf.float32))


def check_unread(
    method: str, results: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor]
) -> None:
    """Checks that growth does not depend on gradients that are never dense.

    Args:
        method: Name of the method, whose `dense_gradients` is `"never"`.
        results: Its growth scores of each layer, as they are traced.
        gradients: The gradients that it got, made in the same graph.

    Raises:
        ValueError: A score is computed from a gradient. Without a graph
            (`run_eagerly`) this is not checked.
    """
    if tf.executing_eagerly():
        return
    given = {gradient.op.name for gradient in gradients}
    # Scores may be constants that are not of this graph.
    seen, ahead = set(), [tf.identity(score).op for score in results]
    while ahead:
        operation = ahead.pop()
        if operation.name in given:
            raise ValueError(
                f"{method} has dense_gradients = 'never', so the gradient is "
                "zero at every connection that may grow, but its grow_scores "
                "read it. Set dense_gradients = 'updates' in the class."
            )
        if operation.name not in seen:
            seen.add(operation.name)
            ahead += [each.op for each in operation.inputs]
