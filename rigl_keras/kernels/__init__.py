"""Convolutions and products with sparse kernels, faster than dense ones.

csrc/               the operations in C++: convolution_ops.cc, matrix_ops.cc,
                    recurrent_ops.cc and row_ops.cc, over the loops of
                    lanes.cc, panels.cc, recurrent.cc and rows.cc, which are
                    compiled for each instruction set; masked_kernel_op.cc
toolchain           the compiler and its flags
library             builds the operations on first use, and loads them
packaged            those that a wheel brings
ahead               builds them in the background
operations          the operations with their gradients, of convolutions by
                    convolution_gradients
matrix_operations   products of matrices with a sparse one
place_operations    some places of tensors, over place_ops.cc
recurrent_operations  all steps of an LSTM or a GRU
problems            what layers compute, both ways, for timing
choice              times dense and sparse products, and chooses the faster
build_command       the command bin/build_kernels
layer_products      how a masked layer computes its product
fast_calls          batch norm and dropout in few passes over memory
lane_operations     images in lanes, the layout of sparse convolutions, over
                    lane_ops.cc and lane_convolution_ops.cc, and the loops of
                    lane_layers.cc and lane_convolutions.cc
lane_calls          layers that pass images on in lanes
"""

from rigl_keras.kernels import library
from rigl_keras.kernels.choice import Choice, choose, too_large
from rigl_keras.kernels.library import BuildError, build, load, unavailable
from rigl_keras.kernels.matrix_operations import sparse_dense
from rigl_keras.kernels.operations import (
    batch_norm,
    dense_library,
    dropout,
    instruction_set,
    masked_kernel,
    scratch_bytes,
    sparse_conv2d,
)
from rigl_keras.kernels.problems import Problem, Recurrence

__all__ = [
    "BuildError",
    "Choice",
    "Problem",
    "Recurrence",
    "batch_norm",
    "build",
    "choose",
    "dense_library",
    "dropout",
    "instruction_set",
    "library",
    "load",
    "masked_kernel",
    "scratch_bytes",
    "sparse_conv2d",
    "sparse_dense",
    "too_large",
    "unavailable",
]
