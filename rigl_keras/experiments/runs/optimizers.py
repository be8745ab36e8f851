"""The optimizer of the report, and its learning rates."""

from typing import Any

import keras
import tensorflow as tf

__all__ = ["WarmUpAndSteps", "sgd"]


@keras.saving.register_keras_serializable("rigl_keras")
class WarmUpAndSteps(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly, then falls in steps.

    With W the warm-up:

        t < W:   learning_rate x t / W
        t >= W:  learning_rate x decay_factor ^ floor((t - W) / decay_every)

    The report's code, utils/warmup_scheduler.py and utils/train_helper.py:52.

    Args:
        learning_rate: Rate after the warm-up, positive.
        decay_factor: Factor at each fall, positive.
        decay_every: Steps from one fall to the next. None: no fall.
        warmup_steps: W, at least 0.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        learning_rate: float,
        decay_factor: float,
        decay_every: int | None,
        warmup_steps: int,
    ):
        for name, value in (
            ("learning_rate", learning_rate),
            ("decay_factor", decay_factor),
            ("decay_every", 1 if decay_every is None else decay_every),
        ):
            if not value > 0:
                raise ValueError(
                    f"{name} must be positive. Received: {name}={value!r}."
                )
        if warmup_steps < 0:
            raise ValueError(
                "warmup_steps must be at least 0. Received: "
                f"warmup_steps={warmup_steps!r}."
            )
        self.learning_rate = learning_rate
        self.decay_factor = decay_factor
        self.decay_every = decay_every
        self.warmup_steps = warmup_steps

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        rate = tf.constant(self.learning_rate, tf.float32)
        if self.decay_every is not None:
            falls = tf.floor((step - self.warmup_steps) / self.decay_every)
            rate *= self.decay_factor ** tf.maximum(falls, 0.0)
        if self.warmup_steps:
            rate *= tf.minimum(step / self.warmup_steps, 1.0)
        return rate

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "decay_factor": self.decay_factor,
            "decay_every": self.decay_every,
            "warmup_steps": self.warmup_steps,
        }


def sgd(
    *,
    learning_rate: float = 0.1,
    decay_factor: float = 0.2,
    decay_every: int | None = 30_000,
    warmup_steps: int = 0,
    momentum: float = 0.9,
    nesterov: bool = True,
    length: float = 1.0,
) -> keras.Optimizer:
    """Returns SGD whose learning rate falls in steps, as in the report.

    Args:
        learning_rate: Rate at the start, or after the warm-up, positive.
        decay_factor: Factor at each fall, positive.
        decay_every: Steps from one fall to the next. None: constant rate.
        warmup_steps: Steps in which the rate rises from 0, at least 0.
        momentum: Momentum, in [0, 1].
        nesterov: Whether Nesterov's momentum is used.
        length: Factor on `decay_every`, for runs that are longer.

    Returns:
        A Keras optimizer, with `WarmUpAndSteps` as its learning rate.
    """
    # Any: Keras annotates rates as numbers, and takes schedules, too.
    schedule: Any = WarmUpAndSteps(
        learning_rate=learning_rate,
        decay_factor=decay_factor,
        decay_every=decay_every and int(decay_every * length),
        warmup_steps=warmup_steps,
    )
    return keras.optimizers.SGD(schedule, momentum=momentum, nesterov=nesterov)
