"""Methods that also train the weights outside the masks.

Top-KAST and SR-STE keep a weight for every entry of a kernel, and multiply by
the largest. Here a model is always as sparse as with any other method: the
method stores the weights outside the masks, and adds them to the kernels only
while the optimizer takes its step.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import _checks, replicas, topology
from rigl_keras._tensor_checks import count_true
from rigl_keras.conventions import Conventions
from rigl_keras.masking.masked import KernelMask
from rigl_keras.masking.tracing import whole_kernels, zero_outside
from rigl_keras.methods.mask_update import MaskUpdate
from rigl_keras.methods.single_weights import warn_of_single_weights
from rigl_keras.training.attachment import variable_key

__all__ = ["SRSTE", "StoredWeights", "TopKAST"]

_AFTER_STEPS = Conventions(
    first_update="frequency_minus_one", update_replaces_step=False
)


def _fixed(value) -> Any:
    return dataclasses.field(default=value, init=False)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class StoredWeights(MaskUpdate):
    """Multiplies by the largest weights, and also trains others.

    With w the weights of a kernel, including those outside the mask m:

    1. A step has the gradient g = dL/d(w m), at every entry. The optimizer
       moves w by its `step_gradient` where `trained` holds.
    2. After every `frequency` steps m becomes 1 at the largest |w|, with the
       same number of ones.

    When a run begins, w outside the mask is drawn from the weights within it
    (`sparsify` keeps none there), and m is chosen for the first time. A later
    run of the same callback continues with its w.

    The kernel variable is w m: checkpoints, exports and counts are those of a
    sparse model. w (1 - m) is in `variables`; a run that resumes without them
    has zeros there. Gradients are dense at every step, and the method needs one
    more array of each kernel's size.

    Args:
        frequency: Steps from one choice of m to the next, at least 1.
        end_step: Last step after which m may change. None: the last step of the
            run.
        seed: Seed of random draws, at least 0.

    Raises:
        ValueError: As in `MaskUpdate`, or the model is on several devices.
    """

    # Arguments of `MaskUpdate` that are fixed here.
    begin_step: int = _fixed(0)
    drop_fraction: float = _fixed(1.0)
    decay: str = _fixed("constant")
    decay_power: float = _fixed(3.0)
    final_drop_fraction: float = _fixed(0.0)
    redistribution: str | None = _fixed(None)
    gradient_batches: int = _fixed(1)
    grow_init: str = _fixed("zeros")
    grow_divisor: float = _fixed(1.0)
    conventions: Conventions = _fixed(_AFTER_STEPS)

    dense_gradients = "always"
    end_share = 1.0

    def __post_init__(self):
        super().__post_init__()
        self._hidden: list[tf.Variable] = []
        self._hidden_of: list[keras.Variable] = []

    # What defines a method.

    def step_gradient(
        self, layer: KernelMask, gradient: tf.Tensor, hidden: tf.Tensor
    ) -> tf.Tensor:
        """Returns the gradient that the optimizer uses for the weights.

        Args:
            layer: The masked layer.
            gradient: dL/d(masked kernel), including the kernel's penalty.
            hidden: The weights outside the mask, zero within it.

        Returns:
            Tensor of the kernel's shape.
        """
        del layer, hidden
        return gradient

    def trained(self, layer: KernelMask) -> tf.Tensor:
        """Returns which weights move, a bool tensor; by default all."""
        return tf.ones(layer.kernel.shape, tf.bool)

    # State.

    def hidden(self, layer: KernelMask) -> tf.Variable:
        """Returns the weights of a layer outside its mask, zero within it."""
        return self._hidden[self._index(layer)]

    def _index(self, layer):
        (index,) = [i for i, m in enumerate(self.masked) if m is layer]
        return index

    @property
    def variables(self) -> list[tf.Variable]:
        return [*self._hidden, *super().variables]

    def set_up(self) -> None:
        super().set_up()
        if replicas.is_distributed(self._attached.model):
            raise ValueError(
                f"{self.name} trains weights outside the masks, on one device "
                "only. Make the model outside the scope of the strategy."
            )
        if not self._attached.has_kernels(self._hidden_of):
            self._hidden_of = [m.kernel for m in self.masked]
            self._hidden = [
                tf.Variable(tf.zeros_like(kernel.value), trainable=False)
                for kernel in self._hidden_of
            ]

    def forget(self) -> None:
        super().forget()
        for hidden, layer in zip(self._hidden, self.masked, strict=True):
            # An earlier run of this callback trained them.
            if not bool(tf.reduce_any(hidden != 0)):
                hidden.assign(_drawn(layer, self.seed))
        self.choose(self.masked)
        self._record.begin(self.steps_taken())

    def extra_logs(self) -> dict[str, tf.Tensor]:
        return {}  # there is no drop fraction

    # When.

    def is_due(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        taken: Any = step - self.run_start + 1
        return (taken % self.frequency == 0) & (taken <= self._end_step + 1)

    @property
    def _end_step(self):
        return self._span["end_step"]

    # A step.

    def apply_gradients(
        self,
        apply: Callable,
        gradients: list[tf.Tensor | None],
        variables: list[keras.Variable],
    ) -> None:
        layers = {variable_key(m.kernel): m for m in self.masked}
        moved = [
            None if g is None else layers.get(variable_key(v))
            for g, v in zip(gradients, variables, strict=True)
        ]
        gradients = [
            g
            if layer is None or g is None
            else self.step_gradient(layer, g, self._outside(layer))
            for g, layer in zip(gradients, moved, strict=True)
        ]
        moved = [layer for layer in moved if layer is not None]
        for layer in moved:
            layer.kernel.assign_add(self._outside(layer))
        with whole_kernels():
            apply(gradients, variables)
        for layer in moved:
            weights = tf.convert_to_tensor(layer.kernel.value)
            mask = tf.convert_to_tensor(layer.mask.value)
            hidden = self.hidden(layer)
            stays = tf.where(self.trained(layer), weights, hidden)
            hidden.assign(tf.where(mask, tf.zeros_like(stays), stays))
            layer.kernel.assign(zero_outside(layer.mask, weights))

    # A choice: all connections leave, and the largest weights join.

    def choose(self, layers: list[KernelMask]) -> tf.Tensor:
        """Gives layers the masks of their largest weights.

        Args:
            layers: Masked layers.

        Returns:
            Number of connections that joined, an integer scalar.
        """
        nothing = [tf.zeros_like(m.kernel.value) for m in layers]
        step = tf.constant(0, tf.int64)
        return super().change_masks(self.optimizer, layers, nothing, step)

    def change_masks(
        self,
        optimizer: keras.Optimizer,
        layers: list[KernelMask],
        gradients: list[tf.Tensor],
        step: tf.Tensor,
    ) -> tf.Tensor:
        return self.choose(layers)

    def grow_scores(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        return self.magnitudes(layer, self._weights(layer))

    def first_weights(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        return self.hidden(layer).value()

    def set_kernel_and_mask(
        self,
        optimizer: keras.Optimizer,
        layer: KernelMask,
        mask: tf.Tensor,
        grown: tf.Tensor,
        values: tf.Tensor | None = None,
    ) -> tf.Tensor:
        weights = self._weights(layer)
        hidden = tf.where(mask, tf.zeros_like(weights), weights)
        joined = super().set_kernel_and_mask(
            optimizer, layer, mask, grown, values
        )
        self.hidden(layer).assign(hidden)
        return joined

    def _weights(self, layer):
        return tf.convert_to_tensor(layer.kernel.value) + self._outside(layer)

    def _outside(self, layer):
        # Others (`set_weights`) may have changed the mask since.
        hidden = self.hidden(layer).value()
        return tf.where(layer.mask.value, tf.zeros_like(hidden), hidden)

    def _fraction_at(self, step):
        return tf.constant(self.drop_fraction, tf.float64)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class TopKAST(StoredWeights):
    """Multiplies by the largest weights and trains some more of them.

    For a layer with N weights w and n connections, after every `frequency`
    steps

        A = the n of largest |w|, which the layer multiplies by; B = A and the
        next m of largest |w|, which are trained,

    where m = round(extra_density x N). A step moves w within B by

        dL/d(w 1_A) + penalty x w          on A,
        dL/d(w 1_A) + penalty x w N / n    on B without A.

    Weights outside of B do not move. The larger penalty on B without A keeps A
    from changing for small differences. Jayakumar et al., 2020, Top-KAST: Top-K
    always sparse training, arXiv:2106.03517, sections 2.1 to 2.3. The density
    of each layer is that of `sparsify`; the paper has the same density in all
    layers except the first and last.

    Defaults are ours, except `frequency`: the authors' code is not public, and
    another implementation penalises by the norm instead of its square. The
    paper's backward pass is sparse too: it needs gradients only on B. Here it
    is dense (`training_flops` counts both ways).

    Args:
        extra_density: m over N, in [0, 1]. None: m is n.
        penalty: Factor of w in a step, at least 0.
        frequency, end_step, seed: As in `StoredWeights`.

    Raises:
        ValueError: An argument is out of range, or the model is on several
            devices.

    Example:

    >>> model = sparsify(model, density=0.1, distribution="uniform")
    >>> model.fit(train, epochs=100, callbacks=[TopKAST()])
    """

    extra_density: float | None = None
    penalty: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        self._trained: list[tf.Variable] = []
        self._trained_of: list[keras.Variable] = []
        self.penalty = _checks.number(
            "penalty", self.penalty, at_least=0, rule="must be at least 0"
        )
        if self.extra_density is not None:
            self.extra_density = _checks.fraction(
                "extra_density", self.extra_density
            )

    @property
    def variables(self) -> list[tf.Variable]:
        return [*self._trained, *super().variables]

    def set_up(self) -> None:
        super().set_up()
        if self._trained_of is not self._hidden_of:
            self._trained_of = self._hidden_of
            self._trained = [
                tf.Variable(tf.convert_to_tensor(m.mask.value), trainable=False)
                for m in self.masked
            ]

    def trained(self, layer: KernelMask) -> tf.Tensor:
        return self._trained[self._index(layer)].value()

    def step_gradient(
        self, layer: KernelMask, gradient: tf.Tensor, hidden: tf.Tensor
    ) -> tf.Tensor:
        weights = tf.convert_to_tensor(layer.kernel.value)
        ones = count_true(tf.convert_to_tensor(layer.mask.value))
        size = float(math.prod(layer.mask.shape))
        rarer = tf.math.divide_no_nan(size, tf.cast(ones, tf.float32))
        penalised = weights + tf.cast(rarer, hidden.dtype) * hidden
        moved = gradient + tf.cast(self.penalty * penalised, gradient.dtype)
        return tf.where(self.trained(layer), moved, tf.zeros_like(moved))

    def choose(self, layers: list[KernelMask]) -> tf.Tensor:
        joined = super().choose(layers)
        for layer in layers:
            mask = tf.convert_to_tensor(layer.mask.value)
            kept = layer.units(mask)
            worth = layer.by_unit(
                self.magnitudes(layer, self.hidden(layer).value())
            )
            extra = count_true(kept)
            if self.extra_density is not None:
                size = math.prod(layer.layout.unit_shape)
                extra = tf.constant(round(self.extra_density * size))
            others = tf.logical_not(kept)
            more = topology.select_highest(worth, extra, among=others)
            self._trained[self._index(layer)].assign(
                mask | layer.by_element(more)
            )
        return joined


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SRSTE(StoredWeights):
    """Trains N:M sparse networks straight through, and decays pruned weights.

    m is 1 at the N largest |w| of each M in a row, and is chosen again after
    every step. A step has the gradient

        dL/d(w m) + decay x (1 - m) w

    at every entry, as if m were not there (straight through). Pruned weights
    fall towards zero, so that m settles. Zhou et al., 2021, Learning N:M
    fine-grained structured sparse neural networks from scratch,
    arXiv:2102.04010, section 3.3 and Algorithm 1. The pattern is that of
    `sparsify`; with other patterns, the same rule keeps the largest weights
    that the pattern allows. A warning says so if all masks are of single
    weights, the default.

    The optimizer's weight decay reaches every weight, as in the authors' code.
    A kernel's own regulariser sees only w m.

    Args:
        sparse_decay: The factor lambda, at least 0. The authors' code has 2e-4.
        frequency, end_step, seed: As in `StoredWeights`.

    Raises:
        ValueError: An argument is out of range, or the model is on several
            devices.
        UserWarning: As in `MaskUpdate`, or no mask has a pattern.

    Example:

    >>> model = sparsify(model, density=0.5, granularity="2:4")
    >>> model.fit(train, epochs=120, callbacks=[SRSTE()])
    """

    sparse_decay: float = 2e-4
    frequency: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.sparse_decay = _checks.number(
            "sparse_decay",
            self.sparse_decay,
            at_least=0,
            rule="must be at least 0",
        )

    def set_up(self) -> None:
        super().set_up()
        names = [m.name for m in self.masked]
        if all(m.granularity == "element" for m in self.masked):
            warn_of_single_weights(
                self.name,
                names,
                "is for N:M patterns",
                "It will keep the largest weights of each whole layer. For "
                "N:M, sparsify with granularity='2:4'.",
            )

    def step_gradient(
        self, layer: KernelMask, gradient: tf.Tensor, hidden: tf.Tensor
    ) -> tf.Tensor:
        return gradient + tf.cast(self.sparse_decay * hidden, gradient.dtype)


def _drawn(layer, seed):
    """Returns weights for outside a mask, drawn from those within it."""
    weights, mask = layer.kernel.numpy(), layer.mask.numpy() != 0
    kept = weights[mask]
    draw = np.random.default_rng([layer.draw_key, seed])
    places = draw.integers(0, max(kept.size, 1), weights.shape)
    drawn = kept[places] if kept.size else np.zeros_like(weights)
    return np.where(mask, 0, drawn).astype(weights.dtype)
