"""Which variables of a layer are kernels, where they are and what they join.

A kernel is found by its name (`kernel`, `recurrent_kernel`, ...), in a layer
of Keras's or of the user's own, and in the layers within it: the projections
of attention, the cell of an LSTM, the blocks of a custom layer.
"""

import dataclasses
from collections.abc import Container, Iterator, Mapping

import keras

__all__ = [
    "CONVOLUTIONS",
    "KERNEL_NAMES",
    "Kernel",
    "einsum_axes",
    "find_kernels",
    "is_graph",
    "is_normalisation",
    "kernel_at",
    "key_of",
    "layers_in",
    "step_to",
    "sublayers",
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
    """A kernel of a layer: where it is, and the axes that it joins.

    Attributes:
        layer: The layer that is masked as one.
        path: Attributes that lead from it to the kernel: `"kernel"`,
            `"cell.recurrent_kernel"`.
        owner: The layer, or the one within it, that has the variable.
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

        That of its layer, if it is simply the layer's `kernel`, and else with
        the path: `"attention/query_dense/kernel"`.
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
        """Axes that tell the output units apart; a unit sums over the rest.

        A dense kernel is (inputs, outputs), a convolution's (..., inputs,
        outputs), a transposed one's (..., outputs, inputs), a depthwise one's
        (..., inputs, multiplier), each pair of which is a unit.
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
    def input_axes(self) -> tuple[int, ...]:
        """Axes that tell the input units (channels) apart."""
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
    def initializer(self) -> keras.initializers.Initializer | None:
        """What the kernel was drawn by, where its layer tells."""
        name = self.attribute.removesuffix("_kernel") + "_initializer"
        found = getattr(self.owner, name, None)
        return (
            found if isinstance(found, keras.initializers.Initializer) else None
        )


def find_kernels(
    layer: keras.layers.Layer, kernels: str | Mapping = "auto"
) -> list[Kernel]:
    """Returns the kernels of a built layer and of the layers within it.

    Args:
        layer: A built layer.
        kernels: `"auto"`: variables of two axes or more that are named as in
            `KERNEL_NAMES`. Or `{layer or layer type: name, or list of
            names}` of the variables of these layers, such as an Embedding's
            `"embeddings"`; the rest as under `"auto"`.

    Returns:
        A list in the order of the layers, empty where nothing can be masked.
    """
    found, seen = [], set()
    for path, owner in _within(layer, "", set()):
        for name in _names(owner, kernels):
            variable = _read(owner, name)
            if not isinstance(variable, keras.Variable):
                continue
            if len(variable.shape) < 2 or id(variable) in seen:
                continue
            if not keras.backend.is_float_dtype(variable.dtype):
                continue
            seen.add(id(variable))
            found.append(Kernel(layer, path + name, owner, variable))
    return found


def _read(owner, name):
    """Returns an attribute, or None where there is none to be read."""
    try:
        return getattr(owner, name, None)
    except Exception:  # a property of a class that expects another state
        return None


def kernel_at(layer: keras.layers.Layer, path: str) -> Kernel:
    """Returns the kernel that a path leads to.

    Args:
        layer: A built layer.
        path: As in `Kernel.path`.

    Raises:
        ValueError: It leads to no variable.
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


def is_graph(model) -> bool:
    """Returns whether a model is a Sequential or Functional one."""
    return isinstance(model, keras.Sequential) or (
        isinstance(model, keras.Model) and hasattr(model, "operations")
    )


def is_normalisation(layer) -> bool:
    """Returns whether a layer only normalises, and so is never masked."""
    return isinstance(layer, _NORMALISATION)


def sublayers(
    layer: keras.layers.Layer,
) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yields the layers that a layer or a model owns, by attribute.

    Args:
        layer: Any layer; a subclassed model is one.

    Yields:
        `(path, layer)`: `"dense"` for an attribute, `"blocks.0"` for an item
        of a list, `"heads.one"` or `"heads.#0"` for one of a dict.
    """
    if is_graph(layer):
        for i, inner in enumerate(layer.layers):
            yield f"layers.{i}", inner
        return
    owned = {id(inner) for inner in layer._layers}
    reached = set()
    for path, inner in layers_in(layer, owned):
        reached.add(id(inner))
        yield path, inner
    for i, inner in enumerate(layer._layers):
        # Within an object that is no layer, but was known to Keras before.
        if id(inner) not in reached:
            yield f"_layers.{i}", inner


# Keras and TensorFlow keep lists of what is owned under their own names.
_OF_KERAS = ("_layers", "_metrics", "_tracker", "_obj_reference_counts_dict")
_OF_GRAPHS = ("_functional", "_operations", "_operations_by_depth")


def layers_in(
    owner: keras.layers.Layer, wanted: Container[int]
) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yields where the attributes of a layer or model hold layers.

    Args:
        owner: Any layer or model.
        wanted: Ids of the layers that are yielded.

    Yields:
        `(path, layer)` as `sublayers` gives them.
    """
    for name, value in vars(owner).items():
        if name in _OF_KERAS or name.startswith("_self_"):
            continue
        if not (is_graph(owner) and name in _OF_GRAPHS):
            yield from _layers_in(value, name, wanted)


def _layers_in(value, path, owned):
    if isinstance(value, keras.layers.Layer):
        if id(value) in owned:
            yield path, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _layers_in(item, f"{path}.{i}", owned)
    elif isinstance(value, dict):
        for i, (key, item) in enumerate(value.items()):
            named = isinstance(key, str) and key.isidentifier()
            part = key if named else f"#{i}"
            yield from _layers_in(item, f"{path}.{part}", owned)


def _within(layer, path, seen):
    """Yields a layer and all layers within it, each once, with their paths."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield path, layer
    for name, inner in sublayers(layer):
        yield from _within(inner, f"{path}{name}.", seen)


def step_to(owner, part: str):
    """Returns what one part of a path leads to from a layer or container."""
    if isinstance(owner, (list, tuple)):
        return owner[int(part)]
    if isinstance(owner, dict):
        return owner[key_of(owner, part)]
    return getattr(owner, part)


def key_of(container: dict, part: str):
    """Returns the key that one part of a path means: `"#2"`, the third."""
    return list(container)[int(part[1:])] if part[0] == "#" else part


def _names(layer, kernels):
    if kernels != "auto":
        for kind, names in kernels.items():
            if layer is kind or (
                isinstance(kind, type) and isinstance(layer, kind)
            ):
                return [names] if isinstance(names, str) else names
    return () if is_normalisation(layer) else KERNEL_NAMES
