"""The optimizers of runs, and their learning rate schedules."""

from typing import Any

import keras
import tensorflow as tf

from rigl_keras.schedules import lengthened

__all__ = ["WarmUpAndSteps", "adamw", "sgd"]


@keras.saving.register_keras_serializable("rigl_keras")
class WarmUpAndSteps(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly, then falls in steps.

    With W the warm-up:

        t < W:   learning_rate x t / W
        t >= W:  learning_rate x decay_factor ^ floor((t - W) / decay_every)

    It follows the report's code, utils/warmup_scheduler.py and
    utils/train_helper.py:52.

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
        length: Factor on `decay_every`, for longer runs.

    Returns:
        A Keras optimizer, with `WarmUpAndSteps` as its learning rate.
    """
    # Any: Keras annotates learning rates as numbers, but takes schedules too.
    schedule: Any = WarmUpAndSteps(
        learning_rate=learning_rate,
        decay_factor=decay_factor,
        decay_every=decay_every and lengthened(decay_every, length),
        warmup_steps=warmup_steps,
    )
    return keras.optimizers.SGD(schedule, momentum=momentum, nesterov=nesterov)


# Parameters that are not kernels: biases, layer norms, embeddings, positions.
_NOT_DECAYED = ("bias", "gamma", "beta", "embeddings", "positions")


def adamw(
    *,
    learning_rate: float = 1e-3,
    warmup_steps: int = 100,
    decay_steps: int = 5_000,
    final_fraction: float = 0.1,
    weight_decay: float = 0.1,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    clip_norm: float | None = 1.0,
    length: float = 1.0,
) -> keras.Optimizer:
    """Returns AdamW whose learning rate rises linearly and falls by a cosine.

    With W the warm-up, D the steps of the decay and f the final fraction:

        t < W:       learning_rate x t / W
        W <= t:      learning_rate x (f + (1 - f) (1 + cos(pi s)) / 2),
                     s = min((t - W) / D, 1)

    Weight decay is decoupled from the gradient (Loshchilov and Hutter, 2019,
    arXiv:1711.05101, algorithm 2) and applies to kernels, but not to biases,
    norms and embeddings. What a mask removes stays zero. Gradients are
    clipped by their global norm (Pascanu et al., 2013, arXiv:1211.5063,
    section 3.2); with masks, only active connections count.

    Args:
        learning_rate: Rate after the warm-up, positive.
        warmup_steps: W, at least 0.
        decay_steps: D, at least 1.
        final_fraction: f, in [0, 1].
        weight_decay: Each step removes this share of a weight, times the
            learning rate; at least 0.
        beta_1, beta_2: Decay of the means of gradients and of their squares,
            in [0, 1).
        clip_norm: Largest global norm of the gradients, positive. None: no
            limit.
        length: Factor on `decay_steps`, for longer runs.

    Returns:
        A Keras optimizer.

    Raises:
        ValueError: An argument is out of range.
    """
    for name, value, fits, rule in (
        ("learning_rate", learning_rate, learning_rate > 0, "be positive"),
        ("warmup_steps", warmup_steps, warmup_steps >= 0, "be at least 0"),
        ("decay_steps", decay_steps, decay_steps >= 1, "be at least 1"),
        (
            "final_fraction",
            final_fraction,
            0 <= final_fraction <= 1,
            "be in [0, 1]",
        ),
        ("weight_decay", weight_decay, weight_decay >= 0, "be at least 0"),
        ("beta_1", beta_1, 0 <= beta_1 < 1, "be in [0, 1)"),
        ("beta_2", beta_2, 0 <= beta_2 < 1, "be in [0, 1)"),
        (
            "clip_norm",
            clip_norm,
            clip_norm is None or clip_norm > 0,
            "be positive, or None",
        ),
    ):
        if not fits:
            raise ValueError(f"{name} must {rule}. Received: {name}={value!r}.")
    # Any: Keras annotates learning rates as numbers, but takes schedules too.
    schedule: Any = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else learning_rate,
        max(1, lengthened(decay_steps, length)),
        alpha=final_fraction,
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
    clipped: Any = clip_norm
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=weight_decay,
        beta_1=beta_1,
        beta_2=beta_2,
        global_clipnorm=clipped,
    )
    optimizer.exclude_from_weight_decay(var_names=list(_NOT_DECAYED))
    return optimizer
