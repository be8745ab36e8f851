"""The innermost layers of a model, which are masked or not."""

from collections.abc import Iterator

import keras

from rigl_keras import _keras
from rigl_keras._text import unused_name
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.model_tree import is_graph, sublayers

__all__ = [
    "containers",
    "holds_masked",
    "is_opened",
    "leaf_layers",
    "leaf_paths",
    "named_layers",
    "trained_weights",
]

Layer = keras.layers.Layer


def trained_weights(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights that training changes, frozen ones included.

    Args:
        model: A built model, masked or not.

    Returns:
        Each once, without masks, statistics and states.
    """
    trained = {
        id(variable): variable
        for layer in _keras.flatten_layers(model)
        for variable in _keras.direct_weights(layer)
    }
    return list(trained.values())


def named_layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """Returns the layers of a model that have weights, by unique names.

    Args:
        model: A built model, dense or masked.

    Returns:
        `{name: layer}` in order. If layers in different submodels share a name,
        later ones get a prime. Masking does not change names.
    """
    named = {}
    # A layer that is used twice is listed twice.
    leaves = {id(leaf): leaf for leaf in leaf_layers(model) if leaf.weights}
    for leaf in leaves.values():
        named[unused_name(leaf.name, named)] = leaf
    return named


def leaf_layers(model: keras.Model) -> Iterator[Layer]:
    """Yields the layers of a model, with those of inner models in their place.

    Args:
        model: A Keras model.

    Yields:
        Each layer that is not a Sequential or Functional model and does not
        hold masked layers; a shared layer once for each model that lists it.
    """
    for _, leaf in leaf_paths(model):
        yield leaf


def containers(model: keras.Model) -> Iterator[Layer]:
    """Yields a model and the containers that `leaf_layers` opens, once."""
    yield from _containers(model, set())


def _containers(model, seen):
    if id(model) not in seen:
        seen.add(id(model))
        yield model
        for _, layer in sublayers(model):
            if is_opened(layer):
                yield from _containers(layer, seen)


def leaf_paths(model: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """Yields `leaf_layers` with their paths, as in `sublayers`."""
    for name, layer in sublayers(model):
        if is_opened(layer):
            yield from leaf_paths(layer, f"{path}{name}.")
        else:
            yield path + name, layer


def is_opened(layer: Layer) -> bool:
    """Returns whether inner layers are yielded instead of a layer."""
    return is_graph(layer) or holds_masked(layer)


def holds_masked(layer: Layer) -> bool:
    """Returns whether a layer is not masked but has masked inner layers."""
    return not isinstance(layer, Masked) and any(
        isinstance(inner, Masked) for inner in _keras.flatten_layers(layer)
    )
