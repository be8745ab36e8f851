"""MEST: random growth, and a soft bound on the connections in memory."""

import dataclasses
import math
from typing import cast

import tensorflow as tf

from rigl_keras import _checks, schedules, scores
from rigl_keras.masking.masked import KernelMask
from rigl_keras.methods.first_counts import FirstCounts, unit_count

__all__ = ["MEST"]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class MEST(FirstCounts):
    """Drops by |w| + lambda |dL/dw| and grows at random.

    A layer has N entries, n of them active at the start, and k = round(N p_t).
    An update

    - under the hard bound (MEST+EM) drops the k of lowest score and grows k;
    - under the soft bound (MEST+EM&S) drops to n and grows k, so that the layer
      has n + k connections until the next update.

    p_t is a fraction of all entries, not of the active ones. It is
    `drop_fraction` until three quarters of the window (`end_step`), half of it
    until the end of the window, and then 0, which brings the soft bound back to
    n. Growth is uniform among the inactive entries, including those just
    dropped. Yuan et al., 2021, MEST: accurate and fast memory-economic sparse
    training framework on the edge, arXiv:2110.14032, section 3.

    Defaults are those of the authors' code for ResNet-32 on CIFAR: p is 0.05
    for the soft bound and 0.02 for the hard one, with updates every 5 epochs of
    781 batches until epoch 120 of 160. In that code lambda is 0, although the
    paper's score has the gradient; connections that are dropped and grown keep
    their momentum; and the first update comes before the first step, while here
    t > 0.

    Args:
        soft: Whether the bound is soft. It is hard if a pattern fixes the
            number of connections of a layer, such as 2:4.
        gradient_weight: lambda, at least 0. The gradient is that of the
            update's batch at active connections. It is never dense.
        drop_fraction: p at the start, in [0, 1]. None: 0.05 for the soft bound,
            0.02 for the hard one.
        others: As in `MaskUpdate`.

    Raises:
        ValueError: As in `MaskUpdate`, or an argument is out of range.

    Example:

    >>> model.fit(train, epochs=160, callbacks=[MEST(frequency=1_760)])
    """

    soft: bool = True
    gradient_weight: float = 0.0
    frequency: int = 3905
    drop_fraction: float | None = None
    decay: str = "steps"

    dense_gradients = "never"

    def __post_init__(self):
        self.soft = _checks.boolean("soft", self.soft)
        self.gradient_weight = _checks.number(
            "gradient_weight",
            self.gradient_weight,
            at_least=0,
            rule="must be at least 0",
        )
        if self.drop_fraction is None:
            self.drop_fraction = 0.05 if self.soft else 0.02
        super().__post_init__()

    def is_due(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        due = super().is_due(step)
        if not self.soft:
            return due
        # The last update brings layers back to their bound.
        return due | (step == self._window["end_step"])

    def is_gathered(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        gathered = super().is_gathered(step)
        if not self.soft:
            return gathered
        ahead = self._window["end_step"] - step
        return gathered | ((ahead >= 0) & (ahead < self.gradient_batches))

    def planned_density(self, step: int, steps: int, density: float) -> float:
        """Returns the density that a run will have at a step.

        Args:
            step: The step, from 0.
            steps: Number of steps of the run.
            density: Density at the start.
        """
        last = self.end_step
        if last is None:
            last = int(self.end_share * steps)
        update = (step - 1) // self.frequency * self.frequency
        if not self.soft or update < max(self.begin_step, 1):
            return density
        if step > last:
            update = last
        more = schedules.decayed_drop_fraction(
            update,
            drop_fraction=cast(float, self.drop_fraction),
            begin_step=self.begin_step,
            end_step=last,
            decay=self.decay,
            decay_power=self.decay_power,
            final_drop_fraction=self.final_drop_fraction,
        )
        return min(density + float(more), 1.0)

    # An update.

    def drop_scores(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        score = super().drop_scores(layer, gradient, step)
        if self.gradient_weight == 0:
            return score
        return score + self.gradient_weight * tf.cast(
            self.magnitudes(layer, gradient), score.dtype
        )

    def grow_scores(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        return scores.random(
            layer.kernel.shape, key=layer.draw_key ^ self.seed, step=step
        )

    def _is_soft(self, layer):
        # A pattern such as 2:4 fixes the number in a layer.
        return self.soft and layer.layout.fixed is None

    def layer_fractions(
        self, layers: list[KernelMask], fraction: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor | list[tf.Tensor]:
        self._exchanged = fraction  # for `grow_count`, in the same graph
        return [self._dropped(layer, fraction) for layer in layers]

    def _dropped(self, layer, fraction):
        count = unit_count(layer)
        if self._is_soft(layer):
            dropped = tf.maximum(count - self.first_count(layer), 0)
        else:
            dropped = tf.minimum(_share(layer, fraction), count)
        # In the middle between two counts, for any rounding.
        half = 0.5 if self.conventions.drop_rounding == "floor" else -0.5
        exact = tf.cast(dropped, tf.float64) + half
        part = tf.math.divide_no_nan(exact, tf.cast(count, tf.float64))
        return tf.clip_by_value(part, 0.0, 1.0)

    def grow_count(
        self, layer: KernelMask, dropped: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        soft = self._is_soft(layer)
        return _share(layer, self._exchanged) if soft else dropped


def _share(layer, fraction):
    """Returns a fraction of all units of a layer, an int32 scalar."""
    size = math.prod(layer.layout.unit_shape)
    return tf.cast(tf.round(fraction * size), tf.int32)
