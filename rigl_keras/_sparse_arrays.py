"""How sparse arrays are stored: their values and positions.

An array with few nonzero entries is stored as those entries and either one bit
for each entry of the array or one byte for each stored entry, whichever takes
less.
"""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["ENCODINGS", "cheapest_encoding", "encode", "encoded_bytes"]

ENCODINGS = ("bitmask", "gaps")
_LARGEST_GAP = 255  # what a byte holds


def encode(
    kernels: Sequence[np.ndarray], encoding: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nonzero values of some kernels, and their positions.

    The kernels stand one after the other, each in row-major order, as one
    vector x of N entries. The entries at p_1 < ... < p_n are not zero.

        bitmask: ceil(N / 8) bytes, the first entry the highest bit.
        gaps:    n bytes p_i - p_(i-1), with p_0 = 0. A gap above 255 is
                 bridged by values of 0, each with a gap of 255 (relative
                 indices: Han et al., 2016, Deep compression,
                 arXiv:1510.00149, section 2).

    Args:
        kernels: Arrays of one float dtype.
        encoding: One of `ENCODINGS`.

    Returns:
        `(values, positions)`: a vector of the kernels' dtype and one of uint8.

    Example:

    >>> encode([np.array([[0, 0, 7.0], [0, 0, 8.0]])], "gaps")
    (array([7., 8.]), array([2, 3], dtype=uint8))
    """
    flat = np.concatenate([kernel.ravel() for kernel in kernels])
    kept = flat != 0
    if encoding == "bitmask":
        return flat[kept], np.packbits(kept)
    positions = np.flatnonzero(kept)
    gaps = np.diff(positions, prepend=0)
    bridges = _bridges(gaps)
    # Each value follows its bridges.
    at = np.arange(len(gaps)) + np.cumsum(bridges)
    values = np.zeros(len(gaps) + bridges.sum(), flat.dtype)
    values[at] = flat[kept]
    steps = np.full(len(values), _LARGEST_GAP, np.uint8)
    steps[at] = gaps - _LARGEST_GAP * bridges
    return values, steps


def encoded_bytes(kernel: np.ndarray) -> dict[str, int]:
    """Returns how many bytes a kernel takes in each encoding.

    Args:
        kernel: Float array.

    Returns:
        `{"dense": bytes, "bitmask": bytes, "gaps": bytes}`.
    """
    positions = np.flatnonzero(kernel.ravel() != 0)
    bridges = int(_bridges(np.diff(positions, prepend=0)).sum())
    ones, width = len(positions), kernel.dtype.itemsize
    return {
        "dense": width * kernel.size,
        "bitmask": width * ones + math.ceil(kernel.size / 8),
        "gaps": (width + 1) * (ones + bridges),
    }


def cheapest_encoding(kernel: np.ndarray) -> str:
    """Returns the smallest encoding: one of `ENCODINGS`, or `"dense"`."""
    sizes = encoded_bytes(kernel)
    return min(sizes, key=lambda encoding: sizes[encoding])


def _bridges(gaps):
    """Returns how many values of 0 stand before each value."""
    return np.maximum(gaps - 1, 0) // _LARGEST_GAP
