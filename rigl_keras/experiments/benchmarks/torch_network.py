"""Computes and trains a Keras network with PyTorch, for comparison.

PyTorch is not a dependency. It is imported when a network is made.
"""

# PyTorch may be missing where types are checked, too.
# pyright: reportMissingImports=false

import contextvars
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import keras
import numpy as np
from keras import layers

from rigl_keras.compaction.graphs import tensors_in, trace

__all__ = [
    "INSTALL",
    "is_installed",
    "torch_module",
    "torch_network",
    "torch_training_step",
]

INSTALL = "pip install torch"
# Collects the parameters that the rules below create for a training step.
_parameters: contextvars.ContextVar[list | None] = contextvars.ContextVar(
    "parameters", default=None
)


def is_installed() -> bool:
    """Returns whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


def torch_network(model: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that computes a model's inference with PyTorch.

    It makes the calls of the model's layers (`graphs.trace`) one by one, with
    `torch.nn.functional`, eagerly and in `torch.inference_mode`. Images have
    PyTorch's shape, channels first, but Keras's layout in memory, channels
    last (`torch.channels_last`), and so have kernels. So images need no copy,
    and on a CPU this was up to a quarter faster than contiguous memory.

    Args:
        model: A built Sequential or Functional model with one input and one
            output, float32 and channels last, masked or not. Its weights are
            copied.

    Returns:
        A function from an input array of the model to its output.

    Raises:
        ImportError: PyTorch is missing.
        ValueError: A layer or one of its settings is not supported.

    Example:

    >>> network = torch_network(rigl_keras.models.lenet5())
    >>> network(np.zeros((2, 28, 28, 1), np.float32)).shape
    (2, 10)
    """
    if not is_installed():
        raise ImportError(f"PyTorch is not installed: {INSTALL}")
    import torch

    compute = _tensors_through(model)

    @torch.inference_mode()
    def run(array):
        return compute(torch.from_numpy(array)).numpy()

    return run


def torch_module(model: keras.Model) -> Any:
    """Returns a PyTorch module that computes a model's inference.

    Args:
        model: As in `torch_network`.

    Returns:
        A `torch.nn.Module` that takes a tensor and returns one, channels
        last. Its weights are constants.

    Raises:
        ImportError, ValueError: As in `torch_network`.
    """
    if not is_installed():
        raise ImportError(f"PyTorch is not installed: {INSTALL}")
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.compute = _tensors_through(model)

        def forward(self, images):
            return self.compute(images)

    return Network().eval()


def _tensors_through(model):
    """Returns a function that computes a model, from a tensor to a tensor."""
    steps, given, wanted = _steps(model, _RULES)
    # Each tensor is deleted after its last use, as all tensors of a large
    # batch might not fit into memory.
    last = {read: i for i, (_, reads, _) in enumerate(steps) for read in reads}
    dropped = [[] for _ in steps]
    for read, i in last.items():
        if read != wanted:
            dropped[i].append(read)

    def run(images):
        values = {given: _channels_first(images)}
        for (compute, reads, written), unread in zip(
            steps, dropped, strict=True
        ):
            values[written] = compute(*(values[read] for read in reads))
            for read in unread:
                del values[read]
        return _channels_last(values[wanted])

    return run


