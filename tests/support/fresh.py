"""Fresh processes without the seconds in which each imports TensorFlow.

This file is a program, too: a server that imports Keras and TensorFlow once,
runs none of it, and forks for each piece of code. Of `rigl_keras` a fork knows
nothing until it imports it.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback

# Libraries that start no threads of their own when they are imported: of a
# process with threads, a fork may hang.
QUIET = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TF_CPP_MIN_LOG_LEVEL": "2",  # as in bin/python
}


# Seconds of processors that what was run has taken.
spent = 0.0


class Server:
    """Runs code in fresh processes, one at a time."""

    def __init__(self):
        self._process = None

    def run(self, *command, cwd=None, env=None):
        """Runs `-c CODE ARGUMENT...` or `-m MODULE ARGUMENT...`, as python.

        What is set as Python or TensorFlow starts, as PYTHONPATH is, has been:
        `env` is for what is read later.

        Args:
            command: What follows `python` on the command line.
            cwd: Folder to run in.
            env: Environment variables to set, beside those of this process.

        Returns:
            A `subprocess.CompletedProcess` with captured text.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **QUIET},
            )
            threads = int(self._process.stdout.readline())
            assert threads == 1
        with tempfile.TemporaryDirectory() as folder:
            task = {
                "command": [str(word) for word in command],
                "cwd": str(cwd or os.getcwd()),
                "env": {**os.environ, **(env or {})},
                "folder": folder,
            }
            print(json.dumps(task), file=self._process.stdin, flush=True)
            code, seconds = self._process.stdout.readline().split()
            global spent
            spent += float(seconds)
            out, err = (
                (pathlib.Path(folder) / name).read_text(errors="replace")
                for name in ("stdout", "stderr")
            )
        return subprocess.CompletedProcess(command, int(code), out, err)

    def close(self):
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()


# What follows is the server.


def serve():
    import keras  # noqa: F401
    import tensorflow as tf  # noqa: F401

    print(len(os.listdir("/proc/self/task")), flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(json.loads(line))
        _, status, used = os.wait4(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(code, used.ru_utime + used.ru_stime, flush=True)


def become(task):
    """Runs a command in this process, which ends with it."""
    code = 1
    try:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            path = os.path.join(task["folder"], name)
            file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(task["env"])
        os.chdir(task["cwd"])
        kind, what, *arguments = task["command"]
        sys.argv = ["-c", *arguments]
        sys.path[0] = "" if kind == "-c" else task["cwd"]
        if kind == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        else:
            import runpy

            runpy.run_module(what, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
