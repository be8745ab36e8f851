"""Exchanges layers of a model for others.

Sequential and Functional models are copied. Models that cannot be copied are
changed in place: subclassed models, since only their `call` knows what it does;
Functional models whose class has its own constructor; and models with a layer
that has no usable config.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import keras

from rigl_keras import _keras
from rigl_keras._text import first_line
from rigl_keras._warn import warn
from rigl_keras.masking.inner_products import ask_scope_no_more
from rigl_keras.masking.layer_state import copy_before_build
from rigl_keras.masking.leaves import holds_masked, leaf_layers, leaf_paths
from rigl_keras.masking.masked import (
    Masked,
    MaskProjection,
    allow_again,
    show_to_tensorflow,
)
from rigl_keras.masking.model_tree import (
    is_graph,
    layers_in,
    step_to,
    sublayers,
)

__all__ = ["CannotCopy", "exchange", "exchange_in_copy", "release"]

Layer = keras.layers.Layer


class CannotCopy(ValueError):
    """A model, or a layer of it, cannot be made again from its config."""


def exchange(
    model: keras.Model, change: Callable[[Layer, Layer], Layer]
) -> tuple[keras.Model, list[tuple[Layer, Layer]]]:
    """Returns a model with changed layers, and the pairs of old and new.

    Args:
        model: A built model. If it cannot be copied, it and the models that it
            owns are changed in place.
        change: `change(layer, fresh) -> new layer`. `fresh` is a copy of the
            layer without its weights, or the layer itself if a model is changed
            in place. It may return `fresh`.

    Returns:
        `(model, [(layer, new layer)])`, not compiled. Outer models come before
        inner ones. The state of copied layers is not yet copied.
    """
    if is_graph(model):
        try:
            return exchange_in_copy(model, change)
        except CannotCopy as error:
            # Copying a user's class is not promised, so it does not warn.
            if type(model).__module__.split(".")[0] == "keras":
                warn(
                    f"Model {model.name!r} was changed in place, because it "
                    f"cannot be copied. {error}",
                )
    return _exchange_in_place(model, change)


def exchange_in_copy(
    model: keras.Model,
    change: Callable[[Layer, Layer], Layer],
    *,
    keep_class: bool = True,
) -> tuple[keras.Model, list[tuple[Layer, Layer]]]:
    """Like `exchange`, but never changes `model` itself.

    Args:
        model: A built Sequential or Functional model.
        change: As in `exchange`.
        keep_class: Whether to refuse a copy that loses methods of the model's
            class.

    Returns:
        As in `exchange`.

    Raises:
        CannotCopy: A layer cannot be copied, two layers share weights, or a
            copy would lose methods of the user's class.
    """
    _check_nothing_shared(
        list({id(leaf): leaf for leaf in leaf_layers(model)}.values())
    )
    graphs, pairs, copies = [], [], {}

    def clone(layer):
        # Sums and slices of symbolic tensors are not layers.
        if not isinstance(layer, Layer):
            return layer.__class__.from_config(layer.get_config())
        # A model and its submodel may share a layer.
        if id(layer) not in copies:
            if is_graph(layer):
                copies[id(layer)] = clone_graph(layer)
            else:
                new = fresh = _fresh(layer)
                if holds_masked(layer):  # its copy does too
                    leaves = dict(leaf_paths(layer))
                    _replace_at(
                        fresh,
                        {
                            path: change(leaf, _at(fresh, path))
                            for path, leaf in leaves.items()
                        },
                    )
                else:
                    new = change(layer, fresh)
                copies[id(layer)] = new
                pairs.append((layer, new))
        return copies[id(layer)]

    def clone_graph(graph):
        at = len(graphs)
        graphs.append(None)  # outer models come first
        copy = _clone_graph(graph, clone)
        if keep_class:
            _check_class(graph, copy)
        graphs[at] = (graph, copy)
        return copy

    copy = clone_graph(model)
    return copy, graphs + pairs


def release(layer: Masked) -> Layer:
    """Returns the layer that a masked one wraps, without its masks."""
    for masked in layer.masked_kernels():
        projection = masked.kernel.constraint
        if isinstance(projection, MaskProjection):
            masked.kernel.constraint = projection.constraint
        allow_again(masked.found.owner)
    ask_scope_no_more(layer.layer)
    return layer.layer


# Copies.


def _clone_graph(model, clone):
    """Returns a copy of one model, with cloned layers and models."""
    # Keras would compile the copy, and fail if the loss is a user's function.
    compiled, model.compiled = model.compiled, False
    try:
        if isinstance(model, keras.Sequential):
            first = next(iter(_keras.owned_layers(model)), None)
            inputs = None
            if isinstance(first, keras.layers.InputLayer):
                given: Any = first.output
                if given.sparse or given.ragged:
                    inputs = _new_input(given)
        else:
            inputs = keras.tree.map_structure(_new_input, model.input)
        return keras.models.clone_model(
            model, clone_function=clone, input_tensors=inputs
        )
    finally:
        model.compiled = compiled


def _new_input(tensor):
    # Keras's copies forget that an input is sparse, ragged or optional.
    return keras.Input(
        batch_shape=tensor.shape,
        dtype=tensor.dtype,
        sparse=tensor.sparse,
        ragged=tensor.ragged,
        name=tensor.name,
        optional=getattr(_keras.operation_of(tensor), "optional", False),
    )


def _check_nothing_shared(layers):
    """Refuses layers that share weights, since copies would not."""
    owners = {}
    for layer in layers:
        for variable in layer.weights:
            owner = owners.setdefault(id(variable), layer)
            if owner is not layer:
                raise CannotCopy(
                    f"Layers {owner.name!r} and {layer.name!r} share the "
                    f"weights {variable.path!r}, and copies of them would "
                    "not. Call one layer twice, or build the model as a "
                    "subclass of keras.Model, whose layers are masked in "
                    "place."
                )


def _fresh(layer):
    try:
        fresh = layer.__class__.from_config(layer.get_config())
    except Exception as error:  # a user's class may raise anything
        raise CannotCopy(
            f"Layer {layer.name!r}, a {type(layer).__name__}, cannot be copied "
            "from its config: its class needs a get_config that returns the "
            "arguments of its constructor (so that Keras can load the model, "
            "too), and a Lambda a named function. Keras says: "
            f"{first_line(error)}"
        ) from error
    copy_before_build(layer, fresh)
    return fresh


def _check_class(model, copy):
    """Refuses a copy that lost its class and the methods of the class."""
    if isinstance(copy, type(model)):
        return
    raise CannotCopy(
        f"Model {model.name!r} is a {type(model).__name__}, but a copy "
        "would not be, because its constructor does not take (inputs, "
        "outputs)."
    )


# In place.


def _exchange_in_place(model, change):
    leaves = {id(leaf): leaf for leaf in leaf_layers(model)}.values()
    pairs = [(layer, change(layer, layer)) for layer in leaves]
    _check_replaceable(model, pairs)
    for _, new in pairs:
        if isinstance(new, Masked) and not new.built:
            new.build()  # the wrapped layer is built
    _replace(model, pairs)
    return model, pairs


def _check_replaceable(model, pairs):
    """Checks, before anything changes, that layers can be replaced."""
    changes = {id(old): old for old, new in pairs if old is not new}
    for owner in _owners(model, changes, set()):
        if is_graph(owner):
            continue
        for path, layer in sublayers(owner):
            if id(layer) in changes and path.startswith("_layers."):
                raise ValueError(
                    f"Layer {layer.name!r} of {owner.name!r} is kept in an "
                    "object that is not a layer, list or dict, where it cannot "
                    "be replaced. Make it an attribute of the model."
                )


def _at(model, path):
    """Returns the layer at a path of `sublayers`."""
    layer = model
    for part in path.split("."):
        if is_graph(layer) and part == "layers":
            layer = layer.layers
        else:
            layer = step_to(layer, part)
    return layer


def _replace_at(model, layers):
    """Replaces layers of a model, `{path: new layer}`."""
    found = [(_at(model, path), new) for path, new in layers.items()]
    for _, new in found:
        if isinstance(new, Masked) and not new.built:
            new.build()
    _replace(model, found)


def _replace(model: Layer, layers: Iterable[tuple[Layer, Layer]]) -> None:
    """Replaces layers wherever a model or its inner layers keep them."""
    changes = {id(old): (old, new) for old, new in layers if old is not new}
    for old, new in changes.values():
        _keras.replace_calls(old, new)
    owners = list(_owners(model, changes, set()))
    for owner in owners:
        if isinstance(owner, keras.Sequential):
            _keras.replace_in_sequential(owner, changes)
        elif is_graph(owner):
            _keras.replace_in_functional(owner, changes)
        _replace_in_attributes(owner, changes)
    for owner in owners:
        if isinstance(owner, keras.Model):
            _forget_functions(owner)
            _set_class(owner, holds_masked(owner))
    show_to_tensorflow(model, model.variables)


def _owners(layer, changes, seen):
    """Yields a layer and its inner layers that keep replaced layers."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    if any(id(inner) in changes for inner in _keras.flatten_layers(layer)):
        yield layer
        for _, inner in sublayers(layer):
            if id(inner) not in changes:
                yield from _owners(inner, changes, seen)


