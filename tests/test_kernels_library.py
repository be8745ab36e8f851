"""Building and loading the op library of the kernels."""

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import keras
import pytest
from support import builds
from support.builds import calls, commands, said

import rigl_keras
from rigl_keras import _files
from rigl_keras.kernels import ahead as build_ahead
from rigl_keras.kernels import build_command, choice, library, toolchain

SOURCES = toolchain._SOURCES


@pytest.fixture
def place(tmp_path, monkeypatch):
    return builds.place(tmp_path, monkeypatch)


@pytest.fixture
def stub(place, monkeypatch):
    return builds.stub(place, monkeypatch)


def in_threads(n, call):
    start, results = threading.Barrier(n), []

    def run():
        start.wait()
        results.append(call())

    threads = [threading.Thread(target=run) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == n
    return results


def test_four_threads_build_once(place, stub, caplog, monkeypatch):
    stub(seconds=0.2)
    loads = []

    def loaded(built):
        loads.append(built)
        return library

    monkeypatch.setattr(library, "_loaded", loaded)
    assert library.unavailable() is None and calls(place) == []
    assert in_threads(4, library.load) == [library] * 4
    assert library.load() is library and library.unavailable() is None
    assert loads == [library.path()]
    assert len(calls(place)) == commands()
    assert len(said(caplog)) == 1 and "stub compiler" in said(caplog)[0]
    # The commands differ by instruction set.
    portable = [c for c in calls(place) if "-DRIGL_ISA=portable" in c]
    assert len(portable) == len(toolchain._PER_INSTRUCTION_SET) + 1
    assert sum("-DRIGL_LENGTH=4" in c for c in portable) == 1
    with_tensorflow = [c for c in calls(place) if "tensorflow" in c]
    compiled = sum(" -c " in c for c in with_tensorflow)
    assert compiled == len(toolchain._OPERATIONS)
    assert len(with_tensorflow) == compiled + 1  # and the op library


def test_threads_that_build_at_once(place, stub):
    """Each thread opens the lock file, so the lock also holds for threads."""
    stub(seconds=0.2)
    assert set(in_threads(3, library.build)) == {library.path()}
    assert len(calls(place)) == commands()


def test_forced(place, stub):
    built = library.build()
    built.write_text("old")
    assert library.build() == built and built.read_text() == "old"
    assert library.build(force=True) == built and built.read_text() == "made"


LOADS = """
import pathlib, sys
from rigl_keras.kernels import library, toolchain
sources = pathlib.Path(sys.argv[1])
toolchain._SOURCES = {"kernels": sources, "serving": sources / "serving"}
module = library.load()
assert library.unavailable() is None, library.unavailable()
print("answer", int(module.rigl_stand_in()), library.path())
"""


def start(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **environment},
    )


def real_compiler():
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return shutil.which(name)
    pytest.skip("there is no C++ compiler")


@pytest.mark.slow
def test_two_processes_build_once_and_load(place):
    """The real compiler builds once; a script counts its calls."""
    script = place / "counting"
    script.write_text(
        f'#!/bin/sh\necho "$*" >>"{place}/calls"\n'
        f'exec "{real_compiler()}" "$@"\n'
    )
    script.chmod(0o755)
    both = [start(LOADS, place / "sources", CXX=str(script)) for _ in range(2)]
    for process in both:
        out, err = process.communicate()
        assert process.returncode == 0, err
        answer, path = out.split()[1:]
        assert answer == "42" and path.startswith(str(place / "cache"))
    links = [c for c in calls(place) if "-shared" in c.split()]
    compiles = [c for c in calls(place) if "-c" in c.split()]
    assert len(links) == 2
    assert len(compiles) == len({c.split("-o ")[1] for c in compiles})
    assert len(compiles) in (17, 32)  # of one instruction set, or of three
    # The second library needs no TensorFlow, and exports only its functions.
    other = pathlib.Path(path).with_name(toolchain.NETWORK_LIBRARY_NAME)
    network = ctypes.CDLL(str(other))
    assert network.rigl_stand_in() == 40
    assert not hasattr(network, "_ZN6hidden6lengthEv")
    assert b"tensorflow" not in other.read_bytes()


