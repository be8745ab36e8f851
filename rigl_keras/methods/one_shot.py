"""Masks from one batch, before training: SNIP."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import cast

import keras
import tensorflow as tf

from rigl_keras import _checks, distributions, ranking, scores, topology
from rigl_keras.masking.pattern_choice import PatternOf, plan_patterns
from rigl_keras.masking.selection import (
    Selector,
    by_name,
    chosen_kernels,
    selected_layers,
)
from rigl_keras.masking.sparsify import with_masks

__all__ = ["snip"]


def snip(
    model: keras.Model,
    density: float | None,
    batch: tuple,
    loss: Callable,
    *,
    scope: str = "global",
    distribution: str = "erdos_renyi_kernel",
    densities: Mapping | None = None,
    layers: Selector = None,
    granularity: PatternOf = "element",
    seed: int = 0,
) -> keras.Model:
    """Returns a masked copy of a model that keeps its most salient weights.

    1. One forward and backward pass of the dense model on the batch gives the
       saliency |w dL/dw| of each weight (`scores.saliency`).
    2. The round(density x weights) of largest saliency are kept: of all
       layers together (`ranking.highest_of_all`), or of each layer as a
       distribution says. A whole kernel or block is worth the mean of its
       weights. Where groups of weights keep a number of their own, such as 2
       of 4, the highest of each are kept.

    Lee et al., 2019, SNIP: single-shot network pruning based on connection
    sensitivity, arXiv:1810.02340. Without a callback the masks never change.

    Args:
        model: A built dense Sequential or Functional model, which stays as it
            is: its batch statistics, too.
        density: Fraction of the masked weights kept, in (0, 1]. None: that of
            the pattern, where each layer's fixes it.
        batch: `(inputs, targets)`, what `model` and `loss` take.
        loss: `loss(targets, outputs)`, a Keras loss or any function that
            returns a tensor of losses.
        scope: `"global"`, as in the paper, or `"layer"`, as in the code of
            RigL's authors.
        distribution: With `"layer"`, how density is spread over layers, as in
            `sparsify`.
        densities: With `"layer"`, `{layer or its name: density}` of layers
            whose density is given.
        layers: Which layers to mask, as in `sparsify`.
        granularity: What masks keep or remove as one, as in `sparsify`.
        seed: Seed of later random draws.

    Returns:
        A model of the same kind in which the chosen layers are `Masked`.

    Raises:
        ValueError: An argument is out of range, or the gradient of the batch
            is not finite, or zero in all of a layer.
        UserWarning: A layer keeps no connection.

    Example:

    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model = snip(model, 0.1, next(iter(train)), loss)
    """
    _checks.choice("scope", scope, ("global", "layer"))
    if not callable(loss):
        raise ValueError(
            "loss must be a function of targets and outputs. Received: "
            f"loss={loss!r}."
        )
    if scope == "global" and densities is not None:
        raise ValueError(
            "With scope='global' one threshold decides every density. Pass "
            f"scope='layer'. Received: densities={densities!r}."
        )
    plan = plan_patterns(
        chosen_kernels(model, layers), granularity, selected_layers(layers)
    )
    if scope == "layer":
        budgets = plan.budgets(
            density, distribution, densities=by_name(densities, plan.kernels)
        )
        saliencies = _saliencies(model, plan.kernels, batch, loss)
        kept = _highest_of_each(saliencies, plan, budgets)
    else:
        distributions.full_name(distribution)  # which is not misspelt
        # Of layers whose patterns fix what they keep.
        budgets = plan.fixed_budgets(density)
        total = _total(density, plan, budgets)
        saliencies = _saliencies(model, plan.kernels, batch, loss)
        kept = _highest_of_each(saliencies, plan, budgets)
        kept |= _highest_of_all(saliencies, plan, total)
    masks = {name: kept[name] for name in plan.kernels if name in kept}
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        warnings.warn(
            f"SNIP keeps no connection of {', '.join(empty)} at "
            f"density={density}: nothing passes through. Raise density, or "
            "pass scope='layer'.",
            stacklevel=2,
        )
    return with_masks(model, masks, granularity=granularity, seed=seed)


def _total(density, plan, fixed):
    """Returns how many weights the layers that share a threshold keep."""
    layouts = plan.layouts
    sizes = {name: math.prod(layout.shape) for name, layout in layouts.items()}
    weights = sum(sizes.values())
    if len(fixed) == len(sizes):
        return 0
    density = distributions.checked_density(cast(float, density))
    total = distributions.total_count(density * weights, density, weights)
    return total - sum(
        budget.count * sizes[name] // layouts[name].size
        for name, budget in fixed.items()
    )


def _highest_of_each(saliencies, plan, budgets):
    """Returns `{name: mask}`, a number of units for each layer."""
    masks = {}
    for name, budget in budgets.items():
        layout = plan.layouts[name]
        worth = layout.by_unit(saliencies[name])
        kept = topology.select_highest(
            worth,
            budget.count,
            among=tf.ones_like(worth, tf.bool),
            layout=layout,
        )
        masks[name] = layout.by_element(kept).numpy()
    return masks


def _highest_of_all(saliencies, plan, total):
    """Returns `{name: mask}` of the layers that share a threshold."""
    layouts = {n: at for n, at in plan.layouts.items() if at.fixed is None}
    if not layouts:
        return {}
    worth = [
        layout.by_unit(tf.cast(saliencies[name], tf.float32))
        for name, layout in layouts.items()
    ]
    kept = ranking.highest_of_all(
        worth,
        total,
        among=[tf.ones_like(each, tf.bool) for each in worth],
        layouts=list(layouts.values()),
    )
    return {
        name: layout.by_element(units).numpy()
        for (name, layout), units in zip(layouts.items(), kept, strict=True)
    }


def _saliencies(model, chosen, batch, loss):
    """Returns |w dL/dw| by name; changes nothing of the model."""
    try:
        inputs, targets = batch
    except (TypeError, ValueError):
        raise ValueError(
            "batch must be (inputs, targets). Received: "
            f"{type(batch).__name__}."
        ) from None
    kernels = [kernel.variable for kernel in chosen.values()]
    values = [tf.convert_to_tensor(kernel.value) for kernel in kernels]
    with tf.GradientTape() as tape:
        tape.watch(values)
        mapping = list(zip(kernels, values, strict=True))
        # What the pass would assign (batch statistics) stays in the scope.
        with keras.StatelessScope(state_mapping=mapping):
            outputs = model(inputs, training=True)
            value = tf.reduce_mean(loss(targets, outputs))
    gradients = tape.gradient(
        value, values, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    found = [
        scores.saliency(value, tf.convert_to_tensor(gradient))
        for value, gradient in zip(values, gradients, strict=True)
    ]
    if not all(bool(tf.reduce_all(tf.math.is_finite(s))) for s in found):
        raise ValueError(
            "SNIP cannot rank weights by a gradient that is NaN or infinite: "
            f"the loss of the batch is {float(value)}."
        )
    flat = [
        name
        for name, s in zip(chosen, found, strict=True)
        if not bool(tf.reduce_any(s > 0))
    ]
    if flat:
        raise ValueError(
            "SNIP found no gradient to rank the weights of "
            f"{', '.join(flat)} by: none changes the loss of the batch. Check "
            "that the loss depends on the outputs, and that no scale after "
            "these layers starts at 0 (in our ResNets, zero_init_residual)."
        )
    return dict(zip(chosen, found, strict=True))
