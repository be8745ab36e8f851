"""Arithmetic and activations, translated.

Some activations are one operation of TensorFlow, others are several. These are
recognised at their last operation.
"""

import math

import numpy as np
import tensorflow as tf

from rigl_keras.serving.network import Activation, Operation
from rigl_keras.serving.steps import Step
from rigl_keras.serving.translation import Rows, Translation, UnknownError

__all__ = ["ELEMENTWISE"]


def _activation(kind: Activation, **numbers):
    """Returns a translator for an activation of one operation."""

    def translate(t: Translation, operation: tf.Operation) -> Step | Rows:
        return t.each(
            operation.inputs[0],
            lambda x: t.make(
                Operation.ACTIVATION, x, activation=kind, **numbers
            ),
        )

    return translate


def _leaky_relu(t, operation):
    alpha = operation.get_attr("alpha")
    return _activation(Activation.LEAKY_RELU, a=alpha)(t, operation)


def _softmax(t, operation):
    return t.each(operation.inputs[0], lambda x: t.make(Operation.SOFTMAX, x))


def _maximum(t, operation):
    return _clipped(t, operation, lambda bound: (bound, math.inf))


def _minimum(t, operation):
    return _clipped(t, operation, lambda bound: (-math.inf, bound))


def _clipped(t, operation, bounds):
    tensor, constant, _ = _value_and_constant(t, operation)
    if constant is None or constant.size != 1:
        raise UnknownError("it compares two values")
    bound = float(constant.ravel()[0])
    if math.isnan(bound):
        raise UnknownError("it compares with NaN")
    a, b = bounds(bound)
    return t.each(
        tensor,
        lambda x: t.make(
            Operation.ACTIVATION, x, activation=Activation.CLIP, a=a, b=b
        ),
    )


# Arithmetic.


def _value_and_constant(t, operation):
    """Returns the value, the constant or None, and whether it comes first."""
    one, other = operation.inputs
    for tensor, array, first in (
        (one, t.constant(other), False),
        (other, t.constant(one), True),
    ):
        if array is not None:
            if array.dtype != np.float32:
                raise UnknownError("it computes something other than float32")
            return tensor, array, first
    return one, None, False


def _affine(t, tensor, scale, shift):
    """Returns a value times a constant plus another.

    A constant has a value for each channel, or for each place of some last
    axes, which become one axis in between.
    """
    scale, shift = (np.asarray(array, np.float64) for array in (scale, shift))

    def make(x):
        axes = max(_spanned(scale, x.shape), _spanned(shift, x.shape))
        kept = x.shape[: len(x.shape) - axes]
        vectors = [
            np.reshape(array, -1)
            if array.size == 1
            else np.broadcast_to(_stripped(array), x.shape[len(kept) :]).ravel()
            for array in (scale, shift)
        ]
        if (vectors[0] == 1).all() and (vectors[1] == 0).all():
            return x
        if axes > 1:
            y = t.reshaped(x, (*kept, math.prod(x.shape[len(kept) :])))
        else:
            y = x
        y = t.make(Operation.AFFINE, y, scale=vectors[0], shift=vectors[1])
        return t.reshaped(y, x.shape)

    return t.each(tensor, make)


def _stripped(array):
    """Returns an array without leading axes of length 1."""
    while array.shape[:1] == (1,):
        array = array[0]
    return array


def _spanned(array, shape):
    """Returns how many last axes of a value a constant covers."""
    lengths = _stripped(array).shape
    axes = len(lengths)
    if array.ndim > len(shape) + 1 or axes > len(shape):
        raise UnknownError("its constant has more axes than its value")
    own = shape[len(shape) - axes :]
    if -1 in own or any(
        n not in (1, m) for n, m in zip(lengths, own, strict=True)
    ):
        raise UnknownError("its constant does not fit its value")
    return axes


def _add(t, operation):
    tensor, constant, _ = _value_and_constant(t, operation)
    if constant is not None:
        return _affine(t, tensor, 1.0, constant)
    return _of_two(t, operation, Operation.ADD)


def _bias_add(t, operation):
    if operation.get_attr("data_format") == b"NCHW":
        raise UnknownError("its channels do not come last")
    return _add(t, operation)


def _add_all(t, operation):
    total, *others = [t.read(tensor) for tensor in operation.inputs]
    for other in others:
        total = t.make(Operation.ADD, total, other)
    return total


