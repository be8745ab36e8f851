"""SRigL: RigL with a constant fan-in and ablation of units."""

import dataclasses

import keras
import tensorflow as tf

from rigl_keras import _checks, fan_in, patterns, scores
from rigl_keras.masking.masked import KernelMask
from rigl_keras.methods.first_counts import FirstCounts
from rigl_keras.methods.single_weights import warn_of_single_weights

__all__ = ["SRigL"]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SRigL(FirstCounts):
    """RigL with equally many connections for each output unit of a layer.

    Start with `sparsify(model, density, granularity="fan_in")`. An update drops
    by magnitude in each layer, ablates units that have few salient connections,
    and grows by gradient in each remaining unit until all have the same number.
    `fan_in.update_fan_in` has the steps. The first number of connections of a
    layer is its budget: if units are ablated, the others have more connections.
    A remainder is not grown. The last masked layer ablates no unit, because its
    units are the model's outputs. Masks of other single weights
    (`granularity="element"`) get equally many connections for each unit at the
    first update, which rounds their density down; a warning says so.

    Lasby et al., 2024, Dynamic sparse training with structured sparsity,
    arXiv:2305.02299, section 3. Defaults are those of the authors' code for
    convolutional networks; for transformers it has an `ablation` of 0.95. On
    ImageNet gradients are the mean of 8 batches (`gradient_batches`).

    After training, `remove_dead_units` removes ablated units for good. Before a
    batch norm an ablated unit has no variance, so its gradient is large, and
    the norm passes on beta.

    Args:
        ablation: gamma, in [0, 1]: a unit stays if its number of salient
            connections is at least this share of the mean fan-in. None: all
            units stay.
        others: As in `MaskUpdate`; of the conventions, `drop_rounding` and
            those that say when updates come apply: `first_update`,
            `end_is_included`, `drop_fraction_lag`, `update_replaces_step`.

    Raises:
        ValueError: As in `MaskUpdate`, or masks keep whole kernels or blocks.
        UserWarning: As in `MaskUpdate`, or a mask's pattern is not a fan-in.

    Example:

    >>> model = sparsify(model, density=0.1, granularity="fan_in")
    >>> model.fit(train, epochs=250, callbacks=[SRigL()])
    """

    ablation: float | None = 0.3
    redistribution: str | None = dataclasses.field(default=None, init=False)

    _ablates_units = True

    def __post_init__(self):
        super().__post_init__()
        if self.ablation is not None:
            self.ablation = _checks.fraction("ablation", self.ablation)

    def set_up(self) -> None:
        super().set_up()
        other = [
            m.name
            for m in self.masked
            if m.granularity not in ("element", "fan_in")
        ]
        if other:
            raise ValueError(
                "SRigL gives each unit the same number of weights, but the "
                f"mask of {other[0]!r} has another pattern. Sparsify with "
                "granularity='fan_in'."
            )
        warn_of_single_weights(
            self.name,
            [m.name for m in self.masked if m.granularity == "element"],
            "gives each unit of a layer the same number of inputs",
            "The first update will move connections between units and round "
            "the number of each down, so that density falls. Sparsify with "
            "granularity='fan_in'.",
        )

    def grow_scores(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        return scores.gradient_magnitude(gradient)

    def change_masks(
        self,
        optimizer: keras.Optimizer,
        layers: list[KernelMask],
        gradients: list[tf.Tensor],
        step: tf.Tensor,
    ) -> tf.Tensor:
        fraction = self._fraction_at(step)
        counts = []
        for layer, gradient in zip(layers, gradients, strict=True):
            layout = patterns.FanIn().layout(layer.found.axes)
            is_last = layer is self.masked[-1]
            moved = fan_in.update_fan_in(
                layout.grouped(tf.convert_to_tensor(layer.mask.value)),
                layout.grouped(self.drop_scores(layer, gradient, step)),
                layout.grouped(self.grow_scores(layer, gradient, step)),
                drop_fraction=fraction,
                budget=self.first_count(layer),
                ablation=None if is_last else self.ablation,
                conventions=self.conventions,
            )
            new, grown = (layout.ungrouped(part) for part in moved)
            values = self.first_weights(layer, gradient, step)
            counts.append(
                self.set_kernel_and_mask(optimizer, layer, new, grown, values)
            )
        return tf.add_n(counts)
