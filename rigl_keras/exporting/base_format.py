"""`Format`: what every format of an exported model provides."""

import abc
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from rigl_keras import _extras
from rigl_keras.exporting.signatures import Signature

__all__ = [
    "Concession",
    "Format",
    "Quantization",
    "Runner",
    "WriteOptions",
    "numpy_runner",
]

# A function from named inputs to named outputs.
Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a model is written. A format ignores options that it does not use.

    Attributes:
        sparse: Whether to store kernels sparse if that takes less space.
        quantization: One of the format's `quantizations`. None: float32.
        calibration: Named inputs that give the ranges of activations, for a
            calibrated quantization.
        batch_size: The batch size. None: free.
        batch_sizes: Batch sizes for which a format compares what is fastest, if
            it can. Empty: it does not.
    """

    sparse: bool = True
    quantization: str | None = None
    calibration: Mapping[str, np.ndarray] | None = None
    batch_size: int | None = None
    batch_sizes: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Quantization:
    """A precision below float32 that a format offers.

    Attributes:
        calibrated: Whether it reads the ranges of activations from examples.
        advice: What to pass if the outputs of a quantized model differ too much
            from the model's. Empty: nothing.
    """

    calibrated: bool = False
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class Concession:
    """What a format gives up for a model that it cannot hold otherwise.

    Attributes:
        changes: Fields of `WriteOptions`, with their values.
        note: The changes in words, for the report.
    """

    changes: Mapping[str, Any]
    note: str


class Format(abc.ABC):
    """A format of an exported model: writes it, and loads it again.

    Attributes:
        file: Name of the file that is loaded, in the written folder. None: the
            folder itself is loaded.
        weights: Folder within it that holds only the weights. None: there is
            none.
        packages: Packages that it needs besides TensorFlow, of
            `_extras.OPTIONAL`.
        quantizations: The `Quantization`s that it offers, by name.
        folds: Whether it always folds batch norms.
        concessions: What it gives up, in this order, for a model that it cannot
            hold or run correctly otherwise.
    """

    file: str | None = None
    weights: str | None = None
    packages: Sequence[str] = ()
    quantizations: Mapping[str, Quantization] = {}
    folds: bool = False
    concessions: Sequence[Concession] = ()

    @abc.abstractmethod
    def write(
        self,
        model: keras.Model,
        signature: Signature,
        folder: Path,
        options: WriteOptions,
    ) -> list[str]:
        """Writes a model.

        Args:
            model: A built model. Kernels of a masked one must be zero outside
                their masks.
            signature: The model's inputs.
            folder: An empty folder.
            options: How it is written.

        Returns:
            Notes for the report: what was not done, and why.

        Raises:
            ValueError: The format cannot hold this model.
        """

    @abc.abstractmethod
    def load(
        self,
        folder: Path,
        signature: Signature,
        outputs: Sequence[str],
    ) -> Runner:
        """Loads what `write` wrote.

        Args:
            folder: The folder that was written.
            signature: The model's inputs.
            outputs: Names of its outputs, in order.

        Returns:
            A function from named inputs to named outputs.
        """

    def why_unavailable(self) -> str | None:
        """Returns what is missing on this machine, and what to do, or None."""
        return _extras.missing(*self.packages)

    def path(self, folder: str | os.PathLike) -> Path:
        """Returns the path of the file or folder that is loaded.

        Args:
            folder: The folder that was written.
        """
        return Path(folder, self.file or "")


def numpy_runner(serve: Callable[..., Mapping[str, tf.Tensor]]) -> Runner:
    """Returns a function of arrays for a function of tensors.

    Args:
        serve: Takes the inputs as keyword arguments, and returns the outputs
            by name.
    """

    def run(arrays):
        tensors = {name: tf.constant(array) for name, array in arrays.items()}
        return {name: y.numpy() for name, y in serve(**tensors).items()}

    return run