@pytest.mark.slow
def test_what_is_undefined_fails_the_build(place, monkeypatch):
    """The build fails, not only a later call."""
    if sys.platform != "linux":
        pytest.skip("only the linker of Linux is asked")
    monkeypatch.setenv("CXX", real_compiler())
    (place / "sources" / "row_ops.cc").write_text(
        "int missing(); int ops() { return missing(); }"
    )
    with pytest.raises(toolchain.BuildError, match="undefined reference"):
        library.build()


def test_no_compiler(place, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "/nonexistent")
    assert library.load() is None
    assert "CXX='/nonexistent' was not found" in library.unavailable()
    # It is not tried again, although it would work now.
    monkeypatch.delenv("CXX")
    build = library.build
    monkeypatch.setattr(library, "build", lambda: pytest.fail("again"))
    assert library.load() is None
    assert said(caplog) == [
        f"Sparse kernels are not available: {library.unavailable()}. "
        "Masked layers are computed densely."
    ]
    with pytest.raises(toolchain.BuildError, match=r"apt install g\+\+.*CXX"):
        build()


def test_no_compiler_but_what_one_has_built(place, stub, monkeypatch):
    built = library.build()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "/nonexistent")
    assert library.build() == built


def test_a_compiler_that_is_none(place, monkeypatch):
    monkeypatch.setenv("CXX", str(shutil.which("false")))
    with pytest.raises(toolchain.BuildError, match="--version failed"):
        library.build()
    monkeypatch.setenv("CXX", "an 'open quote")
    with pytest.raises(toolchain.BuildError, match="is not a command"):
        library.build()


def test_a_compile_that_fails(place, stub, caplog):
    stub(broken="lanes.cc")
    assert library.load() is None
    reason = library.unavailable()
    assert "lanes.cc:3:1: error: no such lane" in reason
    assert "another" not in reason and "\n" not in reason
    log = pathlib.Path(reason.split("'")[1])
    text = log.read_text()
    assert "error: another" in text and "-DRIGL_ISA=portable" in text
    # No complete or partial library is left.
    assert {p.name for p in log.parent.iterdir()} == {".lock", "build.log"}
    assert len(said(caplog)) == 2


KILLED = """
import pathlib, sys
from rigl_keras.kernels import library, toolchain
sources = pathlib.Path(sys.argv[1])
toolchain._SOURCES = {"kernels": sources, "serving": sources / "serving"}
library.build()
"""


