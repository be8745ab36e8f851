"""Mask updates within `fit`.

`MaskUpdate` decides when an update happens, has it run in the training step
and logs it. A method is a child that says what a connection is worth.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from rigl_keras import optimizer_state, schedules, scores, topology
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.layers import Masked, dense_gradients
from rigl_keras.sparsify import masked_layers

__all__ = ["MaskUpdate", "RigL", "SET"]


class MaskUpdate(keras.callbacks.Callback):
    """Drops and grows connections every so many steps of `fit`.

    At an update step (`schedules.is_update_step`) the model's own training
    step runs with dense gradients, and where the optimizer would be applied
    the masks change instead:

    1. the drop fraction f is that of `schedules.decayed_drop_fraction`;
    2. each kernel moves the fraction f of its connections
       (`topology.drop_and_grow`), by this method's `drop_scores` and
       `grow_scores`;
    3. dropped and newly grown weights are zero, and the optimizer forgets
       what it remembered of them;
    4. the update counts as an optimizer step.

    Evci et al., 2020, arXiv:1911.11134, Algorithm 1. The gradient is that of
    the current batch with respect to the masked kernel, without
    regularisation. The step is `optimizer.iterations`, so that a resumed run
    needs no state of this callback.

    Logs, which History, the progress bar and TensorBoard show: `density` of
    all masked weights, and `drop_fraction` and `grown` (connections) of the
    last update.

    Args:
        frequency: Steps from one update to the next, at least 1.
        drop_fraction: Fraction of the active connections dropped at the
            first update, in [0, 1].
        begin_step: First step at which an update may happen, at least 0.
        end_step: Last step at which an update may happen. None: three
            quarters of the run, as the paper has it.
        decay: How the fraction falls until `end_step`: one of
            `schedules.DECAYS`.
        decay_power: Exponent of the polynomial decay, positive.
        seed: Seed of random draws, at least 0.
        conventions: Where the references differ.

    Raises:
        ValueError: An argument is out of range; in `fit`, when the model has
            no masked layers, the run's length is needed and unknown, or
            gradients are not finite.
        UserWarning: No update falls into the run.
    """

    def __init__(
        self,
        *,
        frequency: int = 100,
        drop_fraction: float = 0.3,
        begin_step: int = 0,
        end_step: int | None = None,
        decay: str = "cosine",
        decay_power: float = 3.0,
        seed: int = 0,
        conventions: Conventions = ORIGINAL,
    ):
        super().__init__()
        _check_int("frequency", frequency, at_least=1)
        _check_int("begin_step", begin_step, at_least=0)
        _check_int("seed", seed, at_least=0)
        if seed >= 2**32:
            raise ValueError(
                f"seed must be less than 2 ** 32. Received: seed={seed}."
            )
        if end_step is not None:
            _check_int("end_step", end_step, at_least=0)
            if end_step < begin_step:
                raise ValueError(
                    "end_step must not come before begin_step. Received: "
                    f"begin_step={begin_step}, end_step={end_step}."
                )
        _check_fraction("drop_fraction", drop_fraction)
        if decay not in schedules.DECAYS:
            raise ValueError(
                f"decay must be one of {schedules.DECAYS}. Received: "
                f"decay={decay!r}."
            )
        if not (isinstance(decay_power, (int, float)) and decay_power > 0):
            raise ValueError(
                "decay_power must be positive. Received: "
                f"decay_power={decay_power!r}."
            )
        if not isinstance(conventions, Conventions):
            raise ValueError(
                "conventions must be rigl_keras.ORIGINAL, rigl_keras.REPORT "
                "or a Conventions of your own. Received: "
                f"conventions={conventions!r}."
            )
        self.frequency = frequency
        self.drop_fraction = drop_fraction
        self.begin_step = begin_step
        self.end_step = end_step
        self.decay = decay
        self.decay_power = decay_power
        self.seed = seed
        self.conventions = conventions

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
    ) -> tf.Tensor | None:
        """Returns how many connections of a layer are grown.

        Args:
            layer: The masked layer.
            dropped: How many this update drops, an int32 scalar.
            step: The optimizer step, an int64 scalar.

        Returns:
            Integer scalar tensor, or None for as many as are dropped.
        """
        del layer, dropped, step
        return None

    # Keras calls these.

    def on_train_begin(self, logs=None):
        model, optimizer = self.model, self.model.optimizer
        self._masked = [m for m in masked_layers(model) if m.trainable]
        if not self._masked:
            raise ValueError(
                f"{type(self).__name__} found no masked layer to train in "
                f"model {model.name!r}. Call model = "
                "rigl_keras.sparsify(model, density) before compile."
            )
        _check_set_up(type(self).__name__, model)
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        self._weights = sum(math.prod(m.mask.shape) for m in self._masked)
        self._density = tf.Variable(self._current_density(), trainable=False)
        self._last_fraction = tf.Variable(0.0, trainable=False)
        self._last_grown = tf.Variable(0.0, trainable=False)
        self._refused_at = tf.Variable(-1, trainable=False, dtype=tf.int64)
        self._window = None

        if _installed(model) is not None:
            raise ValueError(
                "A model takes one mask update at a time. Received both "
                f"{type(_installed(model)).__name__} and "
                f"{type(self).__name__}."
            )
        self._install()

    def on_epoch_begin(self, epoch, logs=None):
        if self._window is None:
            self._plan(epoch)

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self.frequency == 0:
            self._raise_if_refused()

    def on_epoch_end(self, epoch, logs=None):
        self._raise_if_refused()

    def on_train_end(self, logs=None):
        self._uninstall()

    def get_config(self) -> dict:
        """Returns the arguments with which to make an equal callback."""
        return {
            "frequency": self.frequency,
            "drop_fraction": self.drop_fraction,
            "begin_step": self.begin_step,
            "end_step": self.end_step,
            "decay": self.decay,
            "decay_power": self.decay_power,
            "seed": self.seed,
            "conventions": self.conventions,
        }

    # The model's own step, exchanged while `fit` runs.

    def _install(self):
        model, train_step = self.model, self.model.train_step
        make_train_function = model.make_train_function
        self._replaced = {
            name: vars(model).get(name)
            for name in ("train_step", "make_train_function")
        }
        model.train_step = self._with_updates(train_step)
        make_train_function(force=True)

        def next_fit(force=False):
            # `fit` asks for its function before it calls any callback: an
            # earlier `fit` must have been cut off before `on_train_end`.
            self._uninstall()
            return make_train_function(force=force)

        model.make_train_function = next_fit

    def _uninstall(self):
        for name, own in self._replaced.items():
            if own is None:
                delattr(self.model, name)
            else:
                setattr(self.model, name, own)
        self.model.train_function = None

    # Planning, on the host.

    def _plan(self, epoch):
        """Fixes the update window, once the first epoch is known."""
        iterations = int(self.model.optimizer.iterations)
        epochs, steps = self.params.get("epochs"), self.params.get("steps")
        end_step = self.end_step
        if end_step is None:
            if not steps or not epochs:
                raise ValueError(
                    f"{type(self).__name__}(end_step=None) ends updates at "
                    "three quarters of the run, but Keras does not know how "
                    "long this run is. Pass steps_per_epoch to fit, or "
                    f"end_step to {type(self).__name__}."
                )
            # A run that resumes, within an epoch perhaps, is counted whole;
            # one on weights that were trained before, from where it starts.
            resumed = epoch * steps <= iterations < (epoch + 1) * steps
            if resumed:
                end_step = int(0.75 * epochs * steps)
            else:
                end_step = iterations + int(0.75 * (epochs - epoch) * steps)
        self._window = {
            "begin_step": self.begin_step,
            "end_step": max(end_step, self.begin_step),
        }
        if steps and epochs:
            left = (epochs - epoch) * steps
            updates = schedules.planned_updates(
                iterations,
                left,
                frequency=self.frequency,
                conventions=self.conventions,
                **self._window,
            )
            if updates == 0:
                warnings.warn(
                    f"{type(self).__name__} plans 0 updates in the {left} "
                    f"steps of this run from step {iterations} on: one comes "
                    f"every frequency={self.frequency} steps from "
                    f"begin_step={self.begin_step} to end_step={end_step}. "
                    "The masks will not change.",
                    stacklevel=2,
                )

    def _raise_if_refused(self):
        step = int(self._refused_at.numpy())
        if step >= 0:
            raise ValueError(
                f"{type(self).__name__} refused the update at step {step}: "
                "the gradient of a masked kernel was NaN or infinite, so "
                "training has diverged. The masks are unchanged. Lower the "
                "learning rate or clip gradients, and resume from a "
                "checkpoint before this step."
            )

    def _current_density(self):
        ones = tf.add_n([_count(m.mask.value) for m in self._masked])
        return tf.cast(ones / self._weights, tf.float32)

    # The update, in the graph.

    def _with_updates(self, train_step) -> Callable:
        """Returns `train_step` with updates at the steps of the schedule."""

        def step_or_update(data):
            step = tf.cast(self.model.optimizer.iterations, tf.int64)
            due = schedules.is_update_step(
                step,
                frequency=self.frequency,
                conventions=self.conventions,
                **self._window,
            )
            logs = tf.cond(
                due,
                lambda: self._update_step(train_step, data, step),
                lambda: _tensors(train_step(data)),
            )
            return {
                **logs,
                "density": self._density.value(),
                "drop_fraction": self._last_fraction.value(),
                "grown": self._last_grown.value(),
            }

        step_or_update.mask_update = self
        return step_or_update

    def _update_step(self, train_step, data, step):
        """Runs `train_step` with an update in place of the optimizer."""
        optimizer = optimizer_state.innermost(self.model.optimizer)
        apply = optimizer.apply

        def update_instead(gradients, trainable_variables=None):
            variables = trainable_variables or self.model.trainable_variables
            if self.conventions.update_replaces_step:
                self.update(optimizer, gradients, variables, step)
                optimizer._iterations.assign_add(1)
            else:
                masks = {id(m.kernel): m.mask.value for m in self._masked}
                sparse = [
                    g * masks[id(v)] if id(v) in masks else g
                    for g, v in zip(gradients, variables, strict=True)
                ]
                apply(sparse, variables)
                self.update(optimizer, gradients, variables, step)

        with dense_gradients(), _applying(optimizer, update_instead):
            return _tensors(train_step(data))

    def update(self, optimizer, gradients, variables, step) -> None:
        """Changes every mask once, by the dense gradients of one batch.

        Args:
            optimizer: The optimizer that trains the model.
            gradients: Gradients taken within `dense_gradients()`, one for
                each of `variables`.
            variables: The variables they belong to; other variables than
                masked kernels are left alone.
            step: The optimizer step, an integer scalar.
        """
        of = {id(v): g for v, g in zip(variables, gradients, strict=True)}
        layers = [m for m in self._masked if of.get(id(m.kernel)) is not None]
        gradients = [
            tf.convert_to_tensor(of[id(m.kernel)])
            - _regularisation_gradient(m.kernel)
            for m in layers
        ]
        finite = tf.reduce_all(
            [tf.reduce_all(tf.math.is_finite(g)) for g in gradients]
        )
        fraction = schedules.decayed_drop_fraction(
            step,
            drop_fraction=self.drop_fraction,
            decay=self.decay,
            decay_power=self.decay_power,
            conventions=self.conventions,
            **self._window,
        )
        fractions = topology.layer_drop_fractions(
            [m.mask.value for m in layers],
            [m.kernel.value for m in layers],
            fraction,
            conventions=self.conventions,
        )

        def change_masks():
            grown = [
                self._update_layer(optimizer, layer, gradient, f, step)
                for layer, gradient, f in zip(
                    layers, gradients, fractions, strict=True
                )
            ]
            self._last_grown.assign(tf.cast(tf.add_n(grown), tf.float32))
            self._last_fraction.assign(tf.cast(fraction, tf.float32))
            self._density.assign(self._current_density())

        def refuse():
            self._refused_at.assign(step)

        tf.cond(finite, change_masks, refuse)

    def _update_layer(self, optimizer, layer, gradient, fraction, step):
        """Updates one kernel; returns how many connections were grown."""
        mask = layer.mask.value
        dropped = topology.drop_count(
            mask, fraction, conventions=self.conventions
        )
        new_mask, grown = topology.drop_and_grow(
            mask,
            self.drop_scores(layer, gradient, step),
            self.grow_scores(layer, gradient, step),
            drop_fraction=fraction,
            grow_count=self.grow_count(layer, dropped, step),
            conventions=self.conventions,
        )
        kept = (new_mask > 0) & ~(grown > 0)
        kernel = layer.kernel
        kernel.assign(tf.where(kept, kernel.value, tf.zeros_like(mask)))
        # A connection that left and rejoined keeps its memory, even where
        # the conventions zero its weight.
        optimizer_state.forget(
            optimizer, kernel, keep=(mask > 0) & (new_mask > 0)
        )
        layer.mask.assign(new_mask)
        return _count(grown)


class RigL(MaskUpdate):
    """Grows the connections of largest gradient magnitude.

    Evci et al., 2020, Rigging the Lottery, arXiv:1911.11134.

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

    def grow_scores(self, layer, gradient, step):
        return scores.random(
            layer.kernel.shape, key=layer.draw_key ^ self.seed, step=step
        )

    def grow_count(self, layer, dropped, step):
        if self.conventions.sampling == "exact":
            return None
        # Each inactive entry joins with probability dropped / inactive: the
        # number that join is binomial, and which ones is uniform.
        mask = layer.mask.value
        inactive = tf.size(mask, tf.int64) - _count(mask)
        inactive += tf.cast(dropped, tf.int64)
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


