"""The exchange of gradients between replicas: active connections only.

Outside its mask the gradient of a masked kernel is zero on every replica, and
all replicas have the same masks. So each replica gathers the gradients of
active connections into a vector, the vectors are summed over replicas, and the
sums are scattered back.
"""

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import keras
import tensorflow as tf

from rigl_keras import _checks, _keras, replicas
from rigl_keras.masking.masked import KernelMask
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.training import optimizer_state
from rigl_keras.training.attachment import variable_key

__all__ = [
    "check_exchange",
    "exchange_gradients",
    "exchanges_active",
    "exchanging_active",
]

_CHOICES = ("active", "all")


def exchange_gradients(
    model: keras.Model,
    *,
    of: Literal["active", "all"] = "active",
    optimizer: keras.Optimizer | None = None,
) -> None:
    """Chooses which gradients of masked kernels travel between replicas.

    With `"active"`, for a kernel with mask m and gradients g_r on replicas r,
    the optimizer gets at position p

        sum over r of g_r[p]  where m[p] = 1,    0 elsewhere,

    and only the former travel: at density 0.1 a tenth of the bytes. Weights are
    the same as with all gradients, up to the order of sums. A few more numbers
    tell in each step whether all replicas have the same masks. The gradients of
    other variables travel whole, and so do those of kernels with a regularizer
    other than L1 or L2: they may be nonzero outside the mask.

    `fit` with a mask update does so automatically if a
    `MultiWorkerMirroredStrategy` has several replicas. On one machine it does
    not, because devices exchange gradients faster than they gather them. Call
    this function to change that; to train without a mask update; or for a
    training loop that calls `optimizer.apply` within `strategy.run`. It affects
    steps that are traced later. Gradients that a mask update uses always travel
    whole.

    Args:
        model: A model with masked layers.
        of: `"active"` connections or `"all"`.
        optimizer: The optimizer that trains the model. None: that of `compile`,
            which must be called before.

    Raises:
        ValueError: There is no masked layer or no optimizer; or, for
            `"active"`, XLA compiles the training step: it would need vectors of
            fixed length.

    Example:

    >>> with strategy.scope():
    ...     model = rigl_keras.sparsify(make_model(), density=0.1)
    ...     model.compile("sgd", loss)
    >>> exchange_gradients(model)
    >>> model.fit(train, epochs=250)  # masks stay as they are
    """
    _checks.choice("of", of, _CHOICES)
    masked = masked_layers(model)
    if not masked:
        raise ValueError(
            f"exchange_gradients found no masked layer in model {model.name!r}"
            ". Call model = rigl_keras.sparsify(model, density) first."
        )
    given = optimizer or getattr(model, "optimizer", None)
    if given is None:
        raise ValueError(
            "exchange_gradients needs the optimizer that trains the model. "
            "Call model.compile before, or pass optimizer=."
        )
    if of == "active" and optimizer is None and _is_compiled(model):
        raise ValueError(_NOT_COMPILED.format(what="of='active'"))
    _install(given, of, list(masked), chosen=True)


_NOT_COMPILED = (
    "XLA compiles steps for vectors of fixed length, but masks may come to "
    "keep other numbers of connections: {what} does not work with "
    "jit_compile=True. "
    "Compile the model with jit_compile=False, or pass "
    "exchange_gradients(model, of='all')."
)


def check_exchange(
    method: str, optimizer: keras.Optimizer, dense_gradients: str
) -> None:
    """Refuses an exchange that lacks gradients which a method needs.

    Args:
        method: Name of the method.
        optimizer: The optimizer of the model, within any loss scaling.
        dense_gradients: When its gradients are dense, as in `MethodHooks`.

    Raises:
        ValueError: The user has chosen `"active"` for a method that needs
            dense gradients in each step.
    """
    if dense_gradients == "always" and _chosen(optimizer) == "active":
        raise ValueError(
            f"{method} needs dense gradients in each step, but "
            "exchange_gradients was called for its optimizer with "
            "of='active', which omits those of inactive connections. "
            "Pass of='all'."
        )


def exchanges_active(
    model: keras.Model, optimizer: keras.Optimizer, dense_gradients: str
) -> bool:
    """Returns whether `fit` exchanges only active gradients by default.

    Args:
        model: The model that is trained.
        optimizer: Its optimizer, within any loss scaling.
        dense_gradients: When its gradients are dense, as in `MethodHooks`.

    Raises:
        UserWarning: It would, if XLA did not compile the step.
    """
    strategy = model.distribute_strategy
    if (
        dense_gradients == "always"
        or _chosen(optimizer) is not None
        or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        or strategy.num_replicas_in_sync == 1
    ):
        return False
    if _is_compiled(model):
        warnings.warn(
            "Workers exchange whole gradients. "
            + _NOT_COMPILED.format(what="exchanging only active ones"),
            stacklevel=2,
        )
        return False
    return True


@contextlib.contextmanager
def exchanging_active(
    optimizer: keras.Optimizer, masked: Sequence[KernelMask]
) -> Iterator[None]:
    """Within the context, replicas exchange only active gradients.

    Args:
        optimizer: The optimizer that moves the weights.
        masked: The masked layers of the model that it trains.
    """
    _install(optimizer, "active", masked, chosen=False)
    try:
        yield
    finally:
        for part in optimizer_state.parts(optimizer):
            _keras.set_replica_sum(part, None)


