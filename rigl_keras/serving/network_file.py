"""Converts a network to the bytes of a file, and back.

All numbers are little endian, nothing is aligned:

    0   8 bytes  "RIGLNET\\n"
    8   u32      version: 1, or 2 with recurrent nodes
    12  u32      0
    16  u64      bytes of the body
    24  u32      CRC-32 of the body
    28  u32      0
    32  body     u32 nodes, nodes, u32 outputs, outputs, hints

    string   u32 bytes, UTF-8
    shape    u32 axes, i32 lengths[axes]
    output   string name, u32 node
    padding  u32 same, i32 top, bottom, left, right
    array    u32 encoding, u32 axes, u32 lengths[axes], u32 count,
             f32 values[count], and by the encoding
               0 dense    nothing
               1 bitmask  a bit for each entry, the first the highest
               2 gaps     count bytes (`_sparse_arrays.encode`)
             Of biases, scales and shifts: dense
    node     u32 operation, string name, u32 inputs, u32 input[inputs], and
             the fields of its operation in the order of `_FIELDS`
"""

import math
import struct
import zlib

import numpy as np

from rigl_keras._sparse_arrays import cheapest_encoding, encode
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

__all__ = ["MAGIC", "VERSION", "from_bytes", "to_bytes"]

MAGIC = b"RIGLNET\n"
VERSION = 2  # the latest one
_HEADER = struct.Struct("<8sIIQII")
_ENCODINGS = ("dense", "bitmask", "gaps")  # by their numbers

# The fields of a node in a file, besides its operation, name and inputs.
_FIELDS = {
    Operation.INPUT: ("shape",),
    Operation.CONVOLUTION: (
        *("strides", "dilations", "groups"),
        *("padding", "kernel", "bias"),
    ),
    Operation.DENSE: ("kernel", "bias"),
    Operation.AFFINE: ("scale", "shift"),
    Operation.ACTIVATION: ("activation", "a", "b"),
    Operation.ADD: (),
    Operation.SUBTRACT: (),
    Operation.MULTIPLY: (),
    Operation.CONCATENATE: (),
    Operation.POOL: ("maximum", "size", "strides", "padding"),
    Operation.GLOBAL_POOL: ("maximum", "keep_axes"),
    Operation.PAD: ("padding", "a"),
    Operation.UPSAMPLE: ("factors", "bilinear"),
    Operation.RESHAPE: ("shape",),
    Operation.SOFTMAX: (),
    Operation.RECURRENT: (
        *("cell", "sequences", "backwards", "reversed"),
        *("kernel", "bias"),
    ),
}


def to_bytes(network: Network) -> bytes:
    """Returns the file of a network.

    Each array is stored dense or as its nonzero entries, whichever takes less.
    Vectors are stored dense.

    Args:
        network: The network.

    Raises:
        ValueError: It is not a network.
    """
    check_network(network)
    parts = [_u32(len(network.nodes))]
    for node in network.nodes:
        parts += [_u32(node.operation), _string(node.name)]
        parts += [_u32(len(node.inputs)), *map(_u32, node.inputs)]
        parts += [
            _WRITERS[field](getattr(node, field))
            for field in _FIELDS[node.operation]
        ]
    parts.append(_u32(len(network.outputs)))
    for output in network.outputs:
        parts += [_string(output.name), _u32(output.node)]
    parts.append(_string(network.hints))
    body = b"".join(parts)
    crc = zlib.crc32(body)
    # Earlier libraries read what has no new nodes.
    new = any(node.operation == Operation.RECURRENT for node in network.nodes)
    version = VERSION if new else 1
    return _HEADER.pack(MAGIC, version, 0, len(body), crc, 0) + body


def _u32(number):
    return struct.pack("<I", number)


def _f32(number):
    return struct.pack("<f", number)


def _i32s(*numbers):
    return struct.pack(f"<{len(numbers)}i", *numbers)


def _string(text):
    encoded = text.encode()
    return _u32(len(encoded)) + encoded


def _array(array):
    """Returns the bytes of an array of float32."""
    array = np.ascontiguousarray(array, "<f4")
    # Vectors, such as biases, gain little, and readers need all of them.
    encoding = "dense" if array.ndim == 1 else cheapest_encoding(array)
    values, positions = array, None
    if encoding != "dense":
        values, positions = encode([array], encoding)
    return b"".join(
        [
            _u32(_ENCODINGS.index(encoding)),
            _u32(array.ndim),
            *map(_u32, array.shape),
            _u32(values.size),
            values.tobytes(),
            b"" if positions is None else positions.tobytes(),
        ]
    )


_WRITERS = {
    "shape": lambda shape: _u32(len(shape)) + _i32s(*shape),
    "size": lambda pair: _i32s(*pair),
    "strides": lambda pair: _i32s(*pair),
    "dilations": lambda pair: _i32s(*pair),
    "factors": lambda pair: _i32s(*pair),
    "groups": lambda groups: _i32s(groups),
    "padding": lambda p: _u32(p.same) + _i32s(*p.numbers()),
    "kernel": _array,
    "bias": _array,
    "scale": _array,
    "shift": _array,
    "activation": _u32,
    "a": _f32,
    "b": _f32,
    "maximum": _u32,
    "keep_axes": _u32,
    "bilinear": _u32,
    "cell": _u32,
    "sequences": _u32,
    "backwards": _u32,
    "reversed": _u32,
}


