"""The convolutions of a served network, against NumPy.

Each is tested for each instruction set of this processor.
"""

import numpy as np
import pytest
from support import tiles as support
from support.epilogues import EPILOGUES, PLAIN, After, aligned, generator
from support.tiles import Convolution, Part, Plane, pointer


@pytest.fixture(params=support.VARIANTS, ids="{0[0]}-{0[1]}".format)
def tiles(request, tmp_path_factory, monkeypatch):
    library = support.build(tmp_path_factory.getbasetemp() / "tiles")
    return support.kernels_of(library, *request.param, monkeypatch)


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
