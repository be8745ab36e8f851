"""A model for inference in which sparse convolutions do more than convolve.

A sparse convolution packs its input and unpacks its output. While it does, it
computes the layers around it, so that memory is read and written once:

    relu? (batch norm? (x)), zero padding  ->  convolution  ->
    batch norm?, + residual?, relu?
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from rigl_keras import kernels
from rigl_keras.compaction.graphs import Call, tensors_in, trace
from rigl_keras.kernels import layer_products

__all__ = ["Fused", "FusedLayer"]


@dataclasses.dataclass(frozen=True)
class FusedLayer:
    """How a convolution or dense layer is computed.

    Attributes:
        name: Name of the layer.
        choice: Which product it uses, and why.
        after: Names of the layers after it that are computed with it.
    """

    name: str
    choice: kernels.Choice
    after: tuple[str, ...] = ()


class Fused:
    """Computes what a model does in inference, its sparse products fused.

    Args:
        model: A built Sequential or Functional model, masked or not. Its
            weights are taken as they are now.
        product: `"sparse"`, wherever a layer has a sparse product and a
            weight that is zero; or `"auto"`, where that is faster at
            `batch_size`.
        batch_size: Batch that is timed, at least 1.

    Attributes:
        layers: A `FusedLayer` for each convolution and dense layer.

    Raises:
        ValueError: The model is subclassed, or there is no op library.

    Example:

    >>> fast = tf.function(Fused(model))
    >>> fast(images)
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        product: str = "auto",
        batch_size: int = 128,
    ):
        if kernels.load() is None:
            raise ValueError(
                "Sparse kernels are not available: "
                f"{kernels.unavailable()}. Pass product='dense'."
            )
        self._graph = trace(model)
        self._product = product
        self._batch_size = batch_size
        self._made_by = {}
        self._readers = {}
        for call in self._graph.calls:
            for tensor in tensors_in(call.outputs):
                self._made_by[id(tensor)] = call
            for tensor in tensors_in((call.args, call.kwargs)):
                self._readers.setdefault(id(tensor), []).append(call)
        for tensor in tensors_in(self._graph.outputs):
            self._readers.setdefault(id(tensor), []).append(None)
        times = collections.Counter(id(c.layer) for c in self._graph.calls)
        self._choices = {
            id(call): self._choice(call, times[id(call.layer)])
            for call in self._graph.calls
            if isinstance(call.layer, _WITH_PRODUCT)
        }
        self.layers = []
        self._steps = self._planned()

    def __call__(self, inputs: Any) -> Any:
        """Returns the model's outputs.

        Args:
            inputs: Tensors in the structure that the model is called on.
        """
        given = keras.tree.flatten(self._graph.inputs)
        values = {
            id(symbol): _Read(tf.convert_to_tensor(tensor))
            for symbol, tensor in zip(
                given, keras.tree.flatten(inputs), strict=True
            )
        }
        for step in self._steps:
            step.run(values)
        return keras.tree.map_structure(
            lambda symbol: values[id(symbol)].tensor(), self._graph.outputs
        )

    def _planned(self):
        """Returns the steps, each convolution with what it does besides."""
        steps, done = [], set()
        for call in reversed(self._graph.calls):
            outputs = tensors_in(call.outputs)
            if any(id(tensor) in done for tensor in outputs):
                continue
            matched = len(outputs) == 1 and self._match(outputs[0])
            if matched:
                done.update(id(tensor) for tensor in matched.within)
                steps.append(matched)
                self.layers.append(matched.fused_layer)
            else:
                steps.append(_Plain(call))
                if id(call) in self._choices:
                    choice = self._choices[id(call)]
                    self.layers.append(FusedLayer(call.layer.name, choice))
        self.layers.reverse()
        return steps[::-1]

    def _match(self, tensor):
        """Returns the sparse convolution that a tensor comes from, or None."""
        call, inner = self._made_by[id(tensor)], tensor
        after, within = [], []
        relu = _is_relu(call.layer) and self._has_one_reader(call.args[0])
        if relu:
            inner = call.args[0]
            after, within = [call.layer.name], [inner]
        found = self._match_normalised(inner, after, within, None, relu)
        if found or id(inner) not in self._made_by:
            return found and dataclasses.replace(found, output=tensor)
        call = self._made_by[id(inner)]
        for this, other in _summands(call):
            if self._has_one_reader(this) and this.shape == other.shape:
                found = self._match_normalised(
                    this,
                    [call.layer.name, *after],
                    [*within, this],
                    other,
                    relu,
                )
                if found:
                    return dataclasses.replace(found, output=tensor)
        return None

    def _match_normalised(self, tensor, after, within, residual, relu):
        call = self._made_by.get(id(tensor))
        norm = None
        if call and _is_norm(call) and self._has_one_reader(call.args[0]):
            norm, tensor = call.layer, call.args[0]
            after, within = [norm.name, *after], [*within, tensor]
            call = self._made_by.get(id(tensor))
        choice = self._choices.get(id(call))
        if call is None or choice is None or not choice.sparse:
            return None
        activated = call.layer.activation is keras.activations.relu
        linear = call.layer.activation in (None, keras.activations.linear)
        if not linear and not (activated and not after):
            return None
        return _SparseStep.of(
            call, norm, residual, relu or activated, after, within, choice
        )

    def _has_one_reader(self, tensor):
        return (
            id(tensor) in self._made_by and len(self._readers[id(tensor)]) == 1
        )

    def _choice(self, call, times):
        """Returns which product a layer's call has, of so many calls."""
        why = layer_products.why_dense(call.layer)
        if why is None and times > 1:
            why = "it is called more than once"
        if why:
            return kernels.Choice(False, why)
        weights = call.layer.kernel.numpy()
        density = np.count_nonzero(weights) / weights.size
        shape = tf.TensorShape((self._batch_size, *call.args[0].shape[1:]))
        if self._product == "sparse":
            choice = layer_products.sparse_if_possible(
                call.layer, shape, backward=False
            )
            if not choice.sparse:
                return choice
            return kernels.Choice(density < 1, f"density {density:.2f}")
        return layer_products.faster_product(
            call.layer, shape, density, backward=False
        )


