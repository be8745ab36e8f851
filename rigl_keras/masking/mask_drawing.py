"""Draws the masks of all chosen kernels."""

import math
import warnings
import zlib

import numpy as np

from rigl_keras import distributions
from rigl_keras.masking.drawing import draw_mask
from rigl_keras.masking.selection import granularity_of

__all__ = ["draw_masks", "drawing_key", "fan_in_scale"]


def fan_in_scale(kernel, mask):
    """Returns sqrt(n / m) for each output unit with m of n connections."""
    units = tuple(
        axis for axis in range(mask.ndim) if axis not in kernel.output_axes
    )
    kept = mask.sum(axis=units, keepdims=True)
    connections = math.prod(mask.shape[axis] for axis in units)
    return np.sqrt(connections / np.maximum(kept, 1)).astype(np.float32)


def draw_masks(
    shapes, densities, density, chosen, granularity, seed, conventions
):
    """Returns `{name: float32 array of zeros and ones}`."""
    # A unit is what the mask keeps or removes as one.
    units = {
        name: shape[-2:]
        if granularity_of(chosen[name], granularity) == "kernel"
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
    densities = {name: densities[name] for name in sizes}
    counts = distributions.layer_counts(sizes, densities, total)
    masks = {}
    for name, unit in units.items():
        key, shape = drawing_key(name, chosen[name], seed), shapes[name]
        if bernoulli:
            mask = np.random.default_rng(key).random(unit) < densities[name]
            masks[name] = np.broadcast_to(mask, shape).astype(np.float32)
        else:
            masks[name] = draw_mask(
                shape,
                counts[name] * math.prod(shape) // sizes[name],
                key,
                granularity=granularity_of(chosen[name], granularity),
            )
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        warnings.warn(
            f"At density={density} no connection is left in "
            f"{', '.join(empty)}: nothing passes through. Raise density, or "
            "give these layers one in densities.",
            stacklevel=3,
        )
    return masks


def drawing_key(name, kernel, seed):
    # Unique names within the model, and paths of attributes: what Keras calls
    # a path begins with the model's name, which it may have made by counting.
    layer = kernel.layer.name
    if kernel.path == "kernel":
        path = f"{layer}/kernel{name.removeprefix(layer)}"
    else:
        path = f"{layer}/{name}"
    return zlib.crc32(f"{seed}/{path}".encode())
