"""Random bits that are the same on every device, and under XLA."""

from typing import Any

import tensorflow as tf

__all__ = ["random_bits"]

# No bounds: TensorFlow accepts that, its stubs do not. A named generator draws
# the same bits everywhere.
_EVERY_INTEGER: dict[str, Any] = {
    "minval": None,
    "maxval": None,
    "alg": "philox",
}


def random_bits(shape: Any, seed: Any, *, dtype: tf.DType) -> tf.Tensor:
    """Returns integers whose bits are all random.

    Args:
        shape: Shape of the tensor.
        seed: Two integers, or a tensor of them. Equal seeds draw equal bits.
        dtype: `tf.int32` or `tf.uint32`.

    Returns:
        Tensor of that shape and type.
    """
    return tf.random.stateless_uniform(
        shape, seed, dtype=dtype, **_EVERY_INTEGER
    )
