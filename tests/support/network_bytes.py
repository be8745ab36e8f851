"""Writes valid and invalid files of networks, byte by byte.

It does not use rigl_keras, so that the library's writer and reader can be
compared with it.
"""

import struct
import zlib

import numpy as np

# The numbers of operations and of array encodings.
(
    INPUT,
    CONVOLUTION,
    DENSE,
    AFFINE,
    ACTIVATION,
    ADD,
    SUBTRACT,
    MULTIPLY,
    CONCATENATE,
    POOL,
    GLOBAL_POOL,
    PAD,
    UPSAMPLE,
    RESHAPE,
    SOFTMAX,
    RECURRENT,
) = range(16)
LSTM, GRU, GRU_BEFORE = range(3)
PLAIN, BITMASK, GAPS = range(3)
MOST_GAP = 255


def u32(*numbers):
    return struct.pack(f"<{len(numbers)}I", *numbers)


def i32(*numbers):
    return struct.pack(f"<{len(numbers)}i", *numbers)


def f32(*numbers):
    return struct.pack(f"<{len(numbers)}f", *numbers)


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return u32(len(data)) + data


def shape(lengths):
    return u32(len(lengths)) + i32(*lengths)


def padding(what):
    """`"same"`, or (top, bottom, left, right)."""
    return i32(1, 0, 0, 0, 0) if what == "same" else i32(0, *what)


def array(values, encoding=PLAIN):
    values = np.asarray(values, "<f4")
    head = u32(encoding, values.ndim, *values.shape)
    flat = values.ravel()
    if encoding == PLAIN:
        return head + u32(flat.size) + flat.tobytes()
    places = np.flatnonzero(flat)
    if encoding == BITMASK:
        mask = np.packbits(flat != 0).tobytes()
        return head + u32(len(places)) + flat[places].tobytes() + mask
    kept, gaps, last = [], [], 0
    for place in places:
        gap = place - last
        while gap > MOST_GAP:
            kept.append(0.0)
            gaps.append(MOST_GAP)
            gap -= MOST_GAP
        kept.append(flat[place])
        gaps.append(gap)
        last = place
    return head + u32(len(kept)) + f32(*kept) + bytes(gaps)


NO_BIAS = array(np.zeros(0))


def node(operation, name, inputs=(), fields=b""):
    return b"".join(
        [u32(operation), string(name), u32(len(inputs), *inputs), fields]
    )


def image(name="x", lengths=(4, 4, 2)):
    """An input."""
    return node(INPUT, name, (), shape(lengths))


def convolution(
    kernel,
    of=0,
    *,
    name="conv",
    strides=(1, 1),
    dilations=(1, 1),
    groups=1,
    pad="same",
    bias=NO_BIAS,
    encoding=PLAIN,
):
    """`kernel`: an array, or its bytes."""
    if not isinstance(kernel, bytes):
        kernel = array(kernel, encoding)
    fields = i32(*strides, *dilations, groups) + padding(pad) + kernel + bias
    return node(CONVOLUTION, name, (of,), fields)


def dense(kernel, of=0, *, name="dense", bias=NO_BIAS, encoding=PLAIN):
    """`kernel`: an array, or its bytes."""
    if not isinstance(kernel, bytes):
        kernel = array(kernel, encoding)
    return node(DENSE, name, (of,), kernel + bias)


def affine(scale, shift, of=0):
    return node(AFFINE, "affine", (of,), array(scale) + array(shift))


def activation(number, of=0, a=0.0, b=0.0):
    return node(ACTIVATION, "activation", (of,), u32(number) + f32(a, b))


def pool(size, strides, pad="same", of=0, maximum=1):
    fields = u32(maximum) + i32(*size, *strides) + padding(pad)
    return node(POOL, "pool", (of,), fields)


def global_pool(of=0, maximum=0, keep_axes=0):
    return node(GLOBAL_POOL, "global", (of,), u32(maximum, keep_axes))


def pad(sides, of=0, value=0.0):
    return node(PAD, "pad", (of,), padding(sides) + f32(value))


def upsample(factors, of=0, bilinear=0):
    return node(UPSAMPLE, "up", (of,), i32(*factors) + u32(bilinear))


def reshape(lengths, of=0):
    return node(RESHAPE, "reshape", (of,), shape(lengths))


def recurrent(
    cell, kernel, of=0, *, flags=(1, 0, 0), bias=NO_BIAS, encoding=PLAIN
):
    """`kernel`: an array, or its bytes."""
    if not isinstance(kernel, bytes):
        kernel = array(kernel, encoding)
    return node(RECURRENT, "loop", (of,), u32(cell, *flags) + kernel + bias)


def body(nodes, outputs=None, hints=b""):
    """`outputs`: `{name: node}`. None: the last node."""
    if outputs is None:
        outputs = {"y": len(nodes) - 1}
    parts = [u32(len(nodes)), *nodes, u32(len(outputs))]
    parts += [string(name) + u32(at) for name, at in dict(outputs).items()]
    return b"".join([*parts, string(hints)])


def file(data, *, version=2):
    """Returns the file with a body."""
    header = u32(version, 0) + struct.pack("<Q", len(data))
    return b"RIGLNET\n" + header + u32(zlib.crc32(data), 0) + data


def network(*nodes, outputs=None, hints=b""):
    """Returns the file of a network."""
    return file(body(nodes, outputs, hints))
