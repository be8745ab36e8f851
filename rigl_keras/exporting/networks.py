"""The networks in a model."""

import keras

from rigl_keras.exporting.saved_model import Served
from rigl_keras.exporting.signatures import Signature
from rigl_keras.serving.importer import LEAST_WORK, Imported, import_function

__all__ = ["import_model"]


def import_model(
    model: keras.Model, signature: Signature, *, least_work: int = LEAST_WORK
) -> Imported:
    """Returns the networks in what a model computes in inference.

    Args:
        model: A built model of any kind, masked or not. Its weights are taken
            as they are now; kernels of a masked one must be zero outside
            their masks.
        signature: What it is called on.
        least_work: As in `import_function`.

    Raises:
        ValueError: The model is more than a function of its inputs.
    """
    served = Served(model, signature, sparse=False)
    return import_function(served.function, least_work=least_work)