@contextlib.contextmanager
def _applying(optimizer, action) -> Iterator[None]:
    """Within the context, `optimizer.apply` is `action`."""
    optimizer.apply = action
    try:
        yield
    finally:
        del optimizer.apply


def _regularisation_gradient(kernel):
    """Returns the gradient of a kernel's own penalty, or 0 without one."""
    if kernel.regularizer is None:
        return 0.0
    value = tf.convert_to_tensor(kernel.value)
    with tf.GradientTape() as tape:
        tape.watch(value)
        penalty = kernel.regularizer(value)
    return tape.gradient(
        penalty, value, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )


def _tensors(logs):
    return tf.nest.map_structure(tf.convert_to_tensor, logs)


def _count(mask):
    return tf.math.count_nonzero(mask)


def _check_int(name, value, *, at_least):
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < at_least:
        raise ValueError(
            f"{name} counts in whole numbers and must be an int of at least "
            f"{at_least}. Received: {name}={value!r}."
        )


def _check_fraction(name, value):
    # `not (a <= x <= b)` also catches NaN.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 <= value <= 1):
        raise ValueError(
            f"{name} is a fraction of the active connections and must be in "
            f"[0, 1]. Received: {name}={value!r}."
        )


def _installed(model):
    """Returns the callback whose updates a model's training step runs."""
    return getattr(model.train_step, "mask_update", None)


def _check_set_up(method, model):
    if model.optimizer is None:
        raise ValueError(
            f"{method} needs a compiled model: call model.compile first."
        )
    for optimizer in (
        model.optimizer,
        optimizer_state.innermost(model.optimizer),
    ):
        steps = optimizer.gradient_accumulation_steps
        if steps:
            raise ValueError(
                f"{method} does not support gradient accumulation yet: its "
                f"growth gradient would be that of the last of {steps} "
                "micro-batches. Use a larger batch, or "
                "gradient_accumulation_steps=None."
            )
    strategy = model.distribute_strategy
    if strategy.num_replicas_in_sync > 1:
        raise ValueError(
            f"{method} does not run under {type(strategy).__name__} yet: train "
            "on one device."
        )
