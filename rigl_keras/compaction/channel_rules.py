"""What each kind of layer does to single channels.

`dead_units` asks the rule of each call which channels are constant, must stay
together, and are needed.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import keras
import numpy as np
from keras import layers

from rigl_keras.compaction.graphs import Call, tensors_in
from rigl_keras.compaction.linear_layers import (
    CONVOLUTIONS,
    DEPTHWISE,
    SEPARABLE,
    TRANSPOSED,
    as_float64,
    copy_with,
    is_channels_last,
    is_quantized_or_adapted,
    resized_copy,
)

__all__ = ["ChannelRule", "Slots", "channel_count", "rule_of"]


class Slots(Protocol):
    """Sets of channels that are kept or removed together."""

    def new(self, n: int) -> np.ndarray:
        """Returns the slots of n channels, each in a new set."""
        ...

    def tie(self, one: np.ndarray, other: np.ndarray) -> None:
        """Joins the sets of pairs of channels."""
        ...

    def pin(self, slots: np.ndarray) -> None:
        """Makes channels stay."""
        ...


class ChannelRule:
    """What a call does to single channels.

    This rule is for layers that compute each channel from the same channel of
    every input. `constants` must be called before the other methods, which use
    its result.

    Args:
        call: A call that `applies`.

    Attributes:
        call, layer: The call, and its layer or Keras operation.
        inputs, output: KerasTensors.
    """

    def __init__(self, call: Call):
        self.call, self.layer, self.output = call, call.layer, call.outputs
        self.inputs = tensors_in(call.args)

    @staticmethod
    def applies(call: Call) -> bool:
        """Returns whether the rule applies to a call."""
        return len(tensors_in(call.args)) == 1

    def constants(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Returns the constant value of each output channel, or NaN.

        Args:
            inputs: The constants of each input.
        """
        return _evaluated(self.call, inputs)

    def slots(self, inputs: list[np.ndarray], slots: Slots) -> np.ndarray:
        """Returns the slots of the output's channels.

        Args:
            inputs: Slots of the channels of each input.
            slots: The sets of channels.
        """
        return inputs[0]

    def needs(self, outputs: np.ndarray) -> list[np.ndarray]:
        """Returns the channels of each input that needed outputs need.

        Args:
            outputs: Whether each output channel is needed.
        """
        return [outputs] * len(self.inputs)

    def remade(
        self,
        kept_inputs: list[np.ndarray],
        kept: np.ndarray,
        needed: np.ndarray,
    ) -> Any:
        """Returns the layer for the channels that are kept.

        Args:
            kept_inputs: Whether each channel of each input is kept.
            kept: Whether each output channel is kept.
            needed: Whether each output channel is needed.
        """
        if not isinstance(self.layer, keras.layers.Layer):
            return self.layer  # an operation has no state
        return copy_with(self.layer)


class _Passing(ChannelRule):
    """A layer that keeps a constant channel: pooling, dropout."""

    def constants(self, inputs):
        return inputs[0].copy()


class _PassingZero(ChannelRule):
    """A layer that keeps a channel of zeros: padding with zeros."""

    def constants(self, inputs):
        return np.where(inputs[0] == 0, 0.0, np.nan)


class _UpSampling(_PassingZero):
    def constants(self, inputs):
        # Other interpolations round, in float32 for every type.
        if getattr(self.layer, "interpolation", "nearest") == "nearest":
            return inputs[0].copy()
        return super().constants(inputs)


class _Activation(ChannelRule):
    @staticmethod
    def applies(call):
        return ChannelRule.applies(call) and _is_elementwise(
            call.layer.activation
        )


class _Merge(ChannelRule):
    """Sums, and similar merges of tensors with equal channels."""

    @staticmethod
    def applies(call):
        inputs = tensors_in(call.args)
        shapes = [(len(t.shape), t.shape[-1]) for t in inputs]
        leaves = len(keras.tree.flatten(call.args))  # no numbers among them
        return len(inputs) == leaves > 1 and len(set(shapes)) == 1

    def slots(self, inputs, slots):
        for other in inputs[1:]:
            slots.tie(inputs[0], other)
        return inputs[0]


