"""What training costs, by method."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rigl_keras._checks import choice, integer, number
from rigl_keras.flops.counting import Count

__all__ = ["training_curve", "training_flops"]


def training_flops(
    method: str,
    *,
    sparse_flops: float,
    dense_flops: float,
    frequency: int | None = None,
    gradient_batches: int = 1,
    weight_gradient_flops: float | None = None,
) -> float:
    """Returns the cost of training on one sample, averaged over the steps.

    f_s and f_d are the forward costs of the sparse and the dense model. The
    backward pass costs twice the forward pass. Updates come every T steps:

        dense:                         3 f_d
        static, SET, MEST, AC/DC,
        SNIP, GraSP, SynFlow,
        small-dense:                   3 f_s
        RigL, RigL-SG, RigL-SM,
        GraNet, SRigL, GSE:            (3 f_s T + 2 f_s + f_w) / (T + 1)
        SNFS, magnitude pruning,
        Top-KAST, SR-STE:              2 f_s + f_w

    f_w is the cost of the gradients of the kernels at a step that needs more of
    them than there are connections. It is f_d by default. Top-KAST and GSE need
    gradients only at some more entries: if an implementation computes no
    others, f_w is the forward cost at the density of these and the connections
    together (`weight_gradient_flops`).

    Evci et al., 2020, section 3 and appendix H, count an update besides the T
    steps before it. If an update's gradient is the mean of n batches, n of
    these T + 1 steps have a dense backward pass: (3 f_s (T + 1 - n) + n (2
    f_s + f_w)) / (T + 1). Pruning and SNFS are as in the reproduction
    (counting/inference_train_FLOPs.py). If f_s changes during training, it is
    the mean over the steps; `training_curve` takes it from the masks of a run.

    Args:
        method: Name of the method as above, or of the callback's class; case
            does not matter.
        sparse_flops: f_s for one sample.
        dense_flops: f_d for one sample.
        frequency: T, for RigL and methods that update like it.
        gradient_batches: n, for these methods, at most T.
        weight_gradient_flops: f_w for one sample, between f_s and f_d. None:
            f_d.

    Returns:
        FLOPs for one sample.

    Raises:
        ValueError: The method is unknown, or needs a frequency.

    Example:

    >>> training_flops("rigl", sparse_flops=1, dense_flops=5, frequency=1)
    5.0
    """
    name = str(method).lower()
    for mark in "_-/ ":
        name = name.replace(mark, "")
    if name not in _GRADIENTS:
        raise ValueError(
            f"method must be one of {', '.join(_GRADIENTS)}. Received: "
            f"method={method!r}. For your own method, training_curve "
            "counts from its masks."
        )
    gradients = _GRADIENTS[name]
    sparse_flops = number(
        "sparse_flops", sparse_flops, at_least=0, at_most=1e300, rule=_FLOPS
    )
    dense_flops = number(
        "dense_flops", dense_flops, at_least=0, at_most=1e300, rule=_FLOPS
    )
    if name == "dense":
        return 3 * dense_flops
    if weight_gradient_flops is None:
        weight_gradient_flops = dense_flops
    weight_gradient_flops = number(
        "weight_gradient_flops",
        weight_gradient_flops,
        at_least=min(sparse_flops, dense_flops),
        at_most=max(sparse_flops, dense_flops),
        rule="must be between sparse_flops and dense_flops",
    )
    sparse = 3 * sparse_flops
    dense = 2 * sparse_flops + weight_gradient_flops
    if gradients == "never":
        return sparse
    if gradients == "always":
        return dense
    frequency = integer(
        "frequency",
        frequency,
        at_least=1,
        rule=f"of {method} must be the steps between updates",
    )
    gradient_batches = integer(
        "gradient_batches",
        gradient_batches,
        at_least=1,
        at_most=frequency,
        rule=f"must be an int from 1 to frequency={frequency}",
    )
    steps = frequency + 1
    expensive = gradient_batches * dense
    return (sparse * (steps - gradient_batches) + expensive) / steps


_FLOPS = "must be a number of at least 0"

# When a method needs dense gradients, in its closed form.
_GRADIENTS = {
    "dense": "always",
    "static": "never",
    "smalldense": "never",
    "snip": "never",
    "grasp": "never",
    "synflow": "never",
    "mest": "never",
    "acdc": "never",
    "set": "never",
    "rigl": "updates",
    "riglsg": "updates",
    "riglsm": "updates",
    "granet": "updates",
    "srigl": "updates",
    "gse": "updates",
    "topkast": "always",
    "srste": "always",
    "snfs": "always",
    "snfssg": "always",
    "snfssm": "always",
    "magnitudepruning": "always",
}


def training_curve(
    cost: Count,
    trajectory: Sequence[tuple[int, Mapping[str, int]]],
    *,
    steps: int,
    dense_gradients: str,
    gradient_batches: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cost of each step of a run, from its masks.

    A step t with masks of forward cost f_s(t) costs 3 f_s(t), or 2 f_s(t) + f_d
    if it needs gradients at inactive entries. The masks of an update count from
    the step after it.

    Args:
        cost: The `count` of the model, before or after training.
        trajectory: `[(step, {layer: connections})]`: the active connections
            of each masked layer, at the first step and after each update.
        steps: Number of steps of the run.
        dense_gradients: When the method needs dense gradients: `"never"`, at
            its `"updates"` or `"always"` (a callback's attribute of this name).
        gradient_batches: At how many steps, up to and including each update, it
            needs them (also a callback's attribute). Steps before an update
            that the run did not reach are unknown and not counted.

    Returns:
        `(inference, training)`, two float64 vectors of length `steps`: FLOPs
        for one sample, forward and in training. The mean of the second is the
        cost of the run.

    Raises:
        ValueError: The trajectory is empty, out of order or has other layers.

    Example:

    >>> _, training = training_curve(
    ...     cost, [(0, {"conv1": 43})], steps=100, dense_gradients="never")
    """
    choice("dense_gradients", dense_gradients, ("never", "updates", "always"))
    if not isinstance(cost, Count):
        raise ValueError(
            f"cost must be a result of count(model). Received: cost={cost!r}."
        )
    steps = integer("steps", steps, at_least=1)
    layers = {layer.name: layer for layer in cost.layers}
    trajectory = _checked_trajectory(trajectory, layers, steps)
    first = trajectory[0][0]
    inference = np.empty(steps)
    dense = np.full(steps, dense_gradients == "always")
    for i, (step, counts) in enumerate(trajectory):
        start = 0 if i == 0 else step + 1 - first
        inference[start:] = sum(
            layer.flops_at(
                counts[name] / math.prod(layer.shape)
                if name in counts
                else layer.density
            )
            for name, layer in layers.items()
        )
        if i and dense_gradients == "updates":
            last = step - first
            dense[max(last + 1 - gradient_batches, 0) : last + 1] = True
    training = np.where(
        dense, 2 * inference + cost.dense_inference_flops, 3 * inference
    )
    return inference, training


