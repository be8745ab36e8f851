"""`Masked`: a Keras wrapper that holds the mask of the layer it wraps."""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import _keras, kernels
from rigl_keras.kernels import layer_products
from rigl_keras.kernels.layer_products import ProductChoices
from rigl_keras.masking.drawing import draw_mask
from rigl_keras.masking.inner_products import ask_scope
from rigl_keras.masking.kernel_mask import KernelMask, MaskedKernel
from rigl_keras.masking.layer_kernels import Kernel, find_kernels, kernel_at
from rigl_keras.masking.mask_variable import MaskVariable, check_read
from rigl_keras.masking.tracing import (
    KernelScope,
    kernels_are_whole,
    masks_are_applied,
    note_called,
    product_masks,
    zero_outside,
)
from rigl_keras.patterns import Granularity, as_pattern

__all__ = [
    "KernelMask",
    "MaskProjection",
    "Masked",
    "allow_again",
    "refuse",
    "show_to_tensorflow",
]


@keras.saving.register_keras_serializable("rigl_keras")
class Masked(KernelMask, keras.layers.Wrapper):
    """A layer whose kernels are multiplied by masks of zeros and ones.

    It computes the wrapped layer's output with kernel x mask instead of each
    kernel. A mask is a weight that is saved but not trained. A kernel is
    exactly zero outside its mask: its constraint projects it after each
    optimizer step, and saving projects it too. Attributes that the wrapper
    lacks are read from the layer.

    Args:
        layer: Any layer with a kernel, such as Dense, Conv2D or LSTM, or that
            contains such layers, such as attention and custom layers.
        kernels: Paths of the kernels to mask, as in `layer_kernels.Kernel`.
            None: all that are found.
        draw_key: Int that seeds random draws. None: the crc32 of the name.
        granularity: The pattern of the masks, or its name, as in `sparsify`.
        product: How kernel x mask is multiplied with inputs. `"dense"`: by
            TensorFlow. `"sparse"`: by kernels that skip removed weights, if the
            layer has such a product (`layer_products.why_dense`). `"auto"`: by
            the faster of both, timed. It may be changed later, for functions
            that are traced from then on.
        nonzeros: Number of ones in each mask, in the order of `kernels`, as
            stored in a config. The masks are drawn from `draw_key` when the
            layer is built. None: masks of ones.
        name: Name of the layer. None: the name of the wrapped layer.
        dtype: Dtype or policy. None: that of the wrapped layer.
        trainable: Whether the layer is trained.

    Attributes:
        layer: The wrapped layer.
        kernel, mask, density: Those of a single kernel. For several kernels,
            use `masked_kernels()`.

    Raises:
        ValueError: `layer` is masked already, has no kernel once it is built,
            or `granularity` is unknown or does not fit one.
    """

    def __init__(
        self,
        layer,
        *,
        kernels: Sequence[str] | None = None,
        draw_key: int | None = None,
        granularity: Granularity = "element",
        product: str = "auto",
        nonzeros: Sequence[int] | None = None,
        name: str | None = None,
        dtype=None,
        trainable: bool = True,
    ):
        if isinstance(layer, Masked):
            raise ValueError(
                f"Layer {layer.name!r} is masked already. Mask a plain layer."
            )
        if isinstance(layer, keras.layers.Layer):
            # Keras reads the arguments of a call from its signature.
            self.call = _with_signature_of(layer.call, self._call_masked)
        super().__init__(
            layer,
            name=name or getattr(layer, "name", None),
            dtype=dtype or getattr(layer, "dtype_policy", None),
            trainable=trainable,
        )
        self.draw_key = (
            zlib.crc32(self.name.encode()) if draw_key is None else draw_key
        )
        self.granularity = as_pattern(granularity).name
        self._choices = ProductChoices(layer, product)
        self.kernels = None if kernels is None else tuple(kernels)
        self._nonzeros = None if nonzeros is None else tuple(nonzeros)
        self.supports_masking = layer.supports_masking
        self._masks = []

    @property
    def product(self) -> str:
        return self._choices.product

    @product.setter
    def product(self, product: str) -> None:
        self._choices.product = product

    def build(self, input_shape=None):
        super().build(input_shape)
        found = find_kernels(self.layer)
        if self.kernels is not None:
            found = [kernel_at(self.layer, path) for path in self.kernels]
        if not found:
            raise ValueError(
                "Masked wraps layers with a `kernel` variable, such as Dense, "
                f"Conv2D or LSTM. Received: layer={self.layer!r}, a "
                f"{type(self.layer).__name__}. If it has another name, pass "
                "kernels=[name]."
            )
        self.kernels = tuple(kernel.path for kernel in found)
        for kernel in found:
            as_pattern(self.granularity).layout(kernel.axes)  # or raises
        self._masks = [self._make_mask(kernel) for kernel in found]
        show_to_tensorflow(self, [*self._masks, *self.layer.variables])
        for kernel, mask in zip(found, self._masks, strict=True):
            kernel.variable.constraint = MaskProjection(
                mask, kernel.variable.constraint
            )
            _refuse_in_place_of(kernel.owner)
        if self.kernels != ("kernel",):
            ask_scope(self.layer)
        if self._nonzeros is not None:
            self._draw_masks()

    def _draw_masks(self):
        """Draws the masks that a config describes by their numbers of ones."""
        for masked, ones in zip(
            self.masked_kernels(), self._nonzeros or (), strict=True
        ):
            shape = tuple(masked.kernel.shape)
            if not 0 <= ones <= math.prod(shape):
                raise ValueError(
                    f"nonzeros must be in [0, {math.prod(shape)}] for the "
                    f"kernel of {masked.name!r}. Received: {ones!r}."
                )
            layout = masked.layout
            masked.assign_mask(
                draw_mask(layout, layout.count_of(ones), masked.draw_key)
            )

    def _make_mask(self, kernel):
        name = "mask"
        if kernel.path != "kernel":
            name = kernel.path.replace(".", "_") + "_mask"
        mask = self.add_weight(
            name=name,
            shape=kernel.variable.shape,
            dtype="bool",  # one byte for each entry
            initializer="ones",
            trainable=False,
            autocast=False,
        )
        # Keras makes it, in its scopes of names and devices.
        mask.__class__ = MaskVariable
        return mask

    def masked_kernels(self) -> tuple[KernelMask, ...]:
        """Returns a `KernelMask` for each kernel: `self` for `kernel`."""
        # Not a property: Keras saves the values of a layer's attributes.
        if self.kernels == ("kernel",):
            return (self,)
        found = [kernel_at(self.layer, path) for path in self.kernels or ()]
        return tuple(
            MaskedKernel(
                name=kernel.named(self.name),
                mask=mask,
                found=kernel,
                draw_key=zlib.crc32(f"{self.draw_key}/{kernel.path}".encode()),
                granularity=as_pattern(self.granularity).of(kernel.axes).name,
                layer=self.layer,
                choices=self._choices,
            )
            for kernel, mask in zip(found, self._masks, strict=False)
        )

    @property
    def found(self) -> Kernel:
        paths = self.kernels or ("kernel",)
        return kernel_at(self.layer, paths[self._only()])

    @property
    def mask(self) -> keras.Variable:
        return self._masks[self._only()]

    def _only(self):
        """Returns the index of the one kernel, 0."""
        if len(self._masks) != 1:
            raise AttributeError  # `__getattr__` raises a better message
        return 0

    def __call__(self, *args, **kwargs):
        if not self.built:
            # Only the layer's own call knows what it is built from.
            self.layer(*_symbolic(args), **_symbolic(kwargs))
        return super().__call__(*args, **kwargs)

    def _call_masked(self, *args, **kwargs):
        kept = self.product != "dense"
        with KernelScope(self.masked_kernels(), kept=kept) as scope:
            if self._is_sparse(args, kwargs):
                return self._sparse_outputs(scope, *args)
            scope.multiply_ahead()
            outputs = self.layer(*args, **kwargs)
        for loss in scope.losses:  # activity regularisation
            self.add_loss(tf.identity(loss))
        return outputs

    def _is_sparse(self, args, kwargs):
        """Returns whether sparse kernels compute a call."""
        return (
            self.product != "dense"
            and layer_products.takes_one_tensor(args, kwargs)
            and not masks_are_applied()
            and self.why_dense() is None
            and not layer_products.only_dense()
            and self._choices.choose(
                args[0].shape,
                [self.mask],
                in_lanes=layer_products.goes_in_lanes(self.layer, args[0]),
            ).sparse
        )

    def why_dense(self) -> str | None:
        """Returns why the layer has no sparse product as a whole, or None."""
        if self.kernels != ("kernel",):
            return "its kernels have other names"
        return layer_products.why_dense(self.layer)

    def choose_product(self, shape: tf.TensorShape) -> kernels.Choice:
        """Returns the product that the layer uses for inputs of a shape.

        Args:
            shape: Shape of the inputs; the batch may be None.
        """
        return self._choices.choose(shape, [self.mask])

    def chosen_products(self) -> dict[tuple, kernels.Choice]:
        """Returns the chosen products, by the shape of the inputs."""
        return self._choices.by_shape

    def product_changes(self) -> bool:
        """Returns whether another product is now faster for some inputs."""
        return self._choices.changes()

    def forget_products(self) -> None:
        """Forgets the chosen products."""
        self._choices.forget()

    def _sparse_outputs(self, scope, inputs):
        note_called(self.kernel, self.name)
        (mask,), dense = product_masks([self])
        return layer_products.sparse_outputs(
            self.layer,
            inputs,
            tf.convert_to_tensor(scope.value_outside(self.kernel)),
            mask,
            dense_gradient=dense,
        )

    def __getattr__(self, name):
        # Attributes that the wrapper lacks are the layer's: `units`,
        # `reset_state`, other methods than `call` (they see the kernel, zero
        # outside the mask).
        layer = vars(self).get("layer")
        if name in _OF_ONE_KERNEL:
            if not vars(self).get("built"):
                raise AttributeError(
                    f"Layer {vars(self).get('name')!r} is not built yet, and "
                    f"so has no {name!r}: call it or the model on a batch."
                )
            raise AttributeError(
                f"Layer {vars(self).get('name')!r} has no single `kernel`, and "
                f"so no {name!r}: see its masked_kernels()."
            )
        if layer is None or name.startswith("_"):
            raise AttributeError(f"A Masked layer has no attribute {name!r}.")
        return getattr(layer, name)

    def compute_output_spec(self, *args, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, inputs, previous_mask):
        return self.layer.compute_mask(inputs, previous_mask)

    def quantize(self, mode=None, type_check=True, config=None):
        refuse("quantize", self.name)

    def get_build_config(self):
        # As in Keras, a call builds a layer without `build`.
        if _keras.applies_default_build(self.layer):
            return None
        return self.layer.get_build_config()

    def build_from_config(self, config):
        if not self.layer.built:
            self.layer.build_from_config(config)
            self.layer.built = True
        self.build()

    def save_own_variables(self, store):
        # Files never hold weights outside masks, however they came there.
        for masked in self.masked_kernels():
            masked.assign_mask(masked.mask.value)
        super().save_own_variables(store)

    def load_own_variables(self, store):
        if self._masks and not len(store.keys()):
            raise ValueError(
                f"The file has no mask for layer {self.name!r}. To load the "
                "weights of a dense model into a masked one: "
                "rigl_keras.load_weights(model, path)."
            )
        _keras.check_file_of_layer(self, store)
        for i in range(len(self._masks)):
            check_read(store[f"{i}"], self.name)
        super().load_own_variables(store)

    def get_config(self):
        return {
            **super().get_config(),
            "kernels": None if self.kernels is None else list(self.kernels),
            "draw_key": self.draw_key,
            "granularity": self.granularity,
            "product": self.product,
            "nonzeros": self._count_nonzeros(),
        }

    def _count_nonzeros(self):
        if not self._masks:
            return None if self._nonzeros is None else list(self._nonzeros)
        with tf.init_scope():
            return [
                int(np.count_nonzero(np.asarray(_keras.stored_value(mask))))
                for mask in self._masks
            ]


