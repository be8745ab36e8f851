"""Chooses the kernels of a model to mask."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import keras
import numpy as np

from rigl_keras import _checks, _keras, _warn
from rigl_keras.kernels.layer_products import PRODUCTS
from rigl_keras.masking.layer_kernels import (
    Kernel,
    find_kernels,
    kernel_variable,
)
from rigl_keras.masking.leaves import containers, named_layers
from rigl_keras.masking.masked import Masked, MaskProjection
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.unmasked import (
    left_dense,
    listed,
    matrices,
    why_adapted,
    why_dense,
)
from rigl_keras.patterns import Pattern

__all__ = [
    "by_name",
    "check_kernels_fit",
    "check_mask",
    "check_model",
    "chosen_kernels",
    "named_kernels",
    "names_and_product",
    "selected_layers",
    "with_embeddings",
]

_KERNELS = (
    "kernels must be {layer or layer type: name or names of its variables}, "
    f"and product one of {PRODUCTS}"
)

# How users say what to mask: layers, types of layers, a predicate, or a
# collection of these.
Selector = (
    keras.layers.Layer
    | type
    | Callable[[keras.layers.Layer], bool]
    | Iterable
    | None
)


def named_kernels(
    model: keras.Model, kernels: Mapping | None = None
) -> dict[str, Kernel]:
    """Returns the kernels of a dense model that can be masked, by name.

    Args:
        model: A built dense model.
        kernels: Which variables are kernels, as in `sparsify`.

    Returns:
        `{name: kernel}` in order, with unique names. `layer.kernel` has the
        name of its layer (`named_layers`), others also have their path, as in
        `"lstm/cell/recurrent_kernel"`. A kernel that two layers share has the
        name of the first.
    """
    kernels, _ = names_and_product(kernels)
    found, seen = {}, set()
    for name, layer in named_layers(model).items():
        if isinstance(layer, Masked):
            continue
        for kernel in find_kernels(layer, kernels):
            # A kernel that two layers share has one mask.
            if id(kernel.variable) not in seen:
                seen.add(id(kernel.variable))
                found[kernel.named(name)] = kernel
    return found


def check_model(model: keras.Model) -> None:
    """Raises ValueError unless a model can be masked."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            "sparsify takes a Keras model. Received: "
            f"{type(model).__module__}.{type(model).__name__}."
        )
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so its kernels have no "
            "shape yet. Call model.build(input_shape) first, call it on a "
            "batch, or begin it with keras.Input(shape)."
        )
    masked = masked_layers(model)
    if masked:
        raise ValueError(
            f"Model {model.name!r} is masked already ({len(masked)} kernels). "
            "For other masks, sparsify(strip(model), ...)."
        )


def chosen_kernels(
    model: keras.Model,
    selector: Selector = None,
    *,
    kernels: Mapping | None = None,
    strict: bool = False,
) -> dict[str, Kernel]:
    """Returns the kernels of a dense model to mask, by unique name, in order.

    Args:
        model: A built model.
        selector: The `layers` of `sparsify`.
        kernels: As in `sparsify`.
        strict: As in `sparsify`.

    Returns:
        `{name: kernel}`, names as in `named_kernels`.

    Raises:
        ValueError: The model cannot be masked, nothing matches, or a named
            layer cannot be masked.
    """
    check_model(model)
    kernels, _ = names_and_product(kernels)
    check_kernels_fit(model, kernels)
    matches = _predicate(selector)
    if selector is not None:
        # Embeddings are masked on request only.
        kernels = with_embeddings(kernels)
    chosen = {
        name: kernel
        for name, kernel in named_kernels(model, kernels).items()
        if matches(kernel.layer) or matches(kernel.owner)
    }
    leaves = named_layers(model).values()
    adapted = [
        (layer, why)
        for layer in leaves
        if matches(layer)
        and not (selector is None and isinstance(layer, keras.layers.Embedding))
        for why in [why_adapted(layer)]
        if why
    ]
    if adapted:
        raise ValueError(
            f"Layers of model {model.name!r} cannot be masked as they are:\n"
            + "\n".join(f"  {layer.name}: {why}" for layer, why in adapted)
            + "\nOr pass `layers` that leaves them out."
        )
    for layer in selected_layers(selector):
        if all(layer not in (k.layer, k.owner) for k in chosen.values()):
            raise ValueError(
                f"`layers` names {layer.name!r}, a {type(layer).__name__} that "
                "is not a layer of this model or has no kernel that can be "
                "masked. If it has one of another name, pass kernels="
                f"{{{type(layer).__name__}: name}}."
            )
    if strict:
        _check_all_masked(model, chosen, matches)
    for name, kernel in chosen.items():
        if isinstance(kernel.variable.constraint, MaskProjection):
            raise ValueError(
                f"The kernel {name!r} of model {model.name!r} is already "
                "masked in another model that shares it."
            )
    if not chosen:
        skipped = "\n".join(
            f"  {layer.name}: {why_dense(layer)}" for layer in leaves
        )
        raise ValueError(
            f"Model {model.name!r} has nothing to mask"
            + ("" if selector is None else " that matches `layers`")
            + f". Its layers with weights:\n{skipped or '  (none)'}"
        )
    return chosen