def torch_training_step(
    model: keras.Model,
    *,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
) -> Callable[[np.ndarray, np.ndarray], float]:
    """Returns a training step of a sparse network, as PyTorch users write it.

    It is the step of the report's code, without mask updates: forward and
    backward pass of the dense network, the gradient of every weight, a step
    of SGD with Nesterov momentum, and weights times masks. Its time does not
    depend on the density.

    Args:
        model: As in `torch_network`. Its masks are the nonzero entries of
            kernels with at least two axes.
        learning_rate, momentum: Settings of SGD.

    Returns:
        A function from images and int labels to the loss before the step,
        the cross-entropy from logits.

    Raises:
        ImportError, ValueError: As in `torch_network`.
    """
    if not is_installed():
        raise ImportError(f"PyTorch is not installed: {INSTALL}")
    import torch

    rules = {
        **_RULES,
        layers.BatchNormalization: _batch_norm_in_training,
        layers.Dropout: _dropout_in_training,
    }
    token = _parameters.set([])
    try:
        steps, given, wanted = _steps(model, rules)
        parameters = cast(list, _parameters.get())
    finally:
        _parameters.reset(token)
    masks = [
        (p, (p.detach() != 0).to(p.dtype)) for p in parameters if p.ndim > 1
    ]
    optimizer = torch.optim.SGD(
        parameters, learning_rate, momentum=momentum, nesterov=True
    )

    def step(images, classes):
        values = {given: _channels_first(torch.from_numpy(images))}
        for compute, reads, written in steps:
            values[written] = compute(*(values[read] for read in reads))
        loss = torch.nn.functional.cross_entropy(
            values[wanted], torch.from_numpy(classes)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, mask in masks:
                parameter.mul_(mask)
        return loss.item()

    return step


def _steps(model, rules):
    """Returns the steps of a model, and the ids of its input and output."""
    graph = trace(model)
    inputs, outputs = tensors_in(graph.inputs), tensors_in(graph.outputs)
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(
            "torch_network takes models of one input and one output. "
            f"Received: {model.name!r} with {len(inputs)} and {len(outputs)}. "
            "Cut it with keras.Model(input, output)."
        )
    steps = [_step(call, rules) for call in graph.calls]
    return steps, id(inputs[0]), id(outputs[0])


def _step(call, rules) -> tuple[Callable, list[int], int]:
    """Returns a function of tensors, and the ids of its inputs and output."""
    layer = call.layer
    rule = rules.get(type(layer))
    if rule is None:
        raise _unknown(layer)
    if getattr(layer, "compute_dtype", "float32") != "float32":
        raise _unknown(layer, f"computing in {layer.compute_dtype}")
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise _unknown(layer, f"with data_format={layer.data_format!r}")
    special = [
        name
        for name, value in call.kwargs.items()
        if value is not None and value is not False
    ]
    if special:
        raise _unknown(layer, f"called with {', '.join(special)}")
    inputs, (written,) = tensors_in(call.args), tensors_in(call.outputs)
    return rule(layer, inputs), [id(x) for x in inputs], id(written)


def _unknown(layer, what=""):
    known = ", ".join(sorted(kind.__name__ for kind in _RULES))
    return ValueError(
        f"torch_network does not know layer {layer.name!r}, "
        f"{' '.join([type(layer).__name__, what]).strip()}. Build the network "
        f"of {known}, in float32, channels last and with their common "
        "settings; or add a rule to "
        "rigl_keras.experiments.benchmarks.torch_network."
    )


def _channels_first(x):
    """Returns a view of images as channels first, without a copy."""
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def _channels_last(x):
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


# Rules, one for each kind of layer. Each returns a function of tensors.


def _convolution(layer, inputs):
    kernel = _tensor(layer.kernel).permute(3, 2, 0, 1)
    return _convolved(layer, inputs, kernel, layer.groups)


def _depthwise_convolution(layer, inputs):
    rows, columns, channels, multiplier = layer.kernel.shape
    # In both libraries, output c * multiplier + m belongs to channel c.
    kernel = _tensor(layer.kernel).permute(2, 3, 0, 1)
    kernel = kernel.reshape(channels * multiplier, 1, rows, columns)
    return _convolved(layer, inputs, kernel, channels)


def _convolved(layer, inputs, kernel, groups):
    import torch
    from torch.nn import functional

    kernel = _trained(kernel.contiguous(memory_format=torch.channels_last))
    bias = _trained(_tensor(layer.bias)) if layer.use_bias else None
    pad, padding = _padding(layer, layer.kernel_size, inputs[0], 0.0)
    activation = _activation(layer)
    settings = dict(
        stride=layer.strides,
        padding=padding,
        dilation=layer.dilation_rate,
        groups=groups,
    )

    def compute(x):
        return activation(functional.conv2d(pad(x), kernel, bias, **settings))

    return compute


def _dense(layer, inputs):
    from torch.nn import functional

    if len(inputs[0].shape) != 2:
        raise _unknown(layer, f"on inputs of rank {len(inputs[0].shape)}")
    kernel = _trained(_tensor(layer.kernel).T.contiguous())
    bias = _trained(_tensor(layer.bias)) if layer.use_bias else None
    activation = _activation(layer)
    return lambda x: activation(functional.linear(x, kernel, bias))


def _batch_norm(layer, inputs, training=False):
    from torch.nn import functional

    rank = len(inputs[0].shape)
    if layer.axis not in (-1, rank - 1) or rank not in (2, 4):
        raise _unknown(
            layer, f"with axis={layer.axis} of inputs of rank {rank}"
        )
    mean, variance = map(_tensor, (layer.moving_mean, layer.moving_variance))
    gamma = _trained(_tensor(layer.gamma)) if layer.scale else None
    beta = _trained(_tensor(layer.beta)) if layer.center else None
    return lambda x: functional.batch_norm(
        x,
        mean,
        variance,
        gamma,
        beta,
        training=training,
        momentum=1 - layer.momentum,  # PyTorch's weight is of the new value
        eps=layer.epsilon,
    )


def _batch_norm_in_training(layer, inputs):
    return _batch_norm(layer, inputs, training=True)


def _relu(layer, inputs):
    from torch.nn import functional

    settings = layer.max_value, layer.negative_slope, layer.threshold
    if settings not in ((None, 0, 0), (6, 0, 0)):
        raise _unknown(
            layer,
            "with max_value={}, negative_slope={}, threshold={}".format(
                *settings
            ),
        )
    return functional.relu if layer.max_value is None else functional.relu6


def _activation(layer, inputs=None):
    import torch

    known = {
        keras.activations.linear: _same,
        keras.activations.relu: torch.nn.functional.relu,
        keras.activations.sigmoid: torch.sigmoid,
        keras.activations.tanh: torch.tanh,
    }
    if layer.activation not in known:
        name = getattr(layer.activation, "__name__", layer.activation)
        raise _unknown(layer, f"with activation {name!r}")
    return known[layer.activation]


def _add(layer, inputs):
    shapes = {tuple(tensor.shape[1:]) for tensor in inputs}
    if len(shapes) > 1:
        raise _unknown(layer, f"on inputs of shapes {sorted(shapes)}")
    return lambda first, *others: sum(others, first)


def _zero_padding(layer, inputs):
    from torch.nn import functional

    (top, bottom), (left, right) = layer.padding
    return lambda x: functional.pad(x, (left, right, top, bottom))


def _max_pooling(layer, inputs):
    from torch.nn import functional

    pad, padding = _padding(layer, layer.pool_size, inputs[0], -np.inf)
    settings = dict(
        kernel_size=layer.pool_size, stride=layer.strides, padding=padding
    )
    return lambda x: functional.max_pool2d(pad(x), **settings)


def _global_average(layer, inputs):
    if layer.keepdims:
        raise _unknown(layer, "with keepdims=True")
    return lambda x: x.mean((2, 3))


def _flatten(layer, inputs):
    return lambda x: _channels_last(x).flatten(1)


def _dropout(layer, inputs):
    return _same


def _dropout_in_training(layer, inputs):
    from torch.nn import functional

    return lambda x: functional.dropout(x, layer.rate, training=True)


_RULES: dict[Any, Callable] = {
    layers.Conv2D: _convolution,
    layers.DepthwiseConv2D: _depthwise_convolution,
    layers.Dense: _dense,
    layers.BatchNormalization: _batch_norm,
    layers.ReLU: _relu,
    layers.Activation: _activation,
    layers.Add: _add,
    layers.ZeroPadding2D: _zero_padding,
    layers.MaxPooling2D: _max_pooling,
    layers.GlobalAveragePooling2D: _global_average,
    layers.Flatten: _flatten,
    layers.Dropout: _dropout,
}


def _padding(layer, window, tensor, value):
    """Returns `(pad, padding)`: a function to call first, PyTorch's argument.

    Keras's "same" pads as little as possible, and may pad one more at the end,
    depending on the size of the images. PyTorch pads both ends equally.
    """
    from torch.nn import functional

    if layer.padding == "valid":
        return _same, 0
    sizes = tensor.shape[1:3]
    if layer.padding != "same" or None in sizes:
        raise _unknown(
            layer, f"with padding={layer.padding!r} of images {sizes}"
        )
    dilations = getattr(layer, "dilation_rate", (1, 1))
    before, after = [], []
    for size, kernel, stride, dilation in zip(
        sizes, window, layer.strides, dilations, strict=True
    ):
        reach = (kernel - 1) * dilation + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        before.append(total // 2)
        after.append(total - total // 2)
    if before == after:
        return _same, tuple(before)
    (top, left), (bottom, right) = before, after
    edges = (left, right, top, bottom)
    return lambda x: functional.pad(x, edges, value=value), 0


def _tensor(variable):
    import torch

    # A copy, as the weights of the model may change.
    return torch.tensor(keras.ops.convert_to_numpy(variable))


def _trained(tensor):
    """Returns a tensor, registered as a parameter for a training step."""
    parameters = _parameters.get()
    if parameters is not None:
        parameters.append(tensor.requires_grad_())
    return tensor


def _same(x):
    return x
