"""Patterns of masks: which weights stay together, and which compete.

A pattern cuts a kernel into *units* (single weights, whole kernels, blocks),
and the units into *groups* of equal size. Units compete for a place within
their group, and all groups keep the same number. A method's scores of weights
are averaged over each unit, and `topology.update_masks` grows in each group as
many units as it drops there. So every method keeps every pattern exactly,
without code for it.


- `Element()`: a unit is a weight, the group is the layer.
- `Kernel()`: a unit is the weights between an input and an output channel of a
  convolution, the group is the layer.
- `Blocks(r, c)`: a unit is r inputs x c outputs, the group is the layer.
- `NM(n, m)`: a unit is a weight, a group is m consecutive inputs of one output
  and position.
- `FanIn()`: a unit is a weight, a group is the inputs of an output unit.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Sequence

from rigl_keras import _checks
from rigl_keras.layouts import Axes, BlockLayout, KernelLayout, Layout

__all__ = [
    "Blocks",
    "Element",
    "FanIn",
    "Granularity",
    "Kernel",
    "NM",
    "Pattern",
    "as_pattern",
]


@dataclasses.dataclass(frozen=True)
class Pattern(abc.ABC):
    """Which weights of a mask stay together, and which compete.

    Methods need not know the pattern: `Layout` describes it for one kernel.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name of the pattern, as an argument `granularity`."""

    def __str__(self) -> str:
        return self.name

    def of(self, axes: Axes) -> "Pattern":
        """Returns the pattern for a kernel of a model with this pattern."""
        del axes
        return self

    def why_not(self, axes: Axes) -> str | None:
        """Returns why the pattern does not fit a kernel, or None if it does."""
        del axes
        return None

    def density_of(self, axes: Axes) -> float | None:
        """Returns the density that the pattern gives a kernel, or None."""
        del axes
        return None

    def layout(self, axes: Axes | Sequence[int]) -> Layout:
        """Returns the units and groups of a kernel.

        Args:
            axes: The meaning of the kernel's axes, or its shape, read as by
                `Axes.of`.

        Raises:
            ValueError: The pattern does not fit the kernel (`why_not`).

        Example:

        >>> layout = NM(2, 4).layout((8, 3))
        >>> layout.groups, layout.size
        (6, 4)
        """
        if not isinstance(axes, Axes):
            axes = Axes.of(axes)
        why = self.why_not(axes)
        if why is not None:
            raise ValueError(
                f"The pattern {self.name!r} does not fit a kernel of shape "
                f"{axes.shape}: {why}. Leave its layer dense, or use another "
                "pattern."
            )
        return self._layout(axes)

    @abc.abstractmethod
    def _layout(self, axes: Axes) -> Layout: ...


@dataclasses.dataclass(frozen=True)
class Element(Pattern):
    """Single weights; each competes with all weights of its layer.

    Evci et al., 2020, arXiv:1911.11134.
    """

    @property
    def name(self) -> str:
        return "element"

    def _layout(self, axes):
        order = tuple(range(len(axes.shape)))
        return Layout(axes.shape, order, math.prod(axes.shape))


@dataclasses.dataclass(frozen=True)
class Kernel(Pattern):
    """All weights between an input and an output channel of a convolution.

    The reproduction's `struct-*` methods. Kernels without positions have single
    weights as units, and stay at density 1 unless `densities` names them.
    """

    @property
    def name(self) -> str:
        return "kernel"

    def of(self, axes: Axes) -> Pattern:
        return self if axes.convolved else Element()

    def density_of(self, axes: Axes) -> float | None:
        return None if axes.convolved else 1.0

    def _layout(self, axes):
        if not axes.convolved:
            return Element().layout(axes)
        return KernelLayout(
            axes.shape,
            (0, 1),
            math.prod(axes.shape[-2:]),
            "keeps or removes whole kernels, whose sizes differ",
        )


@dataclasses.dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of `rows` inputs and `columns` outputs, at one position each.

    A kernel is a matrix of inputs and outputs, one for each position of a
    convolution, cut into blocks from its first entry on. The worth of a block
    is the mean over its weights. A block at the edge may be smaller, and counts
    like the others. This is tfmot's `block_size` with `"AVG"` pooling, for
    kernels with any number of axes.

    Args:
        rows: Inputs (channels) in a block, at least 1.
        columns: Outputs in a block, at least 1.

    Raises:
        ValueError: An argument is out of range.
    """

    rows: int
    columns: int

    def __post_init__(self):
        for name in ("rows", "columns"):
            whole = _checks.integer(name, getattr(self, name), at_least=1)
            object.__setattr__(self, name, whole)

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}"

    def why_not(self, axes: Axes) -> str | None:
        if axes.is_depthwise:
            return "depthwise, it has no matrix of inputs and outputs"
        return None

    def _layout(self, axes):
        positions = axes.rest(*axes.inputs, *axes.outputs)
        inputs, outputs = axes.size(axes.inputs), axes.size(axes.outputs)
        down, across = -(-inputs // self.rows), -(-outputs // self.columns)
        return BlockLayout(
            axes.shape,
            (0, 1, 2),
            axes.size(positions) * down * across,
            "keeps or removes whole blocks, whose sizes may differ",
            axes=(*positions, *axes.inputs, *axes.outputs),
            matrices=(axes.size(positions), inputs, outputs),
            block=(self.rows, self.columns),
        )


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """n of each m consecutive weights along the inputs.

    At each position of a convolution and for each output, m consecutive inputs
    (channels) are a group. Sparse tensor cores multiply along this axis:
    TensorRT and cuSPARSELt accept 2:4 in half precision and int8. The density
    is n/m in each layer. Zhou et al., 2021, Learning N:M fine-grained
    structured sparse neural networks from scratch, arXiv:2102.04010.

    Args:
        n: Weights that each group keeps, at least 1.
        m: Weights in a group, above n.

    Raises:
        ValueError: An argument is out of range.

    Example:

    >>> model = sparsify(model, granularity="2:4")
    """

    n: int
    m: int

    def __post_init__(self):
        for name, least in (("n", 1), ("m", 2)):
            whole = _checks.integer(name, getattr(self, name), at_least=least)
            object.__setattr__(self, name, whole)
        if self.n >= self.m:
            raise ValueError(
                "n of each m weights are kept, and n must be below m. "
                f"Received: n={self.n}, m={self.m}."
            )

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    def why_not(self, axes: Axes) -> str | None:
        if axes.is_depthwise:
            return "depthwise, each unit reads a single channel"
        inputs = axes.size(axes.inputs)
        if inputs % self.m:
            return f"its {inputs} inputs are not a multiple of {self.m}"
        return None

    def density_of(self, axes: Axes) -> float | None:
        return self.n / self.m

    def _layout(self, axes):
        return Layout(
            axes.shape,
            (*axes.rest(*axes.inputs), *axes.inputs),
            self.m,
            f"keeps {self.n} of each {self.m} weights in every layer",
            self.n,
        )


@dataclasses.dataclass(frozen=True)
class FanIn(Pattern):
    """The same number of inputs for every output unit of a layer.

    A layer of density d with F inputs per unit (positions of a convolution
    included) keeps round(d F) of each unit, at least one. Lasby et al., 2024,
    Dynamic sparse training with structured sparsity, arXiv:2305.02299.
    """

    @property
    def name(self) -> str:
        return "fan_in"

    def _layout(self, axes):
        inputs = axes.rest(*axes.outputs)
        return Layout(
            axes.shape,
            (*axes.outputs, *inputs),
            axes.size(inputs),
            "keeps the same number of inputs for every unit, so that a "
            "single weight cannot move",
        )


Granularity = str | Pattern


def as_pattern(granularity: Granularity) -> Pattern:
    """Returns a pattern from its name, or the pattern itself.

    Args:
        granularity: `"element"`, `"kernel"`, `"fan_in"`, `"n:m"` such as
            `"2:4"`, `"rxc"` such as `"4x16"` (`Blocks`), or a pattern.

    Raises:
        ValueError: It is none of these.

    Example:

    >>> as_pattern("2:4")
    NM(n=2, m=4)
    """
    if isinstance(granularity, Pattern):
        return granularity
    if isinstance(granularity, str):
        for kind in (Element, Kernel, FanIn):
            if granularity == kind().name:
                return kind()
        for kind, sign in ((NM, ":"), (Blocks, "x")):
            number = r"(\d{1,9})"
            found = re.fullmatch(number + sign + number, granularity)
            if found:
                return kind(*map(int, found.groups()))
    raise ValueError(
        "granularity must be one of 'element', 'kernel', 'fan_in', 'n:m' such "
        "as '2:4' and 'rxc' such as '4x16', or a pattern of "
        f"rigl_keras.patterns. Received: granularity={granularity!r}."
    )
