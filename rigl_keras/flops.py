"""What a model costs: parameters, FLOPs and bits, layer by layer.

The number of connections is taken from the masks, not from weights that
happen to be zero, so that freshly grown connections count.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from rigl_keras.arguments import choice, integer, number
from rigl_keras.layers import Masked
from rigl_keras.maskable import (
    CONVOLUTIONS,
    Kernel,
    einsum_axes,
    find_kernels,
    step_to,
)
from rigl_keras.sparsify import (
    aligned,
    call_model,
    input_structure,
    leaf_layers,
    named_layers,
    trained_weights,
)

__all__ = [
    "CONVENTIONS",
    "Count",
    "LayerCount",
    "count",
    "training_curve",
    "training_flops",
]

CONVENTIONS = ("micronet", "macs")

_BITS = 32  # of a parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCount:
    """What one kernel of a layer costs, for one sample.

    Attributes:
        name: Unique name of the kernel (`sparsify.named_kernels`).
        shape: Shape of its kernel.
        parameters: Trainable parameters, dense.
        nonzeros: Trainable parameters that the mask keeps.
        density: Fraction of the kernel that the mask keeps.
        masked: Whether the layer has a mask.
        positions: How many times a kernel is applied to one sample: for a
            convolution, the number of output positions (of a transposed one,
            of input positions); for a recurrent layer, that of time steps.
        bias_additions: What a bias costs at each position, 0 without one.
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
        csr_bits: The same with each such kernel as compressed sparse rows
            instead, a row for each output channel: a column index of 32 bits
            for each weight that remains, and rows + 1 row pointers of 32 bits.
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
            f"FLOPs for one sample ({self.convention})"
        )
        lines.append(
            f"{self.bits / 8e6:.2f} MB as bitmask and values, "
            f"{self.csr_bits / 8e6:.2f} MB as CSR, "
            f"{self.parameters * _BITS / 8e6:.2f} MB dense"
        )
        if self.uncounted:
            names = ", ".join(f"{n} ({kind})" for n, kind in self.uncounted)
            lines.append(f"FLOPs not counted: {names}")
        return "\n".join(lines)


