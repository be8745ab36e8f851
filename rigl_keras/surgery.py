"""A model with some of its layers exchanged for others.

A Sequential or Functional model is copied. A subclassed model cannot be: what
its `call` does is known to nobody else. There the layers that it owns are
replaced where they are.
"""

import types
from collections.abc import Callable, Iterator

import keras

from rigl_keras.layers import Masked, MaskProjection, show_to_tensorflow
from rigl_keras.maskable import is_graph, key_of, sublayers

__all__ = ["exchange", "leaf_layers", "release"]

Layer = keras.layers.Layer


def exchange(
    model: keras.Model, change: Callable[[Layer, Layer], Layer]
) -> tuple[keras.Model, list[tuple[Layer, Layer]]]:
    """Returns a model with layers changed, and which became which.

    Args:
        model: A built model. If it is subclassed, it is changed in place, and
            the Sequential and Functional models that it owns are replaced by
            changed copies.
        change: `change(layer, fresh) -> new layer`, where `fresh` is a copy
            of the layer without its weights, or the layer itself where a
            model is changed in place. It may return `fresh`.

    Returns:
        `(model, [(layer, new layer)])`, not compiled. Where layers are
        copies, their weights are still to be copied.

    Raises:
        ValueError: A layer cannot be copied, or a copy would lose methods of
            the user's own class.
    """
    if is_graph(model):
        return _exchange_in_copy(model, change)
    return _exchange_in_place(model, change)


def leaf_layers(model) -> Iterator[Layer]:
    """Yields the layers of a model, those of models in it in their place.

    Args:
        model: A Keras model.

    Yields:
        Each layer that is not a Sequential or Functional model; a shared
        layer once for each model that lists it.
    """
    for _, leaf in _leaf_paths(model):
        yield leaf


def release(layer: Masked) -> Layer:
    """Returns the layer that a masked one wraps, its kernels free again."""
    for masked in layer.masked_kernels():
        projection = masked.kernel.constraint
        if isinstance(projection, MaskProjection):
            masked.kernel.constraint = projection.constraint
    return layer.layer


def _leaf_paths(model, path=""):
    for name, layer in sublayers(model):
        if is_graph(layer):
            yield from _leaf_paths(layer, f"{path}{name}.")
        else:
            yield path + name, layer


# Copies.


def _exchange_in_copy(model, change):
    leaves = {id(leaf): leaf for leaf in leaf_layers(model)}
    _check_nothing_shared(list(leaves.values()))
    pairs, copies = [], {}

    def clone(layer):
        # The sums and slices of symbolic tensors are no layers.
        if not isinstance(layer, Layer):
            return layer.__class__.from_config(layer.get_config())
        # A model and its submodel may share a layer.
        if id(layer) not in copies:
            copies[id(layer)] = change(layer, _fresh(layer))
            pairs.append((layer, copies[id(layer)]))
        return copies[id(layer)]

    # Keras would compile the copy, and fail where the loss is a function of
    # the user's own.
    models = [model, *_graphs_within(model)]
    compiled = [m.compiled for m in models]
    try:
        for m in models:
            m.compiled = False
        copy = keras.models.clone_model(
            model, clone_function=clone, recursive=True
        )
    finally:
        for m, value in zip(models, compiled, strict=True):
            m.compiled = value
    copied = [copy, *_graphs_within(copy)]
    for old, new in zip(models, copied, strict=True):
        _check_class(old, new)
    return copy, pairs


def _check_nothing_shared(layers):
    """Refuses layers of which copies would not share what they share."""
    owners = {}
    for layer in layers:
        for variable in layer.weights:
            owner = owners.setdefault(id(variable), layer)
            if owner is not layer:
                raise ValueError(
                    f"Layers {owner.name!r} and {layer.name!r} share the "
                    f"weights {variable.path!r}, and copies of them would "
                    "not. Call one layer twice, or build the model as a "
                    "subclass of keras.Model, whose layers are masked in "
                    "place."
                )


def _fresh(layer):
    try:
        return layer.__class__.from_config(layer.get_config())
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"Layer {layer.name!r}, a {type(layer).__name__}, cannot be copied "
            "from its config: its class needs a get_config that returns the "
            "arguments of its constructor (so that Keras can load the model, "
            "too), and a Lambda a named function. Or build the model as a "
            "subclass of keras.Model, whose layers are masked in place. Keras "
            f"says: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def _graphs_within(model):
    for layer in model.layers:
        if is_graph(layer):
            yield layer
            yield from _graphs_within(layer)