class _Read:
    """A tensor to be read: relu?(source * scale + shift), padded with zeros.

    What reads it sparsely does that on the way; for others it is computed.
    """

    def __init__(self, source, scale=None, shift=None, relu=False, pads=None):
        self.source = source
        self.scale, self.shift, self.relu, self.pads = scale, shift, relu, pads
        self._tensor = None

    def tensor(self):
        if self._tensor is None:
            tensor = self.source
            if self.scale is not None:
                tensor = tensor * self.scale + self.shift
            if self.relu:
                tensor = tf.nn.relu(tensor)
            if self.pads is not None:
                top, bottom, left, right = self.pads
                edges = [[0, 0], [top, bottom], [left, right], [0, 0]]
                tensor = tf.pad(tensor, edges)
            self._tensor = tensor
        return self._tensor

    def normalised(self, scale, shift):
        if self.scale is None and not self.relu and self.pads is None:
            return _Read(self.source, scale, shift)
        return _Read(self.tensor(), scale, shift)

    def activated(self):
        # Zeros stay zeros: it is all one whether they are padded before.
        return _Read(self.source, self.scale, self.shift, True, self.pads)

    def padded(self, pads):
        if self.pads is not None:
            return _Read(self.tensor(), pads=pads)
        return _Read(self.source, self.scale, self.shift, self.relu, pads)


class _Plain:
    """A call of a layer, which is put off where it can be."""

    def __init__(self, call: Call):
        self._call = call
        self._affine = _affine(call.layer) if _is_norm(call) else None

    def run(self, values):
        layer = self._call.layer
        if self._affine is not None:
            read = values[id(self._call.args[0])]
            made = read.normalised(*self._affine)
        elif _is_relu(layer):
            made = values[id(self._call.args[0])].activated()
        elif _is_padding(layer):
            read = values[id(self._call.args[0])]
            (top, bottom), (left, right) = layer.padding
            made = read.padded((top, bottom, left, right))
        elif type(layer) in _NOTHING_IN_INFERENCE:
            made = values[id(self._call.args[0])]
        else:
            self._call_layer(values)
            return
        values[id(self._call.outputs)] = made

    def _call_layer(self, values):
        def current(structure) -> Any:
            return keras.tree.map_structure(
                lambda x: (
                    values[id(x)].tensor()
                    if isinstance(x, keras.KerasTensor)
                    else x
                ),
                structure,
            )

        call = self._call
        outputs = call.layer(*current(call.args), **current(call.kwargs))
        for symbol, tensor in zip(
            keras.tree.flatten(call.outputs),
            keras.tree.flatten(outputs),
            strict=True,
        ):
            values[id(symbol)] = _Read(tensor)


