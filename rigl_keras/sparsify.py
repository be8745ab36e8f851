"""A dense model to a masked one and back; says what it skipped and why."""

import contextlib
import functools
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import arguments, between, distributions, replicas
from rigl_keras.conventions import ORIGINAL, Conventions, check_conventions
from rigl_keras.drawing import draw_mask
from rigl_keras.layer_state import copy_state
from rigl_keras.layers import (
    KernelMask,
    Masked,
    MaskProjection,
    check_granularity,
)
from rigl_keras.maskable import (
    Kernel,
    find_kernels,
    is_graph,
    is_normalisation,
    kernel_at,
)
from rigl_keras.products import PRODUCTS
from rigl_keras.surgery import (
    CannotCopy,
    containers,
    exchange,
    exchange_in_copy,
    leaf_layers,
    release,
)

__all__ = [
    "MaskedLayers",
    "aligned",
    "call_model",
    "choose_kernels",
    "chosen_kernels",
    "first_line",
    "input_structure",
    "leaf_layers",
    "load_weights",
    "masked_layers",
    "named_kernels",
    "named_layers",
    "sparsify",
    "strip",
    "strip_copy",
    "trained_weights",
    "with_masks",
]

# What may be asked to be masked: layers, types of layers, a predicate, or a
# collection of these.
Selector = (
    keras.layers.Layer
    | type
    | Callable[[keras.layers.Layer], bool]
    | Iterable
    | None
)


def sparsify(
    model: keras.Model,
    density: float,
    *,
    distribution: str = "erdos_renyi_kernel",
    densities: Mapping | None = None,
    layers: Selector = None,
    granularity: str = "element",
    kernels: str | Mapping = "auto",
    scale_to_fan_in: bool = False,
    seed: int = 0,
    conventions: Conventions = ORIGINAL,
    strict: bool = False,
) -> keras.Model:
    """Returns a masked model, its weights kept.

    1. Each kernel gets a density from the distribution
       (`distributions.layer_densities`).
    2. Counts are rounded so that exactly round(density x masked weights)
       remain (`distributions.layer_counts`).
    3. Each mask is drawn with its count of ones, seeded by `seed` and the
       kernel's name (`named_kernels`). What the model is called has no part
       in that.

    Of a Sequential or Functional model the result is a copy, which shares
    nothing with `model`: weights, what is frozen, vocabularies and statistics
    are copied. A model that cannot be copied is masked in place: a subclassed
    one, because only its own code knows how its layers are called; one whose
    class has a constructor of its own, as those of keras_hub; and, with a
    warning, one with a layer that no config makes again, or with layers that
    share weights. There each layer with a kernel gives way to a `Masked` one
    of the same weights, and `model` itself is returned. Either is to be
    compiled again. It trains, saves and loads as
    any Keras model; without a callback the masks never change (static sparse
    training). A model that was made in the scope of a strategy is masked in
    that scope.

    Args:
        model: A built model of any kind, models within it included.
        density: Fraction of the masked weights kept, in (0, 1].
        distribution: `"erdos_renyi_kernel"` (`"erk"`), `"erdos_renyi"`
            (`"er"`) or `"uniform"`, which leaves the first layer dense.
        densities: `{layer or its name: density}` of layers whose density is
            given. They count towards `density`; the others share the rest.
        layers: Which layers to mask: layer objects, layer types, a predicate
            `layer -> bool`, or a list of these; it may mean a layer of the
            model or one within it, such as the cell of an LSTM. None: all
            with a kernel, so that embeddings are left out. Biases and
            normalisation are never masked.
        granularity: `"element"`: single weights. `"kernel"`: all weights
            between an input and an output channel of a convolution, as one
            (the reproduction's `struct-*`). Layers without spatial axes then
            stay at density 1, unless `densities` says otherwise, and the
            convolutions make up for it.
        kernels: How products with them are computed: `"dense"`, by
            TensorFlow, which multiplies by zeros as well; `"sparse"`, by
            kernels that leave out what a mask removes, wherever a layer has
            them; `"auto"`: whichever was faster when both were timed on this
            machine (`choose_kernels`). Or `{layer or layer type: name or
            names}` of the variables that are masked, for layers of your own
            that call them other than `kernel`, `recurrent_kernel`,
            `depthwise_kernel` or `pointwise_kernel`.
        scale_to_fan_in: Whether the weights of each output unit are
            multiplied by sqrt(n / m), where m of its n connections are kept,
            so that what a unit sums has the variance it has in the dense
            model (Evci et al., 2022, Gradient flow in sparse neural networks,
            arXiv:2010.03533, section 3.1). For weights that were just drawn.
        seed: Seed of the masks, at least 0.
        conventions: `erk_rounding` and `sampling` apply. Under `"bernoulli"`
            sampling, as the report's, the number of ones is random.
        strict: Whether weights of two axes or more that are not masked raise,
            instead of being left dense. Biases, normalisation and embedding
            tables do not.

    Returns:
        A model of the same kind in which the chosen layers are `Masked`.

    Raises:
        ValueError: The model is not built, or is masked already; nothing
            matches `layers`; a layer is quantized or has LoRA; or a density
            is out of reach.

    Example:

    >>> model = sparsify(model, density=0.1)
    >>> print(masked_layers(model))
    """
    names, product = _names_and_product(kernels)
    chosen = chosen_kernels(model, layers, kernels=names, strict=strict)
    seed = arguments.integer("seed", seed, at_least=0)
    check_conventions(conventions)
    if densities is not None and not isinstance(densities, Mapping):
        raise ValueError(
            "densities must map layers or their names to densities. Received: "
            f"densities={densities!r}."
        )
    check_granularity(granularity)
    given = _by_name(densities, chosen)
    shapes = {n: tuple(kernel.variable.shape) for n, kernel in chosen.items()}
    if granularity == "kernel":
        given = {**_without_kernels(chosen), **given}
    solved = distributions.layer_densities(
        shapes,
        density,
        distribution,
        conventions=conventions,
        densities=given,
    )
    shapes = distributions.masked_shapes(shapes, distribution, given)
    masks = _draw_masks(
        shapes, solved, density, chosen, granularity, seed, conventions
    )
    return with_masks(
        model,
        masks,
        granularity=granularity,
        kernels=kernels,
        scale_to_fan_in=scale_to_fan_in,
        seed=seed,
    )