def count(model: keras.Model, *, convention: str = "micronet") -> Count:
    """Returns the parameters, FLOPs and bits of a model.

    A kernel of which n weights remain and that is applied at P positions (the
    output positions of a convolution, or the input positions of a transposed
    one; the steps of a recurrent layer; for an einsum, the product of all
    axes but the batch that the kernel does not have) costs

        macs:     n P
        micronet: 2 n P, and P x (input channels) for a bias

    micronet is how the report counts, after the MicroNet challenge (Evci et
    al., 2020, appendix H): multiplications and additions, a ReLU for each
    output in place of the addition that a sum of n terms saves, nothing for
    normalisation, pooling, sums, embeddings and the products of attention
    that have no weights. Its code reads the channels of a weight
    the other way round, so that a bias costs an addition for each input
    channel instead of each output channel; this is kept, to agree with the
    published numbers to the digit.

    The model is traced, not run: no output is computed and nothing changes.

    Args:
        model: A built model, masked or dense, whose input shape is known but
            for the batch. A subclassed one is taken to be called on inputs of
            the shapes that it was built with.
        convention: One of `CONVENTIONS`.

    Returns:
        A `Count`. FLOPs are for one sample.

    Raises:
        ValueError: The convention is unknown, the model is not built, or a
            dimension of its input is not known.

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
    places = [
        place
        for name, leaf in named_layers(model).items()
        for place in _places(name, leaf)
    ]
    positions = _positions(model, leaves, places)
    layers = tuple(
        _count_layer(place, positions[id(place.kernel.variable)], convention)
        for place in places
        if id(place.kernel.variable) in positions
    )
    counted = {id(place.kernel.variable) for place in places} & set(positions)
    parameters = sum(math.prod(v.shape) for v in trained_weights(model))
    masked = [
        (place.mask.shape, int(np.count_nonzero(place.mask.numpy())))
        for place in places
        if place.mask is not None
    ]
    weights = sum(math.prod(shape) for shape, _ in masked)
    removed = weights - sum(ones for _, ones in masked)
    sparse = [(s, ones) for s, ones in masked if ones < math.prod(s)]
    bitmasks = sum(math.prod(shape) for shape, _ in sparse)
    indices = sum(ones + shape[-1] + 1 for shape, ones in sparse)
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


def training_flops(
    method: str,
    *,
    sparse_flops: float,
    dense_flops: float,
    frequency: int | None = None,
    gradient_batches: int = 1,
) -> float:
    """Returns the cost of training on one sample, averaged over the steps.

    With f_s and f_d the forward cost of the sparse and the dense model, the
    backward pass costing twice the forward pass, and an update every T steps:

        dense:                            3 f_d
        static, SET, SNIP, small-dense:   3 f_s
        RigL, RigL-SG, RigL-SM:           (3 f_s T + 2 f_s + f_d) / (T + 1)
        SNFS, magnitude pruning:          2 f_s + f_d

    Evci et al., 2020, section 3 and appendix H, which count an update beside
    the T steps that it follows. Where an update's gradient is the mean of n
    batches, n of these T + 1 steps have a dense backward pass:
    (3 f_s (T + 1 - n) + n (2 f_s + f_d)) / (T + 1).
    Pruning and SNFS are as in the reproduction
    (counting/inference_train_FLOPs.py). Where f_s changes during training it
    stands for the mean over the steps; `training_curve` takes it from the
    masks of a run.

    Args:
        method: Name of the method as above, or of the callback's class, in
            any case.
        sparse_flops: f_s for one sample.
        dense_flops: f_d for one sample.
        frequency: T, for RigL and its variants.
        gradient_batches: n, for RigL and its variants, at most T.

    Returns:
        FLOPs for one sample.

    Raises:
        ValueError: The method is unknown, or needs a frequency.

    Example:

    >>> training_flops("rigl", sparse_flops=1, dense_flops=5, frequency=1)
    5.0
    """
    name = str(method).lower().replace("_", "").replace("-", "")
    if name not in _GRADIENTS:
        raise ValueError(
            f"method must be one of {', '.join(_GRADIENTS)}. Received: "
            f"method={method!r}. For a method of your own, training_curve "
            "counts from its masks."
        )
    gradients = _GRADIENTS[name]
    sparse_flops = number(
        "sparse_flops", sparse_flops, at_least=0, at_most=1e300
    )
    dense_flops = number("dense_flops", dense_flops, at_least=0, at_most=1e300)
    if gradients == "updates":
        frequency = integer(
            "frequency",
            frequency,
            at_least=1,
            rule=f"of {method} must be the steps between updates",
        )
    if name == "dense":
        return 3 * dense_flops
    sparse, dense = 3 * sparse_flops, 2 * sparse_flops + dense_flops
    if gradients == "never":
        return sparse
    if gradients == "always":
        return dense
    if not 1 <= gradient_batches <= frequency:
        raise ValueError(
            "gradient_batches must be at least 1 and at most frequency. "
            f"Received: gradient_batches={gradient_batches!r}, "
            f"frequency={frequency!r}."
        )
    steps = frequency + 1
    expensive = gradient_batches * dense
    return (sparse * (steps - gradient_batches) + expensive) / steps


# When a method's closed form has dense gradients.
_GRADIENTS = {
    "dense": "always",
    "static": "never",
    "smalldense": "never",
    "snip": "never",
    "set": "never",
    "rigl": "updates",
    "riglsg": "updates",
    "riglsm": "updates",
    "snfs": "always",
    "magnitudepruning": "always",
}


def training_curve(
    cost: Count,
    trajectory: Sequence[tuple[int, Mapping[str, int]]],
    *,
    steps: int,
    dense_gradients: str,
    gradient_batches: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what each step of a run cost, by the masks that it really had.

    A step t with masks whose forward cost is f_s(t) costs 3 f_s(t), or
    2 f_s(t) + f_d where it needed gradients at inactive entries. The masks of
    an update hold from the step after it.

    Args:
        cost: The `count` of the model, before or after training.
        trajectory: `[(step, {layer: connections})]`: the active connections
            of each masked layer, at the first step and after each update.
        steps: How many steps the run has from the first on.
        dense_gradients: When the method needs dense gradients: `"never"`, at
            its `"updates"` or `"always"` (a callback's attribute of this
            name).
        gradient_batches: How many steps, each update's own the last, it
            needs them at (a callback's attribute as well). Those before an
            update that the run did not come to are not known, nor counted.

    Returns:
        `(inference, training)`, two float64 vectors of length `steps`: FLOPs
        for one sample, forward and in training. The mean of the second is the
        cost of the run.

    Raises:
        ValueError: The trajectory is empty, out of order or of other layers.

    Example:

    >>> _, training = training_curve(
    ...     cost, [(0, {"conv1": 43})], steps=100, dense_gradients="never")
    """
    choice("dense_gradients", dense_gradients, ("never", "updates", "always"))
    if not isinstance(cost, Count):
        raise ValueError(
            f"cost must be what count(model) returns. Received: cost={cost!r}."
        )
    steps = integer("steps", steps, at_least=1)
    received, trajectory = trajectory, _checked_trajectory(trajectory)
    if not trajectory:
        raise ValueError(
            "A trajectory begins with the masks of the first step. Received "
            f"an empty one: trajectory={received!r}."
        )
    updates = [step for step, _ in trajectory]
    ordered = updates[:1] <= updates[1:2] or len(updates) == 1
    if not ordered or any(
        a >= b for a, b in zip(updates[1:], updates[2:], strict=False)
    ):
        raise ValueError(
            f"The steps of a trajectory must increase. Received: {updates}."
        )
    layers = {layer.name: layer for layer in cost.layers}
    for _, counts in trajectory:
        for name, ones in counts.items():
            if name in layers and ones > math.prod(layers[name].shape):
                raise ValueError(
                    f"{name!r} has no more than {math.prod(layers[name].shape)}"
                    f" connections. Received: {ones}."
                )
    unknown = {n for _, counts in trajectory for n in counts} - set(layers)
    if unknown:
        raise ValueError(
            f"The trajectory has layers that the model has not: {unknown}."
        )
    first = updates[0]
    if updates[-1] >= first + steps:
        raise ValueError(
            f"The trajectory goes beyond the run. Received: steps={steps} "
            f"from step {first} on, and an update at {updates[-1]}."
        )
    inference = np.empty(steps)
    dense = np.full(steps, dense_gradients == "always")
    for i, (step, counts) in enumerate(trajectory):
        start = 0 if i == 0 else step + 1 - first
        inference[start:] = sum(
            layer.flops_at(
                counts[name] / math.prod(layer.shape)
                if name in counts
                else layer.density
            )
            for name, layer in layers.items()
        )
        if i and dense_gradients == "updates":
            last = step - first
            dense[max(last + 1 - gradient_batches, 0) : last + 1] = True
    training = np.where(
        dense, 2 * inference + cost.dense_inference_flops, 3 * inference
    )
    return inference, training


