"""Networks as bytes: a small one by hand, and errors."""

import dataclasses
import struct
import zlib

import numpy as np
import pytest

from rigl_keras.serving.network import (
    Activation,
    Cell,
    Network,
    Node,
    Operation,
    Output,
    Padding,
    check_network,
)
from rigl_keras.serving.network_file import from_bytes, to_bytes


def small():
    """x [2, 2, 1] -> a convolution with one nonzero weight -> relu."""
    kernel = np.zeros((1, 3, 1, 1), np.float32)
    kernel[0, 2] = 2.0
    return Network(
        nodes=(
            Node(Operation.INPUT, "x", shape=(2, -1, 1)),
            Node(
                Operation.CONVOLUTION,
                "c",
                (0,),
                strides=(1, 2),
                padding=Padding(left=1, right=1),
                kernel=kernel,
                bias=np.array([0.5], np.float32),
            ),
            Node(
                Operation.ACTIVATION,
                "r",
                (1,),
                activation=Activation.CLIP,
                b=6.0,
            ),
        ),
        outputs=(Output("y", 2),),
    )


def words(*numbers):
    return struct.pack(f"<{len(numbers)}i", *numbers)


def test_bytes_by_hand():
    body = b"".join(
        [
            words(3),
            *(words(0, 1), b"x", words(0), words(3, 2, -1, 1)),
            *(words(1, 1), b"c", words(1, 0)),
            *(words(1, 2), words(1, 1), words(1)),  # strides, dilations, groups
            words(0, 0, 0, 1, 1),  # padding
            # One weight: its value, and a byte with its position. A bitmask is
            # as small, and is preferred.
            words(1, 4, 1, 3, 1, 1, 1) + struct.pack("<f", 2.0) + b"\x20",
            words(0, 1, 1, 1) + struct.pack("<f", 0.5),
            *(words(4, 1), b"r", words(1, 1)),
            words(1) + struct.pack("<ff", 0, 6),
            *(words(1), words(1), b"y", words(2)),
            words(0),  # no hints
        ]
    )
    header = b"RIGLNET\n" + struct.pack(
        "<IIQII", 1, 0, len(body), zlib.crc32(body), 0
    )
    assert to_bytes(small()) == header + body


def same(one, other):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype == np.float32
        else:
            assert a == b, field.name


def every_operation():
    """A network with each operation, and no field at its default."""
    draw = np.random.default_rng(0)

    def array(*shape, density=1.0):
        kept = draw.random(shape) < density
        return np.where(kept, draw.standard_normal(shape), 0).astype(np.float32)

    return Network(
        nodes=(
            Node(Operation.INPUT, "images", shape=(-1, -1, 4)),
            Node(Operation.INPUT, "zweite ü", shape=(3,)),
            Node(
                Operation.CONVOLUTION,
                "conv",
                (0,),
                strides=(2, 1),
                dilations=(1, 3),
                groups=2,
                padding=Padding(same=True),
                kernel=array(3, 5, 2, 40, density=0.01),  # gaps
                bias=array(40),
            ),
            Node(
                Operation.CONVOLUTION,
                "bits",
                (2,),
                padding=Padding(False, 1, 2, 3, 4),
                kernel=array(1, 1, 40, 4, density=0.4),
            ),
            Node(Operation.AFFINE, "", (3,), scale=array(4), shift=array(1)),
            Node(Operation.ADD, "add", (4, 3)),
            Node(Operation.SUBTRACT, "subtract", (5, 3)),
            Node(Operation.MULTIPLY, "multiply", (6, 3)),
            Node(Operation.CONCATENATE, "join", (7, 3, 7)),
            Node(
                Operation.POOL,
                "pool",
                (8,),
                maximum=True,
                size=(2, 3),
                strides=(1, 2),
                padding=Padding(top=1),
            ),
            Node(Operation.PAD, "pad", (9,), padding=Padding(left=-1), a=-2.5),
            Node(
                Operation.UPSAMPLE, "up", (10,), factors=(2, 3), bilinear=True
            ),
            Node(
                Operation.GLOBAL_POOL, "g", (11,), maximum=True, keep_axes=True
            ),
            Node(Operation.RESHAPE, "flat", (12,), shape=(-1,)),
            Node(
                Operation.DENSE,
                "dense",
                (13,),
                kernel=array(12, 3),
                bias=array(3),
            ),
            Node(
                Operation.ACTIVATION,
                "elu",
                (14,),
                activation=Activation.ELU,
                a=0.25,
            ),
            Node(Operation.SOFTMAX, "softmax", (15,)),
            Node(Operation.RESHAPE, "steps", (16,), shape=(1, 3)),
            Node(Operation.DENSE, "products", (17,), kernel=array(3, 12)),
            Node(
                Operation.RECURRENT,
                "gru",
                (18,),
                cell=Cell.GRU,
                sequences=True,
                backwards=True,
                reversed=True,
                kernel=array(4, 12, density=0.2),
                bias=array(4),
            ),
        ),
        outputs=(Output("one", 16), Output("two", 2)),
        hints="fast",
    )


