"""Masks in one shot before training: SNIP, GraSP, SynFlow, magnitude."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import keras
import tensorflow as tf

from rigl_keras import (
    _checks,
    _keras,
    distributions,
    ranking,
    scores,
    topology,
)
from rigl_keras._warn import warn
from rigl_keras.masking.pattern_choice import PatternOf, plan_patterns
from rigl_keras.masking.selection import (
    Selector,
    by_name,
    chosen_kernels,
    selected_layers,
)
from rigl_keras.masking.sparsify import with_masks

__all__ = ["grasp", "magnitude", "snip", "synflow"]


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
    2. The round(density x weights) weights of largest saliency are kept: over
       all layers together (`ranking.highest_of_all`), or in each layer by a
       distribution. A whole kernel or block has the mean saliency of its
       weights. If groups have fixed numbers, such as 2 of 4, each keeps its
       highest.

    Lee et al., 2019, SNIP: single-shot network pruning based on connection
    sensitivity, arXiv:1810.02340. Without a callback the masks never change.

    Args:
        model: A built dense Sequential or Functional model. It is not changed,
            nor are its batch statistics.
        density: Fraction of the masked weights kept, in (0, 1]. None: the
            density of the pattern, if it fixes that of each layer.
        batch: `(inputs, targets)`, as `model` and `loss` take them.
        loss: `loss(targets, outputs)`, a Keras loss or any function that
            returns a tensor of losses.
        scope: `"global"`, as in the paper, or `"layer"`, as in the code of
            RigL's authors.
        distribution: With `"layer"`, how density is spread over layers, as in
            `sparsify`.
        densities: With `"layer"`, `{layer or its name: density}` of layers with
            a fixed density.
        layers: Which layers to mask, as in `sparsify`.
        granularity: The pattern of the masks, as in `sparsify`.
        seed: Seed of later random draws.

    Returns:
        A model of the same kind in which the chosen layers are `Masked`.

    Raises:
        ValueError: An argument is out of range, or the gradient of the batch is
            not finite, or zero in a whole layer.
        UserWarning: A layer keeps no connection.

    Example:

    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model = snip(model, 0.1, next(iter(train)), loss)
    """
    _check_loss(loss)
    return _masked(
        "SNIP",
        model,
        density,
        lambda chosen: _saliencies(model, chosen, batch, loss),
        scope=scope,
        distribution=distribution,
        densities=densities,
        layers=layers,
        granularity=granularity,
        seed=seed,
    )


def grasp(
    model: keras.Model,
    density: float | None,
    batch: tuple,
    loss: Callable,
    *,
    temperature: float = 200.0,
    scope: str = "global",
    distribution: str = "erdos_renyi_kernel",
    densities: Mapping | None = None,
    layers: Selector = None,
    granularity: PatternOf = "element",
    seed: int = 0,
) -> keras.Model:
    """Returns a masked copy of a model that keeps the flow of gradients.

    With the gradient g and the Hessian H of the loss of a batch, at the initial
    weights:

    1. The score of a weight is w (H g): to first order and up to a factor, the
       decrease of the squared norm of the gradient when w is removed.
    2. The round(density x weights) weights of largest (signed) score are kept:
       over all layers together, or in each layer by a distribution.

    Wang et al., 2020, Picking winning tickets before training by preserving
    gradient flow, arXiv:2002.07376, Algorithm 1. The outputs are divided by
    `temperature` before the loss, as in the authors' code. That code takes 25
    examples of each class, in two halves, keeps one weight too many, and draws
    new weights for dense layers.

    Args:
        model, density, batch, loss: As in `snip`. The batch is passed forward
            once and backward twice.
        temperature: Divisor of the outputs, positive.
        scope, distribution, densities, layers, granularity, seed: As in
            `snip`.

    Returns:
        A model of the same kind in which the chosen layers are `Masked`.

    Raises:
        ValueError: As in `snip`.
        UserWarning: A layer keeps no connection.

    Example:

    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model = grasp(model, 0.1, next(iter(train)), loss)
    """
    temperature = _checks.number(
        "temperature", temperature, above=0, rule="must be positive"
    )
    _check_loss(loss)
    return _masked(
        "GraSP",
        model,
        density,
        lambda chosen: _flows(model, chosen, batch, loss, temperature),
        scope=scope,
        distribution=distribution,
        densities=densities,
        layers=layers,
        granularity=granularity,
        seed=seed,
    )


