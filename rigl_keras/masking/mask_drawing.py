"""Draws the masks of all chosen kernels."""

import math
import zlib
from collections.abc import Mapping

import numpy as np

from rigl_keras.distributions import Budget
from rigl_keras.masking.drawing import draw_mask
from rigl_keras.masking.layer_kernels import Kernel
from rigl_keras.masking.selection import granularity_of

__all__ = ["draw_masks", "drawing_key", "fan_in_scale", "unit_sizes"]


def fan_in_scale(kernel: Kernel, mask: np.ndarray) -> np.ndarray:
    """Returns sqrt(n / m) for each output unit with m of n connections."""
    units = tuple(
        axis for axis in range(mask.ndim) if axis not in kernel.output_axes
    )
    kept = mask.sum(axis=units, keepdims=True)
    connections = math.prod(mask.shape[axis] for axis in units)
    return np.sqrt(connections / np.maximum(kept, 1)).astype(np.float32)


def unit_sizes(
    chosen: Mapping[str, Kernel], granularity: str
) -> dict[str, int] | None:
    """Returns how many weights of each kernel a mask keeps or removes as one.

    None where these are single weights.
    """
    if granularity == "element":
        return None
    return {
        name: math.prod(kernel.variable.shape[:-2])
        if granularity_of(kernel, granularity) == "kernel"
        else 1
        for name, kernel in chosen.items()
    }


def draw_masks(
    budgets: Mapping[str, Budget],
    chosen: Mapping[str, Kernel],
    granularity: str,
    seed: int,
    *,
    sampling: str,
) -> dict[str, np.ndarray]:
    """Returns `{name: bool array}`."""
    masks = {}
    for name, (density, count) in budgets.items():
        shape = tuple(chosen[name].variable.shape)
        key = drawing_key(name, chosen[name], seed)
        whole = granularity_of(chosen[name], granularity)
        if sampling == "bernoulli":
            units = shape[-2:] if whole == "kernel" else shape
            mask = np.random.default_rng(key).random(units) < density
            masks[name] = np.broadcast_to(mask, shape).copy()
        else:
            masks[name] = draw_mask(shape, count, key, granularity=whole)
    return masks


def drawing_key(name: str, kernel: Kernel, seed: int) -> int:
    """Returns the seed of the mask of one kernel."""
    # Not Keras's path of the variable: it begins with the name of the model,
    # which may be a counter.
    layer = kernel.layer.name
    if kernel.path == "kernel":
        path = f"{layer}/kernel{name.removeprefix(layer)}"
    else:
        path = f"{layer}/{name}"
    return zlib.crc32(f"{seed}/{path}".encode())