def _check_class(model, copy):
    """Refuses a copy that has lost what the user's class defines."""
    if isinstance(copy, type(model)):
        return
    lost = sorted(
        name
        for kind in type(model).__mro__
        if kind not in type(copy).__mro__
        for name, value in vars(kind).items()
        if isinstance(value, (types.FunctionType, property))
        and name not in ("__init__", "get_config")
    )
    if lost:
        raise ValueError(
            f"Model {model.name!r} is a {type(model).__name__}, whose "
            f"{', '.join(lost)} a masked copy would lose, because its "
            "constructor does not take (inputs, outputs). Sparsify the "
            "network within it first, or derive the class from keras.Model "
            "and define `call`."
        )


# In place.


def _exchange_in_place(model, change):
    pairs, done = [], {}
    owned = {id(layer): layer for _, layer in sublayers(model)}.values()
    if any(is_graph(layer) for layer in owned):
        _check_nothing_shared(owned)
    for path, layer in list(sublayers(model)):
        if id(layer) not in done:
            if is_graph(layer):
                new, inner = _exchange_in_copy(layer, change)
                # Masks alone are worth a copy.
                if not any(_differs(old, now) for old, now in inner):
                    new, inner = layer, [(old, old) for old, _ in inner]
                pairs += inner
            else:
                new = change(layer, layer)
                if isinstance(new, Masked) and not new.built:
                    new.build()  # what it wraps is built
                pairs.append((layer, new))
            done[id(layer)] = new
        if done[id(layer)] is not layer:
            _put(model, path, layer, done[id(layer)])
    show_to_tensorflow(model, model.variables)
    _forget_functions(model)
    masked = any(isinstance(leaf, Masked) for leaf in leaf_layers(model))
    _set_class(model, masked)
    return model, pairs


def _differs(old, new):
    return isinstance(old, Masked) != isinstance(new, Masked)


def _put(owner, path, old, new):
    """Replaces a layer where its owner, which is built, keeps it."""
    if path.startswith("_layers."):
        raise ValueError(
            f"Layer {old.name!r} of {owner.name!r} is kept in an object that "
            "is no layer, list or dict, where it cannot be replaced. Make it "
            "an attribute of the model."
        )
    tracker = owner._tracker
    if tracker.is_in_store("layers", old):
        # In its own place: the order of weights is that of layers.
        if tracker.is_in_store("layers", new):
            tracker.untrack(old)
        else:
            tracker.replace_tracked_value("layers", old, new)
    name, *keys = path.split(".")
    # A container is made anew: TensorFlow saves none that was changed.
    setattr(owner, name, _with_item(getattr(owner, name), keys, new))


def _with_item(container, keys, new):
    """Returns a container with one item exchanged, or what comes for it."""
    if not keys:
        return new
    if isinstance(container, dict):
        key, items = key_of(container, keys[0]), dict(container)
    else:
        key, items = int(keys[0]), list(container)
    items[key] = _with_item(items[key], keys[1:], new)
    if hasattr(container, "_fields"):  # a named tuple
        return container._make(items)
    return tuple(items) if isinstance(container, tuple) else items


def _forget_functions(model):
    """Makes a model anew compiled before it trains: its weights changed."""
    model.compiled = False
    for name in ("train_function", "test_function", "predict_function"):
        setattr(model, name, None)


# How a subclassed model with masks is saved: as its own class writes it, with
# which of its layers are masked. Loading makes the plain model and masks it.


@keras.saving.register_keras_serializable("rigl_keras", name="MaskedModel")
class _MaskedModel:
    def get_config(self):
        masked_class = type(self)
        object.__setattr__(self, "__class__", masked_class._plain_class)
        try:
            plain = keras.saving.serialize_keras_object(self)
        finally:
            object.__setattr__(self, "__class__", masked_class)
        plain.pop("compile_config", None)  # the masked model has one
        masked = {}
        for path, leaf in _leaf_paths(self):
            if isinstance(leaf, Masked):
                config = leaf.get_config()
                del config["layer"]
                masked[path] = config
        return {"model": plain, "masked": masked}

    @classmethod
    def from_config(cls, config):
        model = keras.saving.deserialize_keras_object(config["model"])
        masked = config["masked"]
        at = {id(leaf): path for path, leaf in _leaf_paths(model)}
        unknown = set(masked) - set(at.values())
        if unknown or not model.built:
            raise ValueError(
                f"Model {model.name!r} of class {type(model).__name__} is not "
                "the one that was saved: it has "
                + (
                    f"no layer at {', '.join(sorted(unknown))}."
                    if unknown
                    else "no weights yet. Give the class a build_from_config."
                )
            )

        def mask(layer, fresh):
            config = masked.get(at.get(id(layer)))
            return fresh if config is None else Masked(fresh, **config)

        return exchange(model, mask)[0]


def _set_class(model, masked):
    """Gives a subclassed model the class under which it is saved."""
    kind = type(model)
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
