"""Makes a kernel read as kernel x mask while a masked layer is called.

The product is made when the kernel is read, so that code that looks for the
variable finds it: rematerialisation, control flow, custom gradients. A layer's
assignments take effect at once.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import keras
import tensorflow as tf

from rigl_keras import _keras

__all__ = [
    "KernelScope",
    "called_kernels",
    "current_scope",
    "dense_gradients",
    "gradients_are_dense",
    "kernels_are_whole",
    "looking_at",
    "loops_are_sparse",
    "masks_applied",
    "masks_are_applied",
    "note_called",
    "product",
    "product_masks",
    "whole_kernels",
    "zero_outside",
]

_dense_gradients = contextvars.ContextVar("dense_gradients", default=False)
# By id of the kernel, where its gradient is looked at: `looking_at`.
_looked_at: contextvars.ContextVar[Mapping[int, tf.Tensor] | None] = (
    contextvars.ContextVar("looked_at", default=None)
)
_called: contextvars.ContextVar[dict[int, str] | None] = contextvars.ContextVar(
    "called", default=None
)
_whole_kernels = contextvars.ContextVar("whole_kernels", default=False)
_masks_applied = contextvars.ContextVar("masks_applied", default=False)
_sparse_loops = contextvars.ContextVar("sparse_loops", default=False)
# The scope of the masked layer that is being called.
_scope: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "scope", default=None
)
# The function with a custom gradient, or its gradient, that is running.
_custom = contextvars.ContextVar("custom", default=None)


@contextlib.contextmanager
def _set(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextlib.contextmanager
def dense_gradients() -> Iterator[None]:
    """Within the context, masked layers pass dense gradients to kernels.

    The place where the forward pass is traced decides. Outside, the gradient
    that reaches a kernel is zero where its mask is; inside, it is dL/d(w m) at
    every entry. RigL grows by the latter (Evci et al., 2020, section 3).

    Example:

    >>> with dense_gradients(), tf.GradientTape() as tape:
    ...     loss = tf.reduce_sum(masked_layer(inputs))
    >>> tape.gradient(loss, masked_layer.kernel.value)  # nowhere masked
    """
    with _set(_dense_gradients, True):
        yield


def gradients_are_dense() -> bool:
    """Returns whether this is within `dense_gradients`."""
    return _dense_gradients.get()


@contextlib.contextmanager
def looking_at(masks: Mapping[int, tf.Tensor]) -> Iterator[None]:
    """Within the context, some dense gradients are looked at in part.

    Of a kernel that sparse operations multiply, `dense_gradients` then means
    the gradient at its active weights and at some others, and zero elsewhere:
    the operation computes no more than that. Other products have gradients at
    every entry, as always.

    Args:
        masks: `{id of a kernel: its mask in bytes}`: 1 where the mask keeps,
            and 2 more where the gradient is looked at.
    """
    with _set(_looked_at, masks):
        yield


def product_masks(masked: Sequence) -> tuple[list[tf.Tensor], bool]:
    """Returns the masks that a sparse product takes, as gradients are asked.

    Args:
        masked: The `KernelMask`s of the kernels of one product.

    Returns:
        Their masks, and whether the product passes dense gradients.
    """
    dense = _dense_gradients.get()
    masks = _looked_at.get() or {}
    looked = [masks.get(id(m.kernel)) for m in masked]
    if dense and None not in looked:
        return cast(list[tf.Tensor], looked), False
    return [tf.convert_to_tensor(m.mask.value) for m in masked], dense


@contextlib.contextmanager
def masks_applied(*, sparse_loops: bool = False) -> Iterator[None]:
    """Within the context, masked layers use kernels without masks.

    It is for inference: kernels are zero outside their masks, so the product
    would equal the kernel, and the mask would take memory.

    Args:
        sparse_loops: Whether recurrent layers still use their sparse operation,
            which takes masks, where it is faster.
    """
    with _set(_masks_applied, True), _set(_sparse_loops, sparse_loops):
        yield


def masks_are_applied() -> bool:
    """Returns whether this is within `masks_applied`."""
    return _masks_applied.get()


def loops_are_sparse() -> bool:
    """Returns whether recurrent layers may use their sparse operation."""
    return _sparse_loops.get() or not _masks_applied.get()


@contextlib.contextmanager
def whole_kernels() -> Iterator[None]:
    """Within the context, an optimizer keeps weights outside the masks.

    It is for methods that train such weights, and remove them afterwards.
    """
    with _set(_whole_kernels, True):
        yield


def kernels_are_whole() -> bool:
    """Returns whether this is within `whole_kernels`."""
    return _whole_kernels.get()


@contextlib.contextmanager
def called_kernels() -> Iterator[dict[int, str]]:
    """Yields the kernels that layers multiply by masks within the context.

    A `tf.function` traced earlier is not included: `dense_gradients` has no
    effect on later calls of it.

    Yields:
        `{id of the kernel: name}`, filled when layers are called.
    """
    kernels: dict[int, str] = {}
    with _set(_called, kernels):
        yield kernels


def note_called(kernel: keras.Variable, name: str) -> None:
    """Records for `called_kernels` that a kernel is multiplied by a mask."""
    called = _called.get()
    if called is not None:
        called[id(kernel)] = name


def zero_outside(mask: keras.Variable, tensor: Any) -> tf.Tensor:
    """Returns a tensor with zeros where a mask has them.

    A product would keep a NaN or an infinity there.

    Args:
        mask: Bool variable, or a variable of zeros and ones.
        tensor: Float tensor or variable of its shape.

    Returns:
        Tensor of the same shape and dtype.
    """
    tensor = tf.convert_to_tensor(tensor)
    kept = tf.cast(mask.value, tf.bool)  # no effect on a bool
    return _within(kept, tensor)


def _within(mask, tensor):
    # Faster than the product: the mask would be cast, and each step would hold
    # one more copy of it, four times its size.
    return tf.where(mask, tensor, tf.zeros([], tensor.dtype))


def product(kernel: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Returns kernel x mask, with a masked or a dense gradient.

    Args:
        kernel: Float tensor.
        mask: Bool tensor of its shape.
    """
    dense = _dense_gradients.get()

    @tf.custom_gradient
    def multiply(kernel, mask):
        def gradient(upstream):
            return (upstream if dense else _within(mask, upstream)), None

        return _within(mask, kernel), gradient

    # Stubs ignore the decorator and see the inner return type.
    return cast(tf.Tensor, multiply(kernel, mask))


