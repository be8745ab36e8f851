"""A folder of results, with a folder for each run.

    results/small/rigl_erk_wrn-density0.1-seed0/
        about.json   row, preset, density, seed and changes of the run
        claim        locked while a process trains the run
        log.txt      what the run has printed
        failure.txt  why it failed the last time, if it did
        run/         its run directory; with run/result.json it is finished

Processes, and machines that see the same folder, may share it. A claim is a
file lock of the process that trains the run. If that process is killed, the
operating system releases the lock, and another process can claim and continue
the run.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from rigl_keras import _files, _reading
from rigl_keras.experiments.reproduction import slurm
from rigl_keras.experiments.reproduction.plans import Run

__all__ = ["ROOM", "Results"]

# Advice for a full disk.
ROOM = "Make room, then start the same command again: it continues."
# What distinguishes a file from earlier and later files of the same name.
Stamp = tuple[int, int, str]


class Results:
    """The results of one preset.

    Args:
        path: Folder of all results. It is created if it does not exist.
        preset: The name of the preset's folder in it.

    Raises:
        ValueError: The folder cannot be created.
    """

    def __init__(self, path: str | os.PathLike, preset: str):
        self.path = Path(path).resolve() / preset
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"The results folder {str(self.path)!r} cannot be made "
                f"({error.strerror}). Pass another --results_dir."
            ) from error

    def folder(self, run: Run) -> Path:
        """Returns the folder of a run, which may not exist yet."""
        return self.path / run.name

    def finished(self, run: Run) -> bool:
        """Returns whether a run has a result.

        Raises:
            ValueError: The result is of another configuration.
        """
        directory = self.folder(run) / "run"
        if not (directory / "result.json").exists():
            return False
        try:
            config = _reading.text(directory / "config.gin")
        except (OSError, ValueError):
            config = None
        if config != run.configure():
            raise ValueError(
                f"{str(directory)!r} holds the result of another configuration "
                f"of {run.name}: a gin file has changed since. Move the folder "
                "away, or pass another --results_dir."
            )
        return True

    def result(self, run: Run) -> dict:
        """Returns the result of a finished run.

        Raises:
            ValueError: It cannot be read.
        """
        path = self.folder(run) / "run/result.json"
        try:
            return _reading.json_object(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} cannot be read ({error}). Move its folder "
                "away, and the run is trained again."
            ) from error

    def epochs(self, run: Run) -> int:
        """Returns how many epochs of a run are trained."""
        metrics = self.folder(run) / "run/metrics.csv"
        try:
            return max(_reading.text(metrics).count("\n") - 1, 0)
        except (OSError, ValueError):
            return 0

    def failure(self, run: Run) -> str | None:
        """Returns why a run failed the last time, or None."""
        stamp = self.failure_stamp(run)
        return None if stamp is None else stamp[-1]

    def failure_stamp(self, run: Run) -> Stamp | None:
        """Returns what identifies the last failure of a run, or None.

        Compare stamps only for equality. Their times are the file server's,
        whose clock may differ from this machine's.
        """
        path = self.folder(run) / "failure.txt"
        try:
            status = path.stat()
            reason = _reading.text(path).strip() or "unknown"
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return 0, 0, f"its failure.txt cannot be read ({error})"
        return status.st_mtime_ns, status.st_ino, reason

    def record_failure(self, run: Run, reason: str) -> None:
        """Writes why a run failed."""
        path = self.folder(run) / "failure.txt"
        _files.write(path, reason + "\n", advice=ROOM)

    def forget_failure(self, run: Run) -> None:
        """Removes the record of an earlier failure."""
        (self.folder(run) / "failure.txt").unlink(missing_ok=True)

    def claimed(self, run: Run) -> bool:
        """Returns whether a process is training a run."""
        path = self.folder(run) / "claim"
        try:
            return _files.is_locked(path)
        except OSError as error:
            raise _no_lock(path, error) from error

    def worker(self, run: Run) -> str | None:
        """Returns the SLURM task or process that is training a run, or None."""
        if not self.claimed(run):
            return None
        try:
            claim = _reading.text(self.folder(run) / "claim")
            machine, process, _, *task = claim.split()
        except (OSError, ValueError):  # the process is still writing it
            return "a process"
        return f"task {task[0]}" if task else f"process {process} on {machine}"

    @contextlib.contextmanager
    def claim(self, run: Run) -> Iterator[int | None]:
        """Claims a run, until the end of the block.

        Yields:
            A file descriptor, or None if another process has the claim. A
            child process that inherits the descriptor holds the claim too.
        """
        folder = self.folder(run)
        with _files.naming(folder, advice=ROOM):
            folder.mkdir(exist_ok=True)
        with _lock(folder / "claim") as claim:
            if claim is not None:
                about = json.dumps(run.as_json(), indent=2) + "\n"
                _files.write(folder / "about.json", about, advice=ROOM)
            yield claim


@contextlib.contextmanager
def _lock(path):
    """Locks a file, and yields its descriptor, or None if it is locked."""
    with contextlib.ExitStack() as stack:
        try:
            with _files.naming(path, advice=ROOM):
                descriptor = stack.enter_context(_files.lock(path, wait=False))
                if descriptor is not None:
                    _files.sign(descriptor, job=slurm.this_task())
        except _files.DiskFullError:
            raise
        except OSError as error:
            raise _no_lock(path, error) from error
        yield descriptor


def _no_lock(path, error):
    return ValueError(
        f"{str(path)!r} cannot be locked ({error.strerror}), so other "
        "processes could train the same run. Pass --results_dir with a folder "
        "that you can write, on a file system that has locks."
    )
