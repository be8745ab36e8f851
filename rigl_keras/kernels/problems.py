"""What masked layers compute, both ways, for timing."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from rigl_keras.kernels import lane_operations
from rigl_keras.kernels.lane_operations import Lanes
from rigl_keras.kernels.matrix_operations import sparse_dense
from rigl_keras.kernels.operations import scratch_bytes, sparse_conv2d
from rigl_keras.kernels.recurrent_operations import sparse_gru, sparse_lstm

__all__ = ["AnyProblem", "Problem", "Recurrence"]

_MOST_BYTES = 1 << 26  # memory of a thread, for a product of matrices

Sides = dict[str, Callable[[], object]]


class AnyProblem(Protocol):
    """What `choice.choose` needs to know of a problem."""

    @property
    def batch(self) -> int:
        """Number of images in a batch, or of rows."""
        ...

    @property
    def products(self) -> int:
        """Number of products in a dense forward pass."""
        ...

    @property
    def numbers(self) -> int:
        """Largest number of entries of an image or a row."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """A description, in words without spaces."""
        ...

    def of_batch(self, batch: int) -> "AnyProblem":
        """Returns the same problem with another batch size."""
        ...

    def taken(self, in_lanes: bool) -> tuple[int, int, int] | None:
        """Returns the result of `scratch_bytes`, or None if nothing fits."""
        ...

    def sides(self, density: float, *, backward: bool, in_lanes: bool) -> Sides:
        """Returns functions that compute it, `"dense"` and `"sparse"`."""
        ...


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution, or a product of matrices as one of single pixels.

    Attributes:
        kernel: Rows, columns, channels, filters.
        images: Batch, rows, columns.
        strides, dilations: For rows and columns.
        padding: `"SAME"` or `"VALID"`.
        matrix: Whether it is a product of matrices: with `images[0]` rows, and
            the kernel's channels and filters.
        groups: Number of groups. The kernel has the channels of one group.
    """

    kernel: tuple[int, int, int, int]
    images: tuple[int, int, int]
    strides: tuple[int, int] = (1, 1)
    padding: str = "SAME"
    dilations: tuple[int, int] = (1, 1)
    matrix: bool = False
    groups: int = 1

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return self.kernel[2] * self.groups

    @property
    def batch(self) -> int:
        return self.images[0]

    @property
    def products(self) -> int:
        lengths = self.images[1:]
        if self.padding == "VALID":
            sizes = zip(lengths, self.kernel[:2], self.dilations, strict=True)
            lengths = [max(0, n - (k - 1) * d) for n, k, d in sizes]
        rows, columns = (
            -(-length // stride)
            for length, stride in zip(lengths, self.strides, strict=True)
        )
        return math.prod(self.kernel) * self.images[0] * rows * columns

    @property
    def numbers(self) -> int:
        return math.prod(self.images[1:]) * max(self.channels, self.kernel[3])

    @property
    def words(self) -> tuple[str, ...]:
        return (
            "x".join(map(str, self.kernel)),
            "x".join(map(str, self.images)),
            "x".join(map(str, self.strides)),
            "matrix" if self.matrix else self.padding,
            "x".join(map(str, self.dilations)),
            *([f"{self.groups}_groups"] if self.groups > 1 else []),
        )

    def of_batch(self, batch: int) -> "Problem":
        return dataclasses.replace(self, images=(batch, *self.images[1:]))

    def taken(self, in_lanes: bool) -> tuple[int, int, int] | None:
        if self.matrix:
            # A panel of sixteen rows, and its results.
            least = 64 * sum(self.kernel[2:])
            return least, least, _MOST_BYTES
        try:
            return scratch_bytes(
                (*self.images, self.channels),
                self.kernel,
                strides=self.strides,
                padding=self.padding,
                dilations=self.dilations,
                in_lanes=in_lanes,
            )
        except tf.errors.InvalidArgumentError:
            return None

    def sides(self, density: float, *, backward: bool, in_lanes: bool) -> Sides:
        draw = np.random.default_rng(0)
        images, shape = self.images, self.kernel
        if self.matrix:
            images, shape = images[:1], shape[2:]
        images = _normal(draw, *images, self.channels)
        if in_lanes:
            images, count = lane_operations.to_lanes(images)
        kernel, mask = _normal(draw, *shape), _mask(draw, shape, density)

        def dense(images, kernel):
            if self.matrix:
                return tf.matmul(images, tf.where(mask, kernel, 0.0))
            if in_lanes:
                images = lane_operations.from_lanes(Lanes(images, count))
            # Keras has groups, which TensorFlow lacks on a CPU.
            convolve: Any = keras.ops.conv
            outputs = convolve(
                images,
                tf.where(mask, kernel, 0.0),
                strides=self.strides,
                padding=self.padding.lower(),
                data_format="channels_last",
                dilation_rate=self.dilations,
            )
            return (
                lane_operations.to_lanes(outputs).values
                if in_lanes
                else outputs
            )

        def sparse(images, kernel):
            if self.matrix:
                return sparse_dense(images, kernel, mask)
            if in_lanes:
                return lane_operations.conv2d(
                    images,
                    kernel,
                    mask,
                    strides=self.strides,
                    padding=self.padding,
                )
            return sparse_conv2d(
                images,
                kernel,
                mask,
                strides=self.strides,
                padding=self.padding,
                dilations=self.dilations,
            )

        upstream = tf.ones_like(sparse(images, kernel))
        return {
            "dense": _passes(dense, [images, kernel], upstream, backward),
            "sparse": _passes(sparse, [images, kernel], upstream, backward),
        }


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """All steps of an LSTM or a GRU.

    Attributes:
        kind: `"lstm"` or `"gru"`.
        sequences: Batch, steps, inputs.
        units: Number of units of its states.
        projected: Whether the kernel of the inputs is dense, so that only the
            recurrent one is masked.
        returns: Whether it returns the outputs of all steps, or of the last.
        unroll: Whether the dense layer has no loop.
    """

    kind: str
    sequences: tuple[int, int, int]
    units: int
    projected: bool = False
    returns: bool = False
    unroll: bool = False

    @property
    def batch(self) -> int:
        return self.sequences[0]

    @property
    def _gates(self) -> int:
        return (4 if self.kind == "lstm" else 3) * self.units

    @property
    def products(self) -> int:
        batch, steps, inputs = self.sequences
        return batch * steps * (inputs + self.units) * self._gates

    @property
    def numbers(self) -> int:
        _, steps, inputs = self.sequences
        return steps * max(inputs, self._gates)

    @property
    def words(self) -> tuple[str, ...]:
        options = ("projected", "returns", "unroll")
        return (
            self.kind,
            "x".join(map(str, self.sequences)),
            str(self.units),
            *(name for name in options if getattr(self, name)),
        )

    def of_batch(self, batch: int) -> "Recurrence":
        return dataclasses.replace(self, sequences=(batch, *self.sequences[1:]))

    def taken(self, in_lanes: bool) -> tuple[int, int, int]:
        # A panel of sixteen rows, and its results.
        least = 64 * (2 * self.sequences[2] + 5 * self.units + 2 * self._gates)
        return least, least, _MOST_BYTES

    def sides(self, density: float, *, backward: bool, in_lanes: bool) -> Sides:
        draw = np.random.default_rng(0)
        batch, _, inputs = self.sequences
        x = _normal(draw, *self.sequences)
        # As large as typical numbers in a network.
        kernel = _normal(draw, inputs, self._gates) / math.sqrt(inputs)
        recurrent = _normal(draw, self.units, self._gates)
        recurrent /= math.sqrt(self.units)
        mask = _mask(draw, kernel.shape, 1.0 if self.projected else density)
        recurrent_mask = _mask(draw, recurrent.shape, density)
        layer = self._layer()
        state = tf.zeros((batch, self.units))
        none = tf.zeros([0, self._gates])

        def dense(x, kernel, recurrent):
            weights = [
                tf.where(mask, kernel, 0.0),
                tf.where(recurrent_mask, recurrent, 0.0),
                layer.cell.bias.value,
            ]
            # Other arguments, such as the state of its random numbers.
            others = [v.value for v in layer.non_trainable_variables]
            outputs, _ = layer.stateless_call(weights, others, x)
            return outputs

        def sparse(x, kernel, recurrent):
            of_inputs = kernel, mask
            if self.projected:
                x = tf.tensordot(x, kernel, 1)
                of_inputs = none, tf.cast(none, tf.bool)
            lstm = self.kind == "lstm"
            operation: Any = sparse_lstm if lstm else sparse_gru
            outputs, *_ = operation(
                x,
                *([state, state] if lstm else [state]),
                *of_inputs,
                recurrent,
                recurrent_mask,
                layer.cell.bias.value,
                sequences=self.returns,
            )
            return outputs if self.returns else outputs[:, 0]

        tensors = [x, kernel, recurrent]
        upstream = tf.ones_like(sparse(*tensors))
        return {
            "dense": _passes(dense, tensors, upstream, backward),
            "sparse": _passes(sparse, tensors, upstream, backward),
        }

    def _layer(self):
        """Returns the Keras layer, without using others' random numbers."""
        kind: Any = (
            keras.layers.LSTM if self.kind == "lstm" else keras.layers.GRU
        )
        layer = kind(
            self.units,
            return_sequences=self.returns,
            unroll=self.unroll,
            kernel_initializer="zeros",
            recurrent_initializer="zeros",
            dtype="float32",
            seed=0,
            name="timed",
        )
        layer.build(self.sequences)
        return layer


def _normal(draw, *shape):
    return tf.constant(draw.standard_normal(shape, np.float32))


def _mask(draw, shape, density):
    size = math.prod(shape)
    kept = draw.permutation(size) < density * size
    return tf.constant(kept.reshape(shape))


def _passes(product, tensors, upstream, backward):
    """Returns a function that computes a product and its gradients."""

    @tf.function(autograph=False)
    def both(upstream, *tensors):
        if not backward:
            return product(*tensors)
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            outputs = product(*tensors)
        return tape.gradient(
            outputs, tensors, output_gradients=upstream
        ), outputs

    # Called as it is, one function after another would make TensorFlow warn
    # of frequent retracing.
    traced = both.get_concrete_function(upstream, *tensors)
    return functools.partial(traced, upstream, *tensors)
