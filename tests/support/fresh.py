"""Fresh processes without the seconds in which each imports TensorFlow.

This file is a program, too: a server that imports Keras and TensorFlow once,
runs none of it, and forks for each piece of code. Of `rigl_keras` a fork knows
nothing until it imports it.
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

# Libraries that start no threads when they are imported: of a process with
# threads, a fork may hang.
QUIET = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TF_CPP_MIN_LOG_LEVEL": "2",  # as in bin/python
}

# Seconds of processors that what was run has taken.
spent = 0.0


def run_graphs_as_traced(yes=True):
    """TensorFlow rewrites no graph to have it run sooner, or does again.

    To rewrite one takes longer than to run it for the few steps of a test.
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

        What is set as Python or TensorFlow starts has been: `env` is for what
        is read later.

        Args:
            command: What follows `python` on the command line: `-c CODE`,
                `-m MODULE` or a file, and arguments.
            cwd: Folder to run in.
            env: Environment variables to set, beside those of this process.
            timeout: Seconds after which it is killed.

        Returns:
            A `subprocess.CompletedProcess` with captured text.
        """
        process = self.start(*command, cwd=cwd, env=env)
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(
            command, process.returncode, out, err
        )

    def start(self, *command, cwd=None, env=None):
        """Starts a command; returns its `Process`, as `subprocess.Popen`."""
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
    """A fork of the server; what it prints is kept in files."""

    def __init__(self, server, pid, folder):
        self._server, self._folder = server, folder
        self.pid, self.returncode = pid, None

    def poll(self):
        """Returns how it ended, or `None` while it runs."""
        if self.returncode is None:
            ended = self._server.ask(poll=self.pid)
            if ended is not None:
                global spent
                self.returncode, seconds = ended
                spent += seconds
        return self.returncode

    def communicate(self, timeout=None):
        """Waits until it ends; returns what it printed, and its errors."""
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


# What follows is the server.


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
    """Runs a command in this process, which ends with it."""
    import runpy

    code = 1
    try:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            path = os.path.join(task["folder"], name)
            file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # A shell ignores it in what it runs in the background.
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
