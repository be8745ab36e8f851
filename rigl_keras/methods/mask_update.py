"""The common update: when masks change, and what happens to weights.

`MaskUpdate` runs `topology.update_masks`. A method is a subclass that scores
connections. `rigl_keras.training` runs an update within `fit` or a custom
training loop.
"""

import copy
import dataclasses
import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import _checks, redistribution, schedules, scores, topology
from rigl_keras._tensor_checks import count_true
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.initial_values import checked_grow_init, grown_values
from rigl_keras.masking.masked import KernelMask
from rigl_keras.redistribution import CRITERIA
from rigl_keras.training import fit_runs, optimizer_state
from rigl_keras.training.dense_gradients import check_unread
from rigl_keras.training.step_update import StepUpdate

__all__ = ["MaskUpdate"]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class MaskUpdate(StepUpdate):
    """Drops and grows connections at regular steps of training.

    At an update step (`schedules.is_update_step`; a run that begins on trained
    weights may begin with one), it replaces the optimizer's step:

    1. the drop fraction f is that of `schedules.decayed_drop_fraction`;
    2. each kernel drops the fraction f of its connections, by this method's
       `drop_scores`, and grows as many by its `grow_scores`
       (`topology.update_masks`). With `redistribution`, all layers share the
       connections that they drop together (`redistribution.grow_counts`);
    3. dropped weights become zero, newly grown ones start as `grow_init` says,
       and the optimizer's memory of them is reset.

    Evci et al., 2020, arXiv:1911.11134, Algorithm 1; redistribution after
    Dettmers and Zettlemoyer, 2020, and the report, section 6.2. The gradient is
    that of the current batch for the masked kernel, without regularisation.
    With `gradient_batches` n it is the mean over the update's step and the
    n - 1 steps before it, which also have dense backward passes. A run that
    starts among them takes the mean over the steps that it has, unless
    `variables` were saved and restored.

    It logs the `drop_fraction` of the last update, besides `density` and
    `grown`.

    A method is a subclass with `grow_scores`. Its arguments are dataclass
    fields: `name: type = default` adds an argument or changes a default, and
    `get_config` returns it.

    Args:
        frequency: Steps from one update to the next, at least 1.
        drop_fraction: Fraction of the active connections dropped at the
            first update, in [0, 1].
        begin_step: First step at which an update may happen, at least 0. Steps
            count from the beginning of the run (`StepUpdate`).
        end_step: Last step at which an update may happen. None: three quarters
            of the run, as in the paper, or the method's `end_share` of it.
        decay: How the fraction falls until `end_step`: one of
            `schedules.DECAYS`.
        decay_power: Exponent of the polynomial decay, positive.
        final_drop_fraction: Final value of the fraction, in [0, drop_fraction].
        redistribution: How density moves between layers: by the mean
            `"gradient"` or `"momentum"` of their active connections. None: each
            layer keeps its density.
        gradient_batches: Number of steps in the mean of the gradient, up to and
            including the update's, from 1 to `frequency`.
        grow_init: Initial value of newly grown weights
            (`initial_values.grown_values`): `"zeros"`, `"initial_dist"`,
            `"random_normal"`, `"random_uniform"` or, if the method needs dense
            gradients, `"grad_scale"` or `"grad_sign"`.
        grow_divisor: Divisor of these values, positive.
        seed: Seed of random draws, at least 0.
        conventions: Choices where the references differ.

    Raises:
        ValueError: An argument is out of range, or as in `StepUpdate`.
        UserWarning: The run has no update.
    """

    frequency: int = 100
    drop_fraction: float = 0.3
    begin_step: int = 0
    end_step: int | None = None
    decay: str = "cosine"
    decay_power: float = 3.0
    final_drop_fraction: float = 0.0
    redistribution: str | None = None
    gradient_batches: int = 1
    grow_init: str = "zeros"
    grow_divisor: float = 1.0
    seed: int = 0
    conventions: Conventions = ORIGINAL

    _logged = ("grown", "drop_fraction")
    needs_momentum = False  # whether the optimizer must keep it
    end_share = 0.75  # share of the run at which updates end by default

    def __post_init__(self):
        super().__init__(conventions=self.conventions)
        self._check_window()
        self.drop_fraction = _checks.fraction(
            "drop_fraction",
            self.drop_fraction,
            rule="is a fraction of the active connections and must be in "
            "[0, 1]",
        )
        _checks.choice("decay", self.decay, schedules.DECAYS)
        self.decay_power = _checks.number(
            "decay_power", self.decay_power, above=0, rule="must be positive"
        )
        self.final_drop_fraction = schedules.checked_final_drop_fraction(
            self.final_drop_fraction, self.drop_fraction
        )
        if self.redistribution is not None:
            _checks.choice("redistribution", self.redistribution, CRITERIA)
        self.grow_init, self.grow_divisor = checked_grow_init(
            self.grow_init,
            self.grow_divisor,
            dense_gradients=self.dense_gradients,
        )
        self.seed = _checks.integer(
            "seed", self.seed, at_least=0, at_most=2**32 - 1
        )
        self._span: dict[str, int] = {}  # set when a run is planned
        self._initial: list[tf.Variable] = []
        self._initial_of: list[keras.Variable] = []

    def _check_window(self):
        self.frequency = _whole("frequency", self.frequency, at_least=1)
        self.begin_step = _whole("begin_step", self.begin_step, at_least=0)
        if self.end_step is not None:
            self.end_step = _whole("end_step", self.end_step, at_least=0)
            if self.end_step < self.begin_step:
                raise ValueError(
                    "end_step must not come before begin_step. Received: "
                    f"begin_step={self.begin_step}, end_step={self.end_step}."
                )
        self.gradient_batches = _whole(
            "gradient_batches", self.gradient_batches, at_least=1
        )
        if self.gradient_batches > self.frequency:
            raise ValueError(
                "gradient_batches must be at most frequency, because "
                "updates do not share gradients. Received: "
                f"gradient_batches={self.gradient_batches}, "
                f"frequency={self.frequency}."
            )

    @functools.cached_property
    def _correction(self) -> tf.Variable:
        """The state of the reproduction's correction of growth.

        It has the correction, the sum of what was missing, updates so far, and
        connections at the start, or -1.
        """
        start = tf.constant([0.0, 0.0, 0.0, -1.0], tf.float64)
        return tf.Variable(start, trainable=False)

    @functools.cached_property
    def _peak_rate(self) -> tf.Variable:
        """The largest learning rate at the start or an update so far."""
        return tf.Variable(tf.zeros([]), trainable=False)

    # What defines a method: the scores of connections.

    def drop_scores(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        """Returns scores; connections with the lowest are dropped.

        Args:
            layer: The masked layer.
            gradient: dL/d(masked kernel) at every entry, of the kernel's
                shape.
            step: The optimizer step, an int64 scalar.

        Returns:
            Float tensor of the kernel's shape.
        """
        del gradient, step
        return self.magnitudes(layer, layer.kernel.value)

    def magnitudes(self, layer: KernelMask, tensor: Any) -> tf.Tensor:
        """Returns |x| of weights or gradients x, by `scores.of_units`."""
        return scores.of_units(
            tensor, layer.layout, conventions=self.conventions
        )

    def grow_scores(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        """Returns scores; connections with the highest are grown.

        Args and Returns: as in `drop_scores`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define grow_scores."
        )

    def grow_count(
        self, layer: KernelMask, dropped: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        """Returns how many connections of a layer grow.

        Args:
            layer: The masked layer.
            dropped: Number that this update drops, an int32 scalar.
            step: The optimizer step, an int64 scalar.

        Returns:
            Integer scalar tensor. By default the number dropped.
        """
        del layer, step
        return dropped

    def layer_fractions(
        self, layers: list[KernelMask], fraction: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor | list[tf.Tensor]:
        """Returns the fraction of connections that each layer drops.

        Args:
            layers: The masked layers.
            fraction: The schedule's fraction, a float64 scalar.
            step: The optimizer step, an int64 scalar.

        Returns:
            A scalar for all layers (by default the schedule's), or one for
            each.
        """
        del layers, step
        return fraction

    def before_drop(
        self,
        optimizer: keras.Optimizer,
        layers: list[KernelMask],
        step: tf.Tensor,
    ) -> None:
        """Changes masks before an update drops and grows; nothing by default.

        Args:
            optimizer: The optimizer that trains the model.
            layers: The masked layers.
            step: The optimizer step, an int64 scalar.
        """
        del optimizer, layers, step

    def first_weights(
        self, layer: KernelMask, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor | None:
        """Returns initial values of newly grown weights, by `grow_init`.

        Args:
            layer, gradient, step: As in `drop_scores`.

        Returns:
            Tensor of the kernel's shape. None: zero.
        """
        initial = dict(zip(map(id, self.masked), self._initial, strict=False))
        return grown_values(
            self.grow_init,
            layer.kernel.value,
            layer.mask.value,
            divisor=self.grow_divisor,
            gradient=gradient,
            initial=initial.get(id(layer)),
            # SET already grows by draws from the key itself.
            key=layer.draw_key ^ self.seed ^ 2,
            step=step,
        )

    @property
    def name(self) -> str:
        mean = {"gradient": "-SG", "momentum": "-SM", None: ""}
        return type(self).__name__ + mean[self.redistribution]

    @property
    def variables(self) -> list[tf.Variable]:
        corrected = self.conventions.redistribution_total == "corrected"
        correction = [self._correction] if corrected else []
        rate = [self._peak_rate] if self.decay == "learning_rate" else []
        return [*correction, *rate, *self._initial, *super().variables]

    def get_config(self) -> dict:
        """Returns the arguments that make an equal callback."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.init
        }

    def lengthened(self, factor: float) -> "MaskUpdate":
        # A copy: a subclass may have more arguments than fields.
        longer = copy.copy(self)
        if self.end_step is not None:
            longer.end_step = schedules.lengthened(self.end_step, factor)
        for name in ("_correction", "_peak_rate"):
            vars(longer).pop(name, None)
        longer.__post_init__()  # without the state of an earlier run
        return longer

    def extra_logs(self) -> dict[str, tf.Tensor]:
        return {"drop_fraction": self._last["drop_fraction"].value()}

    def set_up(self) -> None:
        for layer in self.masked:
            self._check_pattern(layer)
        if self.needs_momentum or self.redistribution == "momentum":
            self._check_momentum()
        # A run that resumes without its `variables` uses its weights as the
        # initial ones.
        draws = self.grow_init == "initial_dist"
        if draws and not self._attached.has_kernels(self._initial_of):
            self._initial_of = [m.kernel for m in self.masked]
            self._initial = [
                tf.Variable(_repeated_nonzeros(kernel), trainable=False)
                for kernel in self._initial_of
            ]
        if self._correction[3] < 0:
            self._begin_correction()

    def _check_pattern(self, layer):
        layout = layer.layout
        if self.redistribution is not None and layout.reason:
            raise ValueError(
                "redistribution moves single weights between layers, but "
                f"the mask of {layer.name!r} {layout.reason}. Pass "
                "redistribution=None, or sparsify with granularity='element'."
            )
        ranking = self.conventions.grow_ranking
        if layout.is_apart and ranking != "inactive":
            raise ValueError(
                f"With grow_ranking={ranking!r} a layer may grow fewer "
                f"connections than it drops, but the mask of {layer.name!r} "
                f"{layout.reason}. Pass conventions with "
                "grow_ranking='inactive', or sparsify with "
                "granularity='element'."
            )

    def forget(self) -> None:
        self._begin_correction()
        if self.decay == "learning_rate":
            self._peak_rate.assign(optimizer_state.rate(self.optimizer))
        if self._initial:
            for kept, layer in zip(self._initial, self.masked, strict=True):
                kept.assign(_repeated_nonzeros(layer.kernel))

    def _begin_correction(self):
        self._correction.assign(
            redistribution.start_of_correction(sum(self.trajectory[0][1]))
        )

    def _check_momentum(self):
        # From any trained layer: frozen ones have no memory.
        model: Any = self.model  # it is set here
        trained = {id(v) for v in model.trainable_variables}
        for layer in self.masked:
            if id(layer.kernel) in trained:
                optimizer_state.momentum(self.optimizer, layer.kernel)
                return

    # When.

    _prunes = False  # whether full masks lose connections

    def plan(self, epoch: int, epochs: int | None, steps: int | None) -> None:
        """Sets the update window, once the run is known."""
        end_step = self.end_step
        if end_step is None:
            end_step = self.step_at(self.end_share, epochs, steps)
        self._span = {
            "begin_step": self.begin_step,
            "end_step": max(end_step, self.begin_step),
        }
        if steps and epochs:
            left = self.steps_in((epochs - epoch) * steps)
            first, rhythm = self._counted(self.trajectory[0][0])
            if schedules.planned_updates(first, left, **rhythm) == 0:
                fit_runs.warn_of_no_update(
                    self.name,
                    left,
                    self.trajectory[0][0] - self.run_start,
                    f"one comes every frequency={self.frequency} steps from "
                    f"begin_step={self.begin_step} to end_step={end_step}. "
                    "Lower frequency, or train for more steps",
                )
        if type(self).grow_count is MaskUpdate.grow_count and not self._prunes:
            fit_runs.warn_of_full_masks(self.name, self._attached.trainable())

    def step_at(
        self,
        share: float,
        epochs: int | None,
        steps: int | None,
        argument: str = "end_step",
    ) -> int:
        """Returns the step at a share of the run.

        Args:
            share: Between 0 and 1.
            epochs, steps: As in `plan`.
            argument: The argument that would give the step, for the error.

        Raises:
            ValueError: The length of the run is unknown.
        """
        if not steps or not epochs:
            raise ValueError(
                f"{self.name}({argument}=None) means {share:.0%} of the run, "
                "but the length of this run is unknown. Pass steps_per_epoch "
                f"to fit, or {argument} to {type(self).__name__}."
            )
        each = optimizer_state.batches_per_step(self.optimizer)
        return int(share * epochs * steps) // each

    @property
    def _measures_the_run(self):
        return self.end_step is None

    @property
    def _window(self):
        """The first and last step of updates, in the optimizer's count."""
        return {name: t + self.run_start for name, t in self._span.items()}

    def _counted(self, step):
        """Returns a step and the update window, counted from the run's start.

        A run that begins on trained weights may begin with an update. At the
        very first step no connection is trained yet (t > 0 in Algorithm 1).
        """
        earlier = self.frequency if self.run_start > 0 else 0
        return step - self.run_start + earlier, {
            "frequency": self.frequency,
            "conventions": self.conventions,
            **{name: t + earlier for name, t in self._span.items()},
        }

    def is_due(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        step, rhythm = self._counted(step)
        return schedules.is_update_step(step, **rhythm)

    def is_gathered(self, step: int | tf.Tensor) -> bool | tf.Tensor:
        if self.gradient_batches == 1:
            return self.is_due(step)
        step, rhythm = self._counted(step)
        return schedules.is_gathered_step(
            step, gradient_batches=self.gradient_batches, **rhythm
        )

    # The update, in the graph.

    def change_masks(
        self,
        optimizer: keras.Optimizer,
        layers: list[KernelMask],
        gradients: list[tf.Tensor],
        step: tf.Tensor,
    ) -> tf.Tensor:
        fraction = self._fraction_at(step)
        self.before_drop(optimizer, layers, step)
        # Scores and masks have a value for each unit of the pattern.
        masks = [m.units(tf.convert_to_tensor(m.mask.value)) for m in layers]
        never = self.dense_gradients == "never"
        if never:  # copies, which `check_unread` finds again in the graph
            gradients = [tf.identity(gradient) for gradient in gradients]
        drop_scores, grow_scores = (
            [
                layer.by_unit(score(layer, gradient, step))
                for layer, gradient in zip(layers, gradients, strict=True)
            ]
            for score in (self.drop_scores, self.grow_scores)
        )
        if never:
            check_unread(self.name, grow_scores, gradients)
        defined = ~tf.reduce_any(
            [
                tf.reduce_any(tf.math.is_nan(s))
                for s in drop_scores + grow_scores
            ]
        )
        self.refuse_unless(defined, step)
        shares = self._shares(optimizer, layers, gradients)
        new_masks, grown = topology.update_masks(
            masks,
            drop_scores,
            grow_scores,
            drop_fraction=self.layer_fractions(layers, fraction, step),
            shares=shares,
            grow_counts=self._grow_counts(layers, shares, step),
            layouts=[layer.layout for layer in layers],
            conventions=self.conventions,
        )
        counts = [
            self.set_kernel_and_mask(
                optimizer,
                layer,
                # Any NaN refuses the update, even one that is not read.
                layer.by_element(tf.where(defined, new, mask)),
                layer.by_element(joined & defined),
                self.first_weights(layer, gradient, step),
            )
            for layer, mask, new, joined, gradient in zip(
                layers, masks, new_masks, grown, gradients, strict=True
            )
        ]
        if self.redistribution is not None:
            self._keep_correction()
        return tf.add_n(counts)

    def _fraction_at(self, step):
        """Returns the drop fraction of an update, which is logged.

        Returns:
            A float64 scalar.
        """
        fraction = schedules.decayed_drop_fraction(
            step,
            drop_fraction=self.drop_fraction,
            decay=self.decay,
            decay_power=self.decay_power,
            final_drop_fraction=self.final_drop_fraction,
            rate_ratio=self._rate_ratio(),
            conventions=self.conventions,
            **self._window,
        )
        self._last["drop_fraction"].assign(tf.cast(fraction, tf.float32))
        return fraction

    def _rate_ratio(self):
        if self.decay != "learning_rate":
            return 1.0
        rate = optimizer_state.rate(self.optimizer)
        self._peak_rate.assign(tf.maximum(self._peak_rate, rate))
        return tf.math.divide_no_nan(rate, self._peak_rate)

    def _shares(self, optimizer, layers, gradients):
        """Returns each layer's share for moving density or sparing layers.

        It is None if nothing uses it.
        """
        if self.redistribution is None:
            if not self.conventions.spare_dense_layers:
                return None
            return redistribution.nonzero_shares(
                [m.kernel.value for m in layers]
            )
        if self.redistribution == "momentum":
            gradients = [
                optimizer_state.momentum(optimizer, m.kernel) for m in layers
            ]
        return redistribution.mean_shares(
            gradients, [m.mask.value for m in layers]
        )

    def _grow_counts(self, layers, shares, step):
        """Returns the `grow_counts` of `topology.update_masks`."""
        if self.redistribution is None:
            return lambda dropped, free: [
                self.grow_count(layer, count, step)
                for layer, count in zip(
                    layers, tf.unstack(dropped), strict=True
                )
            ]
        return functools.partial(
            redistribution.grow_counts,
            shares,
            correction=self._correction[0],
            conventions=self.conventions,
        )

    def _keep_correction(self):
        connections = tf.add_n([count_true(m.mask.value) for m in self.masked])
        self._correction.assign(
            redistribution.next_correction(self._correction, connections)
        )


def _repeated_nonzeros(kernel):
    """Returns a kernel's nonzero weights, repeated to its size."""
    weights = kernel.numpy().ravel()
    nonzeros = weights[weights != 0]
    repeated = nonzeros if nonzeros.size else weights
    return tf.constant(np.resize(repeated, weights.shape))


def _whole(name, value, *, at_least):
    rule = "counts in whole numbers and must be an int of at least"
    return _checks.integer(
        name, value, at_least=at_least, rule=f"{rule} {at_least}"
    )
