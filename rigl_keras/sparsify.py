"""A dense model to a masked one and back; says what it skipped and why."""

import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import keras
import numpy as np

from rigl_keras import distributions, replicas
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions
from rigl_keras.layers import Masked, check_granularity

__all__ = [
    "MASKABLE",
    "MaskedLayers",
    "aligned",
    "chosen_layers",
    "input_structure",
    "leaf_layers",
    "masked_layers",
    "named_layers",
    "sparsify",
    "strip",
    "with_masks",
]

_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)

MASKABLE = (keras.layers.Dense, keras.layers.EinsumDense, *_CONVOLUTIONS)

_NORMALISATION = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.UnitNormalization,
    keras.layers.SpectralNormalization,
    keras.layers.RMSNormalization,
)

# What may be asked to be masked: layers, types of layers, a predicate, or a
# collection of these.
Selector = (
    keras.layers.Layer
    | type
    | Callable[[keras.layers.Layer], bool]
    | Iterable
    | None
)


def sparsify(
    model: keras.Model,
    density: float,
    *,
    distribution: str = "erdos_renyi_kernel",
    densities: Mapping | None = None,
    layers: Selector = None,
    granularity: str = "element",
    seed: int = 0,
    conventions: Conventions = ORIGINAL,
) -> keras.Model:
    """Returns a masked copy of a model, its weights kept.

    1. Each kernel gets a density from the distribution
       (`distributions.layer_densities`).
    2. Counts are rounded so that exactly round(density x masked weights)
       remain (`distributions.layer_counts`).
    3. Each mask is drawn with its count of ones, seeded by `seed` and the
       kernel's path.

    The copy is not compiled and shares nothing with `model`, which stays
    dense. It trains, saves and loads as any Keras model; without a callback
    the masks never change (static sparse training). A model that was made in
    the scope of a strategy is masked in that scope.

    Args:
        model: A built Sequential or Functional model, nested ones included.
        density: Fraction of the masked weights kept, in (0, 1].
        distribution: `"erdos_renyi_kernel"` (`"erk"`), `"erdos_renyi"`
            (`"er"`) or `"uniform"`, which leaves the first layer dense.
        densities: `{layer or its name: density}` of layers whose density is
            given. They count towards `density`; the others share the rest.
        layers: Which layers to mask: layer objects, layer types, a predicate
            `layer -> bool`, or a list of these. None: every Dense,
            EinsumDense, Conv and DepthwiseConv kernel. Biases and
            normalisation are never masked.
        granularity: `"element"`: single weights. `"kernel"`: all weights
            between an input and an output channel of a convolution, as one
            (the reproduction's `struct-*`). Layers without spatial axes then
            stay at density 1, unless `densities` says otherwise, and the
            convolutions make up for it.
        seed: Seed of the masks, at least 0.
        conventions: `erk_rounding` and `sampling` apply. Under `"bernoulli"`
            sampling, as the report's, the number of ones is random.

    Returns:
        A model of the same kind in which the chosen layers are `Masked`.

    Raises:
        ValueError: The model is not built, is masked already or is of an
            unsupported kind, nothing matches `layers`, or a density is out
            of reach.

    Example:

    >>> model = sparsify(model, density=0.1)
    >>> print(masked_layers(model))
    """
    chosen = chosen_layers(model, layers)
    _check_seed(seed)
    check_conventions(conventions)
    if densities is not None and not isinstance(densities, Mapping):
        raise ValueError(
            "densities must map layers or their names to densities. Received: "
            f"densities={densities!r}."
        )
    check_granularity(granularity)
    given = _by_name(densities, chosen)
    shapes = {name: tuple(layer.kernel.shape) for name, layer in chosen.items()}
    if granularity == "kernel":
        given = {**_without_kernels(chosen), **given}
    solved = distributions.layer_densities(
        shapes,
        density,
        distribution,
        conventions=conventions,
        densities=given,
    )
    shapes = distributions.masked_shapes(shapes, distribution, given)
    masks = _draw_masks(
        shapes, solved, density, chosen, granularity, seed, conventions
    )
    return with_masks(model, masks, granularity=granularity, seed=seed)


