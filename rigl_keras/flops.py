"""What a model costs: parameters, FLOPs and bits, layer by layer.

The number of connections is taken from the masks, not from weights that
happen to be zero, so that freshly grown connections count.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from rigl_keras.layers import Masked
from rigl_keras.sparsify import (
    MASKABLE,
    aligned,
    input_structure,
    leaf_layers,
)

__all__ = ["CONVENTIONS", "Count", "LayerCount", "count", "training_flops"]

CONVENTIONS = ("micronet", "macs")

_BITS = 32  # of a parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCount:
    """What one layer costs, for one sample.

    Attributes:
        name: Name of the layer.
        shape: Shape of its kernel.
        parameters: Trainable parameters, dense.
        nonzeros: Trainable parameters that the mask keeps.
        density: Fraction of the kernel that the mask keeps.
        masked: Whether the layer has a mask.
        positions: How many times a kernel is applied to one sample: the
            number of output positions.
        biased: Whether a bias is added at each position.
        convention: How FLOPs are counted.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    nonzeros: int
    density: float
    masked: bool
    positions: int
    biased: bool
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
        return 2 * macs + self.biased * self.shape[-2] * self.positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """What a model costs; printing it shows a table.

    Attributes:
        parameters: Trainable parameters of the dense model, masked or not.
        nonzeros: Trainable parameters that remain.
        density: Fraction of the masked weights that remain, 1 without masks.
            It is what `sparsify` was asked for, and leaves out the
            parameters that are never masked.
        inference_flops: Cost of one sample's forward pass.
        dense_inference_flops: The same without masks.
        bits: Size of the trainable parameters: 32 bits for each that
            remains, and one bit for each entry of a mask that is not all
            ones.
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
    layers: tuple[LayerCount, ...]
    uncounted: tuple[tuple[str, str], ...]
    convention: str

    def __str__(self) -> str:
        rows = [("layer", "kernel", "density", "parameters", "FLOPs", "ratio")]
        for layer in self.layers:
            rows.append(
                (
                    layer.name,
                    "x".join(map(str, layer.shape)),
                    f"{layer.density:.4f}" if layer.masked else "dense",
                    f"{layer.nonzeros:,}",
                    f"{layer.inference_flops:,.0f}",
                    _ratio(layer),
                )
            )
        # The sums include normalisation, which costs no FLOPs here.
        rows.append(
            (
                "model",
                "",
                f"{self.density:.4f}",
                f"{self.nonzeros:,}",
                f"{self.inference_flops:,.0f}",
                _ratio(self),
            )
        )
        lines = aligned(rows)
        lines.append(
            f"{self.nonzeros:,} of {self.parameters:,} trainable parameters, "
            f"{self.bits / 8e6:.2f} MB of {self.parameters * _BITS / 8e6:.2f}, "
            f"FLOPs for one sample ({self.convention})"
        )
        if self.uncounted:
            names = ", ".join(f"{n} ({kind})" for n, kind in self.uncounted)
            lines.append(f"FLOPs not counted: {names}")
        return "\n".join(lines)


def count(model: keras.Model, *, convention: str = "micronet") -> Count:
    """Returns the parameters, FLOPs and bits of a model.

    A kernel of which n weights remain and that is applied at P positions
    costs

        macs:     n P
        micronet: 2 n P, and P x (input channels) for a bias

    micronet is how the report counts, after the MicroNet challenge (Evci et
    al., 2020, appendix H): multiplications and additions, a ReLU for each
    output in place of the addition that a sum of n terms saves, nothing for
    normalisation, pooling and sums. Its code reads the channels of a weight
    the other way round, so that a bias costs an addition for each input
    channel instead of each output channel; this is kept, to agree with the
    published numbers to the digit.

    The model is traced, not run: no output is computed and nothing changes.

    Args:
        model: A built model, masked or dense, whose input shape is known but
            for the batch.
        convention: One of `CONVENTIONS`.

    Returns:
        A `Count`. FLOPs are for one sample.

    Raises:
        ValueError: The convention is unknown, the model is not built, or a
            spatial dimension of its input is not known.

    Example:

    >>> print(count(sparsify(models.wide_resnet(), 0.1)))
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"convention must be one of {CONVENTIONS}. Received: "
            f"convention={convention!r}."
        )
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            "count takes a built Keras model. Received: "
            f"{getattr(model, 'name', model)!r}."
        )
    if not (
        isinstance(model, keras.Sequential) or hasattr(model, "operations")
    ):
        raise ValueError(
            "count takes Sequential and Functional models. Received the "
            f"subclassed model {model.name!r} of type {type(model).__name__}, "
            "whose inputs are not known."
        )
    leaves = list({id(leaf): leaf for leaf in leaf_layers(model)}.values())
    countable = [leaf for leaf in leaves if isinstance(_plain(leaf), MASKABLE)]
    positions = _positions(model, countable)
    layers = tuple(
        _count_layer(leaf, positions[id(leaf)], convention)
        for leaf in countable
    )
    # What is frozen counts as well; batch statistics and masks do not.
    trained = {
        id(v): v
        for leaf in leaves
        for part in leaf._flatten_layers()
        for v in part._trainable_variables
    }
    parameters = sum(math.prod(v.shape) for v in trained.values())
    masked = [
        (math.prod(leaf.mask.shape), int(np.sum(leaf.mask.numpy())))
        for leaf in leaves
        if isinstance(leaf, Masked)
    ]
    removed = sum(size - ones for size, ones in masked)
    weights = sum(size for size, _ in masked)
    bitmasks = sum(size for size, ones in masked if ones < size)
    return Count(
        parameters=parameters,
        nonzeros=parameters - removed,
        density=1 - removed / weights if masked else 1.0,
        inference_flops=sum(layer.inference_flops for layer in layers),
        dense_inference_flops=sum(
            layer.dense_inference_flops for layer in layers
        ),
        bits=_BITS * (parameters - removed) + bitmasks,
        layers=layers,
        uncounted=tuple(
            (leaf.name, type(leaf).__name__)
            for leaf in leaves
            if leaf not in countable
            and any(len(v.shape) > 1 for v in leaf.trainable_variables)
        ),
        convention=convention,
    )


