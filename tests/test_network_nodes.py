"""Nodes, shapes and outputs in files of networks, valid and wrong."""

import random

import numpy as np
import pytest
import tensorflow as tf

from tests.support import network_bytes as b
from tests.support.network_library import (
    built,  # noqa: F401 - a fixture
    loaded,
    refused,
)

KERNEL = np.arange(1, 37, dtype="f").reshape(3, 3, 2, 2)
NO_INPUT = "the network has no input"


def raw(encoding, shape, count, rest):
    return b.u32(encoding, len(shape), *shape, count) + rest


def one(*nodes, **settings):
    """Returns a network on images of 4 x 4 pixels with two channels."""
    return b.network(b.image(), *nodes, **settings)


def convolved(**settings):
    return one(b.convolution(KERNEL, **settings))


LSTM = np.ones((2, 8), "f")


def looped(cell, kernel, **settings):
    sequences = b.image("x", (4, 8))
    return b.network(sequences, b.recurrent(cell, kernel, **settings))


FREE = b.image("x", (-1, -1, -1))
NODES = {
    # Nodes, their inputs and names.
    "the file announces 65537 nodes": b.file(b.u32(65537)),
    NO_INPUT: b.network(outputs={"y": 0}),
    "its operation is 16, and this library knows 0 to 15": one(b.node(16, "n")),
    "its name has a NUL": b.network(b.image("a\0b")),
    "input has no name": b.network(b.image("")),
    "two inputs have the name 'x'": one(b.image()),
    "the network has no output": one(outputs={}),
    "output has no name": one(outputs={"": 0}),
    "the name of an output has a NUL": one(outputs={"\0": 0}),
    "output 'y' is of node 1, and the network has 1": one(outputs={"y": 1}),
    "output 'y' is of node 4294967295": one(outputs={"y": 2**32 - 1}),
    "3 bytes follow the hints": b.file(b.body([b.image()]) + b"abc"),
    "it has 0 inputs, and needs 1": one(b.node(b.SOFTMAX, "s")),
    "it has 1 inputs, and needs 0": one(
        b.node(b.INPUT, "i", (0,), b.shape([1]))
    ),
    "it has 3 inputs, and needs 2": one(b.node(b.ADD, "a", (0, 0, 0))),
    "it has 0 inputs, and needs 1 or more": one(b.node(b.CONCATENATE, "c")),
    "it reads node 1, which does not come before": one(
        b.node(b.SOFTMAX, "s", (1,))
    ),
    "it reads node 4294967295": one(b.node(b.SOFTMAX, "s", (2**32 - 1,))),
    "ends within its inputs: 1073741824 times 4": b.file(
        b.u32(1, b.CONCATENATE) + b.string("c") + b.u32(2**30)
    ),
    # Shapes.
    "has 8 axes beside the batch, and at most 7": b.network(
        b.image("x", [1] * 8)
    ),
    "a length of 0: lengths are at least 1": b.network(b.image("x", [0])),
    "a length of -2": b.network(b.image("x", [-2])),
    "input 'x' would have the shape (2147483647, 2)": b.network(
        b.image("x", [2**31 - 1, 2])
    ),
    "has more than one free length": one(b.reshape([-1, -1])),
    # Convolutions.
    "each of its strides is 1 to 1048576, and not 0": convolved(strides=(1, 0)),
    "each of its strides is 1 to 1048576, and not -1": convolved(
        strides=(-1, 1)
    ),
    "each of its dilations is 1 to 1048576, and not 1048577": convolved(
        dilations=(1, 2**20 + 1)
    ),
    "its 0 groups do not divide its 2 filters": convolved(groups=0),
    "its -1 groups do not": convolved(groups=-1),
    "its 3 groups do not divide its 2 filters": convolved(groups=3),
    "in 2 groups needs 4 channels, and its input has 2": convolved(groups=2),
    "its padding is 0 to 1048576, and not -1": convolved(pad=(0, -1, 0, 0)),
    "its padding is 0 to 1048576, and not 1048577": convolved(
        pad=(0, 0, 2**20 + 1, 0)
    ),
    "its padding is `same` and has a width": one(
        b.convolution(KERNEL).replace(b.padding("same"), b.i32(1, 0, 0, 0, 1))
    ),
    "whether its padding is `same` is 0 or 1, and not 2": one(
        b.convolution(KERNEL).replace(b.padding("same"), b.i32(2, 0, 0, 0, 0))
    ),
    "its kernel has 4 axes, and not the shape (3, 3, 4)": one(
        b.convolution(KERNEL.reshape(3, 3, 4))
    ),
    "more than 1048576 rows or columns": one(
        b.convolution(raw(b.GAPS, [1, 2**20 + 1, 2, 1], 0, b""))
    ),
    "its bias has 3 numbers, and its kernel 2 filters": convolved(
        bias=b.array(np.ones(3))
    ),
    "its bias is a dense vector, and not sparse": convolved(
        bias=b.array(np.ones(2), b.BITMASK)
    ),
    "its bias is a dense vector, and not of shape (1, 2)": convolved(
        bias=b.array(np.ones((1, 2)))
    ),
    "needs an image": b.network(b.image("x", (4, 2)), b.convolution(KERNEL)),
    "its window of 7 does not fit into the 4 rows or columns": convolved(
        pad=(0, 0, 0, 0), dilations=(1, 3)
    ),
    "its input with its padding would have the shape": convolved(
        dilations=(2**20, 2**20)
    ),
    # Other operations.
    "its kernel of shape (3, 2) needs 3 channels": one(
        b.dense(np.ones((3, 2)))
    ),
    "it needs channels, and its input has no axis": b.network(
        b.image("x", ()), b.dense(np.ones((1, 2)))
    ),
    "its scale has 2 numbers and its shift 3": one(
        b.affine(np.ones(2), np.ones(3))
    ),
    "its scale has 0 numbers and its shift 2": one(
        b.affine(np.ones(0), np.ones(2))
    ),
    "it scales and shifts 3 channels": one(b.affine(np.ones(3), np.ones(1))),
    "its scale is a dense vector": one(b.affine(np.ones((2, 1)), np.ones(2))),
    "its activation is 14, and this library knows 0 to 13": one(
        b.activation(14)
    ),
    "whether it takes the maximum is 0 or 1, and not 2": one(
        b.pool((2, 2), (2, 2), maximum=2)
    ),
    "each of its window sizes is 1 to 1048576, and not 0": one(
        b.pool((2, 0), (2, 2))
    ),
    "its window has more than 1048576 pixels": one(
        b.pool((1025, 1024), (2, 2))
    ),
    "its padding is as wide as its window": one(
        b.pool((2, 2), (2, 2), (1, 1, 1, 2))
    ),
    "its window of 5 does not fit": one(b.pool((5, 5), (1, 1), (0, 0, 0, 0))),
    "whether it keeps its axes is 0 or 1": one(b.global_pool(keep_axes=7)),
    "what pads alone cannot pad as `same`": one(b.pad("same")),
    "it crops all of the 4 rows": one(b.pad((-2, -2, 0, 0))),
    "it crops all of the 4": one(b.pad((-4, 100, 0, 0))),
    "its padding is -1048576 to 1048576": one(b.pad((2**20 + 1, 0, 0, 0))),
    "its output would have the shape": one(b.upsample((2**20, 2**20))),
    "each of its factors is 1 to 1048576, and not 0": one(b.upsample((0, 1))),
    "whether it is bilinear is 0 or 1": one(
        b.upsample((1, 1), bilinear=-1 % 9)
    ),
    # Recurrent nodes, on sequences of 4 steps.
    "its cell is 3, and this library knows 0 to 2": looped(3, LSTM),
    "whether it returns sequences is 0 or 1": looped(0, LSTM, flags=(2, 0, 0)),
    "whether it goes backwards is 0 or 1": looped(0, LSTM, flags=(0, 2, 0)),
    "whether its outputs are reversed is 0": looped(0, LSTM, flags=(0, 0, 9)),
    "its kernel of shape (2, 8) is none of units and 3 gates": looped(1, LSTM),
    "its kernel of shape (2, 6) is none of units and 4": looped(0, LSTM[:, :6]),
    "its kernel of shape (8) is none of units": looped(0, LSTM[0]),
    "its bias has 8 numbers, and its cell has none": looped(
        0, LSTM, bias=b.array(np.ones(8))
    ),
    "its bias has 6 numbers, and its units are 2": looped(
        1, LSTM[:, :6], bias=b.array(np.ones(6))
    ),
    "its bias has 2 numbers, and its cell has none": looped(
        2, LSTM[:, :6], bias=b.array(np.ones(2))
    ),
    "it needs a sequence (steps, 6), and its input has the shape (4, 8)": (
        looped(1, LSTM[:, :6])
    ),
    "it needs a sequence (steps, 8), and its input has the shape (1, 4, 8)": (
        b.network(b.image("x", (1, 4, 8)), b.recurrent(0, LSTM))
    ),
    "(4, 4, 2) cannot be given the shape (31)": one(b.reshape([31])),
    "(4, 4, 2) cannot be given the shape (-1, 5)": one(b.reshape([-1, 5])),
    "shapes (4, 4, 2) and (32)": one(
        b.reshape([32]), b.node(b.ADD, "a", (0, 1))
    ),
    "they must be equal, or one of them an image of one pixel": one(
        b.pad((1, 0, 0, 0)), b.node(b.MULTIPLY, "a", (0, 1))
    ),
    "(1, 1, 1) and (4, 4, 2)": b.network(
        b.image("a", (1, 1, 1)), b.image(), b.node(b.ADD, "a", (0, 1))
    ),
    "its inputs 0 and 1 have the shapes (4, 4, 2) and (5, 4, 2)": one(
        b.pad((1, 0, 0, 0)), b.node(b.CONCATENATE, "c", (0, 1))
    ),
    "which differ before the last axis": one(
        b.reshape([32]), b.node(b.CONCATENATE, "c", (0, 1))
    ),
}