def with_masks(
    model: keras.Model,
    masks: Mapping[str, np.ndarray],
    *,
    granularity: str = "element",
    seed: int = 0,
) -> keras.Model:
    """Returns a masked copy of a model with the masks given, its weights kept.

    What `sparsify` does with the masks that it draws, SNIP with those it
    computes and a lottery ticket with those that another run has found.

    Args:
        model: A built Sequential or Functional model, nested ones included.
        masks: `{layer name: array of zeros and ones of the kernel's shape}`,
            names as in `named_layers`. Layers that are not named stay dense.
        granularity: What later updates keep or remove as one, as in
            `sparsify`.
        seed: Seed of later random draws, at least 0.

    Returns:
        A model of the same kind in which the layers named are `Masked`.

    Raises:
        ValueError: The model cannot be masked, or a mask fits no layer.

    Example:

    >>> masks = masked_layers(trained).masks
    >>> ticket = with_masks(untrained, masks)
    """
    _check_model(model)
    _check_seed(seed)
    layers = named_layers(model)
    check_granularity(granularity)
    wrapped, keys = {}, {}
    for name, mask in masks.items():
        _check_mask(name, mask, layers, granularity)
        wrapped[id(layers[name])] = np.asarray(mask, np.float32)
        keys[id(layers[name])] = _key(name, layers[name], seed)
    if not wrapped:
        raise ValueError("with_masks takes one mask at least. Received none.")

    def mask_chosen(layer):
        copy = layer.__class__.from_config(layer.get_config())
        if id(layer) not in wrapped:
            return copy
        return Masked(
            copy,
            draw_key=keys[id(layer)],
            granularity=_granularity(layer, granularity),
            trainable=layer.trainable,
        )

    with replicas.scope(model):
        copies = _clone(model, mask_chosen)
        for layer, copy in copies.pairs:
            inner = copy.layer if isinstance(copy, Masked) else copy
            _copy_variables(layer, inner)
            if isinstance(copy, Masked):
                copy.assign_mask(wrapped[id(layer)])
    return copies.model


def strip(model: keras.Model) -> keras.Model:
    """Returns the plain copy of a masked model, with the same outputs.

    Each `Masked` layer gives way to the layer it wraps, whose kernel is zero
    outside the mask. The copy loads without this package.

    Args:
        model: A model that `sparsify` returned, trained or not.

    Returns:
        A model of the same kind without masks, not compiled.

    Raises:
        ValueError: The model has no masked layer.
    """
    if not masked_layers(model):
        raise ValueError(
            f"Model {model.name!r} has no masked layer: there is nothing to "
            "strip."
        )

    def unmask(layer):
        plain = layer.layer if isinstance(layer, Masked) else layer
        return plain.__class__.from_config(plain.get_config())

    copies = _clone(model, unmask)
    for layer, copy in copies.pairs:
        plain = layer.layer if isinstance(layer, Masked) else layer
        _copy_variables(plain, copy)
        if isinstance(layer, Masked):
            copy.kernel.assign(layer.masked_kernel())
    return copies.model


class MaskedLayers(Sequence):
    """The masked layers of a model; printing it shows all its layers.

    Args:
        model: A built model.
    """

    def __init__(self, model: keras.Model):
        self._masked = []
        self._skipped = []
        if not isinstance(model, keras.Model):
            raise ValueError(
                f"masked_layers takes a Keras model. Received: {model!r}."
            )
        self._model = model
        leaves = {id(leaf): leaf for leaf in leaf_layers(model)}
        for layer in leaves.values():
            if isinstance(layer, Masked):
                self._masked.append(layer)
            elif layer.weights:
                self._skipped.append(layer)

    def __getitem__(self, index):
        return self._masked[index]

    def __len__(self) -> int:
        return len(self._masked)

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """The masks, `{unique name: zeros and ones}` as `with_masks` takes."""
        return {
            name: layer.mask.numpy()
            for name, layer in named_layers(self._model).items()
            if isinstance(layer, Masked)
        }

    @property
    def skipped(self) -> list[tuple[keras.layers.Layer, str]]:
        """Layers with weights that are not masked, each with the reason."""
        return [(layer, _why_dense(layer)) for layer in self._skipped]

    def __str__(self) -> str:
        rows = [("layer", "kernel", "density", "nonzeros", "of")]
        ones = size = 0
        for layer in self._masked:
            nonzeros = int(np.count_nonzero(layer.mask.numpy()))
            weights = math.prod(layer.kernel.shape)
            ones, size = ones + nonzeros, size + weights
            rows.append(
                (
                    layer.name,
                    "x".join(map(str, layer.kernel.shape)),
                    f"{nonzeros / weights:.4f}",
                    f"{nonzeros:,}",
                    f"{weights:,}",
                )
            )
        if size:
            total = f"{ones / size:.4f}", f"{ones:,}", f"{size:,}"
            rows.append(("all masked", "", *total))
        lines = aligned(rows)
        if self._skipped:
            lines.append("not masked:")
            lines += [f"  {layer.name}: {why}" for layer, why in self.skipped]
        return "\n".join(lines)

    __repr__ = __str__


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the rows of a table as lines, the first two columns to the left.

    Args:
        rows: Cells, as many in each row.

    Returns:
        A line for each row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def input_structure(model: keras.Model):
    """Returns a model's symbolic inputs in the structure that it is called on.

    Args:
        model: A built Sequential or Functional model.

    Returns:
        A KerasTensor, or a list or dict of them.
    """
    # A Sequential model that was never called has no `input`.
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    return model.input


