"""A kernel and its mask: what a method changes."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from rigl_keras import kernels
from rigl_keras.kernels import layer_products
from rigl_keras.kernels.layer_products import ProductChoices
from rigl_keras.kernels.place_operations import look_at
from rigl_keras.layouts import Layout
from rigl_keras.masking.inner_products import multiplier
from rigl_keras.masking.layer_kernels import Kernel
from rigl_keras.masking.tracing import (
    gradients_are_dense,
    masks_are_applied,
    note_called,
    product,
    zero_outside,
)
from rigl_keras.patterns import as_pattern

__all__ = ["KernelMask", "MaskedKernel"]


class KernelMask:
    """A kernel and its mask: what a method changes.

    A `Masked` layer with one `kernel` is a `KernelMask` itself.
    `Masked.masked_kernels()` lists those of other layers (an LSTM, attention).

    Attributes:
        name: Unique within the model, unless layers share a name.
        kernel: The kernel variable, zero outside the mask.
        mask: Bool variable of the kernel's shape, True where kept.
        found: Where the kernel is, and the meaning of its axes.
        draw_key: Int that seeds random draws for this kernel.
        granularity: Name of the mask's pattern.
        layout: The units and groups that the pattern makes of the kernel.
        density: Fraction of ones in the mask.
    """

    name: str
    mask: keras.Variable
    found: Kernel
    draw_key: int
    granularity: str

    @property
    def kernel(self) -> keras.Variable:
        return self.found.variable

    @property
    def layout(self) -> Layout:
        return as_pattern(self.granularity).layout(self.found.axes)

    @property
    def density(self) -> float:
        return float(tf.reduce_mean(tf.cast(self.mask.value, tf.float64)))

    def assign_mask(self, mask) -> None:
        """Sets the mask and zeroes the kernel outside it."""
        self.mask.assign(mask)
        self.kernel.assign(zero_outside(self.mask, self.kernel.value))

    def by_unit(self, tensor: tf.Tensor) -> tf.Tensor:
        """Returns one value for each unit of the mask's pattern.

        Args:
            tensor: Float tensor of the kernel's shape.

        Returns:
            The tensor itself if units are single weights; its mean over each
            unit if they are kernels or blocks.
        """
        return self.layout.by_unit(tensor)

    def units(self, mask: tf.Tensor) -> tf.Tensor:
        """Returns which units keep at least one weight.

        Args:
            mask: Bool tensor of the kernel's shape.

        Returns:
            Bool tensor with a value for each unit, as in `by_unit`.
        """
        return self.layout.units(mask)

    def by_element(self, tensor: tf.Tensor) -> tf.Tensor:
        """Returns, for each entry of the kernel, the value of its unit.

        Args:
            tensor: One value for each unit, as from `by_unit`.

        Returns:
            Tensor of the kernel's shape.
        """
        return self.layout.by_element(tensor)

    def looked_at(self, positions: tf.Tensor) -> tf.Tensor:
        """Returns the mask in bytes, for gradients beside active ones.

        Args:
            positions: int64 vector of flat positions among the units. Some
                may come twice.

        Returns:
            uint8 tensor of the kernel's shape: 1 where the mask keeps, and 2
            more in the units at the positions.
        """
        kept = self.units(tf.convert_to_tensor(self.mask.value))
        return self.by_element(look_at(kept, positions))

    def masked_kernel(
        self, kernel: Any = None, *, kept: bool = False
    ) -> tf.Tensor:
        """Returns kernel x mask, with gradients for training.

        Args:
            kernel: The kernel's value. None: the value of the variable.
            kept: Whether the product may be kept from call to call when no
                gradient is needed.
        """
        note_called(self.kernel, self.name)
        if kernel is None:
            kernel = self.kernel.value
        kernel = tf.convert_to_tensor(kernel)
        if masks_are_applied():
            return kernel
        mask = tf.convert_to_tensor(self.mask.value)
        if kept and not gradients_are_dense():
            found = layer_products.inference_kernel(kernel, mask)
            if found is not None:
                return found
        return product(kernel, mask)


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedKernel(KernelMask):
    """A masked kernel within a layer, perhaps one of several."""

    name: str
    mask: keras.Variable
    found: Kernel
    draw_key: int
    granularity: str
    layer: keras.layers.Layer
    choices: ProductChoices

    def chosen_products(self) -> dict[tuple, kernels.Choice]:
        """Returns the chosen products, by the shape of the inputs."""
        return self.choices.chosen(
            multiplier(self.layer, self.found.owner)
        ).by_shape