def synflow(
    model: keras.Model,
    density: float,
    *,
    rounds: int = 100,
    layers: Selector = None,
    granularity: PatternOf = "element",
    seed: int = 0,
) -> keras.Model:
    """Returns a masked copy of a model that keeps its strongest paths.

    No data is needed. With every variable replaced by its magnitude, inputs
    of ones, and R the sum of the outputs:

    1. The score of a weight is w dR/dw: the sum, over all paths through it, of
       the products of their weights.
    2. In round k of `rounds`, the round(density^(k / rounds) x weights) weights
       of largest score are kept, over all layers together, and R is computed
       again with the rest removed.

    Tanaka et al., 2020, Pruning neural networks without any data by
    iteratively conserving synaptic flow, arXiv:2006.05467, Algorithm 1, with
    batch norm in inference mode as in the authors' code. R is computed in
    float64, as it overflows in deep networks, and divided by itself.

    Args:
        model: A built dense Sequential or Functional model with inputs of known
            shape. It is not changed.
        density: Fraction of the masked weights kept, in (0, 1].
        rounds: Number of rounds, at least 1. Few rounds empty whole layers.
        layers: Which layers to mask, as in `sparsify`.
        granularity: The pattern of the masks, as in `sparsify`.
        seed: Seed of later random draws.

    Returns:
        A model of the same kind in which the chosen layers are `Masked`.

    Raises:
        ValueError: An argument is out of range, or R is not finite.
        UserWarning: A layer keeps no connection.

    Example:

    >>> model = synflow(model, 0.1)
    """
    rounds = _checks.integer("rounds", rounds, at_least=1)
    density = distributions.checked_density(density)
    plan = plan_patterns(
        chosen_kernels(model, layers), granularity, selected_layers(layers)
    )
    masks = _strongest_paths(model, plan, density, rounds)
    return _with_masks("SynFlow", model, masks, density, granularity, seed)


def magnitude(
    model: keras.Model,
    density: float | None,
    *,
    scope: str = "global",
    distribution: str = "erdos_renyi_kernel",
    densities: Mapping | None = None,
    layers: Selector = None,
    granularity: PatternOf = "element",
    seed: int = 0,
) -> keras.Model:
    """Returns a masked model that keeps a trained model's largest weights.

    The round(density x weights) weights of largest |w| are kept: over all
    layers together, or in each layer by a distribution. The result can be
    trained further, or exported.

    Args:
        model: A built dense model. It is copied, or masked in place, as in
            `sparsify`.
        density: As in `snip`.
        scope, distribution, densities, layers, granularity, seed: As in
            `snip`.

    Returns:
        A model of the same kind in which the chosen layers are `Masked`.

    Raises:
        ValueError: An argument is out of range, or a weight is not finite.
        UserWarning: A layer keeps no connection.

    Example:

    >>> model = magnitude(trained, 0.1)
    >>> model = magnitude(trained, 0.1, scope="layer", distribution="uniform")
    """
    return _masked(
        "magnitude",
        model,
        density,
        lambda chosen: {
            name: scores.magnitude(tf.convert_to_tensor(kernel.variable.value))
            for name, kernel in chosen.items()
        },
        scope=scope,
        distribution=distribution,
        densities=densities,
        layers=layers,
        granularity=granularity,
        seed=seed,
    )


def _masked(
    method,
    model,
    density,
    find,
    *,
    scope,
    distribution,
    densities,
    layers,
    granularity,
    seed,
):
    """Returns a masked model with the weights that score highest.

    `find` returns the scores of the given kernels, by name.
    """
    _checks.choice("scope", scope, ("global", "layer"))
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
        found = _finite(method, find(plan.kernels))
        kept = _highest_of_each(found, plan, budgets)
    else:
        distributions.full_name(distribution)  # raises if it is misspelt
        # Layers whose patterns fix their densities.
        budgets = plan.fixed_budgets(density)
        total = _total(density, plan, budgets)
        found = _finite(method, find(plan.kernels))
        kept = _highest_of_each(found, plan, budgets)
        kept |= _highest_of_all(found, plan, total)
    masks = {name: kept[name] for name in plan.kernels if name in kept}
    return _with_masks(method, model, masks, density, granularity, seed)


def _finite(method, found):
    if not all(
        bool(tf.reduce_all(tf.math.is_finite(s))) for s in found.values()
    ):
        raise ValueError(
            f"{method} cannot rank weights by scores that are NaN or infinite: "
            "check the weights, and the loss of the batch."
        )
    return found


def _with_masks(method, model, masks, density, granularity, seed):
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        advice = "" if method == "SynFlow" else ", or pass scope='layer'"
        warn(
            f"{method} keeps no connection of {', '.join(empty)} at "
            f"density={density}: nothing passes through. Raise density"
            f"{advice}.",
        )
    return with_masks(model, masks, granularity=granularity, seed=seed)


def _total(density, plan, fixed):
    """Returns how many weights are kept by layers that share a threshold."""
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
    """Returns `{name: mask}` with a number of units for each layer."""
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
    """Returns `{name: mask}` for the layers that share a threshold."""
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
    """Returns |w dL/dw| by name, without changing the model."""
    inputs, targets = _pair(batch)
    kernels = [kernel.variable for kernel in chosen.values()]
    values = [tf.convert_to_tensor(kernel.value) for kernel in kernels]
    with tf.GradientTape() as tape:
        tape.watch(values)
        mapping = list(zip(kernels, values, strict=True))
        # The scope keeps assignments of the pass, such as batch statistics.
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
            "SNIP found no gradient for the weights of "
            f"{', '.join(flat)}: none changes the loss of the batch. Check "
            "that the loss depends on the outputs, and that no scale after "
            "these layers starts at 0 (in our ResNets, zero_init_residual)."
        )
    return dict(zip(chosen, found, strict=True))


