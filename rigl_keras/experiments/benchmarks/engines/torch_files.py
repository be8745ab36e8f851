"""Writes a Keras network as PyTorch programs, one for each batch size.

    python -m rigl_keras.experiments.benchmarks.engines.torch_files \
        NETWORK.keras BATCH ...

It writes NETWORK-BATCH.pt2 next to the Keras file. This script needs
TensorFlow and PyTorch; loading its files needs only PyTorch.
"""

# PyTorch may be missing where types are checked.
# pyright: reportMissingImports=false

import sys
from pathlib import Path
from typing import Any

import keras

from rigl_keras.experiments.benchmarks.torch_network import torch_module

__all__ = ["write_programs"]


def write_programs(path: Path, batches: list[int]) -> None:
    """Writes a program for each batch size.

    Args:
        path: Path of a Keras file.
        batches: The batch sizes.
    """
    import torch

    model: Any = keras.saving.load_model(path, compile=False)
    module = torch_module(model)
    for batch in batches:
        images = torch.zeros((batch, *model.input_shape[1:]))
        with torch.no_grad():
            program = torch.export.export(module, (images,))
        torch.export.save(program, path.with_name(f"{path.stem}-{batch}.pt2"))


if __name__ == "__main__":
    write_programs(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