@dataclasses.dataclass(frozen=True)
class _SparseStep:
    """A sparse convolution, with what is around it."""

    input: keras.KerasTensor
    output: keras.KerasTensor
    residual: keras.KerasTensor | None
    within: Sequence[keras.KerasTensor]
    kernel: kernels.FrozenKernel
    bias: np.ndarray
    relu: bool
    layer: keras.layers.Layer
    fused_layer: FusedLayer

    @classmethod
    def of(cls, call, norm, residual, relu, after, within, choice):
        layer = call.layer
        weights = layer.kernel.numpy()
        bias = np.zeros(weights.shape[-1], np.float32)
        if layer.use_bias:
            bias = layer.bias.numpy()
        if norm is not None:
            scale, shift = _affine(norm)
            weights, bias = weights * scale, bias * scale + shift
        return cls(
            input=call.args[0],
            output=call.outputs,
            residual=residual,
            within=within,
            kernel=kernels.FrozenKernel.of(weights),
            bias=bias.astype(np.float32),
            relu=relu,
            layer=layer,
            fused_layer=FusedLayer(layer.name, choice, tuple(after)),
        )

    def run(self, values):
        read = values[id(self.input)]
        residual = None
        if self.residual is not None:
            residual = values[id(self.residual)].tensor()
        if isinstance(self.layer, layers.Dense):
            outputs = self._dense(read.tensor(), residual)
        else:
            if self.layer.padding != "valid" and read.pads is not None:
                read = _Read(read.tensor())
            outputs = self._convolution(
                read.source,
                residual,
                strides=self.layer.strides,
                padding=self.layer.padding,
                dilations=self.layer.dilation_rate,
                pads=read.pads or (0, 0, 0, 0),
                scale=read.scale,
                shift=read.shift,
                relu_before=read.relu,
            )
        values[id(self.output)] = _Read(outputs)

    def _dense(self, inputs, residual):
        rows = tf.reshape(inputs, [-1, 1, 1, inputs.shape[-1]])
        if residual is not None:
            residual = tf.reshape(residual, [-1, 1, 1, residual.shape[-1]])
        shape = tf.concat([tf.shape(inputs)[:-1], [len(self.bias)]], axis=0)
        return tf.reshape(self._convolution(rows, residual), shape)

    def _convolution(self, images, residual, **options):
        return kernels.frozen_conv2d(
            images,
            self.kernel,
            bias=self.bias,
            residual=residual,
            relu_after=self.relu,
            **options,
        )


_WITH_PRODUCT = (layers.Conv2D, layers.Dense)
_NOTHING_IN_INFERENCE = (
    layers.Dropout,
    layers.SpatialDropout2D,
    layers.GaussianDropout,
    layers.GaussianNoise,
)


def _is_relu(layer):
    if type(layer) is layers.ReLU:
        return (
            layer.max_value is None
            and not layer.negative_slope
            and not layer.threshold
        )
    return (
        type(layer) is layers.Activation
        and layer.activation is keras.activations.relu
    )


def _is_padding(layer):
    return (
        type(layer) is layers.ZeroPadding2D
        and layer.data_format == "channels_last"
    )


def _is_norm(call):
    layer = call.layer
    return (
        type(layer) is layers.BatchNormalization
        and len(call.args) == 1
        and layer.axis in (-1, len(call.args[0].shape) - 1)
        and layer.compute_dtype == "float32"
    )


def _affine(norm):
    """Returns scale and shift of a batch norm in inference."""
    variance = norm.moving_variance.numpy().astype(np.float64)
    scale = 1 / np.sqrt(variance + norm.epsilon)
    if norm.scale:
        scale = scale * norm.gamma.numpy()
    shift = -norm.moving_mean.numpy() * scale
    if norm.center:
        shift = shift + norm.beta.numpy()
    return scale.astype(np.float32), shift.astype(np.float32)


def _summands(call):
    """Returns the two summands of a sum, each first once."""
    given = tensors_in((call.args, call.kwargs))
    if type(call.layer).__name__ != "Add" or len(given) != 2:
        return []
    return [given, given[::-1]]