def training_flops(
    method: str,
    *,
    sparse_flops: float,
    dense_flops: float,
    frequency: int | None = None,
) -> float:
    """Returns the cost of training on one sample, averaged over the steps.

    With f_s and f_d the forward cost of the sparse and the dense model, the
    backward pass costing twice the forward pass, and an update every T steps:

        dense:       3 f_d
        static, SET: 3 f_s
        RigL:        (3 f_s T + 2 f_s + f_d) / (T + 1)

    Evci et al., 2020, section 3 and appendix H, which count an update beside
    the T steps that it follows.

    Args:
        method: `"dense"`, `"static"`, `"set"` or `"rigl"`, in any case.
        sparse_flops: f_s for one sample.
        dense_flops: f_d for one sample.
        frequency: T, for RigL.

    Returns:
        FLOPs for one sample.

    Raises:
        ValueError: The method is unknown, or needs a frequency.

    Example:

    >>> training_flops("rigl", sparse_flops=1, dense_flops=5, frequency=1)
    5.0
    """
    name = method.lower()
    if name == "dense":
        return 3 * dense_flops
    if name in ("static", "set"):
        return 3 * sparse_flops
    if name != "rigl":
        raise ValueError(
            "method must be 'dense', 'static', 'set' or 'rigl'. Received: "
            f"method={method!r}."
        )
    if not frequency or frequency < 1:
        raise ValueError(
            "RigL's training FLOPs need the steps between updates. Received: "
            f"frequency={frequency!r}."
        )
    update = 2 * sparse_flops + dense_flops
    return (3 * sparse_flops * frequency + update) / (frequency + 1)


def _count_layer(leaf, positions, convention):
    plain = _plain(leaf)
    shape = tuple(plain.kernel.shape)
    size = math.prod(shape)
    masked = isinstance(leaf, Masked)
    ones = int(np.sum(leaf.mask.numpy())) if masked else size
    bias = math.prod(plain.bias.shape) if plain.use_bias else 0
    return LayerCount(
        name=leaf.name,
        shape=shape,
        parameters=size + bias,
        nonzeros=ones + bias,
        density=ones / size,
        masked=masked,
        positions=positions,
        biased=plain.use_bias,
        convention=convention,
    )


def _plain(leaf):
    return leaf.layer if isinstance(leaf, Masked) else leaf


def _positions(model, leaves) -> dict[int, int]:
    """Returns at how many positions each layer applies its kernel."""
    shapes = {id(leaf): [] for leaf in leaves}
    specs = tf.nest.map_structure(_one_sample, input_structure(model))

    def trace(x):
        # Penalties of activities go to the scope, not to the model.
        with keras.StatelessScope(collect_losses=True):
            return model(x, training=False)

    # A call forgets the losses of the one before.
    losses = [(part, list(part._losses)) for part in model._flatten_layers()]
    with contextlib.ExitStack() as stack:
        for leaf in leaves:
            stack.enter_context(_recording(leaf, shapes[id(leaf)]))
        tf.function(trace).get_concrete_function(specs)
    for part, before in losses:
        part._losses[:] = before
    positions = {}
    for leaf in leaves:
        plain = _plain(leaf)
        first = getattr(plain, "data_format", "channels_last").endswith("first")
        positions[id(leaf)] = sum(
            math.prod(shape[2:] if first else shape[1:-1])
            for shape in shapes[id(leaf)]
        )
    return positions


@contextlib.contextmanager
def _recording(leaf, shapes) -> Iterator[None]:
    """Within the context, appends the shape of each output of a layer."""
    call = leaf.call

    def recorded(*args, **kwargs):
        outputs = call(*args, **kwargs)
        shapes.append(tuple(outputs.shape))
        return outputs

    leaf.call = recorded
    try:
        yield
    finally:
        del leaf.call


def _one_sample(tensor):
    if None in tensor.shape[1:]:
        raise ValueError(
            "FLOPs depend on the size of the input. Received a model whose "
            f"input {tensor.name!r} has shape {tuple(tensor.shape)}: build it "
            "with a fixed shape."
        )
    return tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype)


def _ratio(cost):
    dense = cost.dense_inference_flops
    return f"{cost.inference_flops / dense:.4f}x" if dense else ""
