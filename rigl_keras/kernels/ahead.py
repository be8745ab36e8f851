"""Builds the op library before it is needed, while other things go on."""

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
except library.BuildError:  # whoever needs it next sees why
    pass
"""
_lock = threading.Lock()
_begun = False


def build_ahead() -> subprocess.Popen | None:
    """Begins to build the op library, if it is not there, and returns at once.

    Another process builds it: a thread would hold locks in the children of a
    process that forks, and end with the process. Whoever needs the library
    meanwhile waits for it (`library.load`). If this process ends, the build
    goes on, and the next process finds the library. It is begun once in a
    process, and not at all where another process builds it already, or where
    it cannot be built.

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
        # What is wrong is said when the library is needed.
        except (BuildError, OSError):
            return None


def _can_start():
    """Returns whether `sys.executable` is Python, and no program of a user."""
    name = os.path.basename(sys.executable or "")
    return name.startswith("python") and not getattr(sys, "frozen", False)


def _is_being_built(folder):
    if not folder.is_dir():
        return False
    with _files.lock(folder / ".lock", wait=False) as descriptor:
        return descriptor is None


def _started():
    process = subprocess.Popen(
        # `-I`: what lies in the working directory is not imported instead.
        [sys.executable, "-I", "-c", _BUILD, json.dumps(_absolute_path())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is for this process alone.
        start_new_session=True,
    )
    # So that it is no zombie when it is done.
    threading.Thread(target=process.wait, daemon=True).start()
    atexit.register(_leave, process)
    return process


def _absolute_path():
    """Returns where Python looks for modules, from any folder."""
    return [os.path.abspath(part) for part in sys.path]


def _leave(process):
    """Leaves a process alone, which may outlive this one."""
    if process.poll() is None:
        process.returncode = 0  # or Python warns that it still runs
