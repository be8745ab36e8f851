"""Folds batch norms into the layers before them."""

import dataclasses
from collections import Counter

import keras
import numpy as np
from keras import layers

from rigl_keras.compaction.graphs import rebuild, tensors_in, trace
from rigl_keras.compaction.linear_layers import (
    DEPTHWISE,
    LINEAR,
    SEPARABLE,
    TRANSPOSED,
    as_float64,
    is_channels_last,
    is_quantized_or_adapted,
    resized_copy,
)

__all__ = ["Folding", "fold_batch_norm"]


@dataclasses.dataclass(frozen=True)
class Folding:
    """The result of `fold_batch_norm`.

    Attributes:
        folded: `{name of a batch norm: name of the layer that includes it}`.
        kept: `{name of a batch norm: why it was not folded}`.
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


def fold_batch_norm(model: keras.Model) -> tuple[keras.Model, Folding]:
    """Returns a model whose batch norms are part of the layers before them.

    If only a batch norm reads a linear layer without activation:

    1. scale = gamma / sqrt(moving variance + epsilon), one for each unit
    2. kernel <- kernel x scale
    3. bias <- (bias - moving mean) x scale + beta

    This is computed in float64, and the batch norm is removed. Jacob et al.,
    2018, arXiv:1712.05877, section 3.2. Zeros of the kernel stay zero. The
    result is for inference: it does not learn the statistics of new batches.

    Args:
        model: A built Sequential or Functional model, masked or not. It is not
            changed.

    Returns:
        `(model, Folding)`: a plain Functional model, without models inside it,
        with the same outputs up to rounding; and what was folded or kept, with
        reasons.

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
        if before is None:
            kept[norm.name] = "it follows an input of the model"
            continue
        why = _why_not_folded(call, before, times, readers)
        if why is not None:
            kept[norm.name] = why
            continue
        new[id(norm)] = None
        new[id(before.layer)] = _scaled(before, norm)
        folded[norm.name] = before.layer.name
    small = rebuild(graph, lambda layer: new.get(id(layer), layer))
    return small, Folding(folded, kept)


def _why_not_folded(call, before, times, readers):
    """Returns why a batch norm cannot be folded, or None."""
    norm, layer = call.layer, before.layer
    if type(layer) not in LINEAR:
        return f"it follows {layer.name!r}, {_kind(layer)}"
    if type(norm) is not layers.BatchNormalization:
        return f"it is {_kind(norm)}, which may compute something else"
    if times[id(norm)] > 1:
        return f"it is called {times[id(norm)]} times"
    if times[id(layer)] > 1:
        return f"{layer.name!r} is called {times[id(layer)]} times"
    if readers[id(before.outputs)] > 1:
        return f"the output of {layer.name!r} is needed elsewhere"
    if layer.activation is not keras.activations.linear:
        return f"{layer.name!r} has an activation"
    if not (call.passes_inputs_only and before.passes_inputs_only):
        return "it or the layer before is called with special arguments"
    if norm.axis not in (-1, len(before.outputs.shape) - 1) or not (
        is_channels_last(layer)
    ):
        return "the channels are not the last axis"
    types = {
        t for x in (layer, norm) for t in (x.compute_dtype, x.variable_dtype)
    }
    if len(types) > 1:
        return f"more than one type: {', '.join(sorted(types))}"
    if is_quantized_or_adapted(layer):
        return f"{layer.name!r} is quantised or has LoRA weights"
    return None


def _kind(layer):
    name = type(layer).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _scaled(call, norm):
    """Returns a linear layer that includes a batch norm."""
    layer = call.layer
    scale = 1 / np.sqrt(as_float64(norm.moving_variance) + norm.epsilon)
    if norm.scale:
        scale = scale * as_float64(norm.gamma)
    bias = as_float64(layer.bias) if layer.use_bias else 0.0
    bias = (bias - as_float64(norm.moving_mean)) * scale
    if norm.center:
        bias = bias + as_float64(norm.beta)
    weights = {"bias": bias}
    if type(layer) in SEPARABLE:
        weights["depthwise_kernel"] = as_float64(layer.depthwise_kernel)
        weights["pointwise_kernel"] = as_float64(layer.pointwise_kernel) * scale
    elif type(layer) in DEPTHWISE:
        kernel = as_float64(layer.kernel)
        weights["kernel"] = kernel * scale.reshape(kernel.shape[-2:])
    elif type(layer) in TRANSPOSED:
        weights["kernel"] = as_float64(layer.kernel) * scale[:, np.newaxis]
    else:
        weights["kernel"] = as_float64(layer.kernel) * scale
    shape = tensors_in(call.args)[0].shape
    return resized_copy(layer, shape, weights, use_bias=True)
