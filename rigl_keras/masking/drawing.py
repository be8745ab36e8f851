"""Masks with a given number of ones, drawn from a key."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["draw_mask"]


def draw_mask(
    shape: Sequence[int], ones: int, key: int, *, granularity: str = "element"
) -> np.ndarray:
    """Returns a random mask with exactly so many ones.

    The same arguments give the same mask, on every machine.

    Args:
        shape: Of the kernel.
        ones: How many entries are 1, at least 0. Where whole kernels are kept
            or removed, the nearest number that these can have.
        key: Seed, at least 0.
        granularity: `"element"`, or `"kernel"`: all entries between an input
            and an output channel, which are the last two axes, are equal.

    Returns:
        Bool array.

    Example:

    >>> draw_mask((2, 3), 4, key=7).sum()
    np.int64(4)
    """
    shape = tuple(shape)
    # A unit is what the mask keeps or removes as one.
    units = shape[-2:] if granularity == "kernel" else shape
    size = math.prod(units)
    count = round(ones * size / max(math.prod(shape), 1))
    mask = np.zeros(size, bool)
    mask[:count] = True
    mask = np.random.default_rng(key).permutation(mask).reshape(units)
    return np.broadcast_to(mask, shape).copy()
