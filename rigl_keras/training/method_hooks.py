"""What a method defines: when masks change, how, and what it logs."""

from collections.abc import Callable
from typing import Literal

import keras
import tensorflow as tf

from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions
from rigl_keras.masking.kernel_part import KernelPart
from rigl_keras.masking.masked import KernelMask
from rigl_keras.training import optimizer_state

__all__ = ["MethodHooks"]


class MethodHooks(keras.callbacks.Callback):
    """The hooks of a method, which `StepUpdate` calls.

    A method defines `is_due` and `change_masks`. It may define the others.

    Args:
        conventions: Choices where the references differ.

    Attributes:
        dense_gradients: When the method needs gradients at inactive entries:
            `"never"`, at its `"updates"` or `"always"`. It decides what
            training costs (`flops.training_flops`), and when they travel
            between workers (`exchange_gradients`).
        gradient_batches: Number of steps, up to and including the update's, in
            the mean gradient of an update.
        name: The report's name of the method.
    """

    dense_gradients: Literal["never", "updates", "always"] = "updates"
    gradient_batches: int = 1
    # Whether `change_masks` takes `KernelPart`s, of what `looks_at` returns.
    changes_parts: bool = False
    # What is logged of the last update.
    _logged: tuple[str, ...] = ("grown",)
    # Whether it removes all inputs of a unit on purpose.
    _ablates_units: bool = False
    # Whether what is planned depends on how long the run is.
    _measures_the_run: bool = False

    def __init__(self, *, conventions: Conventions = ORIGINAL):
        super().__init__()
        check_conventions(conventions)
        self.conventions = conventions

    @property
    def name(self) -> str:
        return type(self).__name__

    def get_config(self) -> dict:
        """Returns the arguments that make an equal callback."""
        return {"conventions": self.conventions}

    def lengthened(self, factor: float) -> "MethodHooks":
        """Returns this method for a run that is `factor` times as long.

        The step at which updates end is multiplied by the factor. The step at
        which they begin, and the steps between two updates, stay the same
        (the report, section 5.1).

        Args:
            factor: Positive number.

        Returns:
            A callback of the same class, not attached.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define lengthened."
        )

    # When.

    def plan(self, epoch: int, epochs: int | None, steps: int | None) -> None:
        """Plans the updates of a run, before its first step.

        Args:
            epoch: The epoch that begins.
            epochs: The epoch to end before, or None where unknown.
            steps: Batches in an epoch, or None where unknown.

        Raises:
            ValueError: The method needs the length of the run, but it is
                unknown.
        """

    def is_due(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        """Returns whether masks change at a step.

        Args:
            step: The optimizer step, an int or an integer tensor. The run
                began at `run_start`.

        Returns:
            A bool, or a bool tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} must define is_due.")

    def is_gathered(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        """Returns whether the gradients of a step count for an update.

        Args:
            step: The optimizer step, an int or an integer tensor.

        Returns:
            A bool, or a bool tensor. By default the gradients of the update's
            own step count.
        """
        return self.is_due(step)

    def looks_at(self, layer: KernelMask, step: tf.Tensor) -> tf.Tensor | None:
        """Returns where an update looks at the gradient of a kernel.

        Where a layer's product is sparse, the gradient is computed there
        alone, and zero elsewhere. It is called before the training step, but
        not under XLA, on several devices, or if an update uses several
        batches: then the gradient is computed at every entry.

        Args:
            layer: A masked layer.
            step: The optimizer step, an int64 scalar.

        Returns:
            uint8 tensor of the kernel's shape: 1 where the mask keeps, and 2
            more where it looks. None, as by default: everywhere.
        """
        del layer, step
        return None

    # How.

    def apply_gradients(
        self,
        apply: Callable,
        gradients: list[tf.Tensor | None],
        variables: list[keras.Variable],
    ) -> None:
        """Takes a step of the optimizer; each but those that updates replace.

        It runs in the graph of the training step.

        Args:
            apply: The optimizer's `apply`.
            gradients: What it would be given: zero outside the masks, unless
                `dense_gradients` is `"always"`.
            variables: The variables that they are gradients of.
        """
        apply(gradients, variables)

    def _own_steps(self) -> Callable | None:
        """Returns `apply_gradients` where a method defines it, or None."""
        defined = type(self).apply_gradients
        if defined is MethodHooks.apply_gradients:
            return None
        return self.apply_gradients

    def set_up(self) -> None:
        """Prepares for training, with `masked` and `optimizer` set.

        It is called when the method is attached, and within `fit` each time
        that the training step is made again.
        """

    def forget(self) -> None:
        """Forgets earlier runs when a new one begins, after `set_up`."""

    def change_masks(
        self,
        optimizer: keras.Optimizer,
        layers: list[KernelMask],
        gradients: list[tf.Tensor],
        step: tf.Tensor,
    ) -> tf.Tensor:
        """Changes every mask once.

        It runs in the graph of the training step. `set_kernel_and_mask` gives
        a layer its new mask.

        Args:
            optimizer: The optimizer that trains the model.
            layers: The masked layers whose kernels have a gradient.
            gradients: dL/d(masked kernel) of each, without regularisation.
            step: The optimizer step, an int64 scalar.

        Returns:
            How many connections were grown, an integer scalar.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define change_masks."
        )

    def set_kernel_and_mask(
        self,
        optimizer: keras.Optimizer,
        layer: KernelMask,
        mask: tf.Tensor,
        grown: tf.Tensor,
        values: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Gives a layer its new mask, and new connections their first weight.

        Weights outside the mask become zero, and newly grown ones `values`.
        The optimizer forgets what it remembered of both. With dense momentum
        it forgets nothing (Dettmers and Zettlemoyer, 2020).

        Args:
            optimizer: The optimizer that trains the model.
            layer: A masked layer, or a part of it.
            mask: Bool tensor of the kernel's shape, or of the part's.
            grown: Bool tensor of the kernel's shape, within `mask`.
            values: What grown weights start with, of the kernel's shape and
                dtype. None: zero.

        Returns:
            How many connections were grown, an integer scalar.
        """
        if isinstance(layer, KernelPart):
            return self._set_part(optimizer, layer, mask, grown, values)
        kernel = layer.kernel
        before = tf.convert_to_tensor(layer.mask.value)
        zeros = tf.zeros_like(kernel.value)
        start = zeros if values is None else tf.where(grown, values, zeros)
        kernel.assign(
            tf.where(mask & tf.logical_not(grown), kernel.value, start)
        )
        # A connection that left and rejoined keeps its memory, even where the
        # conventions zero its weight.
        optimizer_state.forget(
            optimizer,
            kernel,
            keep=before & mask,
            # Of weights, not of gradients: it is zero where they are.
            only=["average"] if self.dense_gradients == "always" else None,
        )
        layer.mask.assign(mask)
        return tf.math.count_nonzero(grown)

    def _set_part(self, optimizer, part, mask, grown, values):
        """Does what `set_kernel_and_mask` does, at the places of a part.

        Elsewhere nothing is active, before or after.
        """
        whole, weights = part.whole, part.kernel.value
        start = tf.zeros_like(weights)
        if values is not None:
            start = tf.where(grown, values, start)
        stays = mask & tf.logical_not(grown)
        whole.kernel.assign(
            part.put(whole.kernel.value, tf.where(stays, weights, start))
        )
        optimizer_state.forget(
            optimizer, whole.kernel, keep=part.mask.value & mask, part=part
        )
        whole.mask.assign(part.put(whole.mask.value, mask))
        return tf.math.count_nonzero(grown)

    def extra_logs(self) -> dict[str, tf.Tensor]:
        """Returns the method's logs, besides `density` and `grown`."""
        return {}
