"""Submits workers as a SLURM job array.

Each task of the array runs the command that a user would start in another
terminal; claims ensure that no run is lost or trained twice. A task that is
about to reach its time limit gets SIGUSR1, ends the current epoch and requeues
itself. SLURM requeues tasks that are preempted or whose node fails.
"""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from rigl_keras import _checks, _files, _reading
from rigl_keras.experiments import exits

__all__ = ["Array", "Flags", "Task", "arrays", "submit", "this_task"]

_SIGNAL = 300  # seconds before the time limit
# The prefix of the flags about SLURM, which are not passed to workers.
_OURS = "slurm"
# A worker trains, whether or not this command only shows what it would submit.
_NOT_PASSED = (_OURS, "dry_run")
_FOLDER = "slurm"  # of scripts and logs, in the folder of results
_SCRIPT = """\
#!/bin/sh
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --chdir={chdir}
#SBATCH --output={output}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{seconds}
echo "task ${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID on $SLURMD_NODENAME,\
 start $((${{SLURM_RESTART_COUNT:-0}} + 1))"
{command} &
worker=$!
asked=
trap 'asked=1; kill -USR1 "$worker"' USR1
wait "$worker"; status=$?
while [ "$status" -gt 128 ] && kill -0 "$worker" 2>/dev/null; do
  wait "$worker"; status=$?  # the signal had ended the wait before
done
# {again}: the worker was stopped, and continues when it is started again.
if [ "$status" = {again} ] || {{ [ -n "$asked" ] && [ "$status" != 0 ]; }}; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of an array, as SLURM reports it.

    Args:
        name: `"12_3"`: task 3 of array 12.
        state: `"pending"`, `"running"` or another state of SLURM.
        place: `"on node1"`, or the reason why it waits: `"(Priority)"`.
    """

    name: str
    state: str
    place: str


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that was submitted.

    Args:
        job: Its number.
        workers: The number of its tasks.
        tasks: The tasks that wait or run. The others have ended.
    """

    job: str
    workers: int
    tasks: tuple[Task, ...]

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for task in self.tasks:
            counts[task.state] = counts.get(task.state, 0) + 1
        counts["ended"] = self.workers - len(self.tasks)
        parts = [f"{n} {state}" for state, n in counts.items() if n]
        of = "worker" if self.workers == 1 else "workers"
        return f"Array {self.job}, {self.workers} {of}: {', '.join(parts)}."


class Flags:
    """The flags about SLURM that commands share.

    Args:
        name: Name of the command.
        module: Its module, which workers run.
    """

    def __init__(self, name: str, module: str):
        self._name, self._module = name, module
        self._workers = flags.DEFINE_integer(
            f"{_OURS}",
            None,
            "Submit this many workers to SLURM, as one job array, and end.",
        )
        self._options = flags.DEFINE_string(
            f"{_OURS}_options",
            "",
            "Options of sbatch, such as '--partition=gpu --time=8:00:00'.",
        )

    @property
    def given(self) -> bool:
        """Whether to submit workers.

        Raises:
            ValueError: There are options, but no number of workers.
        """
        if self._workers.value is None and self._options.present:
            raise ValueError(
                "--slurm_options needs a number of workers. Pass --slurm=N, "
                "too."
            )
        return self._workers.value is not None

    def submit(
        self, argv: Sequence[str], folder: Path, *, extra: Sequence[str] = ()
    ) -> None:
        """Submits workers with this command line, and prints the job.

        Args:
            argv: The command line, without flags.
            folder: Folder of the results.
            extra: Further flags for the workers.

        Raises:
            ValueError: SLURM is not installed, or there are too few workers.
            FailedError: SLURM refuses them.
        """
        job = submit(**self._array(argv, folder, extra))
        print(
            f"Submitted {self._workers.value} workers, array {job}. Their "
            f"logs: {folder / _FOLDER}. The same command with --status instead "
            f"of --{_OURS} shows their progress."
        )

    def show(
        self, argv: Sequence[str], folder: Path, *, extra: Sequence[str] = ()
    ) -> None:
        """Prints what `submit` would submit, and submits nothing.

        Args:
            argv, folder, extra: As in `submit`.

        Raises:
            ValueError: There are too few workers.
        """
        array = self._array(argv, folder, extra)
        options = array.pop("options")
        script = _script(**array)
        of = "worker" if array["workers"] == 1 else "workers"
        command = shlex.join(["sbatch", *options])
        print(
            f"\n--{_OURS} would submit {array['workers']} {of} as one array: "
            f"{command}, with this script:\n\n{script}",
            end="",
        )
        if shutil.which("sbatch") is None:
            print("\nThere is no sbatch on the PATH of this machine.")

    def _array(self, argv, folder, extra) -> Any:
        """Returns the arguments of the function `submit`."""
        return {
            "command": [
                *(sys.executable, "-m", self._module, *argv[1:]),
                *_given_flags(),
                *extra,
            ],
            "name": "-".join([self._name, *argv[1:]]),
            "workers": self._workers.value,
            "options": _words(self._options.value),
            "folder": folder,
        }


def _given_flags():
    """Returns the flags of this command line that workers get."""
    given = {}
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if flag.present and not name.startswith(_NOT_PASSED):
            # By id, as a flag has two names.
            given[id(flag)] = flag.serialize().splitlines()
    return [word for words in given.values() for word in words]


def _words(options):
    try:
        return shlex.split(options)
    except ValueError as error:
        raise ValueError(
            f"--{_OURS}_options must be quoted as in a shell ({error}). "
            f"Received: {options!r}."
        ) from error


def submit(
    command: Sequence[str],
    *,
    name: str,
    workers: int,
    options: Sequence[str],
    folder: Path,
) -> str:
    """Submits an array of identical workers.

    Args:
        command: The command that each worker runs, in the current folder.
        name: Name of the job.
        workers: Number of workers, at least 1.
        options: Options of sbatch. They override those of the script.
        folder: Folder of the results, which all nodes must see. Its folder
            `slurm/` holds the script and the logs.

    Returns:
        The number of the job.

    Raises:
        ValueError: SLURM is not installed, or there are too few workers.
        FailedError: SLURM refuses them.
    """
    script = _script(command, name=name, workers=workers, folder=folder)
    if shutil.which("sbatch") is None:
        raise ValueError(
            f"--{_OURS} needs SLURM, and there is no sbatch on the PATH. Start "
            "this on a machine of the cluster from which jobs are submitted."
        )
    folder = folder.resolve() / _FOLDER
    folder.mkdir(exist_ok=True)
    with _files.unfinished_folder(folder) as unfinished:
        path = unfinished / name
        path.write_text(script)
        job = _said(["sbatch", "--parsable", *options, str(path)])
        job = job.split(";")[0]  # the name of the cluster may follow
        _files.put(path, folder / f"{job}.sh")
    return job


def _script(command, *, name, workers, folder):
    """Returns the script of an array, with the arguments of `submit`."""
    _checks.integer(f"--{_OURS}", workers, at_least=1)
    folder = folder.resolve() / _FOLDER
    return _SCRIPT.format(
        name=name,
        last=workers - 1,
        chdir=_quoted(Path.cwd()),
        output=_quoted(f"{folder}/").replace("%", "%%") + "%A_%a.log",
        seconds=_SIGNAL,
        command=shlex.join(command),
        again=os.EX_TEMPFAIL,
    )


def arrays(folder: Path) -> list[Array]:
    """Returns the arrays that were submitted for a folder of results.

    Raises:
        FailedError: SLURM does not answer.
    """
    scripts = sorted((folder / _FOLDER).glob("*.sh"), key=os.path.getmtime)
    if not scripts:
        return []
    tasks: dict[str, list[Task]] = {}
    form = "%i|%T|%N|%r"
    asked = ["squeue", "--me", "--array", "--noheader", f"--format={form}"]
    for line in _said(asked).splitlines():
        name, state, nodes, reason = line.split("|")
        place = f"on {nodes}" if nodes else f"({reason})"
        task = Task(name, state.lower(), place)
        tasks.setdefault(name.split("_")[0], []).append(task)
    return [
        Array(path.stem, _workers(path), tuple(tasks.get(path.stem, ())))
        for path in scripts
    ]


def _workers(script):
    last = re.search(r"--array=0-(\d+)", _reading.text(script))
    return int(last[1]) + 1 if last else 0


def _said(command):
    """Returns the output of a SLURM command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise exits.FailedError(
            f"SLURM's {command[0]} is not on the PATH."
        ) from error
    if done.returncode:
        raise exits.FailedError(
            f"{command[0]} failed: {done.stderr.strip() or done.returncode}"
        )
    return done.stdout.strip()


def _quoted(path):
    """Returns a path as `#SBATCH` reads it."""
    return str(path).replace(" ", "\\ ")


def this_task() -> str:
    """Returns the array task that this process belongs to, or `""`."""
    job, task = (
        os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK")
    )
    return f"{job}_{task}" if job and task else ""
