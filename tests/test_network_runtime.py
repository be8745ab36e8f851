"""The Python loader, which needs only NumPy, and the C functions."""

import copy
import ctypes.util
import gc
import math
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from rigl_keras.serving import runtime
from tests.support import network_bytes as b
from tests.support.network_library import (
    built,  # noqa: F401 - a fixture
    loaded,
    path,
)
from tests.support.threads import in_threads

SOURCES = pathlib.Path(runtime.__file__).with_name("csrc")
# Inputs x [3 x 4 pixels, 2 channels] and "an image/of one pixel"; outputs
# x * 2 * other, and the largest number of each channel.
TWO = b.network(
    b.image("x", (3, 4, 2)),
    b.image("an image/of one pixel", (1, 1, 2)),
    b.affine(np.array([2.0]), np.array([0.0])),
    b.node(b.MULTIPLY, "product", (2, 1)),
    b.global_pool(0, maximum=1),
    outputs={"scaled": 3, "self": 4},
)
# Any number of rows of three channels: a dense layer and its sum.
FREE = b.network(
    b.image("self", (-1, 3)),
    b.dense(np.array([[1.0, 0], [0, 2], [0, 0]]), bias=b.array([0.5, 0])),
)
OTHER = "an image/of one pixel"


def images(batch=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, 3, 4, 2)).astype("f")
    return x, rng.normal(size=(batch, 1, 1, 2)).astype("f")


@pytest.fixture
def two():
    with loaded(TWO) as network:
        yield network


@pytest.fixture
def free():
    with loaded(FREE) as network:
        yield network


def test_what_goes_in_and_comes_out(two):
    assert two.inputs == (
        ("x", (None, 3, 4, 2)),
        (OTHER, (None, 1, 1, 2)),
    )
    assert two.outputs == (
        ("scaled", (None, 3, 4, 2)),
        ("self", (None, 2)),
    )
    assert two.inputs[0].name == "x"
    assert two.instruction_set in ("avx512", "avx2", "portable")


@pytest.mark.parametrize("batch", [1, 2, 19])
def test_a_call(two, batch):
    x, other = images(batch)
    found = two(x, other)
    assert list(found) == ["scaled", "self"]
    np.testing.assert_allclose(found["scaled"], 2 * x * other, rtol=1e-6)
    np.testing.assert_array_equal(found["self"], x.max((1, 2)))
    for again in (
        list(two(x, **{OTHER: other}).values()),
        list(two(**{OTHER: other, "x": x}).values()),
        two.run([x, other]),
        two.run((x, other)),
        two.run({OTHER: other, "x": x}),
    ):
        for one, value in zip(again, found.values(), strict=True):
            np.testing.assert_array_equal(one, value)
            assert one.dtype == np.float32 and one.flags.owndata


def test_a_name_of_pythons_own(free):
    np.testing.assert_array_equal(
        free(self=np.ones((1, 2, 3), "f"))["y"], [[[1.5, 2], [1.5, 2]]]
    )


def test_free_lengths_and_no_sample(free):
    for batch, rows in ((1, 1), (3, 2), (2, 5), (0, 2)):
        x = np.arange(batch * rows * 3, dtype="f").reshape(batch, rows, 3)
        found = free(x)["y"]
        expected = np.stack([x[..., 0] + 0.5, 2 * x[..., 1]], -1)
        np.testing.assert_array_equal(found, expected)
        assert free.output_shapes(x.shape) == [(batch, rows, 2)]
    assert free.outputs[0].shape == (None, None, 2)


def test_more_shapes_than_are_kept(free):
    for rows in (*range(1, 90), 1):
        assert free(np.ones((1, rows, 3), "f"))["y"].shape == (1, rows, 2)


def test_arrays_of_any_order_and_place(two):
    x, other = images()
    expected = two.run([x, other])
    memory = np.zeros(4 * x.size + 1, np.uint8)
    unaligned = memory[1:].view("<f4").reshape(x.shape)
    unaligned[...] = x
    fixed = x.copy()
    fixed.flags.writeable = False
    backwards = x[::-1, :, ::-1].copy()[::-1, :, ::-1]
    for same in (np.asfortranarray(x), unaligned, fixed, backwards):
        before = same.copy()
        found = two.run([same, other])
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(same, before)


