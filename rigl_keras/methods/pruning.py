"""Gradual magnitude pruning (Zhu and Gupta, 2018)."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from rigl_keras import _checks, ranking, schedules, scores
from rigl_keras._warn import warn
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.masking.masked import KernelMask
from rigl_keras.training.fit_runs import warn_of_no_update
from rigl_keras.training.step_update import StepUpdate

__all__ = ["MagnitudePruning", "largest", "warn_of_sparser_masks"]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class MagnitudePruning(StepUpdate):
    """Removes the smallest weights as sparsity rises by a schedule.

    Start with `sparsify(model, density=1.0)`. When the schedule is due with a
    sparsity s, the round((1 - s) x weights) connections of largest magnitude
    stay, over all masked layers together or in each layer. For whole kernels
    and blocks, as many stay as fit into that number. Removed connections never
    return. Zhu and Gupta, 2018, To prune, or not to prune, arXiv:1710.01878.

    Groups with separate numbers (`patterns`) each keep their highest weights:
    with `FanIn`, the number for every unit that is nearest to what the layer
    would keep; with `NM(n, m)`, round((1 - s) m), but never fewer than n, for
    both scopes.

    Like the updates of every method, pruning replaces an optimizer step. With
    `update_replaces_step=False` in the conventions it follows one, as in the
    authors' code.

    Args:
        schedule: A `schedules.SparsityRamp`, or a
            `tfmot.sparsity.keras.PruningSchedule`: any callable `step -> (due,
            sparsity)`. Steps count from the beginning of the run
            (`StepUpdate`).
        scope: `"global"`: one threshold for all layers, as in the report.
            `"layer"`: the same sparsity for each layer, which keeps at least
            one weight.
        conventions: Under `REPORT`, ramps are read as in the reproduction.

    Raises:
        ValueError: The schedule cannot be called, the scope is unknown, a ramp
            does not end at a pattern's density, or as in `StepUpdate`.
        UserWarning: The schedule is never due in the run.

    Example:

    >>> ramp = SparsityRamp(final_density=0.1, begin_step=700, end_step=65_918)
    >>> model.fit(train, epochs=250, callbacks=[MagnitudePruning(ramp)])
    """

    schedule: Callable = dataclasses.field(kw_only=False)
    scope: str = "global"
    conventions: Conventions = ORIGINAL

    dense_gradients = "never"

    def __post_init__(self):
        super().__init__(conventions=self.conventions)
        if not callable(self.schedule):
            raise ValueError(
                "schedule must be a rigl_keras.SparsityRamp or a "
                "tfmot.sparsity.keras.PruningSchedule. Received: "
                f"schedule={self.schedule!r}. For a density, pass "
                "SparsityRamp(final_density=..., begin_step=..., end_step=...)."
            )
        _checks.choice("scope", self.scope, ("global", "layer"))

    def get_config(self) -> dict:
        """Returns the arguments that make an equal callback."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields}

    def lengthened(self, factor: float) -> "MagnitudePruning":
        if not hasattr(self.schedule, "lengthened"):
            raise ValueError(
                "A longer run needs a longer schedule, but a "
                f"{type(self.schedule).__name__} cannot be lengthened: pass a "
                "rigl_keras.SparsityRamp, or the schedule of the whole run."
            )
        longer = copy.copy(self)
        longer.schedule = self.schedule.lengthened(factor)
        longer.__post_init__()  # without the state of an earlier run
        return longer

    def set_up(self) -> None:
        super().set_up()
        final = getattr(self.schedule, "final_density", None)
        fixed = [m for m in self.masked if m.layout.fixed is not None]
        for layer in fixed if final is not None else ():
            kept, size = layer.layout.fixed or 0, layer.layout.size
            # Beside layers with other patterns, each stops at its own density.
            alone = len(fixed) == len(self.masked)
            above = (final or 0.0) - kept / size
            if above > 1e-3 or (alone and above < -1e-3):
                raise ValueError(
                    f"The mask of {layer.name!r} {layer.layout.reason}, but "
                    "the ramp ends elsewhere. Pass "
                    f"final_density={kept}/{size}. "
                    f"Received: final_density={final!r}."
                )

    def plan(self, epoch: int, epochs: int | None, steps: int | None) -> None:
        final = getattr(self.schedule, "final_density", None)
        if final is not None:
            warn_of_sparser_masks(self, final)
        if not (steps and epochs):
            return
        first = self.trajectory[0][0]
        left = self.steps_in((epochs - epoch) * steps)

        @tf.function
        def first_due():
            return tf.while_loop(
                lambda t: (t < first + left) & tf.logical_not(self.is_due(t)),
                lambda t: (t + 1,),
                (tf.constant(first, tf.int64),),
            )

        if int(first_due()[0]) == first + left:
            warn_of_no_update(
                self.name,
                left,
                first - self.run_start,
                f"{self.schedule} is never due",
            )

    def is_due(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        # A user's schedule may return True.
        return tf.convert_to_tensor(self._planned_sparsity(step)[0], tf.bool)

    def _planned_sparsity(self, step):
        return schedules.planned_sparsity(
            self.schedule, step - self.run_start, conventions=self.conventions
        )

    def change_masks(
        self,
        optimizer: keras.Optimizer,
        layers: list[KernelMask],
        gradients: list[tf.Tensor],
        step: tf.Tensor,
    ) -> tf.Tensor:
        sparsity = self._planned_sparsity(step)[1]
        if not tf.is_tensor(sparsity):
            sparsity = tf.constant(sparsity, tf.float64)
        for layer, stays in zip(
            layers, largest(layers, 1 - sparsity, scope=self.scope), strict=True
        ):
            nothing = tf.zeros_like(stays)
            self.set_kernel_and_mask(optimizer, layer, stays, nothing)
        return tf.constant(0)


def warn_of_sparser_masks(method: StepUpdate, final_density: float) -> None:
    """Warns if a method that removes connections has none to remove.

    Args:
        method: The method, attached to a model.
        final_density: The density at which it ends.
    """
    size = sum(math.prod(m.kernel.shape) for m in method.masked)
    density = sum(method.trajectory[-1][1]) / size
    rounding = max(1e-3, len(method.masked) / size)
    if density < final_density - rounding:
        warn(
            f"{method.name} ends at density {final_density:.4g}, but the masks "
            f"keep {density:.4g} already, and it adds no connections: pass a "
            "lower final_density, or a higher density to sparsify.",
        )


def largest(
    layers: Sequence[KernelMask],
    density: tf.Tensor,
    *,
    scope: str = "global",
    among_all: bool = False,
) -> list[tf.Tensor]:
    """Returns masks that keep the weights of largest magnitude.

    Args:
        layers: The masked layers.
        density: Fraction of all weights, active or not, a float scalar.
        scope: `"global"` or `"layer"`, as in `ranking.highest_at_density`.
        among_all: Whether all weights are candidates, or only those that the
            masks keep now.

    Returns:
        A bool tensor of each kernel's shape.
    """
    layouts = [layer.layout for layer in layers]
    masks = [tf.convert_to_tensor(layer.mask.value) for layer in layers]
    if among_all:
        masks = [tf.ones_like(mask) for mask in masks]
    kept = ranking.highest_at_density(
        [
            layout.by_unit(scores.magnitude(layer.kernel.value))
            for layer, layout in zip(layers, layouts, strict=True)
        ],
        density,
        among=[
            layout.units(mask)
            for layout, mask in zip(layouts, masks, strict=True)
        ],
        layouts=layouts,
        scope=scope,
    )
    return [
        layout.by_element(units)
        for layout, units in zip(layouts, kept, strict=True)
    ]
