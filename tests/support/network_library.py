"""Networks by the library that is built here, of bytes and of files."""

import concurrent.futures
import contextlib
import functools
import os
import pathlib
import types

import numpy as np
import pytest

from rigl_keras.serving import runtime

# The library for the tests of a process that another one has started, which
# has built it. TensorFlow, which the build needs, is not imported then.
GIVEN = "RIGL_KERAS_NETWORK_OF_TESTS"
# Instruction sets, and whether code is generated. AVX-512 alone has it.
KINDS = ("avx512", "avx512 without code", "avx2", "portable")


@functools.cache
def path():
    """Returns the library, which may have to be built first."""
    if GIVEN in os.environ:
        return pathlib.Path(os.environ[GIVEN])
    from rigl_keras.kernels import library

    try:
        return library.build_network()
    except library.BuildError as error:
        pytest.skip(f"no network library: {error}")


def loaded(data, *, threads=1):
    """Returns the network of a file's bytes."""
    return runtime.Network.from_bytes(data, library=path(), threads=threads)


@contextlib.contextmanager
def kind_of_code(kind):
    """Asks for one of `KINDS`. Networks are loaded and planned within."""
    name, *rest = kind.split(" ", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIGL_KERAS_ISA", name)
        patch.setenv("RIGL_KERAS_GENERATED", "off" if rest else "")
        yield name


def outputs_begin_as_nan(monkeypatch):
    """Has the runtime return NaN where the engine has written nothing.

    Memory that is not filled may hold what an earlier call returned.
    """

    def empty(shape, dtype):
        return np.full(shape, np.nan, dtype)

    names = types.SimpleNamespace(**{**vars(np), "empty": empty})
    monkeypatch.setattr(runtime, "np", names)


def build_sanitized(sanitizer, folder):
    """Builds the library under a sanitizer, and nothing else.

    Args:
        sanitizer: "address", which looks for undefined behaviour as well, or
            "thread".
        folder: Where to.

    Returns:
        The library's path, and the variables for a process that loads it.
    """
    from rigl_keras.kernels import toolchain

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIGL_KERAS_KERNELS", sanitizer)
        try:
            plan = toolchain.planned_build()
            compiler, _ = toolchain.find_compiler()
        except toolchain.BuildError as error:
            pytest.skip(str(error))

    def run(command):
        done = toolchain.run_compiler(command, folder)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    name = toolchain.NETWORK_LIBRARY_NAME
    linked = plan.libraries[name]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = toolchain.compile_commands(plan, compiler)
        list(pool.map(run, (c for c in commands if c[-1] in linked)))
    run([*compiler, *linked, "-o", name])
    # The C++ library as well: the runtime looks for its functions as it starts.
    runtimes = [
        run([*compiler, f"-print-file-name={file}"])
        for file in (f"lib{sanitizer[0]}san.so", "libstdc++.so")
    ]
    if not all(map(os.path.isfile, runtimes)):
        pytest.skip(f"the compiler has no runtime of the {sanitizer} sanitizer")
    return folder / name, {
        "RIGL_KERAS_KERNELS": sanitizer,
        "LD_PRELOAD": " ".join(runtimes),
        # Python's own memory is not all freed.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:history_size=7",
        GIVEN: str(folder / name),
    }
