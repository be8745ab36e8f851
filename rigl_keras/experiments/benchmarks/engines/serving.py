"""Runs all engines on one network: files, processes and turns."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rigl_keras.experiments.benchmarks.engines.catalogue import (
    Engine,
    variables_of,
)
from rigl_keras.experiments.benchmarks.engines.environments import own_python
from rigl_keras.experiments.benchmarks.engines.network_files import (
    TOLERANCE,
    Network,
    Writing,
    written,
)
from rigl_keras.experiments.benchmarks.engines.processes import (
    EngineError,
    Process,
)
from rigl_keras.experiments.benchmarks.engines.records import (
    Case,
    LeftOut,
    Machine,
    Measurement,
)
from rigl_keras.experiments.benchmarks.engines.turns import (
    agreement,
    timed_turns,
)
from rigl_keras.experiments.runs import provenance

__all__ = ["Serving", "measured_case", "serving"]

_LONGEST_LOAD = 900.0  # seconds; PyTorch compiles for minutes
_SPARE = 1.5e9  # bytes of memory to leave free
_FEWEST = 3  # rounds for a median
TURN = 0.2  # the least seconds of a turn
Say = Callable[[str], None]


class Serving:
    """Processes of engines that serve one network.

    Args:
        network: The network.
        engines: The engines, by name.
        pythons: The Python of each engine's environment, by name.
        batches: The batch sizes that will be needed.
        folder: Folder for the files. Each is written when first needed.
        threads: Threads of each engine.
        isa: Newest instruction set that engines may use, or None.
    """

    def __init__(
        self,
        network: Network,
        engines: Mapping[str, Engine],
        *,
        pythons: Mapping[str, str],
        batches: Sequence[int],
        folder: Path,
        threads: int,
        isa: str | None,
    ):
        self.network, self.engines = network, engines
        self._pythons, self._batches = pythons, batches
        self._folder, self._threads, self._isa = folder, threads, isa
        self._files: dict[str, dict[int, Path] | EngineError] = {}
        self._processes: dict[str, Process] = {}

    def loaded(self, name: str, batch: int) -> tuple[Process, str]:
        """Returns the process of an engine that has loaded the network.

        Args:
            name: Name of the engine.
            batch: Examples in a call.

        Returns:
            The process, and the engine's version.

        Raises:
            EngineError: The engine cannot load the network.
        """
        path = self._path(name, batch)
        process = self._processes.get(name)
        if process is None or not process.is_alive:
            engine = self.engines[name]
            process = self._processes[name] = Process(
                [self._pythons[name], str(engine.script), engine.loader],
                environment=self._variables(name),
                log=self._folder / f"{name}.log",
            )
        version = process.ask(
            "load",
            limit=_LONGEST_LOAD,
            path=str(path),
            threads=self._threads,
            batch=batch,
        )["version"]
        return process, version

    def is_held(self, name: str) -> bool:
        """Returns whether an engine can be limited to `isa`, if that is set."""
        return self._isa is None or self._isa in self.engines[name].isas

    def end(self, name: str) -> None:
        """Ends the process of an engine, if there is one."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.close()

    def close(self) -> None:
        """Ends all processes."""
        for name in list(self._processes):
            self.end(name)

    def array_file(self, array: np.ndarray) -> Path:
        """Writes an array to a file, over the last one; returns its path."""
        path = self._folder / "inputs.npy"
        np.save(path, array)
        return path

    def _path(self, name, batch):
        """Returns the file that an engine loads, and writes it once."""
        engine = self.engines[name]
        files = self._files.get(engine.file)
        if files is None:
            writing = Writing(
                folder=self._folder / engine.file,
                batches=self._batches,
                engine=engine,
                python=self._pythons[name],
                variables=self._variables(name),
            )
            try:
                files = written(engine.file, self.network, writing)
            except EngineError as error:
                shutil.rmtree(writing.folder, ignore_errors=True)
                files = error
            self._files[engine.file] = files
        if isinstance(files, EngineError):
            raise files
        return files[batch]

    def _variables(self, name):
        variables = variables_of(self.engines[name], self._isa, self._threads)
        if self._pythons[name] != own_python():
            variables["PYTHONPATH"] = ""  # its packages would come first
        return variables


@contextlib.contextmanager
def serving(network: Network, engines: Mapping[str, Engine], **details):
    """Yields a `Serving`, then ends its processes and removes its files.

    Args:
        network, engines: As in `Serving`.
        **details: Other arguments of `Serving`, except the folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        served = Serving(network, engines, folder=Path(folder), **details)
        try:
            yield served
        finally:
            served.close()


def measured_case(
    served: Serving,
    case: Case,
    machine: Machine,
    commit: str,
    *,
    rounds: int,
    seconds: float,
    doing: Say = lambda line: None,
) -> tuple[list[Measurement], list[LeftOut]]:
    """Measures all engines in a case.

    1. Each engine loads the network and computes. Engines are left out if
       they disagree with the model, or leave too little memory for others.
    2. The engines take turns (`turns.timed_turns`).

    Args:
        served: The engines.
        case: A case of the network that they serve.
        machine, commit: Machine and commit of the measurements.
        rounds: Turns of each engine, at most.
        seconds: Time for the turns. Once it has passed, no round begins after
            the third.
        doing: Called with a line about the progress.

    Returns:
        The measurements, and the engines that were left out.
    """
    left_out = []

    def lost(name, error):
        served.end(name)
        left_out.append(
            LeftOut(
                case=case,
                machine=machine,
                engine=name,
                reason=str(error),
                tried=True,
            )
        )

    load = os.getloadavg()[0]
    date = provenance.now()
    images = served.network.inputs(case.batch)
    wanted = served.network.outputs(images)
    inputs = served.array_file(images)
    processes, about = {}, {}
    for name, engine in served.engines.items():
        doing(f"{case}: {engine.label} loads")
        same = engine.precision == "float32"
        try:
            process, version = served.loaded(name, case.batch)
            found = agreement(
                process, inputs, wanted, tolerance=TOLERANCE if same else None
            )
            _check_memory()
        except EngineError as error:
            lost(name, error)
            continue
        processes[name] = process
        about[name] = {
            "version": version,
            "difference": found.difference,
            "same_class": found.same_class,
        }
    doing(f"{case}: {len(processes)} engines take turns")
    turns = timed_turns(
        processes,
        rounds=rounds,
        at_least=min(_FEWEST, rounds),
        seconds=seconds,
        turn=TURN,
        lost=lost,
    )
    measurements = [
        Measurement(
            case=case,
            machine=machine,
            date=date,
            commit=commit,
            load=load,
            engine=name,
            precision=served.engines[name].precision,
            held=served.is_held(name),
            turns=tuple(taken),
            **about[name],
        )
        for name, taken in turns.items()
    ]
    return measurements, left_out


def _check_memory():
    """Raises EngineError if an engine leaves too little memory."""
    left = _memory_left()
    if left < _SPARE:
        raise EngineError(
            f"it would leave {max(left, 0) / 1e9:.1f} GB of memory, but other "
            f"engines need {_SPARE / 1e9:g}"
        )


def _memory_left():
    """Returns the bytes of memory that are available, on Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")
