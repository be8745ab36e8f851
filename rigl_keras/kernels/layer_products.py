"""How a masked layer computes its product: dense, or by sparse kernels."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence

import keras
import tensorflow as tf

from rigl_keras import _checks, _keras
from rigl_keras.kernels import choice, lane_calls, library, operations
from rigl_keras.kernels.convolution_layers import (
    CONVOLUTIONS,
    convolution_outputs,
    convolution_problem,
    least_sizes,
    why_no_convolution,
)
from rigl_keras.kernels.matrix_layers import (
    SEPARABLE,
    matrix_of,
    matrix_outputs,
)
from rigl_keras.kernels.problems import AnyProblem, Problem
from rigl_keras.kernels.recurrent_layers import (
    RECURRENT,
    recurrence,
    why_not_recurrent,
)

__all__ = [
    "PRODUCTS",
    "ProductChoices",
    "USUAL_BATCH",
    "dense_products",
    "faster_product",
    "goes_in_lanes",
    "inference_kernel",
    "only_dense",
    "sparse_if_possible",
    "sparse_outputs",
    "takes_one_tensor",
    "why_dense",
]


PRODUCTS = ("auto", "dense", "sparse")
# The batch size that is timed if a layer accepts any.
USUAL_BATCH = 128
# The length of axes between the batch and the last, if they are free.
_USUAL_LENGTH = 64
# A product with fewer weights takes no time.
_LEAST_WEIGHTS = 1 << 14
_dense_products = contextvars.ContextVar("dense_products", default=False)


class ProductChoices:
    """The products that a layer uses, by the shapes of its inputs.

    A masked layer holds one. Unlike a dict, Keras and TensorFlow do not track
    what is in it.

    Args:
        layer: The layer without its mask.
        product: How it is multiplied. `"dense"`: by TensorFlow. `"sparse"`: by
            kernels that skip removed weights. `"auto"`: by the faster of both,
            timed.

    Raises:
        ValueError: `product` is none of these.
    """

    def __init__(self, layer: keras.layers.Layer, product: str):
        self._within: dict[int, ProductChoices] = {}
        self._masks: Sequence[keras.Variable] = ()
        self.product = product
        self._layer = layer
        # By shape and by lanes, which training uses and evaluation does not.
        self._chosen: dict[
            tuple[tuple[int | None, ...], bool], choice.Choice
        ] = {}

    @property
    def product(self) -> str:
        return self._product

    @product.setter
    def product(self, product: str) -> None:
        _checks.choice("product", product, PRODUCTS)
        self._product = product
        for inner in self._within.values():
            inner.product = product

    def within(self, layer: keras.layers.Layer) -> "ProductChoices":
        """Returns the separate choices of an inner layer."""
        if id(layer) not in self._within:
            self._within[id(layer)] = ProductChoices(layer, self.product)
        return self._within[id(layer)]

    @property
    def by_shape(self) -> dict[tuple[int | None, ...], choice.Choice]:
        """A copy of the last choices, by the shape of the inputs."""
        return {shape: found for (shape, _), found in self._chosen.items()}

    def chosen(self, layer: keras.layers.Layer) -> "ProductChoices":
        """Returns the choices of an inner layer, or of the layer itself."""
        return self._within.get(id(layer), self)

    def choose(
        self,
        shape: tf.TensorShape,
        masks: Sequence[keras.Variable],
        *,
        backward: bool = True,
        in_lanes: bool = False,
    ) -> choice.Choice:
        """Returns the product for inputs of a shape.

        Args:
            shape: Shape of the inputs; the batch may be None.
            masks: The masks of the layer's kernels, whose density decides.
            backward: Whether it is used in training, or only in inference. The
                choices that are kept are those of training.
            in_lanes: Whether the sparse product would be computed in lanes.
        """
        if self.product == "sparse":
            found = sparse_if_possible(
                self._layer, shape, backward=backward, in_lanes=in_lanes
            )
        else:
            with tf.init_scope():
                values = [_keras.stored_value(mask) for mask in masks]
                ones = sum(int(tf.math.count_nonzero(v)) for v in values)
                size = sum(math.prod(mask.shape) for mask in masks)
            density = ones / size if size else 0.0
            found = faster_product(
                self._layer,
                shape,
                density,
                backward=backward,
                in_lanes=in_lanes,
                projected=type(self._layer) in RECURRENT and len(masks) == 1,
            )
        if not backward:
            return found
        self._masks = masks
        key = (tuple(shape), in_lanes)
        self._chosen.pop(key, None)  # moves it to the end
        self._chosen[key] = found
        return found

    def changes(self) -> bool:
        """Returns whether another product is now faster for some inputs.

        It may be if the density has changed much. Then all are chosen again.
        """
        return any(
            [
                self.choose(
                    tf.TensorShape(shape),
                    self._masks,
                    in_lanes=in_lanes,
                ).sparse
                != earlier.sparse
                for (shape, in_lanes), earlier in [*self._chosen.items()]
            ]
            + [inner.changes() for inner in self._within.values()]
        )

    def forget(self) -> None:
        """Forgets the chosen products."""
        self._chosen.clear()
        for inner in self._within.values():
            inner.forget()


def takes_one_tensor(args: tuple, kwargs: Mapping[str, object]) -> bool:
    """Returns whether a layer is called on one dense float32 tensor.

    Only such calls have a sparse product.

    Args:
        args, kwargs: Arguments of the call.
    """
    # Keras passes `training` to dense layers, which do not use it.
    if len(args) != 1 or kwargs.keys() - {"training"}:
        return False
    # `tf.is_tensor` is also true for SparseTensors and RaggedTensors.
    return isinstance(args[0], tf.Tensor) and args[0].dtype == tf.float32


def why_dense(layer: keras.layers.Layer) -> str | None:
    """Returns why a layer has no sparse product, or None if it has one.

    Keras's `Conv1D`, `Conv2D` and `Conv2DTranspose` have one, and so do layers
    that multiply by a matrix (`matrix_layers.matrix_of`), `LSTM` and `GRU`.
    Subclasses may compute something else.

    Args:
        layer: A built layer with kernels.
    """
    kind = type(layer)
    if kind in RECURRENT:
        why = why_not_recurrent(layer)
        if why is not None:
            return why
    elif kind is keras.layers.EinsumDense and matrix_of(layer) is None:
        return f"{layer.equation!r} is not a product of rows"
    elif kind not in CONVOLUTIONS and matrix_of(layer) is None:
        return f"no sparse kernels for {kind.__name__}"
    dtypes = {layer.compute_dtype, layer.variable_dtype}
    if dtypes != {"float32"}:
        return f"sparse kernels are float32, not {layer.compute_dtype}"
    if getattr(layer, "lora_enabled", False) or layer.quantization_mode:
        return "quantised or with LoRA"
    # A recurrent layer still processes its outputs itself.
    if layer.activity_regularizer is not None and kind not in RECURRENT:
        return "its activity is regularised"
    if kind in (*CONVOLUTIONS, *SEPARABLE):
        why = why_no_convolution(layer)
        if why is not None:
            return why
    if tf.config.list_physical_devices("GPU"):
        return "sparse kernels are for CPUs, but there is a GPU"
    return None


def faster_product(
    layer: keras.layers.Layer,
    shape: tf.TensorShape,
    density: float,
    *,
    backward: bool = True,
    in_lanes: bool = False,
    projected: bool = False,
) -> choice.Choice:
    """Returns the faster product for a layer, timed once.

    Args:
        layer: A layer that has a sparse product.
        shape: Shape of its inputs. If the batch is free, 128 is timed.
        density: Density of its mask.
        backward: Whether it is used in training, or only in inference.
        in_lanes: Whether the sparse product is computed in lanes, and the dense
            one must convert its inputs and outputs.
        projected: Whether only the recurrent kernel of a recurrent layer is
            masked.
    """
    if _has_images(layer) and None in shape.as_list()[1:-1]:
        return choice.Choice(False, "images of any size")
    problem = _problem(layer, shape, projected=projected)
    return choice.choose(problem, density, backward=backward, in_lanes=in_lanes)


def sparse_if_possible(
    layer: keras.layers.Layer,
    shape: tf.TensorShape,
    *,
    backward: bool = True,
    in_lanes: bool = False,
) -> choice.Choice:
    """Returns the sparse product without timing, if a layer can use it.

    It cannot if there is no op library, or if the product takes too much memory
    (`choice.too_large`). If the size of images is free, the smallest that the
    layer accepts decides.

    Args:
        layer: A layer that has a sparse product.
        shape: Shape of its inputs. All axes except the last may be free.
        backward: Whether it is used in training, or only in inference.
        in_lanes: Whether it is computed in lanes.
    """
    if library.load() is None:
        return choice.Choice(False, library.unavailable() or "no op library")
    problem = _least_problem(layer, shape)
    why = choice.too_large(problem, backward=backward)
    if in_lanes and choice.too_large(problem, in_lanes=True) is None:
        why = None
    return choice.Choice(why is None, why or "as asked")


def _least_problem(layer, shape):
    """Returns the smallest problem of a layer if sizes are free."""
    least = [1] * (len(shape) - 2)
    if _has_images(layer):
        least = least_sizes(layer)
    batch, *sizes, channels = shape.as_list()
    sizes = [
        free if size is None else size
        for size, free in zip(sizes, least, strict=True)
    ]
    return _problem(layer, tf.TensorShape([batch, *sizes, channels]))


def sparse_outputs(
    layer: keras.layers.Layer,
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    mask: tf.Tensor,
    *,
    dense_gradient: bool,
) -> tf.Tensor:
    """Returns a layer's outputs, with its product by sparse kernels.

    Args:
        layer: A layer that has a sparse product.
        inputs: Its inputs.
        kernel, mask: The values of its kernel and its mask.
        dense_gradient: As in `kernels.sparse_conv2d`.
    """
    matrix = matrix_of(layer)
    if matrix is not None:
        product = matrix_outputs(
            layer, matrix, inputs, kernel, mask, dense_gradient=dense_gradient
        )
    elif goes_in_lanes(layer, inputs) and (
        choice.too_large(_least_problem(layer, inputs.shape), in_lanes=True)
        is None
    ):
        return lane_calls.convolve(
            layer, inputs, kernel, mask, dense_gradient=dense_gradient
        )
    else:
        product = convolution_outputs(
            layer, inputs, kernel, mask, dense_gradient=dense_gradient
        )
        if layer.use_bias:
            product = product + tf.convert_to_tensor(layer.bias)
    return product if layer.activation is None else layer.activation(product)


def goes_in_lanes(layer: keras.layers.Layer, inputs: tf.Tensor) -> bool:
    """Returns whether a layer's product is computed in lanes.

    It is, in training, if its inputs are in lanes already, or if converting
    them costs little; `sparse_outputs` excludes what takes too much memory.

    Args:
        layer: A layer that has a sparse product.
        inputs: Its inputs.
    """
    return _keras.is_training() and (
        lane_calls.stays(layer, inputs) or lane_calls.enters(layer, inputs)
    )


def inference_kernel(kernel: tf.Tensor, mask: tf.Tensor) -> tf.Tensor | None:
    """Returns kernel x mask for inference, or None.

    Kernels are zero outside their masks, so the kernel itself is the product.
    The op library checks this, and that the kernel has not changed since
    (`operations.masked_kernel`). If a kernel changes with every call, it would
    compare and multiply each time. So it is None if a gradient tape may watch,
    or if there is no op for the kernel. Graphs that a user traces use
    TensorFlow's operations: they may be saved, or compiled by XLA.

    Args:
        kernel, mask: Their values.
    """
    if (
        kernel.dtype == tf.float32
        and kernel.shape.num_elements() >= _LEAST_WEIGHTS
        and not _keras.is_training()
        and not _keras.may_differentiate()
        and (tf.executing_eagerly() or _keras.is_in_step_of_keras())
        and not tf.config.list_physical_devices("GPU")
        and not only_dense()
        and library.load() is not None
    ):
        return operations.masked_kernel(kernel, mask)
    return None


@contextlib.contextmanager
def dense_products() -> Iterator[None]:
    """Within the context, traced functions have dense products only."""
    token = _dense_products.set(True)
    try:
        yield
    finally:
        _dense_products.reset(token)


def only_dense() -> bool:
    """Returns whether the current trace can have dense products only.

    XLA compiles only TensorFlow's operations, and when Keras traces for shapes,
    nothing is computed.
    """
    with keras.SymbolicScope() as scope:
        symbolic = scope.original_scope is not None
    return symbolic or _dense_products.get() or _in_xla()


def _in_xla():
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        if _keras.is_compiled_by_xla(graph):
            return True
        graph = getattr(graph, "outer_graph", None)
    return False


def _has_images(layer):
    return type(layer) not in RECURRENT and matrix_of(layer) is None


def _problem(layer, shape, projected=False) -> AnyProblem:
    """Returns what a layer computes for inputs of a shape.

    Only the batch of images, and all axes of rows except the last, may be free.
    They then have usual sizes.
    """
    batch, *sizes = shape.as_list()[:-1]
    batch = USUAL_BATCH if batch is None else batch
    if type(layer) in RECURRENT:
        steps = _USUAL_LENGTH if sizes[0] is None else sizes[0]
        return recurrence(layer, (batch, steps, shape[-1]), projected=projected)
    matrix = matrix_of(layer)
    if matrix is not None:
        for length in sizes[: len(sizes) + 1 - len(matrix.inputs)]:
            batch *= _USUAL_LENGTH if length is None else length
        return Problem(
            kernel=(1, 1, *matrix.shape), images=(batch, 1, 1), matrix=True
        )
    return convolution_problem(layer, batch, sizes)
