"""What follows a convolution of a served network, and references of it.

The references compute in float64.
"""

import math

import numpy as np

from support.tiles import Epilogue, Field, Plane, pointer

RELU, CLIP, LEAKY, ELU, SIGMOID, TANH, SILU, GELU = range(8)
GELU_TANH, HARD_SIGMOID, HARD_SILU, SOFTPLUS, SELU, EXPONENTIAL = range(8, 14)


def generator(*seed):
    """Returns a generator of random numbers with a seed."""
    return np.random.default_rng(seed)


# The activations, in float64.
def _expm1_below_0(x):
    return np.expm1(np.minimum(x, 0))


def _erfc(x):
    return np.vectorize(math.erfc, otypes=[float])(x)


def activation(x, act, a=0.0, b=0.0):
    """Returns an activation of numbers, by its number in the header."""
    x = np.asarray(x, np.float64)
    if act == -1:
        return x
    with np.errstate(all="ignore"):
        sigmoid = 1 / (1 + np.exp(-x))
        hard = np.clip(x / 6 + 0.5, 0, 1)
        cubic = x + 0.044715 * x**3
        alpha, scale = 1.6732632423543772, 1.0507009873554805
        return {
            RELU: lambda: np.maximum(x, 0),
            CLIP: lambda: np.minimum(np.maximum(x, a), b),
            LEAKY: lambda: np.where(x < 0, a * x, x),
            ELU: lambda: np.where(x < 0, a * _expm1_below_0(x), x),
            SIGMOID: lambda: sigmoid,
            TANH: lambda: np.tanh(x),
            SILU: lambda: x * sigmoid,
            GELU: lambda: x * _erfc(-x / math.sqrt(2)) / 2,
            GELU_TANH: lambda: (
                x / (1 + np.exp(-math.sqrt(8 / math.pi) * cubic))
            ),
            HARD_SIGMOID: lambda: hard,
            HARD_SILU: lambda: x * hard,
            SOFTPLUS: lambda: np.logaddexp(x, 0),
            SELU: lambda: scale * np.where(x < 0, alpha * _expm1_below_0(x), x),
            EXPONENTIAL: lambda: np.exp(x),
        }[act]()


class After:
    """A random epilogue, and a reference of it.

    Args:
        shape: [channels, rows, cells, L] of its numbers.
    """

    def __init__(self, rng, shape, last, **asked):
        channels, rows, cells, length = shape
        asked = {
            "affine": False,
            "other": None,
            "act": -1,
            "a": 0.0,
            "b": 0.0,
            "to": True,
            "to2": False,
            "affine2": True,
            "act2": -1,
            **asked,
        }
        self.asked, self.last = asked, last

        def vector(wanted):
            if not wanted:
                return None
            return rng.standard_normal(channels).astype(np.float32)

        self.scale, self.shift = (
            vector(asked["affine"]),
            vector(asked["affine"]),
        )
        self.scale2, self.shift2 = (
            vector(asked["affine2"]),
            vector(asked["affine2"]),
        )
        self.other = None
        kind = asked["other"]  # one of + - *, with `.` for a single pixel
        if kind:
            size = (1, 1) if "." in kind else (rows, cells)
            self.other = Plane(length, channels, *size, rng=rng)
        self.planes = [
            Plane(length, channels, rows, cells, last) if wanted else None
            for wanted in (asked["to"], asked["to2"])
        ]
        none = Field()
        self.struct = Epilogue(
            pointer(self.scale),
            pointer(self.shift),
            self.other.field if self.other else none,
            (kind or "+")[0].encode(),
            bool(kind) and "." in kind,
            asked["act"],
            asked["a"],
            asked["b"],
            *[plane.field if plane else none for plane in self.planes],
            pointer(self.scale2),
            pointer(self.shift2),
            asked["act2"],
            0.0,
            0.0,
        )

    def check(self, x, rows=slice(None), channels=slice(None), **tolerance):
        """Compares the written numbers with the reference for `x`."""
        x = np.asarray(x, np.float64)

        def by_channel(v):
            return v[:, None, None, None]

        if self.scale is not None:
            x = x * by_channel(self.scale) + by_channel(self.shift)
        if self.other is not None:
            sign = self.asked["other"][0]
            with_ = self.other.cells
            x = {"+": np.add, "-": np.subtract, "*": np.multiply}[sign](
                x, with_
            )
        y = activation(x, self.asked["act"], self.asked["a"], self.asked["b"])
        y[:, :, -1, self.last :] = 0
        z = y
        if self.scale2 is not None:
            z = y * by_channel(self.scale2) + by_channel(self.shift2)
        z = activation(z, self.asked["act2"])
        z[:, :, -1, self.last :] = 0
        tolerance = {"rtol": 2e-5, "atol": 2e-5, **tolerance}
        for plane, expected in zip(self.planes, (y, z), strict=True):
            if plane is None:
                continue
            # Margins and other parts must not be written.
            full = np.full(plane.cells.shape, Plane.untouched, np.float64)
            full[channels, rows] = expected[channels, rows]
            np.testing.assert_allclose(plane.cells, full, **tolerance)
            around = plane.around()
            assert set(np.unique(around)) <= {0, Plane.untouched}
            assert np.count_nonzero(around == 0) == plane.size


PLAIN = {"act": RELU}
EPILOGUES = (
    {},
    PLAIN,
    {"act": CLIP, "a": -0.5, "b": 0.75},
    {"other": "+", "act": RELU},
    {"other": "+", "to2": True, "act2": RELU},
    {"other": "+", "to": False, "to2": True, "act2": RELU},
    {"act": RELU, "to2": True},
    {"to": False, "to2": True, "affine2": False, "act2": RELU},
    {"affine": True, "act": RELU},
    {"affine": True, "other": "-", "act": TANH, "to2": True, "act2": SIGMOID},
    {"other": "*", "act": LEAKY, "a": 0.25},
    {"other": "*."},
    {"other": "+.", "act": ELU, "a": 1.5},
)


def aligned(floats):
    """Returns memory for some floats, aligned as vectors are."""
    return Plane(16, 1, 1, floats // 16 + 1).cells
