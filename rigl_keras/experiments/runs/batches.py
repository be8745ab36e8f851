"""The batches of a run, split among its workers."""

import dataclasses

import tensorflow as tf

from rigl_keras.experiments.data import Data, Text
from rigl_keras.experiments.runs import devices

__all__ = ["Batches"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of a run, with one-hot labels, split among the workers.

    The classes of a text are its symbols, and each character has a label.

    Args:
        examples: The examples.
        batch_size: Examples in a batch, over all replicas together.
        seed: Seed of the order and of the augmentation.
        label_smoothing: Share of each label, in training, that is spread over
            all classes, in [0, 1).
    """

    examples: Data | Text
    batch_size: int
    seed: int
    label_smoothing: float

    @property
    def steps_per_epoch(self) -> int:
        """The number of training batches in an epoch."""
        return self.examples.steps_per_epoch(self.batch_size)

    def first(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the first training batch, the whole of it in each worker."""
        examples = self.examples.train(
            batch_size=self.batch_size, seed=self.seed, epochs=1
        )
        return self._smoothed(*next(iter(examples)))

    def train(self, *, first_epoch: int, epochs: int) -> tf.data.Dataset:
        """Returns the training batches, weighted for the replicas."""
        examples = self.examples.train(
            batch_size=self.batch_size,
            seed=self.seed,
            first_epoch=first_epoch,
            epochs=epochs,
        )
        return devices.sharded(examples.map(self._smoothed)).map(
            devices.weighted_for_replicas
        )

    def validation(self) -> tf.data.Dataset | None:
        """Returns the validation batches, or None if nothing is held out."""
        if not self.examples.recipe.validation:
            return None
        return self._to_evaluate(
            self.examples.validation(batch_size=self.batch_size)
        )

    def test(self) -> tf.data.Dataset:
        """Returns the batches of the test examples."""
        return self._to_evaluate(self.examples.test(batch_size=self.batch_size))

    def _to_evaluate(self, examples):
        return devices.sharded(examples.map(self._one_hot))

    def _one_hot(self, images, labels):
        return images, tf.one_hot(labels, self.examples.recipe.num_classes)

    def _smoothed(self, images, labels):
        images, targets = self._one_hot(images, labels)
        smoothing = self.label_smoothing
        classes = self.examples.recipe.num_classes
        return images, targets * (1 - smoothing) + smoothing / classes