X, PIXEL = images()
CALLS = {
    "the network has 2 inputs: 'x' (?, 3, 4, 2), 'an image": [X] * 3,
    "is missing. The network has 2 inputs": [X],
    "no input 'y', but 2 inputs: 'x'": {"x": X, "y": X},
    "input 'x' is missing": {OTHER: PIXEL},
    "input 'x' must be float32. Received: float64. Convert it": [
        X.astype("f8"),
        PIXEL,
    ],
    "must be float32. Received: int64": [X, np.ones((2, 1, 1, 2), int)],
    "must be float32. Received: >f4": [X.astype(">f4"), PIXEL],
    "must be float32. Received: object": [None, PIXEL],
    "must have the shape (?, 3, 4, 2). Received: (3, 4, 2)": [X[0], PIXEL],
    "must have the shape (?, 3, 4, 2). Received: ()": [np.float32(1), PIXEL],
    "must have the shape (?, 3, 4, 2). Received: (2, 4, 3, 2)": [
        X.swapaxes(1, 2),
        PIXEL,
    ],
    "must have one batch size, their first axis. Received: (2, 3, 4, 2), (1": [
        X,
        PIXEL[:1],
    ],
}


@pytest.mark.parametrize("text", CALLS)
def test_calls_that_are_wrong(two, text):
    with pytest.raises(ValueError) as error:
        two.run(CALLS[text])
    assert text in str(error.value)


def test_more_calls_that_are_wrong(two, free):
    x, other = images()
    with pytest.raises(ValueError, match="'x' is given twice: by position"):
        two(x, x=x)
    with pytest.raises(ValueError, match="must be a list of arrays.*ndarray"):
        two.run(x)
    with pytest.raises(ValueError, match=r"needed for each of 2 inputs.*: 1"):
        two.output_shapes((1, 3, 4, 2))
    with pytest.raises(ValueError, match="1 or more"):
        free(np.ones((2, 0, 3), "f"))
    with pytest.raises(ValueError, match="0 or more"):
        free.output_shapes((-1, 2, 3))
    with pytest.raises(ValueError, match=r"\(\?, \?, 3\). Received: \(1, 3\)"):
        free.profile((1, 3))


def test_threads_is_a_number():
    for threads in (-1, 1025, 1.0, "2", None, True, 2**32):
        with pytest.raises(ValueError, match=r"threads must be an int, 0 to"):
            loaded(FREE, threads=threads)


def test_a_library_that_is_missing_or_another(tmp_path, monkeypatch):
    def fails(match, library):
        with pytest.raises(ValueError, match=match):
            runtime.Network.from_bytes(FREE, library=library)

    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    fails("rigl_keras_network.so' is missing. Copy it from", None)
    fails("/none.so' cannot be loaded: .*No such file", tmp_path / "none.so")
    (tmp_path / "text.so").write_text("text")
    fails("text.so' cannot be loaded: ", tmp_path / "text.so")
    if sys.platform == "linux":
        code = bytearray(path().read_bytes())
        code[18:20] = b"\xf3\x00"  # RISC-V, in the header of an ELF file
        (tmp_path / "riscv.so").write_bytes(code)
        fails(
            "riscv.so' cannot be loaded: .*Export the model on one of this",
            tmp_path / "riscv.so",
        )
    other = ctypes.util.find_library("m")
    if other and sys.platform == "linux":
        # A name without a folder would be searched in the system's folders.
        monkeypatch.chdir(tmp_path)
        fails(f"{tmp_path}/{other}' cannot be loaded", other)
    import _ctypes

    fails("has no function rigl_network_load: it is another", _ctypes.__file__)


def test_a_file(tmp_path):
    name = tmp_path / "é network.rigl"
    name.write_bytes(FREE)
    for given in (name, str(name), bytes(name)):
        with runtime.Network(given, library=path()) as network:
            assert repr(network) == f"Network({str(name)!r})"
            assert network(np.ones((1, 1, 3), "f"))["y"][0, 0, 0] == 1.5
    name.write_bytes(FREE[:40])
    for given, why in (
        (name, "network.rigl' cannot be loaded: the file is cut off"),
        (tmp_path / "none", "none' cannot be loaded: .*No such file"),
        (tmp_path, "cannot be loaded: .* is not a regular file"),
        ("/dev/null", "cannot be loaded: .* is not a regular file"),
        ("a\0b", r"must not have a NUL. Received: 'a\\x00b'"),
    ):
        with pytest.raises(ValueError, match=why):
            runtime.Network(given, library=path())


CUT = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
from runtime import Network

path, library = sys.argv[2:]
whole = open(path, "rb").read()
done = threading.Event()

def cut():
    while not done.is_set():
        os.truncate(path, 4096)
        with open(path, "r+b") as file:
            file.write(whole)

cutting = threading.Thread(target=cut)
cutting.start()
said = set()
for _ in range(100):
    try:
        Network(path, library=library, threads=1).close()
    except ValueError as error:
        said.add(str(error))
