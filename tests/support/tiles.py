"""Calls the kernels of a served network (`serving/csrc/tiles.h`).

The structures have the fields of the header. NumPy arrays replace pointers.
"""

import concurrent.futures
import ctypes
import functools
import os
import pathlib

import numpy as np
import pytest

from rigl_keras.kernels import toolchain

CSRC = pathlib.Path(toolchain.__file__).parents[1] / "serving" / "csrc"
DRIVER = pathlib.Path(__file__).parents[1] / "data" / "tiles_driver.cc"
# The instruction sets and vector lengths for which tiles.cc is compiled.
VARIANTS = (("avx512", 16), ("avx512", 8), ("avx2", 8), ("portable", 4))

_i32, _i64, _f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_pointer = ctypes.c_void_p


class Field(ctypes.Structure):
    _fields_ = [
        ("data", _pointer),
        ("plane", _i64),
        ("pitch", _i64),
        ("channels", _i32),
        ("rows", _i32),
        ("cells", _i32),
        ("last", _i32),
    ]


class Epilogue(ctypes.Structure):
    _fields_ = [
        ("scale", _pointer),
        ("shift", _pointer),
        ("other", Field),
        ("combine", ctypes.c_char),
        ("other_is_pixel", ctypes.c_bool),
        ("act", _i32),
        ("a", _f32),
        ("b", _f32),
        ("to", Field),
        ("to2", Field),
        ("scale2", _pointer),
        ("shift2", _pointer),
        ("act2", _i32),
        ("a2", _f32),
        ("b2", _f32),
    ]


class Convolution(ctypes.Structure):
    _fields_ = [
        ("in_", _pointer),
        ("in_pitch", _i64),
        ("in_step", _i64),
        ("entries", _pointer),
        ("rows", _pointer),
        ("offsets", _pointer),
        ("dense_blocks", _pointer),
        ("weights", _pointer),
        ("inputs", _i32),
        ("in_plane", _i64),
        ("row_pitch", _i64),
        ("every_other", ctypes.c_bool),
        ("blocks", _i32),
        ("channels", _i32),
        ("bias", _pointer),
        ("out_rows", _i32),
        ("out_cells", _i32),
        ("out_last", _i32),
        ("tile", _i32 * 2),
        ("after", Epilogue),
    ]


class Part(ctypes.Structure):
    _fields_ = [
        ("row_begin", _i32),
        ("row_end", _i32),
        ("channel_begin", _i32),
        ("channel_end", _i32),
    ]


class Pool(ctypes.Structure):
    _fields_ = [
        ("in_", _pointer),
        ("in_plane", _i64),
        ("in_pitch", _i64),
        ("in_step", _i64),
        ("offsets", _pointer),
        ("count", _i32),
        ("maximum", ctypes.c_bool),
        ("factors", _pointer),
        ("out_rows", _i32),
        ("out_cells", _i32),
        ("out_last", _i32),
        ("after", Epilogue),
    ]


# An entry: a weight and its offset.
ENTRY = np.dtype([("offset", np.int32), ("weight", np.float32)])


def _function(*arguments):
    return ctypes.CFUNCTYPE(None, *arguments)


def _to(structure):
    return ctypes.POINTER(structure)


class Tiles(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("length", _i32),
        ("registers", _i32),
        ("most_rows", _i32),
        ("most_cells", _i32),
        ("is_compiled", ctypes.CFUNCTYPE(ctypes.c_bool, _i32, _i32)),
        ("panel", _i32),
        ("dense_cells", _i32),
        ("sparse", _function(_to(Convolution), _to(Part), _pointer)),
        ("dense", _function(_to(Convolution), _to(Part), _pointer)),
        ("depthwise", _function(_to(Convolution), _to(Part), _pointer)),
        (
            "finish",
            _function(
                _to(Epilogue),
                _pointer,
                _i32,
                _i32,
                _i32,
                _i32,
                _i32,
                _i32,
                _i32,
            ),
        ),
        ("elementwise", _function(_to(Field), _to(Epilogue), _i32, _i32)),
        ("pool", _function(_to(Pool), _i32, _i32)),
        (
            "global_pool",
            _function(
                _to(Field),
                ctypes.c_bool,
                ctypes.c_bool,
                _i32,
                _to(Epilogue),
                _i32,
                _i32,
            ),
        ),
        (
            "pack",
            _function(
                _pointer,
                _i64,
                _i32,
                ctypes.c_bool,
                _i32,
                _i32,
                _to(Field),
                _i32,
                _i32,
            ),
        ),
        (
            "unpack",
            _function(
                _to(Field),
                _pointer,
                _i64,
                _i32,
                ctypes.c_bool,
                _i32,
                _i32,
                _i32,
                _i32,
            ),
        ),
    ]


