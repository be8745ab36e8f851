"""`bin/build_kernels`: builds the op library ahead of its first use."""

import argparse
import shlex
import sys
import time
from pathlib import Path

from rigl_keras.kernels import choice, library, packaged
from rigl_keras.kernels.toolchain import (
    LIBRARY_NAME,
    NETWORK_LIBRARY_NAME,
    BuildError,
    find_compiler,
    planned_build,
)

__all__ = ["main"]


def main() -> None:
    """Builds the libraries and prints where they are."""
    try:
        _build()
    except KeyboardInterrupt:
        command = shlex.join(["bin/build_kernels", *sys.argv[1:]])
        print(
            f"build_kernels: interrupted; begin again with: {command}",
            file=sys.stderr,
        )
        sys.exit(130)


def _build():
    parser = argparse.ArgumentParser(
        prog="build_kernels",
        description="Builds the libraries of the sparse kernels: one of "
        "TensorFlow's operations, one that needs no TensorFlow.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="Build them even if they are there.",
    )
    parser.add_argument(
        "--retime",
        action="store_true",
        help="Forget which products were faster here: they are timed again "
        "when they are used next, as after a change of the machine.",
    )
    parser.add_argument(
        "--into",
        metavar="PACKAGE",
        type=Path,
        help="Copy them into this copy of the package, for a wheel.",
    )
    flags = parser.parse_args()
    start = time.perf_counter()
    try:
        there = library.path().is_file() and not flags.force
        built = library.build(force=flags.force)
        libraries = {
            LIBRARY_NAME: built,
            NETWORK_LIBRARY_NAME: library.build_network(),
        }
        compiler, identity = ([""], "") if there else find_compiler()
    except BuildError as error:
        sys.exit(f"Sparse kernels cannot be built: {error}")
    seconds = time.perf_counter() - start
    print(*libraries.values(), sep="\n")
    if there:
        print("were there")
    else:
        print(f"built in {seconds:.1f} s by {compiler[0]}: {identity}")
    if flags.into:
        packaged.put(planned_build(), libraries, flags.into)
        print(f"copied into {flags.into}")
    if flags.retime:
        try:
            forgotten = choice.forget()
        except OSError as error:
            sys.exit(f"The kept choices cannot be removed: {error}")
        print(f"{forgotten} choices between products forgotten")
