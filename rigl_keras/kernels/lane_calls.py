"""Layers between sparse convolutions that compute on images in lanes.

A convolution converts its images back from lanes, for any layer that follows. A
layer that knows lanes checks where its inputs come from
(`lane_operations.in_lanes`), computes in lanes, and converts its outputs back.
TensorFlow removes conversions that nobody uses. So a graph of such layers stays
in lanes, however it was built, and other layers get normal images.
"""

import keras
import tensorflow as tf

from rigl_keras.kernels import lane_operations
from rigl_keras.kernels.lane_operations import Lanes, from_lanes, in_lanes

__all__ = [
    "CALLS",
    "batch_norm",
    "convolve",
    "dropout",
    "enters",
    "is_convolution",
    "stays",
]

_NORMALISE = "RiglKerasLanesNormalise"


def is_convolution(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer's product can be computed in lanes.

    Args:
        layer: A layer that has a sparse product.
    """
    return (
        isinstance(layer, keras.layers.Conv2D)
        and not layer.use_bias
        and layer.activation in (None, keras.activations.linear)
        and max(layer.dilation_rate) == 1
        and layer.padding in ("same", "valid")
    )


def stays(layer: keras.layers.Layer, images: tf.Tensor) -> bool:
    """Returns whether a convolution's inputs are in lanes.

    Args:
        layer: A layer that has a sparse product.
        images: Its inputs.
    """
    return in_lanes(images) is not None and is_convolution(layer)


def enters(layer: keras.layers.Layer, images: tf.Tensor) -> bool:
    """Returns whether converting a convolution's inputs costs little.

    It does if its outputs are at least as large.

    Args:
        layer: A layer that has a sparse product.
        images: Its inputs.
    """
    return (
        tf.is_symbolic_tensor(images)
        and is_convolution(layer)
        and images.shape[3] * layer.strides[0] * layer.strides[1]
        <= layer.kernel.shape[3]
    )


def convolve(
    layer: keras.layers.Layer,
    images: tf.Tensor,
    kernel: tf.Tensor,
    mask: tf.Tensor,
    *,
    dense_gradient: bool,
) -> tf.Tensor:
    """Returns a convolution's outputs, computed in lanes.

    Args:
        layer: A convolution for which `is_convolution` is true.
        images: Its inputs.
        kernel, mask, dense_gradient: As in `operations.sparse_conv2d`.
    """
    lanes = lane_operations.to_lanes(images)
    values, pads = lanes.values, (0, 0, 0, 0)
    if layer.padding == "valid":
        values, pads = _without_pads(values)
    outputs = lane_operations.conv2d(
        values,
        kernel,
        mask,
        strides=layer.strides,
        padding=layer.padding,
        pads=pads,
        dense_gradient=dense_gradient,
    )
    return from_lanes(Lanes(outputs, lanes.count), images.shape[0])


def _without_pads(values):
    """Returns values before padding with zeros, and the padding, if any."""
    op = values.op
    if op.type == "Pad" and op.graph is tf.compat.v1.get_default_graph():
        pads = tf.get_static_value(op.inputs[1])
        if pads is not None:
            return op.inputs[0], [int(n) for n in pads[2:4].ravel()]
    return values, (0, 0, 0, 0)


def batch_norm(
    images: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the result of `operations.batch_norm`, in lanes.

    Args:
        images: Images in lanes.
        gamma, beta, epsilon: As in `operations.batch_norm`.
    """
    lanes = lane_operations.to_lanes(images)
    mean, variance = lane_operations.moments(lanes)
    outputs = lane_operations.normalise(
        lanes, mean, variance, gamma, beta, epsilon=epsilon
    )
    images = from_lanes(Lanes(outputs, lanes.count), images.shape[0])
    return images, mean, variance


def dropout(
    images: tf.Tensor, rate: float, seed: tf.Tensor
) -> tf.Tensor | None:
    """Returns dropout fused with the batch norm before it, or None.

    Args:
        images: Any images.
        rate, seed: As in `operations.dropout`.
    """
    lanes, channels = in_lanes(images), images.shape[-1]
    if lanes is None or channels is None or channels % 4:
        return None
    op = lanes.values.op
    if not _is_normalise(op) or op.get_attr("rate"):
        return None
    return _normalised_again(
        op, images, relu=op.get_attr("relu"), rate=rate, seed=seed
    )


def _is_normalise(op):
    return (
        op.type == _NORMALISE and op.graph is tf.compat.v1.get_default_graph()
    )


def _normalised_again(op, images, **more):
    """Returns an operation fused with what follows it.

    If nobody else uses its separate result, TensorFlow removes that.
    """
    values, count, mean, variance, gamma, beta, *_ = op.inputs
    outputs = lane_operations.normalise(
        Lanes(values, count),
        mean,
        variance,
        gamma,
        beta,
        epsilon=op.get_attr("epsilon"),
        **more,
    )
    return from_lanes(Lanes(outputs, count), images.shape[0])


def _relu(layer, inputs):
    lanes = in_lanes(inputs)
    if lanes is None or not _is_relu(layer):
        return type(layer).call(layer, inputs)
    op = lanes.values.op
    if _is_normalise(op) and not op.get_attr("rate"):
        return _normalised_again(op, inputs, relu=True)
    ends = _end_of_block(op)
    if ends is not None:
        outputs = _normalised_and_added(*ends)
    else:
        outputs = tf.nn.relu(lanes.values)
    return from_lanes(Lanes(outputs, lanes.count), inputs.shape[0])


def _end_of_block(op):
    """Returns the batch norm and the other addend of a sum, or None."""
    if op.type != "AddV2" or op.graph is not tf.compat.v1.get_default_graph():
        return None
    for values, addend in (op.inputs, op.inputs[::-1]):
        norm = values.op
        if (
            _is_normalise(norm)
            and not norm.get_attr("relu")
            and not norm.get_attr("rate")
            and values.shape[1:] == addend.shape[1:]
        ):
            return norm, addend
    return None


def _normalised_and_added(norm, addend):
    """Returns ReLU of the sum of a batch norm and an addend."""
    values, count, mean, variance, gamma, beta, *_ = norm.inputs
    return lane_operations.normalise_and_add(
        Lanes(values, count),
        mean,
        variance,
        gamma,
        beta,
        addend,
        epsilon=norm.get_attr("epsilon"),
    )


def _is_relu(layer):
    if isinstance(layer, keras.layers.Activation):
        return layer.activation is keras.activations.relu
    return (
        layer.max_value is None
        and layer.negative_slope == 0
        and layer.threshold == 0
    )


def _add(layer, inputs):
    found = [in_lanes(one) for one in inputs] if _is_list(inputs) else []
    if not any(found) or any(
        one.shape != inputs[0].shape or one.dtype != tf.float32
        for one in inputs
    ):
        return type(layer).call(layer, inputs)
    first, *rest = (lane_operations.to_lanes(one) for one in inputs)
    total = first.values
    for lanes in rest:
        total = total + lanes.values
    return from_lanes(Lanes(total, first.count), inputs[0].shape[0])


def _is_list(inputs):
    return isinstance(inputs, (list, tuple)) and all(
        tf.is_tensor(one) for one in inputs
    )


def _zero_padding(layer, inputs):
    lanes = in_lanes(inputs)
    if lanes is None or layer.data_format != "channels_last":
        return type(layer).call(layer, inputs)
    rows, columns = layer.padding
    outputs = tf.pad(
        lanes.values, [(0, 0), (0, 0), tuple(rows), tuple(columns), (0, 0)]
    )
    return from_lanes(Lanes(outputs, lanes.count), inputs.shape[0])


def _average(layer, inputs):
    lanes = in_lanes(inputs)
    if lanes is None or layer.data_format != "channels_last" or layer.keepdims:
        return type(layer).call(layer, inputs)
    means = tf.reduce_mean(lanes.values, axis=[2, 3])
    rows = tf.reshape(
        tf.transpose(means, [0, 2, 1]), [-1, lanes.values.shape[1]]
    )
    outputs = rows[: lanes.count]
    outputs.set_shape([inputs.shape[0], inputs.shape[-1]])
    return outputs


# Layers that compute on images in lanes, with their functions. Other layers
# compute as usual.
CALLS = {
    keras.layers.Activation: _relu,
    keras.layers.Add: _add,
    keras.layers.GlobalAveragePooling2D: _average,
    keras.layers.ReLU: _relu,
    keras.layers.ZeroPadding2D: _zero_padding,
}
