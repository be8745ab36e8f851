"""Files of a run: whole or not at all, and a full disk names the file."""

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

from rigl_keras import _files
from rigl_keras._files import UNFINISHED

__all__ = ["naming", "remove_unfinished", "whole", "write"]

# A full disk is an error that names the file.
naming = functools.partial(
    _files.naming,
    advice="The last checkpoint is intact. Make room, then pass --resume to "
    "continue.",
)


def write(path, text):
    with naming(path):
        _files.write(path, text)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a file to write, which then appears at `path`, whole."""
    with naming(path), _files.whole(path) as unfinished:
        yield unfinished


def remove_unfinished(folder):
    """Removes what processes have left, of any machine; the run is ours."""
    for left in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
