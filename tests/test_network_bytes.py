"""The library reads network files with any bytes, or refuses them.

Files are written here byte by byte, by `support.network_bytes`.
"""

import os
import random
import re
import struct
import subprocess
import zlib

import numpy as np
import pytest

from tests.support import network_bytes as b
from tests.support.network_library import (
    built,  # noqa: F401 - a fixture
    common_folder,
    loaded,
    refused,
    sanitized,
)

KERNEL = np.arange(1, 37, dtype="f").reshape(3, 3, 2, 2)


# The header, and the size of the file.


def test_what_is_no_network():
    good = b.network(b.image())
    assert loaded(good).inputs[0].name == "x"
    assert "empty" in refused(b"")
    for data in (b"x", b"RIGLNET\r\n" + good[8:], b"PK\3\4" + good):
        assert "not a network that rigl_keras has exported" in refused(data)
    for end in (1, 8, 31):
        assert refused(good[:end]) == (
            f"the file is cut off: it has {end} bytes, and its header alone 32"
        )


def test_every_end_is_noticed():
    good = b.network(b.image(), b.convolution(KERNEL))
    for end in range(32, len(good)):
        assert "cut off" in refused(good[:end]), end
        # As if the writer had stopped before it wrote the header.
        assert "cut off" not in refused(b.file(good[32:end])), end
    assert refused(good + b"12") == (
        "the file is damaged: 2 bytes follow its end"
    )


def test_another_version():
    text = refused(b.file(b.body([b.image()]), version=7))
    assert "format version 7, and this library reads versions 1 to 2" in text
    assert "use the library of the rigl_keras that wrote the file" in text
    assert "damaged" in refused(b.file(b.body([b.image()]), version=0))
    # Earlier files are read.
    loaded(b.file(b.body([b.image()]), version=1)).close()


def test_every_bit_counts():
    good = b.network(b.image(), b.node(b.SOFTMAX, "end", (0,)))
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        refused(bytes(bad))


def test_checksums_are_those_of_zlib():
    """Any length and alignment, as the library reads eight bytes at once."""
    random.seed(0)
    for hints in range(40):
        text = random.randbytes(hints)
        data = b.network(b.image(), hints=text)
        loaded(data).close()
        struct.pack_into("<I", damaged := bytearray(data), 24, 0)
        assert "its checksum is another one" in refused(bytes(damaged))
        assert zlib.crc32(data[32:]) != 0


# Arrays. A dense layer applied to unit vectors returns the rows of its kernel.


def kernel_of(data, inputs):
    network = loaded(b.network(b.image("x", (inputs,)), data))
    return network(np.eye(inputs, dtype="f"))["y"]


@pytest.mark.parametrize("encoding", [b.PLAIN, b.BITMASK, b.GAPS])
@pytest.mark.parametrize("kept", [0.0, 0.003, 0.1, 0.9, 1.0])
def test_encodings(encoding, kept):
    rng = np.random.default_rng(round(1000 * kept))
    kernel = rng.normal(size=(37, 45)).astype("f")
    kernel *= rng.random(kernel.shape) < kept
    found = kernel_of(b.dense(kernel, encoding=encoding), 37)
    np.testing.assert_array_equal(found, kernel)


def test_encodings_at_their_ends():
    for place in (0, 7, 8, 254, 255, 256, 510, 511, 764, 765):
        kernel = np.zeros((9, 85), "f")
        kernel.flat[place % kernel.size] = 2.5
        for encoding in (b.BITMASK, b.GAPS):
            found = kernel_of(b.dense(kernel, encoding=encoding), 9)
            np.testing.assert_array_equal(found, kernel)


def test_numbers_may_be_any():
    kernel = np.array([[np.nan, np.inf], [-0.0, 1e-45]], "f")
    data = b.network(b.image("x", (1,)), b.dense(kernel[:1]))
    found = loaded(data)(np.ones((1, 1), "f"))["y"]
    np.testing.assert_array_equal(found, kernel[:1])


def with_kernel(kernel):
    return b.network(b.image("x", (8,)), b.dense(kernel))


def raw(encoding, shape, count, rest):
    return b.u32(encoding, len(shape), *shape, count) + rest


ONES = np.ones(16, "<f4").tobytes()
ARRAYS = {
    "is encoded as 3, and only 0, 1 and 2": raw(3, [8, 2], 16, ONES),
    "has 1 to 8 axes, and not 0": raw(0, [], 1, ONES),
    "has 1 to 8 axes, and not 9": raw(0, [1] * 9, 1, ONES),
    "has 1 to 8 axes, and not 4294967295": b.u32(0, 2**32 - 1, 1),
    "has 2 axes, and not the shape (16)": raw(0, [16], 16, ONES),
    "has 15 numbers where its shape is (8, 2)": raw(0, [8, 2], 15, ONES),
    "has a length of 0: (8, 0)": raw(0, [8, 0], 0, b""),
    "would have more than 2^31 - 1 numbers": raw(2, [2**16, 2**15], 0, b""),
    # Products that overflow to small numbers in 32 or 64 bits.
    "its kernel would have more": raw(2, [2**16, 2**16], 0, b""),
    "its kernel would have": raw(2, [2**22] * 6, 0, b""),
    "would have more than": raw(2, [0, 2**32 - 1, 2**31], 0, b""),
    "16777216 channels or filters": raw(2, [8, 2**25], 0, b""),
    "ends within its kernel: 4294967295 times 4 bytes": raw(
        0, [8, 2], 2**32 - 1, ONES
    ),
    "ends within its kernel: 268435456 times 1": raw(
        1, [1, 2**31 - 1], 0, b"1"
    ),
    "has 2 numbers, and its mask 3 ones": raw(
        1, [8, 2], 2, ONES[:8] + b"\x80\x03"
    ),
    "has a number at place 10, and 9 places": raw(
        1, [3, 3], 2, ONES[:8] + b"\x80\x20"
    ),
    "has a number at place 16, and 16 places": raw(
        2, [8, 2], 2, ONES[:8] + b"\x0f\x01"
    ),
    "has two numbers in one place": raw(2, [8, 2], 2, ONES[:8] + b"\x03\0"),
}