def with_masks(
    model: keras.Model,
    masks: Mapping[str, np.ndarray],
    *,
    granularity: str = "element",
    kernels: str | Mapping = "auto",
    scale_to_fan_in: bool = False,
    seed: int = 0,
) -> keras.Model:
    """Returns a masked model with the masks given, its weights kept.

    What `sparsify` does with the masks that it draws, SNIP with those it
    computes and a lottery ticket with those that another run has found. A
    copy, or the model itself, as there.

    Args:
        model: A built model.
        masks: `{name: array of zeros and ones of the kernel's shape}`, names
            as in `named_kernels`. Kernels that are not named stay dense.
        granularity: What later updates keep or remove as one, as in
            `sparsify`.
        kernels: As in `sparsify`.
        scale_to_fan_in: As in `sparsify`.
        seed: Seed of later random draws, at least 0.

    Returns:
        A model of the same kind in which the layers named are `Masked`.

    Raises:
        ValueError: The model cannot be masked, or a mask fits no kernel.

    Example:

    >>> masks = masked_layers(trained).masks
    >>> ticket = with_masks(untrained, masks)
    """
    _check_model(model)
    seed = arguments.integer("seed", seed, at_least=0)
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(
            "with_masks takes {name: mask}, one mask at least. Received: "
            f"{masks!r}."
        )
    names, product = _names_and_product(kernels)
    named = named_kernels(model, _with_embeddings(names))
    check_granularity(granularity)
    by_layer = {}
    for name, mask in masks.items():
        _check_mask(name, mask, named, granularity)
        by_layer.setdefault(id(named[name].layer), {})[name] = np.asarray(
            mask, np.float32
        )

    def mask_chosen(layer, fresh):
        if id(layer) not in by_layer:
            return fresh
        names = list(by_layer[id(layer)])
        return Masked(
            fresh,
            kernels=[named[name].path for name in names],
            draw_key=_key(names[0], named[names[0]], seed),
            granularity=_granularity(named[names[0]], granularity),
            product=product,
            trainable=layer.trainable,
        )

    given = model
    with replicas.scope(model):
        model, pairs = exchange(model, mask_chosen)
        for layer, new in pairs:
            copy_state(layer, new)
            if not isinstance(new, Masked):
                continue
            for masked, mask in zip(
                new.masked_kernels(), by_layer[id(layer)].values(), strict=True
            ):
                masked.assign_mask(mask)
                if scale_to_fan_in:
                    masked.kernel.assign(
                        masked.kernel.value * _fan_in_scale(masked.found, mask)
                    )
    if product != "dense":
        between.hasten(model)
    if model is not given:
        # Keras's own would leave the weights of a dense file half loaded.
        model.load_weights = _loading(model)
    return model


