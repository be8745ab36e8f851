"""Signatures: the named inputs and outputs of served models."""

import dataclasses
import keyword
import re
from collections.abc import Mapping
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import _keras
from rigl_keras.masking.model_tree import call_model, input_structure, is_graph

__all__ = [
    "Signature",
    "is_finite",
    "named_outputs",
    "outputs_of",
    "signature_of",
]

_FREE_AXES = (64, 224, 32, 8)  # lengths to try for unknown axes
_COUNTED = re.compile(r"(keras_tensor|input_layer)(_\d+)?")


@dataclasses.dataclass(frozen=True)
class Signature:
    """The inputs of a model's call, by name.

    Attributes:
        structure: The name of the input, or a list, tuple or dict of names, as
            in the model's call.
        inputs: `{name: spec}`, in the order in which `tf.nest` flattens the
            structure. The batch size is free, unless the model's is fixed.
        lengths: `{name: shape}` of one random example: the spec's shape, with
            lengths for free axes.
        limits: `{name: n}` for inputs of integers: random ones are below n.
    """

    structure: Any
    inputs: dict[str, tf.TensorSpec]
    lengths: dict[str, tuple[int, ...]]
    limits: dict[str, int]

    def pack(self, arrays: Mapping[str, object]) -> Any:
        """Returns named arrays in the structure of the call."""
        return tf.nest.map_structure(arrays.__getitem__, self.structure)

    def named(self, examples: Any) -> dict[str, np.ndarray]:
        """Returns arrays by name, from the structure of the call.

        Raises:
            ValueError: They have another structure, type or shape.
        """
        flat = [examples]
        if tf.nest.is_nested(self.structure):
            try:
                tf.nest.assert_same_structure(
                    self.structure, examples, check_types=False
                )
            except (TypeError, ValueError) as error:
                raise ValueError(
                    "inputs must have the structure with which the model is "
                    f"called, {self._shown()}. Received: "
                    f"{type(examples).__name__}."
                ) from error
            flat = tf.nest.flatten(examples)
        named = {}
        for (name, spec), array in zip(self.inputs.items(), flat, strict=True):
            try:
                array = np.asarray(array)
            except ValueError as error:
                raise ValueError(
                    f"The model's input {name!r} must be an array. Received: "
                    f"{array!r}."
                ) from error
            fits = spec.shape.is_compatible_with(array.shape)
            dtype = spec.dtype.as_numpy_dtype
            kinds = np.can_cast(array.dtype, dtype, "same_kind")
            if not fits or not kinds or not len(array):
                raise ValueError(
                    f"The model's input {name!r} is {spec.dtype.name} of shape "
                    f"{tuple(spec.shape)}, at least one example. Received: "
                    f"{array.dtype} of shape {array.shape}."
                )
            named[name] = array = array.astype(dtype)
            if not is_finite(array):
                raise ValueError(
                    f"inputs must be finite. Received NaN or infinite values "
                    f"for the model's input {name!r}."
                )
        if len({len(array) for array in named.values()}) > 1:
            raise ValueError(
                "All inputs must hold equally many examples. Received: "
                f"{ {name: len(array) for name, array in named.items()} }."
            )
        return named

    @property
    def batch_size(self) -> int | None:
        """The model's batch size, if it is fixed."""
        sizes = {spec.shape[0] for spec in self.inputs.values()} - {None}
        return next(iter(sizes), None)

    def with_batch_size(self, size: int | None) -> "Signature":
        """Returns the signature for one batch size, or itself for None."""
        if size is None:
            return self
        inputs = {
            name: tf.TensorSpec((size, *spec.shape[1:]), spec.dtype, name)
            for name, spec in self.inputs.items()
        }
        return dataclasses.replace(self, inputs=inputs)

    def random(self, batch: int, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Returns named arrays, standard normal or integers.

        Args:
            batch: Number of examples, if the model leaves it free.
            seed: Seed of the draw.

        Raises:
            ValueError: An input has strings.
        """
        draw = np.random.default_rng(seed)
        arrays = {}
        for name, spec in self.inputs.items():
            shape = (spec.shape[0] or batch, *self.lengths[name])
            if spec.dtype.is_floating:
                array = draw.standard_normal(shape)
            elif spec.dtype.is_integer or spec.dtype.is_bool:
                array = draw.integers(0, self.limits[name], shape)
            else:
                raise ValueError(
                    f"The model's input {name!r} is of {spec.dtype.name}: no "
                    "random examples can be drawn. Pass inputs."
                )
            arrays[name] = array.astype(spec.dtype.as_numpy_dtype)
        return arrays

    def _shown(self):
        return self.pack(
            {
                name: f"{spec.dtype.name}{list(spec.shape)}"
                for name, spec in self.inputs.items()
            }
        )


def signature_of(model: keras.Model, examples: Any = None) -> Signature:
    """Returns the inputs of a model's call, by name.

    Names are those of the `keras.Input`s of a Sequential or Functional model,
    the keys of a dict that is passed, or `inputs` (for a list, `inputs_0`,
    `inputs_1`, ...). Since they are names of arguments, characters other than
    letters, digits and underscores become underscores.

    Args:
        model: A built model.
        examples: Arrays for its call. They give the types of the inputs of a
            subclassed model, which otherwise are its compute type.
    """
    structure = input_structure(model)
    flat = tf.nest.flatten(structure)
    names = [name for name, _ in _paths(structure, "inputs")]
    if is_graph(model):
        names = [
            # Keras numbers unnamed inputs, differently each time.
            name if _COUNTED.fullmatch(tensor.name) else tensor.name
            for name, tensor in zip(names, flat, strict=True)
        ]
    names = _as_arguments(names)
    dtypes = [tensor.dtype for tensor in flat]
    if examples is not None and not is_graph(model):
        given = tf.nest.flatten(examples)
        if len(given) == len(flat):
            dtypes = [np.asarray(array).dtype for array in given]
            dtypes = ["float32" if d == np.float64 else d for d in dtypes]
    inputs = {
        name: tf.TensorSpec(tensor.shape, dtype, name)
        for name, tensor, dtype in zip(names, flat, dtypes, strict=True)
    }
    if not is_graph(model):  # built with one batch size, but called with any
        inputs = {
            name: tf.TensorSpec((None, *spec.shape[1:]), spec.dtype, name)
            for name, spec in inputs.items()
        }
    signature = Signature(
        structure=tf.nest.pack_sequence_as(structure, names),
        inputs=inputs,
        lengths=cast(  # free axes are None until `_with_lengths`
            dict[str, tuple[int, ...]],
            {n: tuple(spec.shape[1:]) for n, spec in inputs.items()},
        ),
        limits={
            n: 256 if spec.dtype == tf.uint8 else 2
            for n, spec in inputs.items()
            if spec.dtype.is_integer or spec.dtype.is_bool
        },
    )
    if any(spec.dtype == tf.string for spec in inputs.values()):
        return signature
    signature = _with_lengths(signature, model, examples)
    return _with_limits(signature, model)


def _with_lengths(signature, model, examples):
    """Returns a signature with lengths for free axes that the model accepts."""
    free = [n for n, shape in signature.lengths.items() if None in shape]
    if not free:
        return signature
    if examples is not None:
        given = signature.named(examples)
        return dataclasses.replace(
            signature, lengths={n: a.shape[1:] for n, a in given.items()}
        )
    for length in _FREE_AXES:
        longer = dataclasses.replace(
            signature,
            lengths={
                n: tuple(length if axis is None else axis for axis in shape)
                for n, shape in signature.lengths.items()
            },
        )
        if _can_be_called(model, longer, longer.random(1)):
            return longer
    raise ValueError(
        f"Model {model.name!r} has inputs with free axes ({', '.join(free)}), "
        f"and fails with lengths {', '.join(map(str, _FREE_AXES))} for these"
        ". Pass inputs."
    )


def _with_limits(signature, model):
    """Returns a signature with limits of integers, from embeddings."""
    sizes = {
        layer.input_dim
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, keras.layers.Embedding)
    }
    limits = dict(signature.limits)
    zeros = {n: np.zeros_like(a) for n, a in signature.random(1).items()}
    for name, limit in signature.limits.items():
        if zeros[name].dtype == bool:
            continue
        bound = np.iinfo(zeros[name].dtype).max
        for size in sorted({*sizes, limit}, reverse=True):
            limits[name] = min(size, bound + 1)
            largest = np.full_like(zeros[name], limits[name] - 1)
            if _can_be_called(model, signature, {**zeros, name: largest}):
                break
    return dataclasses.replace(signature, limits=limits)


def _can_be_called(model, signature, arrays):
    try:
        outputs = outputs_of(model, signature, arrays)
    except (tf.errors.OpError, ValueError):
        return False
    return all(is_finite(output) for output in outputs.values())


def is_finite(array: np.ndarray) -> bool:
    """Returns whether an array has no NaN or infinity; True for strings."""
    return array.dtype.kind in "SUO" or bool(np.isfinite(array).all())


def _as_arguments(names):
    """Returns unique names that a function's arguments can have."""
    arguments = []
    for name in names:
        name = re.sub(r"\W", "_", name, flags=re.ASCII)
        name = f"input_{name}" if not name or name[0].isdigit() else name
        while name in arguments or name == "self" or keyword.iskeyword(name):
            name += "_"
        arguments.append(name)
    return arguments


def named_outputs(outputs: Any) -> dict[str, tf.Tensor]:
    """Returns a model's outputs by name.

    Args:
        outputs: What it returns. Names are the keys of a dict, or `output_0`,
            `output_1`, ... for a list or a single tensor.
    """
    if isinstance(outputs, Mapping):
        return dict(_paths(outputs, "output"))
    flat = tf.nest.flatten(outputs)
    return {f"output_{i}": output for i, output in enumerate(flat)}


def _paths(structure, prefix):
    """Yields `(name, leaf)` in the order in which `tf.nest` flattens."""
    if isinstance(structure, Mapping):
        for key in sorted(structure):
            yield from _paths(structure[key], str(key))
    elif isinstance(structure, (list, tuple)):
        for i, item in enumerate(structure):
            yield from _paths(item, f"{prefix}_{i}")
    else:
        yield prefix, structure


def outputs_of(
    model: keras.Model, signature: Signature, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns a model's outputs without changing its states.

    Args:
        model: A built model, masked or not.
        signature: The model's inputs.
        arrays: Inputs by name.

    Returns:
        Outputs by name.
    """
    tensors = {name: tf.constant(array) for name, array in arrays.items()}
    with keras.StatelessScope(collect_losses=True):
        outputs = named_outputs(call_model(model, signature.pack(tensors)))
    return {name: tensor.numpy() for name, tensor in outputs.items()}
