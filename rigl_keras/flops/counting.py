"""What a model costs: parameters, FLOPs and bits, layer by layer.

Masks give the number of connections, not the weights that happen to be zero:
freshly grown connections count.
"""

import dataclasses
import math

import keras
import numpy as np

from rigl_keras._checks import choice
from rigl_keras._text import aligned, wrapped
from rigl_keras.flops.positions import ATTENTION, applied
from rigl_keras.masking.layer_kernels import Kernel, find_kernels
from rigl_keras.masking.leaves import leaf_layers, named_layers, trained_weights
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.model_tree import within

__all__ = ["CONVENTIONS", "Count", "LayerCount", "count"]

CONVENTIONS = ("micronet", "macs")
_BITS = 32  # of a parameter
# What the table says of its FLOPs.
_SAID = {
    "micronet": "by the rules of MicroNet: a multiplication and an addition "
    "for each nonzero and position, none for norms, pooling and softmax",
    "macs": "in macs: a multiply-add for each nonzero and position",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCount:
    """What one kernel of a layer costs, for one sample.

    It may also stand for the two products of attention that have no weights:
    queries by keys, and scores by values. These are named `"<layer>/products"`,
    have an empty shape, and one position for each multiplication.

    Attributes:
        name: Unique name of the kernel (`selection.named_kernels`).
        shape: Shape of its kernel.
        parameters: Trainable parameters, dense.
        nonzeros: Trainable parameters that the mask keeps.
        density: Fraction of the kernel that the mask keeps.
        masked: Whether the layer has a mask.
        positions: How many times a kernel is applied to one sample: the number
            of output positions of a convolution (input positions of a
            transposed one), or of time steps of a recurrent layer.
        bias_additions: Cost of the bias at each position, 0 without a bias.
        convention: How FLOPs are counted.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    nonzeros: int
    density: float
    masked: bool
    positions: int
    bias_additions: int
    convention: str

    @property
    def inference_flops(self) -> float:
        """Forward cost with the mask."""
        return self.flops_at(self.density)

    @property
    def dense_inference_flops(self) -> float:
        """Forward cost without the mask."""
        return self.flops_at(1.0)

    def flops_at(self, density: float) -> float:
        """Returns the forward cost if the kernel had another density.

        Args:
            density: Fraction of the kernel, in [0, 1]; the number of weights
                need not be whole.

        Returns:
            FLOPs for one sample.
        """
        macs = density * math.prod(self.shape) * self.positions
        if self.convention == "macs":
            return macs
        return 2 * macs + self.bias_additions * self.positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """What a model costs; printing it shows a table.

    Attributes:
        parameters: Trainable parameters of the dense model.
        nonzeros: Trainable parameters that remain.
        density: Fraction of the masked weights that remain, 1 without masks. As
            in `sparsify`, parameters that are never masked do not count.
        inference_flops: Cost of one sample's forward pass.
        dense_inference_flops: The same without masks.
        bits: Size of the trainable parameters: 32 bits for each remaining one,
            and one bit for each entry of a mask that is not all ones.
        csr_bits: The size with such kernels as compressed sparse rows, one row
            for each output channel: a column index of 32 bits for each
            remaining weight, and rows + 1 row pointers of 32 bits.
        layers: A `LayerCount` for each counted layer.
        uncounted: Names and types of layers with weights whose FLOPs are not
            counted.
        convention: How FLOPs were counted.
    """

    parameters: int
    nonzeros: int
    density: float
    inference_flops: float
    dense_inference_flops: float
    bits: int
    csr_bits: int
    layers: tuple[LayerCount, ...]
    uncounted: tuple[tuple[str, str], ...]
    convention: str

    def __str__(self) -> str:
        # Of large models, what fits a terminal.
        unit = "MFLOPs" if self.inference_flops >= 1e8 else "FLOPs"
        head = ("layer", "kernel", "density", "nonzeros", "weights")
        rows = [(*head, unit, "ratio")]
        rows += [
            (*_cells(layer), *_costs(layer, unit)) for layer in self.layers
        ]
        rest = self.parameters - sum(one.parameters for one in self.layers)
        if rest:  # of which no layer above has one
            nonzeros = self.nonzeros - sum(one.nonzeros for one in self.layers)
            counts = f"{nonzeros:,}", f"{rest:,}"
            rows.append(("all others", "-", "dense", *counts, "-", "-"))
        total = f"{self.nonzeros:,}", f"{self.parameters:,}"
        rows.append(("model", "-", "-", *total, *_costs(self, unit)))
        lines = aligned(rows)
        if any(layer.masked for layer in self.layers):
            share = self.nonzeros / self.parameters
            lines.append(
                f"density {self.density:.4f} of the masked weights, "
                f"{share:.4f} of all"
            )
        lines += wrapped(
            f"{unit} of one sample and their ratio to the dense model's, "
            f"{_SAID[self.convention]}"
        )
        lines.append(
            f"{self.bits / 8e6:.2f} MB as bitmask and values, "
            f"{self.csr_bits / 8e6:.2f} MB as CSR, "
            f"{self.parameters * _BITS / 8e6:.2f} MB dense"
        )
        if self.uncounted:
            names = ", ".join(f"{n} ({kind})" for n, kind in self.uncounted)
            lines += wrapped(f"FLOPs not counted: {names}")
        return "\n".join(lines)

    __repr__ = __str__


def count(model: keras.Model, *, convention: str = "micronet") -> Count:
    """Returns the parameters, FLOPs and bits of a model.

    A kernel with n remaining weights that is applied at P positions costs as
    below. Positions are the output positions of a convolution, the input
    positions of a transposed one, the steps of a recurrent layer or, for an
    einsum, the product of all axes that its kernel lacks, without the batch.

        macs:     n P
        micronet: 2 n P, and P x (input channels) for a bias

    Attention with H heads from T queries to S keys with k entries and values
    with v entries costs, besides its kernels, H T S (k + v) multiplications
    (macs), or twice that (micronet), at any density. Keys that a mask hides are
    computed, so they count.

    micronet is how the report counts, after the MicroNet challenge (Evci et
    al., 2020, appendix H): multiplications and additions, a ReLU for each
    output instead of the addition that a sum of n terms saves, and nothing for
    normalisation, softmax, pooling, sums and embeddings, which are looked up.
    The report's code swaps the channels of a weight: a bias costs an addition
    for each input channel, not output channel. This is kept, to agree with the
    published numbers to the digit.

    The model is traced, not run: no output is computed and nothing changes.

    Args:
        model: A built model, masked or dense, whose input shape is known except
            for the batch. For a subclassed one, the shapes are those it was
            built with.
        convention: One of `CONVENTIONS`.

    Returns:
        A `Count`. FLOPs are for one sample.

    Raises:
        ValueError: The convention is unknown, the model is not built, or a
            dimension of its input is unknown.

    Example:

    >>> print(count(sparsify(models.wide_resnet(), 0.1)))
    """
    choice("convention", convention, CONVENTIONS)
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            "count takes a built Keras model. Received: "
            f"{getattr(model, 'name', model)!r}."
        )
    leaves = list({id(leaf): leaf for leaf in leaf_layers(model)}.values())
    kernels = [
        named
        for name, leaf in named_layers(model).items()
        for named in _kernels_of(name, leaf)
    ]
    attention = {
        name: layer
        for leaf_name, leaf in named_layers(model).items()
        for name, layer in _attention_in(leaf_name, leaf)
    }
    found = applied(
        model, [named.kernel for named in kernels], attention.values()
    )
    positions = found.positions
    layers = tuple(
        _count_layer(named, positions[id(named.kernel.variable)], convention)
        for named in kernels
        if id(named.kernel.variable) in positions
    )
    layers += tuple(
        _count_products(name, found.products[id(layer)], convention)
        for name, layer in attention.items()
    )
    counted = {id(named.kernel.variable) for named in kernels} & set(positions)
    parameters = sum(math.prod(v.shape) for v in trained_weights(model))
    masked = [
        (named.kernel, int(np.count_nonzero(named.mask.numpy())))
        for named in kernels
        if named.mask is not None
    ]
    weights = sum(kernel.size for kernel, _ in masked)
    removed = weights - sum(ones for _, ones in masked)
    sparse = [(k, ones) for k, ones in masked if ones < k.size]
    bitmasks = sum(kernel.size for kernel, _ in sparse)
    indices = sum(ones + kernel.units + 1 for kernel, ones in sparse)
    return Count(
        parameters=parameters,
        nonzeros=parameters - removed,
        density=1 - removed / weights if masked else 1.0,
        inference_flops=sum(layer.inference_flops for layer in layers),
        dense_inference_flops=sum(
            layer.dense_inference_flops for layer in layers
        ),
        bits=_BITS * (parameters - removed) + bitmasks,
        csr_bits=_BITS * (parameters - removed + indices),
        layers=layers,
        uncounted=tuple(
            (leaf.name, type(leaf).__name__)
            for leaf in leaves
            if any(
                len(v.shape) > 1 and v.name != "bias" and id(v) not in counted
                for v in leaf.trainable_variables
            )
        ),
        convention=convention,
    )


@dataclasses.dataclass(frozen=True)
class _NamedKernel:
    """A kernel of the model, with its unique name and its mask, if any."""

    name: str
    kernel: Kernel
    mask: keras.Variable | None


def _kernels_of(name, leaf):
    if not isinstance(leaf, Masked):
        masked, found = {}, find_kernels(leaf)
    else:
        masked = {m.found.path: m for m in leaf.masked_kernels()}
        found = find_kernels(leaf.layer)
        # Kernels of other names are found by name only.
        known = {kernel.path for kernel in found}
        found += [m.found for p, m in masked.items() if p not in known]
    for kernel in found:
        mask = masked[kernel.path].mask if kernel.path in masked else None
        yield _NamedKernel(kernel.named(name), kernel, mask)


def _attention_in(name, leaf):
    """Yields the attention layers that a leaf is or contains."""
    layer = leaf.layer if isinstance(leaf, Masked) else leaf
    for path, inner in within(layer, "", set()):
        if isinstance(inner, ATTENTION):
            parts = [part.strip("_") for part in path.split(".") if part]
            yield "/".join([name, *parts, "products"]), inner


def _count_products(name, products, convention):
    return LayerCount(
        name=name,
        shape=(),
        parameters=0,
        nonzeros=0,
        density=1.0,
        masked=False,
        positions=products,
        bias_additions=0,
        convention=convention,
    )


def _count_layer(named, positions, convention):
    kernel = named.kernel
    shape = tuple(kernel.variable.shape)
    size = math.prod(shape)
    masked = named.mask is not None
    ones = int(np.count_nonzero(named.mask.numpy())) if masked else size
    bias = getattr(kernel.owner, "bias", None)
    # The bias belongs to the kernel of a layer that is applied last.
    if bias is None or kernel.attribute in (
        "depthwise_kernel",
        "recurrent_kernel",
    ):
        bias = None
    biases = 0 if bias is None else math.prod(bias.shape)
    return LayerCount(
        name=named.name,
        shape=shape,
        parameters=size + biases,
        nonzeros=ones + biases,
        density=ones / size,
        masked=masked,
        positions=positions,
        bias_additions=math.prod(shape[axis] for axis in kernel.input_axes)
        if biases
        else 0,
        convention=convention,
    )


def _cells(layer):
    """Returns the first cells of a layer's row: what there is of it."""
    density = f"{layer.density:.4f}" if layer.masked else "dense"
    return (
        layer.name,
        "x".join(map(str, layer.shape)) or "-",
        density if layer.shape else "-",
        f"{layer.nonzeros:,}",
        f"{layer.parameters:,}",
    )


def _costs(cost, unit):
    """Returns the last cells of a row: FLOPs, and their ratio to the dense."""
    flops, dense = cost.inference_flops, cost.dense_inference_flops
    return (
        f"{flops / 1e6:,.3f}" if unit == "MFLOPs" else f"{flops:,.0f}",
        f"{flops / dense:.3f}" if dense else "-",
    )
