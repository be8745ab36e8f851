"""The kernels of a served network that are no convolutions, against NumPy.

Each is tested for each instruction set of this processor.
"""

import ctypes
import math

import numpy as np
import pytest
from support import tiles as support
from support.epilogues import (
    CLIP,
    ELU,
    EPILOGUES,
    GELU_TANH,
    HARD_SIGMOID,
    HARD_SILU,
    LEAKY,
    RELU,
    After,
    activation,
    aligned,
    generator,
)
from support.tiles import Epilogue, Plane, pointer


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return support.build(tmp_path_factory.getbasetemp() / "tiles")


@pytest.fixture(params=support.VARIANTS, ids="{0[0]}-{0[1]}".format)
def tiles(request, library, monkeypatch):
    return support.kernels_of(library, *request.param, monkeypatch)


def test_the_structures_are_those_of_the_header(library):
    sizes = np.zeros(len(support.STRUCTURES), np.int64)
    library.sizes(ctypes.c_void_p(pointer(sizes)))
    described = [
        ctypes.sizeof(s) if s else support.ENTRY.itemsize
        for s in support.STRUCTURES
    ]
    assert list(sizes) == described


def test_which_kernels_there_are(library, monkeypatch):
    monkeypatch.setenv("RIGL_KERAS_ISA", "portable")
    assert library.tiles_of(0).contents.name == b"portable"
    assert library.tiles_of(4).contents.length == 4
    assert not library.tiles_of(16)
    monkeypatch.delenv("RIGL_KERAS_ISA")
    widest = library.tiles_of(0).contents
    monkeypatch.setenv("RIGL_KERAS_ISA", "no such thing")
    assert library.tiles_of(0).contents.name == widest.name
    lengths = [
        n for name, n in support.VARIANTS if name == widest.name.decode()
    ]
    assert widest.length == max(lengths)
    for length in lengths:
        assert library.tiles_of(length).contents.length == length


@pytest.mark.parametrize("asked", EPILOGUES)
def test_an_epilogue_alone(tiles, asked):
    rng = generator(5)
    for cells, last in ((1, 1), (5, tiles.length), (37, 2)):
        field = Plane(tiles.length, 4, 3, cells, last, rng=rng)
        after = After(rng, field.cells.shape, last, **asked)
        tiles.elementwise(field.field, after.struct, 1, 3)
        after.check(field.cells, channels=slice(1, 3))


def test_an_epilogue_of_sums(tiles):
    # Channels [1, 3) of a tile of two rows.
    shape = (3, 4, 5, tiles.length)
    after = After(generator(6), shape, 2, other="+", act=RELU)
    memory = aligned(2 * 2 * 5 * tiles.length).reshape(-1)
    sums = memory[: 20 * tiles.length].reshape(2, 2, 5, tiles.length)
    expected = generator(7).standard_normal(shape).astype(np.float32)
    sums[:] = expected[1:, 1:3]
    tiles.finish(after.struct, pointer(sums), 1, 3, 1, 0, 2, 5, 2)
    after.check(expected, slice(1, 3), slice(1, 3))


def test_a_field_changes_in_place(tiles):
    field = Plane(tiles.length, 2, 3, 20, 3, rng=generator(6))
    expected = np.maximum(field.cells, 0)
    after = Epilogue(combine=b"+", act=RELU, to=field.field, act2=-1)
    tiles.elementwise(field.field, after, 0, 2)
    np.testing.assert_array_equal(field.cells, expected)
    assert not np.any(field.around())


SPECIAL = [0.0, 1e-40, 1e-30, 1e-8, 1e-4, 0.1, 0.34, 0.35, 0.5, 1, 1.4142135]
SPECIAL += [1.5, 2, 3, 5, 10, 15, 20, 30, 87, 88, 88.7, 100, 1e4, 1e30]
SPECIAL += [math.inf]