STRUCTURES = (Field, None, Epilogue, Convolution, Part, Pool, Tiles)


@functools.cache
def build(folder):
    """Compiles the kernels, once in each process, and returns their library."""
    folder.mkdir(exist_ok=True)
    compiler, _ = toolchain.find_compiler()
    # Without optimization, which takes several times as long.
    common = ["-std=c++17", "-O0", "-fPIC", "-Wall", "-Werror"]
    common += ["-fvisibility=hidden", f"-I{CSRC}"]
    variants = VARIANTS[-1:]
    if os.uname().machine in ("x86_64", "AMD64"):
        common.append("-DRIGL_X86=1")
        variants = VARIANTS
    jobs = {
        "driver.o": [DRIVER],
        "tiles_of.o": [CSRC / "tiles_of.cc"],
    }
    for name, length in variants:
        flags = toolchain._INSTRUCTION_SETS[name]
        jobs[f"{name}_{length}.o"] = [
            CSRC / "tiles.cc",
            f"-DRIGL_ISA={name}",
            f"-DRIGL_LENGTH={length}",
            *flags,
        ]
    commands = [
        [*compiler, *common, *map(str, arguments), "-c", "-o", made]
        for made, arguments in jobs.items()
    ]
    library = folder / "tiles.so"

    def run(command):
        done = toolchain.run_compiler(command, folder)
        if done.returncode:
            raise RuntimeError(done.stdout)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(run, commands))
    run([*compiler, "-shared", *jobs, "-o", str(library)])
    loaded = ctypes.CDLL(str(library))
    loaded.tiles_of.restype = ctypes.POINTER(Tiles)
    return loaded


def kernels_of(library, name, length, monkeypatch):
    """Returns the kernels of an instruction set; skips a test without them."""
    monkeypatch.setenv("RIGL_KERAS_ISA", name)
    found = library.tiles_of(length)
    if not found or found.contents.name.decode() != name:
        pytest.skip(f"this processor has no {name}")
    return found.contents


def pointer(array):
    """Returns the address of an array, or null for None."""
    return None if array is None else array.ctypes.data


class Plane:
    """A field of random numbers, and all the memory around it.

    Attributes:
        memory: One-dimensional. The margins are 0 in a field to read, and
            `untouched` in a field to write.
        cells: A view of it, [channels, rows, cells, L].
        field: The structure for the kernels.
    """

    untouched = np.float32(77.25)

    def __init__(self, length, channels, rows, cells, last=None, *, rng=None):
        last = length if last is None else last
        margin = 4 * length
        self.pitch = cells * length + margin
        self.plane = (rows + 6) * self.pitch + length
        self.begin = 3 * self.pitch + 2 * length
        size = channels * self.plane + self.pitch + length
        whole = np.empty(size + 16, np.float32)
        skipped = -whole.ctypes.data // 4 % 16
        self.memory = whole[skipped : skipped + size]
        self.memory[:] = self.untouched if rng is None else 0
        self.cells = np.lib.stride_tricks.as_strided(
            self.memory[self.begin :],
            (channels, rows, cells, length),
            (4 * self.plane, 4 * self.pitch, 4 * length, 4),
        )
        if rng is not None:
            self.cells[:] = rng.standard_normal(self.cells.shape)
            self.cells[:, :, -1, last:] = 0
        self.size = channels * rows * cells * length
        self.field = Field(
            pointer(self.memory) + 4 * self.begin,
            self.plane,
            self.pitch,
            channels,
            rows,
            cells,
            last,
        )

    def around(self):
        """Returns the memory with zeros in all cells."""
        kept = self.memory.copy()
        np.lib.stride_tricks.as_strided(
            kept[self.begin :], self.cells.shape, self.cells.strides
        )[:] = 0
        return kept
