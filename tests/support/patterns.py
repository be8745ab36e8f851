"""Patterns for tests, and slow but simple implementations of them."""

import itertools
import math

import numpy as np

from rigl_keras.patterns import NM, Blocks, Element, FanIn, Kernel

PATTERNS = {
    "element": Element(),
    "kernel": Kernel(),
    "2:4": NM(2, 4),
    "1:2": NM(1, 2),
    "fan_in": FanIn(),
    "4x3": Blocks(4, 3),
}


def group_counts(pattern, axes, mask):
    """Returns the number of units that each group keeps; checks whole units.

    It visits all entries, and uses no array of the library.
    """
    units, groups = {}, {}
    for at in itertools.product(*map(range, axes.shape)):
        i, o = (
            int(np.ravel_multi_index(
                [at[a] for a in of], [axes.shape[a] for a in of]
            ))
            for of in (axes.inputs, axes.outputs)
        )  # fmt: skip
        position = tuple(
            at[a]
            for a in range(len(at))
            if a not in axes.inputs and a not in axes.outputs
        )
        unit, group = at, 0
        if isinstance(pattern, Kernel) and axes.convolved:
            unit = at[-2:]
        elif isinstance(pattern, Blocks):
            unit = position, i // pattern.rows, o // pattern.columns
        elif isinstance(pattern, NM):
            group = position, i // pattern.m, o
        elif isinstance(pattern, FanIn):
            group = o
        kept = bool(mask[at])
        assert units.setdefault(unit, kept) == kept
        groups.setdefault(group, set())
        if kept:
            groups[group].add(unit)
    return [len(kept) for kept in groups.values()]


def brute_force(layout, mask, drops, grows, fraction):
    """Returns the mask of units after an update, by sorting."""
    flat = mask.ravel().copy()
    where = layout.grouped(np.arange(flat.size).reshape(mask.shape))
    before = [int(flat[group].sum()) for group in where]
    drops, grows = np.ravel(drops), np.ravel(grows)
    active = sorted(np.flatnonzero(flat), key=lambda i: (drops[i], i))
    flat[active[: math.floor(len(active) * fraction)]] = False
    for group, count in zip(where, before, strict=True):
        free = [i for i in sorted(group) if not flat[i]]
        missing = count - int(flat[group].sum())
        flat[sorted(free, key=lambda i: (-grows[i], i))[:missing]] = True
    return flat.reshape(mask.shape)
