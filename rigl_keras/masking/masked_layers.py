"""The masked layers of a model, as a table."""

import math
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import _checks, _deprecation, _keras
from rigl_keras._text import aligned
from rigl_keras.kernels import fast_calls
from rigl_keras.kernels.layer_products import PRODUCTS
from rigl_keras.masking.layer_kernels import find_kernels
from rigl_keras.masking.leaves import containers, leaf_layers, named_layers
from rigl_keras.masking.masked import KernelMask, Masked
from rigl_keras.masking.model_tree import is_graph
from rigl_keras.masking.unmasked import (
    left_dense,
    listed,
    matrices,
    why_dense,
    why_unfit,
)
from rigl_keras.patterns import as_pattern

__all__ = ["MaskedLayers", "choose_kernels", "masked_layers"]


class MaskedLayers(Sequence):
    """The masked layers of a model; printing it shows all its layers.

    Args:
        model: A built model.
    """

    def __init__(self, model: keras.Model):
        if not isinstance(model, keras.Model):
            raise ValueError(
                f"masked_layers takes a Keras model. Received: {model!r}."
            )
        self._model = model
        leaves = {id(leaf): leaf for leaf in leaf_layers(model)}.values()
        self._masked = [
            masked
            for leaf in leaves
            if isinstance(leaf, Masked)
            for masked in leaf.masked_kernels()
        ]

    def __getitem__(self, index):
        return self._masked[index]

    def __len__(self) -> int:
        return len(self._masked)

    @property
    def named(self) -> dict[str, KernelMask]:
        """The masked kernels by unique names, as in `named_kernels`."""
        return {
            kernel.named(name): masked
            for name, layer in named_layers(self._model).items()
            if isinstance(layer, Masked)
            for masked in layer.masked_kernels()
            for kernel in [masked.found]
        }

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """The masks, `{unique name: bool array}`, for `with_masks`."""
        return {name: m.mask.numpy() for name, m in self.named.items()}

    @property
    def skipped(self) -> list[tuple[keras.layers.Layer, str]]:
        """Layers with weights that are not masked, each with the reason.

        Masked layers are included if they have other weights with at least two
        axes, and so are models that own weights directly.
        """
        masked = {id(masked.kernel) for masked in self._masked}
        names = dict.fromkeys(m.granularity for m in self._masked)
        patterns = [as_pattern(name) for name in names]
        skipped = [
            (layer, why_dense(layer, patterns))
            for layer in named_layers(self._model).values()
            if not isinstance(layer, Masked)
        ]
        skipped += [
            (layer, f"not masked: {listed(left)}{_why_left(layer, left)}")
            for layer in named_layers(self._model).values()
            if isinstance(layer, Masked)
            for left in [left_dense(layer.layer, masked)]
            if left
        ]
        return skipped + [
            (owner, f"its own weights, never masked: {listed(left)}")
            for owner in containers(self._model)
            for left in [matrices(_keras.direct_weights(owner))]
            if left
        ]

    def __str__(self) -> str:
        rows = [
            (
                "layer",
                "kernel",
                "pattern",
                "density",
                "nonzeros",
                "of",
                "product",
            )
        ]
        ones = size = 0
        for name, layer in self.named.items():
            nonzeros = int(np.count_nonzero(layer.mask.numpy()))
            weights = math.prod(layer.kernel.shape)
            ones, size = ones + nonzeros, size + weights
            rows.append(
                (
                    name,
                    "x".join(map(str, layer.kernel.shape)),
                    layer.granularity,
                    f"{nonzeros / weights:.4f}",
                    f"{nonzeros:,}",
                    f"{weights:,}",
                    _product_of(layer),
                )
            )
        if size:
            total = f"{ones / size:.4f}", f"{ones:,}", f"{size:,}"
            rows.append(("all masked", "", "", *total, ""))
        if not any(product for *_, product in rows[1:]):
            rows = [row[:-1] for row in rows]  # no layer was called yet
        if all(m.granularity == "element" for m in self._masked):
            rows = [(*row[:2], *row[3:]) for row in rows]
        lines = [line.rstrip() for line in aligned(rows)]
        skipped = self.skipped
        if skipped:
            lines.append("not masked:")
            lines += [f"  {layer.name}: {why}" for layer, why in skipped]
        return "\n".join(lines)

    __repr__ = __str__


