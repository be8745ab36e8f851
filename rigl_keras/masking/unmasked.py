"""Reasons why a layer or weight has no mask."""

from collections.abc import Container, Iterable, Mapping

import keras

from rigl_keras import _keras
from rigl_keras._text import unused_name
from rigl_keras.masking.layer_kernels import (
    Kernel,
    find_kernels,
    is_normalisation,
)
from rigl_keras.patterns import Pattern

__all__ = [
    "left_dense",
    "listed",
    "matrices",
    "why_adapted",
    "why_dense",
    "why_unfit",
]


def why_dense(
    layer: keras.layers.Layer, patterns: Iterable[Pattern] = ()
) -> str:
    """Returns why a layer that has weights has no mask.

    Args:
        layer: A layer, not a `Masked` one.
        patterns: The patterns of the model's masks.
    """
    if is_normalisation(layer):
        return "normalisation, never masked"
    found = find_kernels(layer)
    if found:
        unfit = why_unfit(found, patterns)
        if unfit is not None:
            return f"left dense: {unfit}"
        return (
            "left dense: 'uniform' leaves out the first layer, and `layers` or "
            "with_masks may leave out others"
        )
    kind = type(layer).__name__
    adapted = why_adapted(layer)
    if adapted is not None:
        return adapted
    if isinstance(layer, keras.layers.Embedding):
        why = "an Embedding is masked only if `layers` names it"
        left = left_dense(layer, ())
        if left:
            names = ["embeddings", *left]
            why += f"; {listed(left)} only if kernels={{{kind}: {names}}} does"
        return why
    return (
        f"{kind} has no kernel that can be masked; if one of its weights is "
        f"one, pass kernels={{{kind}: name}}"
    )


def why_unfit(
    kernels: Iterable[Kernel], patterns: Iterable[Pattern]
) -> str | None:
    """Returns why a pattern does not fit a kernel, with its name, or None."""
    for pattern in patterns:
        for kernel in kernels:
            why = pattern.why_not(kernel.axes)
            if why is not None:
                return f"{pattern.name!r} does not fit: {why}"
    return None


def why_adapted(layer: keras.layers.Layer) -> str | None:
    """Returns why a layer changed by LoRA or quantization is dense."""
    for inner in _keras.flatten_layers(layer):
        where = "" if inner is layer else f" of its {inner.name!r}"
        if getattr(inner, "lora_enabled", False):
            return (
                f"LoRA{where} computes its kernel from several weights; save "
                "the model, which merges them, and load it to mask it"
            )
        if getattr(inner, "quantization_mode", None) is not None:
            return (
                f"the kernel{where} is quantized ({inner.quantization_mode}); "
                "mask the model first, and quantize what strip returns"
            )
    return None


def left_dense(
    layer: keras.layers.Layer, masked: Container[int]
) -> dict[str, keras.Variable]:
    """Returns `{name: variable}` of a layer's matrices that are not masked.

    Args:
        layer: A layer, not a `Masked` one.
        masked: Ids of the masked kernels.

    Returns:
        Its trained weights with at least two axes, inner layers included,
        except biases, normalisation and embedding tables.
    """
    left = {}
    for inner in _keras.flatten_layers(layer):
        if is_normalisation(inner):
            continue
        table = isinstance(inner, keras.layers.Embedding)
        for name, variable in matrices(_keras.direct_weights(inner)).items():
            if id(variable) in masked or (table and name == "embeddings"):
                continue
            path = name if inner is layer else f"{inner.name}/{name}"
            left[unused_name(path, left)] = variable
    return left


def matrices(variables: Iterable[keras.Variable]) -> dict[str, keras.Variable]:
    """Returns variables with at least two axes, except biases, by name."""
    found = {}
    for variable in variables:
        if len(variable.shape) > 1 and not variable.name.endswith("bias"):
            found[unused_name(variable.name, found)] = variable
    return found


def listed(variables: Mapping[str, keras.Variable]) -> str:
    """Returns names and shapes of variables, as text."""
    return ", ".join(
        f"{name} ({'x'.join(map(str, variable.shape))})"
        for name, variable in variables.items()
    )
