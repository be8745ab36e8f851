"""Convolutions and products with sparse kernels, faster than dense ones.

The operations are in C++ (`csrc/`), built on first use (`library`), wrapped
with their gradients (`operations`), and taken where they have been measured
to win (`choice`).
"""

from rigl_keras.kernels import library
from rigl_keras.kernels.choice import Choice, Problem, choose, too_large
from rigl_keras.kernels.library import BuildError, build, load, unavailable
from rigl_keras.kernels.operations import (
    FrozenKernel,
    batch_norm,
    dense_library,
    dropout,
    frozen_conv2d,
    instruction_set,
    scratch_bytes,
    sparse_conv2d,
    sparse_dense,
)

__all__ = [
    "BuildError",
    "Choice",
    "FrozenKernel",
    "Problem",
    "batch_norm",
    "build",
    "choose",
    "dense_library",
    "dropout",
    "frozen_conv2d",
    "instruction_set",
    "library",
    "load",
    "scratch_bytes",
    "sparse_conv2d",
    "sparse_dense",
    "too_large",
    "unavailable",
]