done.set()
cutting.join()
print(*said, sep=chr(10))
"""


def test_a_file_that_is_cut_while_it_loads(tmp_path):
    """It is an error. With a mapped file, the process would end (SIGBUS)."""
    draw = np.random.default_rng(0)
    kernel = draw.standard_normal((500, 1000)).astype("f")
    file = tmp_path / "network.rigl"
    file.write_bytes(b.network(b.image("x", (500,)), b.dense(kernel)))
    done = subprocess.run(
        [sys.executable, "-c", CUT, SOURCES.parent, file, path()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert re.search("is cut off|has become shorter|is damaged", done.stdout)


def test_a_file_without_a_network_is_not_read(tmp_path):
    """It is not read, however large: this one is a sparse file of 64 GB."""
    file = tmp_path / "network.rigl"
    file.write_bytes(b"RIGLNET\n")
    os.truncate(file, 2**36)
    with pytest.raises(ValueError, match="cannot be loaded: .*is damaged"):
        runtime.Network(file, library=path())


def test_names_that_are_no_text():
    """Names need not be UTF-8, but differ and can be used."""
    data = b.network(b.node(b.INPUT, b"\xff", (), b.shape([1])))
    with loaded(data) as network:
        (value,) = network.inputs
        found = network(**{value.name: np.ones((1, 1), "f")})
        assert found["y"] == 1 and value.name.encode(
            errors="surrogateescape"
        ) == (b"\xff")


def test_closed(two):
    x, other = images()
    two(x, other)
    two.close()
    two.close()
    for use in (
        lambda: two(x, other),
        lambda: two.output_shapes(x.shape, other.shape),
        lambda: two.tune(x.shape, other.shape),
        lambda: two.profile(x.shape, other.shape),
        two.hints,
    ):
        with pytest.raises(
            ValueError, match=r"network '<\d+ bytes>' is closed"
        ):
            use()
    assert repr(two).endswith("closed)")
    assert two.inputs[0].name == "x"


def test_it_is_freed_without_close(monkeypatch):
    freed = []
    network = loaded(FREE)
    free = network._c["free"]
    monkeypatch.setitem(network._c, "free", lambda n: freed.append(free(n)))
    del network
    gc.collect()
    assert freed == [None]


def test_neither_copied_nor_pickled(two):
    for make in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="Load it in the other process"):
            make(two)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_callers(threads):
    network = loaded(TWO, threads=threads)

    def call(seed):
        for batch in (1, 2, 33, 5, 17):
            x, other = images(batch, seed)
            found = network(x, other)
            np.testing.assert_allclose(
                found["scaled"], 2 * x * other, rtol=1e-6
            )
            np.testing.assert_array_equal(found["self"], x.max((1, 2)))

    calls = [lambda seed=seed: call(seed) for seed in range(6)]
    shapes = [array.shape for array in images(2)]
    calls.insert(3, lambda: network.tune(*shapes, seconds=0.02))
    assert in_threads(calls) == []


def test_closed_while_it_runs():
    """Running calls end normally, and later calls are refused."""
    network = loaded(TWO, threads=2)
    x, other = images(40)
    started = threading.Barrier(4)
    done = []

    def call():
        started.wait()
        while True:
            done.append(len(network(x, other)["self"]))

    def close():
        started.wait()
        while len(done) < 30:
            pass
        network.close()

    raised = in_threads([call, call, call, close])
    assert len(raised) == 3 and set(done) == {40}
    assert all("is closed" in str(error) for error in raised)


def test_arguments_that_are_missing_in_c(free):
    """Each is an error with a message, and none ends the process."""
    shapes = (ctypes.c_int64 * 3)(1, 2, 3)
    place = (ctypes.c_int64 * 3)()
    x = (ctypes.c_float * 6)()
    arrays = (ctypes.POINTER(ctypes.c_float) * 1)(x)
    missing = (ctypes.POINTER(ctypes.c_float) * 1)()
    network = free._network
    for function, arguments, said in (
        ("run", (None, arrays, shapes, arrays), "the network is missing"),
        ("run", (network, None, shapes, arrays), "the inputs are missing"),
        ("run", (network, missing, shapes, arrays), "one of the inputs"),
        ("run", (network, arrays, shapes, missing), "one of the outputs"),
        ("output_shapes", (network, shapes, None), "the place for shapes"),
        ("output_shapes", (None, shapes, place), "the network is missing"),
        ("tune", (network, shapes, math.inf), "seconds must be from 0"),
        ("tune", (network, shapes, math.nan), "seconds must be from 0"),
    ):
        given = [
            ctypes.cast(a, taken) if isinstance(a, ctypes.Array) else a
            for a, taken in zip(
                arguments, runtime._FUNCTIONS[function][1], strict=False
            )
        ]
        failed, error = free._ask(function, *given)
        assert failed and said in error
    assert free._c["input_count"](None) == 0
    assert free._c["output_count"](None) == 0


def test_tuned(tmp_path):
    network = loaded(FREE, threads=2)
    x = np.ones((4, 8, 3), "f")
    before = network(x)["y"]
    network.tune(x.shape, seconds=0.05)
    np.testing.assert_array_equal(network(x)["y"], before)
    hints = network.hints()
    # A file keeps the hints, and wrong hints do no harm.
    body = b.body([b.image("self", (-1, 3)), b.dense(np.eye(3)[:, :2])])
    for text in (hints, "nonsense", hints[:-3] + "999999999 -1 0\n" * 3):
        data = b.file(body.removesuffix(b.u32(0)) + b.string(text))
        np.testing.assert_array_equal(loaded(data)(x)["y"], x[..., :2])
    assert "dense" in network.profile(x.shape)


STANDS_ALONE = """
import sys
sys.modules.update(tensorflow=None, keras=None, rigl_keras=None)
sys.path.insert(0, sys.argv[1])
import numpy as np
from runtime import Network
with Network(sys.argv[1] + "/network.rigl") as network:
    print(network(np.ones((1, 1, 3), "f"))["y"].tolist())