def _why_left(layer, left):
    """Returns a note on kernels that the pattern does not fit."""
    ids = {id(variable) for variable in left.values()}
    why = why_unfit(
        [k for k in find_kernels(layer.layer) if id(k.variable) in ids],
        [as_pattern(layer.granularity)],
    )
    return f": {why}" if why else ""


def _product_of(masked):
    """Returns how a layer was computed in its last call, and why."""
    chosen = masked.chosen_products()
    if not chosen:
        return ""
    choice = list(chosen.values())[-1]
    kind = "sparse" if choice.sparse else "dense"
    return f"{kind}: {choice.reason}"


def masked_layers(model: keras.Model) -> MaskedLayers:
    """Returns the `Masked` layers of a model, in order.

    Args:
        model: A built model.

    Returns:
        A sequence of `Masked`, each with `name`, `kernel`, `mask` and
        `density`. A layer with several kernels, or with kernels of other names
        than `kernel`, has a `MaskedKernel` for each, with the same attributes.
        Its string is a table of shapes, densities and nonzeros that also lists
        the layers that are not masked, with reasons.
    """
    return MaskedLayers(model)


def choose_kernels(
    model: keras.Model,
    product: str = "auto",
    *,
    batch_size: int | None = None,
    kernels: str | None = None,
) -> MaskedLayers:
    """Chooses how the masked layers of a model compute their products.

    Layers choose when they are traced. This chooses earlier or again: for a
    loaded model, or for a batch size that tracing does not see (128 is timed if
    it is free).

    Args:
        model: A masked model. Its compiled functions are traced again.
        product: As in `sparsify`.
        batch_size: Batch size at which `"auto"` is timed, at least 1: layers
            run as in training, and alone. None: timed when layers are traced.
        kernels: Deprecated name of `product`.

    Returns:
        The masked layers. Their table shows each choice and its reason.

    Raises:
        ValueError: The model has no masked layer, or an argument is out of
            range.

    Example:

    >>> print(choose_kernels(model, batch_size=32))
    """
    if kernels is not None:
        _checks.choice("kernels", kernels, PRODUCTS)
        _deprecation.warn(
            f"choose_kernels(kernels={kernels!r}) is deprecated. Write "
            f"product={kernels!r}."
        )
        product = kernels
    _checks.choice("product", product, PRODUCTS)
    if batch_size is not None:
        batch_size = _checks.integer("batch_size", batch_size, at_least=1)
    layers = masked_layers(model)
    if not layers:
        raise ValueError(
            f"Model {model.name!r} has no masked layer, so there are no "
            "products to choose. Pass it to sparsify first."
        )
    (
        fast_calls.use_usual_calls
        if product == "dense"
        else fast_calls.use_fast_calls
    )(model)
    for layer in _keras.flatten_layers(model):
        if isinstance(layer, Masked):
            layer.product = product
            layer.forget_products()
            for shape in _input_shapes(layer) if batch_size else ():
                layer.choose_product(tf.TensorShape((batch_size, *shape[1:])))
    if batch_size and product != "dense":
        _trace_training(model, batch_size)
    for function in ("train_function", "test_function", "predict_function"):
        setattr(model, function, None)
    return layers


def _trace_training(model, batch_size):
    """Makes layers choose as in a training step: in lanes, and within others.

    Models that are not graphs of layers do not know what layers are called on.
    """
    sequential = isinstance(model, keras.Sequential)
    if not is_graph(model) or (sequential and not hasattr(model, "inputs")):
        return
    structure = model.inputs if sequential else model.input
    inputs = keras.tree.flatten(structure)
    if tf.distribute.has_strategy() or any(one.sparse for one in inputs):
        return
    specs = keras.tree.map_structure(
        lambda one: tf.TensorSpec(
            (one.shape[0] or batch_size, *one.shape[1:]), one.dtype
        ),
        structure[0] if sequential else structure,
    )
    step = tf.function(lambda x: model(x, training=True), autograph=False)
    with _keras.keeping_losses(model):
        step.get_concrete_function(specs)


def _input_shapes(layer):
    """Returns the input shapes of the calls of a layer in a graph."""
    if layer.product == "dense" or layer.why_dense():
        return []
    return {
        tuple(tensor.shape)
        for node in _keras.inbound_nodes(layer)
        for tensor in node.input_tensors
    }
