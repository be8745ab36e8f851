"""When masks change, and by how much.

Steps are optimizer steps, counted from 0: step t runs when
`optimizer.iterations` is t. Every function accepts Python numbers and tensors.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from rigl_keras._checks import choice, fraction, integer, number
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions

__all__ = [
    "DECAYS",
    "SparsityRamp",
    "checked_final_drop_fraction",
    "decayed_drop_fraction",
    "is_gathered_step",
    "is_update_step",
    "last_update_step",
    "lengthened",
    "planned_sparsity",
    "planned_updates",
]

Step = int | np.ndarray | tf.Tensor | tf.Variable
_POSITIVE = "must be positive"
DECAYS = (
    "cosine",
    "constant",
    "linear",
    "polynomial",
    "exponential",
    "steps",
    "learning_rate",
)


def is_update_step(
    step: Step,
    *,
    frequency: int,
    begin_step: int,
    end_step: int,
    conventions: Conventions = ORIGINAL,
) -> bool | tf.Tensor:
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
        A bool, or a bool tensor if `step` is a tensor.

    Example:

    >>> window = dict(frequency=10, begin_step=0, end_step=30)
    >>> [t for t in range(50) if is_update_step(t, **window)]
    [10, 20, 30]
    """
    t = _checked_step(step)
    frequency = integer("frequency", frequency, at_least=1)
    begin_step = integer("begin_step", begin_step)
    counted = t + _ahead(conventions)
    last = last_update_step(end_step, conventions=conventions)
    return (
        (counted % frequency == 0) & (t > 0) & (t >= begin_step) & (t <= last)
    )


def is_gathered_step(
    step: Step,
    *,
    gradient_batches: int,
    frequency: int,
    begin_step: int,
    end_step: int,
    conventions: Conventions = ORIGINAL,
) -> bool | tf.Tensor:
    """Returns whether `step` is one of the last steps up to an update.

    Args:
        step: Optimizer step t, an int or an integer tensor.
        gradient_batches: Number of steps, the update included, from 1 to
            `frequency`.
        frequency: Steps from one update to the next.
        begin_step: First step at which an update may happen.
        end_step: Last step at which an update may happen.
        conventions: As in `is_update_step`.

    Returns:
        A bool, or a bool tensor if `step` is a tensor.

    Example:

    >>> window = dict(frequency=10, begin_step=0, end_step=20)
    >>> [t for t in range(50)
    ...  if is_gathered_step(t, gradient_batches=3, **window)]
    [8, 9, 10, 18, 19, 20]
    """
    t = _checked_step(step)
    frequency = integer("frequency", frequency, at_least=1)
    ahead = -(t + _ahead(conventions)) % frequency
    due = is_update_step(
        t + ahead,
        frequency=frequency,
        begin_step=begin_step,
        end_step=end_step,
        conventions=conventions,
    )
    return due & (ahead < gradient_batches)