class KernelScope(keras.StatelessScope):
    """A scope in which kernels read as other values than they hold.

    Everything else behaves as outside, where another scope may be active
    (stateless_call): reads return the outer value, and assignments take effect
    at once.

    Args:
        masked: The `KernelMask`s whose kernels read as kernel x mask.
        kept: Whether products may be kept, as in `KernelMask.masked_kernel`.
    """

    def __init__(self, masked: Sequence = (), *, kept: bool = False):
        super().__init__(collect_losses=True)
        self._kept = kept
        self._masked = {id(m.kernel): m for m in masked}
        self._given = {}
        self._made = {}
        self.original_scope = None

    def __enter__(self):
        self._token = _scope.set(self)
        self._custom = _custom.get()
        self._graph = tf.compat.v1.get_default_graph()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        _scope.reset(self._token)

    def give(self, variable: keras.Variable, value: tf.Tensor) -> None:
        """Makes a variable read as a value."""
        self._given[id(variable)] = value

    def masked(self, variable: keras.Variable) -> Any:
        """Returns the `KernelMask` that multiplies a variable, or None.

        It is also None if the variable reads as a given value.
        """
        key = id(variable)
        return None if key in self._given else self._masked.get(key)

    def multiply_ahead(self) -> None:
        """Makes the products of a graph here, not at each read.

        The cell of an RNN would multiply at each time step. Products that are
        never read cost nothing: TensorFlow removes them from the graph.
        """
        if not tf.executing_eagerly():
            for key, masked in self._masked.items():
                self._made[key] = self._product(masked)

    def value_outside(self, variable: keras.Variable) -> Any:
        """Returns a variable's value outside, in the variable's precision."""
        outer = self.original_scope
        value = None if outer is None else outer.get_current_value(variable)
        # `variable.value` would have the precision of the call.
        return _keras.stored_value(variable) if value is None else value

    def get_current_value(self, variable: keras.Variable) -> Any:
        key = id(variable)
        if key in self._given:
            return self._given[key]
        if key in self._masked:
            if key in self._made and self._sees_what_was_made():
                return self._made[key]
            return self._product(self._masked[key])
        return self.value_outside(variable)

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        variable, value = update
        key = id(variable)
        if key in self._masked:
            # Zero outside the mask, whoever assigns.
            value = zero_outside(self._masked[key].mask, value)
        self._given.pop(key, None)
        self._made.pop(key, None)
        if self.original_scope is None:
            _keras.assign_now(variable, value)
        else:
            self.original_scope.add_update((variable, value))

    def again(self) -> "KernelScope":
        """Returns a new scope in which kernels read as they do here."""
        scope = KernelScope()
        scope._masked, scope._given = self._masked, self._given
        return scope

    def _product(self, masked):
        return masked.masked_kernel(
            self.value_outside(masked.kernel), kept=self._kept
        )

    def _sees_what_was_made(self):
        # A custom gradient must return gradients for the variables that its
        # function reads; a `tf.function` outlives this graph.
        graph = tf.compat.v1.get_default_graph()
        while graph is not self._graph:
            if not getattr(graph, "is_control_flow_graph", False):
                return False
            graph = graph.outer_graph
        return _custom.get() is self._custom


def current_scope() -> "KernelScope | None":
    """Returns the scope of the masked layer being called, or None."""
    return _scope.get()


# A custom gradient may call layers again: `tf.recompute_grad` (and so
# `keras.remat`) and reversible layers do. By then the scope and contexts of the
# forward pass are gone, but the call must read and differentiate as in the
# forward pass. This wrapper restores them; TensorFlow offers no other hook. It
# also covers functions decorated before this module was imported.


def _in_context_of_call(function):
    """Returns a function whose gradient runs in the context of its call."""

    def with_gradient(*args, **kwargs):
        scope = _scope.get()
        variables = (_dense_gradients, _looked_at, _masks_applied)
        contexts: Any = [(v, v.get()) for v in variables]
        here = object()
        with _set(_custom, here):
            outputs, gradient = function(*args, **kwargs)

        def as_it_was(*args, **kwargs):
            with contextlib.ExitStack() as stack:
                for variable, value in contexts:
                    stack.enter_context(_set(variable, value))
                stack.enter_context(_set(_custom, here))
                if scope is not None and scope is not _scope.get():
                    stack.enter_context(scope.again())
                return gradient(*args, **kwargs)

        return outputs, _keras.like_function(gradient, as_it_was)

    return _keras.like_function(function, with_gradient)


_keras.wrap_custom_gradients(_in_context_of_call)
