"""Finds the kernels of a layer, and the meaning of their axes.

Kernels are found by their names (`kernel`, `recurrent_kernel`, ...), in layers
of Keras or of the user, and in the layers within them: the projections of
attention, the cell of an LSTM, the blocks of a custom layer.
"""

import dataclasses
import math
from collections.abc import Mapping

import keras

from rigl_keras.layouts import Axes
from rigl_keras.masking.model_tree import step_to, within

__all__ = [
    "CONVOLUTIONS",
    "KERNEL_NAMES",
    "Kernel",
    "einsum_axes",
    "find_kernels",
    "is_normalisation",
    "kernel_at",
    "kernel_variable",
]

KERNEL_NAMES = (
    "kernel",
    "depthwise_kernel",
    "pointwise_kernel",
    "recurrent_kernel",
)
_NORMALISATION = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.UnitNormalization,
    keras.layers.RMSNormalization,
)
_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
    *_TRANSPOSED,
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a layer: where it is, and the meaning of its axes.

    Attributes:
        layer: The layer that is masked as a whole.
        path: Attributes that lead from the layer to the kernel: `"kernel"`,
            `"cell.recurrent_kernel"`.
        owner: The layer, or the inner layer, that owns the variable.
        variable: The variable.
    """

    layer: keras.layers.Layer
    path: str
    owner: keras.layers.Layer
    variable: keras.Variable

    @property
    def attribute(self) -> str:
        """The owner's name for the variable."""
        return self.path.split(".")[-1]

    def named(self, layer_name: str) -> str:
        """Returns the kernel's name within a model.

        It is the layer's name for its `kernel`, and includes the path for
        others: `"attention/query_dense/kernel"`.
        """
        if self.path == "kernel":
            return layer_name
        parts = [part.strip("_") for part in self.path.split(".")]
        return "/".join([layer_name, *parts])

    @property
    def is_convolution(self) -> bool:
        """Whether it has spatial axes, all but the last two."""
        return isinstance(self.owner, CONVOLUTIONS)

    @property
    def is_transposed(self) -> bool:
        return isinstance(self.owner, _TRANSPOSED)

    @property
    def is_depthwise(self) -> bool:
        return self.attribute == "depthwise_kernel" or isinstance(
            self.owner,
            (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D),
        )

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The axes of the output units; a unit sums over the other axes.

        A dense kernel is (inputs, outputs), a convolution's (..., inputs,
        outputs), a transposed one's (..., outputs, inputs). A depthwise one's
        is (..., inputs, multiplier), and each pair of these is a unit.
        """
        axes = len(self.variable.shape)
        if self.is_depthwise:
            return axes - 2, axes - 1
        if self.is_transposed:
            return (axes - 2,)
        if isinstance(self.owner, keras.layers.EinsumDense):
            _, of_kernel, of_outputs = einsum_axes(self.owner.equation)
            return tuple(i for i, a in enumerate(of_kernel) if a in of_outputs)
        return (axes - 1,)

    @property
    def size(self) -> int:
        """How many weights it has."""
        return math.prod(self.variable.shape)

    @property
    def units(self) -> int:
        """How many output units it has, the rows of a sparse matrix."""
        return math.prod(self.variable.shape[a] for a in self.output_axes)

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes of the input units (channels)."""
        axes = len(self.variable.shape)
        if self.is_depthwise:
            return (axes - 2,)
        if self.is_transposed:
            return (axes - 1,)
        if isinstance(self.owner, keras.layers.EinsumDense):
            outputs = self.output_axes
            return tuple(i for i in range(axes) if i not in outputs)
        return (axes - 2,)

    @property
    def axes(self) -> Axes:
        """The shape and axes, as a pattern needs them."""
        return Axes(
            tuple(self.variable.shape),
            self.input_axes,
            self.output_axes,
            self.is_convolution,
        )

    @property
    def initializer(self) -> keras.initializers.Initializer | None:
        """The initializer of the kernel, if its layer has it."""
        name = self.attribute.removesuffix("_kernel") + "_initializer"
        found = getattr(self.owner, name, None)
        return (
            found if isinstance(found, keras.initializers.Initializer) else None
        )


def find_kernels(
    layer: keras.layers.Layer, kernels: Mapping | None = None
) -> list[Kernel]:
    """Returns the kernels of a built layer and of the layers within it.

    Args:
        layer: A built layer.
        kernels: None: variables with at least two axes and a name in
            `KERNEL_NAMES`. Or `{layer or layer type: name, or list of names}`
            of the variables of these layers, such as an Embedding's
            `"embeddings"`; other layers as under None.

    Returns:
        A list in the order of the layers, empty if nothing can be masked.
    """
    found, seen = [], set()
    for path, owner in within(layer, "", set()):
        for name in _names(owner, kernels):
            variable = kernel_variable(owner, name)
            if variable is None or id(variable) in seen:
                continue
            seen.add(id(variable))
            found.append(Kernel(layer, path + name, owner, variable))
    return found


def kernel_variable(
    owner: keras.layers.Layer, name: str
) -> keras.Variable | None:
    """Returns an attribute, if it is a float variable with two axes or more.

    Args:
        owner: A built layer.
        name: Name of the attribute.
    """
    variable = _read(owner, name)
    fits = (
        isinstance(variable, keras.Variable)
        and len(variable.shape) > 1
        and keras.backend.is_float_dtype(variable.dtype)
    )
    return variable if fits else None


def _read(owner, name):
    """Returns an attribute, or None if it cannot be read."""
    try:
        return getattr(owner, name, None)
    except Exception:  # a property that needs another state
        return None


def kernel_at(layer: keras.layers.Layer, path: str) -> Kernel:
    """Returns the kernel that a path leads to.

    Args:
        layer: A built layer.
        path: As in `Kernel.path`.

    Raises:
        ValueError: It does not lead to a variable.
    """
    *way, name = path.split(".")
    owner = layer
    try:
        for part in way:
            owner = step_to(owner, part)
        variable = getattr(owner, name)
    except (AttributeError, KeyError, IndexError, TypeError):
        variable = None
    if not isinstance(variable, keras.Variable):
        raise ValueError(
            f"Layer {layer.name!r}, a {type(layer).__name__}, has no kernel at "
            f"{path!r}. Its kernels: "
            f"{[k.path for k in find_kernels(layer)] or 'none'}."
        )
    return Kernel(layer, path, owner, variable)


def einsum_axes(equation: str) -> tuple[str, str, str]:
    """Returns the axes of inputs, kernel and outputs of an EinsumDense.

    >>> einsum_axes("abc,cd->abd")
    ('abc', 'cd', 'abd')
    """
    terms, of_outputs = equation.replace(" ", "").split("->")
    of_inputs, of_kernel = terms.split(",")
    return of_inputs, of_kernel, of_outputs


def is_normalisation(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer only normalises: these are never masked."""
    return isinstance(layer, _NORMALISATION)


def _names(layer, kernels):
    for kind, names in (kernels or {}).items():
        of_kind = isinstance(kind, type) and isinstance(layer, kind)
        if layer is kind or of_kind:
            return [names] if isinstance(names, str) else names
    return () if is_normalisation(layer) else KERNEL_NAMES