def last_update_step(
    end_step: int, *, conventions: Conventions = ORIGINAL
) -> int:
    """Returns the last step at which an update may happen.

    Args:
        end_step: The end of the update window.
        conventions: `end_is_included` decides.

    Returns:
        `end_step`, or `end_step - 1` if the end is excluded.
    """
    check_conventions(conventions)
    end_step = integer("end_step", end_step)
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
    """Returns the number of updates in `steps` steps from `first_step` on.

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
    first_step = integer("first_step", first_step)
    steps = integer("steps", steps, at_least=0)
    frequency = integer("frequency", frequency, at_least=1)
    begin_step = integer("begin_step", begin_step)
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
    step: Step,
    *,
    drop_fraction: float,
    begin_step: int,
    end_step: int,
    decay: str = "cosine",
    decay_power: float = 3.0,
    final_drop_fraction: float = 0.0,
    rate_ratio: float | tf.Tensor = 1.0,
    conventions: Conventions = ORIGINAL,
) -> tf.Tensor:
    """Returns the fraction of active connections that an update drops.

    With x = (t - begin_step) / (end_step - begin_step), clipped to [0, 1], it
    is final_drop_fraction + (drop_fraction - final_drop_fraction) y, where y is

        cosine:        (1 + cos(pi x)) / 2
        constant:      1
        linear:        1 - x
        polynomial:    (1 - x) ^ decay_power
        exponential:   the same, under the name in the authors' code
        steps:         1 before x = 3/4, 1/2 before x = 1, then 0
        learning_rate: rate_ratio

    Cosine: Evci et al., 2020, section 3, update schedule (alpha is
    `drop_fraction`, T_end is `end_step`). The authors' code
    (sparse_optimizers_base.py:236-254) has `exponential` with a power of 1 and
    `exponential_k` with a power of k. For these it measures x from
    `begin_step`, as here. For the cosine it measures x from step 0: a cosine
    that begins later starts lower there. `learning_rate` is the decay of their
    TensorFlow 2 code (mask_updaters.py, ScaledLRUpdateSchedule). Steps: MEST
    (Yuan et al., 2021, arXiv:2110.14032) halves at epoch 90 and ends at 120.

    Args:
        step: Optimizer step t, an int or an integer tensor.
        drop_fraction: Fraction at the start, in [0, 1].
        begin_step: Step at which the decay starts.
        end_step: Step at which the decay ends.
        decay: One of `DECAYS`.
        decay_power: Exponent of the polynomial decay, positive.
        final_drop_fraction: Fraction at the end, in [0, drop_fraction].
        rate_ratio: The learning rate at the step over the largest so far, a
            number or a scalar, for the decay `learning_rate`. (The authors
            divide by the first rate, which is 0 after a warm-up from 0.)
        conventions: With `drop_fraction_lag` 1 the value is that of the
            previous step.

    Returns:
        A float64 scalar tensor between the two fractions. It is double because
        the count n x fraction is rounded and must not depend on float32.

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> float(decayed_drop_fraction(
    ...     50, drop_fraction=0.3, begin_step=0, end_step=100))
    0.15
    """
    check_conventions(conventions)
    choice("decay", decay, DECAYS)
    drop_fraction = fraction("drop_fraction", drop_fraction)
    decay_power = number("decay_power", decay_power, above=0, rule=_POSITIVE)
    last = checked_final_drop_fraction(final_drop_fraction, drop_fraction)
    begin_step = integer("begin_step", begin_step)
    end_step = integer("end_step", end_step)
    t = tf.cast(_checked_step(step), tf.float64)
    t -= conventions.drop_fraction_lag
    length = max(end_step - begin_step, 1)
    x: Any = tf.clip_by_value((t - begin_step) / length, 0.0, 1.0)
    if decay == "cosine":
        factor = (1 + tf.cos(math.pi * x)) / 2
    elif decay == "constant":
        factor = tf.ones_like(x)
    elif decay == "linear":
        factor = 1 - x
    elif decay == "steps":
        factor = tf.cast(x < 0.75, x.dtype) / 2 + tf.cast(x < 1, x.dtype) / 2
    elif decay == "learning_rate":
        factor = tf.clip_by_value(tf.cast(rate_ratio, x.dtype), 0.0, 1.0)
    else:
        factor = (1 - x) ** decay_power
    return last + (drop_fraction - last) * factor


def checked_final_drop_fraction(value: float, drop_fraction: float) -> float:
    """Returns the final value of a drop fraction, as a float.

    Args:
        value: What was received.
        drop_fraction: The initial value, in [0, 1].

    Raises:
        ValueError: It is not in [0, drop_fraction].
    """
    return number(
        "final_drop_fraction",
        value,
        at_least=0,
        at_most=drop_fraction,
        rule="is what drop_fraction falls to and must be in "
        f"[0, drop_fraction={drop_fraction}]",
    )


def lengthened(count: int, factor: float) -> int:
    """Returns the steps or epochs of a run that is `factor` times as long.

    The product is rounded down, except for rounding errors: 90 epochs times 0.7
    are 63, though `90 * 0.7` is 62.99999999999999.

    Args:
        count: Steps or epochs.
        factor: Positive number.
    """
    return math.floor(round(count * factor, 6))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityRamp:
    """A cubic rise of sparsity, for gradual magnitude pruning.

    With s_i = 1 - initial_density, s_f = 1 - final_density and x =
    (t - begin_step) / (end_step - begin_step), clipped to [0, 1]:

        s_t = s_f + (s_i - s_f) (1 - x) ^ power

    Weights are pruned at t = begin_step + k x frequency and at end_step, so any
    frequency reaches the final density. Zhu and Gupta, 2018, arXiv:1710.01878,
    section 3.

    A call with a step returns `(due, sparsity)`, as a
    `tfmot.sparsity.keras.PruningSchedule` does.

    Args:
        final_density: Fraction of the weights kept at the end, in (0, 1].
        begin_step: First optimizer step at which weights are pruned.
        end_step: Last such step, greater than `begin_step`.
        frequency: Steps from one pruning to the next, at least 1.
        initial_density: Fraction kept at `begin_step`, not below the final.
        power: Exponent, positive. The paper's is 3.

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> ramp = SparsityRamp(final_density=0.2, begin_step=0, end_step=100)
    >>> float(ramp.sparsity(50))  # 0.8 - 0.8 / 8
    0.7
    """

    final_density: float
    begin_step: int
    end_step: int
    frequency: int = 100
    initial_density: float = 1.0
    power: float = 3.0

    def __post_init__(self):
        rule = "counts optimizer steps and must be an int"
        smallest = {"begin_step": 0, "end_step": 1, "frequency": 1}
        for name, least in smallest.items():
            value = integer(
                name,
                getattr(self, name),
                at_least=least,
                rule=f"{rule} of at least {least}",
            )
            object.__setattr__(self, name, value)
        for name in ("final_density", "initial_density"):
            value = fraction(name, getattr(self, name))
            object.__setattr__(self, name, value)
        power = number("power", self.power, above=0, rule=_POSITIVE)
        object.__setattr__(self, "power", power)
        if self.begin_step >= self.end_step:
            raise ValueError(
                "A ramp needs begin_step < end_step. Received: "
                f"begin_step={self.begin_step}, end_step={self.end_step}."
            )
        if not 0 < self.final_density <= self.initial_density:
            raise ValueError(
                "Densities are fractions of weights kept, and a ramp needs "
                "0 < final_density <= initial_density <= 1. Received: "
                f"final_density={self.final_density!r}, "
                f"initial_density={self.initial_density!r}."
            )

    def __call__(self, step):
        """Returns whether to prune at `step`, and the sparsity to reach."""
        step = _checked_step(step)
        turn = (step - self.begin_step) % self.frequency == 0
        due = (
            (turn | (step == self.end_step))
            & (step >= self.begin_step)
            & (step <= self.end_step)
        )
        return due, self.sparsity(step)

    def sparsity(self, step: Step) -> tf.Tensor:
        """Returns s_t, a float64 scalar in [0, 1)."""
        t: Any = tf.cast(_checked_step(step), tf.float64)
        x = (t - self.begin_step) / (self.end_step - self.begin_step)
        left = (1 - tf.clip_by_value(x, 0.0, 1.0)) ** self.power
        return (1 - self.final_density) - (
            self.initial_density - self.final_density
        ) * left

    def lengthened(self, factor: float) -> "SparsityRamp":
        """Returns the ramp of a run that is `factor` times as long."""
        factor = number("factor", factor, above=0, rule=_POSITIVE)
        return dataclasses.replace(
            self, end_step=lengthened(self.end_step, factor)
        )


def planned_sparsity(
    schedule: Callable[..., tuple],
    step: Step,
    *,
    conventions: Conventions = ORIGINAL,
) -> tuple:
    """Returns whether a schedule prunes at a step, and its sparsity.

    Args:
        schedule: A `SparsityRamp`, or any callable `step -> (due, sparsity)`,
            such as a `tfmot.sparsity.keras.PruningSchedule`. The conventions
            apply to ramps only.
        step: Optimizer step t, an int or an integer tensor.
        conventions: Under `REPORT` a ramp prunes when `is_update_step` holds,
            to the sparsity of the previous step.

    Returns:
        `(due, sparsity)`, a bool and a float, or tensors of these.
    """
    check_conventions(conventions)
    if not callable(schedule):
        raise ValueError(
            "schedule must be a SparsityRamp or a callable `step -> (due, "
            f"sparsity)`. Received: schedule={schedule!r}."
        )
    asked_as_is = not isinstance(schedule, SparsityRamp)
    if asked_as_is or conventions.first_update == "frequency":
        planned = schedule(step)
        if not isinstance(planned, tuple | list) or len(planned) != 2:
            raise ValueError(
                "schedule must return (due, sparsity) for a step. Received: "
                f"schedule={schedule!r}, which returns {planned!r}."
            )
        return tuple(planned)
    due = is_update_step(
        step,
        frequency=schedule.frequency,
        begin_step=schedule.begin_step,
        end_step=schedule.end_step,
        conventions=conventions,
    )
    return due, schedule.sparsity(step - conventions.drop_fraction_lag)


def _checked_step(step: Step) -> Any:
    """Returns a step as an int or int64 tensor, or several unchanged."""
    if isinstance(step, np.ndarray) and np.issubdtype(step.dtype, np.integer):
        return step
    if isinstance(step, tf.Variable):
        step = tf.convert_to_tensor(step)
    if not isinstance(step, tf.Tensor):
        return integer("step", step)
    if not step.dtype.is_integer:
        raise ValueError(
            "step must be an int or an integer tensor. Received: "
            f"step={step!r}."
        )
    return tf.cast(step, tf.int64)


def _ahead(conventions):
    check_conventions(conventions)
    return 1 if conventions.first_update == "frequency_minus_one" else 0