def strip(model: keras.Model) -> keras.Model:
    """Returns the plain model of a masked one, with the same outputs.

    Each `Masked` layer gives way to the layer it wraps, whose kernels are
    zero outside the masks. The result is a copy, or of a subclassed model the
    model itself, as in `sparsify`. It loads without this package.

    Args:
        model: A model that `sparsify` returned, trained or not.

    Returns:
        A model of the same kind without masks, not compiled.

    Raises:
        ValueError: The model has no masked layer.
    """
    if not masked_layers(model):
        raise ValueError(
            f"Model {model.name!r} has no masked layer: there is nothing to "
            "strip."
        )
    plain = _stripped(model, exchange)
    if plain is model:
        between.slow_down(model)
    return plain


def strip_copy(model: keras.Model) -> keras.Model:
    """As `strip`, but the model itself always stays as it is.

    Args:
        model: A masked Sequential or Functional model.

    Returns:
        A copy without masks. That of a class whose constructor does not take
        (inputs, outputs) is of Keras's own class.

    Raises:
        ValueError: A layer cannot be copied.
    """
    return _stripped(
        model, functools.partial(exchange_in_copy, keep_class=False)
    )


def _stripped(model, exchange):
    kept = {
        id(masked.kernel): masked.masked_kernel()
        for layer in leaf_layers(model)
        if isinstance(layer, Masked)
        for masked in layer.masked_kernels()
    }

    def unmask(layer, fresh):
        if not isinstance(fresh, Masked):
            return fresh
        return release(fresh) if fresh.built else fresh.layer

    with replicas.scope(model):
        model, pairs = exchange(model, unmask)
        for layer, new in pairs:
            copy_state(layer, new, values=kept)
    return model


def load_weights(model: keras.Model, path: str | os.PathLike) -> None:
    """Loads weights into a masked model: of a masked one, or of a dense one.

    A file of a masked model brings its masks. One of the dense model is
    masked by those that the model has, and how many weights that removes is
    said. Either the whole file is loaded or nothing.

    Args:
        model: A masked model.
        path: A file that `save_weights` has written (`.weights.h5`), or a
            `.keras` file.

    Raises:
        ValueError: The model is dense, or the file is of another network or
            cannot be read. The model is unchanged then.

    Example:

    >>> dense.save_weights("dense.weights.h5")
    >>> load_weights(sparsify(dense, 0.1), "dense.weights.h5")
    """
    if not masked_layers(model):
        raise ValueError(
            f"Model {model.name!r} has no masked layer. Keras loads weights "
            "into a dense model: model.load_weights(path)."
        )
    try:
        with _unchanged_by_errors(model):
            # Keras warns of each layer that does not fit, before it fails.
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                # That of the class: a copy that `sparsify` makes has this one.
                type(model).load_weights(model, path)
    except ImportError:
        raise
    # A damaged file ends in whatever the readers of zip files, of HDF5 and of
    # arrays run into: BadZipFile, RuntimeError, zlib.error, MemoryError, ...
    except Exception as error:
        try:
            plain = strip_copy(model) if is_graph(model) else None
        except CannotCopy:
            plain = None
        if plain is None:
            raise ValueError(
                f"{str(path)!r} does not hold masked weights of this model "
                f"({first_line(error)}). The weights of a dense model are "
                "loaded into a dense one of its class, and "
                "with_masks(dense, masked_layers(model).masks) masks them."
            ) from error
    else:
        # No file of ours holds weights outside its masks.
        for masked in masked_layers(model):
            masked.assign_mask(masked.mask)
        for warning in said:
            warnings.warn(str(warning.message), warning.category, stacklevel=2)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain.load_weights(path)
        _check_no_masks(model, plain)
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} holds the weights of another network than "
            f"{model.name!r}, masked or dense, or cannot be read: "
            f"{_last_line(error)} The model is unchanged."
        ) from error
    removed = 0
    for layer, loaded in zip(
        leaf_layers(model), leaf_layers(plain), strict=True
    ):
        copy_state(loaded, layer)
        if not isinstance(layer, Masked):
            continue
        for masked in layer.masked_kernels():
            kernel, mask = masked.kernel.numpy(), masked.mask.numpy()
            removed += np.count_nonzero(kernel[mask == 0])
            masked.assign_mask(mask)
    warnings.warn(
        f"{str(path)!r} holds dense weights: the masks of model "
        f"{model.name!r} were applied, and set {removed:,} of them to zero.",
        stacklevel=2,
    )


@contextlib.contextmanager
def _unchanged_by_errors(model):
    """Puts a model's variables back if the context ends in an error.

    Those of its optimizer and metrics as well, which a file may hold.
    """
    variables = [*model.variables]
    if getattr(model, "optimizer", None) is not None:
        variables += model.optimizer.variables
    for metric in model.metrics:
        variables += metric.variables
    before = [variable.numpy() for variable in variables]
    try:
        yield
    except BaseException:  # Ctrl-C as well
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        raise