@pytest.mark.parametrize("text", NODES)
def test_networks_that_are_wrong(text):
    assert text in refused(NODES[text])


def test_a_message_names_the_node():
    """A message names the node, however long and strange its name is."""
    name = "line\nbreak\x1b[31m" + 100 * "é"
    text = refused(one(b.dense(np.ones((3, 2)), name=name)))
    assert text.startswith("node 1 ('line?break?[31m??") and len(text) < 250


def test_shapes_that_are_free():
    """Shapes that do not depend on a free length are checked at the load."""
    text = refused(
        b.network(
            FREE,
            b.convolution(KERNEL),
            b.pool((2, 2), (2, 2), of=1),
            b.dense(np.ones((3, 2)), 2),
        )
    )
    assert "node 3 ('dense')" in text and "(-1, -1, 2)" in text
    network = loaded(
        b.network(
            FREE,
            b.convolution(KERNEL, strides=(2, 2)),
            b.global_pool(1),
            b.upsample((2, 3), 1),
            b.reshape([-1, 2], 3),
            outputs={"a": 1, "b": 2, "c": 3, "d": 4},
        )
    )
    assert network.inputs[0].shape == (None,) * 4
    assert [v.shape for v in network.outputs] == [
        (None, None, None, 2),
        (None, 2),
        (None, None, None, 2),
        (None, None, 2),
    ]
    assert network.output_shapes((5, 7, 4, 2)) == [
        (5, 4, 2, 2),
        (5, 2),
        (5, 8, 6, 2),
        (5, 48, 2),
    ]
    # The other shapes are checked in a call.
    with pytest.raises(ValueError, match=r"node 1 \('conv'\).* has 3"):
        network.output_shapes((5, 7, 4, 3))


