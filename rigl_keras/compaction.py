"""A trained network made smaller, its outputs unchanged.

`fold_batch_norm` puts batch norms into the layers before them;
`remove_dead_units` takes out the units that sparsity has cut off. Both
return a plain dense Keras model.
"""

import dataclasses
import functools
import math
from collections import Counter

import keras
import numpy as np
from keras import layers

from rigl_keras.graphs import rebuild, tensors_in, trace
from rigl_keras.sparsify import aligned

__all__ = ["Folding", "Removal", "fold_batch_norm", "remove_dead_units"]

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_LINEAR = (
    layers.Dense,
    *_CONVOLUTIONS,
    *_TRANSPOSED,
    *_DEPTHWISE,
    *_SEPARABLE,
)


@dataclasses.dataclass(frozen=True)
class Folding:
    """What `fold_batch_norm` did.

    Attributes:
        folded: `{batch norm: the layer that does its work now}`, names.
        kept: `{batch norm: why it is still there}`.
    """

    folded: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        total = len(self.folded) + len(self.kept)
        lines = [f"{len(self.folded)} of {total} batch norms folded"]
        lines += [f"  {norm} into {into}" for norm, into in self.folded.items()]
        if self.kept:
            lines.append("kept:")
            lines += [f"  {norm}: {why}" for norm, why in self.kept.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Removal:
    """What `remove_dead_units` did.

    Attributes:
        layers: `{name: (units before, units after)}` of the layers with
            weights that have fewer now.
        parameters_before: Size of all weights of the plain model.
        parameters_after: That of the returned one.
    """

    layers: dict[str, tuple[int, int]]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        before, after = self.parameters_before, self.parameters_after
        rows = [
            (name, f"{now:,} of {was:,} units")
            for name, (was, now) in self.layers.items()
        ] or [("no unit is dead", "")]
        lines = [line.rstrip() for line in aligned(rows)]
        share = f" ({after / before:.1%})" if before else ""
        lines.append(f"parameters: {after:,} of {before:,}{share}")
        return "\n".join(lines)


def fold_batch_norm(model: keras.Model) -> tuple[keras.Model, Folding]:
    """Returns a model whose batch norms are part of the layers before them.

    Of a batch norm that alone reads a linear layer without activation:

    1. scale = gamma / sqrt(moving variance + epsilon), one for each unit
    2. kernel <- kernel x scale
    3. bias <- (bias - moving mean) x scale + beta

    computed in float64, and the batch norm is gone. Jacob et al., 2018,
    arXiv:1712.05877, section 3.2. Zeros of the kernel stay zero. The result
    is for inference: it does not follow the statistics of further batches.

    Args:
        model: A built Sequential or Functional model, masked or not. It is
            left as it is.

    Returns:
        `(model, Folding)`: a plain Functional model, models in it opened, of
        the same outputs up to rounding; and what was folded, and what not
        and why.

    Raises:
        ValueError: The model is subclassed or not built.

    Example:

    >>> folded, folding = fold_batch_norm(model)
    >>> print(folding)
    2 of 3 batch norms folded
      bn1 into conv1
      bn2 into conv2
    kept:
      bn3: it follows 'add', an Add
    """
    graph = trace(model)
    times = Counter(id(call.layer) for call in graph.calls)
    producers, readers = {}, Counter()
    for call in graph.calls:
        readers.update(id(t) for t in tensors_in((call.args, call.kwargs)))
        producers.update({id(t): call for t in tensors_in(call.outputs)})
    readers.update(id(t) for t in tensors_in(graph.outputs))
    new, folded, kept = {}, {}, {}
    for call in graph.calls:
        norm = call.layer
        if not isinstance(norm, layers.BatchNormalization):
            continue
        read = tensors_in((call.args, call.kwargs))[0]
        before = producers.get(id(read))
        why = _why_not_folded(call, before, times, readers)
        if why:
            kept[norm.name] = why
            continue
        new[id(norm)] = None
        new[id(before.layer)] = _scaled(before, norm)
        folded[norm.name] = before.layer.name
    small = rebuild(graph, lambda layer: new.get(id(layer), layer))
    return small, Folding(folded, kept)


def _why_not_folded(call, before, times, readers):
    """Returns why a batch norm cannot be folded, or None."""
    norm = call.layer
    if before is None:
        return "it follows an input of the model"
    layer = before.layer
    if type(layer) not in _LINEAR:
        return f"it follows {layer.name!r}, {_kind(layer)}"
    if type(norm) is not layers.BatchNormalization:
        return f"it is {_kind(norm)}, which may compute otherwise"
    if times[id(norm)] > 1:
        return f"it is called {times[id(norm)]} times"
    if times[id(layer)] > 1:
        return f"{layer.name!r} is called {times[id(layer)]} times"
    if readers[id(before.outputs)] > 1:
        return f"the output of {layer.name!r} is needed elsewhere"
    if layer.activation is not keras.activations.linear:
        return f"{layer.name!r} has an activation"
    if not _is_inference(call) or not _is_inference(before):
        return "it or the layer before is called with special arguments"
    if norm.axis not in (-1, len(before.outputs.shape) - 1) or not (
        _is_channels_last(layer)
    ):
        return "the channels are not the last axis"
    types = {
        t for x in (layer, norm) for t in (x.compute_dtype, x.variable_dtype)
    }
    if len(types) > 1:
        return f"more than one type: {', '.join(sorted(types))}"
    if _is_special(layer):
        return f"{layer.name!r} is quantised or has LoRA weights"
    return None


def _kind(layer):
    name = type(layer).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _scaled(call, norm):
    """Returns a linear layer that does the work of a batch norm as well."""
    layer = call.layer
    scale = 1 / np.sqrt(_array(norm.moving_variance) + norm.epsilon)
    if norm.scale:
        scale = scale * _array(norm.gamma)
    bias = _array(layer.bias) if layer.use_bias else 0.0
    bias = (bias - _array(norm.moving_mean)) * scale
    if norm.center:
        bias = bias + _array(norm.beta)
    weights = {"bias": bias}
    if type(layer) in _SEPARABLE:
        weights["depthwise_kernel"] = _array(layer.depthwise_kernel)
        weights["pointwise_kernel"] = _array(layer.pointwise_kernel) * scale
    elif type(layer) in _DEPTHWISE:
        kernel = _array(layer.kernel)
        weights["kernel"] = kernel * scale.reshape(kernel.shape[-2:])
    elif type(layer) in _TRANSPOSED:
        weights["kernel"] = _array(layer.kernel) * scale[:, np.newaxis]
    else:
        weights["kernel"] = _array(layer.kernel) * scale
    shape = tensors_in(call.args)[0].shape
    return _remade(layer, shape, weights, use_bias=True)


def remove_dead_units(model: keras.Model) -> tuple[keras.Model, Removal]:
    """Returns a model without the units that do not matter to its outputs.

    1. Forward: which channels have one value whatever the inputs are. A unit
       without incoming connections has act(bias); batch norm, activations,
       pooling, sums and products pass such constants on. A layer that reads
       one adds it to its bias, unless it is not 0 and the layer pads with
       zeros, next to which it is not the same everywhere.
    2. Backward: which channels matter to an output, by connections that are
       not zero.
    3. Channels that must go together (the terms of an `Add`, the copies that
       `Flatten` makes of one channel) go if none of them matters. Inputs,
       outputs and what unknown layers read or return stay. A layer of which
       nothing would be left keeps one unit.

    Args:
        model: A built Sequential or Functional model, masked or not. It is
            left as it is.

    Returns:
        `(model, Removal)`: a plain Functional model, models in it opened, of
        the same outputs up to rounding; and what went. Kernels hold zeros
        also where a unit that stays has lost its meaning.

    Raises:
        ValueError: The model is subclassed or not built.

    Example:

    >>> small, removal = remove_dead_units(model)
    >>> print(removal)
    conv1  5 of 8 units
    conv2  11 of 16 units
    parameters: 1,024 of 2,210 (46.3%)
    """
    graph = trace(model)
    channels = _Channels(graph)
    new = channels.layers()
    small = rebuild(graph, lambda layer: new.get(id(layer), layer))
    shrunk = {}
    for call in graph.calls:
        if getattr(call.layer, "weights", None) and id(call.layer) in new:
            kept = channels.kept(call.outputs)
            if not kept.all():
                shrunk[call.layer.name] = (kept.size, int(kept.sum()))
    before = {
        id(weight): math.prod(weight.shape)
        for call in graph.calls
        for weight in getattr(call.layer, "weights", ())
    }
    return small, Removal(shrunk, sum(before.values()), small.count_params())


class _Slots:
    """Sets of channels that are kept or removed together (union-find)."""

    def __init__(self):
        self._parents, self._pinned = [], []

    def new(self, n):
        first = len(self._parents)
        self._parents.extend(range(first, first + n))
        return np.arange(first, first + n)

    def tie(self, one, other):
        for a, b in zip(one, other, strict=True):
            self._parents[self._root(b)] = self._root(a)

    def pin(self, slots):
        self._pinned.extend(slots)

    def roots(self, slots):
        return np.array([self._root(slot) for slot in slots], int)

    @property
    def pinned(self):
        return self.roots(self._pinned)

    def __len__(self):
        return len(self._parents)

    def _root(self, slot):
        while self._parents[slot] != slot:
            self._parents[slot] = self._parents[self._parents[slot]]
            slot = self._parents[slot]
        return slot


class _Channels:
    """What is known of each channel of each tensor of a graph.

    Channels are the last axis. A tensor without one, or of unknown size, is
    read and written by unknown layers only.
    """

    def __init__(self, graph):
        self._slots = _Slots()
        self._of = {}  # id of a tensor: its slots
        self._constants, self._needs = {}, {}
        times = Counter(id(call.layer) for call in graph.calls)
        self._rules = [(call, _rule(call, times)) for call in graph.calls]
        for tensor in tensors_in(graph.inputs):
            self._pin_unknown(tensor)
        for call, rule in self._rules:
            self._forward(call, rule)
        for tensor in tensors_in(graph.outputs):
            self._need_all(tensor)
        for call, rule in reversed(self._rules):
            self._backward(call, rule)
        self._decide()

    def kept(self, tensor):
        """Returns which channels of a tensor stay."""
        return self._stays[self._slots.roots(self._of[id(tensor)])]

    def layers(self):
        """Returns `{id of a layer: the one that takes its place}`."""
        return {
            id(call.layer): rule.remade(
                [self.kept(t) for t in rule.inputs],
                self.kept(rule.output),
                self._needs[id(rule.output)],
            )
            for call, rule in self._rules
            if rule
        }

    def _pin_unknown(self, tensor):
        width = _width(tensor)
        if width is not None:
            self._of[id(tensor)] = self._slots.new(width)
            self._slots.pin(self._of[id(tensor)])
            self._constants[id(tensor)] = np.full(width, np.nan)
            self._needs[id(tensor)] = np.zeros(width, bool)

    def _need_all(self, tensor):
        if id(tensor) in self._needs:
            self._needs[id(tensor)][:] = True

    def _forward(self, call, rule):
        if not rule:
            for tensor in tensors_in(call.outputs):
                self._pin_unknown(tensor)
            return
        out = id(rule.output)
        constants = rule.constants(
            [self._constants[id(t)] for t in rule.inputs]
        )
        constants[~np.isfinite(constants)] = np.nan
        self._constants[out] = constants
        self._needs[out] = np.zeros(constants.size, bool)
        self._of[out] = rule.slots(
            [self._of[id(t)] for t in rule.inputs], self._slots
        )

    def _backward(self, call, rule):
        if not rule:
            for tensor in tensors_in((call.args, call.kwargs)):
                self._need_all(tensor)
            return
        needs = rule.needs(self._needs[id(rule.output)])
        for tensor, need in zip(rule.inputs, needs, strict=True):
            self._needs[id(tensor)] |= need

    def _decide(self):
        self._stays = np.zeros(len(self._slots), bool)
        self._stays[self._slots.pinned] = True
        for tensor, slots in self._of.items():
            self._stays[self._slots.roots(slots[self._needs[tensor]])] = True
        # No layer has zero units. What stays only grows: once is enough.
        for slots in self._of.values():
            roots = self._slots.roots(slots)
            if not self._stays[roots].any():
                self._stays[roots[0]] = True


# What one call means for single channels.


class _Rule:
    """A layer that computes each channel of its inputs' same channels.

    Args:
        call: A call that `applies`.
    """

    def __init__(self, call):
        self.call, self.layer, self.output = call, call.layer, call.outputs
        self.inputs = tensors_in(call.args)

    @staticmethod
    def applies(call):
        return len(tensors_in(call.args)) == 1

    def constants(self, inputs):
        """Returns the constant value of each output channel, or NaN."""
        return _evaluated(self.call, inputs)

    def slots(self, inputs, slots):
        """Returns the slots of the outputs, given those of the inputs."""
        return inputs[0]

    def needs(self, outputs):
        """Returns which channels of each input the needed outputs need."""
        return [outputs] * len(self.inputs)

    def remade(self, kept_inputs, kept, needed):
        """Returns the layer for the channels that are kept."""
        if not isinstance(self.layer, keras.layers.Layer):
            return self.layer  # an operation has no state
        return _fresh(self.layer)


class _Passing(_Rule):
    """A layer that leaves a constant channel as it is: pooling, dropout."""

    def constants(self, inputs):
        return inputs[0].copy()


class _PassingZero(_Rule):
    """A layer that leaves a channel of zeros as it is: padding with zeros."""

    def constants(self, inputs):
        return np.where(inputs[0] == 0, 0.0, np.nan)


class _UpSampling(_PassingZero):
    def constants(self, inputs):
        # Other interpolation is rounded, in float32 whatever the type.
        if getattr(self.layer, "interpolation", "nearest") == "nearest":
            return inputs[0].copy()
        return super().constants(inputs)


class _Activation(_Rule):
    @staticmethod
    def applies(call):
        return _Rule.applies(call) and _is_elementwise(call.layer.activation)


class _Merge(_Rule):
    """Sums and the like of tensors of one number of channels."""

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
        # The zero itself must stay one: a channel that nothing needs may
        # take any value.
        return [outputs & (~self.zero | (known == 0)) for known in self.known]


class _Concatenate(_Rule):
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


class _Flatten(_Rule):
    """Positions one after the other, each with all channels."""

    def constants(self, inputs):
        return np.tile(inputs[0], self._positions(inputs[0]))

    def slots(self, inputs, slots):
        return np.tile(inputs[0], self._positions(inputs[0]))

    def needs(self, outputs):
        channels = self.inputs[0].shape[-1]
        return [outputs.reshape(-1, channels).any(axis=0)]

    def _positions(self, channels):
        return self.output.shape[-1] // channels.size


class _BatchNorm(_Rule):
    @staticmethod
    def applies(call):
        axes = (-1, len(call.outputs.shape) - 1)
        return _Rule.applies(call) and call.layer.axis in axes

    def constants(self, inputs):
        self.zero = np.zeros(inputs[0].size, bool)
        if self.layer.scale:
            self.zero = _array(self.layer.gamma) == 0
        # Whatever comes in, it is multiplied by zero.
        return super().constants([np.where(self.zero, 0.0, inputs[0])])

    def needs(self, outputs):
        return [outputs & ~self.zero]

    def remade(self, kept_inputs, kept, needed):
        names = ["moving_mean", "moving_variance"]
        names += ["gamma"] * self.layer.scale + ["beta"] * self.layer.center
        return _remade(
            self.layer,
            (*self.output.shape[:-1], int(kept.sum())),
            {name: _array(getattr(self.layer, name))[kept] for name in names},
        )


class _Linear(_Rule):
    """Dense layers and convolutions, act(sum of input x kernel + bias).

    Attributes:
        connected: Whether an input has a connection to an output, (inputs,
            outputs).
        response: What a constant input of 1 adds to an output, the same.
    """

    @staticmethod
    def applies(call):
        layer = call.layer
        return _Rule.applies(call) and getattr(layer, "groups", 1) == 1

    def __init__(self, call):
        super().__init__(call)
        # Of any other activation the channels may depend on each other.
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
        bias = _array(self.layer.bias) if self.layer.use_bias else 0.0
        constant = _as_floats(
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
            bias = _array(self.layer.bias) if self.layer.use_bias else 0.0
            weights["bias"] = np.where(needed, bias + folded, 0.0)[kept]
        shape = self.inputs[0].shape
        changes = {"use_bias": use_bias}
        units = {"units", "filters"} & set(self.layer.get_config())
        changes.update(dict.fromkeys(units, int(kept.sum())))
        return _remade(
            self.layer, (*shape[:-1], int(kept_input.sum())), weights, **changes
        )

    def _sees_its_border(self):
        """Returns whether a constant input counts less at some positions."""
        layer = self.layer
        if type(layer) in _TRANSPOSED:
            return True
        padding = getattr(layer, "padding", "valid")
        return padding != "valid" and math.prod(layer.kernel_size) > 1

    def _output_slots(self, inputs, slots):
        return slots.new(self.output.shape[-1])

    def _read_kernels(self):
        self.kernel = self._inputs_first(_array(self.layer.kernel))
        self.connected = _over_positions(np.any, self.kernel != 0)
        self.response = _over_positions(np.sum, self.kernel)

    def _sliced_kernels(self, kept_input, kept, needed):
        kernel = self.kernel.copy()
        kernel[..., self.foldable, :] = 0
        kernel[..., ~needed] = 0
        kernel = kernel[..., kept_input, :][..., kept]
        return {"kernel": self._inputs_first(kernel)}

    def _inputs_first(self, kernel):
        """Returns a kernel as (..., inputs, outputs), or back from it."""
        if type(self.layer) in _TRANSPOSED:
            return np.swapaxes(kernel, -1, -2)
        return kernel


class _Depthwise(_Linear):
    """Several outputs of each channel, which stay or go with it."""

    def _output_slots(self, inputs, slots):
        return np.repeat(inputs, self.kernel.shape[-1])

    def _read_kernels(self):
        self.kernel = _array(self.layer.kernel)
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
    """A depthwise convolution and then one of 1 x 1."""

    def _read_kernels(self):
        self.depthwise = _array(self.layer.depthwise_kernel)
        pointwise = _array(self.layer.pointwise_kernel)
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


# Exact types: what a subclass computes is not known.
_RULES = {
    **dict.fromkeys((layers.Dense, *_CONVOLUTIONS, *_TRANSPOSED), _Linear),
    **dict.fromkeys(_DEPTHWISE, _Depthwise),
    **dict.fromkeys(_SEPARABLE, _Separable),
    layers.BatchNormalization: _BatchNorm,
    layers.Activation: _Activation,
    **dict.fromkeys((layers.ReLU, layers.LeakyReLU, layers.ELU), _Rule),
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
    """Returns `_RULES` with those of operations, whose types have no names."""
    x, y = keras.Input((1,)), keras.Input((1,))
    functions = ("gelu", "relu", "relu6", "sigmoid", "silu", "tanh")
    results = {
        _Merge: [x + y, x - y],
        _Multiply: [x * y],
        _Rule: [getattr(keras.ops, name)(x) for name in functions],
    }
    return _RULES | {
        type(operation): rule
        for rule, tensors in results.items()
        for operation in keras.Model([x, y], tensors).operations
        if not isinstance(operation, layers.InputLayer)
    }


def _rule(call, times):
    """Returns the `_Rule` of a call, or None: nothing is known of it."""
    layer = call.layer
    rule = _rules().get(type(layer))
    tensors = tensors_in((call.args, call.outputs))
    if (
        rule is None
        or any(_width(tensor) is None for tensor in tensors)
        or not _is_inference(call)
        or not _is_channels_last(layer)
        or _is_special(layer)
        or (getattr(layer, "weights", None) and times[id(layer)] > 1)
        or not rule.applies(call)
    ):
        return None
    return rule(call)


def _is_inference(call):
    """Returns whether a call gives nothing but the inputs."""
    return all(
        value is None or (name == "training" and value is False)
        for name, value in call.kwargs.items()
    )


def _is_channels_last(layer):
    return getattr(layer, "data_format", None) in (None, "channels_last")


def _is_special(layer):
    """Returns whether a layer computes with more than its kernel."""
    return bool(
        getattr(layer, "lora_enabled", False)
        or getattr(layer, "quantization_mode", None)
    )


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


def _width(tensor):
    """Returns the number of channels, or None where there is no such axis."""
    return tensor.shape[-1] if len(tensor.shape) > 1 else None


def _evaluated(call, inputs):
    """Returns what a layer makes of constant channels, NaN of the others."""
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
    return np.where(unknown, np.nan, _as_floats(values).ravel())


def _tensor(values, like):
    return keras.ops.convert_to_tensor(values, dtype=like.dtype)


def _as_floats(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)


def _array(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)


def _over_positions(reduce, kernel):
    return reduce(kernel, axis=tuple(range(kernel.ndim - 2)))


def _fresh(layer, **changes):
    return type(layer).from_config({**layer.get_config(), **changes})


def _remade(layer, input_shape, weights, **changes):
    """Returns a layer of other sizes with the given weights."""
    new = _fresh(layer, **changes)
    new.build(input_shape)
    for name, value in weights.items():
        getattr(new, name).assign(value)
    return new
