"""The batches of a data set: in order, seeded, and resumable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from rigl_keras.experiments.data.augmentation import ALGORITHM, AUGMENTATIONS
from rigl_keras.experiments.data.recipes import Recipe, check_integer

# Stubs know little of its stateless functions.
_random: Any = tf.random


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A dataset in memory, in three parts, and its batches.

    Images are uint8 (count, height, width, channels), labels int32 (count,).

    Raises:
        ValueError: if the arrays do not have the recipe's shape, are not of
            these types, are empty, or differ in length.
    """

    recipe: Recipe
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            images = getattr(self, f"{split}_images")
            labels = getattr(self, f"{split}_labels")
            count = len(images)
            wanted = (count, *self.recipe.input_shape)
            # Training on all examples leaves none to validate on.
            empty = count == 0 and split != "validation"
            if empty or images.shape != wanted or images.dtype != np.uint8:
                raise ValueError(
                    f"{split}_images of {self.recipe.name!r} must be uint8 of "
                    f"shape (count >= 1, *{self.recipe.input_shape}). "
                    f"Received: {images.dtype} of shape {images.shape}"
                )
            if labels.shape != (count,) or labels.dtype != np.int32:
                raise ValueError(
                    f"{split}_labels of {self.recipe.name!r} must be int32 of "
                    f"shape ({count},), one per image. Received: "
                    f"{labels.dtype} of shape {labels.shape}"
                )

    def __repr__(self) -> str:
        return (
            f"Data({self.recipe.name!r}: {len(self.train_images)} training, "
            f"{len(self.validation_images)} validation, "
            f"{len(self.test_images)} test images of "
            f"{self.recipe.input_shape})"
        )

    @property
    def training_examples(self) -> int:
        """The number of images in an epoch."""
        return len(self.train_images)

    @property
    def about(self) -> dict[str, object]:
        """What distinguishes this copy from others: nothing for images."""
        return {}

    def first_inputs(self, count: int) -> np.ndarray:
        """Returns the first training images, as inputs of a model.

        Args:
            count: Largest number.
        """
        # TensorFlow treats arrays as tensors.
        images: Any = self.train_images[:count]
        return normalise(images, self.recipe).numpy()

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of batches in an epoch, with the last, short one.

        >>> load("digits").steps_per_epoch(128)  # 1,437 / 128 = 11.2
        12

        Args:
            batch_size: examples per batch, >= 1.

        Raises:
            ValueError: if batch_size is not an integer >= 1.
        """
        check_integer("batch_size", batch_size, at_least=1)
        return math.ceil(len(self.train_images) / batch_size)

    def train(
        self,
        *,
        batch_size: int,
        seed: int,
        epochs: int,
        first_epoch: int = 0,
    ) -> tf.data.Dataset:
        """Returns the batches of all epochs, one epoch after the other.

        Every epoch holds each training example once, in a new order, and ends
        with a short batch if batch_size does not divide the count. Order and
        augmentation of an epoch depend only on seed and epoch:
        `train(first_epoch=1, epochs=2, ...)` is the second half of
        `train(epochs=2, ...)`, bit for bit.

        The length is known: `(epochs - first_epoch) * steps_per_epoch`. Pass
        `steps_per_epoch` to `fit`, which otherwise treats all epochs as one,
        and `shuffle=False`, or Keras warns that it won't shuffle a dataset.

        Args:
            batch_size: examples per batch, >= 1.
            seed: of order and augmentation, any 64-bit integer.
            epochs: the epoch to stop before, > first_epoch.
            first_epoch: the epoch to begin with, >= 0, counted from 0.

        Returns:
            A dataset of (float32 images, int32 labels).

        Raises:
            ValueError: if an argument is outside its limits.
        """
        steps = self.steps_per_epoch(batch_size)
        check_epochs(seed=seed, first_epoch=first_epoch, epochs=epochs)
        images, labels = on_host(self.train_images, self.train_labels)
        count = len(self.train_images)
        augment = AUGMENTATIONS[self.recipe.augmentation]

        def batches_of(epoch: tf.Tensor) -> tf.data.Dataset:
            order_key, augment_key = epoch_keys(seed, epoch)
            order = _random.experimental.stateless_shuffle(
                tf.range(count), seed=order_key, alg=ALGORITHM
            )

            def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                start = step * batch_size
                key = _random.fold_in(augment_key, step, alg=ALGORITHM)
                return order[start : start + batch_size], key

            return tf.data.Dataset.range(steps).map(batch)

        def examples(
            indices: tf.Tensor, key: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            batch = augment(tf.gather(images, indices), key)
            return normalise(batch, self.recipe), tf.gather(labels, indices)

        return in_epochs(
            batches_of,
            examples,
            steps=steps,
            first_epoch=first_epoch,
            epochs=epochs,
        )

    def validation(self, *, batch_size: int) -> tf.data.Dataset:
        """Returns the held-out examples once, in order, not augmented.

        Args:
            batch_size: examples per batch, >= 1; the last may be short.

        Returns:
            A dataset of (float32 images, int32 labels).

        Raises:
            ValueError: if batch_size is not an integer >= 1, or nothing is
                held out.
        """
        if not len(self.validation_labels):
            raise ValueError(
                "All examples are trained on: none are left for validation. "
                "Load the dataset with validation > 0."
            )
        return _in_order(
            self.validation_images,
            self.validation_labels,
            batch_size=batch_size,
            recipe=self.recipe,
        )

    def test(self, *, batch_size: int) -> tf.data.Dataset:
        """Returns the test examples once, in order, not augmented.

        Args:
            batch_size: examples per batch, >= 1; the last may be short.

        Returns:
            A dataset of (float32 images, int32 labels).

        Raises:
            ValueError: if batch_size is not an integer >= 1.
        """
        return _in_order(
            self.test_images,
            self.test_labels,
            batch_size=batch_size,
            recipe=self.recipe,
        )


def check_epochs(*, seed: int, first_epoch: int, epochs: int) -> None:
    """Raises ValueError unless these arguments define batches."""
    check_integer("seed", seed, at_least=-(2**63), below=2**63)
    check_integer("first_epoch", first_epoch, at_least=0)
    check_integer("epochs", epochs, at_least=1)
    if epochs <= first_epoch:
        raise ValueError(
            "epochs is the epoch to stop before, not how many to add, and "
            "must be greater than first_epoch. Received: "
            f"epochs={epochs}, first_epoch={first_epoch}. A run with "
            "nothing left to train needs no dataset."
        )


def normalise(images: tf.Tensor, recipe: Recipe) -> tf.Tensor:
    """Returns (images / 255 - mean) / std, in float32.

    >>> white = tf.constant(255, tf.uint8, [1, 28, 28, 1])
    >>> normalise(white, DATASETS["mnist"])[0, 0, 0]  # (1 - .1307) / .3081
    [2.8215]

    Args:
        images: (batch, height, width, channels), in 0..255.
        recipe: its mean and std are used.
    """
    images = tf.cast(images, tf.float32) / 255.0
    return (images - tf.constant(recipe.mean)) / tf.constant(recipe.std)


def in_epochs(
    places_of: Callable[[tf.Tensor], tf.data.Dataset],
    batch: Callable[..., tuple[tf.Tensor, tf.Tensor]],
    *,
    steps: int,
    first_epoch: int,
    epochs: int,
) -> tf.data.Dataset:
    """Returns the batches of several epochs, one epoch after the other.

    Args:
        places_of: Returns which examples each batch of an epoch has.
        batch: Returns the batch of what a dataset of `places_of` yields.
        steps: Batches in an epoch.
        first_epoch: The epoch to begin with.
        epochs: The epoch to stop before.
    """
    dataset = tf.data.Dataset.range(first_epoch, epochs).flat_map(places_of)
    dataset = dataset.map(
        batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    total = (epochs - first_epoch) * steps
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(total))
    return dataset.prefetch(tf.data.AUTOTUNE)


def epoch_keys(seed: int, epoch: tf.Tensor) -> list[tf.Tensor]:
    """Returns the keys of an epoch's order and of its augmentation.

    `fold_in` and `split` hash: unlike with sums of numbers, neighbouring seeds,
    epochs and batches share no stream.
    """
    key = _random.fold_in(
        tf.constant([seed, 0], tf.int64), epoch, alg=ALGORITHM
    )
    return tf.unstack(_random.split(key, 2, alg=ALGORITHM))


def _in_order(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    recipe: Recipe,
) -> tf.data.Dataset:
    check_integer("batch_size", batch_size, at_least=1)
    steps = math.ceil(len(images) / batch_size)
    all_images, all_labels = on_host(images, labels)

    def examples(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        start = step * batch_size
        batch = all_images[start : start + batch_size]
        return (
            normalise(batch, recipe),
            all_labels[start : start + batch_size],
        )

    dataset = tf.data.Dataset.range(steps).map(
        examples, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    return dataset.prefetch(tf.data.AUTOTUNE)


def on_host(*arrays: np.ndarray) -> list[tf.Tensor]:
    # tf.data runs on the CPU: on a GPU the constants would be copied back.
    with tf.device("CPU:0"):
        return [tf.constant(array) for array in arrays]
