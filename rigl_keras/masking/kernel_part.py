"""Some entries of a kernel and of its mask, which stand for all of them."""

from typing import Any, NamedTuple

import tensorflow as tf

from rigl_keras.kernels.place_operations import with_values
from rigl_keras.masking.kernel_mask import KernelMask

__all__ = ["KernelPart"]


class _Entries(NamedTuple):
    """What `KernelPart` has instead of a variable."""

    value: tf.Tensor


class KernelPart(KernelMask):
    """Some entries of a kernel and of its mask, including all active ones.

    For a mask of single weights that all compete: what has one value for each
    entry of a kernel has one for each of the places here, in the same order,
    so that what `topology.update_masks` makes of them is the same.

    Args:
        whole: The kernel and its mask.
        places: int64 vector of flat positions, rising.

    Attributes:
        kernel, mask: Their `value`s are vectors.
    """

    def __init__(self, whole: KernelMask, places: tf.Tensor):
        self.whole, self.places = whole, places
        self.name, self.draw_key = whole.name, whole.draw_key
        self.granularity, self.found = whole.granularity, whole.found
        self._kernel = _Entries(self.of(whole.kernel.value))
        self.mask: Any = _Entries(self.of(whole.mask.value))

    @property
    def kernel(self) -> Any:
        return self._kernel

    @property
    def layout(self) -> Any:
        return None

    def of(self, tensor: Any) -> tf.Tensor:
        """Returns the entries of a tensor of the kernel's shape."""
        flat = tf.reshape(tf.convert_to_tensor(tensor), [-1])
        return tf.gather(flat, self.places)

    def put(self, tensor: Any, entries: tf.Tensor) -> tf.Tensor:
        """Returns a tensor of the kernel's shape with other entries here."""
        tensor = tf.convert_to_tensor(tensor)
        return with_values(tensor, self.places, entries)

    def by_unit(self, tensor: tf.Tensor) -> tf.Tensor:
        return tensor

    def units(self, mask: tf.Tensor) -> tf.Tensor:
        return mask

    def by_element(self, tensor: tf.Tensor) -> tf.Tensor:
        return tensor