@dataclasses.dataclass(frozen=True)
class _Place:
    """A kernel of the model, with its unique name and its mask, if any."""

    name: str
    kernel: Kernel
    mask: keras.Variable | None


def _places(name, leaf):
    if not isinstance(leaf, Masked):
        masked, found = {}, find_kernels(leaf)
    else:
        masked = {m.found.path: m for m in leaf.masked_kernels()}
        found = find_kernels(leaf.layer)
        # One of a name of its own is found only by those who know it.
        known = {kernel.path for kernel in found}
        found += [m.found for p, m in masked.items() if p not in known]
    for kernel in found:
        mask = masked[kernel.path].mask if kernel.path in masked else None
        yield _Place(kernel.named(name), kernel, mask)


def _checked_trajectory(trajectory):
    try:
        return [
            (
                integer("step", step, at_least=0),
                {n: integer(n, c, at_least=0) for n, c in counts.items()},
            )
            for step, counts in trajectory
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "trajectory must be a list of (step, {layer: connections}). "
            f"Received: trajectory={trajectory!r}."
        ) from error


def _count_layer(place, positions, convention):
    kernel = place.kernel
    shape = tuple(kernel.variable.shape)
    size = math.prod(shape)
    masked = place.mask is not None
    ones = int(np.count_nonzero(place.mask.numpy())) if masked else size
    bias = getattr(kernel.owner, "bias", None)
    # Of the kernels of one layer, the last to be applied goes with the bias.
    if bias is None or kernel.attribute in (
        "depthwise_kernel",
        "recurrent_kernel",
    ):
        bias = None
    biases = 0 if bias is None else math.prod(bias.shape)
    return LayerCount(
        name=place.name,
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


def _positions(model, leaves, places) -> dict[int, int]:
    """Returns at how many positions each kernel is applied, by variable.

    Kernels whose use cannot be told from the calls of their layer are left
    out.
    """
    specs = tf.nest.map_structure(_one_sample, input_structure(model))
    # What is called once a step is told by the layer that steps.
    callers = {
        id(p.kernel.variable): _caller(p.kernel)
        for p in places
        if _caller(p.kernel) is not None
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
    losses = [(part, list(part._losses)) for part in model._flatten_layers()]
    with contextlib.ExitStack() as stack:
        for caller in {id(c): c for c in callers.values()}.values():
            stack.enter_context(_recording(caller, calls[id(caller)]))
        try:
            tf.function(trace).get_concrete_function(specs)
        except Exception as error:  # whatever a model of the user's raises
            raise ValueError(
                f"The FLOPs of model {model.name!r} cannot be counted: called "
                f"on {specs} it fails, with {type(error).__name__}: "
                f"{_first_line(error)}"
            ) from error
    for part, before in losses:
        part._losses[:] = before
    return {
        key: sum(_applied(kernel, caller, *call) for call in calls[id(caller)])
        for place in places
        for key, kernel in [(id(place.kernel.variable), place.kernel)]
        if key in callers
        for caller in [callers[key]]
    }


def _caller(kernel) -> keras.layers.Layer | None:
    """Returns the layer whose calls tell how often a kernel is applied."""
    owner = kernel.layer
    steps = owner if isinstance(owner, keras.layers.RNN) else None
    for part in kernel.path.split(".")[:-1]:
        owner = step_to(owner, part)
        if isinstance(owner, keras.layers.RNN):
            steps = owner
    if steps is not None:
        # A convolution within a step has positions of its own.
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


def _first_line(error):
    return next(iter(str(error).splitlines()), "")


def _ratio(cost):
    dense = cost.dense_inference_flops
    return f"{cost.inference_flops / dense:.4f}x" if dense else ""