def masked_layers(model: keras.Model) -> MaskedLayers:
    """Returns the `Masked` layers of a model, in order.

    Args:
        model: A built model.

    Returns:
        A sequence of `Masked`, each with `name`, `kernel`, `mask` and
        `density`. Its string is a table of shape, density and nonzeros, with
        each layer that is not masked and the reason.
    """
    return MaskedLayers(model)


def leaf_layers(model) -> Iterator[keras.layers.Layer]:
    """Yields the layers of a model, those of nested models in their place.

    Args:
        model: A Keras model.

    Yields:
        Each layer that is not itself a model; a shared layer once for each
        model that lists it.
    """
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from leaf_layers(layer)
        else:
            yield layer


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


def _why_dense(layer):
    if isinstance(layer, _NORMALISATION):
        return "normalisation, never masked"
    if isinstance(layer, MASKABLE):
        return (
            "left dense: the first layer under 'uniform', or not selected by "
            "`layers`"
        )
    return f"{type(layer).__name__} has no kernel that can be masked"


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            "sparsify takes a Keras model. Received: "
            f"{type(model).__module__}.{type(model).__name__}."
        )
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so its kernels have no "
            "shape yet. Call model.build(input_shape) first, or begin it "
            "with keras.Input(shape)."
        )
    for part in (model, *_submodels(model)):
        if hasattr(part, "operations") or isinstance(part, keras.Sequential):
            continue
        raise ValueError(
            "sparsify masks Sequential and Functional models. Received the "
            f"subclassed model {part.name!r} of type "
            f"{type(part).__name__}: build it from keras.Input, or wrap "
            "the layers it creates in rigl_keras.Masked."
        )
    masked = masked_layers(model)
    if masked:
        raise ValueError(
            f"Model {model.name!r} is masked already ({len(masked)} layers). "
            "To mask it anew, sparsify(strip(model), ...)."
        )


def chosen_layers(
    model: keras.Model, selector: Selector = None
) -> dict[str, keras.layers.Layer]:
    """Returns the layers of a dense model to mask, by unique name, in order.

    Args:
        model: A built model.
        selector: The `layers` of `sparsify`.

    Returns:
        `{name: layer}`. A second layer of one name, in another submodel, gets
        a prime after its name.

    Raises:
        ValueError: The model cannot be masked, nothing matches, or a layer
            named cannot be masked.
    """
    _check_model(model)
    matches = _predicate(selector)
    selected = [layer for layer in leaf_layers(model) if matches(layer)]
    if selector is not None:
        wrong = [
            layer
            for layer in _named_layers(selector)
            if not isinstance(layer, MASKABLE)
            or all(layer is not leaf for leaf in leaf_layers(model))
        ]
        if wrong:
            raise ValueError(
                f"`layers` names {wrong[0].name!r}, a "
                f"{type(wrong[0]).__name__} that is not a layer of this model "
                "or has no kernel that can be masked. Maskable: "
                f"{', '.join(kind.__name__ for kind in MASKABLE)}."
            )
    wanted = {id(s) for s in selected if isinstance(s, MASKABLE)}
    chosen = {n: s for n, s in named_layers(model).items() if id(s) in wanted}
    if not chosen:
        skipped = "\n".join(
            f"  {layer.name}: {_why_dense(layer)}"
            for layer in leaf_layers(model)
            if layer.weights
        )
        raise ValueError(
            f"Model {model.name!r} has nothing to mask"
            + ("" if selector is None else " that matches `layers`")
            + f". Its layers with weights:\n{skipped or '  (none)'}"
        )
    return chosen


def _granularity(layer, wanted):
    """Returns what the mask of a layer keeps as one; kernels are convolved."""
    return wanted if isinstance(layer, _CONVOLUTIONS) else "element"


def _without_kernels(chosen):
    """Returns density 1 for each layer that has no spatial axes."""
    flat = {
        name: 1.0
        for name, layer in chosen.items()
        if not isinstance(layer, _CONVOLUTIONS)
    }
    if len(flat) == len(chosen):
        raise ValueError(
            "granularity='kernel' keeps or removes whole kernels of "
            "convolutions, and none of the layers to mask is one: "
            f"{', '.join(flat)}. Use granularity='element'."
        )
    return flat


