"""Storage of sparse kernels: bits, gaps and sizes."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from rigl_keras.exporting import sparse_storage
from rigl_keras.exporting.sparse_storage import (
    ENCODINGS,
    cheapest_encoding,
    decode,
    encode,
    encoded_bytes,
)

# Two kernels of 2 x 3, one after the other: entries 2, 5 and 10 of 12.
KERNELS = [
    np.array([[0, 0, 7.0], [0, 0, 8.0]], np.float32),
    np.array([[0, 0, 0], [0, 9.0, 0]], np.float32),
]


def test_bits_by_hand():
    values, bits = encode(KERNELS, "bitmask")
    assert values.tolist() == [7, 8, 9]
    assert [f"{byte:08b}" for byte in bits] == ["00100100", "00100000"]


def test_gaps_by_hand():
    values, gaps = encode(KERNELS, "gaps")
    assert values.tolist() == [7, 8, 9]
    assert gaps.tolist() == [2, 3, 5] and gaps.dtype == np.uint8


@pytest.mark.parametrize(
    "position, gaps",
    [
        (0, [0]),
        (255, [255]),
        (256, [255, 1]),
        (510, [255, 255]),
        (511, [255, 255, 1]),
    ],
)
def test_wide_gaps_are_bridged(position, gaps):
    kernel = np.zeros(600)
    kernel[position] = 3.0
    values, found = encode([kernel], "gaps")
    assert found.tolist() == gaps
    assert values.tolist() == [0.0] * (len(gaps) - 1) + [3.0]
    assert encoded_bytes(kernel)["gaps"] == values.nbytes + found.nbytes


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    density=st.sampled_from([0, 0.001, 0.01, 0.1, 0.5, 1]),
    shapes=st.lists(
        st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
        min_size=1,
        max_size=3,
    ),
    encoding=st.sampled_from(ENCODINGS),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
def test_what_is_decoded_is_what_was_encoded(
    seed, density, shapes, encoding, dtype
):
    draw = np.random.default_rng(seed)
    kernels = [
        (draw.standard_normal(s) * (draw.random(s) < density)).astype(dtype)
        for s in shapes
    ]
    values, positions = encode(kernels, encoding)
    decoded = decode(
        tf.constant(values), tf.constant(positions), encoding, shapes
    )
    for kernel, found in zip(kernels, decoded, strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(kernel, found)


def sparse(density, size=100_000):
    kernel = np.zeros(size, np.float32)
    kernel[: round(density * size)] = 1.0
    return np.random.default_rng(0).permutation(kernel)


@pytest.mark.parametrize(
    "density, cheapest",
    # A bit for each entry, or a byte for each value: equal at density 1/8.
    # Dense storage is smaller if more than 31 of 32 are kept.
    [
        (0.01, "gaps"),
        (0.12, "gaps"),
        (0.13, "bitmask"),
        (0.96, "bitmask"),
        (0.98, "dense"),
    ],
)
def test_the_cheapest(density, cheapest):
    kernel = sparse(density)
    assert cheapest_encoding(kernel) == cheapest
    sizes = encoded_bytes(kernel)
    ones = np.count_nonzero(kernel)
    assert sizes["dense"] == 400_000
    assert sizes["bitmask"] == 4 * ones + 12_500
    for encoding in ENCODINGS:
        arrays = encode([kernel], encoding)
        assert sizes[encoding] == sum(array.nbytes for array in arrays)


def restored(kernels):
    """Returns the kernels that a loaded SavedModel reads."""
    stored = sparse_storage.SparseKernels(kernels)
    assert all(v.read_value().shape[0] == 0 for v in stored._dense)
    stored._initialize()
    return stored, stored.read()


def test_of_several_types_and_encodings():
    kernels = [
        sparse(0.01).reshape(100, 1000),
        sparse(0.5).reshape(1000, 100),
        sparse(0.02).astype(np.float64).reshape(10, 10, 10, 100),
        sparse(0.03).reshape(1000, 100),
    ]
    stored, read = restored(kernels)
    for kernel, found in zip(kernels, read, strict=True):
        np.testing.assert_array_equal(found, kernel)
    # Values and three kinds of positions; dense variables are empty on disk.
    *arrays, _, _, _, _ = stored.variables
    assert len(arrays) == 6
    taken = sum(math.prod(v.shape) * v.dtype.size for v in arrays)
    assert taken == sum(min(encoded_bytes(k).values()) for k in kernels)


def test_no_kernel_holds_anything():
    """Only zero values are left out, and the kernel may have no others."""
    _, read = restored([np.zeros((3, 4), np.float32), *KERNELS])
    np.testing.assert_array_equal(read[0], np.zeros((3, 4)))
    np.testing.assert_array_equal(read[2], KERNELS[1])


def test_masks_beside_kernels():
    """Masks of nonzero entries take nothing, and others a bit for each."""
    kernels = [sparse(0.1).reshape(100, 1000), KERNELS[0]]
    more = kernels[0] != 0
    more[3, 5:9] = True  # also weights that are zero
    masks = [kernels[1] != 0, more, kernels[0] != 0]
    stored = sparse_storage.SparseKernels(kernels, masks)
    plain = sparse_storage.SparseKernels(kernels)
    stored._initialize()
    read = stored.read()
    for array, found in zip([*kernels, *masks], read, strict=True):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    sizes = [
        sum(math.prod(v.shape) * v.dtype.size for v in one.variables[:-n])
        for one, n in ((stored, 5), (plain, 2))
    ]
    assert sizes[0] - sizes[1] == 100_000 / 8
