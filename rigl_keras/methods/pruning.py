"""Gradual magnitude pruning (Zhu and Gupta, 2018)."""

import copy
import dataclasses
import math
from collections.abc import Callable

import keras
import tensorflow as tf

from rigl_keras import _checks, schedules, scores, topology
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.masking.masked import KernelMask
from rigl_keras.training.fit_runs import warn_of_no_update
from rigl_keras.training.step_update import StepUpdate

__all__ = ["MagnitudePruning"]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class MagnitudePruning(StepUpdate):
    """Removes the smallest weights while sparsity rises along a schedule.

    Start with `sparsify(model, density=1.0)`. When the schedule is due with a
    sparsity s, the round((1 - s) x weights) connections of largest magnitude
    stay, of all masked layers together or of each on its own (of whole
    kernels, as many as fit into that). What is removed never returns. Zhu and
    Gupta, 2018, To prune, or not to prune, arXiv:1710.01878.

    Pruning replaces an optimizer step, as the updates of every method do. With
    `update_replaces_step=False` in the conventions it follows one, as in the
    authors' code.

    Args:
        schedule: A `schedules.SparsityRamp`, or a
            `tfmot.sparsity.keras.PruningSchedule`: any callable
            `step -> (due, sparsity)`. Steps count from where the run begins
            (`StepUpdate`).
        scope: `"global"`: one threshold for all layers, as the report has it.
            `"layer"`: the same sparsity for each layer, of which one weight
            at least stays.
        conventions: Under `REPORT` a ramp is read as the reproduction does.

    Raises:
        ValueError: The schedule cannot be called, the scope is unknown, or
            what `StepUpdate` raises.
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
        """Returns the arguments with which to make an equal callback."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields}

    def lengthened(self, factor: float) -> "MagnitudePruning":
        if not hasattr(self.schedule, "lengthened"):
            raise ValueError(
                "A longer run needs a longer schedule, and a "
                f"{type(self.schedule).__name__} cannot be lengthened: pass a "
                "rigl_keras.SparsityRamp, or the schedule of the whole run."
            )
        longer = copy.copy(self)
        longer.schedule = self.schedule.lengthened(factor)
        longer.__post_init__()  # nothing of a run that this one was in
        return longer

    def plan(self, epoch: int, epochs: int | None, steps: int | None) -> None:
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
        # A user's schedule may say True.
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
        density = 1 - sparsity
        masks = [tf.convert_to_tensor(m.mask.value) for m in layers]
        # Of a kernel that is kept or removed as one, each entry is worth the
        # same.
        worth = [
            m.by_element(m.by_unit(scores.magnitude(m.kernel.value)))
            for m in layers
        ]
        if self.scope == "global":
            entries = sum(math.prod(layer.mask.shape) for layer in layers)
            count = _share(density, entries)
            everything = topology.select_highest(
                _joined(worth), count, among=_joined(masks)
            )
            kept = _split(everything, masks)
        else:
            kept = [
                topology.select_highest(
                    score, _layer_share(density, layer), among=mask
                )
                for score, mask, layer in zip(worth, masks, layers, strict=True)
            ]
        for layer, stays in zip(layers, kept, strict=True):
            # Of the kernel on the threshold, a part may have been selected.
            removed = layer.units(tf.logical_not(stays))
            stays = layer.by_element(tf.logical_not(removed))
            nothing = tf.zeros_like(stays)
            self.set_kernel_and_mask(optimizer, layer, stays, nothing)
        return tf.constant(0)


def _share(density, size):
    # In the precision of the schedule, as tfmot rounds.
    return tf.cast(tf.round(density * tf.cast(size, density.dtype)), tf.int32)


def _layer_share(density, layer):
    """Returns how many entries of a layer stay: whole units, one at least."""
    mask = tf.convert_to_tensor(layer.mask.value)
    units = math.prod(layer.units(mask).shape)
    entries = math.prod(layer.mask.shape) // units
    return tf.maximum(_share(density, units), 1) * entries


def _joined(tensors):
    # Layers of a model in mixed precision may differ in type.
    dtype = max((t.dtype for t in tensors), key=lambda dtype: dtype.size)
    return tf.concat(
        [tf.reshape(tf.cast(t, dtype), [-1]) for t in tensors], axis=0
    )


def _split(vector, like):
    parts = tf.split(vector, [math.prod(t.shape) for t in like])
    return [
        tf.reshape(part, t.shape) for part, t in zip(parts, like, strict=True)
    ]
