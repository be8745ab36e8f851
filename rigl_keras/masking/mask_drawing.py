"""Draws the masks of all chosen kernels."""

import math
import zlib
from collections.abc import Mapping

import numpy as np

from rigl_keras.distributions import Budget
from rigl_keras.layouts import Layout
from rigl_keras.masking.drawing import draw_mask
from rigl_keras.masking.layer_kernels import Kernel

__all__ = ["draw_masks", "drawing_key", "fan_in_scale"]


def fan_in_scale(kernel: Kernel, mask: np.ndarray) -> np.ndarray:
    """Returns sqrt(n / m) for each output unit with m of n connections."""
    units = tuple(
        axis for axis in range(mask.ndim) if axis not in kernel.output_axes
    )
    kept = mask.sum(axis=units, keepdims=True)
    connections = math.prod(mask.shape[axis] for axis in units)
    return np.sqrt(connections / np.maximum(kept, 1)).astype(np.float32)


def draw_masks(
    budgets: Mapping[str, Budget],
    chosen: Mapping[str, Kernel],
    layouts: Mapping[str, Layout],
    seed: int,
    *,
    sampling: str,
) -> dict[str, np.ndarray]:
    """Returns `{name: bool array}`.

    Args:
        budgets: `{name: budget of a kernel}`.
        chosen: `{name: kernel}`.
        layouts: `{name: layout of a kernel}`.
        seed: Seed of all masks.
        sampling: As in `conventions.Conventions`.

    Raises:
        ValueError: Units are drawn one by one, but groups keep a fixed number.
    """
    masks = {}
    for name, (density, count) in budgets.items():
        layout = layouts[name]
        key = drawing_key(name, chosen[name], seed)
        if sampling == "exact":
            masks[name] = draw_mask(layout, count, key)
        elif layout.is_apart:
            raise ValueError(
                "sampling='bernoulli' draws each weight independently, but the "
                f"mask of {name!r} {layout.reason}. Pass conventions with "
                "sampling='exact', or granularity='element'."
            )
        else:
            units = np.random.default_rng(key).random(layout.unit_shape)
            masks[name] = layout.by_element(units < density).copy()
    return masks


def drawing_key(name: str, kernel: Kernel, seed: int) -> int:
    """Returns the seed of the mask of one kernel."""
    # Keras's path of the variable begins with the name of the model, which may
    # hold a counter: it is not used.
    layer = kernel.layer.name
    if kernel.path == "kernel":
        path = f"{layer}/kernel{name.removeprefix(layer)}"
    else:
        path = f"{layer}/{name}"
    return zlib.crc32(f"{seed}/{path}".encode())
