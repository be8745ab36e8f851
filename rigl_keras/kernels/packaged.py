"""Libraries that a wheel brings, compiled by `bin/build_wheel`.

    kernels/compiled/2.21.0-Linux-x86_64-0123456789ab/rigl_keras_kernels.so
    serving/rigl_keras_network.so

The operations are for one version of TensorFlow, which their folder names, and
for the sources of this package, whose digest it ends with; there may be several
folders. The library that runs a network needs no TensorFlow, and lies where
`serving/runtime.py` looks for it. Both have the loops for all instruction sets
and choose between them when they are loaded.
"""

import ctypes
import functools
import shutil
from pathlib import Path

from rigl_keras.kernels.toolchain import (
    LIBRARY_NAME,
    NETWORK_LIBRARY_NAME,
    Build,
)

__all__ = ["network_library", "op_library", "put"]

_PACKAGE = Path(__file__).parents[1]


def op_library(build: Build) -> Path | None:
    """Returns the op library that is what this build would make, or None."""
    path = _op_path(build, _PACKAGE)
    there = network_library(build) is not None and path.is_file()
    return path if there else None


def network_library(build: Build) -> Path | None:
    """Returns the network library of this build's sources, or None.

    It is the same for all versions of TensorFlow. A machine whose system is
    older than the one that it was built on may not load it: it is left alone
    then, and so are the operations, which were built there, too.
    """
    folder = _op_path(build, _PACKAGE).parent
    same = folder.name.removeprefix(build.tensorflow)
    path = _network_path(_PACKAGE)
    if build.sanitizer or not any(folder.parent.glob(f"*{same}")):
        return None
    return path if path.is_file() and _can_be_loaded(path) else None


def put(build: Build, libraries: dict[str, Path], package: Path) -> None:
    """Copies libraries to where a package has them.

    Args:
        build: What they were built by.
        libraries: Their paths, by name.
        package: Folder of the package.
    """
    for name, path in (
        (LIBRARY_NAME, _op_path(build, package)),
        (NETWORK_LIBRARY_NAME, _network_path(package)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(libraries[name], path)


def _op_path(build, package):
    folder = f"{build.tensorflow}-{build.platform}-{build.sources}"
    return package / "kernels" / "compiled" / folder / LIBRARY_NAME


def _network_path(package):
    return package / "serving" / NETWORK_LIBRARY_NAME


@functools.cache
def _can_be_loaded(path):
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True
