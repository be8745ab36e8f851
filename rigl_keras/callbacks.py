"""The methods: what they drop, what they grow, and when.

`MaskUpdate` drops and grows; a method is a child that says what a connection
is worth. How an update comes to run within `fit`, or within a loop of one's
own, is in `training_step.py`.
"""

import copy
import dataclasses
import functools
import math

import numpy as np
import tensorflow as tf

from rigl_keras import (
    arguments,
    optimizer_state,
    redistribution,
    schedules,
    scores,
    topology,
)
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.initial_values import check_grow_init, grown_values
from rigl_keras.layers import Masked
from rigl_keras.redistribution import CRITERIA
from rigl_keras.training_step import StepUpdate, warn_of_no_update

__all__ = ["SET", "SNFS", "MagnitudePruning", "MaskUpdate", "RigL"]


class MaskUpdate(StepUpdate):
    """Drops and grows connections every so many steps of training.

    At an update step (`schedules.is_update_step`, where a run that begins on
    trained weights may begin with one), which takes the place of the
    optimizer's:

    1. the drop fraction f is that of `schedules.decayed_drop_fraction`;
    2. each kernel drops the fraction f of its connections, by this method's
       `drop_scores`, and grows as many by its `grow_scores` (`topology.drop`
       and `grow`, the halves of `drop_and_grow`). With `redistribution`, the
       connections that all layers drop are shared out anew
       (`redistribution.grow_counts`);
    3. dropped weights are zero, newly grown ones start as `grow_init` says,
       and the optimizer forgets what it remembered of them.

    Evci et al., 2020, arXiv:1911.11134, Algorithm 1; redistribution after
    Dettmers and Zettlemoyer, 2020, and the report, section 6.2. The gradient
    is that of the current batch with respect to the masked kernel, without
    regularisation. With `gradient_batches` n it is the mean over the update's
    step and the n - 1 before it, at which the backward pass is dense too; a
    run that starts among them takes the mean over those that it has, unless
    `variables` were saved and restored.

    Logs `drop_fraction`, that of the last update, beside `density` and
    `grown`.

    Args:
        frequency: Steps from one update to the next, at least 1.
        drop_fraction: Fraction of the active connections dropped at the
            first update, in [0, 1].
        begin_step: First step at which an update may happen, at least 0.
            Steps count from where the run begins (`StepUpdate`).
        end_step: Last step at which an update may happen. None: three
            quarters of the run, as the paper has it.
        decay: How the fraction falls until `end_step`: one of
            `schedules.DECAYS`.
        decay_power: Exponent of the polynomial decay, positive.
        redistribution: What density moves between layers by: the mean
            `"gradient"` or `"momentum"` of their active connections. None:
            each layer keeps its density.
        gradient_batches: How many steps, the update's own the last, the
            gradient is the mean of, at least 1 and at most `frequency`.
        grow_init: What newly grown weights start with
            (`initial_values.grown_values`): `"zeros"`; or `"initial_dist"`,
            `"random_normal"`, `"random_uniform"`, and where the method needs
            dense gradients `"grad_scale"` or `"grad_sign"`, each by a
            divisor if one follows, as in `"random_normal_10"`.
        seed: Seed of random draws, at least 0.
        conventions: Where the references differ.

    Raises:
        ValueError: An argument is out of range, or what `StepUpdate` raises.
        UserWarning: No update falls into the run.
    """

    _logged = ("grown", "drop_fraction")

    def __init__(
        self,
        *,
        frequency: int = 100,
        drop_fraction: float = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        decay: str = "cosine",
        decay_power: float = 3.0,
        redistribution: str | None = None,
        gradient_batches: int = 1,
        grow_init: str = "zeros",
        seed: int = 0,
        conventions: Conventions = ORIGINAL,
    ):
        super().__init__(conventions=conventions)
        self.frequency = _whole("frequency", frequency, at_least=1)
        self.begin_step = _whole("begin_step", begin_step, at_least=0)
        if end_step is not None:
            end_step = _whole("end_step", end_step, at_least=0)
            if end_step < self.begin_step:
                raise ValueError(
                    "end_step must not come before begin_step. Received: "
                    f"begin_step={begin_step}, end_step={end_step}."
                )
        self.end_step = end_step
        self.drop_fraction = arguments.fraction(
            "drop_fraction",
            drop_fraction,
            rule="is a fraction of the active connections and must be in "
            "[0, 1]",
        )
        arguments.choice("decay", decay, schedules.DECAYS)
        self.decay = decay
        self.decay_power = arguments.number(
            "decay_power", decay_power, above=0, rule="must be positive"
        )
        if redistribution is not None:
            arguments.choice("redistribution", redistribution, CRITERIA)
        self.redistribution = redistribution
        self.gradient_batches = _whole(
            "gradient_batches", gradient_batches, at_least=1
        )
        if self.gradient_batches > self.frequency:
            raise ValueError(
                "gradient_batches must be at most frequency, as each update "
                "has gradients of its own. Received: "
                f"gradient_batches={gradient_batches}, frequency={frequency}."
            )
        check_grow_init(grow_init, self.dense_gradients)
        self.grow_init = grow_init
        self.seed = arguments.integer(
            "seed", seed, at_least=0, at_most=2**32 - 1
        )
        self._span = None
        self._initial = []

    @functools.cached_property
    def _correction(self) -> tf.Variable:
        """By how much the reproduction corrects what it grows.

        The correction, the sum of what was missing, updates so far, and
        connections at the start, or -1.
        """
        start = [0.0, 0.0, 0.0, -1.0]
        return tf.Variable(start, trainable=False, dtype=tf.float64)

    # What makes a method: what connections are worth.

    def drop_scores(
        self, layer: Masked, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        """Returns the scores by which the lowest connections are dropped.

        Args:
            layer: The masked layer.
            gradient: dL/d(masked kernel) at every entry, of the kernel's
                shape.
            step: The optimizer step, an int64 scalar.

        Returns:
            Float tensor of the kernel's shape.
        """
        del gradient, step
        return scores.magnitude(layer.kernel.value)

    def grow_scores(
        self, layer: Masked, gradient: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        """Returns the scores by which the highest connections are grown.

        Args and Returns: as in `drop_scores`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define grow_scores."
        )

    def grow_count(
        self, layer: Masked, dropped: tf.Tensor, step: tf.Tensor
    ) -> tf.Tensor:
        """Returns how many connections of a layer are grown.

        Args:
            layer: The masked layer.
            dropped: How many this update drops, an int32 scalar.
            step: The optimizer step, an int64 scalar.

        Returns:
            Integer scalar tensor. By default as many as are dropped.
        """
        del layer, step
        return dropped

    @property
    def name(self) -> str:
        mean = {"gradient": "-SG", "momentum": "-SM", None: ""}
        return type(self).__name__ + mean[self.redistribution]

    @property
    def variables(self) -> list[tf.Variable]:
        corrected = self.conventions.redistribution_total == "corrected"
        correction = [self._correction] if corrected else []
        return [*correction, *self._initial, *super().variables]

    def get_config(self) -> dict:
        """Returns the arguments with which to make an equal callback."""
        return {
            "frequency": self.frequency,
            "drop_fraction": self.drop_fraction,
            "begin_step": self.begin_step,
            "end_step": self.end_step,
            "decay": self.decay,
            "decay_power": self.decay_power,
            "redistribution": self.redistribution,
            "gradient_batches": self.gradient_batches,
            "grow_init": self.grow_init,
            "seed": self.seed,
            "conventions": self.conventions,
        }

    def lengthened(self, factor: float) -> "MaskUpdate":
        longer = copy.copy(self)
        # Those of a run of its own.
        vars(longer).pop("_correction", None)
        longer._initial, longer._buffers = [], []
        longer._fit, longer._prepared = None, None
        if self.end_step is not None:
            longer.end_step = int(self.end_step * factor)
        return longer

    def extra_logs(self) -> dict[str, tf.Tensor]:
        return {"drop_fraction": self._last["drop_fraction"].value()}

    def set_up(self):
        if self.redistribution is not None:
            units = [m.name for m in self.masked if m.granularity != "element"]
            if units:
                raise ValueError(
                    "redistribution moves single weights between layers, and "
                    f"the mask of {units[0]!r} keeps or removes whole "
                    "kernels, whose sizes differ. Pass redistribution=None, "
                    "or sparsify with granularity='element'."
                )
        if self.redistribution == "momentum":
            self._check_momentum()
        # A run that resumes without `variables` takes what it has as what
        # training started from.
        if self.grow_init.startswith("initial_dist") and [
            v.shape[0] for v in self._initial
        ] != [math.prod(m.kernel.shape) for m in self.masked]:
            self._initial = [
                tf.Variable(_repeated_nonzeros(m.kernel), trainable=False)
                for m in self.masked
            ]
        if self._correction[3] < 0:
            self._begin_correction()

    def forget(self):
        self._begin_correction()
        if self._initial:
            for kept, layer in zip(self._initial, self.masked, strict=True):
                kept.assign(_repeated_nonzeros(layer.kernel))

    def _begin_correction(self):
        connections = sum(self.trajectory[0][1])
        self._correction.assign([0.0, 0.0, 0.0, connections])

    def _check_momentum(self):
        # Of any that is trained: one that is frozen has no memory.
        trained = {id(v) for v in self._model.trainable_variables}
        for layer in self.masked:
            if id(layer.kernel) in trained:
                optimizer_state.momentum(self.optimizer, layer.kernel)
                return

    # When.

    def plan(self, epoch, epochs, steps):
        """Fixes the update window, once the run is known."""
        end_step = self.end_step
        if end_step is None:
            if not steps or not epochs:
                raise ValueError(
                    f"{self.name}(end_step=None) ends updates at three "
                    "quarters of the run, but how long this run is is not "
                    "known. Pass steps_per_epoch to fit, or end_step to "
                    f"{type(self).__name__}."
                )
            each = optimizer_state.batches_per_step(self.optimizer)
            end_step = int(0.75 * epochs * steps) // each
        self._span = {
            "begin_step": self.begin_step,
            "end_step": max(end_step, self.begin_step),
        }
        if steps and epochs:
            left = self.steps_in((epochs - epoch) * steps)
            first, rhythm = self._counted(self.trajectory[0][0])
            if schedules.planned_updates(first, left, **rhythm) == 0:
                warn_of_no_update(
                    self.name,
                    left,
                    self.trajectory[0][0] - self.run_start,
                    f"one comes every frequency={self.frequency} steps from "
                    f"begin_step={self.begin_step} to end_step={end_step}",
                )

    @property
    def _measures_the_run(self):
        return self.end_step is None

    @property
    def _window(self):
        """The first and last step of updates, as the optimizer counts."""
        return {name: t + self.run_start for name, t in self._span.items()}

    def _counted(self, step):
        """Returns when updates come, and a step as this counts it.

        A run that begins on trained weights may begin with an update. Nothing
        is known of a connection at the first step of all (t > 0 in
        Algorithm 1).
        """
        earlier = self.frequency if self.run_start > 0 else 0
        return step - self.run_start + earlier, {
            "frequency": self.frequency,
            "conventions": self.conventions,
            **{name: t + earlier for name, t in self._span.items()},
        }

    def is_due(self, step):
        step, rhythm = self._counted(step)
        return schedules.is_update_step(step, **rhythm)

    def is_gathered(self, step):
        if self.gradient_batches == 1:
            return self.is_due(step)
        step, rhythm = self._counted(step)
        return schedules.is_gathered_step(
            step, gradient_batches=self.gradient_batches, **rhythm
        )

    # The update, in the graph.

    def change_masks(self, optimizer, layers, gradients, step):
        fraction = schedules.decayed_drop_fraction(
            step,
            drop_fraction=self.drop_fraction,
            decay=self.decay,
            decay_power=self.decay_power,
            conventions=self.conventions,
            **self._window,
        )
        self._last["drop_fraction"].assign(tf.cast(fraction, tf.float32))
        # A unit is an entry of the kernel, or all entries between two
        # channels.
        masks = [m.units(m.mask.value > 0) for m in layers]
        drop_scores, grow_scores = (
            [
                layer.by_unit(score(layer, gradient, step))
                for layer, gradient in zip(layers, gradients, strict=True)
            ]
            for score in (self.drop_scores, self.grow_scores)
        )
        defined = ~tf.reduce_any(
            [
                tf.reduce_any(tf.math.is_nan(s))
                for s in drop_scores + grow_scores
            ]
        )
        self.refuse_unless(defined, step)
        shares = None
        if self.redistribution or self.conventions.spare_dense_layers:
            shares = self._shares(optimizer, layers, gradients)
        fractions = topology.layer_drop_fractions(
            masks, shares, fraction, conventions=self.conventions
        )
        kept = [
            topology.drop(mask, score, f, conventions=self.conventions)
            for mask, score, f in zip(
                masks, drop_scores, fractions, strict=True
            )
        ]
        counts = self._grow_counts(layers, masks, kept, shares, step)
        grown = []
        for layer, mask, stays, score, count, gradient in zip(
            layers, masks, kept, grow_scores, counts, gradients, strict=True
        ):
            new, anew = topology.grow(
                mask, stays, score, count, conventions=self.conventions
            )
            new, anew = tf.where(defined, new, mask), anew & defined
            new, anew = layer.by_element(new), layer.by_element(anew)
            values = self._grown_values(layer, gradient, step)
            grown.append(
                self.set_kernel_and_mask(optimizer, layer, new, anew, values)
            )
        self._keep_correction()
        return tf.add_n(grown)

    def _grown_values(self, layer, gradient, step):
        initial = dict(zip(map(id, self.masked), self._initial, strict=False))
        return grown_values(
            self.grow_init,
            layer.kernel.value,
            layer.mask.value,
            gradient=gradient,
            initial=initial.get(id(layer)),
            # SET grows by the draws of the key itself.
            key=layer.draw_key ^ self.seed ^ 2,
            step=step,
        )

    def _shares(self, optimizer, layers, gradients):
        """Returns each layer's share of what density is redistributed by."""
        if self.redistribution is None:
            nonzeros = [tf.math.count_nonzero(m.kernel.value) for m in layers]
            return redistribution.shares(nonzeros)
        if self.redistribution == "gradient":
            statistics = gradients
        else:
            statistics = [
                optimizer_state.momentum(optimizer, m.kernel) for m in layers
            ]
        return redistribution.shares(
            [
                redistribution.layer_mean(statistic, layer.mask.value)
                for statistic, layer in zip(statistics, layers, strict=True)
            ]
        )

    def _grow_counts(self, layers, masks, kept, shares, step):
        """Returns how many units each layer grows."""
        dropped = [
            _count(mask) - _count(stays)
            for mask, stays in zip(masks, kept, strict=True)
        ]
        if self.redistribution is None:
            return [
                self.grow_count(layer, count, step)
                for layer, count in zip(layers, dropped, strict=True)
            ]
        return tf.unstack(
            redistribution.grow_counts(
                shares,
                tf.stack(dropped),
                tf.stack([_count(~stays) for stays in kept]),
                correction=self._correction[0],
                conventions=self.conventions,
            )
        )

    def _keep_correction(self):
        if self.redistribution is None or not self.variables:
            return
        connections = tf.add_n([_count(m.mask.value) for m in self.masked])
        connections = tf.cast(connections, tf.float64)
        correction, missing_so_far, updates, start = tf.unstack(
            self._correction
        )
        missing = start - connections
        missing_so_far += missing
        updates += 1
        correction = redistribution.corrected(
            correction, missing, missing_so_far / updates
        )
        self._correction.assign([correction, missing_so_far, updates, start])


class RigL(MaskUpdate):
    """Grows the connections of largest gradient magnitude.

    Evci et al., 2020, Rigging the Lottery, arXiv:1911.11134. With
    `redistribution="gradient"` it is the report's RigL-SG, with `"momentum"`
    its RigL-SM (section 6.2).

    Args, Raises: as in `MaskUpdate`.

    Example:

    >>> model.fit(train, epochs=250, callbacks=[RigL()])
    """

    def grow_scores(self, layer, gradient, step):
        return scores.gradient_magnitude(gradient)


class SET(MaskUpdate):
    """Grows connections at random.

    Mocanu et al., 2018, Scalable training of artificial neural networks with
    adaptive sparse connectivity. With `"bernoulli"` sampling, as the report's
    code has it, the number grown is random too.

    Args, Raises: as in `MaskUpdate`.
    """

    dense_gradients = "never"

    def grow_scores(self, layer, gradient, step):
        return scores.random(
            layer.kernel.shape, key=layer.draw_key ^ self.seed, step=step
        )

    def grow_count(self, layer, dropped, step):
        if self.conventions.sampling == "exact":
            return dropped
        # Each inactive unit joins with probability dropped / inactive: the
        # number that join is binomial, and which ones is uniform.
        mask = layer.units(layer.mask.value > 0)
        inactive = tf.size(mask) - _count(mask) + dropped
        key = tf.constant(layer.draw_key ^ self.seed ^ 1, tf.int64)
        seed = tf.stack([key, step])
        return tf.random.stateless_binomial(
            [],
            seed,
            counts=tf.cast(inactive, tf.float32),
            probs=tf.cast(dropped, tf.float32)
            / tf.cast(tf.maximum(inactive, 1), tf.float32),
            output_dtype=tf.int32,
        )


class SNFS(MaskUpdate):
    """Grows the connections of largest momentum, where momentum is largest.

    Gradients are dense at every step, so that the optimizer's momentum is
    that of every entry, active or not. An update grows by its magnitude, a
    layer in proportion to its mean over active connections; the optimizer
    forgets nothing. Dettmers and Zettlemoyer, 2020, Sparse networks from
    scratch, arXiv:1907.04840, section 3, with the optimizer's own momentum as
    in their code. It costs a dense backward pass at every step.

    Args, Raises: as in `MaskUpdate`. The optimizer must keep momentum
        (`optimizer_state.momentum`).
    """

    dense_gradients = "always"

    def __init__(
        self,
        *,
        frequency: int = 100,
        drop_fraction: float = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        decay: str = "cosine",
        decay_power: float = 3.0,
        redistribution: str | None = "momentum",
        gradient_batches: int = 1,
        grow_init: str = "zeros",
        seed: int = 0,
        conventions: Conventions = ORIGINAL,
    ):
        super().__init__(
            frequency=frequency,
            drop_fraction=drop_fraction,
            begin_step=begin_step,
            end_step=end_step,
            decay=decay,
            decay_power=decay_power,
            redistribution=redistribution,
            gradient_batches=gradient_batches,
            grow_init=grow_init,
            seed=seed,
            conventions=conventions,
        )
        # Even in the reproduction, what SNFS drops and grows again keeps its
        # weight (funcs/grow.py:45-55).
        self.conventions = dataclasses.replace(
            conventions, regrown_value="kept"
        )

    def set_up(self):
        super().set_up()
        self._check_momentum()

    @property
    def name(self) -> str:
        other = {"momentum": "", "gradient": "-SG", None: " (fixed)"}
        return type(self).__name__ + other[self.redistribution]

    def grow_scores(self, layer, gradient, step):
        momentum = optimizer_state.momentum(self.optimizer, layer.kernel)
        return scores.magnitude(momentum)


class MagnitudePruning(StepUpdate):
    """Removes the smallest weights while sparsity rises along a schedule.

    Start with `sparsify(model, density=1.0)`. When the schedule is due with a
    sparsity s, the round((1 - s) x weights) connections of largest magnitude
    stay, of all masked layers together or of each on its own (of whole
    kernels, as many as fit into that). What is removed never returns. Zhu and
    Gupta, 2018, To prune, or not to prune, arXiv:1710.01878.

    As for every method here the pruning takes the place of an optimizer step;
    with `update_replaces_step=False` in the conventions it follows one, as in
    the authors' code.

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

    dense_gradients = "never"

    def __init__(
        self,
        schedule,
        *,
        scope: str = "global",
        conventions: Conventions = ORIGINAL,
    ):
        super().__init__(conventions=conventions)
        if not callable(schedule):
            raise ValueError(
                "schedule must be a rigl_keras.SparsityRamp or a "
                "tfmot.sparsity.keras.PruningSchedule. Received: "
                f"schedule={schedule!r}. For a density, pass "
                "SparsityRamp(final_density=..., begin_step=..., end_step=...)."
            )
        arguments.choice("scope", scope, ("global", "layer"))
        self.schedule = schedule
        self.scope = scope

    def get_config(self) -> dict:
        """Returns the arguments with which to make an equal callback."""
        return {
            "schedule": self.schedule,
            "scope": self.scope,
            "conventions": self.conventions,
        }

    def lengthened(self, factor: float) -> "MagnitudePruning":
        if not hasattr(self.schedule, "lengthened"):
            raise ValueError(
                "A longer run needs a longer schedule, and a "
                f"{type(self.schedule).__name__} cannot be lengthened: pass a "
                "rigl_keras.SparsityRamp, or the schedule of the whole run."
            )
        longer = copy.copy(self)
        longer._fit, longer._prepared = None, None
        longer.schedule = self.schedule.lengthened(factor)
        return longer

    def plan(self, epoch, epochs, steps):
        if not (steps and epochs):
            return
        first = self.trajectory[0][0]
        left = self.steps_in((epochs - epoch) * steps)

        @tf.function
        def first_due():
            return tf.while_loop(
                lambda t: (t < first + left) & ~self.is_due(t),
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

    def is_due(self, step):
        # A schedule of one's own may say True.
        return tf.convert_to_tensor(self._planned_sparsity(step)[0], tf.bool)

    def _planned_sparsity(self, step):
        return schedules.planned_sparsity(
            self.schedule, step - self.run_start, conventions=self.conventions
        )

    def change_masks(self, optimizer, layers, gradients, step):
        sparsity = self._planned_sparsity(step)[1]
        if not tf.is_tensor(sparsity):
            sparsity = tf.constant(sparsity, tf.float64)
        density = 1 - sparsity
        masks = [m.mask.value > 0 for m in layers]
        # Of a kernel that is kept or removed as one, each entry is worth the
        # same.
        worth = [
            m.by_element(m.by_unit(scores.magnitude(m.kernel.value)))
            for m in layers
        ]
        if self.scope == "global":
            count = _share(density, sum(math.prod(m.shape) for m in masks))
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
            whole = ~layer.units(~stays)
            stays = layer.by_element(whole)
            nothing = tf.zeros_like(stays)
            self.set_kernel_and_mask(optimizer, layer, stays, nothing)
        return tf.constant(0)


def _repeated_nonzeros(kernel):
    """Returns a kernel's nonzero weights, repeated to its own size."""
    weights = kernel.numpy().ravel()
    nonzeros = weights[weights != 0]
    return np.resize(nonzeros if nonzeros.size else weights, weights.shape)


def _share(density, size):
    # In the precision of the schedule, as tfmot rounds.
    return tf.cast(tf.round(density * tf.cast(size, density.dtype)), tf.int32)


def _layer_share(density, layer):
    """Returns how many entries of a layer stay: whole units, one at least."""
    units = math.prod(layer.by_unit(layer.mask.value).shape)
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


def _count(units):
    return tf.reduce_sum(tf.cast(units, tf.int32))


def _whole(name, value, *, at_least):
    rule = "counts in whole numbers and must be an int of at least"
    return arguments.integer(
        name, value, at_least=at_least, rule=f"{rule} {at_least}"
    )
