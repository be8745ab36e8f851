"""An update within the graph of a training step."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from rigl_keras.masking.tracing import dense_gradients

__all__ = [
    "applying",
    "as_tensors",
    "densely",
    "regularisation_gradient",
    "trainable_keys",
    "variable_key",
]


@contextlib.contextmanager
def applying(optimizer, action) -> Iterator[None]:
    """Within the context, `optimizer.apply` is `action`."""
    before = vars(optimizer).get("apply")
    optimizer.apply = action
    try:
        yield
    finally:
        del optimizer.apply
        if before is not None:
            optimizer.apply = before


def regularisation_gradient(kernel):
    """Returns the gradient of a kernel's own penalty, or 0 without one."""
    if kernel.regularizer is None:
        return 0.0
    value = tf.convert_to_tensor(kernel.value)
    with tf.GradientTape() as tape:
        tape.watch(value)
        penalty = kernel.regularizer(value)
    return tape.gradient(
        penalty, value, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )


def trainable_keys(model):
    return {variable_key(v) for v in model.trainable_variables}


def variable_key(variable):
    # An optimizer takes Keras variables and those that they hold.
    return id(
        variable.value if isinstance(variable, keras.Variable) else variable
    )


def densely(train_step):
    def with_dense_gradients():
        with dense_gradients():
            return train_step()

    return with_dense_gradients


def as_tensors(logs):
    return tf.nest.map_structure(
        lambda x: x if x is None else tf.convert_to_tensor(x), logs
    )
