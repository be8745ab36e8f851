"""An update within the graph of a training step."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import tensorflow as tf

from rigl_keras import _keras, replicas
from rigl_keras._warn import warn
from rigl_keras.kernels import library
from rigl_keras.kernels.layer_products import dense_products, only_dense
from rigl_keras.kernels.place_operations import places_of
from rigl_keras.layouts import Layout
from rigl_keras.masking.kernel_part import KernelPart
from rigl_keras.masking.tracing import (
    called_kernels,
    dense_gradients,
    looking_at,
    zero_outside,
)
from rigl_keras.training import optimizer_state
from rigl_keras.training.attachment import Attachment, variable_key
from rigl_keras.training.dense_gradients import (
    GradientBuffers,
    kernel_gradients,
    masked_gradients,
    seem_masked,
)
from rigl_keras.training.gradient_exchange import (
    exchanges_active,
    exchanging_active,
)
from rigl_keras.training.update_record import (
    APPLIED_TWICE,
    NOT_DENSE,
    ONE_UPDATE_A_STEP,
    UpdateRecord,
)

__all__ = ["GraphUpdates"]


class GraphUpdates:
    """Runs a training step that changes masks when an update is due.

    A training step is traced twice: for ordinary steps, and with dense
    gradients for steps whose gradients count for an update. In the second trace
    this replaces `optimizer.apply`:

    1. The gradients of masked kernels are taken without regularisation, and
       summed over replicas. With `buffers`, those of earlier batches count.
    2. If no update is due, the optimizer is applied as usual.
    3. Otherwise `change_masks` is called, unless a gradient or a kernel is not
       finite, and the step is counted (Evci et al., 2020, arXiv:1911.11134,
       Algorithm 1).

    Args:
        attached: What is trained.
        record: Where updates are noted.
        buffers: Sums of gradients of several batches. None: each update uses
            those of its own batch.
        method: Name of the method.
        is_due: Returns whether masks change at a step.
        is_gathered: Returns whether the gradients of a step count.
        change_masks: Takes the optimizer, the layers, their gradients and the
            step, changes masks, and returns how many connections have grown.
        looks_at: Takes a layer and the step, and returns where the gradient
            is looked at (`MethodHooks.looks_at`).
        changes_parts: Whether `change_masks` takes those entries alone, where
            it can (`KernelPart`).
        apply_gradients: Takes the optimizer's `apply`, gradients and
            variables, and takes a step, on one device. None: `apply` does.
        dense_gradients: When gradients are dense: `"never"`, at `"updates"`
            or `"always"`.
        update_replaces_step: Whether an update takes the place of the
            optimizer's step, or follows it.
    """

    def __init__(
        self,
        attached: Attachment,
        record: UpdateRecord,
        buffers: GradientBuffers | None,
        *,
        method: str,
        is_due: Callable[[int | tf.Tensor], bool | tf.Tensor],
        is_gathered: Callable[[int | tf.Tensor], bool | tf.Tensor],
        change_masks: Callable[..., tf.Tensor],
        looks_at: Callable[..., tf.Tensor | None],
        changes_parts: bool,
        apply_gradients: Callable[..., None] | None,
        dense_gradients: str,
        update_replaces_step: bool,
    ):
        self._record = record
        self._method = method
        self._is_due, self.is_gathered = is_due, is_gathered
        self._change_masks = change_masks
        self._looks_at, self._changes_parts = looks_at, changes_parts
        # By id of the kernel, where its gradient is looked at, while a step
        # is traced.
        self._looked_at: dict[int, tf.Tensor] = {}
        self._apply_gradients = apply_gradients
        self._dense_gradients = dense_gradients
        self._update_replaces_step = update_replaces_step
        self._reached: set[int] = set()
        self._warns_of_unreached = True
        self.bind(attached, buffers)

    def bind(
        self, attached: Attachment, buffers: GradientBuffers | None
    ) -> None:
        """Continues with another optimizer, or other masked layers.

        Args:
            attached: What is trained from now on.
            buffers: Its buffers.
        """
        self._attached, self._buffers = attached, buffers
        self.forget_traces()

    def forget_traces(self) -> None:
        """Forgets what earlier traces called, before others are made."""
        self._called: dict[int, str] = {}

    # Whole steps.

    def step_or_update(
        self, train_step: Callable, loss: Callable | None = None
    ):
        """Runs a training step, or an update in place of its optimizer.

        Args:
            train_step: A function without arguments that applies the
                optimizer.
            loss: Evaluates the loss of the step's batch. None: the loss is
                not watched.

        Returns:
            What `train_step` returns, as tensors.
        """
        return tf.cond(
            self.is_gathered(self._attached.step()),
            lambda: self.update_step(train_step, loss),
            lambda: self.ordinary_step(train_step),
        )

    def apply_or_update(self, gradients: list, variables: list) -> None:
        """Applies gradients, or changes masks where an update is due.

        Args:
            gradients: Dense gradients of the loss.
            variables: The variables that they are gradients of.
        """
        optimizer = self._attached.applied  # `apply` is exchanged meanwhile

        def ordinary():
            masked = self._masked_gradients(gradients, variables)
            with self._stepping():
                optimizer.apply(masked, variables)

        def update():
            optimizer.apply(gradients, variables)

        tf.cond(
            self.is_gathered(self._attached.step()),
            lambda: self._update(update, by_hand=True),
            lambda: self._run(ordinary),
        )

    def ordinary_step(self, train_step: Callable):
        """Runs a training step in which masks stay as they are.

        Args:
            train_step: As in `step_or_update`.

        Returns:
            As `step_or_update`.
        """
        always = self._dense_gradients == "always"
        with self._stepping():
            return self._run(_densely(train_step) if always else train_step)

    def update_step(self, train_step: Callable, loss: Callable | None = None):
        """Runs a training step whose gradients count for an update.

        Args and Returns: as in `step_or_update`.
        """
        self._looked_at = self._masks_to_look_at()
        try:
            with looking_at(self._looked_at):
                return self._update(self._of_update(train_step), loss)
        finally:
            self._looked_at = {}

    def _masks_to_look_at(self):
        """Returns `{id of a kernel: mask in bytes}` of an update's step."""
        attached = self._attached
        if (
            self._buffers is not None
            or tf.distribute.has_strategy()
            or getattr(attached.model, "jit_compile", False)
            or only_dense()
            or tf.config.list_physical_devices("GPU")
            or all(layer.product == "dense" for layer in attached.wrappers)
        ):
            return {}
        step = attached.step()
        found = {}
        for layer in attached.trainable():
            if layer.kernel.dtype == "float32" and library.load() is not None:
                mask = self._looks_at(layer, step)
                if mask is not None:
                    found[id(layer.kernel)] = mask
        return found

    def replica_update_step(self, train_step: Callable):
        """Runs the part of `update_step` that one of several replicas has.

        The host is within `updating` and `watching` meanwhile, for all
        replicas.

        Args and Returns: as in `step_or_update`.
        """
        return self._counted(self._of_update(train_step))

    def _of_update(self, train_step):
        """Returns the training step of an update, with the gradients it needs.

        They are dense, or zero outside the masks if dense ones are never used.
        """
        never = self._dense_gradients == "never"
        return train_step if never else _densely(train_step)

    def _update(self, train_step, loss=None, *, by_hand=False):
        with self.updating([], loss, by_hand=by_hand):
            return self._counted(train_step)

    def _counted(self, train_step):
        """Runs a step, and counts it if loss scaling delays an update."""
        attached = self._attached
        step, batches = attached.step(), attached.batches()
        outputs = self._run(train_step)
        if attached.scales_loss:
            replicas.once(self._note_skipped, [batches, step])
        if not tf.distribute.has_strategy():
            # In a loop of the graph, one trace is applied many times.
            once = attached.step() - step <= 1
            self._record.refuse_unless(once, step, APPLIED_TWICE)
        return outputs

    def _note_skipped(self, batches, step):
        after = optimizer_state.batches(self._attached.optimizer).value
        self._record.note_skipped(self._is_due(step) & tf.equal(batches, after))

    def _run(self, train_step):
        """Traces a training step, and what follows each one."""
        jit = getattr(self._attached.model, "jit_compile", False)
        alone = not tf.distribute.has_strategy()
        with (
            called_kernels() as called,
            dense_products() if jit else contextlib.nullcontext(),
            self.watching() if alone else contextlib.nullcontext(),
        ):
            outputs = _as_tensors(train_step())
        self._check_called(called)
        optimizer_state.project_averages(
            self._attached.optimizer, self._attached.masked
        )
        return outputs

    # What a training step is found to do as it is traced.

    def _check_called(self, called):
        """Checks that each kind of step was traced down to the kernels."""
        missing = [n for k, n in self._called.items() if k not in called]
        if missing:
            raise ValueError(
                f"{self._method} needs the layers to be traced once for "
                "ordinary steps and once for updates, but the calls of "
                f"{', '.join(missing)} are traced only once, within an "
                "inner tf.function. Remove that decorator; the training "
                "step as a whole is compiled anyway."
            )
        self._called.update(called)

    def check_steps(self, steps: int) -> None:
        """Checks how often a training step applies its optimizer.

        Args:
            steps: How often it did.

        Raises:
            ValueError: More than once.
        """
        if steps > 1:
            raise ValueError(
                f"{self._method} judges an update by the step that begins a "
                "training step, and this one applies its optimizer more than "
                f"once. {ONE_UPDATE_A_STEP}"
            )

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context, notes what the training step applies.

        That is which kernels have a gradient, and whether it is applied once.
        """
        optimizer = self._attached.applied
        apply, graphs = optimizer.apply, []

        def watched(gradients, trainable_variables=None):
            gradients = list(gradients)
            variables = list(_given(optimizer, trainable_variables))
            self._reached |= {
                variable_key(v)
                for v, gradient in zip(variables, gradients, strict=True)
                if gradient is not None
            }
            # Of two branches of the graph, one is executed; replicas are
            # traced side by side.
            graph = tf.compat.v1.get_default_graph()
            if not tf.distribute.has_strategy():
                here = [graph, *(g for g in graphs if g is graph)]
                self.check_steps(len(here))
                graphs.append(graph)
            return apply(gradients, trainable_variables)

        with _applying(optimizer, watched):
            yield

    def exchanges_active(self) -> bool:
        """Returns whether replicas exchange only active gradients."""
        attached = self._attached
        return exchanges_active(
            attached.model, attached.optimizer, self._dense_gradients
        )

    def exchanging_active(self) -> contextlib.AbstractContextManager:
        """Within the context, replicas exchange only active gradients.

        `replicas.summed` sums those that an update uses.
        """
        attached = self._attached
        return exchanging_active(attached.optimizer, attached.masked)

    def warn_of_unreached(self) -> None:
        """Warns once of masks that never change, though layers are trained.

        The optimizer got no gradient of their kernels.
        """
        if not self._reached or not self._warns_of_unreached:
            return
        self._warns_of_unreached = False
        names = [
            m.name
            for m in self._attached.trainable()
            if variable_key(m.kernel) not in self._reached
        ]
        if names:
            optimizer = self._attached.optimizer
            warn(
                f"{self._method} does not reach these masked layers: "
                f"{', '.join(names)}. They are trainable, but have no gradient "
                f"when the training step applies {optimizer.name!r}, so "
                "their masks never change. If another optimizer trains them, "
                "give each optimizer a separate method by attach and update; "
                "otherwise the loss does not depend on them: set "
                "trainable = False.",
            )

    @contextlib.contextmanager
    def _stepping(self):
        """Within the context, the method takes the steps of the optimizer."""
        if self._apply_gradients is None:
            yield
            return
        optimizer = self._attached.optimizer
        apply, take_step = optimizer.apply, self._apply_gradients

        def step(gradients, trainable_variables=None):
            variables = _given(optimizer, trainable_variables)
            take_step(apply, list(gradients), list(variables))

        with _applying(optimizer, step):
            yield

    # The update in place of the optimizer.

    @contextlib.contextmanager
    def updating(
        self,
        applied: list,
        loss: Callable | None = None,
        *,
        by_hand: bool = False,
    ) -> Iterator[None]:
        """Within the context, an update takes the place of the optimizer.

        Args:
            applied: Grows as the training step is traced, which on several
                replicas happens once, for all the times that it runs.
            loss: As in `step_or_update`.
            by_hand: Whether the gradients come from a loop of the user's,
                where they may not be dense.

        Raises:
            ValueError: The training step has never applied the optimizer.
        """
        optimizer = self._attached.optimizer
        apply = optimizer.apply

        def gather_or_update(gradients, trainable_variables=None):
            applied.append(True)
            self._gather_or_update(
                apply,
                gradients,
                _given(optimizer, trainable_variables),
                loss,
                by_hand,
            )

        with _applying(optimizer, gather_or_update):
            yield
        # Eagerly, loss scaling skips gradients that are not finite.
        skips = self._attached.scales_loss and tf.executing_eagerly()
        if not applied and not skips:
            raise ValueError(
                f"{self._method} replaces optimizer.apply, which this "
                "training step never calls. Pass the optimizer that it "
                "applies: fit knows that of compile. If there are "
                "several, give each a separate method by "
                "attach(model, optimizer), and call update(gradients, "
                "variables) instead of its apply."
            )

    def _gather_or_update(self, apply, gradients, variables, loss, by_hand):
        attached = self._attached
        step = attached.step()
        layers, dense = kernel_gradients(
            attached, gradients, variables, method=self._method
        )
        if self._dense_gradients == "never":  # a custom loop may pass others
            dense = [
                zero_outside(m.mask, gradient)
                for m, gradient in zip(layers, dense, strict=True)
            ]
        if not layers:  # all of them were frozen within `fit`
            apply(gradients, variables)
            return

        def apply_masked():
            take_step = self._apply_gradients or _apply
            take_step(
                apply, self._masked_gradients(gradients, variables), variables
            )

        def update(growth):
            if not self._update_replaces_step:
                apply_masked()
            self._change_once(layers, growth, step, loss, by_hand)
            if self._update_replaces_step:
                optimizer_state.count_step(attached.optimizer)

        buffers = self._buffers
        if buffers is None:
            update(dense)
            return

        batches = attached.batches()
        each = attached.batches_per_step
        last = tf.equal(tf.math.floormod(batches + 1, each), 0)

        def gather():
            buffers.add(layers, dense, batches)
            apply_masked()

        tf.cond(
            self._is_due(step) & last,
            lambda: update(buffers.mean(layers, dense, batches)),
            gather,
        )

    def _masked_gradients(self, gradients, variables):
        """Returns what an ordinary step gives to the optimizer."""
        dense = self._dense_gradients == "always"
        masked = [] if dense else self._attached.masked
        return masked_gradients(masked, gradients, variables)

    def _change_once(self, layers, gradients, step, loss, by_hand):
        """Changes masks for all replicas, and records whether they agree."""
        replicas.once(
            functools.partial(self._change, layers, loss, by_hand),
            [step, *gradients],
        )
        if tf.distribute.has_strategy():
            same = replicas.agree([m.mask.value for m in self._attached.masked])
            replicas.once(self._record.note_differing, [same, step])

    def _change(self, layers, loss, by_hand, step, *gradients):
        """Changes every mask once, unless the gradients are refused."""
        layers, gradients = self._looked_at_alone(layers, gradients)
        finite = tf.reduce_all(
            [tf.reduce_all(tf.math.is_finite(g)) for g in gradients]
            + [tf.reduce_all(tf.math.is_finite(m.kernel.value)) for m in layers]
        )
        self._record.refuse_unless(finite, step)
        accepted = finite
        if by_hand and self._dense_gradients != "never":
            masked = seem_masked([m.mask.value for m in layers], gradients)
            dense = ~tf.reduce_any(masked)
            accepted &= dense
            self._record.note_masked(layers, masked)
            self._record.refuse_unless(dense, step, NOT_DENSE)
            if not tf.executing_eagerly():  # `update` raises an error itself
                tf.debugging.Assert(dense, [self._record.not_dense()])

        def change():
            losses = [loss()] if loss else []
            grown = self._change_masks(
                self._attached.optimizer, layers, gradients, step
            )
            losses += [loss()] if loss else []
            self._record.note_update(step, grown, losses)

        tf.cond(accepted, change, lambda: None)

    def _looked_at_alone(self, layers, gradients):
        """Returns layers and gradients, of some only the entries that count."""
        if not self._changes_parts:
            return layers, gradients
        parts, values = [], []
        for layer, gradient in zip(layers, gradients, strict=True):
            mask, layout = self._looked_at.get(id(layer.kernel)), layer.layout
            # A pattern makes units of several weights, or groups of them.
            if mask is not None and type(layout) is Layout:
                if not layout.is_apart:
                    layer = KernelPart(layer, places_of(mask))
                    gradient = layer.of(gradient)
            parts.append(layer)
            values.append(gradient)
        return parts, values


@contextlib.contextmanager
def _applying(optimizer, action):
    """Within the context, `optimizer.apply` is `action`.

    AutoGraph converts what calls it, a loop of the user's, and not `action`.
    """
    before = vars(optimizer).get("apply")
    optimizer.apply = tf.autograph.experimental.do_not_convert(action)
    try:
        yield
    finally:
        del optimizer.apply
        if before is not None:
            optimizer.apply = before


def _apply(apply, gradients, variables):
    apply(gradients, variables)


def _given(optimizer, trainable_variables):
    """Returns the variables that `optimizer.apply` is called for."""
    return trainable_variables or _keras.trained_variables(optimizer)


def _densely(train_step):
    def with_dense_gradients():
        with dense_gradients():
            return train_step()

    return with_dense_gradients


def _as_tensors(logs):
    return tf.nest.map_structure(
        lambda x: x if x is None else tf.convert_to_tensor(x), logs
    )
