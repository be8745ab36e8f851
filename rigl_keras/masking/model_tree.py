"""The parts of a model: its layers, inputs and variables."""

from collections.abc import Container, Iterator, Mapping
from typing import Any

import keras

from rigl_keras import _keras

__all__ = [
    "call_model",
    "input_structure",
    "is_graph",
    "key_of",
    "layers_in",
    "step_to",
    "sublayers",
    "within",
]


def is_graph(model: object) -> bool:
    """Returns whether a model is a Sequential or Functional one."""
    return isinstance(model, keras.Sequential) or (
        isinstance(model, keras.Model) and hasattr(model, "operations")
    )


def sublayers(
    layer: keras.layers.Layer,
) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yields the layers that a layer or a model owns, by attribute.

    Args:
        layer: Any layer, also a subclassed model.

    Yields:
        `(path, layer)`: `"dense"` for an attribute, `"blocks.0"` for an item of
        a list, `"heads.one"` or `"heads.#0"` for an entry of a dict.
    """
    if is_graph(layer):
        for i, inner in enumerate(layer.layers):
            yield f"layers.{i}", inner
        return
    owned = {id(inner) for inner in _keras.owned_layers(layer)}
    reached = set()
    for path, inner in layers_in(layer, owned):
        reached.add(id(inner))
        yield path, inner
    for i, inner in enumerate(_keras.owned_layers(layer)):
        # Within an object that is not a layer, but that Keras tracks.
        if id(inner) not in reached:
            yield f"_layers.{i}", inner


def layers_in(
    owner: keras.layers.Layer, wanted: Container[int]
) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yields the paths at which a layer or model holds layers.

    Args:
        owner: Any layer or model.
        wanted: Ids of the layers to yield.

    Yields:
        `(path, layer)` as in `sublayers`.
    """
    for name, value in vars(owner).items():
        if not _keras.is_bookkeeping(name, of_graph=is_graph(owner)):
            yield from _layers_in(value, name, wanted)


def _layers_in(value, path, owned):
    if isinstance(value, keras.layers.Layer):
        if id(value) in owned:
            yield path, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _layers_in(item, f"{path}.{i}", owned)
    elif isinstance(value, dict):
        for i, (key, item) in enumerate(value.items()):
            named = isinstance(key, str) and key.isidentifier()
            part = key if named else f"#{i}"
            yield from _layers_in(item, f"{path}.{part}", owned)


def within(
    layer: keras.layers.Layer, path: str, seen: set[int]
) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yields a layer and all inner layers, each once, with their paths.

    Args:
        layer: Any layer.
        path: Prefix of all paths.
        seen: Ids of layers to skip. Yielded layers are added.
    """
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield path, layer
    for name, inner in sublayers(layer):
        yield from within(inner, f"{path}{name}.", seen)


def step_to(owner: Any, part: str) -> Any:
    """Returns the value at one part of a path in a layer or container."""
    if isinstance(owner, (list, tuple)):
        return owner[int(part)]
    if isinstance(owner, dict):
        return owner[key_of(owner, part)]
    return getattr(owner, part)


def key_of(container: dict, part: str) -> Any:
    """Returns the key for one part of a path: `"#2"` is the third key."""
    return list(container)[int(part[1:])] if part[0] == "#" else part


def input_structure(model: keras.Model) -> Any:
    """Returns a model's symbolic inputs, in the structure of its calls.

    Args:
        model: A built model. For a subclassed one, the shapes are those it was
            built with, and the type is its compute type.

    Returns:
        A KerasTensor, or a list, tuple or dict of them.

    Raises:
        ValueError: A subclassed model does not know its shapes.
    """
    # A Sequential model that was never called has no `input`.
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    if is_graph(model):
        return model.input
    config = model.get_build_config() or {}
    shapes = config.get("input_shape", config.get("shapes_dict"))
    if shapes is None:
        raise ValueError(
            f"Model {model.name!r} is subclassed and does not know the shapes "
            "of its inputs. Build it by model.build(input_shape)."
        )
    return _symbols(shapes, model.compute_dtype)


def call_model(model: keras.Model, inputs: Any) -> Any:
    """Returns a model's outputs at inference.

    Args:
        model: A built model.
        inputs: Tensors in the structure of `input_structure`.

    Returns:
        The outputs of the model.
    """
    # If `call` takes several arguments, Keras names those of `build`.
    if not is_graph(model) and "shapes_dict" in (
        model.get_build_config() or {}
    ):
        return model(**inputs, training=False)
    return model(inputs, training=False)


def _symbols(shapes, dtype):
    if isinstance(shapes, Mapping):
        return {
            name.removesuffix("_shape"): _symbols(shape, dtype)
            for name, shape in shapes.items()
        }
    if all(isinstance(n, (int, type(None))) for n in shapes):
        return keras.KerasTensor(tuple(shapes), dtype)
    return [_symbols(shape, dtype) for shape in shapes]
