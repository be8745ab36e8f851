"""How masks move: densities, churn, overlap, exploration, dead units."""

from collections.abc import Mapping

import numpy as np

from rigl_keras.diagnostics.table import ALL, COLUMNS
from rigl_keras.flops.counting import Count
from rigl_keras.masking.dead_units import Axes, dead_units, unit_count

__all__ = [
    "churn",
    "dead_units",
    "densities",
    "ever_active",
    "explored",
    "measure",
    "overlap",
]

Masks = Mapping[str, np.ndarray]


# Measures of masks.


def densities(masks: Masks) -> dict[str, float]:
    """Returns the density of each layer.

    Args:
        masks: `{layer: array of zeros and ones}`.

    Returns:
        `{layer: density}`, and under `"all"` the density of all layers
        together, weighted by their sizes.

    Raises:
        ValueError: A layer is named `"all"`.

    Example:

    >>> densities({"a": np.array([1, 0]), "b": np.array([1, 1, 0, 0, 0, 0])})
    {'a': 0.5, 'b': 0.3333333333333333, 'all': 0.375}
    """
    (masks,) = _alike(masks)
    sizes = {name: mask.size for name, mask in masks.items()}
    return _shares(_sizes(masks), sizes, of_nothing=0.0)


def churn(old: Masks, new: Masks) -> dict[str, float]:
    """Returns the share of each layer's connections that were replaced.

    It is |new and not old| / |old|. It exceeds 1 if density moves into a layer
    that more than doubles, and is 0 for a layer without connections.

    Args:
        old: Masks before an update.
        new: Masks after it, with the same layers and shapes.

    Returns:
        `{layer: share}`, and under `"all"` the share in all layers together.

    Raises:
        ValueError: The masks have different layers or shapes, or a layer is
            named `"all"`.

    Example:

    >>> churn({"a": np.array([1, 1, 0])}, {"a": np.array([0, 1, 1])})
    {'a': 0.5, 'all': 0.5}
    """
    old, new = _alike(old, new)
    joined = {name: new[name] & ~old[name] for name in old}
    return _shares(_sizes(joined), _sizes(old), of_nothing=0.0)


def overlap(initial: Masks, masks: Masks) -> dict[str, float]:
    """Returns the share of initial connections that are now active.

    It is |initial and now| / |initial|, and 1 for a layer without any.

    Args, Returns, Raises: as in `churn`.

    Example:

    >>> overlap({"a": np.array([1, 1, 0])}, {"a": np.array([0, 1, 1])})
    {'a': 0.5, 'all': 0.5}
    """
    initial, masks = _alike(initial, masks)
    stayed = {name: initial[name] & masks[name] for name in initial}
    return _shares(_sizes(stayed), _sizes(initial), of_nothing=1.0)


def explored(*history: Masks) -> dict[str, np.ndarray]:
    """Returns the connections that at least one of several masks has.

    Args:
        history: At least one dict of masks, with the same layers and shapes.

    Returns:
        `{layer: bool array}`. It is itself a mask, and more masks can be joined
        to it later.
    """
    alike = _alike(*history)
    return {
        name: np.logical_or.reduce([masks[name] for masks in alike])
        for name in alike[0]
    }


def ever_active(*history: Masks) -> dict[str, float]:
    """Returns the share of connections that were ever active.

    It is R_s, the in-time over-parameterisation rate: connections explored so
    far over connections of the dense model. Liu et al., 2021, Do we actually
    need dense over-parameterization?, arXiv:2102.02887, section 2.

    Args, Raises: as in `explored`, and a layer may not be named `"all"`.

    Returns:
        `{layer: share}`, and under `"all"` the share in all layers together.

    Example:

    >>> ever_active({"a": np.array([1, 0, 0])}, {"a": np.array([0, 1, 0])})
    {'a': 0.6666666666666666, 'all': 0.6666666666666666}
    """
    return densities(explored(*history))


def measure(
    step: int,
    masks: Masks,
    *,
    before: Masks,
    initial: Masks,
    ever: Masks,
    cost: Count | None = None,
    axes: Mapping[str, tuple[Axes, Axes]] | None = None,
) -> list[dict]:
    """Returns the rows of a table for one update: each layer, and all.

    Args:
        step: The optimizer step of the update.
        masks: The masks after it.
        before: The masks before it.
        initial: The masks at the start.
        ever: The connections that were ever active, these masks included.
        cost: The `flops.count` of the model. None: no FLOPs.
        axes: `{layer: (input axes, output axes)}` of kernels whose last two
            axes are not their inputs and outputs.

    Returns:
        Dicts with the keys `COLUMNS`. The last is for the layer `"all"`: its
        FLOPs are those of the whole model, its other values those of all masked
        layers together. Unknown values are None.

    Raises:
        ValueError: The masks have different layers or shapes, or a layer is
            named `"all"`.
    """
    masks, before = _alike(masks, before)
    density = densities(masks)
    columns = {
        "density": density,
        "inference_flops": _flops(density, cost),
        "ever_active": densities(ever),
        "overlap": overlap(initial, masks),
        "churn": churn(before, masks),
        "grown": {
            name: int(np.count_nonzero(masks[name] & ~before[name]))
            for name in masks
        },
    }
    units = {"no_incoming": {}, "outputs": {}, "no_outgoing": {}, "inputs": {}}
    for name, mask in masks.items():
        inputs, outputs = (axes or {}).get(name, (-2, -1))
        dead = dead_units(mask, input_axes=inputs, output_axes=outputs)
        units["no_incoming"][name], units["no_outgoing"][name] = dead
        units["outputs"][name] = unit_count(mask.shape, outputs)
        units["inputs"][name] = unit_count(mask.shape, inputs)
    for values in (columns["grown"], *units.values()):
        values[ALL] = sum(values.values())
    columns |= units
    empty = dict.fromkeys(COLUMNS)
    return [
        empty
        | {"step": step, "layer": name}
        | {key: values[name] for key, values in columns.items()}
        for name in [*masks, ALL]
    ]


# Masks.


def _alike(*tables):
    """Returns dicts of masks as bools, if they have the same layers."""
    arrays = [
        {name: _as_bool(mask) for name, mask in table.items()}
        for table in tables
    ]
    shapes = [{n: mask.shape for n, mask in table.items()} for table in arrays]
    for other in shapes[1:]:
        if other != shapes[0]:
            raise ValueError(
                "Masks are compared layer by layer and must have the same "
                f"layers and shapes. Received: {shapes[0]} and {other}."
            )
    if ALL in shapes[0]:
        raise ValueError(
            f"{ALL!r} stands for all layers together, but a layer has that "
            "name: rename the layer."
        )
    return arrays


def _as_bool(mask):
    mask = np.asarray(mask)
    return mask if mask.dtype == bool else mask > 0


def _sizes(masks):
    return {name: int(np.count_nonzero(mask)) for name, mask in masks.items()}


def _shares(parts, wholes, *, of_nothing):
    parts = {**parts, ALL: sum(parts.values())}
    wholes = {**wholes, ALL: sum(wholes.values())}
    return {
        name: part / wholes[name] if wholes[name] else of_nothing
        for name, part in parts.items()
    }


def _flops(by_layer, cost):
    """Returns the forward cost of each layer, and of the whole model."""
    if cost is None:
        return dict.fromkeys(by_layer)
    now = {
        layer.name: layer.flops_at(by_layer.get(layer.name, layer.density))
        for layer in cost.layers
    }
    return {name: now.get(name) for name in by_layer} | {ALL: sum(now.values())}
