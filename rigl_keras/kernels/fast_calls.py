"""Batch norm and dropout in fewer passes over memory.

Once products skip removed weights, these two take most of a training step:
Keras computes each by a dozen operations that read and write whole images. The
op library has one operation for each, with the same results up to rounding.
"""

import functools
import math

import keras
import tensorflow as tf

from rigl_keras import _keras
from rigl_keras.kernels import lane_calls, library, operations
from rigl_keras.kernels.lane_operations import in_lanes
from rigl_keras.kernels.layer_products import USUAL_BATCH, only_dense

__all__ = ["use_fast_calls", "use_usual_calls"]

# With fewer numbers nothing is gained, and no op library is built.
_LEAST_NUMBERS = 1 << 17


def use_fast_calls(layer: keras.layers.Layer) -> None:
    """Makes a layer, and its inner layers, use the op library in training.

    Classes, configurations, weights and results (up to rounding) do not change.

    Args:
        layer: A layer or model. Only Keras's batch normalisation and dropout,
            and the classes of `lane_calls.CALLS`, are changed; subclasses are
            not.
    """
    for one in _keras.flatten_layers(layer):
        call = _CALLS.get(type(one))
        if call is not None and "call" not in vars(one):
            # Keras looks up attributes of the instance first.
            one.call = functools.wraps(one.call)(functools.partial(call, one))


def use_usual_calls(layer: keras.layers.Layer) -> None:
    """Undoes `use_fast_calls`.

    Args:
        layer: A layer or model.
    """
    for one in _keras.flatten_layers(layer):
        if type(one) in _CALLS and "call" in vars(one):
            del one.call


def _batch_norm(layer, inputs, training=None, mask=None):
    if not (
        training
        and layer.trainable
        and mask is None
        and not layer.renorm
        and not layer.synchronized
        and layer.axis in (-1, len(inputs.shape) - 1)
        and _fits(inputs)
    ):
        return type(layer).call(layer, inputs, training=training, mask=mask)
    channels = inputs.shape[-1]
    gamma = layer.gamma if layer.scale else tf.ones(channels)
    beta = layer.beta if layer.center else tf.zeros(channels)
    normalise = (
        operations.batch_norm
        if in_lanes(inputs) is None
        else lane_calls.batch_norm
    )
    outputs, mean, variance = normalise(
        inputs,
        tf.convert_to_tensor(gamma),
        tf.convert_to_tensor(beta),
        epsilon=layer.epsilon,
    )
    for moving, now in (
        (layer.moving_mean, mean),
        (layer.moving_variance, variance),
    ):
        moving.assign(moving * layer.momentum + now * (1.0 - layer.momentum))
    return outputs


def _dropout(layer, inputs, training=False):
    if not (
        training
        and 0 < layer.rate < 1
        and layer.noise_shape is None
        and _fits(inputs)
    ):
        return type(layer).call(layer, inputs, training=training)
    seed = layer.seed_generator.next()
    found = lane_calls.dropout(inputs, layer.rate, seed)
    if found is not None:
        return found
    return operations.dropout(inputs, layer.rate, seed)


def _fits(inputs):
    """Returns whether the op library can compute inputs."""
    return (
        tf.is_tensor(inputs)
        and inputs.dtype == tf.float32
        and inputs.shape.rank is not None
        and inputs.shape.rank > 1
        and inputs.shape[-1] is not None
        and _numbers(inputs.shape) >= _LEAST_NUMBERS
        and not tf.config.list_physical_devices("GPU")
        and not only_dense()
        and library.load() is not None
    )


def _numbers(shape):
    """Returns the number of entries in the known axes of a shape."""
    batch, *rest = shape
    return (batch or USUAL_BATCH) * math.prod(n or 1 for n in rest)


_CALLS = {
    **lane_calls.CALLS,
    keras.layers.BatchNormalization: _batch_norm,
    keras.layers.Dropout: _dropout,
}
