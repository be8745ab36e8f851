"""Loads networks with the library built here, from bytes and files."""

import concurrent.futures
import contextlib
import functools
import os
import pathlib
import types

import numpy as np
import pytest

from rigl_keras.serving import runtime

# The path of a library that a parent process has built, for its child, which
# then need not import TensorFlow for a build.
GIVEN = "RIGL_KERAS_NETWORK_OF_TESTS"
# Instruction sets, and whether code is generated (only for AVX-512).
KINDS = ("avx512", "avx512 without code", "avx2", "portable")


@functools.cache
def path():
    """Returns the path of the library, and builds it if needed."""
    if GIVEN in os.environ:
        return pathlib.Path(os.environ[GIVEN])
    from rigl_keras.kernels import library

    try:
        return library.build_network()
    except library.BuildError as error:
        pytest.skip(f"no network library: {error}")


@pytest.fixture(autouse=True, scope="module")
def built():
    """Builds the library before the time of a test starts."""
    with contextlib.suppress(pytest.skip.Exception):
        path()


def loaded(data, *, threads=1):
    """Returns the network of a file's bytes."""
    return runtime.Network.from_bytes(data, library=path(), threads=threads)


def refused(data):
    """Returns the error for a file, and checks that it is one line."""
    with pytest.raises(ValueError) as error:
        loaded(data)
    text = str(error.value).split(" bytes>' cannot be loaded: ", 1)[1]
    assert text.isprintable() and text, text
    return text


@contextlib.contextmanager
def kind_of_code(kind):
    """Selects one of `KINDS` for networks that are loaded in the context."""
    name, *rest = kind.split(" ", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIGL_KERAS_ISA", name)
        patch.setenv("RIGL_KERAS_GENERATED", "off" if rest else "")
        yield name


def outputs_begin_as_nan(monkeypatch):
    """Fills outputs with NaN before the engine writes them.

    Otherwise unwritten memory might hold the results of an earlier call.
    """

    def empty(shape, dtype):
        return np.full(shape, np.nan, dtype)

    names = types.SimpleNamespace(**{**vars(np), "empty": empty})
    monkeypatch.setattr(runtime, "np", names)


def common_folder(tmp_path_factory):
    """Returns a folder that all workers of a test run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def sanitized(sanitizer, common):
    """Builds the library and a program that fuzzes it, under a sanitizer.

    Args:
        sanitizer: "address", which also finds undefined behaviour, or
            "thread".
        common: The `common_folder`. The first caller builds; others wait.

    Returns:
        The folder of the library, and of the program `fuzz`; and a function
        that runs the compiler there and returns what it prints.
    """
    from rigl_keras._files import lock
    from rigl_keras.kernels import toolchain

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIGL_KERAS_KERNELS", sanitizer)
        try:
            plan = toolchain.planned_build()
            compiler, _ = toolchain.find_compiler()
        except toolchain.BuildError as error:
            pytest.skip(str(error))
    folder = common / f"sanitized-{sanitizer}"
    folder.mkdir(exist_ok=True)

    def run(arguments):
        done = toolchain.run_compiler([*compiler, *arguments], folder)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    name = toolchain.NETWORK_LIBRARY_NAME
    linked = plan.libraries[name]
    flags = [f for f in linked if f not in plan.objects and f != "-shared"]
    flags = [f for f in flags if not f.startswith("-Wl,")]
    source = pathlib.Path(__file__).with_name("network_fuzz.cc")
    included = toolchain._SOURCES["serving"]
    fuzz = [*flags, f"-I{included}", "-c", str(source), "-o", "fuzz.o"]
    objects = [f for f in linked if f in plan.objects]
    with lock(folder / "lock"):
        if not (folder / "built").exists():
            commands = [
                command
                for command in toolchain.compile_commands(plan, [])
                if command[-1] in objects
            ]
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(run, [*commands, fuzz]))
            run([*linked, "-o", name])
            run([*objects, "fuzz.o", *flags, "-o", "fuzz"])
            (folder / "built").touch()
    return folder, run


def sanitized_library(sanitizer, common):
    """Returns the variables for a Python that loads the `sanitized` library."""
    from rigl_keras.kernels import toolchain

    folder, run = sanitized(sanitizer, common)
    # Also the C++ library, whose functions the runtime needs at its start.
    runtimes = [
        run([f"-print-file-name={file}"])
        for file in (f"lib{sanitizer[0]}san.so", "libstdc++.so")
    ]
    if not all(map(os.path.isfile, runtimes)):
        pytest.skip(f"the compiler has no runtime of the {sanitizer} sanitizer")
    return {
        "RIGL_KERAS_KERNELS": sanitizer,
        "LD_PRELOAD": " ".join(runtimes),
        # Python does not free all its memory.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:history_size=7",
        GIVEN: str(folder / toolchain.NETWORK_LIBRARY_NAME),
    }