"""


def test_it_stands_alone(tmp_path):
    """It needs only a copy of itself, the library and a file."""
    folder = tmp_path / "exported folder"
    folder.mkdir()
    (folder / "network.rigl").write_bytes(FREE)
    shutil.copy(runtime.__file__, folder)
    shutil.copy(path(), folder)
    done = subprocess.run(
        [sys.executable, "-c", STANDS_ALONE, folder],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout == "[[[1.5, 2.0]]]\n", done.stderr


def test_functions_are_those_of_the_header():
    """Each has as many parameters as in the header."""
    text = (SOURCES / "rigl_network.h").read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    declared = {
        name: 0 if takes == "void" else takes.count(",") + 1
        for name, takes in re.findall(r"rigl_network_(\w+)\(([^)]*)\)", text)
    }
    known = {name: len(f[1]) for name, f in runtime._FUNCTIONS.items()}
    assert known == declared


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Returns the example in C, compiled as its comment says."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("exported")
    for source in (SOURCES / "serve.c", SOURCES / "rigl_network.h", path()):
        shutil.copy(source, folder)
    (line,) = [
        line
        for line in (folder / "serve.c").read_text().splitlines()
        if line.startswith(" *   cc ")
    ]
    strict = "-std=c11 -Wall -Wextra -Wpedantic -Werror"
    done = subprocess.run(
        ["sh", "-c", f"{line[5:]} {strict}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    def run(*arguments):
        done = subprocess.run(
            [folder / "serve", *map(str, arguments)],
            capture_output=True,
            text=True,
        )
        return done.stdout if done.returncode == 0 else done.stderr

    return run


def test_the_example_in_c(serve, two, tmp_path):
    name = tmp_path / "network.rigl"
    name.write_bytes(TWO)
    x, other = images(3)
    x.tofile(tmp_path / "x")
    other.tofile(tmp_path / "other")
    lines = serve(name, 3, tmp_path / "x", tmp_path / "other").splitlines()
    scaled, largest = two.run([x, other])
    assert lines[0] == "scaled (3, 3, 4, 2)" and lines[37] == "self (3, 2)"
    found = [[float(v) for v in line.split()] for line in lines[1:37]]
    np.testing.assert_array_equal(np.float32(found), scaled.reshape(36, 2))
    found = [[float(v) for v in line.split()] for line in lines[38:]]
    np.testing.assert_array_equal(np.float32(found), largest)
    # Zeros, and one sample.
    assert serve(name).splitlines()[-2:] == ["self (1, 2)", "0 0"]


def test_the_example_says_what_is_wrong(serve, tmp_path):
    name = tmp_path / "network.rigl"
    assert "No such file" in serve(name)
    name.write_bytes(TWO)
    x = tmp_path / "x"
    x.write_bytes(b"1234")
    assert "it must have 24 numbers of 4 bytes" in serve(name, 1, x)
    assert "there is no input for it" in serve(name, 1, x, x, x)
    assert "one sample or more" in serve(name, 0)
    assert "usage" in serve()
    name.write_bytes(FREE)
    assert "self: it has an axis without a length" in serve(name)
