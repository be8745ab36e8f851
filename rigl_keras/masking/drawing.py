"""Masks with a given number of units, drawn from a key."""

import numpy as np

from rigl_keras.layouts import Layout

__all__ = ["draw_mask"]


def draw_mask(layout: Layout, count: int, key: int) -> np.ndarray:
    """Returns a random mask that keeps exactly `count` units of each group.

    The same arguments give the same mask, on every machine.

    Args:
        layout: The units and groups of the kernel.
        count: How many units each group keeps, from 0 to all of them.
        key: Seed, at least 0.

    Returns:
        Bool array of the kernel's shape.

    Example:

    >>> draw_mask(Element().layout((2, 3)), 4, key=7).sum()
    np.int64(4)
    """
    draw = np.random.default_rng(key)
    mask = np.zeros((layout.groups, layout.size), bool)
    mask[:, :count] = True
    if layout.groups == 1:
        mask = draw.permutation(mask[0])[np.newaxis]
    else:
        mask = draw.permuted(mask, axis=1)
    return layout.by_element(layout.ungrouped(mask)).copy()
