"""The formats of an exported model, by name.

    saved_model         kernels as values and positions (`sparse_storage`)
    sparse_saved_model  the model as one operation (`networks`), and its library
    native              the same without TensorFlow: a file and a library
    tflite              LiteRT's sparse encoding (EXPERIMENTAL_SPARSITY)
    onnx                sparse initializers, through Keras's exporter
    keras               the plain Keras model, kernels dense

To add a format, subclass `Format` (`base_format`) and add a line here.
"""

from rigl_keras.exporting.base_format import Format
from rigl_keras.exporting.keras_file import KerasFile
from rigl_keras.exporting.native import Native
from rigl_keras.exporting.onnx import Onnx
from rigl_keras.exporting.saved_model import SavedModel
from rigl_keras.exporting.sparse_saved_model import SparseSavedModel
from rigl_keras.exporting.tflite import TFLite

__all__ = ["FORMATS", "QUANTIZATIONS", "check_available", "formats_with"]

FORMATS: dict[str, Format] = {
    "saved_model": SavedModel(),
    "sparse_saved_model": SparseSavedModel(),
    "native": Native(),
    "tflite": TFLite(),
    "onnx": Onnx(),
    "keras": KerasFile(),
}
# The quantizations of all formats, each once.
QUANTIZATIONS = tuple(
    dict.fromkeys(
        name for format in FORMATS.values() for name in format.quantizations
    )
)


def check_available(name: str) -> None:
    """Raises ValueError unless a format can be written on this machine.

    Args:
        name: One of `FORMATS`.
    """
    missing = FORMATS[name].why_unavailable()
    if missing is not None:
        raise ValueError(f"format={name!r} needs {missing}")


def formats_with(quantization: str) -> list[str]:
    """Returns the names of the formats that offer a quantization.

    Args:
        quantization: One of `QUANTIZATIONS`.
    """
    return [
        n for n, one in FORMATS.items() if quantization in one.quantizations
    ]
