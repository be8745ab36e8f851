"""How sparse kernels are stored: their values and positions.

A kernel with few nonzero entries is stored as those entries and either one bit
for each entry of the kernel or one byte for each stored entry, whichever takes
less.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from rigl_keras._sparse_arrays import (
    ENCODINGS,
    cheapest_encoding,
    encode,
    encoded_bytes,
)

__all__ = [
    "ENCODINGS",
    "SparseKernels",
    "cheapest_encoding",
    "decode",
    "encode",
    "encoded_bytes",
]


def decode(
    values: tf.Tensor,
    positions: tf.Tensor,
    encoding: str,
    shapes: Sequence[tuple[int, ...]],
) -> list[tf.Tensor]:
    """Returns kernels decoded from the result of `encode`.

    Args:
        values: Vector of the kernels' dtype.
        positions: Vector of uint8.
        encoding: One of `ENCODINGS`.
        shapes: Shapes of the kernels.

    Returns:
        A dense tensor for each shape.
    """
    if encoding == "bitmask":
        kept = tf.where(_bits(positions))
    else:
        kept = tf.cumsum(tf.cast(positions, tf.int64))[:, tf.newaxis]
    sizes = [math.prod(shape) for shape in shapes]
    flat = tf.scatter_nd(kept, values, tf.constant([sum(sizes)], tf.int64))
    return [
        tf.reshape(part, shape)
        for part, shape in zip(tf.split(flat, sizes), shapes, strict=True)
    ]


def _bits(packed):
    """Returns the bits of bytes as bools, the highest bit first."""
    shifts = tf.constant([7, 6, 5, 4, 3, 2, 1, 0], tf.uint8)
    bits = tf.bitwise.right_shift(packed[:, tf.newaxis], shifts) & 1
    return tf.reshape(bits, [-1]) > 0


class SparseKernels(tf.saved_model.experimental.TrackableResource):
    """Kernels that are sparse in a SavedModel, and dense once it is loaded.

    On disk they are values and positions, in a few variables for all kernels,
    and an empty variable for each kernel. After plain TensorFlow has read all
    variables, also in a session, it runs `_initialize`, which fills the empty
    ones with the dense kernels. A call then reads variables as in any other
    model.

    It is a resource only because resources have such a function.

    Args:
        kernels: Float arrays, each smaller encoded than dense.
        masks: Bool arrays. One that is true exactly where a kernel is not zero
            is not stored. Others take a bit for each entry.

    Attributes:
        variables: The saved variables. The owner must track them.
    """

    def __init__(
        self, kernels: Sequence[np.ndarray], masks: Sequence[np.ndarray] = ()
    ):
        super().__init__()
        arrays = [*kernels, *masks]
        self._shapes = [array.shape for array in arrays]
        self._dense = [
            tf.Variable(
                # Empty, until its first axis gets its length.
                tf.zeros((0, *array.shape[1:]), array.dtype),
                shape=(None, *array.shape[1:]),
                trainable=False,
                name="kernel",
            )
            for array in arrays
        ]
        members = {}
        for i, kernel in enumerate(kernels):
            key = str(kernel.dtype), cheapest_encoding(kernel)
            members.setdefault(key, []).append(i)
        # Each pair of type and encoding has two variables.
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
        # Of each mask: the kernel that it follows from, or its bits.
        self._masks = []
        for mask in masks:
            source = next(
                (i for i, k in enumerate(kernels) if _follows(mask, k)), None
            )
            bits = None
            if source is None:
                bits = tf.Variable(
                    tf.constant(np.packbits(mask)),
                    trainable=False,
                    name="mask",
                )
            self._masks.append((source, bits))
        stored = [v for _, _, pair in self._groups for v in pair]
        stored += [bits for _, bits in self._masks if bits is not None]
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
        first = len(self._dense) - len(self._masks)
        for i, (source, bits) in enumerate(self._masks, first):
            shape = self._shapes[i]
            if source is not None:
                mask = self._dense[source].read_value() != 0
            else:
                flat = _bits(bits.read_value())[: math.prod(shape)]
                mask = tf.reshape(flat, shape)
            self._dense[i].assign(mask)

    def read(self) -> list[tf.Tensor]:
        """Returns dense kernels and then masks, within a saved function."""
        return [
            tf.ensure_shape(variable.read_value(), shape)
            for variable, shape in zip(self._dense, self._shapes, strict=True)
        ]


def _follows(mask, kernel):
    return mask.shape == kernel.shape and np.array_equal(mask, kernel != 0)
