"""The kernels of a served network, compared with NumPy.

Each is tested for each instruction set of this processor.
"""

import ctypes
import math

import numpy as np
import pytest
from support import tiles as support
from support.tiles import Convolution, Epilogue, Field, Part, Plane, pointer

RELU, CLIP, LEAKY, ELU, SIGMOID, TANH, SILU, GELU = range(8)
GELU_TANH, HARD_SIGMOID, HARD_SILU, SOFTPLUS, SELU, EXPONENTIAL = range(8, 14)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return support.build(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(params=support.VARIANTS, ids="{0[0]}-{0[1]}".format)
def tiles(request, library, monkeypatch):
    name, length = request.param
    monkeypatch.setenv("RIGL_KERAS_ISA", name)
    found = library.tiles_of(length)
    if not found or found.contents.name.decode() != name:
        pytest.skip(f"this processor has no {name}")
    return found.contents


def generator(*seed):
    return np.random.default_rng(seed)


# The activations, in float64.
def _expm1_below_0(x):
    return np.expm1(np.minimum(x, 0))


def _erfc(x):
    return np.vectorize(math.erfc, otypes=[float])(x)


def activation(x, act, a=0.0, b=0.0):
    x = np.asarray(x, np.float64)
    if act == -1:
        return x
    with np.errstate(all="ignore"):
        sigmoid = 1 / (1 + np.exp(-x))
        hard = np.clip(x / 6 + 0.5, 0, 1)
        cubic = x + 0.044715 * x**3
        alpha, scale = 1.6732632423543772, 1.0507009873554805
        return {
            RELU: lambda: np.maximum(x, 0),
            CLIP: lambda: np.minimum(np.maximum(x, a), b),
            LEAKY: lambda: np.where(x < 0, a * x, x),
            ELU: lambda: np.where(x < 0, a * _expm1_below_0(x), x),
            SIGMOID: lambda: sigmoid,
            TANH: lambda: np.tanh(x),
            SILU: lambda: x * sigmoid,
            GELU: lambda: x * _erfc(-x / math.sqrt(2)) / 2,
            GELU_TANH: lambda: (
                x / (1 + np.exp(-math.sqrt(8 / math.pi) * cubic))
            ),
            HARD_SIGMOID: lambda: hard,
            HARD_SILU: lambda: x * hard,
            SOFTPLUS: lambda: np.logaddexp(x, 0),
            SELU: lambda: scale * np.where(x < 0, alpha * _expm1_below_0(x), x),
            EXPONENTIAL: lambda: np.exp(x),
        }[act]()


class After:
    """A random epilogue, and a reference of it.

    Args:
        shape: [channels, rows, cells, L] of its numbers.
    """

    def __init__(self, rng, shape, last, **asked):
        channels, rows, cells, length = shape
        asked = {
            "affine": False,
            "other": None,
            "act": -1,
            "a": 0.0,
            "b": 0.0,
            "to": True,
            "to2": False,
            "affine2": True,
            "act2": -1,
            **asked,
        }
        self.asked, self.last = asked, last

        def vector(wanted):
            if not wanted:
                return None
            return rng.standard_normal(channels).astype(np.float32)

        self.scale, self.shift = (
            vector(asked["affine"]),
            vector(asked["affine"]),
        )
        self.scale2, self.shift2 = (
            vector(asked["affine2"]),
            vector(asked["affine2"]),
        )
        self.other = None
        kind = asked["other"]  # one of + - *, with `.` for a single pixel
        if kind:
            size = (1, 1) if "." in kind else (rows, cells)
            self.other = Plane(length, channels, *size, rng=rng)
        self.planes = [
            Plane(length, channels, rows, cells, last) if wanted else None
            for wanted in (asked["to"], asked["to2"])
        ]
        none = Field()
        self.struct = Epilogue(
            pointer(self.scale),
            pointer(self.shift),
            self.other.field if self.other else none,
            (kind or "+")[0].encode(),
            bool(kind) and "." in kind,
            asked["act"],
            asked["a"],
            asked["b"],
            *[plane.field if plane else none for plane in self.planes],
            pointer(self.scale2),
            pointer(self.shift2),
            asked["act2"],
            0.0,
            0.0,
        )

    def check(self, x, rows=slice(None), channels=slice(None), **tolerance):
        """Compares the written numbers with the reference for `x`."""
        x = np.asarray(x, np.float64)

        def by_channel(v):
            return v[:, None, None, None]

        if self.scale is not None:
            x = x * by_channel(self.scale) + by_channel(self.shift)
        if self.other is not None:
            sign = self.asked["other"][0]
            with_ = self.other.cells
            x = {"+": np.add, "-": np.subtract, "*": np.multiply}[sign](
                x, with_
            )
        y = activation(x, self.asked["act"], self.asked["a"], self.asked["b"])
        y[:, :, -1, self.last :] = 0
        z = y
        if self.scale2 is not None:
            z = y * by_channel(self.scale2) + by_channel(self.shift2)
        z = activation(z, self.asked["act2"])
        z[:, :, -1, self.last :] = 0
        tolerance = {"rtol": 2e-5, "atol": 2e-5, **tolerance}
        for plane, expected in zip(self.planes, (y, z), strict=True):
            if plane is None:
                continue
            # Margins and other parts must not be written.
            full = np.full(plane.cells.shape, Plane.untouched, np.float64)
            full[channels, rows] = expected[channels, rows]
            np.testing.assert_allclose(plane.cells, full, **tolerance)
            around = plane.around()
            assert set(np.unique(around)) <= {0, Plane.untouched}
            assert np.count_nonzero(around == 0) == plane.size


PLAIN = {"act": RELU}
EPILOGUES = (
    {},
    PLAIN,
    {"act": CLIP, "a": -0.5, "b": 0.75},
    {"other": "+", "act": RELU},
    {"other": "+", "to2": True, "act2": RELU},
    {"other": "+", "to": False, "to2": True, "act2": RELU},
    {"act": RELU, "to2": True},
    {"to": False, "to2": True, "affine2": False, "act2": RELU},
    {"affine": True, "act": RELU},
    {"affine": True, "other": "-", "act": TANH, "to2": True, "act2": SIGMOID},
    {"other": "*", "act": LEAKY, "a": 0.25},
    {"other": "*."},
    {"other": "+.", "act": ELU, "a": 1.5},
)


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


def convolution(
    rng,
    length,
    tile,
    out,
    *,
    last,
    blocks,
    step,
    inputs,
    row_step=1,
    number_step=1,
    **asked,
):
    """Returns a random convolution without weights, and its reference.

    The numbers of a cell read inputs that are `number_step` apart.

    Returns:
        The structure; the arrays that it needs; and a function from weights
        [channels, inputs] and an offset for each input to the outputs,
        [channels, rows, cells, L].
    """
    channels, rows, cells = out
    memory = Plane(length, 3, 2 * rows + 4, step * cells + 2, rng=rng)
    bias = rng.standard_normal(channels).astype(np.float32)
    after = After(rng, (channels, rows, cells, length), last, **asked)
    k = Convolution(
        memory.field.data,
        row_step * memory.pitch,
        step * length,
        bias=pointer(bias),
        blocks=blocks,
        channels=channels,
        out_rows=rows,
        out_cells=cells,
        out_last=last,
        tile=tile,
        after=after.struct,
    )
    # Offsets reach into margins, and are not multiples of the vector length.
    offsets = (
        rng.integers(0, 3, inputs) * memory.plane
        + rng.integers(-2, 3, inputs) * memory.pitch
        + rng.integers(-length, length + 1, inputs)
    ).astype(np.int32)

    def computed(weights):
        places = memory.begin + (
            offsets[:, None, None, None]
            + (np.arange(rows) * row_step * memory.pitch)[:, None, None]
            + (np.arange(cells) * step * length)[:, None]
            + np.arange(length) * number_step
        )
        read = memory.memory[places].astype(np.float64)
        sums = np.tensordot(weights.astype(np.float64), read, 1)
        return sums + bias[:, None, None, None]

    return k, (memory, bias, after), offsets, computed


def aligned(floats):
    return Plane(16, 1, 1, floats // 16 + 1).cells


def run_sparse(tiles, rng, tile, out, *, blocks=1, part=None, **asked):
    channels, rows, _ = out
    inputs = 12
    k, kept, offsets, computed = convolution(
        rng, tiles.length, tile, out, blocks=blocks, inputs=inputs, **asked
    )
    weights = rng.standard_normal((channels, inputs)).astype(np.float32)
    weights *= rng.random(weights.shape) < 0.4  # some channels have none
    entries, ends = [], [0]
    for block in np.array_split(np.arange(inputs), blocks):
        for weight in weights:
            entries += [(offsets[i], weight[i]) for i in block if weight[i]]
            ends.append(len(entries))
    entries = np.array([*entries, (0, 0)], support.ENTRY)
    ends = np.array(ends, np.int32)
    k.entries, k.rows = pointer(entries), pointer(ends)
    part = part or (0, rows, 0, channels)
    scratch = aligned(channels * tile[0] * tile[1] * tiles.length)
    tiles.sparse(k, Part(*part), pointer(scratch))
    kept[-1].check(computed(weights), slice(*part[:2]), slice(*part[2:]))


def shapes_of_tiles(tiles):
    return [
        (r, c)
        for r in range(1, tiles.most_rows + 1)
        for c in range(1, tiles.most_cells + 1)
        if r * c <= tiles.registers
    ]


def test_a_sparse_convolution_with_every_tile(tiles):
    for tile in shapes_of_tiles(tiles):
        rng = generator(*tile)
        # A whole tile, and partial ones in both directions.
        out = (3, tile[0] + int(rng.integers(3)), tile[1] + rng.integers(3))
        run_sparse(
            tiles,
            rng,
            tile,
            tuple(map(int, out)),
            blocks=int(rng.integers(1, 4)),
            last=int(rng.integers(1, tiles.length + 1)),
            step=int(rng.integers(1, 3)),
            **EPILOGUES[int(rng.integers(4))],
        )


@pytest.mark.parametrize("rows", (1, 2, 3, 5, 7, 9))
def test_a_sparse_convolution_of_any_size(tiles, rows):
    for cells in range(1, 12):
        rng = generator(rows, cells)
        tile = tiles.registers // 4, 4
        run_sparse(tiles, rng, tile, (2, rows, cells), blocks=2, last=1, step=1)


@pytest.mark.parametrize("blocks", (1, 3))
@pytest.mark.parametrize("asked", EPILOGUES)
def test_what_follows_a_convolution(tiles, asked, blocks):
    for last in (1, tiles.length):
        run_sparse(
            tiles,
            generator(last),
            (2, 3),
            (5, 5, 7),
            last=last,
            step=1,
            blocks=blocks,
            **asked,
        )
        run_dense(
            tiles,
            generator(last),
            (1, 2),
            (tiles.panel + 1, 3, 5),
            last=last,
            step=1,
            blocks=blocks,
            **asked,
        )


@pytest.mark.parametrize("blocks", (1, 2))
def test_a_part_of_a_sparse_convolution(tiles, blocks):
    run_sparse(
        tiles,
        generator(blocks),
        (2, 2),
        (6, 7, 3),
        part=(1, 4, 2, 5),
        last=2,
        step=1,
        blocks=blocks,
        **PLAIN,
    )


def run_dense(tiles, rng, tile, out, *, blocks=1, part=None, **asked):
    channels, rows, _ = out
    inputs, panel = 9, tiles.panel
    k, kept, offsets, computed = convolution(
        rng, tiles.length, tile, out, blocks=blocks, inputs=inputs, **asked
    )
    weights = rng.standard_normal((channels, inputs)).astype(np.float32)
    panels = -(-channels // panel)
    padded = np.zeros((panels * panel, inputs), np.float32)
    padded[:channels] = weights
    packed = padded.reshape(panels, panel, inputs).transpose(0, 2, 1).copy()
    ends = np.cumsum([0, *map(len, np.array_split(offsets, blocks))])
    ends = ends.astype(np.int32)
    k.offsets, k.dense_blocks = pointer(offsets), pointer(ends)
    k.weights, k.inputs = pointer(packed), inputs
    part = part or (0, rows, 0, channels)
    sums = panels * panel * tile[0] * tile[1]
    scratch = aligned(sums * tiles.length)
    tiles.dense(k, Part(*part), pointer(scratch))
    kept[-1].check(computed(weights), slice(*part[:2]), slice(*part[2:]))


def test_a_dense_convolution_with_every_tile(tiles):
    most = tiles.dense_cells
    for rows in range(1, most + 1):
        for cells in range(1, most // rows + 1):
            rng = generator(rows, cells)
            for channels in (1, tiles.panel, 5 * tiles.panel - 1):
                run_dense(
                    tiles,
                    rng,
                    (rows, cells),
                    (channels, rows + 1, 2 * cells + 1),
                    blocks=int(rng.integers(1, 4)),
                    last=int(rng.integers(1, tiles.length + 1)),
                    step=int(rng.integers(1, 3)),
                    **PLAIN,
                )


def test_a_part_of_a_dense_convolution(tiles):
    run_dense(
        tiles,
        generator(1),
        (1, 2),
        (4 * tiles.panel, 4, 3),
        part=(1, 3, tiles.panel, 3 * tiles.panel),
        blocks=2,
        last=tiles.length,
        step=1,
    )


def run_depthwise(
    tiles, rng, out, *, part=None, dilation=1, every_other=False, **asked
):
    """Rows of the window are `dilation` input rows apart."""
    if every_other:
        asked = {"step": 2, "number_step": 2, **asked}
    channels, rows, _ = out
    k, kept, offsets, computed = convolution(
        rng, tiles.length, (1, 1), out, blocks=1, inputs=9 * channels, **asked
    )
    memory = kept[0]
    columns = rng.integers(-tiles.length, tiles.length + 1, 3)
    if every_other:
        columns = columns[0] + np.arange(3)
        k.every_other = True
    k.row_pitch = dilation * memory.pitch
    taps = np.add.outer(np.arange(3) * k.row_pitch, columns).reshape(-1)
    taps -= memory.pitch
    offsets[:] = np.add.outer(np.arange(channels) * memory.plane, taps).flat
    weights = rng.standard_normal((channels, 9)).astype(np.float32)
    first_row = taps[:3].astype(np.int32)
    k.offsets, k.weights = pointer(first_row), pointer(weights)
    k.in_plane = memory.plane
    part = part or (0, rows, 0, channels)
    tiles.depthwise(k, Part(*part), None)
    of_all = np.einsum("oi,oc->oci", weights, np.eye(channels))
    kept[-1].check(
        computed(of_all.reshape(channels, -1)),
        slice(*part[:2]),
        slice(*part[2:]),
    )


@pytest.mark.parametrize("cells", range(1, 8))
def test_a_depthwise_convolution(tiles, cells):
    rng = generator(cells)
    for rows in (1, 2, 5):
        last = int(rng.integers(1, tiles.length + 1))
        run_depthwise(tiles, rng, (3, rows, cells), last=last, step=1, **PLAIN)
        run_depthwise(tiles, rng, (2, rows, cells), last=last, step=2)
        run_depthwise(
            tiles, rng, (3, rows, cells), dilation=2, last=last, step=1
        )


@pytest.mark.parametrize("cells", range(1, 6))
def test_a_depthwise_convolution_of_every_other_column(tiles, cells):
    rng = generator(cells)
    for rows, row_step in ((1, 2), (2, 2), (5, 2), (3, 1)):
        last = int(rng.integers(1, tiles.length + 1))
        options = {"every_other": True, "last": last, "row_step": row_step}
        run_depthwise(tiles, rng, (3, rows, cells), **options, **PLAIN)
        run_depthwise(tiles, rng, (2, rows, cells), **options)
        part = (rows // 2, rows, 1, 3)
        run_depthwise(tiles, rng, (3, rows, cells), part=part, **options)


@pytest.mark.parametrize("asked", EPILOGUES)
def test_what_follows_a_depthwise_convolution(tiles, asked):
    run_depthwise(tiles, generator(2), (3, 2, 3), last=2, step=1, **asked)


def test_a_part_of_a_depthwise_convolution(tiles):
    run_depthwise(
        tiles, generator(3), (3, 6, 3), part=(1, 4, 1, 3), last=3, step=1
    )


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
