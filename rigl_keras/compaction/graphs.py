"""Converts a Sequential or Functional model to a list of calls, and back.

Models within a model are opened: the result is one list, in the order of the
calls. Replaying it with other layers makes a new model.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import keras

from rigl_keras._text import first_line
from rigl_keras.masking.layer_state import copy_state
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.model_tree import input_structure, is_graph
from rigl_keras.masking.stripping import strip, strip_copy
from rigl_keras.masking.surgery import exchange_in_copy

__all__ = [
    "Call",
    "Graph",
    "plain_copy",
    "rebuild",
    "tensors_in",
    "trace",
    "unmasked_copy",
]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        layer: The layer, or a Keras operation such as the `+` of two tensors.
        args: Positional arguments, KerasTensors in any structure.
        kwargs: Keyword arguments, likewise.
        outputs: KerasTensors, in the structure that the layer returns.
    """

    layer: Any
    args: tuple
    kwargs: dict[str, Any]
    outputs: Any

    @property
    def passes_inputs_only(self) -> bool:
        """Whether only inputs are passed, as at inference."""
        return all(
            value is None or (name == "training" and value is False)
            for name, value in self.kwargs.items()
        )


@dataclasses.dataclass(frozen=True)
class Graph:
    """A model as a list of calls.

    Attributes:
        inputs: KerasTensors, in the structure that the model takes.
        outputs: KerasTensors, in the structure that it returns.
        calls: `Call`s, each after the calls whose outputs it reads.
        name: Name of the model.
    """

    inputs: Any
    outputs: Any
    calls: list[Call]
    name: str


def plain_copy(model: keras.Model) -> keras.Model:
    """Returns a copy of a model, without masks and with the same weights.

    Args:
        model: A built Sequential or Functional model, masked or not.

    Returns:
        A model that shares nothing with it, not compiled.

    Raises:
        ValueError: The model is subclassed or not built, or a layer cannot be
            copied.
    """
    _check_graph(model)
    if masked_layers(model):
        return strip_copy(model)
    model, pairs = exchange_in_copy(
        model, lambda layer, fresh: fresh, keep_class=False
    )
    for layer, new in pairs:
        copy_state(layer, new)
    return model


def unmasked_copy(model: keras.Model) -> keras.Model:
    """Returns a copy of a model of any kind, without masks.

    Args:
        model: A built model, masked or not.

    Returns:
        A `plain_copy`. For a subclassed model with masks, what Keras saves and
        loads; a subclassed model without masks is returned itself.

    Raises:
        ValueError: Keras cannot copy the subclassed model.
    """
    if is_graph(model):
        return plain_copy(model)  # without an optimizer
    if not masked_layers(model):
        return model
    # A copy is stripped: this would change a subclassed model in place.
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.keras"
        model.save(path)
        try:
            copy = cast(
                keras.Model, keras.models.load_model(path, compile=False)
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Model {model.name!r} is subclassed, and Keras cannot make a "
                "copy of it to strip: its class needs a get_config, and "
                "@keras.saving.register_keras_serializable(). Keras says: "
                f"{first_line(error)}"
            ) from error
    return strip(copy)


def trace(model: keras.Model) -> Graph:
    """Returns the calls of a model's layers, inner models included.

    An inner model stays one call if it is more than its graph: if it is called
    with arguments besides its inputs, or converts their type or rank.

    Args:
        model: A built Sequential or Functional model, masked or not.

    Returns:
        A `Graph` of a plain copy (`plain_copy`), with unique names of layers:
        if two models have layers of one name, the later layer is renamed.

    Raises:
        ValueError: As in `plain_copy`.

    Example:

    >>> inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    >>> model = keras.Sequential([inner, keras.layers.ReLU()])
    >>> [call.layer.name for call in trace(model).calls]
    ['dense', 're_lu']
    """
    # A copy of a Sequential model gives its input another name.
    return _trace(plain_copy(model), input_structure(model))


