"""A layer's state besides its config: weights, flags, tables, statistics."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping

import keras
import tensorflow as tf

from rigl_keras import _keras
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.model_tree import is_graph

__all__ = ["copy_before_build", "copy_state", "copy_trainable"]

Layer = keras.layers.Layer


def copy_state(
    source: Layer,
    target: Layer,
    *,
    values: Mapping[int, tf.Tensor] | None = None,
) -> None:
    """Copies all that a layer holds besides its config to another layer.

    It copies weights, states of generators, which inner layers are frozen, and
    what saving would write: vocabularies, bins, statistics, assets.

    Args:
        source: A built layer; it may be masked or hold masked layers.
        target: A built layer of the same kind and sizes. If only one of the two
            is masked, masks are not copied.
        values: `{id of a variable of the source: value}` for variables whose
            copies get another value.

    Raises:
        ValueError: The inner layers differ.
    """
    if source is target:
        return
    copy_trainable(source, target)
    if is_graph(source):  # its layers are copied one by one
        pairs = [(source, target)] if type(source) is type(target) else []
    else:
        pairs = list(_pairs(source, target, set()))
    for old, new in pairs:
        if new is not target and new.trainable != old.trainable:
            new.trainable = old.trainable
    for old, new in pairs:
        _assign_own(old, new, values or {})
        if old is not new:
            _copy_tables(old, new)
            _copy_saved(old, new)
    # Outer layers last: they derive values from inner layers.
    for _, new in reversed(pairs):
        if hasattr(type(new), "finalize_state") and not _has_tables(new):
            new.finalize_state()  # Normalization derives values from variables


def copy_trainable(source: Layer, target: Layer) -> None:
    """Freezes a layer or model, and its inner layers, as another is frozen.

    Inner layers that differ from the whole are set afterwards.

    Args:
        source: A layer or model. For a masked layer, the state of the wrapped
            layer counts.
        target: Any layer or model.
    """
    trainable = source.trainable
    if isinstance(source, Masked):
        trainable = trainable and source.layer.trainable
    if target.trainable != trainable:
        target.trainable = trainable


def copy_before_build(source: Layer, target: Layer) -> None:
    """Gives a copy what it needs before it is called.

    The number of columns of a lookup is known from its table only.

    Args:
        source: A built layer.
        target: A layer made from its config, perhaps not built.
    """
    if isinstance(source, Masked) != isinstance(target, Masked):
        return
    _copy_tables(source, target)
    inner, copies = _keras.owned_layers(source), _keras.owned_layers(target)
    if len(inner) == len(copies):
        for old, new in zip(inner, copies, strict=True):
            if type(old) is type(new):
                copy_before_build(old, new)


def _pairs(source, target, seen) -> Iterator[tuple[Layer, Layer]]:
    """Yields two layers and those within them, outer layers first."""
    if isinstance(source, Masked) and not isinstance(target, Masked):
        source = source.layer
    elif isinstance(target, Masked) and not isinstance(source, Masked):
        target = target.layer
    if id(source) in seen:
        return
    seen.add(id(source))
    yield source, target
    inner, copies = _keras.owned_layers(source), _keras.owned_layers(target)
    if len(inner) != len(copies):
        raise ValueError(
            f"The copy of layer {source.name!r}, a {type(source).__name__}, "
            f"has {len(copies)} layers within it, and the layer has "
            f"{len(inner)}: its config does not describe all of them. Give "
            "its class a get_config that does."
        )
    for old, new in zip(inner, copies, strict=True):
        yield from _pairs(old, new, seen)


def _assign_own(source, target, values):
    for old, new in zip(
        _keras.direct_variables(source),
        _keras.direct_variables(target),
        strict=True,
    ):
        if id(old) in values or old is not new:
            new.assign(values.get(id(old), old))
        if new.trainable != old.trainable:
            new.trainable = old.trainable


# Keras's preprocessing layers keep some of what they learned outside of
# variables.

_LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup)
_OF_LOOKUPS = (
    "input_vocabulary",
    "input_idf_weights",
    *_keras.LOOKUP_STATE,
    # Tables never change: a layer that is adapted gets a new one.
    "lookup_table",
)
_OF_DISCRETIZATION = ("bin_boundaries", "summary")


def _has_tables(layer):
    return isinstance(
        layer,
        (
            *_LOOKUPS,
            keras.layers.TextVectorization,
            keras.layers.Discretization,
        ),
    )


def _copy_tables(source, target):
    if isinstance(source, keras.layers.Discretization):
        for name in _OF_DISCRETIZATION:
            setattr(target, name, getattr(source, name))
    if not isinstance(source, _LOOKUPS):
        return
    for name in _OF_LOOKUPS:
        setattr(target, name, getattr(source, name))
    if hasattr(source, "idf_weights"):
        target.idf_weights = tf.Variable(
            source.idf_weights_const, trainable=False
        )
        target.idf_weights_const = target.idf_weights.value()
    # Counts of `update_state` that `finalize_state` has not used yet.
    for name in ("token_counts", "token_document_counts"):
        if hasattr(source, name) and hasattr(target, name):
            tokens, counts = getattr(source, name).export()
            getattr(target, name).insert(tokens, counts)
    if hasattr(source, "num_documents") and hasattr(target, "num_documents"):
        target.num_documents.assign(source.num_documents)


def _copy_saved(source, target):
    """Copies what a user's class writes into files besides weights.

    The result is what a saved and loaded model would have.
    """
    if _overrides(source, "save_own_variables", "load_own_variables"):
        store = {}
        source.save_own_variables(store)
        target.load_own_variables(store)
    if _overrides(source, "save_assets", "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            source.save_assets(folder)
            target.load_assets(folder)


def _overrides(layer, *methods):
    """Returns whether a class outside Keras defines both methods."""
    owners = []
    for method in methods:
        with contextlib.suppress(StopIteration):
            owners.append(
                next(k for k in type(layer).__mro__ if method in vars(k))
            )
    return len(owners) == len(methods) and not any(
        kind.__module__.split(".")[0] == "keras" or kind is Masked
        for kind in owners
    )