class _Multiply(_Merge):
    def constants(self, inputs):
        self.known = inputs
        self.zero = np.any([x == 0 for x in inputs], axis=0)
        return np.where(self.zero, 0.0, super().constants(inputs))

    def needs(self, outputs):
        # The zero must stay zero: a channel that nothing needs may get any
        # value.
        return [outputs & (~self.zero | (known == 0)) for known in self.known]


class _Concatenate(ChannelRule):
    @staticmethod
    def applies(call):
        axis, rank = call.layer.axis, len(call.outputs.shape)
        return axis in (-1, rank - 1)

    def constants(self, inputs):
        self.ends = np.cumsum([x.size for x in inputs])[:-1]
        return np.concatenate(inputs)

    def slots(self, inputs, slots):
        return np.concatenate(inputs)

    def needs(self, outputs):
        return np.split(outputs, self.ends)


class _Flatten(ChannelRule):
    """All positions in order, each with all channels."""

    def constants(self, inputs):
        return np.tile(inputs[0], self._positions(inputs[0]))

    def slots(self, inputs, slots):
        return np.tile(inputs[0], self._positions(inputs[0]))

    def needs(self, outputs):
        channels = self.inputs[0].shape[-1]
        return [outputs.reshape(-1, channels).any(axis=0)]

    def _positions(self, channels):
        return self.output.shape[-1] // channels.size


class _BatchNorm(ChannelRule):
    @staticmethod
    def applies(call):
        axes = (-1, len(call.outputs.shape) - 1)
        return ChannelRule.applies(call) and call.layer.axis in axes

    def constants(self, inputs):
        self.zero = np.zeros(inputs[0].size, bool)
        if self.layer.scale:
            self.zero = as_float64(self.layer.gamma) == 0
        # Every input is multiplied by zero.
        return super().constants([np.where(self.zero, 0.0, inputs[0])])

    def needs(self, outputs):
        return [outputs & ~self.zero]

    def remade(self, kept_inputs, kept, needed):
        names = ["moving_mean", "moving_variance"]
        names += ["gamma"] * self.layer.scale + ["beta"] * self.layer.center
        return resized_copy(
            self.layer,
            (*self.output.shape[:-1], int(kept.sum())),
            {
                name: as_float64(getattr(self.layer, name))[kept]
                for name in names
            },
        )


class _Linear(ChannelRule):
    """Dense layers and convolutions, act(sum of input x kernel + bias).

    Attributes:
        connected: Bool array (inputs, outputs), True for connections.
        response: Array (inputs, outputs): what a constant input of 1 adds to an
            output.
    """

    @staticmethod
    def applies(call):
        layer = call.layer
        return ChannelRule.applies(call) and getattr(layer, "groups", 1) == 1

    def __init__(self, call):
        super().__init__(call)
        # In other activations, channels may depend on each other.
        self.is_elementwise = _is_elementwise(self.layer.activation)
        self._read_kernels()

    def constants(self, inputs):
        [value] = inputs
        known = ~np.isnan(value)
        self.foldable = known & ((value == 0) | (not self._sees_its_border()))
        nonzero = self.foldable & (value != 0)
        self.folded = value[nonzero] @ self.response[nonzero]
        if not self.is_elementwise:
            return np.full(self.folded.size, np.nan)
        bias = as_float64(self.layer.bias) if self.layer.use_bias else 0.0
        constant = as_float64(
            self.layer.activation(_tensor(bias + self.folded, self.output))
        )
        unknown = self.connected[~self.foldable].any(axis=0)
        return np.where(unknown, np.nan, constant)

    def slots(self, inputs, slots):
        outputs = self._output_slots(inputs[0], slots)
        if not self.is_elementwise:
            slots.pin(outputs)
        return outputs

    def needs(self, outputs):
        if not self.is_elementwise:
            outputs = np.ones_like(outputs)
        return [~self.foldable & self.connected[:, outputs].any(axis=1)]

    def remade(self, kept_inputs, kept, needed):
        [kept_input] = kept_inputs
        if not self.is_elementwise:
            needed = np.ones_like(needed)
        weights = self._sliced_kernels(kept_input, kept, needed)
        folded = np.where(needed, self.folded, 0.0)
        use_bias = self.layer.use_bias or bool(folded.any())
        if use_bias:
            bias = as_float64(self.layer.bias) if self.layer.use_bias else 0.0
            weights["bias"] = np.where(needed, bias + folded, 0.0)[kept]
        shape = self.inputs[0].shape
        changes = {"use_bias": use_bias}
        units = {"units", "filters"} & set(self.layer.get_config())
        changes.update(dict.fromkeys(units, int(kept.sum())))
        return resized_copy(
            self.layer, (*shape[:-1], int(kept_input.sum())), weights, **changes
        )

    def _sees_its_border(self):
        """Returns whether a constant input counts less at the border."""
        layer = self.layer
        if type(layer) in TRANSPOSED:
            return True
        padding = getattr(layer, "padding", "valid")
        return padding != "valid" and math.prod(layer.kernel_size) > 1

    def _output_slots(self, inputs, slots):
        return slots.new(self.output.shape[-1])

    def _read_kernels(self):
        self.kernel = self._inputs_first(as_float64(self.layer.kernel))
        self.connected = _over_positions(np.any, self.kernel != 0)
        self.response = _over_positions(np.sum, self.kernel)

    def _sliced_kernels(self, kept_input, kept, needed):
        kernel = self.kernel.copy()
        kernel[..., self.foldable, :] = 0
        kernel[..., ~needed] = 0
        kernel = kernel[..., kept_input, :][..., kept]
        return {"kernel": self._inputs_first(kernel)}

    def _inputs_first(self, kernel):
        """Returns a kernel as (..., inputs, outputs), or converts it back."""
        if type(self.layer) in TRANSPOSED:
            return np.swapaxes(kernel, -1, -2)
        return kernel


