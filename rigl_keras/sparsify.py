"""A dense model to a masked one and back; says what it skipped and why."""

import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import keras
import numpy as np

from rigl_keras import distributions
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.layers import Masked

__all__ = [
    "MASKABLE",
    "MaskedLayers",
    "aligned",
    "input_structure",
    "leaf_layers",
    "masked_layers",
    "sparsify",
    "strip",
]

MASKABLE = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)

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
    the masks never change (static sparse training).

    Args:
        model: A built Sequential or Functional model, nested ones included.
        density: Fraction of the masked weights kept, in (0, 1].
        distribution: `"erdos_renyi_kernel"` (`"erk"`), `"erdos_renyi"`
            (`"er"`) or `"uniform"`, which leaves the first layer dense.
        densities: `{layer or its name: density}` of layers whose density is
            given. They count towards `density`; the others share the rest.
        layers: Which layers to mask: layer objects, layer types, a predicate
            `layer -> bool`, or a list of these. None: every Dense, Conv and
            DepthwiseConv kernel. Biases and normalisation are never masked.
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
    _check_model(model)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(
            f"seed must be an int of at least 0. Received: seed={seed!r}."
        )
    if not isinstance(conventions, Conventions):
        raise ValueError(
            "conventions must be rigl_keras.ORIGINAL, rigl_keras.REPORT or a "
            f"Conventions of your own. Received: conventions={conventions!r}."
        )
    if densities is not None and not isinstance(densities, Mapping):
        raise ValueError(
            "densities must map layers or their names to densities. Received: "
            f"densities={densities!r}."
        )
    chosen = _choose(model, layers)
    given = _by_name(densities, chosen)
    shapes = {name: tuple(layer.kernel.shape) for name, layer in chosen.items()}
    solved = distributions.layer_densities(
        shapes,
        density,
        distribution,
        conventions=conventions,
        densities=given,
    )
    if distribution == "uniform":
        first = next(iter(shapes))
        if first not in given:
            # The first layer stays dense: it is not masked at all.
            del shapes[first]
        if not shapes:
            raise ValueError(
                "There is nothing to mask: under 'uniform' the first layer "
                f"stays dense and {first!r} is the only one. Use "
                "distribution='erdos_renyi_kernel', or give its density in "
                "densities."
            )
    masks = _draw_masks(shapes, solved, density, chosen, seed, conventions)

    wrapped = {id(chosen[name]): mask for name, mask in masks.items()}
    keys = {id(chosen[name]): _key(name, chosen[name], seed) for name in masks}

    def mask_chosen(layer):
        copy = layer.__class__.from_config(layer.get_config())
        if id(layer) not in wrapped:
            return copy
        return Masked(copy, draw_key=keys[id(layer)], trainable=layer.trainable)

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
    def skipped(self) -> list[tuple[keras.layers.Layer, str]]:
        """Layers with weights that are not masked, each with the reason."""
        return [(layer, _why_dense(layer)) for layer in self._skipped]

    def __str__(self) -> str:
        rows = [("layer", "kernel", "density", "nonzeros", "of")]
        ones = size = 0
        for layer in self._masked:
            nonzeros = int(np.sum(layer.mask.numpy(), dtype=np.int64))
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


def _choose(model, selector):
    """Returns `{unique name: layer}` of the layers to mask, in order."""
    matches = _predicate(selector)
    selected = [layer for layer in leaf_layers(model) if matches(layer)]
    # A layer may be used, and so be listed, more than once.
    selected = list({id(layer): layer for layer in selected}.values())
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
    chosen = {}
    for layer in selected:
        if isinstance(layer, MASKABLE):
            name = layer.name
            while name in chosen:  # one name in two submodels
                name += "'"
            chosen[name] = layer
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


def _draw_masks(shapes, densities, density, chosen, seed, conventions):
    """Returns `{name: float32 array of zeros and ones}`."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    weights = sum(sizes.values())
    total = round(density * weights)
    if total == 0:
        raise ValueError(
            f"density={density} of {weights} weights rounds to no connection "
            f"at all. Pass at least {1 / weights:.2g}."
        )
    bernoulli = conventions.sampling == "bernoulli"
    counts = distributions.layer_counts(sizes, densities, total)
    masks = {}
    for name, shape in shapes.items():
        draw = np.random.default_rng(_key(name, chosen[name], seed))
        if bernoulli:
            masks[name] = draw.random(shape) < densities[name]
        else:
            mask = np.zeros(sizes[name], bool)
            mask[: counts[name]] = True
            masks[name] = draw.permutation(mask).reshape(shape)
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
