"""At how many positions each kernel is applied."""

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator

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

__all__ = ["kernel_positions"]

# Layers have another `call` meanwhile: threads take turns.
_turn = threading.RLock()


def kernel_positions(
    model: keras.Model, kernels: Iterable[Kernel]
) -> dict[int, int]:
    """Returns at how many positions of one sample each kernel is applied.

    The model is traced, and its layers note the shapes of their inputs and
    outputs.

    Args:
        model: A built model, masked or not.
        kernels: Kernels of its layers.

    Returns:
        `{id of the kernel's variable: positions}`, without the kernels whose
        use does not follow from the calls of their layer.

    Raises:
        ValueError: An axis of the input is free, or the call fails.
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
    calls = {id(caller): [] for caller in callers.values()}

    def trace(x):
        # Penalties of activities go to the scope, not to the model.
        with (
            keras.StatelessScope(collect_losses=True),
            keras.SymbolicScope(),
        ):
            return call_model(model, x)

    # A call forgets the losses of the one before.
    with (
        _turn,
        _keras.keeping_losses(model),
        contextlib.ExitStack() as stack,
    ):
        for caller in {id(c): c for c in callers.values()}.values():
            stack.enter_context(_recording(caller, calls[id(caller)]))
        try:
            tf.function(trace).get_concrete_function(specs)
        except Exception as error:  # whatever a model of the user's raises
            raise ValueError(
                f"The FLOPs of model {model.name!r} cannot be counted: called "
                f"on {specs} it fails, with {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
    return {
        key: sum(_applied(kernel, caller, *call) for call in calls[id(caller)])
        for kernel in kernels
        for key in [id(kernel.variable)]
        if key in callers
        for caller in [callers[key]]
    }


def _caller(kernel) -> keras.layers.Layer | None:
    """Returns the layer whose calls say how often a kernel is applied."""
    owner = kernel.layer
    steps = owner if isinstance(owner, keras.layers.RNN) else None
    for part in kernel.path.split(".")[:-1]:
        owner = step_to(owner, part)
        if isinstance(owner, keras.layers.RNN):
            steps = owner
    if steps is not None:
        # A convolution within a step has more positions than one.
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
    """Returns the product of all axes that an einsum's kernel does not have.

    >>> _applied_in_einsum("abc,cd->abd", (1, 7, 5), (1, 7, 3))
    7
    """
    of_inputs, of_kernel, of_outputs = einsum_axes(equation)
    sizes = {}
    for labels, shape in ((of_inputs, inputs), (of_outputs, outputs)):
        named = len(labels.replace("...", ""))
        # An ellipsis stands for axes that the kernel has not.
        rest = [f"axis {i}" for i in range(len(shape) - named)]
        before, _, after = labels.partition("...")
        axes = [*before, *(rest if "..." in labels else []), *after]
        sizes.update(zip(axes, shape, strict=True))
    return math.prod(n for axis, n in sizes.items() if axis not in of_kernel)


@contextlib.contextmanager
def _recording(layer, calls) -> Iterator[None]:
    """Within the context, appends the shapes that each call has and makes."""
    call = layer.call

    def recorded(*args, **kwargs):
        outputs = call(*args, **kwargs)
        given, *_ = _tensors_in((args, kwargs))
        made, *_ = _tensors_in(outputs)
        calls.append((tuple(given.shape), tuple(made.shape)))
        return outputs

    layer.call = recorded
    try:
        yield
    finally:
        del layer.call


def _tensors_in(structure):
    return [x for x in keras.tree.flatten(structure) if tf.is_tensor(x)]


def _one_sample(tensor):
    if None in tensor.shape[1:]:
        raise ValueError(
            "FLOPs depend on the size of the input. Received a model whose "
            f"input {tensor.name!r} has shape {tuple(tensor.shape)}: build it "
            "with a fixed shape."
        )
    # Some layers, which carry states along, have a batch size of their own.
    return tf.TensorSpec(
        (tensor.shape[0] or 1, *tensor.shape[1:]), tensor.dtype
    )
