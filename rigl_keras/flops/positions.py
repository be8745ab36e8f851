"""How often each kernel is applied, and the products of attention."""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterable, Iterator, Mapping

import keras
import tensorflow as tf

from rigl_keras import _keras
from rigl_keras._text import first_line
from rigl_keras.masking.layer_kernels import (
    CONVOLUTIONS,
    Kernel,
    einsum_axes,
)
from rigl_keras.masking.model_tree import call_model, input_structure, step_to

__all__ = ["ATTENTION", "Applied", "applied"]

ATTENTION = (
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
)

# Counting replaces the `call` of layers: threads take turns.
_turn = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Applied:
    """What a model computes for one sample.

    Attributes:
        positions: `{id of a kernel's variable: positions where it is applied}`,
            without kernels whose use does not follow from the calls of their
            layer.
        products: `{id of an attention layer: multiplications of its two
            products without weights}`.
    """

    positions: Mapping[int, int]
    products: Mapping[int, int]


def applied(
    model: keras.Model,
    kernels: Iterable[Kernel],
    attention: Iterable[keras.layers.Layer] = (),
) -> Applied:
    """Returns how often one sample applies each kernel, and its attention.

    The model is traced, and its layers record the shapes of their inputs and
    outputs.

    Args:
        model: A built model, masked or not.
        kernels: Kernels of its layers.
        attention: Its layers of the types `ATTENTION`.

    Raises:
        ValueError: An axis of the input is unknown, or the call fails.
    """
    kernels = list(kernels)
    specs = tf.nest.map_structure(_one_sample, input_structure(model))
    # A cell is called once in a trace; its steps are those of the RNN.
    callers = {
        id(kernel.variable): caller
        for kernel in kernels
        for caller in [_caller(kernel)]
        if caller is not None
    }
    attention = list(attention)
    traced = {id(layer): layer for layer in (*callers.values(), *attention)}
    calls = {key: [] for key in traced}

    def trace(x):
        # Activity penalties go to the scope, not to the model.
        with (
            keras.StatelessScope(collect_losses=True),
            keras.SymbolicScope(),
        ):
            return call_model(model, x)

    # A call forgets the losses of the previous call.
    with (
        _turn,
        _keras.keeping_losses(model),
        contextlib.ExitStack() as stack,
    ):
        for key, layer in traced.items():
            stack.enter_context(_recording(layer, calls[key]))
        try:
            tf.function(trace).get_concrete_function(specs)
        except Exception as error:  # a user's model may raise anything
            raise ValueError(
                f"The FLOPs of model {model.name!r} cannot be counted: called "
                f"on {specs} it fails, with {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
    positions = {}
    for kernel in kernels:
        caller = callers.get(id(kernel.variable))
        if caller is not None:
            positions[id(kernel.variable)] = sum(
                _applied(kernel, caller, inputs[0], outputs)
                for inputs, outputs in calls[id(caller)]
            )
    return Applied(
        positions=positions,
        products={
            id(layer): sum(
                _products(layer, *inputs[:2]) for inputs, _ in calls[id(layer)]
            )
            for layer in attention
        },
    )


def _caller(kernel) -> keras.layers.Layer | None:
    """Returns the layer whose calls determine the positions of a kernel."""
    owner = kernel.layer
    steps = owner if isinstance(owner, keras.layers.RNN) else None
    for part in kernel.path.split(".")[:-1]:
        owner = step_to(owner, part)
        if isinstance(owner, keras.layers.RNN):
            steps = owner
    if steps is not None:
        # A convolution within a step has several positions.
        return steps if len(kernel.variable.shape) == 2 else None
    return owner if isinstance(owner, _COUNTED) else None


_COUNTED = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    *CONVOLUTIONS,
)


def _applied(kernel, caller, inputs, outputs) -> int:
    """Returns how often a call on one sample applies a kernel."""
    if isinstance(caller, keras.layers.RNN):
        return inputs[1]
    if isinstance(caller, keras.layers.EinsumDense):
        sample = (1, *inputs[1:]), (1, *outputs[1:])
        return _applied_in_einsum(caller.equation, *sample)
    shape = inputs if kernel.is_transposed else outputs
    first = getattr(caller, "data_format", "channels_last").endswith("first")
    return math.prod(shape[2:] if first else shape[1:-1])


def _applied_in_einsum(equation, inputs, outputs) -> int:
    """Returns the product of all axes that an einsum's kernel lacks.

    >>> _applied_in_einsum("abc,cd->abd", (1, 7, 5), (1, 7, 3))
    7
    """
    of_inputs, of_kernel, of_outputs = einsum_axes(equation)
    sizes = {}
    for labels, shape in ((of_inputs, inputs), (of_outputs, outputs)):
        named = len(labels.replace("...", ""))
        # An ellipsis stands for axes that the kernel lacks.
        rest = [f"axis {i}" for i in range(len(shape) - named)]
        before, _, after = labels.partition("...")
        axes = [*before, *(rest if "..." in labels else []), *after]
        sizes.update(zip(axes, shape, strict=True))
    return math.prod(n for axis, n in sizes.items() if axis not in of_kernel)


def _products(layer, queries, values) -> int:
    """Returns the multiplications of queries by keys, and scores by values.

    Each query has a score for each key, also for keys that a mask hides: they
    are computed too.

    Args:
        layer: One of `ATTENTION`.
        queries, values: Shapes of these inputs, for one sample. There are as
            many keys as values.
    """
    if isinstance(layer, keras.layers.GroupQueryAttention):
        width = layer.num_query_heads * 2 * layer.head_dim
        return queries[1] * values[1] * width
    width = layer.num_heads * (layer.key_dim + layer.value_dim)
    attended = layer.get_config()["attention_axes"]
    # Each place on the other axes of an image or video is separate.
    return width * math.prod(
        size * (values[axis] if axis in attended else 1)
        for axis, size in enumerate(queries[1:-1], start=1)
    )


@contextlib.contextmanager
def _recording(layer, calls) -> Iterator[None]:
    """Within the context, records input and output shapes of each call."""
    call, own = layer.call, vars(layer).get("call")

    def recorded(*args, **kwargs):
        outputs = call(*args, **kwargs)
        given = _tensors_in((args, kwargs))
        made, *_ = _tensors_in(outputs)
        calls.append(([tuple(x.shape) for x in given], tuple(made.shape)))
        return outputs

    layer.call = recorded
    try:
        yield
    finally:
        del layer.call
        if own is not None:  # sparse products within a masked layer
            layer.call = own


def _tensors_in(structure):
    return [x for x in keras.tree.flatten(structure) if tf.is_tensor(x)]


def _one_sample(tensor):
    if None in tensor.shape[1:]:
        raise ValueError(
            "FLOPs depend on the size of the input. Received a model whose "
            f"input {tensor.name!r} has shape {tuple(tensor.shape)}: build it "
            "with a fixed shape."
        )
    # Some stateful layers have a fixed batch size.
    return tf.TensorSpec(
        (tensor.shape[0] or 1, *tensor.shape[1:]), tensor.dtype
    )
