"""Builds the op library in the background, before it is needed."""

import atexit
import json
import os
import subprocess
import sys
import threading

from rigl_keras import _files
from rigl_keras.kernels import library
from rigl_keras.kernels.toolchain import BuildError, find_compiler

__all__ = ["build_ahead"]

_BUILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from rigl_keras.kernels import library
try:
    library.build()
except library.BuildError:  # the next use shows the error
    pass
"""
_lock = threading.Lock()
_begun = False


def build_ahead() -> subprocess.Popen | None:
    """Starts to build the op library, if it is missing, and returns at once.

    Another process builds it: a thread would hold locks in forked children, and
    end with the process. Anyone who needs the library meanwhile waits for it
    (`library.load`). If this process ends, the build continues, and the next
    process finds the library. A build starts at most once in a process, and not
    if another process builds already or if building is impossible.

    Returns:
        The process, or None.
    """
    global _begun
    with _lock:
        if _begun or library.is_loaded() or not _can_start():
            return None
        _begun = True
        try:
            find_compiler()
            path = library.path()
            if path.is_file() or _is_being_built(path.parent):
                return None
            return _started()
        # The error is shown when the library is needed.
        except (BuildError, OSError):
            return None


def _can_start():
    """Returns whether `sys.executable` is Python, not a user's program."""
    name = os.path.basename(sys.executable or "")
    return name.startswith("python") and not getattr(sys, "frozen", False)


def _is_being_built(folder):
    if not folder.is_dir():
        return False
    with _files.lock(folder / ".lock", wait=False) as descriptor:
        return descriptor is None


def _started():
    process = subprocess.Popen(
        # `-I`: modules in the working directory are not imported instead.
        [sys.executable, "-I", "-c", _BUILD, json.dumps(_absolute_path())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is for this process only.
        start_new_session=True,
    )
    # So that it does not stay as a zombie.
    threading.Thread(target=process.wait, daemon=True).start()
    atexit.register(_leave, process)
    return process


def _absolute_path():
    """Returns the search path of Python, with absolute folders."""
    return [os.path.abspath(part) for part in sys.path]


def _leave(process):
    """Detaches a process that may outlive this one."""
    if process.poll() is None:
        process.returncode = 0  # otherwise Python warns that it still runs
