"""`Masked`: a Keras wrapper that holds the mask of the layer it wraps."""

import contextlib
import contextvars
import zlib
from collections.abc import Iterator

import keras
import tensorflow as tf

__all__ = [
    "GRANULARITIES",
    "Masked",
    "MaskProjection",
    "check_granularity",
    "dense_gradients",
]

GRANULARITIES = ("element", "kernel")

_dense_gradients = contextvars.ContextVar("dense_gradients", default=False)


def check_granularity(granularity: str) -> None:
    """Raises ValueError unless it is one of `GRANULARITIES`."""
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity must be one of {GRANULARITIES}. Received: "
            f"granularity={granularity!r}."
        )


@contextlib.contextmanager
def dense_gradients() -> Iterator[None]:
    """Within the context, masked layers pass dense gradients to kernels.

    What counts is where the forward pass is traced. Outside, the gradient
    that reaches a kernel is zero where its mask is; inside, it is dL/d(w m) at
    every entry, which is what RigL grows by (Evci et al., 2020, section 3).

    Example:

    >>> with dense_gradients(), tf.GradientTape() as tape:
    ...     loss = tf.reduce_sum(masked_layer(inputs))
    >>> tape.gradient(loss, masked_layer.kernel.value)  # nowhere masked
    """
    token = _dense_gradients.set(True)
    try:
        yield
    finally:
        _dense_gradients.reset(token)


