"""What a method trains: a model, its optimizer and its masked layers."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from rigl_keras import replicas
from rigl_keras.kernels import fast_calls
from rigl_keras.masking.leaves import leaf_layers
from rigl_keras.masking.masked import KernelMask, Masked
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.training import optimizer_state

__all__ = ["Attachment", "variable_key"]


class Attachment:
    """A model, the optimizer that trains it, and its masked layers.

    Args:
        model: A masked model.
        applied: The optimizer that the training step applies. It may scale the
            loss.

    Attributes:
        optimizer: The optimizer that moves the weights, within any loss
            scaling.
        steps_before: Steps of earlier optimizers. `steps_taken` includes them.
        masked: The masked layers of the model, frozen ones included.
    """

    def __init__(self, model: keras.Model, applied: keras.Optimizer):
        self.model, self.applied = model, applied
        self.optimizer = optimizer_state.innermost(applied)
        self.steps_before = 0
        self.masked = list(masked_layers(model))

    @property
    def scales_loss(self) -> bool:
        """Whether a batch may be skipped because its gradients overflow."""
        return self.applied is not self.optimizer

    @property
    def batches_per_step(self) -> int:
        """How many batches make up an optimizer step."""
        return optimizer_state.batches_per_step(self.optimizer)

    @property
    def wrappers(self) -> list[Masked]:
        """The `Masked` layers, each once for each model that lists it."""
        return [
            leaf for leaf in leaf_layers(self.model) if isinstance(leaf, Masked)
        ]

    def trainable(self) -> list[KernelMask]:
        """Returns the masked layers that are not frozen now."""
        trainable = {variable_key(v) for v in self.model.trainable_variables}
        return [m for m in self.masked if variable_key(m.kernel) in trainable]

    def has_kernels(self, kernels: Sequence[keras.Variable]) -> bool:
        """Returns whether these variables are the masked kernels, in order."""
        return [*map(id, kernels)] == [id(m.kernel) for m in self.masked]

    def is_of(self, model: keras.Model, applied: keras.Optimizer) -> bool:
        """Returns whether this belongs to a model and an optimizer."""
        return self.model is model and self.applied is applied

    def step(self) -> tf.Tensor:
        """Returns the optimizer step, an int64 scalar."""
        return tf.cast(self.applied.iterations, tf.int64)

    def steps_taken(self) -> int:
        """Returns how many steps this optimizer and earlier ones took."""
        iterations: Any = self.applied.iterations
        return int(iterations.numpy()) + self.steps_before

    def batches(self) -> tf.Tensor:
        """Returns how many batches the optimizer has seen, a scalar."""
        return tf.identity(optimizer_state.batches(self.optimizer).value)

    def check_trainable(self, method: str) -> None:
        """Checks that there is a mask to change.

        Args:
            method: Name of the method.

        Raises:
            ValueError: No masked layer is trainable.
        """
        if not self.trainable():
            raise ValueError(
                f"{method} found no masked layer to train in model "
                f"{self.model.name!r}. Call model = rigl_keras.sparsify(model, "
                "density) before compile, and do not freeze all masked layers."
            )

    def prepare(self, method: str, gradient_batches: int) -> None:
        """Checks the set-up for training, and builds the optimizer.

        Args:
            method: Name of the method.
            gradient_batches: Number of batches in the mean gradient of an
                update.

        Raises:
            ValueError: The optimizer or the strategy is not supported.
        """
        for part in optimizer_state.parts(self.optimizer):
            if part is not self.optimizer and part.gradient_accumulation_steps:
                raise ValueError(
                    f"{method} does not support gradient accumulation within "
                    f"{type(self.optimizer).__name__}, whose optimizers may "
                    "count steps differently. Received "
                    "gradient_accumulation_steps="
                    f"{part.gradient_accumulation_steps} of {part.name!r}. "
                    "Use a larger batch, or one optimizer."
                )
        replicas.check_set_up(
            method, self.model, [self.applied, self.optimizer], gradient_batches
        )
        if not self.applied.built:
            self.applied.build(self.model.trainable_variables)
        if any(layer.product != "dense" for layer in self.wrappers):
            # A loaded model does not have them yet.
            fast_calls.use_fast_calls(self.model)


def variable_key(variable: keras.Variable | tf.Variable) -> int:
    """Returns one key for a Keras variable and the variable that it holds.

    Optimizers accept both.
    """
    return id(
        variable.value if isinstance(variable, keras.Variable) else variable
    )