def _is_compiled(model):
    return getattr(model, "jit_compile", False) is True


def _refuse_xla():
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        if _keras.is_compiled_by_xla(graph):
            raise ValueError(_NOT_COMPILED.format(what="of='active'"))
        graph = getattr(graph, "outer_graph", None)


def _install(optimizer, of, masked, *, chosen):
    for part in optimizer_state.parts(optimizer_state.innermost(optimizer)):
        _keras.set_replica_sum(part, _Exchange(part, of, masked, chosen))


def _chosen(optimizer):
    """Returns the user's choice for an optimizer, or None."""
    for part in optimizer_state.parts(optimizer):
        exchange = _keras.given_replica_sum(part)
        if isinstance(exchange, _Exchange) and exchange.chosen:
            return exchange.of
    return None


class _Exchange:
    """Sums gradients over replicas when an optimizer calls it."""

    def __init__(self, optimizer, of, masked, chosen):
        self._optimizer = optimizer
        self.of, self.chosen = of, chosen
        self._masks = {
            variable_key(m.kernel): m.mask
            for m in masked
            if _is_zero_at_zero(m.kernel.regularizer)
        }

    def __call__(self, grads_and_vars):
        pairs = list(grads_and_vars)
        active = [
            i
            for i, (gradient, variable) in enumerate(pairs)
            if gradient is not None
            and not isinstance(gradient, tf.IndexedSlices)
            and variable_key(variable) in self._masks
        ]
        number = tf.distribute.get_strategy().num_replicas_in_sync
        if (
            self.of == "all"
            or number == 1
            or not active
            or tf.distribute.in_cross_replica_context()
        ):
            return _keras.replica_sum(self._optimizer, pairs)
        _refuse_xla()
        places = [
            _places(self._masks[variable_key(pairs[i][1])]) for i in active
        ]
        shapes = [pairs[i][0].shape for i in active]
        for i, place in zip(active, places, strict=True):
            gradient, variable = pairs[i]
            pairs[i] = (
                tf.gather(tf.reshape(gradient, [-1]), place),
                variable,
            )
        own = _checksum(places)
        summed, total = self._summed(pairs, active, own)
        same = tf.reduce_all(tf.equal(total, own * number))
        with tf.control_dependencies([tf.debugging.Assert(same, [_DIFFER])]):
            for i, place, shape in zip(active, places, shapes, strict=True):
                vector, variable = summed[i]
                summed[i] = (_scattered(vector, place, shape), variable)
        return summed

    def _summed(self, pairs, active, own):
        """Returns the sums of pairs, and of the checksums of masks."""
        _, variable = pairs[active[0]]
        dtype = pairs[active[0]][0].dtype
        if dtype.size < own.dtype.size:  # it has no room for the numbers
            (total,) = replicas.summed([own])
            return _keras.replica_sum(self._optimizer, pairs), total
        # TensorFlow sends one message if all have one type.
        *summed, (total, _) = _keras.replica_sum(
            self._optimizer, [*pairs, (tf.cast(own, dtype), variable)]
        )
        return summed, tf.cast(total, own.dtype)


_DIFFER = (
    "The replicas hold different masks, so the gradients of active "
    "connections cannot be summed. Every process must make the model with the "
    "same seed and layers of the same names, and load the same checkpoint. "
    "Resume from a checkpoint before this step."
)


def _is_zero_at_zero(regularizer):
    """Returns whether a penalty has no gradient where a kernel is zero."""
    kinds = keras.regularizers.L1, keras.regularizers.L2
    return regularizer is None or type(regularizer) in (
        *kinds,
        keras.regularizers.L1L2,
    )


def _places(mask):
    """Returns the flat positions that a mask keeps, an int64 vector."""
    kept = tf.reshape(tf.cast(mask.value, tf.bool), [-1])
    return tf.squeeze(tf.where(kept), axis=1)


def _scattered(vector, place, shape):
    size = tf.constant([shape.num_elements()], tf.int64)
    flat = tf.scatter_nd(tf.expand_dims(place, axis=1), vector, size)
    return tf.reshape(flat, shape)


# Odd numbers without pattern, and bits of a chunk: sums of chunks are exact in
# float32 for up to 4,096 replicas.
_FIRST, _SECOND, _BITS = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 12


def _checksum(places: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns six whole numbers that differ if any position differs.

    Args:
        places: The positions that each mask keeps.

    Returns:
        Float tensor of shape [6]: a sum modulo 2^64, 12 bits per number.
    """

    def scrambled(place, number):
        # Multiplied and shifted, so that two moves do not cancel.
        mixed = (place + (number << 40)) * _FIRST
        mixed = tf.bitwise.bitwise_xor(
            mixed, tf.bitwise.right_shift(mixed, tf.constant(29, tf.int64))
        )
        return tf.reduce_sum(mixed * _SECOND)

    total = tf.add_n(
        [scrambled(place, n) for place, n in zip(places, itertools.count())]
    )
    shifts = tf.range(0, 64, _BITS, dtype=tf.int64)
    chunks = tf.bitwise.right_shift(total, shifts) & (2**_BITS - 1)
    return tf.cast(chunks, tf.float32)
