"""How a command ends where a disk or a file fails it: with one line."""

import functools
import os
import sys
from collections.abc import Callable, Sequence

from rigl_keras._files import disk_is_full

__all__ = ["one_line"]


def one_line(
    command: str,
    run: Callable[[Sequence[str]], None],
    *,
    traceback: Callable[[], bool] = lambda: False,
) -> Callable[[Sequence[str]], None]:
    """Returns what `app.run` takes, which ends with a line where a file fails.

    A disk that is full or read-only, a folder that may not be written: the
    user can mend these, and needs no traceback. The status is 2.

    Args:
        command: Its name, which begins the line.
        run: What the command does.
        traceback: Whether the user has asked for one, even so.
    """

    @functools.wraps(run)
    def run_or_tell(argv):
        try:
            run(argv)
            sys.stdout.flush()  # which a full disk may be at the end of
        except Exception as error:  # TensorFlow and HDF5 have their own
            line = _line(error)
            if line is None or traceback():
                raise
            print(f"{command}: {line}", file=sys.stderr)
            _give_up_output()
            sys.exit(2)

    return run_or_tell


def _line(error):
    """Returns what to say of an error, or None if it is no file's."""
    name = getattr(error, "filename", None)
    of = "" if name is None else f" of {str(name)!r}"
    reason = disk_is_full(error)
    if isinstance(error, OSError) and error.errno is None:
        return str(error)  # in our own words
    if reason:
        return f"The disk{of} is full ({reason}). Make room and try again."
    if isinstance(error, OSError):
        file = "A file" if name is None else repr(str(name))
        return f"{file} cannot be used ({os.strerror(error.errno)})."
    return None


def _give_up_output():
    """Drops what the output doesn't take.

    Python would try once more as it ends, and end with a status of its own.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