def with_embeddings(kernels: Mapping | None) -> dict:
    """Returns the variables that are kernels if embeddings are masked."""
    return {**(kernels or {}), keras.layers.Embedding: "embeddings"}


def names_and_product(
    kernels: Mapping | str | None, product: str = "auto"
) -> tuple[Mapping | None, str]:
    """Returns which variables are masked, and how products are computed.

    The latter may be a string in `kernels`, which is deprecated.
    """
    if isinstance(kernels, str):
        if kernels not in PRODUCTS:
            raise ValueError(f"{_KERNELS}. Received: kernels={kernels!r}.")
        if product != "auto":
            raise ValueError(
                "kernels and product both say how products are computed. "
                f"Received: kernels={kernels!r}, product={product!r}. Leave "
                "kernels out."
            )
        _warn.deprecated(
            f"kernels={kernels!r} is deprecated: `kernels` says which "
            f"variables are masked. Write product={kernels!r}."
        )
        return None, kernels
    _checks.choice("product", product, PRODUCTS)
    _check_kernels(kernels)
    return kernels, product


def _check_kernels(kernels):
    named = isinstance(kernels, Mapping) and all(
        isinstance(key, (type, keras.layers.Layer))
        and (
            isinstance(names, str)
            or (
                isinstance(names, Sequence)
                and all(isinstance(name, str) for name in names)
            )
        )
        for key, names in kernels.items()
    )
    if kernels is not None and not named:
        raise ValueError(f"{_KERNELS}. Received: kernels={kernels!r}.")


def check_kernels_fit(model: keras.Model, kernels: Mapping | None) -> None:
    """Refuses keys and names of `kernels` that fit nothing in a model.

    Args:
        model: A built model.
        kernels: As in `sparsify`.

    Raises:
        ValueError: It has no such layer, or the layer no such kernel.
    """
    every = _keras.flatten_layers(model)
    for key, names in (kernels or {}).items():
        if isinstance(key, type):
            layers = [layer for layer in every if isinstance(layer, key)]
            what = key.__name__
        else:
            layers = [layer for layer in every if layer is key]
            what = repr(key.name)
        if not layers:
            raise ValueError(
                f"kernels names {what}, which fits no layer of model "
                f"{model.name!r}."
            )
        for name in [names] if isinstance(names, str) else names:
            if all(kernel_variable(layer, name) is None for layer in layers):
                has = listed(matrices(_keras.direct_weights(layers[0])))
                raise ValueError(
                    f"kernels names {name!r} of {what}, but layer "
                    f"{layers[0].name!r} has no such attribute that is a "
                    "float variable with two axes or more. It has: "
                    f"{has or 'none'}."
                )