@pytest.mark.parametrize("text", ARRAYS)
def test_arrays_that_are_wrong(text):
    found = refused(with_kernel(ARRAYS[text]))
    assert text in found and found.startswith("node 1 ('dense'): "), found


# Malicious files.


def a_network():
    """Returns a network with every operation and small fields."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 2, 4)) * (rng.random((3, 3, 2, 4)) < 0.4)
    nodes = [
        b.image("x", (6, 6, 2)),
        b.convolution(kernel, bias=b.array(np.ones(4)), encoding=b.GAPS),
        b.affine(np.ones(4), np.ones(1), 1),
        b.activation(1, 2, 0.0, 6.0),
        b.convolution(np.ones((3, 3, 1, 4)), 3, groups=4, encoding=b.BITMASK),
        b.node(b.ADD, "add", (3, 4)),
        b.pool((2, 2), (2, 2), "same", 5),
        b.pool((3, 3), (1, 1), (1, 1, 1, 1), 5, maximum=0),
        b.global_pool(7, keep_axes=1),
        b.node(b.MULTIPLY, "scale", (7, 8)),
        b.node(b.SUBTRACT, "minus", (9, 5)),
        b.upsample((2, 2), 6, bilinear=1),
        b.pad((-1, 1, 2, -2), 11, 1.0),
        b.node(b.CONCATENATE, "join", (10, 12)),
        b.global_pool(13),
        b.reshape([2, 4], 14),
        b.dense(np.ones((4, 3)), 15, bias=b.array(np.ones(3))),
        b.node(b.SOFTMAX, "softmax", (16,)),
        b.dense(rng.normal(size=(3, 8)), 17),
        b.recurrent(b.LSTM, kernel.reshape(-1, 8)[:2], 18, encoding=b.BITMASK),
        b.dense(rng.normal(size=(2, 6)), 19),
        b.recurrent(
            *(b.GRU, kernel.reshape(-1, 6)[:2], 20),
            bias=b.array(np.ones(2)),
            flags=(1, 1, 1),
        ),
        b.recurrent(
            b.GRU_BEFORE, kernel.reshape(-1, 6)[2:4], 20, flags=(0, 1, 0)
        ),
    ]
    outputs = {"y": 17, "image": 13, "steps": 21, "last": 22}
    return b.body(nodes, outputs, b"hints\n")


def test_the_network_that_is_broken_below():
    network = loaded(b.file(a_network()))
    assert network.output_shapes((2, 6, 6, 2)) == [
        *((2, 2, 3), (2, 6, 6, 8), (2, 2, 2), (2, 2)),
    ]
    found = network(np.ones((2, 6, 6, 2), "f"))
    np.testing.assert_allclose(found["y"].sum(-1), 1, rtol=1e-6)


def broken(body, rng):
    """Returns a body with random changes."""
    data = bytearray(body)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(data))
        how = rng.randrange(6)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at] = rng.randrange(256)
        elif how == 2:  # a number, as most fields are
            at &= ~3
            number = rng.choice(
                [
                    0,
                    1,
                    2,
                    3,
                    255,
                    2**16,
                    2**20,
                    2**30,
                    2**31 - 1,
                    2**31,
                    2**32 - 1,
                ]
            )
            data[at : at + 4] = struct.pack("<I", number)
        elif how == 3:
            del data[at : at + rng.choice([1, 4, 8, 100])]
        elif how == 4:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 8]))
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def test_files_that_are_broken_at_random():
    """Checksums are correct, so that the whole file is read."""
    rng = random.Random(0)
    body, said, whole = a_network(), set(), 0
    for _ in range(3000):
        try:
            loaded(b.file(broken(body, rng))).close()
            whole += 1
        except ValueError as error:
            said.add(str(error).split(": ", 2)[-1])
    # Some are still valid, others give many different messages.
    assert whole > 100 and len(said) > 100


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer, turns", [("address", 300), ("thread", 40)])
@pytest.mark.parametrize("isa", ["", "avx2", "portable"])
def test_files_that_are_broken_under_sanitizers(
    sanitizer, turns, isa, tmp_path_factory, tmp_path, pytestconfig
):
    """Files that are still valid are run, with threads and plans."""
    turns *= 4 if pytestconfig.getoption("every_combination") else 1
    folder, _ = sanitized(sanitizer, common_folder(tmp_path_factory))
    (tmp_path / "body").write_bytes(a_network())
    done = subprocess.run(
        [folder / "fuzz", tmp_path / "body", str(turns)],
        capture_output=True,
        text=True,
        env={**os.environ, "RIGL_KERAS_ISA": isa},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    refused, _, run = re.findall(r"\d+", done.stdout)
    assert int(refused) > turns / 10 and int(run) > turns / 10, done.stdout