def _check_no_masks(model, plain):
    """Refuses masks that were read as kernels.

    Within a model of the user's own class a mask lies in a file where the dense
    layer has its first weight. If that has no bias, and the kernel in the file
    is damaged, what is left looks like the file of a dense model.
    """
    for layer, loaded in zip(
        leaf_layers(model), leaf_layers(plain), strict=True
    ):
        for path in layer.kernels if isinstance(layer, Masked) else ():
            values = np.unique(kernel_at(loaded, path).variable.numpy())
            if np.array_equal(values, [0, 1]):
                raise ValueError(
                    f"The kernel {path!r} of layer {layer.name!r} holds zeros "
                    "and ones alone, as masks do: the file is damaged."
                )


def _loading(model):
    def loading(filepath, **options):
        if options:  # of Keras's own, which this knows nothing of
            return type(model).load_weights(model, filepath, **options)
        return load_weights(model, filepath)

    return loading


def first_line(error: Exception) -> str:
    """Returns what an error says first, or its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _last_line(error):
    """Returns what Keras says of the first layer that does not fit."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "shape" in line or "expected" in line]
    return (telling or lines or [type(error).__name__])[0]


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
        """The same by unique names, as in `named_kernels`."""
        return {
            kernel.named(name): masked
            for name, layer in named_layers(self._model).items()
            if isinstance(layer, Masked)
            for masked in layer.masked_kernels()
            for kernel in [masked.found]
        }

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """The masks, `{unique name: zeros and ones}` as `with_masks` takes."""
        return {name: m.mask.numpy() for name, m in self.named.items()}

    @property
    def skipped(self) -> list[tuple[keras.layers.Layer, str]]:
        """Layers with weights that are not masked, each with the reason.

        A layer that is masked is among them if it has other weights of two
        axes or more; so is a model that has weights besides its layers.
        """
        masked = {id(masked.kernel) for masked in self._masked}
        skipped = [
            (layer, _why_dense(layer))
            for layer in named_layers(self._model).values()
            if not isinstance(layer, Masked)
        ]
        skipped += [
            (layer, f"not masked: {_listed(left)}")
            for layer in named_layers(self._model).values()
            if isinstance(layer, Masked)
            for left in [_left_dense(layer.layer, masked)]
            if left
        ]
        return skipped + [
            (owner, f"weights of its own, never masked: {_listed(left)}")
            for owner in containers(self._model)
            for left in [_matrices(owner._trainable_variables)]
            if left
        ]

    def __str__(self) -> str:
        rows = [("layer", "kernel", "density", "nonzeros", "of", "product")]
        ones = size = 0
        for name, layer in self.named.items():
            nonzeros = int(np.count_nonzero(layer.mask.numpy()))
            weights = math.prod(layer.kernel.shape)
            ones, size = ones + nonzeros, size + weights
            rows.append(
                (
                    name,
                    "x".join(map(str, layer.kernel.shape)),
                    f"{nonzeros / weights:.4f}",
                    f"{nonzeros:,}",
                    f"{weights:,}",
                    _product_of(layer),
                )
            )
        if size:
            total = f"{ones / size:.4f}", f"{ones:,}", f"{size:,}"
            rows.append(("all masked", "", *total, ""))
        if not any(product for *_, product in rows[1:]):
            rows = [row[:-1] for row in rows]  # nothing was called yet
        lines = [line.rstrip() for line in aligned(rows)]
        skipped = self.skipped
        if skipped:
            lines.append("not masked:")
            lines += [f"  {layer.name}: {why}" for layer, why in skipped]
        return "\n".join(lines)

    __repr__ = __str__


def _product_of(masked):
    """Returns how a layer was computed when it was called last, and why."""
    chosen = masked.chosen_products() if isinstance(masked, Masked) else {}
    if not chosen:
        return ""
    choice = list(chosen.values())[-1]
    kind = "sparse" if choice.sparse else "dense"
    return f"{kind}: {choice.reason}"