# Methods of Keras that replace a kernel and ignore its mask.
_REFUSED = {
    "quantize": "Quantize the plain model: strip(model).quantize(...), or "
    "export(model, path, format='tflite', quantization='int8').",
    "enable_lora": "Adapt the plain model: strip(model), whose adapted layers "
    "are no longer sparse.",
}


def _refuse_in_place_of(owner):
    """Makes a layer refuse methods that would replace its masked kernel."""
    for name in _REFUSED:
        of_class = getattr(type(owner), name, None)
        if of_class not in (None, getattr(keras.layers.Layer, name, None)):
            before = vars(owner).get(name)  # Keras wraps some methods
            if not isinstance(before, _Refusal):
                setattr(owner, name, _Refusal(owner.name, name, before))


class _Refusal:
    """Replaces a method of a layer; copies of the layer do not have it."""

    def __init__(self, layer_name, method, before):
        self.layer_name, self.method = layer_name, method
        self.before = before

    def __call__(self, *args, **kwargs):
        refuse(self.method, self.layer_name)


def refuse(method: str, layer_name: str) -> None:
    """Raises the error about a method that would replace a masked kernel.

    Args:
        method: `"quantize"` or `"enable_lora"`.
        layer_name: Name of the masked layer.
    """
    raise ValueError(
        f"{method}() would replace the kernel of layer {layer_name!r}, which "
        f"is masked. {_REFUSED[method]}"
    )