def _replace_in_attributes(owner, changes):
    _keras.replace_tracked(owner, changes)
    for name in {path.split(".")[0] for path, _ in layers_in(owner, changes)}:
        # New containers: TensorFlow does not save changed ones.
        setattr(owner, name, _changed(getattr(owner, name), changes))


def _changed(value, changes):
    """Returns a layer, or a container, with layers exchanged."""
    if isinstance(value, Layer):
        return changes.get(id(value), (None, value))[1]
    if isinstance(value, dict):
        return {key: _changed(item, changes) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    items = [_changed(item, changes) for item in value]
    make = getattr(value, "_make", None)
    if make is not None:  # a named tuple
        return make(items)
    return tuple(items) if isinstance(value, tuple) else items


def _forget_functions(model):
    """Makes a model compile again before it trains: its weights changed."""
    model.compiled = False
    for name in ("train_function", "test_function", "predict_function"):
        setattr(model, name, None)


def _config_lists_layers(model):
    """Returns whether a graph's config holds the configs of its layers."""
    kind = getattr(type(model), "_plain_class", type(model))
    of_keras = next(
        k for k in kind.__mro__ if k.__module__.split(".")[0] == "keras"
    )
    return kind.get_config is of_keras.get_config and (
        isinstance(model, keras.Sequential)
        or inspect.getfullargspec(kind.__init__).args
        == inspect.getfullargspec(of_keras.__init__).args
    )


# A subclassed model with masks is saved as its own class writes it, with the
# paths of its masked layers. Loading makes the plain model and masks it.


# The class it is mixed into, for type checkers.
_Model = keras.Model if TYPE_CHECKING else object


@keras.saving.register_keras_serializable("rigl_keras", name="MaskedModel")
class _MaskedModel(_Model):
    _plain_class: type  # set for each class made from it and the user's

    def __reduce__(self):
        # A class made here cannot be pickled by its name.
        _, arguments = super().__reduce__()
        return _keras.unpickler(), arguments

    def get_config(self):
        masked_class = type(self)
        object.__setattr__(self, "__class__", masked_class._plain_class)
        try:
            plain: Any = keras.saving.serialize_keras_object(self)
        finally:
            object.__setattr__(self, "__class__", masked_class)
        plain.pop("compile_config", None)  # the masked model has its own
        masked = {}
        for path, leaf in leaf_paths(self):
            if isinstance(leaf, Masked):
                config = leaf.get_config()
                del config["layer"]
                masked[path] = config
        return {"model": plain, "masked": masked}

    @classmethod
    def from_config(cls, config):
        model = keras.saving.deserialize_keras_object(config["model"])
        found, unknown = {}, []
        for path, options in config["masked"].items():
            try:
                layer = _at(model, path)
            except (AttributeError, KeyError, IndexError, TypeError):
                unknown.append(path)
                continue
            # An inner model may already have its masks.
            if not isinstance(layer, Masked):
                found[path] = (layer, options)
        if unknown or not model.built:
            raise ValueError(
                f"Model {model.name!r} of class {type(model).__name__} differs "
                "from the saved one: it has "
                + (
                    f"no layer at {', '.join(sorted(unknown))}."
                    if unknown
                    else "no weights yet. Give the class a build_from_config."
                )
            )
        masked = {
            id(layer): Masked(layer, **options)
            for layer, options in found.values()
        }
        _replace_at(
            model, {p: masked[id(layer)] for p, (layer, _) in found.items()}
        )
        return model


def _set_class(model, masked):
    """Gives a model with a user's class the class under which it is saved.

    The config of a plain Sequential or Functional model already says which
    layers are masked, and so does that of a class made from (inputs, outputs).
    """
    kind = type(model)
    if is_graph(model) and _config_lists_layers(model):
        return
    plain = getattr(kind, "_plain_class", kind)
    if masked and kind is plain:
        kind = type(plain.__name__, (_MaskedModel, plain), {})
        kind.__module__, kind.__qualname__ = (
            plain.__module__,
            plain.__qualname__,
        )
        kind._plain_class = plain
        kind = keras.saving.register_keras_serializable(
            "rigl_keras", name="MaskedModel"
        )(kind)
        object.__setattr__(model, "__class__", kind)
    elif not masked and kind is not plain:
        object.__setattr__(model, "__class__", plain)
