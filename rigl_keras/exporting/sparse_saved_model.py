"""SavedModels whose networks are operations of the op library."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import kernels
from rigl_keras.exporting.base_format import (
    Format,
    Runner,
    WriteOptions,
    numpy_runner,
)
from rigl_keras.exporting.networks import (
    library_to_copy,
    lines_about,
    networks_within,
    output_shapes,
    tuned,
)
from rigl_keras.exporting.saved_model import lookup_tables
from rigl_keras.exporting.signatures import Signature
from rigl_keras.exporting.sparse_storage import SparseKernels, cheapest_encoding
from rigl_keras.serving.importer import Imported
from rigl_keras.serving.network import Network
from rigl_keras.serving.operation import checksum_of, run_network

__all__ = ["LOADER", "SparseSavedModel"]

LOADER = "load.py"
# Where a SavedModel keeps additional files.
_LIBRARY = Path("assets.extra", "rigl_keras_kernels.so")


class SparseSavedModel(Format):
    """A SavedModel that computes a model as one operation.

    TensorFlow keeps what no network computes, such as attention, with the
    largest possible networks between as operations. Their weights are files
    among the assets. The loop of a sparse LSTM or GRU that no network computes,
    as it returns its states, say, is an operation, too, if that is faster.
    TensorFlow's part stores its kernels sparse. The operation needs its
    library, which is in the folder, with a file that loads both. It has the
    signature `serving_default`.
    """

    folds = True
    dense = "saved_model"
    operations = (_LIBRARY.as_posix(),)
    loading = (
        'import load  # where "{path}" is on sys.path',
        'outputs = load.model().signatures["serving_default"]({inputs})',
    )

    def write(
        self,
        model: keras.Model,
        signature: Signature,
        folder: Path,
        options: WriteOptions,
    ) -> list[str]:
        imported = networks_within(model, signature)
        # Into the cache, even if the process has the operations from elsewhere.
        built = library_to_copy(kernels.build)
        with tempfile.TemporaryDirectory() as scratch:
            networks = [
                _Saved(
                    segment.network,
                    Path(scratch, _file_name(i)),
                    options.batch_sizes,
                )
                for i, segment in enumerate(imported.segments)
            ]
            served = _Served(
                imported, networks, signature, lookup_tables(model)
            )
            tf.saved_model.save(served, str(folder), signatures=served.function)
        library = Path(folder, _LIBRARY)
        library.parent.mkdir(exist_ok=True)
        shutil.copyfile(built, library)
        loader = _LOADER.format(library=_LIBRARY.as_posix())
        Path(folder, LOADER).write_text(loader)
        unknown = lines_about(imported.unknown)
        if not unknown:
            return []
        parts = {0: "no part is a network", 1: "one part is a network"}.get(
            len(networks), f"{len(networks)} are networks"
        )
        return [
            f"TensorFlow computes parts of the model, and {parts}:",
            *(f"  {line}" for line in unknown),
        ]

    def load(
        self, folder: Path, signature: Signature, outputs: Sequence[str]
    ) -> Runner:
        if kernels.load() is None:
            raise ValueError(
                f"Sparse kernels are not available: {kernels.unavailable()}."
            )
        loaded = tf.saved_model.load(str(folder))
        return numpy_runner(loaded.signatures["serving_default"])

    def why_unavailable(self) -> str | None:
        if kernels.load() is not None:
            return None
        return (
            "the op library of the sparse kernels: "
            f"{kernels.unavailable()}. Pass format='saved_model'."
        )


def _file_name(segment):
    return f"network_{segment}.rigl" if segment else "network.rigl"


class _Saved(tf.Module):
    """A network in a separate file.

    Args:
        network: The network.
        path: The file to write, which the SavedModel copies.
        batch_sizes: As in `tuned`.
    """

    def __init__(
        self, network: Network, path: Path, batch_sizes: Sequence[int]
    ):
        super().__init__()
        data = tuned(network, batch_sizes)
        path.write_bytes(data)
        self._asset = tf.saved_model.Asset(str(path))
        self._checksum = checksum_of(data)
        self._shapes = output_shapes(network)

    def __call__(self, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return run_network(
            self._asset.asset_path,
            inputs,
            checksum=self._checksum,
            # Not TensorFlow's wrapper of the list, which tracks it.
            shapes=list(self._shapes),
        )


class _Constants:
    """The large constants of TensorFlow's part, stored without their zeros.

    Args:
        constants: All of them, by the names of their tensors.

    Attributes:
        stored: Those that take less space without zeros, and their masks.
            None: there is none.
    """

    def __init__(self, constants: Mapping[str, np.ndarray]):
        kinds = {True: {}, False: {}}  # whether they are masks
        for name, array in constants.items():
            mask = array.dtype == bool
            if _is_stored_sparse(array):
                # Equal ones once: branches of a graph may each have theirs.
                key = (array.dtype.str, array.shape, array.tobytes())
                kinds[mask].setdefault(key, (array, []))[1].append(name)
        found = [*kinds[False].values(), *kinds[True].values()]
        self._names = [names for _, names in found]
        self.stored = None
        if found:
            self.stored = SparseKernels(
                *(
                    [array for array, _ in kinds[i].values()]
                    for i in (False, True)
                )
            )

    def read(self) -> dict[str, tf.Tensor]:
        """Returns `{name of a tensor: tensor}`, within a saved function."""
        tensors = self.stored.read() if self.stored else []
        return {
            name: tensor
            for names, tensor in zip(self._names, tensors, strict=True)
            for name in names
        }


def _is_stored_sparse(array):
    if array.ndim < 2 or array.size == 0:
        return False
    if array.dtype == bool:
        return True
    return array.dtype.kind == "f" and cheapest_encoding(array) != "dense"


class _Served(tf.Module):
    """A model made of networks as one function of its named inputs.

    Args:
        imported: The model's networks.
        networks: The same networks, in files.
        signature: The model's inputs.
        tables: Its lookup tables, which are saved too.

    Attributes:
        function: The concrete function.
    """

    def __init__(
        self,
        imported: Imported,
        networks: Sequence[_Saved],
        signature: Signature,
        tables: Sequence[Any],
    ):
        super().__init__()
        self._networks = list(networks)
        self._tables = list(tables)
        constants = _Constants(imported.constants())
        self._kernels = constants.stored
        self._stored = self._kernels.variables if self._kernels else []

        @tf.function(autograph=False)
        def serve(**inputs: tf.Tensor) -> Mapping[str, tf.Tensor]:
            return imported.rebuild(
                inputs,
                lambda i, tensors: self._networks[i](tensors),
                constants.read(),
            )

        self.function = serve.get_concrete_function(**signature.inputs)


_LOADER = '''"""Loads the model beside this file, and its operations.

    import load
    serve = load.model().signatures["serving_default"]

In other programs, one line before tf.saved_model.load is enough:

    tf.load_op_library("FOLDER/{library}")
"""

from pathlib import Path

import tensorflow as tf

_HERE = Path(__file__).resolve().parent


def model():
    """Returns the result of tf.saved_model.load."""
    try:
        return tf.saved_model.load(str(_HERE))
    except (FileNotFoundError, RuntimeError, tf.errors.NotFoundError):
        # Not loaded yet; a process can load them only once.
        tf.load_op_library(str(_HERE / "{library}"))
        return tf.saved_model.load(str(_HERE))
'''