def _subtract(t, operation):
    tensor, constant, first = _value_and_constant(t, operation)
    if constant is None:
        return _of_two(t, operation, Operation.SUBTRACT)
    if first:
        return _affine(t, tensor, -1.0, constant)
    return _affine(t, tensor, 1.0, -constant)


def _negative(t, operation):
    return _affine(t, operation.inputs[0], -1.0, 0.0)


def _divide(t, operation):
    tensor, constant, first = _value_and_constant(t, operation)
    if constant is None or first or (constant == 0).any():
        raise UnknownError("it divides by a value")
    return _scaled(t, tensor, 1 / constant.astype(np.float64))


def _multiply(t, operation):
    tensor, constant, _ = _value_and_constant(t, operation)
    if constant is not None:
        return _scaled(t, tensor, constant)
    return (
        _gated(t, operation)
        or _gelu(t, operation)
        or _of_two(t, operation, Operation.MULTIPLY)
    )


def _square(t, operation):
    x = t.read(operation.inputs[0])
    return t.make(Operation.MULTIPLY, x, x)


def _of_two(t, operation, kind):
    one, other = (t.read(tensor) for tensor in operation.inputs)
    return t.make(kind, one, other)


def _batch_norm(t, operation):
    scale, offset, mean, variance = (
        t.weights(tensor).astype(np.float64) for tensor in operation.inputs[1:5]
    )
    if operation.get_attr("is_training"):
        raise UnknownError("it is in training")
    if operation.get_attr("data_format") != b"NHWC":
        raise UnknownError("its channels do not come last")
    scale = scale / np.sqrt(variance + operation.get_attr("epsilon"))
    return _affine(t, operation.inputs[0], scale, offset - mean * scale)


# Activations with several operations.


def _scaled(t, tensor, factors):
    """Returns a product by a constant, or the activation relu6(x + 3) / 6."""
    if np.size(factors) == 1 and math.isclose(
        float(np.ravel(factors)[0]), 1 / 6, rel_tol=1e-6
    ):
        rows = t.rows(tensor)
        x = rows.step if rows else t.read(tensor)
        if _is_clip(x, 0, 6):
            (inner,) = x.reads
            if _is_affine(inner, 1, 3):
                made = t.make(
                    Operation.ACTIVATION,
                    inner.reads[0],
                    activation=Activation.HARD_SIGMOID,
                )
                return Rows(made) if rows else made
    return _affine(t, tensor, factors, 0.0)


def _is_clip(step, a, b):
    return _is_activation(step, Activation.CLIP) and (
        (step.node.a, step.node.b) == (a, b)
    )


def _is_activation(step, kind):
    return step.is_a(Operation.ACTIVATION) and step.node.activation == kind


def _is_affine(step, scale, shift):
    return (
        step.is_a(Operation.AFFINE)
        and len(step.node.scale) == len(step.node.shift) == 1
        and step.node.scale[0] == scale
        and step.node.shift[0] == shift
    )


_GATED = {
    Activation.SIGMOID: Activation.SILU,
    Activation.HARD_SIGMOID: Activation.HARD_SILU,
}


def _gated(t, operation):
    """Returns the activation x times a sigmoid of x, or None."""
    one, other = (_step_of(t, tensor) for tensor in operation.inputs)
    for x, gate in ((one, other), (other, one)):
        for inner, outer in _GATED.items():
            if _is_activation(gate, inner) and gate.reads[0] is x:
                made = t.make(Operation.ACTIVATION, x, activation=outer)
                rows = t.rows(operation.inputs[0])
                return Rows(made) if rows else made
    return None


def _step_of(t, tensor):
    rows = t.rows(tensor)
    return rows.step if rows else t.step(tensor)


def _gelu(t, operation):
    """Returns the GELU that ends in this product, or None."""
    one, other = operation.inputs
    for value, scaled in ((one, other), (other, one)):
        gate, b = _unscaled(t, scaled)
        for x, a in _scalings(t, value):
            kind = _gate_of_gelu(t, x, gate, a * b)
            if kind is not None:
                return t.each(
                    x,
                    lambda step, kind=kind: t.make(
                        Operation.ACTIVATION, step, activation=kind
                    ),
                )
    return None