def _check_loss(loss):
    if not callable(loss):
        raise ValueError(
            "loss must be a function of targets and outputs. Received: "
            f"loss={loss!r}."
        )


def _pair(batch):
    try:
        inputs, targets = batch
    except (TypeError, ValueError):
        raise ValueError(
            "batch must be (inputs, targets). Received: "
            f"{type(batch).__name__}."
        ) from None
    return inputs, targets


def _flows(model, chosen, batch, loss, temperature):
    """Returns w (H g) by name, without changing the model."""
    inputs, targets = _pair(batch)
    kernels = [kernel.variable for kernel in chosen.values()]
    values = [tf.convert_to_tensor(kernel.value) for kernel in kernels]
    zero = tf.UnconnectedGradients.ZERO
    with tf.GradientTape() as outer:
        outer.watch(values)
        with tf.GradientTape() as inner:
            inner.watch(values)
            mapping = list(zip(kernels, values, strict=True))
            # The scope keeps assignments of the pass.
            with keras.StatelessScope(state_mapping=mapping):
                outputs = keras.tree.map_structure(
                    lambda y: y / tf.cast(temperature, y.dtype),
                    model(inputs, training=True),
                )
                value = tf.reduce_mean(loss(targets, outputs))
        gradients = inner.gradient(value, values, unconnected_gradients=zero)
        flow = tf.add_n(
            [tf.reduce_sum(tf.stop_gradient(g) * g) for g in gradients]
        )
    curved: Any = outer.gradient(flow, values, unconnected_gradients=zero)
    found = [v * g for v, g in zip(values, curved, strict=True)]
    if not any(bool(tf.reduce_any(s != 0)) for s in found):
        raise ValueError(
            "GraSP found no second derivative to rank weights by: it is zero "
            "for every weight. Check that the loss depends on the outputs."
        )
    return dict(zip(chosen, found, strict=True))


def _strongest_paths(model, plan, density, rounds):
    """Returns the masks of SynFlow by name, without changing the model."""
    others = [
        (variable, tf.abs(variable.value))
        for variable in model.variables
        if variable.value.dtype.is_floating
    ]
    kernels = [kernel.variable for kernel in plan.kernels.values()]
    layouts = [plan.layouts[name] for name in plan.kernels]
    values = [tf.abs(tf.convert_to_tensor(k.value)) for k in kernels]
    inputs = _ones_of(model)

    @tf.function
    def next_masks(masks, density):
        kept = [tf.where(m, v, 0.0) for v, m in zip(values, masks, strict=True)]
        with tf.GradientTape() as tape:
            tape.watch(kept)
            mapping = [*others, *zip(kernels, kept, strict=True)]
            with keras.StatelessScope(state_mapping=mapping):
                outputs = keras.tree.flatten(model(inputs, training=False))
            total = tf.add_n(
                [tf.reduce_sum(tf.cast(y, tf.float64)) for y in outputs]
            )
            # The scores of a layer then add to 1, at any depth of the network.
            total /= tf.stop_gradient(total)
        gradients: Any = tape.gradient(
            total, kept, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        found = [
            tf.cast(v * g, tf.float32)
            for v, g in zip(kept, gradients, strict=True)
        ]
        defined = tf.math.is_finite(total) & tf.reduce_all(
            [tf.reduce_all(tf.math.is_finite(s)) for s in found]
        )
        units = ranking.highest_at_density(
            [at.by_unit(s) for at, s in zip(layouts, found, strict=True)],
            density,
            among=[at.units(m) for at, m in zip(layouts, masks, strict=True)],
            layouts=layouts,
        )
        stay = [at.by_element(u) for at, u in zip(layouts, units, strict=True)]
        return stay, defined

    masks = [tf.ones_like(v, tf.bool) for v in values]
    weights = sum(math.prod(at.shape) for at in layouts)
    distributions.total_count(density * weights, density, weights)
    with _keras.computing_in_double(model):
        for k in range(1, rounds + 1):
            now = tf.constant(density ** (k / rounds), tf.float64)
            masks, defined = next_masks(masks, now)
            if not bool(defined):
                raise ValueError(
                    "SynFlow cannot rank weights: the sum of the outputs of "
                    f"the model is zero or not finite in round {k} of "
                    f"{rounds}. Check the weights, or raise rounds or density."
                )
    return {
        name: mask.numpy()
        for name, mask in zip(plan.kernels, masks, strict=True)
    }


def _ones_of(model):
    """Returns a tensor of ones for each input of a model."""
    inputs = getattr(model, "input", None)
    shapes = [tuple(each.shape)[1:] for each in keras.tree.flatten(inputs)]
    if inputs is None or any(None in shape for shape in shapes):
        raise ValueError(
            "SynFlow needs a model with inputs of known shape, such as a "
            f"Functional one. Received: inputs of shapes {shapes}."
        )
    return keras.tree.map_structure(
        lambda each: tf.ones((1, *each.shape[1:]), each.dtype), inputs
    )
