"""A finished model to a SavedModel that plain TensorFlow loads.

Each masked kernel is stored as its values and one bit an entry, and put
together once, when the SavedModel is loaded; a call then reads a ready dense
kernel. Nothing of this package is needed to load or to serve it.
"""

import dataclasses
import hashlib
import math
import os
import shutil
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from rigl_keras.layers import Masked
from rigl_keras.maskable import is_graph, kernel_at
from rigl_keras.sparsify import (
    input_structure,
    leaf_layers,
    masked_layers,
    strip,
)

__all__ = ["ExportReport", "export"]

_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: Folder of the SavedModel.
        variable_bytes: Size of its weights on disk.
        dense_bytes: Size of the same weights stored dense, 4 bytes each.
        density: Fraction of the masked weights that is stored.
        max_difference: Largest difference between the outputs of the
            SavedModel, loaded back, and those of the model, on random inputs,
            in units of the largest output (or of 1, where that is less).
    """

    path: str
    variable_bytes: int
    dense_bytes: int
    density: float
    max_difference: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.variable_bytes / 1e6:.2f} MB of weights, "
            f"{self.variable_bytes / self.dense_bytes:.3f}x dense, at density "
            f"{self.density:.4f}; outputs differ by {self.max_difference:.1e}"
        )


def export(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    format: str = "saved_model",
    overwrite: bool = False,
) -> ExportReport:
    """Writes a masked model as a SavedModel with sparse kernels.

    The SavedModel has the signature `serving_default`, with the model's
    inputs by name and any batch size, and one output for each of the model's
    (`output_0`, `output_1`, ...). It is loaded back and compared with the
    model before it takes its place at `path`.

    Args:
        model: A model with masked layers.
        path: Folder to write.
        format: `"saved_model"`.
        overwrite: Whether a folder at `path` may be replaced.

    Returns:
        An `ExportReport`.

    Raises:
        ValueError: The model has no masks or holds NaNs or weights outside
            its masks, `path` exists, the format is unknown, or the written
            model disagrees with the one in memory. Nothing is written then.

    Example:

    >>> print(export(model, "exported/"))
    >>> tf.saved_model.load("exported/").signatures["serving_default"]
    """
    if format != "saved_model":
        raise ValueError(
            f"format must be 'saved_model'. Received: format={format!r}."
        )
    target = Path(path)
    if target.exists() and not overwrite:
        raise ValueError(
            f"{str(target)!r} exists. Pass overwrite=True to replace it, or "
            "another path."
        )
    _check_weights(model)
    if not is_graph(model):
        raise ValueError(
            f"Model {model.name!r} is subclassed, and export takes Sequential "
            "and Functional models: it builds a graph of inputs and outputs. "
            "strip(model).export(path) writes a dense SavedModel."
        )
    served = _Served(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder) / "saved_model"
        tf.saved_model.save(served, str(written), signatures=served.signature)
        difference = _difference(model, written)
        if not difference <= _TOLERANCE:
            raise ValueError(
                "The SavedModel, loaded back, disagrees with the model: its "
                f"outputs differ by {difference:.1e}, more than {_TOLERANCE}. "
                f"Nothing was written to {str(target)!r}."
            )
        if target.exists():
            shutil.rmtree(target)
        written.replace(target)
    masks = [layer.mask.numpy() for layer in masked_layers(model)]
    return ExportReport(
        path=str(target),
        variable_bytes=sum(
            file.stat().st_size for file in (target / "variables").iterdir()
        ),
        dense_bytes=4 * served.size,
        density=float(sum(m.sum() for m in masks) / sum(m.size for m in masks)),
        max_difference=difference,
    )


class _SparseKernel(tf.saved_model.experimental.TrackableResource):
    """A dense kernel, made of its values and a bitmask when it is loaded.

    It is never destroyed while the process lives: whoever keeps only a
    signature of a loaded model would find its kernels gone. A model that is
    loaded again finds its kernels there, and shares them.
    """

    def __init__(self, kernel: np.ndarray, mask: np.ndarray):
        super().__init__()
        kept = mask.ravel() > 0
        self._shape = kernel.shape
        # Handles of one name are one variable in a process: kernels that
        # differ must differ in name, also between exports.
        content = b"".join(
            [repr((kernel.shape, kernel.dtype)).encode(), kernel.tobytes()]
        )
        self._name = f"rigl_keras_{hashlib.sha256(content).hexdigest()}"
        self._values = tf.Variable(kernel.ravel()[kept], trainable=False)
        self._bits = tf.Variable(np.packbits(kept), trainable=False)
        # What is saved; the owner tracks it, as a resource tracks nothing.
        self.stored = [self._values, self._bits]
        self._initialize()

    def _create_resource(self):
        return tf.raw_ops.VarHandleOp(
            dtype=self._values.dtype,
            shape=self._shape,
            shared_name=self._name,
        )

    def _initialize(self):
        # The first entry is the highest bit, as numpy packs them.
        shifts = tf.constant([7, 6, 5, 4, 3, 2, 1, 0], tf.uint8)
        bits = tf.bitwise.right_shift(self._bits[:, tf.newaxis], shifts) & 1
        kept = tf.where(tf.reshape(bits, [-1]) > 0)
        kernel = tf.scatter_nd(
            kept, self._values, tf.constant([math.prod(self._shape)], tf.int64)
        )
        tf.raw_ops.AssignVariableOp(
            resource=self.resource_handle,
            value=tf.reshape(kernel, self._shape),
        )

    def read(self) -> tf.Tensor:
        return tf.ensure_shape(
            tf.raw_ops.ReadVariableOp(
                resource=self.resource_handle, dtype=self._values.dtype
            ),
            self._shape,
        )


class _Served(tf.Module):
    """What is saved: sparse kernels, the other weights and a signature."""

    def __init__(self, model):
        super().__init__()
        plain = strip(model)
        self.kernels, replaced = [], []
        # A copy lists its layers in the order of the original.
        for layer, copy in zip(
            leaf_layers(model), leaf_layers(plain), strict=True
        ):
            # A mask of ones would cost a bit an entry and save nothing.
            if not isinstance(layer, Masked):
                continue
            for masked in layer.masked_kernels():
                if masked.density == 1:
                    continue
                kernel = kernel_at(copy, masked.found.path).variable
                self.kernels.append(
                    _SparseKernel(kernel.numpy(), masked.mask.numpy())
                )
                replaced.append(kernel)
        self.stored = [v for kernel in self.kernels for v in kernel.stored]
        self.others = [
            v.value
            for v in plain.weights
            if all(v is not kernel for kernel in replaced)
        ]
        self.size = sum(math.prod(v.shape) for v in plain.weights)
        structure = input_structure(plain)

        # The model is held by the function alone: as an attribute it would be
        # saved, with its dense kernels.
        @tf.function
        def serve(**inputs):
            flat = [inputs[t.name] for t in plain.inputs]
            kernels = [kernel.read() for kernel in self.kernels]
            with keras.StatelessScope(
                state_mapping=list(zip(replaced, kernels, strict=True))
            ):
                outputs = plain(
                    tf.nest.pack_sequence_as(structure, flat), training=False
                )
            return {
                f"output_{i}": output
                for i, output in enumerate(tf.nest.flatten(outputs))
            }

        self.signature = serve.get_concrete_function(
            **{
                t.name: tf.TensorSpec((None, *t.shape[1:]), t.dtype, t.name)
                for t in plain.inputs
            }
        )


def _check_weights(model):
    if not masked_layers(model):
        raise ValueError(
            f"Model {model.name!r} has no masked layer. Keras exports a dense "
            "model: model.export(path)."
        )
    for variable in model.weights:
        if not np.all(np.isfinite(variable.numpy())):
            raise ValueError(
                f"Weight {variable.path!r} holds NaN or infinite values: a "
                "model like this is not exported."
            )
    for layer in masked_layers(model):
        outside = layer.kernel.numpy()[layer.mask.numpy() == 0]
        if outside.any():
            raise ValueError(
                f"Layer {layer.name!r} holds {np.count_nonzero(outside)} "
                "weights outside its mask. layer.assign_mask(layer.mask) "
                "removes them."
            )


def _difference(model, path):
    """Returns how far the written model is from the one in memory."""
    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    draw = np.random.default_rng(0)
    inputs = {
        t.name: draw.standard_normal((2, *(d or 8 for d in t.shape[1:])))
        for t in model.inputs
    }
    inputs = {t.name: tf.cast(inputs[t.name], t.dtype) for t in model.inputs}
    structure = input_structure(model)
    wanted = tf.nest.flatten(
        model(
            tf.nest.pack_sequence_as(structure, list(inputs.values())),
            training=False,
        )
    )
    got = served(**inputs)
    return max(
        float(
            np.max(np.abs(got[f"output_{i}"] - want))
            / max(1.0, np.max(np.abs(want)))
        )
        for i, want in enumerate(wanted)
    )
