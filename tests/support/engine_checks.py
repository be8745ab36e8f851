"""Loads networks on the C++ engine, and compares their outputs."""

import dataclasses

import numpy as np

from rigl_keras.serving.network import Network, Node, Operation, Output, Padding
from rigl_keras.serving.network_file import to_bytes
from tests.support.network_library import loaded
from tests.support.network_reference import evaluate
from tests.support.networks_of_nodes import random_inputs

IMAGES = 35  # number of different images in a batch

# Costs that leave one way to compute a batch: images side by side, each image
# by one thread, each image by all threads, or images side by side by all
# threads. Most images of a large batch are computed side by side, at any cost.
WAYS = {
    "groups": "1e-9 1 1 1",
    "alone": "1 1e-9 1 1",
    "shared": "1 1 1e-9 1",
    "together": "0.1 1 1 1e-9",  # one thread: groups
}


def load(network, *, threads=1, hints=""):
    """Returns the engine of a network, loaded from its bytes."""
    network = dataclasses.replace(network, hints=hints)
    return loaded(to_bytes(network), threads=threads)


def check(found, expected, about=""):
    """Compares outputs, relative to the largest number of each."""
    assert list(found) == list(expected)
    for name, want in expected.items():
        got = found[name]
        assert got.shape == want.shape, (about, name)
        largest = max(np.abs(want).max(initial=0), 1e-3)
        error = np.abs(got - want).max(initial=0) / largest
        assert error < 2e-5, (about, name, error)


def first(arrays, batch):
    """Returns the first images of arrays, repeated if there are fewer."""
    return {
        name: array[np.arange(batch) % len(array)]
        for name, array in arrays.items()
    }


def a_network(channels=12, size=(9, 17), seed=3):
    """Returns a network that can be checked by hand.

    The planner may split its operations: two convolutions, a sum, and a dense
    layer.
    """
    draw = np.random.default_rng(seed)

    def kernel(*shape):
        kept = draw.random(shape) < 0.4
        values = draw.standard_normal(shape) * kept / np.sqrt(shape[2])
        return values.astype(np.float32)

    same = Padding(same=True)
    nodes = (
        Node(Operation.INPUT, "x", shape=(*size, 3)),
        Node(
            Operation.CONVOLUTION,
            "c1",
            (0,),
            kernel=kernel(3, 3, 3, channels),
            padding=same,
        ),
        Node(Operation.ACTIVATION, "r1", (1,)),
        Node(
            Operation.CONVOLUTION,
            "c2",
            (2,),
            kernel=kernel(3, 3, channels, channels),
            strides=(2, 2),
            padding=same,
        ),
        Node(Operation.ACTIVATION, "r2", (3,)),
        Node(
            Operation.CONVOLUTION,
            "c3",
            (4,),
            kernel=kernel(3, 3, channels, channels),
            padding=same,
        ),
        Node(Operation.ADD, "sum", (4, 5)),
        Node(Operation.GLOBAL_POOL, "pool", (6,)),
        Node(
            Operation.DENSE,
            "d",
            (7,),
            kernel=kernel(1, 1, channels, 10)[0, 0],
            bias=np.arange(10, dtype=np.float32),
        ),
    )
    return Network(nodes, (Output("y", 8), Output("features", 6)))


def computed_network():
    """Returns `a_network`, its inputs and its outputs."""
    network = a_network()
    inputs = random_inputs(network, IMAGES)
    return network, inputs, evaluate(network, inputs)