def _gate_of_gelu(t, x, gate, factor):
    """Returns the kind of GELU of `factor * x * gate`."""
    if not _close(factor, 0.5):
        return None
    operation = gate.op
    if operation.type == "Erfc":
        if _is_times(t, operation.inputs[0], x, -math.sqrt(0.5)):
            return Activation.GELU
    gate = _less(t, gate, 1)
    if gate is None:
        return None
    if gate.op.type == "Erf":
        if _is_times(t, gate.op.inputs[0], x, math.sqrt(0.5)):
            return Activation.GELU
    if gate.op.type == "Tanh":
        total, scale = _unscaled(t, gate.op.inputs[0])
        if _close(scale, math.sqrt(2 / math.pi)) and _is_cubic(t, x, total):
            return Activation.GELU_TANH
    return None


def _is_cubic(t, x, total):
    """Returns whether a sum is x + 0.044715 x^3."""
    if total.op.type != "AddV2":
        return False
    for one, other in (total.op.inputs, list(total.op.inputs)[::-1]):
        cube, scale = _unscaled(t, other)
        power = cube.op.type == "Pow" and t.constant(cube.op.inputs[1])
        if (
            _unaliased(one) is x
            and _close(scale, 0.044715)
            and power is not False
            and power == 3
            and _unaliased(cube.op.inputs[0]) is x
        ):
            return True
    return False


def _less(t, tensor, number):
    """Returns the other term of a sum with a number, or None."""
    if tensor.op.type != "AddV2":
        return None
    inner, constant, _ = _value_and_constant(t, tensor.op)
    if constant is None or constant.size != 1 or constant != number:
        return None
    return _unaliased(inner)


def _is_times(t, tensor, x, number):
    """Returns whether a tensor is x times a number."""
    return any(
        inner is x and _close(factor, number)
        for inner, factor in _scalings(t, tensor)
    )


def _unscaled(t, tensor):
    """Returns the last of `_scalings`, which is no product with a number."""
    *_, last = _scalings(t, tensor)
    return last


def _scalings(t, tensor):
    """Yields tensors and factors whose product is the given tensor."""
    factor = 1.0
    while True:
        tensor = _unaliased(tensor)
        yield tensor, factor
        operation = tensor.op
        if operation.type == "Neg":
            factor, tensor = -factor, operation.inputs[0]
        elif operation.type in ("Mul", "RealDiv"):
            inner, constant, first = _value_and_constant(t, operation)
            if constant is None or constant.size != 1:
                return
            number = float(constant.ravel()[0])
            if operation.type == "RealDiv":
                if first or number == 0:
                    return
                number = 1 / number
            factor, tensor = factor * number, inner
        else:
            return


def _unaliased(tensor):
    while tensor.op.type in ("Identity", "StopGradient"):
        tensor = tensor.op.inputs[0]
    return tensor


def _close(one, other):
    return math.isclose(one, other, rel_tol=1e-5)


def _select(t, operation):
    """ELU with an alpha other than 1: x > 0 ? elu(x) : alpha * elu(x)."""
    condition, positive, negative = operation.inputs
    elu = _step_of(t, positive)
    inner, alpha = _unscaled(t, negative)
    if (
        condition.op.type == "Greater"
        and _is_activation(elu, Activation.ELU)
        and elu.node.a == 1
        and inner is _unaliased(positive)
        and _step_of(t, condition.op.inputs[0]) is elu.reads[0]
        and (zero := t.constant(condition.op.inputs[1])) is not None
        and zero.size == 1
        and zero == 0
    ):
        return t.make(
            Operation.ACTIVATION,
            elu.reads[0],
            activation=Activation.ELU,
            a=alpha,
        )
    raise UnknownError("it chooses between values")


ELEMENTWISE = {
    "Relu": _activation(Activation.RELU),
    "Relu6": _activation(Activation.CLIP, a=0.0, b=6.0),
    "LeakyRelu": _leaky_relu,
    "Elu": _activation(Activation.ELU, a=1.0),
    "Selu": _activation(Activation.SELU),
    "Sigmoid": _activation(Activation.SIGMOID),
    "Tanh": _activation(Activation.TANH),
    "Softplus": _activation(Activation.SOFTPLUS),
    "Exp": _activation(Activation.EXPONENTIAL),
    "Softmax": _softmax,
    "Maximum": _maximum,
    "Minimum": _minimum,
    "Add": _add,
    "AddV2": _add,
    "BiasAdd": _bias_add,
    "AddN": _add_all,
    "Sub": _subtract,
    "Neg": _negative,
    "RealDiv": _divide,
    "Mul": _multiply,
    "Square": _square,
    "FusedBatchNorm": _batch_norm,
    "FusedBatchNormV2": _batch_norm,
    "FusedBatchNormV3": _batch_norm,
    "SelectV2": _select,
}