class _Depthwise(_Linear):
    """Several outputs for each channel, which stay or go with it."""

    def _output_slots(self, inputs, slots):
        return np.repeat(inputs, self.kernel.shape[-1])

    def _read_kernels(self):
        self.kernel = as_float64(self.layer.kernel)
        *_, channels, multiplier = self.kernel.shape
        inputs = np.repeat(np.arange(channels), multiplier)
        outputs = np.arange(channels * multiplier)
        shape = channels, channels * multiplier
        self.connected, self.response = np.zeros(shape, bool), np.zeros(shape)
        nonzero = _over_positions(np.any, self.kernel != 0)
        total = _over_positions(np.sum, self.kernel)
        self.connected[inputs, outputs] = nonzero.ravel()
        self.response[inputs, outputs] = total.ravel()

    def _sliced_kernels(self, kept_input, kept, needed):
        kernel = self.kernel.copy()
        kernel[..., self.foldable, :] = 0
        kernel[..., ~needed.reshape(kernel.shape[-2:])] = 0
        return {"kernel": kernel[..., kept_input, :]}


class _Separable(_Linear):
    """A depthwise convolution followed by a 1 x 1 convolution."""

    def _read_kernels(self):
        self.depthwise = as_float64(self.layer.depthwise_kernel)
        pointwise = as_float64(self.layer.pointwise_kernel)
        self.shape = pointwise.shape
        # (channels, multiplier, outputs)
        self.pointwise = pointwise.reshape(*self.depthwise.shape[-2:], -1)
        reach = _over_positions(np.any, self.depthwise != 0)
        total = _over_positions(np.sum, self.depthwise)
        joined = reach[..., np.newaxis] & (self.pointwise != 0)
        self.connected = joined.any(axis=1)
        self.response = np.einsum("cm,cmo->co", total, self.pointwise)

    def _sliced_kernels(self, kept_input, kept, needed):
        pointwise = self.pointwise.copy()
        pointwise[self.foldable] = 0
        pointwise[..., ~needed] = 0
        pointwise = pointwise[kept_input][..., kept]
        return {
            "depthwise_kernel": self.depthwise[..., kept_input, :],
            "pointwise_kernel": pointwise.reshape(
                *self.shape[:-2], -1, pointwise.shape[-1]
            ),
        }