def aligned(rows: Sequence[Sequence[str]], *, left: int = 2) -> list[str]:
    """Returns the rows of a table as lines, the first columns to the left.

    Args:
        rows: Cells, as many in each row.
        left: How many columns these are.

    Returns:
        A line for each row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def input_structure(model: keras.Model):
    """Returns a model's symbolic inputs in the structure that it is called on.

    Args:
        model: A built model. If it is subclassed, the shapes are those with
            which it was built, and the type its compute type.

    Returns:
        A KerasTensor, or a list, tuple or dict of them.

    Raises:
        ValueError: A subclassed model does not know the shapes.
    """
    # A Sequential model that was never called has no `input`.
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    if is_graph(model):
        return model.input
    config = model.get_build_config() or {}
    shapes = config.get("input_shape", config.get("shapes_dict"))
    if shapes is None:
        raise ValueError(
            f"Model {model.name!r} is subclassed and does not know what it is "
            "called on. Build it by model.build(input_shape)."
        )
    return _symbols(shapes, model.compute_dtype)


def call_model(model: keras.Model, inputs):
    """Returns a model's outputs in inference.

    Args:
        model: A built model.
        inputs: Tensors in the structure of `input_structure`.

    Returns:
        What the model returns.
    """
    # Keras names what a model is built with, if its `call` takes several.
    if not is_graph(model) and "shapes_dict" in (
        model.get_build_config() or {}
    ):
        return model(**inputs, training=False)
    return model(inputs, training=False)


def trained_weights(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights that training changes, those that are frozen too.

    Args:
        model: A built model, masked or not.

    Returns:
        Each once; masks, statistics and states are not among them.
    """
    trained = {
        id(variable): variable
        for layer in model._flatten_layers()
        for variable in layer._trainable_variables
    }
    return list(trained.values())


def _symbols(shapes, dtype):
    if isinstance(shapes, Mapping):
        return {
            name.removesuffix("_shape"): _symbols(shape, dtype)
            for name, shape in shapes.items()
        }
    if all(isinstance(n, (int, type(None))) for n in shapes):
        return keras.KerasTensor(tuple(shapes), dtype)
    return [_symbols(shape, dtype) for shape in shapes]


def masked_layers(model: keras.Model) -> MaskedLayers:
    """Returns the `Masked` layers of a model, in order.

    Args:
        model: A built model.

    Returns:
        A sequence of `Masked`, each with `name`, `kernel`, `mask` and
        `density`; for a layer whose kernels have other names than `kernel`,
        or that has several, of `MaskedKernel` with the same. Its string is a
        table of shape, density and nonzeros, with each layer that is not
        masked and the reason.
    """
    return MaskedLayers(model)


def choose_kernels(
    model: keras.Model, kernels: str = "auto", *, batch_size: int | None = None
) -> MaskedLayers:
    """Decides how the masked layers of a model compute their products.

    Layers decide for themselves when they are traced; this does it before, or
    anew: of a model that was loaded, or for a batch that tracing does not see
    (where it is free, 128 is timed).

    Args:
        model: A masked model. What it has compiled is traced anew.
        kernels: As in `sparsify`.
        batch_size: Batch to time `"auto"` at, at least 1. None: nothing is
            timed before the layers are called.

    Returns:
        The masked layers, whose table shows what was chosen and why.

    Raises:
        ValueError: The model has no masked layer, or an argument is out of
            range.

    Example:

    >>> print(choose_kernels(model, batch_size=32))
    """
    arguments.choice("kernels", kernels, PRODUCTS)
    if batch_size is not None:
        batch_size = arguments.integer("batch_size", batch_size, at_least=1)
    layers = masked_layers(model)
    if not layers:
        raise ValueError(
            f"Model {model.name!r} has no masked layer, whose products could "
            "be chosen. Pass it to sparsify first."
        )
    (between.slow_down if kernels == "dense" else between.hasten)(model)
    for layer in model._flatten_layers():
        if isinstance(layer, Masked):
            layer.product = kernels
            layer.forget_products()
            for shape in _input_shapes(layer) if batch_size else ():
                layer.choose_product(tf.TensorShape((batch_size, *shape[1:])))
    for function in ("train_function", "test_function", "predict_function"):
        setattr(model, function, None)
    return layers


def _input_shapes(layer):
    """Returns the shapes that a layer of a graph is called on."""
    if layer.product == "dense" or layer.why_dense():
        return []
    return {
        tuple(tensor.shape)
        for node in layer._inbound_nodes
        for tensor in node.input_tensors
    }


def named_layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """Returns the layers of a model that have weights, by unique names.

    Args:
        model: A built model, dense or masked.

    Returns:
        `{name: layer}` in order. The second layer of one name, in another
        submodel, gets a prime after its name; masking changes no name.
    """
    named = {}
    # A layer may be used, and so be listed, more than once.
    leaves = {id(leaf): leaf for leaf in leaf_layers(model) if leaf.weights}
    for leaf in leaves.values():
        name = leaf.name
        while name in named:
            name += "'"
        named[name] = leaf
    return named