def from_bytes(data: bytes) -> Network:
    """Returns the network of a file.

    Args:
        data: What `to_bytes` returned.

    Returns:
        The network, with dense arrays.

    Raises:
        ValueError: It is not such a file, has another version, or is damaged.
    """
    if len(data) < _HEADER.size or data[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"A network's file begins with {MAGIC!r}. Received: {len(data)} "
            f"bytes, beginning with {bytes(data[: len(MAGIC)])!r}."
        )
    _, version, zero, size, crc, other = _HEADER.unpack_from(data)
    if not 1 <= version <= VERSION:
        raise ValueError(
            f"The network's file must have version 1 to {VERSION}. Received: "
            f"version {version}. Export the model with this package."
        )
    body = memoryview(data)[_HEADER.size :]
    if len(body) != size or zlib.crc32(body) != crc or zero or other:
        raise ValueError(
            f"The network's file is damaged: it must hold {size} bytes with "
            f"checksum {crc:#010x}. Received: {len(body)} bytes of "
            f"{zlib.crc32(body):#010x}."
        )
    network = _Reader(body).network()
    check_network(network)
    return network


class _Reader:
    """Reads a body from its start to its end."""

    def __init__(self, body):
        self._body, self._at = body, 0

    def network(self):
        nodes = tuple(self._node() for _ in range(self._u32()))
        outputs = tuple(
            Output(self._string(), self._u32()) for _ in range(self._u32())
        )
        network = Network(nodes, outputs, self._string())
        if self._at != len(self._body):
            raise _damaged(f"{len(self._body) - self._at} bytes are left over")
        return network

    def _node(self):
        operation = self._one_of(Operation)
        name = self._string()
        inputs = tuple(self._u32() for _ in range(self._length(4)))
        fields = {f: getattr(self, f"_{f}")() for f in _FIELDS[operation]}
        return Node(operation, name, inputs, **fields)

    def _take(self, size):
        if size > len(self._body) - self._at:
            raise _damaged("it ends within a value")
        self._at += size
        return self._body[self._at - size : self._at]

    def _u32(self):
        return struct.unpack("<I", self._take(4))[0]

    def _length(self, width):
        """Returns how many items of at least `width` bytes follow."""
        length = self._u32()
        if length * width > len(self._body) - self._at:
            raise _damaged("it ends within a list")
        return length

    def _i32s(self, count):
        return struct.unpack(f"<{count}i", self._take(4 * count))

    def _string(self):
        try:
            return str(self._take(self._u32()), "utf-8")
        except UnicodeDecodeError as error:
            raise _damaged("a text is not UTF-8") from error

    def _boolean(self):
        number = self._u32()
        if number > 1:
            raise _damaged(f"a truth value is {number}")
        return bool(number)

    def _one_of(self, enumeration):
        number = self._u32()
        if number >= len(enumeration):
            raise _damaged(f"there is no {enumeration.__name__} {number}")
        return enumeration(number)

    def _array(self):
        encoding = self._u32()
        if encoding >= len(_ENCODINGS):
            raise _damaged(f"there is no encoding {encoding}")
        shape = tuple(self._u32() for _ in range(self._length(4)))
        size = math.prod(shape)
        values = np.frombuffer(self._take(4 * self._length(4)), "<f4")
        if _ENCODINGS[encoding] == "dense":
            if len(values) != size:
                raise _damaged("an array holds too many values, or too few")
            return values.astype(np.float32).reshape(shape)
        if size > 2**31:
            raise _damaged("an array holds above 2^31 values")
        if _ENCODINGS[encoding] == "bitmask":
            packed = np.frombuffer(self._take(-(-size // 8)), np.uint8)
            places = np.flatnonzero(np.unpackbits(packed))
        else:
            gaps = np.frombuffer(self._take(len(values)), np.uint8)
            places = np.cumsum(gaps, dtype=np.int64)
        rise = bool((np.diff(places) > 0).all())
        if len(places) != len(values) or not rise or (places >= size).any():
            raise _damaged("an array has values outside of it")
        array = np.zeros(size, np.float32)
        array[places] = values
        return array.reshape(shape)

    def _shape(self):
        return self._i32s(self._length(4))

    def _pair(self):
        return self._i32s(2)

    def _groups(self):
        return self._i32s(1)[0]

    def _padding(self):
        return Padding(self._boolean(), *self._i32s(4))

    def _activation(self):
        return self._one_of(Activation)

    def _cell(self):
        return self._one_of(Cell)

    def _a(self):
        return struct.unpack("<f", self._take(4))[0]

    _size = _strides = _dilations = _factors = _pair
    _kernel = _bias = _scale = _shift = _array
    _maximum = _keep_axes = _bilinear = _boolean
    _sequences = _backwards = _reversed = _boolean
    _b = _a


def _damaged(how):
    return ValueError(f"The network's file is damaged: {how}.")
