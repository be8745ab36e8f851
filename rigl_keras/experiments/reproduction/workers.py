"""Trains missing runs, together with other processes that do the same."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rigl_keras.experiments import exits
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.progress import Progress
from rigl_keras.experiments.reproduction.results import Results

__all__ = ["GRACE", "command_of", "train_missing"]

# Seconds that a run has to end its epoch after SIGUSR1.
GRACE = 240.0

_POLL = 0.5  # seconds between looks at a run that is being trained
_WAIT = 2.0  # seconds between looks at runs that others train


def train_missing(
    runs: Sequence[Run],
    results: Results,
    *,
    progress: Progress | None = None,
    data_dir: str | None = None,
    wait: bool = True,
) -> dict[Run, str]:
    """Trains all runs that have no result yet, one after the other.

    Each run has its own process, and continues if it was interrupted. Runs
    that another process has claimed are skipped. When only such runs are
    left, this function waits for them, and takes over those that their
    process abandons.

    After an `exits.StopRequest`, the current run ends its epoch, and will
    continue from that checkpoint. If this takes longer than `GRACE`, the run
    is killed, and will repeat the epoch.

    Args:
        runs: The runs, each after those that it starts from.
        results: Where they are kept.
        progress: Receives the events.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.
        wait: Whether to wait for runs that other processes train. If not,
            this returns when only such runs are left.

    Returns:
        `{run: reason}` of the runs that failed meanwhile, here or elsewhere,
        or that start from a failed run.

    Raises:
        ValueError: A run has a result of another configuration, or starts
            from a run that has no result and is not among the runs.
    """
    progress = progress or Progress()
    failed: dict[Run, str] = {}
    left = [run for run in runs if not results.finished(run)]
    _check_sources(left, results)
    # Runs that failed in earlier commands are tried again.
    old = {run: results.failure_stamp(run) for run in left}
    while left:
        waiting = []
        for run in list(left):
            source = run.source
            reason = _failed_meanwhile(run, results, old)
            if source in failed:
                reason = f"it starts from {source.name}, which failed"
            if reason is not None:
                failed[run] = reason
                left.remove(run)
            elif results.finished(run):
                progress.elsewhere(run)
                left.remove(run)
            elif source is not None and not results.finished(source):
                waiting.append(run)
            else:
                done, reason = _trained_if_free(
                    run, results, progress, data_dir
                )
                if not done:
                    waiting.append(run)
                    continue
                left.remove(run)
                if reason is not None:
                    failed[run] = reason
        if waiting and waiting == left:
            if not wait:
                break
            progress.wait(waiting)
            time.sleep(_WAIT)
    return failed


def _check_sources(runs, results):
    """Raises ValueError if a run would wait for one that nobody trains."""
    for run in runs:
        source = run.source
        if source is None or source in runs or results.finished(source):
            continue
        raise ValueError(
            f"{run.name} starts from {source.name}, which has no result and "
            "is not among the runs. Pass it, too."
        )


def _failed_meanwhile(run, results, old):
    """Returns why a run has failed since the failures in `old`, or None."""
    stamp = results.failure_stamp(run)
    if stamp != old[run]:
        # Another process has begun it again: every failure is now a new one.
        old[run] = None
    return None if stamp is None or stamp == old[run] else stamp[-1]


def _trained_if_free(run, results, progress, data_dir):
    """Trains a run unless another process does.

    Returns:
        `(done, reason)`: whether the run has ended, and why it failed or None.
    """
    with results.claim(run) as claim:
        if claim is None:
            return False, None
        if results.finished(run):  # meanwhile, by another process
            progress.elsewhere(run)
            return True, None
        results.forget_failure(run)
        progress.start(run)
        start = time.monotonic()
        reason = _trained(run, results, claim, progress, data_dir)
        if reason is not None:
            results.record_failure(run, reason)
        progress.finish(run, seconds=time.monotonic() - start, failure=reason)
    return True, reason


def _trained(run, results, claim, progress, data_dir):
    """Trains a run in a new process; returns why it failed, or None."""
    path = results.folder(run) / "log.txt"
    with path.open("ab") as log:
        start_of_log = log.tell()
        child = subprocess.Popen(
            command_of(run, data_dir=data_dir, parent=os.getpid()),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Paths to the runs that a run starts from are relative to this.
            cwd=results.path,
            env=_environment(),
            # The child holds the claim too: if this process is killed, the
            # run stays claimed until the child has ended.
            pass_fds=[claim],
        )
        try:
            while child.poll() is None:
                progress.epoch(run, results.epochs(run))
                time.sleep(_POLL)
        except exits.StopRequest:
            _end_epoch(child)
            raise
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if child.returncode == 0 and results.finished(run):
        return None
    if child.returncode < 0:
        return f"its process was killed by {_signal_name(-child.returncode)}"
    with path.open("rb") as log:
        log.seek(start_of_log)
        said = log.read().decode(errors="replace").splitlines()
    said = [line for line in said if line.strip()]
    # The last lines that bin/train prints describe the error, if it caught it.
    crashed = any(line.startswith("Traceback (most recent") for line in said)
    begins = [i for i, line in enumerate(said) if line.startswith("train: ")]
    last = said[begins[-1] :] if begins and not crashed else said[-1:]
    return "\n".join(last) or (
        f"its process ended with status {child.returncode}"
    )


def _end_epoch(child):
    """Asks a run to end after its epoch, and waits for at most `GRACE`."""
    child.send_signal(signal.SIGUSR1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


def _environment():
    """Returns the environment for runs, with absolute paths.

    Runs have another working folder.
    """
    paths = {
        name: os.path.abspath(os.path.expanduser(os.environ[name]))
        for name in ("RIGL_KERAS_CACHE", "TFDS_DATA_DIR", "XDG_CACHE_HOME")
        if os.environ.get(name)
    }
    return {**os.environ, **paths}


def command_of(
    run: Run, *, data_dir: str | None = None, parent: int | None = None
) -> list[str]:
    """Returns the command that trains a run, in the folder of its results.

    Args:
        run: The run.
        data_dir: Folder of prepared data sets.
        parent: A process; the run ends when it ends.
    """
    arguments = run.arguments
    command = [
        sys.executable,
        "-m",
        "rigl_keras.experiments.runs.train_command",
    ]
    command += [f"--gin_file={file}" for file in arguments["gin_files"]]
    command += [f"--gin_bindings={line}" for line in arguments["bindings"]]
    command += [f"--seed={run.seed}", f"--run_dir={run.name}/run", "--resume"]
    if run.density is not None:
        command.append(f"--density={run.density}")
    if data_dir is not None:
        command.append(f"--data_dir={Path(data_dir).resolve()}")
    if parent is not None:
        command.append(f"--parent={parent}")
    return command
