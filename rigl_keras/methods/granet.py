"""GraNet: drop and grow with a falling density."""

import copy
import dataclasses
from typing import Any, ClassVar

import keras
import tensorflow as tf

from rigl_keras import _checks, schedules
from rigl_keras._warn import warn
from rigl_keras.masking.masked import KernelMask
from rigl_keras.methods.mask_update import MaskUpdate
from rigl_keras.methods.pruning import largest, warn_of_sparser_masks
from rigl_keras.methods.rigl import RigL

__all__ = ["GraNet"]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class GraNet(RigL):
    """RigL with masks that become sparser until the middle of the run.

    Start with `sparsify(model, density=0.5)`, or with 1.0 for the paper's
    dense-to-sparse variant. At an update:

    1. While t is at most `prune_end_step`, the round(d_t x weights) connections
       of largest magnitude stay, over all masked layers together. With x =
       (t - prune_begin_step) / (prune_end_step - prune_begin_step), clipped to
       [0, 1]: d_t = d_f + (d_i - d_f) (1 - x)^3, where d_i and d_f are
       `initial_density` and `final_density`.
    2. Each layer drops the fraction p of its connections, those of smallest
       magnitude, and grows as many with the largest gradients. Connections that
       were just pruned or dropped may grow. p falls from `drop_fraction` to
       `final_drop_fraction` by a cosine over the whole run.

    Liu et al., 2021, Sparse training via boosting pruning plasticity with
    neuroregeneration, arXiv:2106.10404, section 4. Defaults are those of the
    authors' CIFAR code. That code steps first and updates then (here
    `Conventions(update_replaces_step=False)`), rounds counts up
    (`drop_rounding="ceil"`), and skips the last pruning of the cubic: its
    density ends a little above `final_density`. Here, an update at or after
    `prune_end_step` reaches it.

    A layer that the global threshold empties never grows again.

    Args:
        final_density: Fraction of the masked weights kept at the end, in (0,
            1].
        initial_density: Density at which the ramp starts. Sparser masks stay
            the same until the ramp reaches their density.
        prune_begin_step: Step t at which the ramp starts.
        prune_end_step: Later step at which it ends. None: half of the run.
        others: As in `MaskUpdate`; updates continue to the end of the run.

    Raises:
        ValueError: As in `MaskUpdate`, or a density or step is out of range.
        UserWarning: The run has no update, or none that prunes.

    Example:

    >>> model = sparsify(model, density=0.5)
    >>> model.fit(train, epochs=160, callbacks=[GraNet(final_density=0.1)])
    """

    # As of `MagnitudePruning`: the weights of all layers compete.
    scope: ClassVar[str] = "global"

    final_density: float
    initial_density: float = 0.5
    prune_begin_step: int = 0
    prune_end_step: int | None = None
    frequency: int = 1000
    drop_fraction: float = 0.5
    final_drop_fraction: float = 0.005

    end_share = 1.0
    _prunes = True

    def __post_init__(self):
        super().__post_init__()
        self._ramp: Any = None  # set when a run is planned
        self.prune_begin_step = _checks.integer(
            "prune_begin_step", self.prune_begin_step, at_least=0
        )
        last = self.prune_begin_step + 1
        if self.prune_end_step is not None:
            last = self.prune_end_step = _checks.integer(
                "prune_end_step",
                self.prune_end_step,
                at_least=last,
                rule=f"must be an int above prune_begin_step="
                f"{self.prune_begin_step}",
            )
        made = self._ramp_until(last)
        self.final_density = made.final_density
        self.initial_density = made.initial_density

    def _ramp_until(self, end_step):
        return schedules.SparsityRamp(
            final_density=self.final_density,
            initial_density=self.initial_density,
            begin_step=self.prune_begin_step,
            end_step=end_step,
            frequency=self.frequency,
        )

    def lengthened(self, factor: float) -> MaskUpdate:
        longer = copy.copy(self)
        if self.prune_end_step is not None:
            longer.prune_end_step = schedules.lengthened(
                self.prune_end_step, factor
            )
        return super(GraNet, longer).lengthened(factor)

    def plan(self, epoch: int, epochs: int | None, steps: int | None) -> None:
        super().plan(epoch, epochs, steps)
        last = self.prune_end_step
        if last is None:
            last = self.step_at(0.5, epochs, steps, "prune_end_step")
        self._ramp = self._ramp_until(max(last, self.prune_begin_step + 1))
        self._warn_of_a_high_density()
        warn_of_sparser_masks(self, self.final_density)

    def _warn_of_a_high_density(self):
        """Warns if no update comes late enough in a run of any length."""
        window = self._window
        before = self._attached.steps_before
        update = self.last_update(
            window["begin_step"] + before, window["end_step"] + before + 1
        )
        if update is None:
            return  # `MaskUpdate` warns about this
        update -= before + self.run_start
        with tf.init_scope():  # a user's loop may be tracing
            density = 1 - float(self._ramp.sparsity(update))
        if density > self.final_density + 1e-6:
            warn(
                f"GraNet ends at density {density:.4g}, not at final_density="
                f"{self.final_density}: its last update comes "
                f"{update} steps into the run, before "
                f"prune_end_step={self._ramp.end_step}. Lower frequency or "
                "prune_end_step.",
            )

    def planned_density(self, step: int, steps: int, density: float) -> float:
        """Returns the density that a run will have at a step.

        Args:
            step: The step, from 0.
            steps: Number of steps of the run.
            density: Density at the start.
        """
        last = self.prune_end_step
        ramp = self._ramp_until(
            max(steps // 2 if last is None else last, self.prune_begin_step + 1)
        )
        update = (step - 1) // self.frequency * self.frequency
        if update < max(self.begin_step, 1):
            return density
        return min(density, 1 - float(ramp.sparsity(update)))

    def before_drop(
        self,
        optimizer: keras.Optimizer,
        layers: list[KernelMask],
        step: tf.Tensor,
    ) -> None:
        density = 1 - self._ramp.sparsity(step - self.run_start)
        for layer, stays in zip(
            layers, largest(layers, density, scope=self.scope), strict=True
        ):
            nothing = tf.zeros_like(stays)
            self.set_kernel_and_mask(optimizer, layer, stays, nothing)
