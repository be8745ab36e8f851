"""The batches of a text: windows of characters, and the next characters."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np
import tensorflow as tf

from rigl_keras.experiments.data.augmentation import ALGORITHM
from rigl_keras.experiments.data.batches import (
    check_epochs,
    epoch_keys,
    in_epochs,
    on_host,
)
from rigl_keras.experiments.data.recipes import TextRecipe, check_integer
from rigl_keras.experiments.data.text import encoded

__all__ = ["Text"]

# Stubs know little of its stateless functions.
_random: Any = tf.random


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Text:
    """A text in memory, in three parts by position, and its batches.

    An example is a window of `recipe.context` characters and, as labels, the
    same window shifted by one character. The text is cut, from its beginning,
    into parts for training, validation and test.

    Args:
        recipe: How it is split.
        characters: The whole text.

    Raises:
        ValueError: The text is too short for these parts.
    """

    recipe: TextRecipe
    characters: str

    def __post_init__(self) -> None:
        _ = self.recipe.training_examples(len(self.characters))

    def __repr__(self) -> str:
        return (
            f"Text({self.recipe.name!r}: {len(self.characters)} characters, "
            f"{self.training_examples} training windows of "
            f"{self.recipe.context})"
        )

    @property
    def training_examples(self) -> int:
        """The number of windows in an epoch."""
        return self.recipe.training_examples(len(self.characters))

    @property
    def _windows(self) -> int:
        """The number of windows that an epoch can choose from."""
        return self.recipe.windows(len(self.characters))

    @property
    def about(self) -> dict[str, object]:
        """What distinguishes this text from that of another Python."""
        return {
            "characters": len(self.characters),
            "sha256": hashlib.sha256(self.characters.encode()).hexdigest(),
        }

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of batches in an epoch, with the last, short one.

        Args:
            batch_size: Windows per batch, >= 1.

        Raises:
            ValueError: If batch_size is not an integer >= 1.
        """
        check_integer("batch_size", batch_size, at_least=1)
        return math.ceil(self.training_examples / batch_size)

    def first_inputs(self, count: int) -> np.ndarray:
        """Returns the first inputs of a model.

        Args:
            count: Largest number.
        """
        length = self.recipe.context
        windows = min(count, self._windows)
        symbols = encoded(self.characters[: windows * length])
        return symbols.reshape(windows, length).astype(np.int32)

    def train(
        self,
        *,
        batch_size: int,
        seed: int,
        epochs: int,
        first_epoch: int = 0,
    ) -> tf.data.Dataset:
        """Returns the batches of all epochs, one epoch after the other.

        An epoch cuts the text into windows that do not overlap, starting at a
        random one of the first `context` characters. It uses all of them, or
        `recipe.epoch_examples`, in a new order. Start and order depend only on
        seed and epoch, as in `Data.train`.

        Args:
            batch_size, seed, epochs, first_epoch: As in `Data.train`.

        Returns:
            A dataset of (int32 characters, int32 next characters), both of
            shape (batch, context).

        Raises:
            ValueError: An argument is outside its limits.
        """
        steps = self.steps_per_epoch(batch_size)
        check_epochs(seed=seed, first_epoch=first_epoch, epochs=epochs)
        length, count = self.recipe.context, self._windows
        taken = self.training_examples
        part = self._parts()[0]
        (symbols,) = on_host(part)

        def batches_of(epoch: tf.Tensor) -> tf.data.Dataset:
            order_key, start_key = epoch_keys(seed, epoch)
            order = _random.experimental.stateless_shuffle(
                tf.range(count), seed=order_key, alg=ALGORITHM
            )
            start = _random.stateless_uniform(
                [], start_key, 0, length, tf.int32, alg=ALGORITHM
            )

            def batch(step: tf.Tensor) -> tf.Tensor:
                end = tf.minimum((step + 1) * batch_size, taken)
                at = order[step * batch_size : end]
                return start + at * length

            return tf.data.Dataset.range(steps).map(batch)

        return in_epochs(
            batches_of,
            lambda starts: _windows(symbols, starts, length),
            steps=steps,
            first_epoch=first_epoch,
            epochs=epochs,
        )

    def validation(self, *, batch_size: int) -> tf.data.Dataset:
        """Returns the held-out windows once, in order.

        Args:
            batch_size: Windows per batch, >= 1; the last may be short.

        Returns:
            A dataset as from `train`.

        Raises:
            ValueError: If batch_size is not an integer >= 1, or nothing is
                held out.
        """
        if not self.recipe.validation:
            raise ValueError(
                "All characters except the test part are trained on: none are "
                "left for validation. Load the text with validation > 0."
            )
        return self._in_order(self._parts()[1], batch_size)

    def test(self, *, batch_size: int) -> tf.data.Dataset:
        """Returns the windows of the test part once, in order.

        Args, Returns, Raises: As in `validation`.
        """
        return self._in_order(self._parts()[2], batch_size)

    def _parts(self) -> list[np.ndarray]:
        symbols = encoded(self.characters)
        test = len(symbols) - self.recipe.test
        return np.split(symbols, [test - self.recipe.validation, test])

    def _in_order(self, part: np.ndarray, batch_size: int) -> tf.data.Dataset:
        check_integer("batch_size", batch_size, at_least=1)
        length = self.recipe.context
        count = (len(part) - 1) // length
        (symbols,) = on_host(part)

        def windows(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            at = tf.range(
                step * batch_size, tf.minimum((step + 1) * batch_size, count)
            )
            return _windows(symbols, at * length, length)

        dataset = tf.data.Dataset.range(math.ceil(count / batch_size)).map(
            windows, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        return dataset.prefetch(tf.data.AUTOTUNE)


def _windows(
    symbols: tf.Tensor, starts: tf.Tensor, length: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns windows from start positions, and shifted by one."""
    at = tf.cast(starts, tf.int32)[:, None] + tf.range(length + 1)
    taken = tf.cast(tf.gather(symbols, at), tf.int32)
    return taken[:, :-1], taken[:, 1:]