def rebuild(
    graph: Graph, replacement: Callable[[Any], Any] | None = None
) -> keras.Model:
    """Returns the model of a graph, with some of its layers replaced.

    Args:
        graph: What `trace` returned.
        replacement: `replacement(layer) -> layer` returns the layer to call:
            another one, the same, or None to pass on the first argument. Names
            must stay unique. Default: every layer stays.

    Returns:
        A Functional model, not compiled, that shares nothing with the graph.
        Its inputs and outputs have the names and structures of the traced
        model.
    """

    def call(layer, *args, **kwargs):
        new = replacement(layer) if replacement else layer
        return args[0] if new is None else new(*args, **kwargs)

    inputs = _new_inputs(graph.inputs)
    outputs = _replay(graph, keras.tree.flatten(inputs), call)
    # The layers were called before: only new copies belong to one graph.
    return plain_copy(keras.Model(inputs, outputs, name=graph.name))


def tensors_in(structure: Any) -> list[keras.KerasTensor]:
    """Returns the KerasTensors of a structure, such as a call's arguments."""
    return [x for x in keras.tree.flatten(structure) if _is_tensor(x)]


def _is_tensor(x):
    return isinstance(x, keras.KerasTensor)


def _check_graph(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"A Sequential or Functional model is needed. Received: {model!r}."
        )
    if not is_graph(model) or not _is_its_graph(model):
        raise ValueError(
            f"Model {model.name!r}, a {type(model).__name__}, is subclassed: "
            "only its own `call` knows how its layers are connected. Build "
            "the network as a Sequential or Functional model, "
            "keras.Model(inputs, outputs), and give it these weights."
        )
    if not model.built or not getattr(model, "inputs", None):
        raise ValueError(
            f"Model {model.name!r} is not built. Give it a keras.Input, or "
            "call model.build(input_shape)."
        )
    for layer in model.layers:
        if is_graph(layer):
            _check_graph(layer)


def _is_its_graph(model):
    """Returns whether the class keeps Keras's `call`, as copies do."""
    owner = next(k for k in type(model).__mro__ if "call" in vars(k))
    return owner.__module__.startswith("keras.")


def _trace(model, inputs):
    inputs = _new_inputs(inputs)
    calls, named = [], {t.name: None for t in keras.tree.flatten(inputs)}

    def record(layer, *args, **kwargs):
        if _can_be_opened(layer, args, kwargs):
            inner = _trace(layer, input_structure(layer))
            return _replay(inner, keras.tree.flatten(args[0]), record)
        _name_apart(layer, named)
        outputs = layer(*args, **kwargs)
        calls.append(Call(layer, args, kwargs, outputs))
        return outputs

    if isinstance(model, keras.Sequential):
        outputs = inputs
        for layer in model.layers:
            outputs = record(layer, outputs)
    else:
        outputs = keras.models.clone_model(
            model,
            input_tensors=inputs,
            clone_function=lambda layer: layer,
            call_function=record,
        ).output
    return Graph(inputs, outputs, calls, model.name)


def _new_inputs(structure):
    return keras.tree.map_structure(
        lambda t: keras.Input(
            batch_shape=t.shape,
            dtype=t.dtype,
            sparse=t.sparse,
            ragged=t.ragged,
            name=t.name,
        ),
        structure,
    )


def _can_be_opened(layer, args, kwargs):
    if not is_graph(layer) or len(args) != 1:
        return False
    if any(value is not None for value in kwargs.values()):
        return False
    given = keras.tree.flatten(args[0])
    return len(given) == len(layer.inputs) and all(
        _is_tensor(x) and x.dtype == t.dtype and len(x.shape) == len(t.shape)
        for x, t in zip(given, layer.inputs, strict=True)
    )


def _name_apart(layer, named):
    """Renames a layer with a name in `named`, `{name: layer}`."""
    name, n = layer.name, 0
    while named.setdefault(name, layer) is not layer:
        n += 1
        name = f"{layer.name}_{n}"
    layer.name = name


def _replay(graph, inputs, call):
    """Returns the outputs of a graph for new inputs."""
    old = keras.tree.flatten(graph.inputs)
    now = {id(t): new for t, new in zip(old, inputs, strict=True)}

    def current(structure) -> Any:
        return keras.tree.map_structure(
            lambda x: now[id(x)] if _is_tensor(x) else x, structure
        )

    for c in graph.calls:
        outputs = call(c.layer, *current(c.args), **current(c.kwargs))
        old, new = keras.tree.flatten(c.outputs), keras.tree.flatten(outputs)
        now.update({id(t): x for t, x in zip(old, new, strict=True)})
    return current(graph.outputs)