def activated(tiles, x, act, a=0.0, b=0.0):
    """Returns the activation of an array of any length."""
    cells = -(-len(x) // tiles.length)
    field = Plane(tiles.length, 1, 1, cells, rng=generator(0))
    flat = np.zeros(cells * tiles.length, np.float32)
    flat[: len(x)] = x
    field.cells[:] = flat.reshape(field.cells.shape)
    to = Plane(tiles.length, 1, 1, cells)
    tiles.elementwise(
        field.field,
        Epilogue(combine=b"+", act=act, a=a, b=b, to=to.field, act2=-1),
        0,
        1,
    )
    return to.cells.reshape(-1)[: len(x)]


@pytest.mark.parametrize("act", range(14))
def test_activations(tiles, act):
    a, b = {CLIP: (-2.0, 6.0), LEAKY: (0.2, 0), ELU: (1.5, 0)}.get(act, (0, 0))
    special = np.array([*SPECIAL, *(-x for x in SPECIAL)], np.float32)
    x = np.concatenate(
        [
            special,
            np.linspace(-12, 12, 2001, dtype=np.float32),
            np.geomspace(1e-6, 88, 500).astype(np.float32),
            -np.geomspace(1e-6, 88, 500).astype(np.float32),
        ]
    )
    found = activated(tiles, x, act, a, b)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = activation(x, act, a, b)
        # Infinite in float32.
        expected = expected.astype(np.float32).astype(np.float64)
    # Tolerances where float32 errors of the argument exceed those of the
    # function.
    tiny = {GELU_TANH: 2e-7, HARD_SIGMOID: 1e-7, HARD_SILU: 1e-6}.get(act, 0)
    np.testing.assert_allclose(
        found, expected, rtol=4e-7, atol=max(tiny, 3e-38), equal_nan=True
    )


@pytest.mark.parametrize("act", range(-1, 14))
def test_a_nan_stays_one(tiles, act):
    assert np.all(np.isnan(activated(tiles, [math.nan] * 3, act, -1.0, 1.0)))


@pytest.mark.parametrize("maximum", (False, True))
def test_windows(tiles, maximum):
    length = tiles.length
    rng = generator(7)
    for rows, cells, last, step in ((1, 1, 1, 1), (3, 5, 2, 1), (2, 20, 1, 2)):
        field = Plane(length, 3, 2 * rows + 1, step * cells + 1, rng=rng)
        after = After(
            rng,
            (3, rows, cells, length),
            last,
            act=RELU,
        )
        offsets = [0, 1, field.pitch, field.pitch + 1, 2 * field.pitch - 1]
        offsets = np.array(offsets, np.int32)
        factors = rng.random((rows, cells, length)).astype(np.float32)
        pool = support.Pool(
            field.field.data,
            field.plane,
            2 * field.pitch,
            step * length,
            pointer(offsets),
            len(offsets),
            maximum,
            None if maximum else pointer(factors),
            rows,
            cells,
            last,
            after.struct,
        )
        tiles.pool(pool, 1, 3)
        places = (
            np.arange(3)[:, None, None, None, None] * field.plane
            + np.arange(rows)[:, None, None, None] * (2 * field.pitch)
            + np.arange(cells)[:, None, None] * (step * length)
            + np.arange(length)[:, None]
            + offsets
        )
        read = field.memory[field.begin + places].astype(np.float64)
        expected = read.max(-1) if maximum else read.sum(-1) * factors
        after.check(expected, channels=slice(1, 3))


@pytest.mark.parametrize("positions", (False, True))
@pytest.mark.parametrize("maximum", (False, True))
def test_all_of_an_image_in_one_cell(tiles, maximum, positions):
    length = tiles.length
    rng = generator(8)
    for rows, columns in ((1, 1), (4, 3), (3, 2 * length + 1)):
        cells = -(-columns // length) if positions else columns
        last = columns - (cells - 1) * length if positions else length
        field = Plane(length, 3, rows, cells, last, rng=rng)
        # All negative, so the zeros of the margin must not be the largest.
        field.cells[:] = np.where(field.cells, -1 - abs(field.cells), 0)
        after = After(rng, (3, 1, 1, length), length, affine=True)
        tiles.global_pool(
            field.field, maximum, positions, columns, after.struct, 1, 3
        )
        if positions:
            pixels = field.cells.reshape(3, rows, -1)[:, :, :columns]
            pixels = np.repeat(pixels[..., None], length, -1)
        else:
            pixels = field.cells
        reduced = np.max if maximum else np.mean
        expected = reduced(pixels.astype(np.float64), axis=(1, 2))
        after.check(expected[:, None, None], channels=slice(1, 3))


@pytest.mark.parametrize("channels", (1, 3, 4, 7, 16, 35))
def test_packing_of_images(tiles, channels):
    length = tiles.length
    rng = generator(9)
    for columns in (1, 5, 16):
        for count in (1, length - 1, length):
            images = rng.standard_normal((count, 4, columns, channels + 1))
            images = images.astype(np.float32)[..., :channels].copy()
            to = Plane(length, channels, 4, columns)
            numbers = 4 * columns * channels
            tiles.pack(
                pointer(images),
                numbers,
                count,
                False,
                columns,
                channels,
                to.field,
                1,
                4,
            )
            expected = np.zeros((channels, 4, columns, length), np.float32)
            expected[..., :count] = images.transpose(3, 1, 2, 0)
            expected[:, 0] = Plane.untouched
            np.testing.assert_array_equal(to.cells, expected)
            around = to.around()
            assert np.count_nonzero(around == 0) == to.size
            back = np.full((count, numbers + 3), 5, np.float32)
            tiles.unpack(
                to.field,
                pointer(back),
                numbers + 3,
                count,
                False,
                columns,
                channels,
                1,
                4,
            )
            assert np.all(back[:, numbers:] == 5)
            back = back[:, :numbers].reshape(images.shape)
            assert np.all(back[:, 0] == 5)
            np.testing.assert_array_equal(back[:, 1:], images[:, 1:])


@pytest.mark.parametrize("channels", (1, 3, 4, 7, 16, 35))
def test_packing_of_positions(tiles, channels):
    length = tiles.length
    rng = generator(10)
    sizes = (2, length - 1, length, 2 * length + 1)
    for columns in sizes:
        cells = -(-columns // length)
        last = columns - (cells - 1) * length
        image = rng.standard_normal((4, columns, channels)).astype(np.float32)
        to = Plane(length, channels, 4, cells, last)
        tiles.pack(
            pointer(image), 0, 1, True, columns, channels, to.field, 1, 4
        )
        expected = np.zeros((channels, 4, cells * length), np.float32)
        expected[..., :columns] = image.transpose(2, 0, 1)
        expected[:, 0] = Plane.untouched
        np.testing.assert_array_equal(
            to.cells.reshape(channels, 4, -1), expected
        )
        assert np.count_nonzero(to.around() == 0) == to.size
        back = np.full_like(image, 5)
        tiles.unpack(
            to.field, pointer(back), 0, 1, True, columns, channels, 1, 4
        )
        assert np.all(back[0] == 5)
        np.testing.assert_array_equal(back[1:], image[1:])


def test_a_pixel_fills_its_cell(tiles):
    pixel = generator(11).standard_normal(5).astype(np.float32)
    to = Plane(tiles.length, 5, 1, 1)
    tiles.pack(pointer(pixel), 0, 1, True, 1, 5, to.field, 0, 1)
    expected = np.repeat(pixel[:, None], tiles.length, 1)
    np.testing.assert_array_equal(to.cells[:, 0, 0], expected)
    back = np.zeros_like(pixel)
    tiles.unpack(to.field, pointer(back), 0, 1, True, 1, 5, 0, 1)
    np.testing.assert_array_equal(back, pixel)
