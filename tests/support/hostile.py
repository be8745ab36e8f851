"""Random arguments, some of them wrong, and a check of their errors."""

import decimal
import fractions
import math
import pathlib

import numpy as np
import tensorflow as tf
from hypothesis import strategies as st

import rigl_keras
from rigl_keras.conventions import ORIGINAL, REPORT
from rigl_keras.schedules import SparsityRamp

PACKAGE = pathlib.Path(rigl_keras.__file__).parent
NAN, INF = math.nan, math.inf

SCALARS = [
    None, True, False, "", "abc", b"x", NAN, INF, -INF, -0.0, 0, -1, 2, 3.7,
    0.5, 10**400, -(10**30), 2**63, 1e-320, 1e308, 1j, fractions.Fraction(1, 3),
    decimal.Decimal("0.5"), np.int64(3), np.int8(-1), np.uint64(2**63),
    np.float32(0.5), np.float16(NAN), np.bool_(True), np.str_("er"),
]  # fmt: skip
OBJECTS = [
    [], (), {}, set(), [1], [None], [[1, 2], [3]], {"a": 1}, {1: NAN}, int,
    object(), len, range(3), np.array(0.5), np.array([0.5, 2.0]),
    np.array([[1, 0], [0, 1]]), np.array([]), np.array(["a"]),
    np.array([None]), np.array([1j]), tf.constant(3), tf.constant([1, 2]),
    tf.constant("a"), tf.constant(True), tf.constant(NAN),
    tf.constant(0.5, tf.float16), tf.zeros([2, 0]), tf.constant([1j]),
    tf.ragged.constant([[1], [2, 3]]), tf.Variable(1.0),
]  # fmt: skip
HOSTILE = st.sampled_from(SCALARS + OBJECTS)


def mixed(**valid):
    """Returns a strategy of arguments that are sometimes hostile."""

    @st.composite
    def arguments(draw):
        return {
            name: draw(
                HOSTILE if draw(st.integers(0, 2 * len(valid))) == 1 else values
            )
            for name, values in valid.items()
        }

    return arguments()


def check_error(error, arguments):
    """Checks that an error of this package shows the received value."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = pathlib.Path(trace.tb_frame.f_code.co_filename)
    ours = file.is_relative_to(PACKAGE)
    if ours and isinstance(error, ValueError):
        message = str(error)
        # For plain values, the value itself.
        assert not arguments or any(
            text.lower() in message.lower()
            for value in leaves(arguments)
            for text in (repr(value), str(value))
        ), message


def leaves(values):
    """Yields the texts by which a message may show arguments."""
    for value in values.values() if isinstance(values, dict) else values:
        yield value
        yield type(value).__name__
        if isinstance(value, float):
            yield f"{value:g}"  # as an array shows it
        if isinstance(value, (dict, list, tuple, range, set)):
            yield from leaves(value)
        if isinstance(value, dict):
            yield from value
        if tf.is_tensor(value) or isinstance(value, np.ndarray):
            yield value.shape
            yield tf.as_dtype(value.dtype).name if value.dtype != object else ""
            if tf.is_tensor(value) and value.dtype.is_floating:
                yield from np.ravel(value.numpy()).tolist()
            if isinstance(value, np.ndarray):
                yield from np.ravel(value).tolist()


presets = st.sampled_from([ORIGINAL, REPORT])
# Some devices flush subnormal numbers to zero.
part = st.floats(0, 1, allow_subnormal=False)
names = st.sampled_from(
    ["uniform", "er", "erk", "erdos_renyi", "erdos_renyi_kernel"]
)
step = st.integers(0, 300) | st.integers(0, 300).map(
    lambda t: tf.constant(t, tf.int64)
)
RAMP = SparsityRamp(final_density=0.1, begin_step=3, end_step=90, frequency=7)


@st.composite
def kernels(draw, *parts):
    """Draws arguments of one shape: masks ("mask") and scores ("scores")."""
    shape = draw(st.sampled_from([(6,), (2, 3), (1, 2, 4), (9,)]))
    size = math.prod(shape)
    values = st.sampled_from(
        [0.0, -0.0, 1.0, 1.0, -2.0, 3.5, 1e-30, -1e30, INF, -INF]
    )
    one = {
        "mask": st.lists(st.booleans(), min_size=size, max_size=size),
        "scores": st.lists(values, min_size=size, max_size=size),
    }
    return [
        np.reshape(
            np.array(draw(one[p]), np.float32 if p == "scores" else bool), shape
        )
        for p in parts
    ]


def of_one_shape(parts, **others):
    """Is like `mixed`, but some arguments share a shape."""

    @st.composite
    def arguments(draw):
        drawn = draw(kernels(*parts.values()))
        made = dict(zip(parts, drawn, strict=True))
        for name, part in parts.items():
            if part == "mask" and draw(st.booleans()):
                made[name] = made[name].astype(
                    draw(st.sampled_from(["int32", "float32", "uint8"]))
                )
            if draw(st.integers(0, 9)) == 1:
                made[name] = draw(HOSTILE)
            elif part == "scores" and draw(st.integers(0, 15)) == 0:
                made[name].flat[0] = NAN
        return {**made, **draw(mixed(**others))}

    return arguments()
