"""AC/DC: training that alternates between sparse and dense phases."""

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import keras
import tensorflow as tf

from rigl_keras import _checks, schedules
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.masking.masked import KernelMask
from rigl_keras.methods.pruning import largest
from rigl_keras.training import optimizer_state
from rigl_keras.training.fit_runs import warn_of_no_update
from rigl_keras.training.step_update import StepUpdate

__all__ = ["ACDC"]

# Shares of the run, from the authors' 100 epochs on ImageNet.
_SHARES = (
    *(0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45),
    *(0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.85),
)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class ACDC(StepUpdate):
    """Alternately compresses and decompresses the network.

    Start with `sparsify(model, density=1.0)`. There are three phases:

    1. Dense: all masks are 1.
    2. Compressed: the round(density x weights) weights of largest magnitude,
       over all masked layers together, are kept and trained.
    3. Decompressed: all masks are 1 again. Pruned weights restart at zero, as
       does their optimizer memory.

    Phases 2 and 3 alternate; the last phase is compressed. Peste et al., 2021,
    AC/DC: alternating compressed/decompressed training of deep neural networks,
    arXiv:2106.12379, Algorithm 1. As with every update here, a change of phase
    replaces an optimizer step. The authors' code changes between two epochs,
    and keeps the momentum of pruned weights or, with a flag, resets all
    momentum.

    FLOPs: the mean over phases; dense phases cost as much as the dense model. A
    checkpoint with the best accuracy may be from a dense phase: keep those of
    the last phase.

    Args:
        density: Fraction of the masked weights kept when compressed, in
            (0, 1].
        switch_steps: Steps at which the phase changes: compressed at the first,
            dense at the second, and so on. An odd number of increasing steps,
            counted from the beginning of the run. None: the paper's for
            ImageNet, at 10, 15, 20, ..., 70, 75 and 85 percent of the run.
        conventions: With `update_replaces_step=False` a change of phase
            follows the step.

    Raises:
        ValueError: The density or the steps are out of range, or the length of
            the run is needed but unknown.
        UserWarning: The run has no change of phase.

    Example:

    >>> model = sparsify(model, density=1.0)
    >>> model.fit(train, epochs=100, callbacks=[ACDC(density=0.1)])
    """

    # As of `MagnitudePruning`: the weights of all layers compete.
    scope: ClassVar[str] = "global"

    density: float
    switch_steps: Sequence[int] | None = None
    conventions: Conventions = ORIGINAL

    dense_gradients = "never"

    def __post_init__(self):
        super().__init__(conventions=self.conventions)
        self.density = _checks.number(
            "density",
            self.density,
            above=0,
            at_most=1,
            rule="must be in (0, 1]",
        )
        self._switches = ()  # until a run is planned
        if self.switch_steps is not None:
            self._switches = self.switch_steps = _checked(self.switch_steps)

    def get_config(self) -> dict:
        """Returns the arguments that make an equal callback."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields}

    def lengthened(self, factor: float) -> "ACDC":
        longer = copy.copy(self)
        if self.switch_steps is not None:
            longer.switch_steps = tuple(
                schedules.lengthened(step, factor) for step in self.switch_steps
            )
        longer.__post_init__()  # without the state of an earlier run
        return longer

    def planned_density(self, step: int, steps: int, density: float) -> float:
        """Returns the density that a run will have at a step.

        Args:
            step: The step, from 0.
            steps: Number of steps of the run.
            density: Density at the start.
        """
        switches = self.switch_steps or [round(s * steps) for s in _SHARES]
        passed = sum(step > switch for switch in switches)
        return self.density if passed % 2 else (1.0 if passed else density)

    @property
    def _measures_the_run(self):
        return self.switch_steps is None

    def plan(self, epoch: int, epochs: int | None, steps: int | None) -> None:
        if self.switch_steps is None:
            if not steps or not epochs:
                raise ValueError(
                    "ACDC(switch_steps=None) divides the run into phases, but "
                    "the length of this run is unknown. Pass steps_per_epoch "
                    "to fit, or switch_steps to ACDC."
                )
            each = optimizer_state.batches_per_step(self.optimizer)
            whole = epochs * steps // each
            self._switches = _checked([round(s * whole) for s in _SHARES])
        if steps and epochs:
            first = self.trajectory[0][0] - self.run_start
            left = self.steps_in((epochs - epoch) * steps)
            if not any(first <= t < first + left for t in self._switches):
                warn_of_no_update(
                    self.name,
                    left,
                    first,
                    f"phases change at {self._switches}",
                )

    def is_due(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        step = tf.cast(step - self.run_start, tf.int64)
        return tf.reduce_any(
            tf.equal(step, tf.constant(self._switches, tf.int64))
        )

    def change_masks(
        self,
        optimizer: keras.Optimizer,
        layers: list[KernelMask],
        gradients: list[tf.Tensor],
        step: tf.Tensor,
    ) -> tf.Tensor:
        compresses = tf.constant(self._switches[::2], tf.int64)
        now = tf.reduce_any(tf.equal(step - self.run_start, compresses))
        density = tf.where(now, tf.constant(self.density, tf.float64), 1.0)
        counts = [
            self.set_kernel_and_mask(
                optimizer,
                layer,
                stays,
                stays & tf.logical_not(layer.mask.value),
            )
            for layer, stays in zip(
                layers,
                largest(layers, density, scope=self.scope, among_all=True),
                strict=True,
            )
        ]
        return tf.add_n(counts)


def _checked(received):
    if not isinstance(received, Iterable):
        raise ValueError(
            "switch_steps must be a list of steps. Received: "
            f"switch_steps={received!r}."
        )
    steps = tuple(
        _checks.integer("A switch step", step, at_least=0) for step in received
    )
    increase = all(a < b for a, b in zip(steps, steps[1:], strict=False))
    if not increase or len(steps) % 2 == 0:
        raise ValueError(
            "switch_steps must be an odd number of increasing steps, so "
            "that the last phase is compressed. Received: switch_steps="
            f"{steps}. In a short run, pass fewer of them."
        )
    return steps