def _check_all_masked(model, chosen, matches):
    masked = {id(kernel.variable) for kernel in chosen.values()}
    left = [
        (layer.name, f"{why_dense(layer)} ({listed(dense)})")
        for layer in named_layers(model).values()
        if matches(layer)
        for dense in [left_dense(layer, masked)]
        if dense
    ]
    left += [
        (owner.name, f"its own weights, never masked ({listed(dense)})")
        for owner in containers(model)
        for dense in [matrices(_keras.direct_weights(owner))]
        if dense
    ]
    if left:
        raise ValueError(
            "strict=True, and these layers have weights that cannot be "
            "masked:\n" + "\n".join(f"  {name}: {why}" for name, why in left)
        )


def check_mask(
    name: str,
    mask: np.ndarray,
    named: Mapping[str, Kernel],
    pattern: Pattern,
) -> None:
    """Raises ValueError unless a mask fits the kernel with its name."""
    if name not in named:
        raise ValueError(
            f"There is a mask for {name!r}, which is not a kernel of this "
            f"model that can be masked. Its kernels: {', '.join(named)}."
        )
    shape, kernel = np.shape(mask), tuple(named[name].variable.shape)
    if shape != kernel:
        raise ValueError(
            f"The mask of {name!r} must have the shape of its kernel, "
            f"{kernel}. Received: shape {shape}."
        )
    values = np.unique(mask)
    if not np.isin(values, [0, 1]).all():
        raise ValueError(
            f"The mask of {name!r} must hold zeros and ones only. Received "
            f"{values[~np.isin(values, [0, 1])][0]} among its entries."
        )
    breach = pattern.layout(named[name].axes).breach(np.asarray(mask))
    if breach is not None:
        raise ValueError(
            f"The mask of {name!r} {breach}, which granularity="
            f"{pattern.name!r} requires. Pass granularity='element'."
        )


def _predicate(selector):
    if selector is None:
        return lambda layer: True
    if isinstance(selector, keras.layers.Layer):
        return lambda layer: layer is selector
    if isinstance(selector, type):
        return lambda layer: isinstance(layer, selector)
    if isinstance(selector, str):
        raise ValueError(
            "`layers` takes layer objects, layer types or a predicate, not "
            f"names. Received: layers={selector!r}. Pass "
            f"model.get_layer({selector!r})."
        )
    if callable(selector):
        return selector
    if isinstance(selector, Iterator):
        raise ValueError(
            "`layers` is read more than once. Received an iterator: layers="
            f"{selector!r}. Pass a list of the layers."
        )
    if isinstance(selector, Iterable):
        tests = [_predicate(item) for item in selector]
        return lambda layer: any(test(layer) for test in tests)
    raise ValueError(
        "`layers` takes layer objects, layer types, a predicate or a list of "
        f"these. Received: layers={selector!r}."
    )


def selected_layers(selector: Selector) -> list[keras.layers.Layer]:
    """Returns the layers that a selector names individually."""
    if isinstance(selector, keras.layers.Layer):
        return [selector]
    if not isinstance(selector, Iterable) or isinstance(selector, str):
        return []
    return [item for item in selector if isinstance(item, keras.layers.Layer)]


def by_name(
    given: Mapping | None,
    chosen: Mapping[str, Kernel],
    argument: str = "densities",
) -> dict:
    """Returns values that are given for layers, by the names of kernels.

    Args:
        given: `{layer, its type or its name: value}`; the last match counts.
        chosen: `{name: kernel}`.
        argument: Name of the argument.

    Raises:
        ValueError: A layer or type fits no kernel. A name that fits none is
            returned unchanged.
    """
    found = {}
    for key, value in (given or {}).items():
        names = [
            name
            for name, kernel in chosen.items()
            if name == key
            or key is kernel.layer
            or (isinstance(key, str) and name.startswith(f"{key}/"))
            or (isinstance(key, type) and isinstance(kernel.layer, key))
        ]
        if not names and isinstance(key, keras.layers.Layer | type):
            named = key.__name__ if isinstance(key, type) else repr(key.name)
            raise ValueError(
                f"{argument} names {named}, which is not a masked layer. "
                f"Masked layers: {', '.join(chosen)}."
            )
        # Names that fit nothing are refused when densities are solved.
        found.update(dict.fromkeys(names or [key], value))
    return found
