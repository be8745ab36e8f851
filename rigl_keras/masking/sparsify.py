"""Makes masked models from dense ones."""

import math
from collections.abc import Mapping

import keras
import numpy as np

from rigl_keras import _checks, replicas
from rigl_keras._warn import warn
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions
from rigl_keras.kernels import ahead, fast_calls
from rigl_keras.masking.layer_state import copy_state
from rigl_keras.masking.mask_drawing import (
    draw_masks,
    drawing_key,
    fan_in_scale,
)
from rigl_keras.masking.masked import Masked, refuse
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.pattern_choice import (
    PatternOf,
    layer_granularity,
    patterns_of,
    plan_patterns,
)
from rigl_keras.masking.selection import (
    Selector,
    by_name,
    check_kernels_fit,
    check_mask,
    check_model,
    chosen_kernels,
    named_kernels,
    names_and_product,
    selected_layers,
    with_embeddings,
)
from rigl_keras.masking.surgery import exchange
from rigl_keras.masking.weight_files import weight_loader
from rigl_keras.patterns import Element

__all__ = ["sparsify", "with_masks"]


def sparsify(
    model: keras.Model,
    density: float | None = None,
    *,
    distribution: str = "erdos_renyi_kernel",
    densities: Mapping | None = None,
    layers: Selector = None,
    granularity: PatternOf = "element",
    kernels: Mapping | None = None,
    product: str = "auto",
    scale_to_fan_in: bool = False,
    seed: int = 0,
    conventions: Conventions = ORIGINAL,
    strict: bool = False,
) -> keras.Model:
    """Returns a masked model with the same weights.

    1. Each kernel gets a density from the distribution, and a count. Exactly
       round(density x masked weights) remain overall
       (`distributions.layer_budgets`).
    2. Each mask is drawn with its count of ones, seeded by `seed` and the
       kernel's name (`named_kernels`). The name of the model does not matter.

    A Sequential or Functional model is copied. The copy shares nothing with
    `model`: it has the same weights, frozen layers, vocabularies and
    statistics. A model that cannot be copied is masked in place, and `model`
    itself is returned: a `Masked` layer with the same weights replaces each
    layer that has a kernel. This applies to subclassed models, since only their
    code knows how layers are called; to models whose class has its own
    constructor, such as those of keras_hub; and, with a warning, to models with
    layers that share weights, or with a layer that cannot be made from its
    config.

    Compile the result before training. It trains, saves and loads like any
    Keras model. Without a callback the masks never change (static sparse
    training). A model made in the scope of a strategy is masked in that scope.

    Args:
        model: A built model of any kind. Models within it are masked too.
        density: Fraction of the masked weights kept, in (0, 1]. None: the
            density of the pattern, if it fixes that of each layer.
        distribution: `"erdos_renyi_kernel"` (`"erk"`), `"erdos_renyi"`
            (`"er"`), `"uniform"`, which leaves the first layer dense, or
            `"uniform_all"`, which does not.
        densities: `{layer, its type or its name: density}` of layers with a
            fixed density. They count towards `density`; the other layers share
            the rest.
        layers: Which layers to mask: layer objects, layer types, a predicate
            `layer -> bool`, or a list of these. Inner layers, such as the cell
            of an LSTM, may be selected too. None: all with a kernel, and no
            embeddings. Biases and normalisation are never masked.
        granularity: The pattern of the masks: one of `rigl_keras.patterns`, or
            its name. `"element"`: single weights. `"kernel"`: all weights
            between an input and an output channel of a convolution together
            (the reproduction's `struct-*`); layers without spatial axes then
            stay at density 1, unless `densities` names them, and the
            convolutions make up for it. `"n:m"`, such as `"2:4"`: n of each m
            inputs of an output; each layer has density n/m, and `density` may
            be left out (or be 1, to prune from there). `"fan_in"`: the same
            number of inputs for every output unit. `"rxc"`, such as `"4x16"`:
            blocks of r inputs and c outputs. `{layer, its type or its name: one
            of these}` gives other layers single weights. Layers that a pattern
            does not fit, such as one with 3 inputs for 2:4, stay dense; it is
            an error if the pattern fits none of the layers that a key names.
        kernels: Which variables of a layer are masked: `{layer or layer type:
            name or names}`, for custom layers whose kernels have other names
            than `kernel`, `recurrent_kernel`, `depthwise_kernel` or
            `pointwise_kernel`. None: those with these names.
        product: How products with masked kernels are computed. `"dense"`: by
            TensorFlow, which also multiplies by zeros. `"sparse"`: by
            operations that skip removed weights, if a layer has them. `"auto"`:
            by the faster of both, timed on this machine (`choose_kernels`).
            These strings are deprecated as `kernels`.
        scale_to_fan_in: Whether to multiply the weights of each output unit by
            sqrt(n / m) if m of its n connections are kept. The unit's sum then
            has the same variance as in the dense model (Evci et al., 2022,
            Gradient flow in sparse neural networks, arXiv:2010.03533, section
            3.1). Meant for newly drawn weights.
        seed: Seed of the masks, at least 0.
        conventions: `erk_rounding` and `sampling` apply. Under `"bernoulli"`
            sampling, the report's, the number of ones is random.
        strict: Whether weights with at least two axes that cannot be masked are
            an error, also if a pattern does not fit them, instead of staying
            dense. Biases, normalisation and embedding tables do not count.

    Returns:
        A model of the same kind in which the chosen layers are `Masked`.

    Raises:
        ValueError: The model is not built, or is already masked; nothing
            matches `layers`; a layer is quantized or has LoRA; a density is out
            of reach, or contradicts a pattern; or a pattern fits no layer.

    Example:

    >>> model = sparsify(model, density=0.1)
    >>> print(masked_layers(model))
    """
    check_model(model)
    kernels, product = names_and_product(kernels, product)
    chosen = chosen_kernels(model, layers, kernels=kernels, strict=strict)
    seed = _checks.integer("seed", seed, at_least=0)
    check_conventions(conventions)
    if densities is not None and not isinstance(densities, Mapping):
        raise ValueError(
            "densities must map layers or their names to densities. Received: "
            f"densities={densities!r}."
        )
    plan = plan_patterns(
        chosen, granularity, selected_layers(layers), strict=strict
    )
    budgets = plan.budgets(
        density,
        distribution,
        densities=by_name(densities, plan.kernels),
        conventions=conventions,
    )
    masks = draw_masks(
        budgets, plan.kernels, plan.layouts, seed, sampling=conventions.sampling
    )
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        warn(
            f"At density={density} no connection is left in "
            f"{', '.join(empty)}: nothing passes through. Raise density, or "
            "give these layers one in densities.",
        )
    return with_masks(
        model,
        masks,
        granularity=granularity,
        kernels=kernels,
        product=product,
        scale_to_fan_in=scale_to_fan_in,
        seed=seed,
    )


