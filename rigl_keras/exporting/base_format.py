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

# From named inputs to named outputs.
Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a model is written. A format ignores what it has no use for.

    Attributes:
        sparse: Whether kernels that take less space so are stored sparse.
        quantization: One of the format's `quantizations`. None: float32.
        calibration: Named inputs from which the ranges of activations are
            read, for a quantization that is calibrated.
        batch_size: The batch size. None: free.
        batch_sizes: Those for which a format that can choose compares what is
            fastest. Empty: it does not.
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
        advice: What to pass where the outputs of a quantized model are too
            far from those of the model. Empty: nothing.
    """

    calibrated: bool = False
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class Concession:
    """What is given up for a model that a format cannot hold otherwise.

    Attributes:
        changes: Fields of `WriteOptions`, with their values.
        note: The same in words, for the report.
    """

    changes: Mapping[str, Any]
    note: str


class Format(abc.ABC):
    """A format of an exported model: how it is written, and run again.

    Attributes:
        file: Name of the file in the folder that is written. None: the folder
            itself is what is loaded.
        weights: Folder within it that holds the weights alone. None: no
            folder does.
        packages: What it imports besides TensorFlow, of `_extras.OPTIONAL`.
        quantizations: The `Quantization`s that it offers, by name.
        folds: Whether it folds batch norms, whatever is asked for.
        concessions: What is given up, in this order, for a model that the
            format otherwise cannot hold, or runs wrongly.
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
            signature: What it is called on.
            folder: An empty folder.
            options: How it is written.

        Returns:
            What was not done, and why, for the report.

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
        """Loads what `write` has written.

        Args:
            folder: Where it was written.
            signature: Of the model.
            outputs: Names of its outputs, in order.

        Returns:
            A function from named inputs to named outputs.
        """

    def why_unavailable(self) -> str | None:
        """Returns what is missing on this machine, and what to do, or None."""
        return _extras.missing(*self.packages)

    def path(self, folder: str | os.PathLike) -> Path:
        """Returns the path of what is loaded.

        Args:
            folder: The folder that is written.
        """
        return Path(folder, self.file or "")


def numpy_runner(serve: Callable[..., Mapping[str, tf.Tensor]]) -> Runner:
    """Returns a function of tensors as one of arrays.

    Args:
        serve: Takes the inputs as keyword arguments, and returns the outputs
            by name.
    """

    def run(arrays):
        tensors = {name: tf.constant(array) for name, array in arrays.items()}
        return {name: y.numpy() for name, y in serve(**tensors).items()}

    return run
