"""Runs code in fresh processes that need not import TensorFlow.

This file is also a program: a server that imports Keras and TensorFlow once,
without running them, and forks for each piece of code. It does not import
`rigl_keras`.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback

# Keeps libraries from starting threads on import, as the fork of a process
# with threads may hang.
QUIET = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TF_CPP_MIN_LOG_LEVEL": "2",  # as in bin/python
}

# Processor seconds of all code that was run.
spent = 0.0


def run_graphs_as_traced(yes=True):
    """Turns TensorFlow's rewriting of graphs off, or on again.

    Rewriting a graph takes longer than running it for the steps of a test.
    """
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options(
        {"disable_meta_optimizer": yes}
    )


class Server:
    """Runs code in fresh processes."""

    def __init__(self, graphs_as_traced=False):
        self._graphs_as_traced = graphs_as_traced
        self._process = None
        self._printed = tempfile.TemporaryDirectory()

    def __call__(self, *command, cwd=None, env=None, timeout=None):
        """Runs a command as `python` does, until it ends.

        Python and TensorFlow have already started, so variables in `env` that
        they read at their start have no effect.

        Args:
            command: The arguments of `python`: `-c CODE`, `-m MODULE` or a
                file, and further arguments.
            cwd: Folder to run in.
            env: Environment variables in addition to those of this process.
            timeout: Seconds after which the command is killed.

        Returns:
            A `subprocess.CompletedProcess` with captured text.
        """
        process = self.start(*command, cwd=cwd, env=env)
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(
            command, process.returncode, out, err
        )

    def start(self, *command, cwd=None, env=None):
        """Starts a command; returns its `Process`, like `subprocess.Popen`."""
        folder = tempfile.mkdtemp(dir=self._printed.name)
        pid = self.ask(
            start={
                "command": [str(word) for word in command],
                "cwd": str(cwd or os.getcwd()),
                "env": {**os.environ, **(env or {})},
                "folder": folder,
            }
        )
        return Process(self, pid, folder)

    def ask(self, **question):
        if self._process is None:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    *["as traced"] * self._graphs_as_traced,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **QUIET},
            )
            threads = int(self._process.stdout.readline())
            assert threads == 1
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self):
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
        self._printed.cleanup()


class Process:
    """A fork of the server, which prints to files."""

    def __init__(self, server, pid, folder):
        self._server, self._folder = server, folder
        self.pid, self.returncode = pid, None

    def poll(self):
        """Returns the exit status, or `None` while it runs."""
        if self.returncode is None:
            ended = self._server.ask(poll=self.pid)
            if ended is not None:
                global spent
                self.returncode, seconds = ended
                spent += seconds
        return self.returncode

    def communicate(self, timeout=None):
        """Waits until it ends; returns its standard output and error."""
        start = time.monotonic()
        while self.poll() is None:
            time.sleep(0.005)
            if timeout is not None and time.monotonic() > start + timeout:
                self.kill()
                raise subprocess.TimeoutExpired("a fresh process", timeout)
        return self.printed("stdout"), self.printed("stderr")

    def printed(self, name):
        path = pathlib.Path(self._folder, name)
        return path.read_text(errors="replace") if path.exists() else ""

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


# The server.


def serve():
    import keras  # noqa: F401
    import tensorflow as tf  # noqa: F401

    if "as traced" in sys.argv:
        run_graphs_as_traced()
    print(len(os.listdir("/proc/self/task")), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            answer = os.fork() or become(question["start"])
        else:
            pid, status, used = os.wait4(question["poll"], os.WNOHANG)
            code = os.waitstatus_to_exitcode(status)
            seconds = used.ru_utime + used.ru_stime
            answer = [code, seconds] if pid else None
        print(json.dumps(answer), flush=True)


def become(task):
    """Runs a command in this process, then exits."""
    import runpy

    code = 1
    try:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            path = os.path.join(task["folder"], name)
            file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # A shell makes background processes ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(task["env"])
        os.chdir(task["cwd"])
        how, *arguments = task["command"]
        if how in ("-c", "-m"):
            what, *arguments = arguments
        sys.argv = ["-c", *arguments]
        if how == "-c":
            sys.path[0] = ""
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        elif how == "-m":
            sys.path[0] = task["cwd"]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = task["command"]
            sys.path[0] = os.path.dirname(how)
            runpy.run_path(how, run_name="__main__")
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