def named_kernels(
    model: keras.Model, kernels: str | Mapping = "auto"
) -> dict[str, Kernel]:
    """Returns the kernels of a dense model that can be masked, by unique names.

    Args:
        model: A built dense model.
        kernels: Which variables are kernels, as in `sparsify`.

    Returns:
        `{name: kernel}` in order: for `layer.kernel` the name of the layer
        (`named_layers`), for others with their path, as in
        `"lstm/cell/recurrent_kernel"`. One that two layers share is named
        after the first.
    """
    found, seen = {}, set()
    for name, layer in named_layers(model).items():
        if isinstance(layer, Masked):
            continue
        for kernel in find_kernels(layer, kernels):
            # A kernel that two layers share has one mask.
            if id(kernel.variable) not in seen:
                seen.add(id(kernel.variable))
                found[kernel.named(name)] = kernel
    return found


def _why_dense(layer):
    if is_normalisation(layer):
        return "normalisation, never masked"
    if find_kernels(layer):
        return (
            "left dense: the first layer under 'uniform', or not selected by "
            "`layers`"
        )
    kind = type(layer).__name__
    adapted = _adapted(layer)
    if adapted is not None:
        return adapted
    if isinstance(layer, keras.layers.Embedding):
        why = "an Embedding is masked only if `layers` names it"
        left = _left_dense(layer, ())
        if left:
            names = ["embeddings", *left]
            why += f"; {_listed(left)} only if kernels={{{kind}: {names}}} does"
        return why
    return (
        f"{kind} has no kernel that can be masked; where it has one of another "
        f"name, pass kernels={{{kind}: name}}"
    )


def _adapted(layer):
    """Returns why a layer that LoRA or quantization has changed is dense."""
    for inner in layer._flatten_layers():
        where = "" if inner is layer else f" of its {inner.name!r}"
        if getattr(inner, "lora_enabled", False):
            return (
                f"LoRA{where} computes its kernel from several weights; save "
                "the model, which merges them, and load it to mask it"
            )
        if getattr(inner, "quantization_mode", None) is not None:
            return (
                f"the kernel{where} is quantized ({inner.quantization_mode}); "
                "mask the model first, and quantize what strip returns"
            )
    return None


def _left_dense(layer, masked):
    """Returns `{name: variable}` of matrices of a layer that are not masked.

    Args:
        layer: A layer, not a `Masked` one.
        masked: Ids of the kernels that are.

    Returns:
        Its trained weights of two axes or more, those of layers within it
        included, but for biases, normalisation and embedding tables.
    """
    left = {}
    for inner in layer._flatten_layers():
        if is_normalisation(inner):
            continue
        table = isinstance(inner, keras.layers.Embedding)
        for name, variable in _matrices(inner._trainable_variables).items():
            if id(variable) in masked or (table and name == "embeddings"):
                continue
            left[name if inner is layer else f"{inner.name}/{name}"] = variable
    return left


def _matrices(variables):
    """Returns variables of two axes or more that are no bias, by name."""
    return {
        variable.name: variable
        for variable in variables
        if len(variable.shape) > 1 and not variable.name.endswith("bias")
    }


def _listed(variables):
    return ", ".join(
        f"{name} ({'x'.join(map(str, variable.shape))})"
        for name, variable in variables.items()
    )


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            "sparsify takes a Keras model. Received: "
            f"{type(model).__module__}.{type(model).__name__}."
        )
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so its kernels have no "
            "shape yet. Call model.build(input_shape) first, call it on a "
            "batch, or begin it with keras.Input(shape)."
        )
    masked = masked_layers(model)
    if masked:
        raise ValueError(
            f"Model {model.name!r} is masked already ({len(masked)} kernels). "
            "To mask it anew, sparsify(strip(model), ...)."
        )


