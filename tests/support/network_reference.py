"""Computes a network in NumPy and float64, operation by operation."""

import math

import numpy as np

from rigl_keras.serving.network import Activation, Cell, Operation

_ERF = np.vectorize(math.erf, otypes=[np.float64])


def evaluate(network, arrays):
    """Returns a network's outputs.

    Args:
        network: A `Network`.
        arrays: `{name: array}` of its inputs, each with a batch.

    Returns:
        `{name: float64 array}` of its outputs.
    """
    last = {}
    for i, node in enumerate(network.nodes):
        last.update(dict.fromkeys(node.inputs, i))
    last.update({output.node: None for output in network.outputs})
    values = {}
    for i, node in enumerate(network.nodes):
        if node.operation == Operation.INPUT:
            value = arrays[node.name].astype(np.float64)
            fits = len(value.shape) == len(node.shape) + 1 and all(
                n in (-1, m)
                for n, m in zip(node.shape, value.shape[1:], strict=True)
            )
            assert fits, (node.name, node.shape, value.shape)
        else:
            value = _RULES[node.operation](
                node, *(values[j] for j in node.inputs)
            )
        values[i] = value
        for j in node.inputs:
            if last[j] == i:  # not read any more
                values.pop(j, None)
    return {output.name: values[output.node] for output in network.outputs}