def allow_again(owner) -> None:
    """Restores the methods of a layer that is no longer masked."""
    for name in _REFUSED:
        refusal = vars(owner).get(name)
        if isinstance(refusal, _Refusal):
            if refusal.before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, refusal.before)


_OF_ONE_KERNEL = ("density", "found", "kernel", "mask")


def show_to_tensorflow(layer, variables: Sequence[keras.Variable]) -> None:
    """Makes `tf.train.Checkpoint` save variables with a layer.

    It finds variables that are attributes, but not variables in lists.

    Args:
        layer: A layer or model.
        variables: Variables of it, or of its inner layers.
    """
    holder: Any = tf.Module()
    holder.within = list(variables)
    layer._rigl_keras_variables = holder


def _symbolic(arguments: Any) -> Any:
    """Returns call arguments with symbolic tensors of the same shapes."""
    return keras.tree.map_structure(
        lambda x: (
            keras.KerasTensor(x.shape, x.dtype)
            if hasattr(x, "shape") and hasattr(x, "dtype")
            else x
        ),
        arguments,
    )


def _with_signature_of(call, function):
    @functools.wraps(call)
    def with_signature(*args, **kwargs):
        return function(*args, **kwargs)

    return with_signature


class MaskProjection(keras.constraints.Constraint):
    """Sets a kernel to zero outside its mask, after the user's constraint.

    Keras applies a variable's constraint within `optimizer.apply`. So no
    checkpoint ever holds a weight that the mask removes.

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
        if kernels_are_whole():
            return kernel
        return zero_outside(self.mask, kernel)