def _checked_trajectory(received, layers, steps):
    """Returns a trajectory, if it is in order and has a model's layers."""
    try:
        trajectory = [
            (
                integer("step", step, at_least=0),
                {n: integer(n, c, at_least=0) for n, c in counts.items()},
            )
            for step, counts in received
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "trajectory must be a list of (step, {layer: connections}). "
            f"Received: trajectory={received!r}."
        ) from error
    if not trajectory:
        raise ValueError(
            "A trajectory begins with the masks of the first step. Received "
            f"an empty one: trajectory={received!r}."
        )
    updates = [step for step, _ in trajectory]
    ordered = updates[:1] <= updates[1:2] or len(updates) == 1
    if not ordered or any(
        a >= b for a, b in zip(updates[1:], updates[2:], strict=False)
    ):
        raise ValueError(
            f"The steps of a trajectory must increase. Received: {updates}."
        )
    for _, counts in trajectory:
        for name, ones in counts.items():
            if name in layers and ones > math.prod(layers[name].shape):
                raise ValueError(
                    f"{name!r} has only {math.prod(layers[name].shape)}"
                    f" connections. Received: {ones}."
                )
    unknown = {n for _, counts in trajectory for n in counts} - set(layers)
    if unknown:
        raise ValueError(
            f"The trajectory has layers that the model lacks: {unknown}."
        )
    first = updates[0]
    if updates[-1] >= first + steps:
        raise ValueError(
            f"The trajectory goes beyond the run. Received: steps={steps} "
            f"from step {first} on, and an update at {updates[-1]}."
        )
    return trajectory