def _padded(node, x, size, value):
    """Returns images with `value` beyond their edges, as padding says."""
    around = node.padding.numbers()
    if node.padding.same:
        around = []
        for n, k, s in zip(x.shape[1:3], size, node.strides, strict=True):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            around += [total // 2, total - total // 2]
    top, bottom, left, right = around
    edges = [(0, 0), (top, bottom), (left, right), (0, 0)]
    return np.pad(x, edges, constant_values=value)


def _places(node, x, size):
    return [
        (n - k) // s + 1
        for n, k, s in zip(x.shape[1:3], size, node.strides, strict=True)
    ]


def _strided(node, x, row, column, places):
    """Returns the pixels that lie under one entry of a window."""
    rows, columns = (
        slice(first, first + (n - 1) * s + 1, s)
        for first, n, s in zip((row, column), places, node.strides, strict=True)
    )
    return x[:, rows, columns]


def _convolution(node, x):
    kernel = node.kernel.astype(np.float64)
    height, width, channels, filters = kernel.shape
    size = [
        (k - 1) * d + 1
        for k, d in zip((height, width), node.dilations, strict=True)
    ]
    x = _padded(node, x, size, 0)
    places = _places(node, x, size)
    groups = node.groups
    by_group = kernel.reshape(height, width, channels, groups, -1)
    total = np.zeros((len(x), *places, groups, filters // groups))
    for row in range(height):
        for column in range(width):
            pixels = _strided(
                node,
                x,
                row * node.dilations[0],
                column * node.dilations[1],
                places,
            ).reshape(len(x), *places, groups, channels)
            weights = by_group[row, column]  # [channels, group, filter]
            if channels == 1:
                total += pixels * weights[0]
            else:
                total += np.einsum(
                    "nhwgc,cgf->nhwgf", pixels, weights, optimize=True
                )
    y = total.reshape(len(x), *places, filters)
    return y + node.bias if len(node.bias) else y


def _dense(node, x):
    y = x @ node.kernel.astype(np.float64)
    return y + node.bias if len(node.bias) else y


def _pool(node, x):
    fill = -np.inf if node.maximum else np.nan
    x = _padded(node, x, node.size, fill)
    places = _places(node, x, node.size)
    windows = np.stack(
        [
            _strided(node, x, row, column, places)
            for row in range(node.size[0])
            for column in range(node.size[1])
        ]
    )
    return windows.max(0) if node.maximum else np.nanmean(windows, 0)


def _global_pool(node, x):
    reduce = np.max if node.maximum else np.mean
    return reduce(x, axis=(1, 2), keepdims=node.keep_axes)


def _pad(node, x):
    top, bottom, left, right = node.padding.numbers()
    x = x[:, max(-top, 0) : x.shape[1] - max(-bottom, 0)]
    x = x[:, :, max(-left, 0) : x.shape[2] - max(-right, 0)]
    edges = [(0, 0), (max(top, 0), max(bottom, 0))]
    edges += [(max(left, 0), max(right, 0)), (0, 0)]
    return np.pad(x, edges, constant_values=node.a)


def _upsample(node, x):
    for axis, factor in zip((1, 2), node.factors, strict=True):
        if not node.bilinear:
            x = np.repeat(x, factor, axis)
            continue
        length = x.shape[axis]
        at = (np.arange(length * factor) + 0.5) / factor - 0.5
        low = np.floor(at)
        share = at - low
        first = np.clip(low, 0, length - 1).astype(int)
        second = np.clip(low + 1, 0, length - 1).astype(int)
        share = share.reshape([-1 if i == axis else 1 for i in range(4)])
        x = (
            np.take(x, first, axis) * (1 - share)
            + np.take(x, second, axis) * share
        )
    return x


def _recurrent(node, x):
    kernel = node.kernel.astype(np.float64)
    units = len(kernel)
    state = carry = np.zeros((len(x), units))
    order = range(x.shape[1])
    outputs = {}
    for t in reversed(order) if node.backwards else order:
        gates = x[:, t]
        of_state = state @ kernel
        if node.cell == Cell.LSTM:
            i, f, c, o = np.split(gates + of_state, 4, axis=-1)
            carry = _sigmoid(f) * carry + _sigmoid(i) * np.tanh(c)
            state = _sigmoid(o) * np.tanh(carry)
        else:
            z, r = np.split(
                _sigmoid((gates + of_state)[:, : 2 * units]), 2, axis=-1
            )
            if node.cell == Cell.GRU:
                product = of_state[:, 2 * units :]
                if len(node.bias):
                    product = product + node.bias
                product = r * product
            else:
                product = (r * state) @ kernel[:, 2 * units :]
            candidate = np.tanh(gates[:, 2 * units :] + product)
            state = z * state + (1 - z) * candidate
        outputs[t] = state
    if not node.sequences:
        return state
    steps = [outputs[t] for t in order]
    return np.stack(steps[::-1] if node.reversed else steps, axis=1)


def _softmax(node, x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def _hard_sigmoid(x):
    return np.clip(x / 6 + 0.5, 0, 1)


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805

_ACTIVATIONS = {
    Activation.RELU: lambda x, a, b: np.maximum(x, 0),
    Activation.CLIP: lambda x, a, b: np.clip(x, a, b),
    Activation.LEAKY_RELU: lambda x, a, b: np.where(x < 0, a * x, x),
    Activation.ELU: lambda x, a, b: np.where(
        x < 0, a * np.expm1(np.minimum(x, 0)), x
    ),
    Activation.SIGMOID: lambda x, a, b: _sigmoid(x),
    Activation.TANH: lambda x, a, b: np.tanh(x),
    Activation.SILU: lambda x, a, b: x * _sigmoid(x),
    Activation.GELU: lambda x, a, b: 0.5 * x * (1 + _ERF(x * 0.5**0.5)),
    Activation.GELU_TANH: lambda x, a, b: (
        0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
    Activation.HARD_SIGMOID: lambda x, a, b: _hard_sigmoid(x),
    Activation.HARD_SILU: lambda x, a, b: x * _hard_sigmoid(x),
    Activation.SOFTPLUS: lambda x, a, b: np.logaddexp(x, 0),
    Activation.SELU: lambda x, a, b: (
        _SELU_SCALE
        * np.where(x < 0, _SELU_ALPHA * np.expm1(np.minimum(x, 0)), x)
    ),
    Activation.EXPONENTIAL: lambda x, a, b: np.exp(x),
}

_RULES = {
    Operation.CONVOLUTION: _convolution,
    Operation.DENSE: _dense,
    Operation.AFFINE: lambda node, x: (
        x * node.scale.astype(np.float64) + node.shift
    ),
    Operation.ACTIVATION: lambda node, x: _ACTIVATIONS[node.activation](
        x, node.a, node.b
    ),
    Operation.ADD: lambda node, x, y: x + y,
    Operation.SUBTRACT: lambda node, x, y: x - y,
    Operation.MULTIPLY: lambda node, x, y: x * y,
    Operation.CONCATENATE: lambda node, *values: np.concatenate(values, -1),
    Operation.POOL: _pool,
    Operation.GLOBAL_POOL: _global_pool,
    Operation.PAD: _pad,
    Operation.UPSAMPLE: _upsample,
    Operation.RESHAPE: lambda node, x: x.reshape(len(x), *node.shape),
    Operation.SOFTMAX: _softmax,
    Operation.RECURRENT: _recurrent,
}