def with_masks(
    model: keras.Model,
    masks: Mapping[str, np.ndarray],
    *,
    granularity: PatternOf = "element",
    kernels: Mapping | None = None,
    product: str = "auto",
    scale_to_fan_in: bool = False,
    seed: int = 0,
) -> keras.Model:
    """Returns a masked model with given masks and the same weights.

    `sparsify` draws masks and SNIP computes them; a lottery ticket uses the
    masks of another run. Returns a copy, or the model itself, as `sparsify`
    does.

    Args:
        model: A built model.
        masks: `{name: array of zeros and ones of the kernel's shape}`, with
            names as in `named_kernels`. Kernels that are not named stay dense.
        granularity: The pattern that later updates keep, as in `sparsify`. The
            masks must have it.
        kernels: As in `sparsify`.
        product: As in `sparsify`.
        scale_to_fan_in: As in `sparsify`.
        seed: Seed of later random draws, at least 0.

    Returns:
        A model of the same kind in which the named layers are `Masked`.

    Raises:
        ValueError: The model cannot be masked, or a mask fits no kernel.

    Example:

    >>> masks = masked_layers(trained).masks
    >>> ticket = with_masks(untrained, masks)
    """
    check_model(model)
    seed = _checks.integer("seed", seed, at_least=0)
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(
            "with_masks takes {name: mask}, at least one mask. Received: "
            f"{masks!r}."
        )
    kernels, product = names_and_product(kernels, product)
    check_kernels_fit(model, kernels)
    named = named_kernels(model, with_embeddings(kernels))
    patterns = patterns_of(
        granularity, {name: named[name] for name in masks if name in named}
    )
    by_layer = {}
    for name, mask in masks.items():
        check_mask(name, mask, named, patterns.get(name, Element()))
        by_layer.setdefault(id(named[name].layer), {})[name] = (
            np.asarray(mask) != 0
        )

    def mask_chosen(layer, fresh):
        if id(layer) not in by_layer:
            return fresh
        names = list(by_layer[id(layer)])
        return Masked(
            fresh,
            kernels=[named[name].path for name in names],
            draw_key=drawing_key(names[0], named[names[0]], seed),
            granularity=layer_granularity(
                [named[name] for name in names], patterns[names[0]]
            ),
            product=product,
            trainable=layer.trainable,
        )

    given = model
    with replicas.scope(model):
        model, pairs = exchange(model, mask_chosen)
        for layer, new in pairs:
            copy_state(layer, new)
            if not isinstance(new, Masked):
                continue
            for masked, mask in zip(
                new.masked_kernels(), by_layer[id(layer)].values(), strict=True
            ):
                masked.assign_mask(mask)
                if scale_to_fan_in:
                    masked.kernel.assign(
                        masked.kernel.value * fan_in_scale(masked.found, mask)
                    )
    if product != "dense":
        fast_calls.use_fast_calls(model)
        if any(_may_be_sparse(new) for _, new in pairs):
            ahead.build_ahead()
    if model is not given:
        # Keras's method would load the weights of a dense file in part.
        model.load_weights = weight_loader(model)
    model.quantize = _quantizer(model)
    return model


def _quantizer(model):
    """Returns the `quantize` method of a masked model.

    Keras's method quantizes layers up to the first masked one, which refuses.
    """

    def quantize(*arguments, **options):
        masked = masked_layers(model)
        # With filters, which may leave masked layers out, each layer decides.
        if masked and options.get("filters") is None:
            refuse("quantize", masked[0].name)
        return type(model).quantize(model, *arguments, **options)

    return quantize


# Smaller kernels have dense products at usual batch sizes.
_LEAST_WEIGHTS = 1 << 14


def _may_be_sparse(layer):
    """Returns whether the op library will probably compute a layer."""
    return (
        isinstance(layer, Masked)
        and layer.why_dense() is None
        and math.prod(layer.kernel.shape) >= _LEAST_WEIGHTS
    )
