"""Folders that serve a model without TensorFlow."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import keras

import rigl_keras.serving
from rigl_keras.exporting.base_format import Format, Runner, WriteOptions
from rigl_keras.exporting.networks import (
    library_to_copy,
    tuned,
    whole_network,
)
from rigl_keras.exporting.signatures import Signature
from rigl_keras.kernels import library
from rigl_keras.kernels.toolchain import NETWORK_LIBRARY_NAME, BuildError
from rigl_keras.serving.network import Network, Node
from rigl_keras.serving.runtime import Network as Runtime

__all__ = ["NETWORK", "Native"]

NETWORK = "network.rigl"
_SERVING = Path(rigl_keras.serving.__file__).parent
# Names in the folder, and the files that are copied there.
_COPIES = {
    "network.py": _SERVING / "runtime.py",
    "rigl_network.h": _SERVING / "csrc" / "rigl_network.h",
    "serve.c": _SERVING / "csrc" / "serve.c",
}


class Native(Format):
    """A network's file, and a library that runs it without TensorFlow.

    The folder has all that a server needs: `network.rigl`, the library with its
    header, `network.py`, which needs only NumPy, `serve.c`, an example in C,
    and `README.txt`, which explains their use.
    """

    folds = True
    dense = "saved_model"
    operations = (NETWORK_LIBRARY_NAME,)
    loading = (
        'from network import Network  # where "{path}" is on sys.path',
        'outputs = Network("{path}/network.rigl")({inputs})',
    )

    def write(
        self,
        model: keras.Model,
        signature: Signature,
        folder: Path,
        options: WriteOptions,
    ) -> list[str]:
        network = whole_network(model, signature)
        built = library_to_copy(library.build_network)
        data = tuned(network, options.batch_sizes)
        Path(folder, NETWORK).write_bytes(data)
        shutil.copyfile(built, Path(folder, NETWORK_LIBRARY_NAME))
        for name, source in _COPIES.items():
            shutil.copyfile(source, Path(folder, name))
        Path(folder, "README.txt").write_text(_note(network))
        return []

    def load(
        self, folder: Path, signature: Signature, outputs: Sequence[str]
    ) -> Runner:
        # The same library as in the folder: a process would load that again for
        # each export.
        network = Runtime(
            Path(folder, NETWORK), library=library.build_network()
        )
        return lambda arrays: network(**arrays)

    def why_unavailable(self) -> str | None:
        try:
            library.build_network()
        except BuildError as error:
            return (
                f"the library that runs networks: {error}. Pass "
                "format='saved_model'."
            )
        return None


def _note(network: Network) -> str:
    """Returns instructions for calling a network."""
    inputs = ", ".join(_shown(node) for node in network.inputs())
    outputs = ", ".join(repr(output.name) for output in network.outputs)
    return _NOTE.format(
        inputs=inputs, outputs=outputs, library=NETWORK_LIBRARY_NAME
    )


def _shown(node: Node) -> str:
    lengths = ["batch", *("free" if n == -1 else str(n) for n in node.shape)]
    return f"{node.name!r} float32 [{', '.join(lengths)}]"


_NOTE = """A sparse network that needs no TensorFlow. Its inputs: {inputs}.
Its outputs: {outputs}.

In Python, with NumPy and this folder on sys.path:

    from network import Network
    outputs = Network("network.rigl")(images)

In C, or a language that calls C: rigl_network.h has the functions, serve.c an
example.

    cc serve.c ./{library} -Wl,-rpath,"$PWD" -o ../serve
    ../serve network.rigl 1

The library is for this kind of machine and system. Never load one that others
could have changed.
"""
