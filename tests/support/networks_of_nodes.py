"""Random networks of all operations, and inputs for them."""

import numpy as np

from rigl_keras.serving.network import (
    Activation,
    Cell,
    Network,
    Node,
    Operation,
    Output,
    Padding,
)
from rigl_keras.serving.shapes import shape_of

_MOST_NUMBERS = 6000  # size of a value, which the reference computes slowly
_MOST_FLAT = 600
_MOST_CHANNELS = 40
DENSITIES = (0.0, 0.05, 0.3, 0.9, 1.0)
_BINARY = (Operation.ADD, Operation.SUBTRACT, Operation.MULTIPLY)


class _Growing:
    """A network to which random nodes are added.

    Attributes:
        nodes: The nodes so far.
        shapes: The shapes of each node, one for each size of the inputs.
    """

    def __init__(self, draw, sizes):
        self.draw, self.sizes = draw, sizes
        self.nodes, self.shapes = [], []

    def pick(self, *choices):
        return choices[self.draw.integers(len(choices))]

    def is_so(self, chance=0.5):
        return self.draw.random() < chance

    def numbers(self, low, high, count=2):
        return tuple(self.draw.integers(low, high + 1, count).tolist())

    def normal(self, *shape):
        return self.draw.standard_normal(shape).astype(np.float32)

    def value(self):
        """Returns one of the last few nodes."""
        count = len(self.nodes)
        return int(self.draw.integers(max(0, count - 3), count))

    def is_image(self, node):
        return len(self.shapes[node][0]) == 3

    def channels(self, node):
        return self.shapes[node][0][-1]

    def add(self, operation, *inputs, **fields):
        """Adds a node and returns it, or None if it would be invalid."""
        node = Node(operation, f"n{len(self.nodes)}", inputs, **fields)
        try:
            shapes = tuple(
                shape_of(node, [self.shapes[i][at] for i in inputs])
                for at in range(len(self.sizes))
            )
        except ValueError:
            return None
        if max(map(np.prod, shapes)) > _MOST_NUMBERS:
            return None
        self.nodes.append(node)
        self.shapes.append(shapes)
        return len(self.nodes) - 1

    def add_input(self, channels):
        shapes = tuple((*size, channels) for size in self.sizes)
        shape = shapes[0] if len(shapes) == 1 else (-1, -1, channels)
        self.nodes.append(
            Node(Operation.INPUT, f"n{len(self.nodes)}", shape=shape)
        )
        self.shapes.append(shapes)

    def weights(self, *shape):
        """Returns a kernel with some zero weights, or only zeros."""
        density = self.pick(*DENSITIES)
        kernel = self.normal(*shape) * (self.draw.random(shape) < density)
        fan = np.prod(shape[:-1]) * max(density, 0.01)
        return kernel.astype(np.float32) / np.float32(np.sqrt(fan))

    def bias(self, count):
        return self.normal(count if self.is_so() else 0)

    def padding(self, most):
        if self.is_so(0.6):
            return Padding(same=True)
        return Padding(False, *self.numbers(0, most, 4))

    def convolution(self, x, filters=None, size=None, **fields):
        channels = self.channels(x)
        groups = 1
        if filters is None:
            filters = int(self.draw.integers(1, _MOST_CHANNELS))
            kind = self.pick("plain", "plain", "depthwise", "grouped")
            if kind == "depthwise":
                groups, filters = channels, channels * self.pick(1, 2)
            elif kind == "grouped" and channels % 2 == 0:
                groups, filters = 2, 2 * int(self.draw.integers(1, 12))
        if not fields:
            fields = {
                "strides": self.pick((1, 1), self.numbers(1, 3)),
                "padding": self.padding(3),
            }
            if self.is_so(0.3):
                fields["dilations"] = self.numbers(1, 3)
        size = self.numbers(1, 4) if size is None else size
        return self.add(
            Operation.CONVOLUTION,
            x,
            groups=groups,
            kernel=self.weights(*size, channels // groups, filters),
            bias=self.bias(filters),
            **fields,
        )

    def affine(self, x):
        channels = self.channels(x)
        one = self.is_so(0.2)
        return self.add(
            Operation.AFFINE,
            x,
            scale=self.normal(1 if one else channels),
            shift=self.normal(channels),
        )

    def activation(self, x, kind=None):
        kind = self.pick(*Activation) if kind is None else kind
        if kind == Activation.EXPONENTIAL:  # of small numbers only
            x = self.activation(x, Activation.TANH)
        a = -0.5 if kind == Activation.CLIP else 0.3
        return self.add(Operation.ACTIVATION, x, activation=kind, a=a, b=0.7)

    def dense(self, x):
        units = int(self.draw.integers(1, 20))
        kernel = self.weights(self.channels(x), units)
        self.add(Operation.DENSE, x, kernel=kernel, bias=self.bias(units))

    def before_activation(self, x):
        """Reads the output of a convolution both as it is and normalized."""
        channels = self.channels(x)
        same = {"padding": Padding(same=True)}
        y = self.convolution(x, channels, (3, 3), **same)
        z = self.activation(self.affine(y), self.pick(*list(Activation)[:3]))
        z = self.convolution(z, channels, (1, 1), **same)
        self.add(Operation.ADD, *self.pick((y, z), (z, y)))

    def squeeze_and_excite(self, x):
        gate = self.add(
            Operation.GLOBAL_POOL, x, keep_axes=True, maximum=self.is_so()
        )
        if self.is_so(0.7):
            gate = self.convolution(
                gate, self.channels(x), (1, 1), strides=(1, 1)
            )
            gate = self.activation(gate, Activation.SIGMOID)
        operation = self.pick(*_BINARY, Operation.MULTIPLY)
        self.add(operation, *self.pick((x, gate), (gate, x)))

    def pool(self, x):
        if self.is_so():  # make all values negative
            channels = self.channels(x)
            shift = np.full(channels, -5, np.float32)
            x = self.add(
                Operation.AFFINE, x, scale=self.normal(channels), shift=shift
            )
        size = self.numbers(1, 4)
        top, left = (int(self.draw.integers(0, n)) for n in size)
        bottom, right = (int(self.draw.integers(0, n)) for n in size)
        explicit = Padding(False, top, bottom, left, right)
        self.add(
            Operation.POOL,
            x,
            size=size,
            strides=self.numbers(1, 3),
            maximum=self.is_so(0.6),
            padding=self.pick(Padding(same=True), explicit),
        )

    def global_pool(self, x):
        self.add(
            Operation.GLOBAL_POOL,
            x,
            maximum=self.is_so(),
            keep_axes=self.is_so(),
        )

    def pad(self, x):
        around = self.numbers(-1, 2, 4)
        top, bottom, left, right = (min(n, 0) for n in around)
        if any(
            rows + top + bottom < 1 or columns + left + right < 1
            for rows, columns, _ in self.shapes[x]
        ):
            return  # no pixel would be left
        self.add(
            Operation.PAD,
            x,
            padding=Padding(False, *around),
            a=self.pick(0.0, 1.5),
        )

    def upsample(self, x):
        self.add(
            Operation.UPSAMPLE,
            x,
            factors=self.numbers(1, 3),
            bilinear=self.is_so(),
        )

    def reshape(self, x):
        if len(self.sizes) > 1:
            return
        rows, columns, channels = self.shapes[x][0]
        flat = rows * columns * channels
        shapes = [(columns, -1, channels), (-1, channels), (rows, -1)]
        if flat <= _MOST_FLAT:
            shapes += [(flat,), (-1,), (1, 1, flat)]
        self.add(Operation.RESHAPE, x, shape=self.pick(*shapes))

    def binary(self, x):
        """Adds an operation on two values; one may be a single pixel."""
        of_pixel = [(1, 1, s[-1]) for s in self.shapes[x]]
        others = [
            i
            for i, shapes in enumerate(self.shapes)
            if shapes == self.shapes[x]
            or (self.is_image(x) and list(shapes) == of_pixel)
        ]
        other = self.pick(*others)
        self.add(
            self.pick(*_BINARY), *self.pick((x, other), (other, x), (x, x))
        )

    def concatenate(self, x):
        def outer(node):
            return [shape[:-1] for shape in self.shapes[node]]

        others = [i for i in range(len(self.nodes)) if outer(i) == outer(x)]
        some = [self.pick(*others) for _ in range(self.draw.integers(0, 3))]
        if self.is_so(0.3):
            some.append(x)  # the same value twice
        at = int(self.draw.integers(0, len(some) + 1))
        self.add(Operation.CONCATENATE, *some[:at], x, *some[at:])

    def recurrent(self, x):
        """Adds a loop over the pixels of an image, or over a sequence."""
        if self.is_image(x):
            shape = (-1, self.channels(x))
            x = self.add(Operation.RESHAPE, x, shape=shape)
        cell = self.pick(*Cell)
        units = int(self.draw.integers(1, 20))
        columns = cell.gates * units
        products = self.add(
            Operation.DENSE, x, kernel=self.weights(self.channels(x), columns)
        )
        if products is None or len(self.shapes[x][0]) != 2:
            return
        self.add(
            Operation.RECURRENT,
            products,
            cell=cell,
            # Small ones: errors must not grow from step to step.
            kernel=self.weights(units, columns) / np.float32(2),
            bias=self.bias(units if cell == Cell.GRU else 0),
            sequences=self.is_so(),
            backwards=self.is_so(),
            reversed=self.is_so(),
        )

    def softmax(self, x):
        # With large numbers, the softmax would depend on their last bits.
        self.add(Operation.SOFTMAX, self.activation(x, Activation.TANH))


_OF_IMAGES = (
    *(_Growing.convolution,) * 8,
    *(_Growing.before_activation,) * 2,
    *(_Growing.pool,) * 2,
    _Growing.squeeze_and_excite,
    _Growing.global_pool,
    _Growing.pad,
    _Growing.upsample,
    _Growing.reshape,
)
_OF_ALL = (
    *(_Growing.activation,) * 4,
    *(_Growing.recurrent,) * 2,
    *(_Growing.binary,) * 3,
    _Growing.affine,
    _Growing.dense,
    _Growing.concatenate,
    _Growing.softmax,
)


def random_network(seed, *, sizes=None, steps=9):
    """Returns a network with operations and weights drawn from a seed.

    Args:
        seed: The seed.
        sizes: [(rows, columns)] that inputs of free lengths must be able to
            have. None: a single size, which is drawn.
        steps: Number of operations, or small groups of them.

    Returns:
        A `Network` with one input or two. Its outputs are all nodes that no
        other reads, and some others.
    """
    draw = np.random.default_rng(seed)
    growing = _Growing(
        draw, sizes or (tuple(draw.integers(1, 21, 2).tolist()),)
    )
    channels = int(draw.integers(1, 9))
    for _ in range(growing.pick(1, 1, 2)):
        growing.add_input(channels)
    for _ in range(steps):
        x = growing.value()
        image = growing.is_image(x)
        growing.pick(*_OF_ALL, *(_OF_IMAGES if image else ()))(growing, x)
    read = {i for node in growing.nodes for i in node.inputs}
    last = len(growing.nodes) - 1
    outputs = [i for i in range(last + 1) if i not in read]
    # More outputs: perhaps an input, perhaps a node twice.
    outputs += draw.integers(0, last + 1, growing.pick(0, 1, 2)).tolist()
    return Network(
        tuple(growing.nodes),
        tuple(Output(f"output {i}", node) for i, node in enumerate(outputs)),
    )


def random_inputs(network, batch, *, size=None, seed=0):
    """Returns `{name: array}` of a network's inputs.

    Args:
        network: The network.
        batch: Number of images.
        size: Rows and columns, if they are free.
        seed: The seed.
    """
    draw = np.random.default_rng(seed)
    return {
        node.name: draw.standard_normal(
            (batch, *(size or node.shape[:2]), *node.shape[2:])
        ).astype(np.float32)
        for node in network.inputs()
    }