def chosen_kernels(
    model: keras.Model,
    selector: Selector = None,
    *,
    kernels: str | Mapping = "auto",
    strict: bool = False,
) -> dict[str, Kernel]:
    """Returns the kernels of a dense model to mask, by unique name, in order.

    Args:
        model: A built model.
        selector: The `layers` of `sparsify`.
        kernels: As in `sparsify`.
        strict: As in `sparsify`.

    Returns:
        `{name: kernel}`, names as in `named_kernels`.

    Raises:
        ValueError: The model cannot be masked, nothing matches, or a layer
            named cannot be masked.
    """
    _check_model(model)
    _check_kernels(kernels)
    matches = _predicate(selector)
    if selector is not None:
        # Only who asks for an embedding gets one.
        kernels = _with_embeddings(kernels)
    chosen = {
        name: kernel
        for name, kernel in named_kernels(model, kernels).items()
        if matches(kernel.layer) or matches(kernel.owner)
    }
    leaves = named_layers(model).values()
    adapted = [
        (layer, why)
        for layer in leaves
        if matches(layer)
        and not (selector is None and isinstance(layer, keras.layers.Embedding))
        for why in [_adapted(layer)]
        if why
    ]
    if adapted:
        raise ValueError(
            f"Layers of model {model.name!r} cannot be masked as they are:\n"
            + "\n".join(f"  {layer.name}: {why}" for layer, why in adapted)
            + "\nOr pass `layers` that leaves them out."
        )
    for layer in _selected_layers(selector):
        if all(layer not in (k.layer, k.owner) for k in chosen.values()):
            raise ValueError(
                f"`layers` names {layer.name!r}, a {type(layer).__name__} that "
                "is not a layer of this model or has no kernel that can be "
                "masked. Where it has one of another name, pass kernels="
                f"{{{type(layer).__name__}: name}}."
            )
    if strict:
        _check_all_masked(model, chosen, matches)
    for name, kernel in chosen.items():
        if isinstance(kernel.variable.constraint, MaskProjection):
            raise ValueError(
                f"The kernel {name!r} of model {model.name!r} is masked "
                "already, in another model that shares it."
            )
    if not chosen:
        skipped = "\n".join(
            f"  {layer.name}: {_why_dense(layer)}" for layer in leaves
        )
        raise ValueError(
            f"Model {model.name!r} has nothing to mask"
            + ("" if selector is None else " that matches `layers`")
            + f". Its layers with weights:\n{skipped or '  (none)'}"
        )
    return chosen


def _with_embeddings(kernels):
    given = {} if kernels == "auto" else kernels
    return {**given, keras.layers.Embedding: "embeddings"}


def _names_and_product(kernels):
    """Returns which variables are masked, and how they are multiplied."""
    if isinstance(kernels, str):
        if kernels not in PRODUCTS:
            raise ValueError(
                f"kernels must be 'auto' or another of {PRODUCTS}, or {{layer "
                "or layer type: name or names of its variables}. Received: "
                f"kernels={kernels!r}."
            )
        return "auto", kernels
    return kernels, "auto"


def _check_kernels(kernels):
    named = isinstance(kernels, Mapping) and all(
        isinstance(key, (type, keras.layers.Layer))
        and (
            isinstance(names, str)
            or (
                isinstance(names, Sequence)
                and all(isinstance(name, str) for name in names)
            )
        )
        for key, names in kernels.items()
    )
    if kernels != "auto" and not named:
        raise ValueError(
            "kernels must be 'auto' or {layer or layer type: name or names of "
            f"its variables}}. Received: kernels={kernels!r}."
        )


def _check_all_masked(model, chosen, matches):
    masked = {id(kernel.variable) for kernel in chosen.values()}
    left = [
        (layer.name, f"{_why_dense(layer)} ({_listed(dense)})")
        for layer in named_layers(model).values()
        if matches(layer)
        for dense in [_left_dense(layer, masked)]
        if dense
    ]
    left += [
        (owner.name, f"weights of its own, never masked ({_listed(dense)})")
        for owner in containers(model)
        for dense in [_matrices(owner._trainable_variables)]
        if dense
    ]
    if left:
        raise ValueError(
            "strict=True, and these layers have weights that cannot be "
            "masked:\n" + "\n".join(f"  {name}: {why}" for name, why in left)
        )


def _fan_in_scale(kernel, mask):
    """Returns sqrt(n / m) for each output unit with m of n connections."""
    units = tuple(
        axis for axis in range(mask.ndim) if axis not in kernel.output_axes
    )
    kept = mask.sum(axis=units, keepdims=True)
    connections = math.prod(mask.shape[axis] for axis in units)
    return np.sqrt(connections / np.maximum(kept, 1)).astype(np.float32)


def _granularity(kernel, wanted):
    """Returns what a mask keeps as one; whole kernels are convolved."""
    return wanted if kernel.is_convolution else "element"


def _without_kernels(chosen):
    """Returns density 1 for each kernel that has no spatial axes."""
    flat = {
        name: 1.0
        for name, kernel in chosen.items()
        if not kernel.is_convolution
    }
    if len(flat) == len(chosen):
        raise ValueError(
            "granularity='kernel' keeps or removes whole kernels of "
            "convolutions, and none of the layers to mask is one: "
            f"{', '.join(flat)}. Use granularity='element'."
        )
    return flat


