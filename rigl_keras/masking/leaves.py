"""The layers of a model that are masked or not: what its models hold."""

from collections.abc import Iterator

import keras

from rigl_keras import _keras
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
    """Returns the weights that training changes, those that are frozen too.

    Args:
        model: A built model, masked or not.

    Returns:
        Each once; masks, statistics and states are not among them.
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
        `{name: layer}` in order. The second layer of one name, in another
        submodel, gets a prime after its name; masking changes no name.
    """
    named = {}
    # A layer may be used, and so be listed, more than once.
    leaves = {id(leaf): leaf for leaf in leaf_layers(model) if leaf.weights}
    for leaf in leaves.values():
        name = leaf.name
        while name in named:
            name += "'"
        named[name] = leaf
    return named


def leaf_layers(model: keras.Model) -> Iterator[Layer]:
    """Yields the layers of a model, those of models in it in their place.

    Args:
        model: A Keras model.

    Yields:
        Each layer that is not a Sequential or Functional model, and holds no
        masked one; a shared layer once for each model that lists it.
    """
    for _, leaf in leaf_paths(model):
        yield leaf


def containers(model: keras.Model) -> Iterator[Layer]:
    """Yields a model and what `leaf_layers` opens in it, each once."""
    yield from _containers(model, set())


def _containers(model, seen):
    if id(model) not in seen:
        seen.add(id(model))
        yield model
        for _, layer in sublayers(model):
            if is_opened(layer):
                yield from _containers(layer, seen)


def leaf_paths(model: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """Yields `leaf_layers`, each with its path as `sublayers` gives it."""
    for name, layer in sublayers(model):
        if is_opened(layer):
            yield from leaf_paths(layer, f"{path}{name}.")
        else:
            yield path + name, layer


def is_opened(layer: Layer) -> bool:
    """Returns whether the layers within a layer are looked at one by one."""
    return is_graph(layer) or holds_masked(layer)


def holds_masked(layer: Layer) -> bool:
    """Returns whether layers within a layer, which is not, are masked."""
    return not isinstance(layer, Masked) and any(
        isinstance(inner, Masked) for inner in _keras.flatten_layers(layer)
    )