def test_what_is_read_is_what_was_written():
    network = every_operation()
    assert {n.operation for n in network.nodes} == set(Operation)
    data = to_bytes(network)
    found = from_bytes(data)
    for one, other in zip(network.nodes, found.nodes, strict=True):
        same(one, other)
    assert found.outputs == network.outputs and found.hints == "fast"
    assert to_bytes(found) == data
    # Sparse kernels take 4 bytes and a bit, or 5 bytes, for each weight.
    dense = sum(n.kernel.nbytes for n in network.nodes)
    assert len(data) < dense / 2


def test_every_damaged_byte_is_found():
    data = to_bytes(small())
    for i in range(len(data)):
        broken = bytearray(data)
        broken[i] ^= 0x10
        with pytest.raises(ValueError, match="damaged|version|begins with"):
            from_bytes(bytes(broken))
        with pytest.raises(ValueError, match="damaged|begins with"):
            from_bytes(data[:i])


def test_damage_below_a_right_checksum():
    """Each byte of the body is changed once, under a correct checksum."""
    data = to_bytes(every_operation())
    draw = np.random.default_rng(0)
    read = 0
    for i in draw.integers(32, len(data), 400):
        broken = bytearray(data)
        broken[i] = draw.integers(256)
        broken[24:28] = struct.pack("<I", zlib.crc32(broken[32:]))
        try:
            check_network(from_bytes(bytes(broken)))
            read += 1
        except ValueError:
            pass
    assert 0 < read < 400


def test_another_version():
    data = bytearray(to_bytes(small()))
    data[8] = 3
    with pytest.raises(ValueError, match="version 1 to 2. Received: version 3"):
        from_bytes(bytes(data))


def test_the_version_is_as_low_as_possible():
    """Libraries that know no recurrent nodes read files without them."""
    assert to_bytes(small())[8] == 1
    assert to_bytes(every_operation())[8] == 2


@pytest.mark.parametrize(
    "cell, shape, bias, message",
    [
        (Cell.LSTM, (2, 6), 0, r"kernel \[units, 4 \* units\]"),
        (Cell.GRU, (2, 8), 0, r"kernel \[units, 3 \* units\]"),
        (Cell.GRU, (0, 0), 0, "must have a kernel"),
        (Cell.LSTM, (2, 8), 8, r"bias of one of the shapes \[\(0,\)\]"),
        (Cell.GRU, (2, 6), 6, r"shapes \[\(0,\), \(2,\)\]. Received: \(6,\)"),
    ],
)
def test_what_is_no_recurrent_node(cell, shape, bias, message):
    nodes = (
        Node(Operation.INPUT, "x", shape=(3, 8)),
        Node(
            Operation.RECURRENT,
            "loop",
            (0,),
            cell=cell,
            kernel=np.zeros(shape, np.float32),
            bias=np.zeros(bias, np.float32),
        ),
    )
    with pytest.raises(ValueError, match=message):
        to_bytes(Network(nodes, (Output("y", 1),)))


@pytest.mark.parametrize(
    "index, changes, message",
    [
        (0, {"shape": (2, 0, 1)}, "lengths of at least 1"),
        (0, {"inputs": (0,)}, "must read no nodes"),
        (1, {"inputs": ()}, "must read one node. It reads 0"),
        (1, {"inputs": (1,)}, r"must read nodes before it. It reads \[1\]"),
        (1, {"kernel": np.zeros((1, 3, 1))}, "must have a kernel"),
        (1, {"bias": np.zeros(2)}, r"must have a bias \[1\]"),
        (1, {"strides": (0, 1)}, "two strides of at least 1"),
        (1, {"groups": 2}, "1 filters and 2 groups"),
        (1, {"padding": Padding(True, 1)}, "must be padded by 0 or more"),
        (1, {"padding": Padding(left=-1)}, "must be padded by 0 or more"),
        (2, {"a": 7.0}, "must clip to a <= b"),
        (2, {"operation": Operation.ADD}, "must read two nodes"),
        (2, {"operation": Operation.POOL, "size": (0, 1)}, "two size of"),
        (
            2,
            {"operation": Operation.POOL, "padding": Padding(top=1)},
            "by less than its window",
        ),
        (2, {"operation": Operation.AFFINE}, "vector of scales"),
        (2, {"operation": Operation.RESHAPE, "shape": (-1, -1)}, "most once"),
    ],
)
def test_what_is_no_network(index, changes, message):
    network = small()
    nodes = list(network.nodes)
    nodes[index] = dataclasses.replace(nodes[index], **changes)
    with pytest.raises(ValueError, match=message):
        to_bytes(dataclasses.replace(network, nodes=tuple(nodes)))


@pytest.mark.parametrize(
    "outputs, message",
    [
        ((), "must have an output"),
        ((Output("y", 3),), "must be one of 3 nodes"),
        ((Output("y", 2), Output("y", 1)), "different names. Used twice: 'y'"),
    ],
)
def test_outputs_that_are_none(outputs, message):
    with pytest.raises(ValueError, match=message):
        to_bytes(dataclasses.replace(small(), outputs=outputs))