def test_of_two_images_one_may_be_a_pixel():
    pixel, other = b.image("p", (1, 1, 2)), b.image("x", (-1, 3, 2))
    for inputs in ((0, 1), (1, 0)):
        network = loaded(
            b.network(pixel, other, b.node(b.MULTIPLY, "m", inputs))
        )
        assert network.outputs[0].shape == (None, None, 3, 2)
        found = network.output_shapes((2, 1, 1, 2), (2, 5, 3, 2))
        assert found == [(2, 5, 3, 2)]
    # A free length may be a single pixel.
    network = loaded(
        b.network(
            b.image("a", (-1, -1, 2)),
            b.image("b", (-1, 1, 2)),
            b.node(b.ADD, "s", (0, 1)),
        )
    )
    assert network.output_shapes((1, 1, 1, 2), (1, 4, 1, 2)) == [(1, 4, 1, 2)]
    assert network.output_shapes((1, 3, 4, 2), (1, 1, 1, 2)) == [(1, 3, 4, 2)]
    with pytest.raises(ValueError, match="must be equal"):
        network.output_shapes((1, 3, 4, 2), (1, 3, 1, 2))


def test_shapes_are_tensorflows():
    rng = random.Random(1)
    checked = set()
    for _ in range(300):
        rows, columns = rng.randint(1, 12), rng.randint(1, 12)
        size = rng.randint(1, 5), rng.randint(1, 5)
        strides = rng.randint(1, 4), rng.randint(1, 4)
        dilations = rng.choice([(1, 1), (2, 1), (3, 2)])
        how = rng.choice(["same", "valid", "explicit"])
        sides = [0] * 4 if how != "explicit" else rng.choices(range(3), k=4)
        pooled = rng.random() < 0.3 and how != "explicit"
        if pooled:
            data = b.pool(size, strides, "same" if how == "same" else sides)
        else:
            data = b.convolution(
                np.ones((*size, 2, 3)),
                strides=strides,
                dilations=dilations,
                pad="same" if how == "same" else sides,
            )
        with tf.Graph().as_default():
            x = tf.zeros((1, rows, columns, 2))
            padded = how.upper()
            if how == "explicit":
                t, d, l, r = sides  # noqa: E741
                padded = [[0, 0], [t, d], [l, r], [0, 0]]
            try:
                if pooled:
                    y = tf.nn.max_pool2d(x, size, strides, padded)
                else:
                    kernel = tf.zeros((*size, 2, 3))
                    y = tf.nn.conv2d(
                        x, kernel, strides, padded, dilations=dilations
                    )
                expected = tuple(y.shape)
            except ValueError:
                expected = None
        data = b.network(b.image("x", (rows, columns, 2)), data)
        if expected is None or 0 in expected:
            assert "does not fit" in refused(data)
        else:
            with loaded(data) as network:
                found = network.output_shapes((1, rows, columns, 2))
            assert found == [expected], (rows, columns, size, strides, how)
        checked.add((pooled, how, expected is None or 0 in expected))
    assert len(checked) >= 8