@keras.saving.register_keras_serializable("rigl_keras")
class Masked(keras.layers.Wrapper):
    """A layer whose kernel is multiplied by a mask of zeros and ones.

    Computes the wrapped layer's output with kernel x mask in the place of its
    kernel. The mask is a weight that is saved but not trained; the kernel is
    kept exactly zero outside it, because its constraint projects it there
    whenever an optimizer has moved it.

    Args:
        layer: A layer with one trainable `kernel`, such as Dense or Conv2D.
        draw_key: Int from which random draws for this kernel are seeded.
            None: the crc32 of the name.
        granularity: What the mask keeps or removes as one: `"element"`, each
            weight; `"kernel"`, all weights between one input and one output
            channel, which are the last two axes.
        name: Name of the layer. None: that of the wrapped layer.
        dtype: Dtype or policy. None: that of the wrapped layer.
        trainable: Whether the kernel is trained.

    Attributes:
        kernel: The wrapped layer's kernel variable, zero outside the mask.
        mask: Variable of the kernel's shape and dtype, 1 where kept.
        density: Fraction of the mask that is 1.

    Raises:
        ValueError: `layer` is masked already, turns out to have no kernel
            when it is built, or `granularity` is unknown.
    """

    def __init__(
        self,
        layer,
        *,
        draw_key: int | None = None,
        granularity: str = "element",
        name: str | None = None,
        dtype=None,
        trainable: bool = True,
    ):
        if isinstance(layer, Masked):
            raise ValueError(
                f"Layer {layer.name!r} is masked already. Mask a plain layer."
            )
        super().__init__(
            layer,
            name=name or getattr(layer, "name", None),
            dtype=dtype or getattr(layer, "dtype_policy", None),
            trainable=trainable,
        )
        self.draw_key = (
            zlib.crc32(self.name.encode()) if draw_key is None else draw_key
        )
        check_granularity(granularity)
        self.granularity = granularity
        self.supports_masking = layer.supports_masking

    def build(self, input_shape=None):
        super().build(input_shape)
        kernel = getattr(self.layer, "kernel", None)
        if not isinstance(kernel, keras.Variable):
            raise ValueError(
                "Masked wraps layers with one `kernel` variable, such as "
                f"Dense or Conv2D. Received: layer={self.layer!r}, a "
                f"{type(self.layer).__name__}."
            )
        self.mask = self.add_weight(
            name="mask",
            shape=kernel.shape,
            dtype=kernel.dtype,
            initializer="ones",
            trainable=False,
            autocast=False,
        )
        kernel.constraint = MaskProjection(self.mask, kernel.constraint)

    @property
    def kernel(self) -> keras.Variable:
        return self.layer.kernel

    @property
    def density(self) -> float:
        return float(tf.reduce_mean(tf.cast(self.mask.value, tf.float64)))

    def assign_mask(self, mask) -> None:
        """Sets the mask and zeroes the kernel outside it."""
        self.mask.assign(mask)
        # A product would keep a NaN or an infinity that lies outside.
        kept = tf.cast(self.mask.value, tf.bool)
        kernel = tf.convert_to_tensor(self.kernel.value)
        self.kernel.assign(tf.where(kept, kernel, tf.zeros_like(kernel)))

    def by_unit(self, tensor: tf.Tensor) -> tf.Tensor:
        """Returns one value for each unit that the mask keeps or removes.

        Args:
            tensor: Float tensor of the kernel's shape.

        Returns:
            The tensor itself where units are elements; its mean over the
            spatial axes, of the shape of the last two, where they are kernels.
        """
        if self.granularity == "element":
            return tensor
        return tf.reduce_mean(tensor, axis=range(len(tensor.shape) - 2))

    def units(self, mask: tf.Tensor) -> tf.Tensor:
        """Returns whether anything of each unit is kept.

        Args:
            mask: Bool tensor of the kernel's shape.

        Returns:
            Bool tensor, a value for each unit as in `by_unit`.
        """
        if self.granularity == "element":
            return mask
        return tf.reduce_any(mask, axis=range(len(mask.shape) - 2))

    def by_element(self, tensor: tf.Tensor) -> tf.Tensor:
        """Returns the value of its unit for each entry of the kernel.

        Args:
            tensor: One value for each unit, as `by_unit` returns them.

        Returns:
            Tensor of the kernel's shape.
        """
        return tf.broadcast_to(tensor, self.kernel.shape)

    def masked_kernel(self) -> tf.Tensor:
        """Returns kernel x mask, through which training differentiates."""
        kernel = tf.convert_to_tensor(self.layer.kernel.value)
        # Within a call of mixed precision the kernel comes in half precision.
        mask = tf.cast(self.mask.value, kernel.dtype)
        return _product(kernel, mask, _dense_gradients.get())

    def call(self, inputs):
        # A scope hides the values that an outer one gives (stateless_call):
        # they are passed on.
        values = [(v, v.value) for v in self.layer.weights]
        values.append((self.layer.kernel, self.masked_kernel()))
        with keras.StatelessScope(
            state_mapping=values, collect_losses=True
        ) as scope:
            outputs = self.layer(inputs)
        for loss in scope.losses:  # activity regularisation
            # A copy: the layer within knows its own, and in an outer scope
            # both would count it.
            self.add_loss(tf.identity(loss))
        return outputs

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "draw_key": self.draw_key,
            "granularity": self.granularity,
        }


def _product(kernel, mask, dense):
    @tf.custom_gradient
    def product(kernel, mask):
        def gradient(upstream):
            return (upstream if dense else upstream * mask), None

        return kernel * mask, gradient

    return product(kernel, mask)


class MaskProjection(keras.constraints.Constraint):
    """Sets a kernel to zero outside its mask, after the user's constraint.

    Keras applies a variable's constraint within `optimizer.apply`, so that no
    checkpoint, written at any moment, holds a weight that the mask removes.

    Args:
        mask: The mask variable.
        constraint: The constraint that the kernel had before, or None.
    """

    def __init__(self, mask, constraint=None):
        self.mask = mask
        self.constraint = constraint

    def __call__(self, kernel):
        if self.constraint is not None:
            kernel = self.constraint(kernel)
        kernel = tf.convert_to_tensor(kernel)
        # A product would keep a NaN or an infinity that lies outside.
        kept = tf.cast(tf.convert_to_tensor(self.mask), tf.bool)
        return tf.where(kept, kernel, tf.zeros_like(kernel))