# Exact types: a subclass may compute something else.
_RULES = {
    **dict.fromkeys((layers.Dense, *CONVOLUTIONS, *TRANSPOSED), _Linear),
    **dict.fromkeys(DEPTHWISE, _Depthwise),
    **dict.fromkeys(SEPARABLE, _Separable),
    layers.BatchNormalization: _BatchNorm,
    layers.Activation: _Activation,
    **dict.fromkeys((layers.ReLU, layers.LeakyReLU, layers.ELU), ChannelRule),
    **dict.fromkeys(
        (
            layers.ActivityRegularization,
            layers.AlphaDropout,
            layers.AveragePooling1D,
            layers.AveragePooling2D,
            layers.AveragePooling3D,
            layers.Cropping1D,
            layers.Cropping2D,
            layers.Cropping3D,
            layers.Dropout,
            layers.GaussianDropout,
            layers.GaussianNoise,
            layers.GlobalAveragePooling1D,
            layers.GlobalAveragePooling2D,
            layers.GlobalAveragePooling3D,
            layers.GlobalMaxPooling1D,
            layers.GlobalMaxPooling2D,
            layers.GlobalMaxPooling3D,
            layers.Identity,
            layers.MaxPooling1D,
            layers.MaxPooling2D,
            layers.MaxPooling3D,
            layers.SpatialDropout1D,
            layers.SpatialDropout2D,
            layers.SpatialDropout3D,
        ),
        _Passing,
    ),
    **dict.fromkeys(
        (layers.UpSampling1D, layers.UpSampling2D, layers.UpSampling3D),
        _UpSampling,
    ),
    **dict.fromkeys(
        (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D),
        _PassingZero,
    ),
    **dict.fromkeys(
        (
            layers.Add,
            layers.Average,
            layers.Maximum,
            layers.Minimum,
            layers.Subtract,
        ),
        _Merge,
    ),
    layers.Multiply: _Multiply,
    layers.Concatenate: _Concatenate,
    layers.Flatten: _Flatten,
}


@functools.cache
def _rules():
    """Returns `_RULES`, and rules of operations, whose types are unnamed."""
    x: Any = keras.Input((1,))
    y: Any = keras.Input((1,))
    functions = ("gelu", "relu", "relu6", "sigmoid", "silu", "tanh")
    results = {
        _Merge: [x + y, x - y],
        _Multiply: [x * y],
        ChannelRule: [getattr(keras.ops, name)(x) for name in functions],
    }
    return _RULES | {
        type(operation): rule
        for rule, tensors in results.items()
        for operation in keras.Model([x, y], tensors).operations
        if not isinstance(operation, layers.InputLayer)
    }


def rule_of(call: Call, times: Mapping[int, int]) -> ChannelRule | None:
    """Returns the rule of a call, or None if nothing is known of it.

    Args:
        call: The call.
        times: Number of calls of each layer, by its id.
    """
    layer = call.layer
    rule = _rules().get(type(layer))
    tensors = tensors_in((call.args, call.outputs))
    if (
        rule is None
        or any(channel_count(tensor) is None for tensor in tensors)
        or not call.passes_inputs_only
        or not is_channels_last(layer)
        or is_quantized_or_adapted(layer)
        or (getattr(layer, "weights", None) and times[id(layer)] > 1)
        or not rule.applies(call)
    ):
        return None
    return rule(call)


_ELEMENTWISE = [
    getattr(keras.activations, name)
    for name in (
        "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu "
        "hard_tanh leaky_relu linear log_sigmoid mish relu relu6 selu "
        "sigmoid silu soft_shrink softplus softsign sparse_plus "
        "sparse_sigmoid squareplus tanh tanh_shrink threshold"
    ).split()
]


def _is_elementwise(activation):
    return any(activation is known for known in _ELEMENTWISE)


def channel_count(tensor: keras.KerasTensor) -> int | None:
    """Returns the size of the last axis, or None if it is unknown.

    It is also None if the last axis is the batch.

    Args:
        tensor: An input or output of a call.
    """
    return tensor.shape[-1] if len(tensor.shape) > 1 else None


def _evaluated(call, inputs):
    """Returns a layer's outputs for constant channels, NaN for others."""
    shape = (1,) * (len(call.outputs.shape) - 1) + (-1,)
    tensors = [
        _tensor(np.where(np.isnan(x), 0.0, x).reshape(shape), call.outputs)
        for x in inputs
    ]
    if isinstance(call.layer, layers.Layer):
        values = call.layer(tensors if len(tensors) > 1 else tensors[0])
    else:
        values = call.layer(*tensors)
    unknown = np.any(np.isnan(inputs), axis=0)
    return np.where(unknown, np.nan, as_float64(values).ravel())


def _tensor(values, like):
    return keras.ops.convert_to_tensor(values, dtype=like.dtype)


def _over_positions(reduce, kernel):
    return reduce(kernel, axis=tuple(range(kernel.ndim - 2)))
