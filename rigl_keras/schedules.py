"""When masks change, and by how much.

Steps are optimizer steps, counted from 0: step t is the one taken when
`optimizer.iterations` is t. Every function works on Python numbers and on
tensors alike.
"""

import math

import tensorflow as tf

from rigl_keras.conventions import ORIGINAL, Conventions

__all__ = [
    "DECAYS",
    "is_update_step",
    "last_update_step",
    "planned_updates",
    "decayed_drop_fraction",
]

DECAYS = ("cosine", "constant", "linear", "polynomial")


def is_update_step(
    step,
    *,
    frequency: int,
    begin_step: int,
    end_step: int,
    conventions: Conventions = ORIGINAL,
):
    """Returns whether the masks change at `step`.

    True when t mod frequency = 0, t > 0 and begin_step <= t <= end_step.
    Evci et al., 2020, Algorithm 1; `REPORT` tests t + 1 for the multiple and
    leaves `end_step` out.

    Args:
        step: Optimizer step t, an int or an integer tensor.
        frequency: Steps from one update to the next, at least 1.
        begin_step: First step at which an update may happen.
        end_step: Last step at which an update may happen.
        conventions: `first_update` and `end_is_included` apply.

    Returns:
        A bool, or a bool tensor where `step` is a tensor.

    Example:

    >>> window = dict(frequency=10, begin_step=0, end_step=30)
    >>> [t for t in range(50) if is_update_step(t, **window)]
    [10, 20, 30]
    """
    counted = step + _ahead(conventions)
    last = last_update_step(end_step, conventions=conventions)
    return (
        (counted % frequency == 0)
        & (step > 0)
        & (step >= begin_step)
        & (step <= last)
    )


def last_update_step(
    end_step: int, *, conventions: Conventions = ORIGINAL
) -> int:
    """Returns the last step at which an update may happen.

    Args:
        end_step: The end of the update window.
        conventions: `end_is_included` decides.

    Returns:
        `end_step`, or `end_step - 1` where the end is left out.
    """
    return end_step if conventions.end_is_included else end_step - 1


def planned_updates(
    first_step: int,
    steps: int,
    *,
    frequency: int,
    begin_step: int,
    end_step: int,
    conventions: Conventions = ORIGINAL,
) -> int:
    """Returns how many updates fall on `steps` steps from `first_step` on.

    Args:
        first_step: First step of the run.
        steps: Number of steps of the run.
        frequency: Steps from one update to the next.
        begin_step: First step at which an update may happen.
        end_step: Last step at which an update may happen.
        conventions: As in `is_update_step`.

    Returns:
        The number of steps for which `is_update_step` holds.

    Example:

    >>> planned_updates(0, 25, frequency=10, begin_step=0, end_step=99)
    2
    """
    ahead = _ahead(conventions)
    first = max(first_step, begin_step, 1)
    last = min(
        first_step + steps - 1,
        last_update_step(end_step, conventions=conventions),
    )
    if last < first:
        return 0
    return (last + ahead) // frequency - (first - 1 + ahead) // frequency


def decayed_drop_fraction(
    step,
    *,
    drop_fraction: float,
    begin_step: int,
    end_step: int,
    decay: str = "cosine",
    decay_power: float = 3.0,
    conventions: Conventions = ORIGINAL,
) -> tf.Tensor:
    """Returns the fraction of active connections that an update drops.

    With x = (t - begin_step) / (end_step - begin_step), cut to [0, 1]:

        cosine:     drop_fraction / 2 (1 + cos(pi x))
        constant:   drop_fraction
        linear:     drop_fraction (1 - x)
        polynomial: drop_fraction (1 - x) ^ decay_power

    Cosine: Evci et al., 2020, section 3, update schedule (alpha is
    `drop_fraction`, T_end is `end_step`). Polynomial is the authors'
    `exponential` decay. Both references measure x from step 0 even where
    `begin_step` is later; here it starts where updates start, so that the
    first update drops the full fraction.

    Args:
        step: Optimizer step t, an int or an integer tensor.
        drop_fraction: Fraction at the start, in [0, 1].
        begin_step: Step at which the decay starts.
        end_step: Step at which the decay ends.
        decay: One of `DECAYS`.
        decay_power: Exponent of the polynomial decay, positive.
        conventions: With `drop_fraction_lag` 1 the value is that of the step
            before.

    Returns:
        A float64 scalar tensor in [0, drop_fraction]. Double, because the
        count n x fraction is rounded and must not depend on float32.

    Example:

    >>> float(decayed_drop_fraction(
    ...     50, drop_fraction=0.3, begin_step=0, end_step=100))
    0.15
    """
    step = tf.cast(step, tf.float64) - conventions.drop_fraction_lag
    length = max(end_step - begin_step, 1)
    x = tf.clip_by_value((step - begin_step) / length, 0.0, 1.0)
    if decay == "cosine":
        factor = (1 + tf.cos(math.pi * x)) / 2
    elif decay == "constant":
        factor = tf.ones_like(x)
    elif decay == "linear":
        factor = 1 - x
    elif decay == "polynomial":
        factor = (1 - x) ** decay_power
    else:
        raise ValueError(
            f"decay must be one of {DECAYS}. Received: decay={decay!r}."
        )
    return drop_fraction * factor


def _ahead(conventions):
    return 1 if conventions.first_update == "frequency_minus_one" else 0