@pytest.mark.slow
def test_a_build_that_is_killed(place, stub):
    stub(seconds=60)
    process = start(KILLED, place / "sources")
    folder = library.path().parent
    until = time.monotonic() + 60
    while not list(folder.glob(".building-*")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert list(folder.glob(".building-*"))
    assert not library.path().exists()
    stub()
    # The same version of the compiler replaces the killed build.
    assert library.build().parent == folder
    assert not list(folder.glob(".building-*"))


@pytest.mark.slow
def test_a_half_made_library_is_not_seen(place, stub):
    stub(seconds=0.5)
    seen, done = [], threading.Event()
    name = library.path()

    def watch():
        while not done.is_set():
            if name.exists():
                seen.append(name.read_text())

    watcher = threading.Thread(target=watch)
    watcher.start()
    library.build()
    time.sleep(0.1)
    done.set()
    watcher.join()
    assert set(seen) == {"made"}


def test_one_library_of_two_is_built_again(place, stub):
    built = library.build_network()
    assert built.name == "rigl_keras_network.so"
    assert {p.name for p in built.parent.iterdir() if p.suffix == ".so"} == {
        "rigl_keras_kernels.so",
        "rigl_keras_network.so",
    }
    before = len(calls(place))
    built.unlink()
    assert library.build_network() == built and built.read_text() == "made"
    assert len(calls(place)) == before + commands()
    built.chmod(0o777)  # anybody may have written it since
    built.write_text("planted")
    assert library.build_network().read_text() == "made"


def test_a_file_that_is_no_library(place, stub, caplog):
    built = library.build()
    assert library.load() is None
    assert f"'{built}' cannot be loaded" in library.unavailable()
    assert "Remove it" in library.unavailable()


def test_switched_off(place, stub, monkeypatch, caplog):
    library.build()
    before = calls(place, building=False)
    monkeypatch.setenv("RIGL_KERAS_KERNELS", "off")
    assert library.load() is None and library.load() is None
    assert library.unavailable() == "RIGL_KERAS_KERNELS=off"
    assert calls(place, building=False) == before
    assert sum("RIGL_KERAS_KERNELS=off" in line for line in said(caplog)) == 1
    monkeypatch.setenv("RIGL_KERAS_KERNELS", "maybe")
    with pytest.raises(toolchain.BuildError, match="maybe is none of on, off"):
        library.build()


def test_other_platforms(place, stub, monkeypatch):
    monkeypatch.setattr(library.sys, "platform", "win32")
    with pytest.raises(toolchain.BuildError, match="Linux and macOS.*'win32'"):
        library.build()


def test_sources_that_are_missing(place, stub):
    (place / "sources" / "lanes.cc").unlink()
    with pytest.raises(toolchain.BuildError, match="lanes.cc' is missing"):
        library.build()


@pytest.mark.slow
def test_an_import_compiles_nothing(place, stub):
    process = start(
        "import rigl_keras\n"
        "from rigl_keras.kernels import library\n"
        "assert library.unavailable() is None"
    )
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert calls(place, building=False) == []
    with pytest.raises(toolchain.BuildError):
        stub(broken=".cc")
        library.build()  # a call is logged
    assert "--version" in calls(place, building=False)


def test_ahead_of_time(place, stub, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build_kernels"])
    build_command.main()
    first = capsys.readouterr().out
    assert str(library.path()) in first and "built in" in first
    assert "stub compiler: stub 1" in first
    assert str(library.build_network()) in first
    build_command.main()
    assert "were there" in capsys.readouterr().out
    library.path().with_name("choices.json").write_text('{"a": [2, 1, 16]}')
    build_command.main()
    assert "forgotten" not in capsys.readouterr().out
    monkeypatch.setattr(choice, "_known", {"b": None})
    monkeypatch.setattr(sys, "argv", ["build_kernels", "--retime"])
    for forgotten in (1, 0):
        build_command.main()
        assert f"\n{forgotten} choices" in capsys.readouterr().out
        assert choice._known == {}
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(sys, "argv", ["build_kernels", "--force"])
    with pytest.raises(SystemExit, match="cannot be built: the compiler CXX"):
        build_command.main()


def test_ctrl_c_while_it_is_built(monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "build", interrupted)
    monkeypatch.setattr(sys, "argv", ["build_kernels", "--force"])
    with pytest.raises(SystemExit) as ended:
        build_command.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == (
        "build_kernels: interrupted; begin again with: bin/build_kernels "
        "--force\n"
    )


def test_a_compiler_starts_without_what_is_preloaded(place, stub, monkeypatch):
    """Preloaded, a sanitizer's runtime would complain about the compiler."""
    compiler = stub()
    compiler.write_text(
        '#!/bin/sh\necho "preloaded: $LD_PRELOAD, $LC_ALL"\nexit 3\n'
    )
    monkeypatch.setenv("LD_PRELOAD", "/nonexistent/libasan.so")
    done = toolchain.run_compiler([str(compiler)])
    assert done.stdout.splitlines()[-1] == "preloaded: , C"
    assert done.returncode == 3


REGISTERED = """
import os, pathlib, shutil, sys
import numpy as np, tensorflow as tf
from rigl_keras import kernels
from rigl_keras.kernels import library

copy = shutil.copy(sys.argv[1], sys.argv[2])
served = tf.load_op_library(copy)  # as the README says
assert library.load() is served, library.unavailable()
# The other order: ours, then a model's.
again = tf.load_op_library(shutil.copy(copy, copy + "-2.so"))
assert not hasattr(again, "rigl_keras_conv2d")
x, kernel = np.ones((1, 4, 4, 2), "f"), np.ones((3, 3, 2, 3), "f")
found = kernels.sparse_conv2d(x, kernel, np.ones_like(kernel))
np.testing.assert_array_equal(found[0, 0, 0], [8, 8, 8])
assert int(served.rigl_keras_plans_made()) == 1

class Plan:
    sources = "of another version"

try:
    library._registered(Plan)
except library.BuildError as error:
    assert "another version" in str(error)
else:
    raise AssertionError
print("all is well")
"""


@pytest.mark.slow
def test_operations_that_the_process_has(tmp_path):
    """Operations of an exported model are used; a second copy does no harm."""
    if library.load() is None:
        pytest.skip(library.unavailable())
    copy = tmp_path / "assets.extra.so"
    process = start(
        REGISTERED,
        library.build(),
        copy,
        RIGL_KERAS_CACHE=str(tmp_path / "cache"),
    )
    out, err = process.communicate()
    assert "all is well" in out, err
    assert not (tmp_path / "cache").exists()  # nothing is built
    # This process has our operations.
    assert library._registered(toolchain.planned_build()) is library.load()


# Builds ahead of the first use.


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(build_ahead, "_begun", False)
    return build_ahead


def test_another_process_builds_ahead(place, stub, ahead, monkeypatch):
    # The sources of the other process.
    monkeypatch.setattr(toolchain, "_SOURCES", SOURCES)
    stub()
    process = ahead.build_ahead()
    assert ahead.build_ahead() is None  # it runs only once
    assert process.wait(120) == 0
    assert len(calls(place)) == commands()
    built = library.path()
    assert library.build() == built.resolve()
    assert len(calls(place)) == commands()
    monkeypatch.setattr(ahead, "_begun", False)
    assert ahead.build_ahead() is None  # the library exists


def test_nothing_is_built_ahead_in_vain(place, stub, ahead, monkeypatch):
    stub()
    begun = []
    monkeypatch.setattr(ahead, "_started", lambda: begun.append(1))

    def begins():
        monkeypatch.setattr(ahead, "_begun", False)
        before = len(begun)
        ahead.build_ahead()
        return len(begun) > before

    assert begins()
    folder = library.path().parent
    folder.mkdir(parents=True)
    with _files.lock(folder / ".lock"):
        assert not begins()  # another process builds it
    assert begins()
    with monkeypatch.context() as patch:
        patch.setenv("RIGL_KERAS_KERNELS", "off")
        assert not begins()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(place / "no compiler"))
        assert not begins()
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/usr/bin/an-app")
        assert not begins()
    with monkeypatch.context() as patch:
        patch.setattr(library, "_module", library)
        assert not begins()


def test_large_layers_are_built_for_ahead(monkeypatch):
    begun = []
    monkeypatch.setattr(build_ahead, "build_ahead", lambda: begun.append(1))

    def begins(units, layer=keras.layers.Dense, **options):
        before = len(begun)
        shape = (128,) if layer is keras.layers.Dense else (4, 128)
        inputs = keras.Input(shape)
        model = keras.Model(inputs, layer(units)(inputs))
        rigl_keras.sparsify(model, 0.5, **options)
        return len(begun) > before

    assert begins(128)
    assert begins(128, product="sparse")
    assert not begins(127)
    assert not begins(128, product="dense")
    assert not begins(128, layer=keras.layers.LSTM)