def _check_mask(name, mask, named, granularity):
    if name not in named:
        raise ValueError(
            f"There is a mask for {name!r}, which is no kernel of this model "
            f"that can be masked. Its kernels: {', '.join(named)}."
        )
    shape, kernel = np.shape(mask), tuple(named[name].variable.shape)
    if shape != kernel:
        raise ValueError(
            f"The mask of {name!r} must have the shape of its kernel, "
            f"{kernel}. Received: shape {shape}."
        )
    values = np.unique(mask)
    if not np.isin(values, [0, 1]).all():
        raise ValueError(
            f"The mask of {name!r} must hold zeros and ones only. Received "
            f"{values[~np.isin(values, [0, 1])][0]} among its entries."
        )
    if _granularity(named[name], granularity) == "kernel":
        spatial = tuple(range(np.ndim(mask) - 2))
        if (np.max(mask, axis=spatial) != np.min(mask, axis=spatial)).any():
            raise ValueError(
                f"The mask of {name!r} keeps a part of some kernels, and "
                "granularity='kernel' keeps or removes them whole. Pass "
                "granularity='element'."
            )


def _predicate(selector):
    if selector is None:
        return lambda layer: True
    if isinstance(selector, keras.layers.Layer):
        return lambda layer: layer is selector
    if isinstance(selector, type):
        return lambda layer: isinstance(layer, selector)
    if isinstance(selector, str):
        raise ValueError(
            "`layers` takes layer objects, layer types or a predicate, not "
            f"names. Received: layers={selector!r}. Pass "
            f"model.get_layer({selector!r})."
        )
    if callable(selector):
        return selector
    if isinstance(selector, Iterable):
        tests = [_predicate(item) for item in selector]
        return lambda layer: any(test(layer) for test in tests)
    raise ValueError(
        "`layers` takes layer objects, layer types, a predicate or a list of "
        f"these. Received: layers={selector!r}."
    )


def _selected_layers(selector):
    if isinstance(selector, keras.layers.Layer):
        return [selector]
    if not isinstance(selector, Iterable) or isinstance(selector, str):
        return []
    return [item for item in selector if isinstance(item, keras.layers.Layer)]


def _by_name(densities, chosen):
    """Returns densities by name; those of a layer hold for its kernels."""
    given = {}
    for key, value in (densities or {}).items():
        names = [
            name
            for name, kernel in chosen.items()
            if name == key
            or key is kernel.layer
            or (isinstance(key, str) and name.startswith(f"{key}/"))
        ]
        if not names and isinstance(key, keras.layers.Layer):
            raise ValueError(
                f"densities names {key.name!r}, which is no masked layer. "
                f"Masked layers: {', '.join(chosen)}."
            )
        # A name that fits nothing is refused where densities are solved.
        given.update(dict.fromkeys(names or [key], value))
    return given


def _draw_masks(
    shapes, densities, density, chosen, granularity, seed, conventions
):
    """Returns `{name: float32 array of zeros and ones}`."""
    # A unit is what the mask keeps or removes as one.
    units = {
        name: shape[-2:]
        if _granularity(chosen[name], granularity) == "kernel"
        else shape
        for name, shape in shapes.items()
    }
    sizes = {name: math.prod(unit) for name, unit in units.items()}
    weights = sum(math.prod(shape) for shape in shapes.values())
    if granularity == "element":
        exact = density * weights
    else:
        exact = sum(densities[n] * size for n, size in sizes.items())
    total = distributions.total_count(exact, density, weights)
    bernoulli = conventions.sampling == "bernoulli"
    densities = {name: densities[name] for name in sizes}
    counts = distributions.layer_counts(sizes, densities, total)
    masks = {}
    for name, unit in units.items():
        key, shape = _key(name, chosen[name], seed), shapes[name]
        if bernoulli:
            mask = np.random.default_rng(key).random(unit) < densities[name]
            masks[name] = np.broadcast_to(mask, shape).astype(np.float32)
        else:
            masks[name] = draw_mask(
                shape,
                counts[name] * math.prod(shape) // sizes[name],
                key,
                granularity=_granularity(chosen[name], granularity),
            )
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        warnings.warn(
            f"At density={density} no connection is left in "
            f"{', '.join(empty)}: nothing passes through. Raise density, or "
            "give these layers one in densities.",
            stacklevel=3,
        )
    return masks


def _key(name, kernel, seed):
    # Unique names within the model, and paths of attributes: what Keras calls
    # a path begins with the model's name, which it may have made by counting.
    layer = kernel.layer.name
    if kernel.path == "kernel":
        path = f"{layer}/kernel{name.removeprefix(layer)}"
    else:
        path = f"{layer}/{name}"
    return zlib.crc32(f"{seed}/{path}".encode())
