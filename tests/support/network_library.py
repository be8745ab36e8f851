"""Networks by the library that is built here, of bytes and of files."""

import functools

import pytest

from rigl_keras.kernels import library
from rigl_keras.serving import runtime


@functools.cache
def path():
    """Returns the library, which may have to be built first."""
    try:
        return library.build_network()
    except library.BuildError as error:
        pytest.skip(f"no network library: {error}")


def loaded(data, *, threads=1):
    """Returns the network of a file's bytes."""
    return runtime.Network.from_bytes(data, library=path(), threads=threads)