def _check_seed(seed):
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(
            f"seed must be an int of at least 0. Received: seed={seed!r}."
        )


def _check_mask(name, mask, layers, granularity):
    layer = layers.get(name)
    if not isinstance(layer, MASKABLE):
        raise ValueError(
            f"There is a mask for {name!r}, which is no layer of this model "
            f"that can be masked. Its layers with weights: {', '.join(layers)}."
        )
    shape, kernel = np.shape(mask), tuple(layer.kernel.shape)
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
    if _granularity(layer, granularity) == "kernel":
        spatial = tuple(range(np.ndim(mask) - 2))
        if (np.max(mask, axis=spatial) != np.min(mask, axis=spatial)).any():
            raise ValueError(
                f"The mask of {name!r} keeps a part of some kernels, and "
                "granularity='kernel' keeps or removes them whole. Pass "
                "granularity='element'."
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
    if isinstance(selector, Iterable):
        tests = [_predicate(item) for item in selector]
        return lambda layer: any(test(layer) for test in tests)
    raise ValueError(
        "`layers` takes layer objects, layer types, a predicate or a list of "
        f"these. Received: layers={selector!r}."
    )


def _named_layers(selector):
    if isinstance(selector, keras.layers.Layer):
        return [selector]
    if isinstance(selector, (type, str)) or callable(selector):
        return []
    return [item for item in selector if isinstance(item, keras.layers.Layer)]


def _by_name(densities, chosen):
    names = {id(layer): name for name, layer in chosen.items()}
    given = {}
    for key, value in (densities or {}).items():
        if isinstance(key, keras.layers.Layer):
            if id(key) not in names:
                raise ValueError(
                    f"densities names {key.name!r}, which is no masked layer. "
                    f"Masked layers: {', '.join(chosen)}."
                )
            key = names[id(key)]
        given[key] = value
    return given


def _draw_masks(
    shapes, densities, density, chosen, granularity, seed, conventions
):
    """Returns `{name: float32 array of zeros and ones}`."""
    # A unit is what the mask keeps or removes as one.
    units = {
        name: shape[-2:]
        if _granularity(chosen[name], granularity) == "kernel"
        else shape
        for name, shape in shapes.items()
    }
    sizes = {name: math.prod(unit) for name, unit in units.items()}
    weights = sum(math.prod(shape) for shape in shapes.values())
    if granularity == "element":
        exact = density * weights
    else:
        exact = sum(densities[n] * size for n, size in sizes.items())
    total = distributions.total_count(exact, density, weights)
    bernoulli = conventions.sampling == "bernoulli"
    counts = distributions.layer_counts(sizes, densities, total)
    masks = {}
    for name, unit in units.items():
        draw = np.random.default_rng(_key(name, chosen[name], seed))
        if bernoulli:
            mask = draw.random(unit) < densities[name]
        else:
            mask = np.zeros(sizes[name], bool)
            mask[: counts[name]] = True
            mask = draw.permutation(mask).reshape(unit)
        masks[name] = np.broadcast_to(mask, shapes[name])
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        warnings.warn(
            f"At density={density} no connection is left in "
            f"{', '.join(empty)}: nothing passes through. Raise density, or "
            "give these layers one in densities.",
            stacklevel=3,
        )
    return {name: mask.astype(np.float32) for name, mask in masks.items()}


def _key(name, layer, seed):
    # Layers of one name in two submodels may have one path as well; their
    # unique names tell them apart.
    path = layer.kernel.path + name.removeprefix(layer.name)
    return zlib.crc32(f"{seed}/{path}".encode())


def _submodels(model):
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield layer
            yield from _submodels(layer)


class _clone:
    """A copy of a model, and which layer became which."""

    def __init__(self, model, clone_layer):
        self.pairs = []

        copies = {}

        def clone(layer):
            # A model and its submodel may share a layer.
            if id(layer) not in copies:
                copies[id(layer)] = clone_layer(layer)
                self.pairs.append((layer, copies[id(layer)]))
            return copies[id(layer)]

        # Keras would compile the copy, and fail where the loss is a function
        # of the user's own.
        models = [model, *_submodels(model)]
        compiled = [m.compiled for m in models]
        try:
            for m in models:
                m.compiled = False
            self.model = keras.models.clone_model(
                model, clone_function=clone, recursive=True
            )
        finally:
            for m, value in zip(models, compiled, strict=True):
                m.compiled = value


def _copy_variables(source, target):
    for old, new in zip(source.variables, target.variables, strict=True):
        new.assign(old)
    if hasattr(target, "finalize_state"):
        target.finalize_state()  # what Normalization derives from them
