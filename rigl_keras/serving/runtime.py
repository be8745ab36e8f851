"""Runs an exported network with NumPy, without TensorFlow.

This file stands alone: a machine needs only a copy of it, the library
`rigl_keras_network.so` and a network's file.

    from runtime import Network

    network = Network("network.rigl")
    print(network.inputs, network.outputs)
    found = network(images)["probabilities"]
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["LIBRARY_NAME", "Network", "Value"]

LIBRARY_NAME = "rigl_keras_network.so"
_MOST_AXES = 8
_MOST_THREADS = 1024
_ERROR_BYTES = 1024
# Number of sets of input shapes whose output shapes are kept.
_MOST_SHAPES = 64


class Value(NamedTuple):
    """An input or output of a network.

    Attributes:
        name: Its name.
        shape: Its lengths, the batch first. None: free.
    """

    name: str
    shape: tuple[int | None, ...]


class _Value(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("axes", ctypes.c_int),
        ("shape", ctypes.c_int64 * _MOST_AXES),
    ]


_int64s = ctypes.POINTER(ctypes.c_int64)
_pointers = ctypes.POINTER(ctypes.c_void_p)
_error = [ctypes.c_char_p, ctypes.c_size_t]
# The functions of rigl_network.h: their results and arguments.
_FUNCTIONS = {
    "load": (ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int, *_error]),
    "load_memory": (
        ctypes.c_void_p,
        [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int, *_error],
    ),
    "free": (None, [ctypes.c_void_p]),
    "input_count": (ctypes.c_int, [ctypes.c_void_p]),
    "output_count": (ctypes.c_int, [ctypes.c_void_p]),
    "input": (_Value, [ctypes.c_void_p, ctypes.c_int]),
    "output": (_Value, [ctypes.c_void_p, ctypes.c_int]),
    "output_shapes": (
        ctypes.c_int,
        [ctypes.c_void_p, _int64s, _int64s, *_error],
    ),
    "run": (
        ctypes.c_int,
        [ctypes.c_void_p, _pointers, _int64s, _pointers, *_error],
    ),
    "tune": (
        ctypes.c_int,
        [ctypes.c_void_p, _int64s, ctypes.c_double, *_error],
    ),
    "hints": (ctypes.c_char_p, [ctypes.c_void_p]),
    "profile": (ctypes.c_char_p, [ctypes.c_void_p, _int64s, *_error]),
    "instruction_set": (ctypes.c_char_p, []),
}


class Network:
    """A network that is ready to run.

    Any number of threads may call it at once; calls release the GIL.

    Attributes:
        inputs: A `Value` for each input, in order.
        outputs: A `Value` for each output, in order.

    Args:
        path: The network's file.
        library: The library that runs it. None: `rigl_keras_network.so` beside
            this Python file. It is never searched beside a network, which may
            come from others.
        threads: How many threads compute a call, 0 to 1024. 0: one for each
            core that this process may use.

    Raises:
        ValueError: The file is not a network or is damaged, the library is
            missing or a different one, or `threads` is out of range.

    Example:

    >>> with Network("network.rigl", threads=2) as network:
    ...     network(np.zeros((1, 32, 32, 3), "float32"))
    {'probabilities': array([[0.1, ...]], dtype=float32)}
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        library: str | os.PathLike | None = None,
        threads: int = 0,
    ):
        name = os.fsencode(path)
        if b"\0" in name:  # the name would end there in C
            raise ValueError(f"path must not have a NUL. Received: {path!r}")
        self._load(os.fsdecode(path), library, threads, "load", name)

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        *,
        library: str | os.PathLike | None = None,
        threads: int = 0,
    ) -> Network:
        """Returns the network of a file that is already in memory.

        Args:
            data: The file's bytes. They are not needed afterwards.
            library: As in `Network`.
            threads: As in `Network`.

        Raises:
            ValueError: As for `Network`.
        """
        network = cls.__new__(cls)
        data = bytes(data)
        network._load(
            f"<{len(data)} bytes>",
            library,
            threads,
            "load_memory",
            data,
            len(data),
        )
        return network

    def _load(self, source, library, threads, function, *arguments):
        self._network: int | None = None
        self._source = source
        if type(threads) is not int or not 0 <= threads <= _MOST_THREADS:
            raise ValueError(
                f"threads must be an int, 0 to {_MOST_THREADS}; 0 means one "
                f"for each core. Received: {threads!r}"
            )
        self._c = _functions(library)
        self._state = threading.Condition()
        self._running = 0
        self._alone = False  # one call runs alone
        self._asked = 0  # calls that wait to run alone
        self._shapes: dict[tuple, list[tuple[int, ...]]] = {}
        network, error = self._ask(function, *arguments, threads)
        if not network:
            raise ValueError(f"{source!r} cannot be loaded: {error}")
        self._network = network
        self.inputs = tuple(
            _value(self._c["input"](network, i))
            for i in range(self._c["input_count"](network))
        )
        self.outputs = tuple(
            _value(self._c["output"](network, i))
            for i in range(self._c["output_count"](network))
        )
        self._places = {value.name: i for i, value in enumerate(self.inputs)}

    @property
    def instruction_set(self) -> str:
        """The instruction set in use: "avx512", "avx2" or "portable"."""
        return self._c["instruction_set"]().decode()

    def __call__(
        self, /, *arrays: np.ndarray, **named: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Computes the outputs of a batch.

        Args:
            *arrays: Inputs, in the order of `inputs`. Float32; an array that
                is not contiguous is copied. All have one batch size.
            **named: The other inputs, by their names.

        Returns:
            `{name: array}`, in the order of `outputs`.

        Raises:
            ValueError: An input is missing, unknown, or has another shape or
                type; there is not enough memory; or the network is closed.
        """
        found = self._run(self._ordered(arrays, named))
        return {
            value.name: array
            for value, array in zip(self.outputs, found, strict=True)
        }

    def run(
        self, arrays: Sequence[np.ndarray] | Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        """Computes the outputs of a batch, as a list.

        Args:
            arrays: Inputs in the order of `inputs`, or all by name, as in
                `network(...)`.

        Returns:
            An array for each of `outputs`.

        Raises:
            ValueError: As for `network(...)`.
        """
        if isinstance(arrays, Mapping):
            return self._run(self._ordered((), arrays))
        if not isinstance(arrays, (list, tuple)):
            raise ValueError(
                "arrays must be a list of arrays, or {name: array}. Received: "
                f"{type(arrays).__name__}. Call the network with a single one"
            )
        return self._run(self._ordered(arrays, {}))

    def output_shapes(self, *shapes: Sequence[int]) -> list[tuple[int, ...]]:
        """Returns the shapes of the outputs.

        Args:
            *shapes: The shape of each input, the batch first.

        Returns:
            A shape for each of `outputs`.

        Raises:
            ValueError: The shapes do not fit the network, or it is closed.
        """
        given = self._numbers(shapes)
        with self._in_use() as network:
            key = tuple(tuple(shape) for shape in shapes)
            return list(self._output_shapes(network, key, given))

    def tune(self, *shapes: Sequence[int], seconds: float = 1.0) -> None:
        """Measures how calls of one batch size run fastest here.

        Later calls use the result. Calls of other threads wait until it is
        done. On a busy machine it finds what is fast on a busy machine.

        Args:
            *shapes: The shape of each input, the batch first.
            seconds: Most seconds to take.

        Raises:
            ValueError: The shapes do not fit the network, or it is closed.
        """
        given = self._numbers(shapes)
        with self._in_use(alone=True) as network:
            failed, error = self._ask("tune", network, given, float(seconds))
        if failed:
            raise ValueError(error)

    def hints(self) -> str:
        """Returns the results of `tune`, as the text that files hold.

        Raises:
            ValueError: The network is closed.
        """
        with self._in_use(alone=True) as network:
            return _text(self._c["hints"](network))

    def profile(self, *shapes: Sequence[int]) -> str:
        """Returns a line for each step of a call, with its time.

        Args:
            *shapes: The shape of each input, the batch first.

        Raises:
            ValueError: The shapes do not fit the network, or it is closed.
        """
        given = self._numbers(shapes)
        with self._in_use(alone=True) as network:
            found, error = self._ask("profile", network, given)
            if found is None:
                raise ValueError(error)
            return _text(found)

    def close(self) -> None:
        """Frees the network once running calls have ended.

        Later calls raise ValueError. Closing twice does nothing.
        """
        with contextlib.suppress(ValueError):
            with self._in_use(alone=True) as network:
                self._network = None
                self._c["free"](network)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        # No call is running: calls hold the network.
        if getattr(self, "_network", None):
            self._c["free"](self._network)

    def __repr__(self) -> str:
        closed = "" if self._network else ", closed"
        return f"Network({self._source!r}{closed})"

    def __reduce__(self):
        raise TypeError(
            "a network cannot be pickled. Load it in the other process"
        )

    def _ordered(self, arrays, named):
        """Returns all inputs in order."""
        if len(arrays) > len(self.inputs):
            raise ValueError(
                f"the network has {_inputs(self.inputs)}. Received: "
                f"{len(arrays)} arrays"
            )
        unknown = [name for name in named if name not in self._places]
        if unknown:
            raise ValueError(
                f"the network has no input {unknown[0]!r}, but "
                f"{_inputs(self.inputs)}"
            )
        twice = [name for name in named if self._places[name] < len(arrays)]
        if twice:
            raise ValueError(
                f"input {twice[0]!r} is given twice: by position and by name"
            )
        left = self.inputs[len(arrays) :]
        missing = [value.name for value in left if value.name not in named]
        if missing:
            raise ValueError(
                f"input {missing[0]!r} is missing. The network has "
                f"{_inputs(self.inputs)}"
            )
        return [*arrays, *(named[value.name] for value in left)]

    def _run(self, arrays):
        """Returns the outputs in order, for inputs in order."""
        arrays = [
            _checked(array, value)
            for array, value in zip(arrays, self.inputs, strict=True)
        ]
        shapes = tuple(array.shape for array in arrays)
        given = self._numbers(shapes)
        with self._in_use() as network:
            outputs = [
                np.empty(shape, np.float32)
                for shape in self._output_shapes(network, shapes, given)
            ]
            failed, error = self._ask(
                "run", network, _places(arrays), given, _places(outputs)
            )
        if failed:
            raise ValueError(error)
        return outputs

    def _output_shapes(self, network, shapes, given):
        """Returns the outputs' shapes for shapes of inputs."""
        found = self._shapes.get(shapes)
        if found is not None:
            return found
        # The largest possible number of axes, for any output.
        numbers = (ctypes.c_int64 * (_MOST_AXES * len(self.outputs)))()
        failed, error = self._ask("output_shapes", network, given, numbers)
        if failed:
            raise ValueError(error)
        rest, found = list(numbers), []
        for value in self.outputs:
            axes = len(value.shape)
            found.append(tuple(rest[:axes]))
            rest = rest[axes:]
        if len(self._shapes) >= _MOST_SHAPES:
            self._shapes = {}
        self._shapes[shapes] = found
        return found

    def _numbers(self, shapes):
        """Returns shapes for C, if they fit the inputs."""
        if len(shapes) != len(self.inputs):
            raise ValueError(
                f"a shape is needed for each of {_inputs(self.inputs)}. "
                f"Received: {len(shapes)}"
            )
        for shape, value in zip(shapes, self.inputs, strict=True):
            if len(shape) != len(value.shape) or not all(
                length in (None, given)
                for given, length in zip(shape, value.shape, strict=True)
            ):
                raise ValueError(
                    f"input {value.name!r} must have the shape "
                    f"{_shown(value.shape)}. Received: {_shown(shape)}"
                )
        sizes = {shape[0] for shape in shapes}
        if len(sizes) > 1:
            raise ValueError(
                "all inputs must have one batch size, their first axis. "
                f"Received: {', '.join(_shown(shape) for shape in shapes)}"
            )
        flat = [operator.index(n) for shape in shapes for n in shape]
        return (ctypes.c_int64 * len(flat))(*flat)

    @contextlib.contextmanager
    def _in_use(self, *, alone: bool = False) -> Iterator[int]:
        """Yields the network, which is not freed meanwhile.

        Many may use it at once, or one alone, while later ones wait.
        """
        with self._state:
            if alone:
                self._asked += 1
                try:
                    self._state.wait_for(lambda: not self._running)
                finally:
                    self._asked -= 1
            else:
                self._state.wait_for(lambda: not (self._alone or self._asked))
            if not self._network:
                self._state.notify_all()
                raise ValueError(
                    f"the network {self._source!r} is closed. Load it again"
                )
            self._running += 1
            self._alone = alone
            network = self._network
        try:
            yield network
        finally:
            with self._state:
                self._running -= 1
                self._alone = False
                self._state.notify_all()

    def _ask(self, function, *arguments):
        """Returns the result of a function, and its error message."""
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        found = self._c[function](*arguments, error, _ERROR_BYTES)
        return found, _text(error.value) or "the library does not say why"


def _functions(library):
    """Returns the functions of a library, by their names in `_FUNCTIONS`."""
    if library is None:
        library = Path(__file__).with_name(LIBRARY_NAME)
        if not library.exists():
            raise ValueError(
                f"the library {str(library)!r} is missing. Copy it from an "
                "exported network, or pass library=path"
            )
    # Without a folder, the system's folders would be searched.
    name = os.path.abspath(os.fsdecode(library))
    try:
        loaded = ctypes.CDLL(name)
    except OSError as error:
        advice = ""
        if os.path.isfile(name):
            advice = (
                ". A library runs on the kind of machine and system that it "
                "was built on. Export the model on one of this kind"
            )
        raise ValueError(
            f"the library {name!r} cannot be loaded: {error}{advice}"
        ) from error
    functions = {}
    for function, (returned, taken) in _FUNCTIONS.items():
        symbol = f"rigl_network_{function}"
        try:
            found = loaded[symbol]  # of this caller only
        except AttributeError as error:
            raise ValueError(
                f"the library {name!r} has no function {symbol}: it is another "
                f"library, or of another version. Use the {LIBRARY_NAME} that "
                "came with this file"
            ) from error
        found.restype, found.argtypes = returned, taken
        functions[function] = found
    return functions


def _checked(array, value):
    """Returns an input as the library reads it, copied if necessary."""
    array = np.asarray(array)
    if array.dtype != np.float32:
        raise ValueError(
            f"input {value.name!r} must be float32. Received: {array.dtype}. "
            'Convert it: x.astype("float32")'
        )
    if array.ndim != len(value.shape):  # a scalar would get an axis below
        raise ValueError(
            f"input {value.name!r} must have the shape {_shown(value.shape)}. "
            f"Received: {_shown(array.shape)}"
        )
    return np.require(array, requirements=["C", "A"])


def _places(arrays):
    """Returns pointers to the numbers of arrays, for C."""
    return (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))


def _value(found):
    lengths = found.shape[: found.axes]
    return Value(
        found.name.decode(errors="surrogateescape"),
        tuple(None if length < 0 else length for length in lengths),
    )


def _text(found):
    return found.decode(errors="replace")


def _inputs(values):
    """Returns the number and the names of inputs."""
    names = ", ".join(f"{v.name!r} {_shown(v.shape)}" for v in values)
    return f"{len(values)} input{'s' * (len(values) > 1)}: {names}"


def _shown(shape):
    lengths = ", ".join("?" if n is None else str(n) for n in shape)
    return f"({lengths})"
