"""A network as one operation of TensorFlow."""

import struct
from collections.abc import Sequence

import tensorflow as tf

from rigl_keras._checks import integer
from rigl_keras.kernels import library

__all__ = ["checksum_of", "run_network"]


def run_network(
    path: tf.Tensor | str,
    inputs: Sequence[tf.Tensor],
    *,
    checksum: int,
    shapes: Sequence[tf.TensorShape],
    threads: int = 0,
) -> list[tf.Tensor]:
    """Returns the outputs of a network.

    The operation reads the file when it first runs. All operations of a process
    that run one file share its weights. There are no gradients.

    Args:
        path: Path of the network's file, such as a `tf.saved_model.Asset`.
        inputs: Float32, in the order of the network's inputs.
        checksum: Checksum of the file (`checksum_of`). Others are refused.
        shapes: Shapes of the outputs, the batch first.
        threads: How many threads compute a call, at most 1024. 0: as many as
            TensorFlow uses within an operation.

    Raises:
        ValueError: `threads` is out of range.
        RuntimeError: There is no op library (`library.unavailable`).
        tf.errors.DataLossError: The file is a different one, or is damaged.
        tf.errors.InvalidArgumentError: Inputs do not fit the network.
    """
    threads = integer("threads", threads, at_least=0, at_most=1024)
    module = library.load()
    if module is None:
        raise RuntimeError(
            f"Sparse kernels are not available: {library.unavailable()}."
        )
    return list(
        module.rigl_keras_network(
            path=path,
            inputs=list(inputs),
            results=len(shapes),
            checksum=checksum,
            shapes=list(shapes),
            threads=threads,
        )
    )


def checksum_of(data: bytes) -> int:
    """Returns the checksum in the bytes of a network's file."""
    return struct.unpack_from("<I", data, 24)[0]
