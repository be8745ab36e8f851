"""How sparse kernels are stored: their values, and where these belong.

A kernel of which few entries are not zero is stored as those entries and
either one bit for each entry of the kernel, or one byte for each entry that
is stored, whichever takes less.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

__all__ = [
    "ENCODINGS",
    "SparseKernels",
    "cheapest_encoding",
    "decode",
    "encode",
    "encoded_bytes",
]

ENCODINGS = ("bitmask", "gaps")
_LARGEST_GAP = 255  # what a byte holds


def encode(
    kernels: Sequence[np.ndarray], encoding: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of some kernels that are not zero, and where they are.

    The kernels stand one after the other, each in row-major order, as one
    vector x of N entries, of which those at p_1 < ... < p_n are not zero.

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
    # A value comes after its bridges.
    at = np.arange(len(gaps)) + np.cumsum(bridges)
    values = np.zeros(len(gaps) + bridges.sum(), flat.dtype)
    values[at] = flat[kept]
    steps = np.full(len(values), _LARGEST_GAP, np.uint8)
    steps[at] = gaps - _LARGEST_GAP * bridges
    return values, steps


def decode(
    values: tf.Tensor,
    positions: tf.Tensor,
    encoding: str,
    shapes: Sequence[tuple[int, ...]],
) -> list[tf.Tensor]:
    """Returns the kernels that `encode` was given.

    Args:
        values: Vector of the kernels' dtype.
        positions: Vector of uint8.
        encoding: One of `ENCODINGS`.
        shapes: Shapes of the kernels.

    Returns:
        A dense tensor for each shape.
    """
    if encoding == "bitmask":
        shifts = tf.constant([7, 6, 5, 4, 3, 2, 1, 0], tf.uint8)
        bits = tf.bitwise.right_shift(positions[:, tf.newaxis], shifts) & 1
        kept = tf.where(tf.reshape(bits, [-1]) > 0)
    else:
        kept = tf.cumsum(tf.cast(positions, tf.int64))[:, tf.newaxis]
    sizes = [math.prod(shape) for shape in shapes]
    flat = tf.scatter_nd(kept, values, tf.constant([sum(sizes)], tf.int64))
    return [
        tf.reshape(part, shape)
        for part, shape in zip(tf.split(flat, sizes), shapes, strict=True)
    ]


def encoded_bytes(kernel: np.ndarray) -> dict[str, int]:
    """Returns how many bytes each way to store a kernel takes.

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
    """Returns what takes least: one of `ENCODINGS`, or `"dense"`."""
    sizes = encoded_bytes(kernel)
    return min(sizes, key=lambda encoding: sizes[encoding])


def _bridges(gaps):
    """Returns how many values of 0 stand before each value."""
    return np.maximum(gaps - 1, 0) // _LARGEST_GAP


class SparseKernels(tf.saved_model.experimental.TrackableResource):
    """Kernels that are sparse in a SavedModel, and dense once it is loaded.

    On disk they are values and positions, in few variables for all of them,
    and beside these a variable for each kernel, which is empty. Plain
    TensorFlow, in a session as well, runs `_initialize` when it has read all
    variables: it makes the dense kernels and puts them into the empty ones. A
    call then reads variables as in any other model.

    It is a resource for the sake of that function; there is nothing else to
    it.

    Args:
        kernels: Arrays of float dtypes, each cheaper encoded than dense.

    Attributes:
        variables: The variables that are saved. The owner must track them.
    """

    def __init__(self, kernels: Sequence[np.ndarray]):
        super().__init__()
        self._shapes = [kernel.shape for kernel in kernels]
        self._dense = [
            tf.Variable(
                # Empty, until its first axis gets its length.
                tf.zeros((0, *kernel.shape[1:]), kernel.dtype),
                shape=(None, *kernel.shape[1:]),
                trainable=False,
                name="kernel",
            )
            for kernel in kernels
        ]
        members = {}
        for i, kernel in enumerate(kernels):
            key = str(kernel.dtype), cheapest_encoding(kernel)
            members.setdefault(key, []).append(i)
        # What is of one type and encoding is one pair of variables.
        self._groups = [
            (
                encoding,
                indices,
                [
                    tf.Variable(tf.constant(array), trainable=False, name=name)
                    for name, array in zip(
                        ("values", "positions"),
                        encode([kernels[i] for i in indices], encoding),
                        strict=True,
                    )
                ],
            )
            for (_, encoding), indices in members.items()
        ]
        stored = [v for _, _, pair in self._groups for v in pair]
        self.variables = [*stored, *self._dense]

    def _create_resource(self):
        return tf.raw_ops.VarHandleOp(dtype=tf.bool, shape=())

    def _initialize(self):
        for encoding, indices, (values, positions) in self._groups:
            kernels = decode(
                values.read_value(),
                positions.read_value(),
                encoding,
                [self._shapes[i] for i in indices],
            )
            for i, kernel in zip(indices, kernels, strict=True):
                self._dense[i].assign(kernel)

    def read(self) -> list[tf.Tensor]:
        """Returns the dense kernels, in a function that is saved."""
        return [
            tf.ensure_shape(variable.read_value(), shape)
            for variable, shape in zip(self._dense, self._shapes, strict=True)
        ]
