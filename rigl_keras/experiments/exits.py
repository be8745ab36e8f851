"""How every command starts and ends: errors that users can mend are a line.

Status 0: all is done. 1: something failed that may be tried again. 2: what was
asked for cannot be done. 75: SIGUSR1 asked it to stop, and the same command
continues. 130: Ctrl-C.

Flags are parsed, and `--help` is answered, before TensorFlow is imported.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import cast

from absl import app, flags

from rigl_keras import _extras
from rigl_keras._extras import MissingPackageError
from rigl_keras._files import disk_is_full
from rigl_keras._text import printable
from rigl_keras.experiments import command_line, quiet_start

__all__ = [
    "FailedError",
    "StopRequest",
    "check_flags_alone",
    "numbers",
    "one_line",
    "raise_stop_requests",
    "run_command",
]


def numbers(name: str, texts: Sequence[str], kind: type) -> tuple:
    """Returns the numbers that a flag lists.

    Args:
        name: Of the flag.
        texts: What is between its commas.
        kind: int or float.

    Raises:
        ValueError: One of them is no number of that kind.
    """
    try:
        return tuple(kind(text) for text in texts)
    except ValueError as error:
        raise ValueError(
            f"--{name} takes {'whole ' if kind is int else ''}numbers, "
            f"separated by commas. Received: {','.join(texts)!r}."
        ) from error


def check_flags_alone(argv: Sequence[str]) -> None:
    """Raises ValueError where a command line names more than flags."""
    if len(argv) > 1:
        raise ValueError(
            f"There is nothing to name but flags. Received: {argv[1]!r}."
        )


class FailedError(Exception):
    """Ends a command with status 1, and its message as the last line."""


class StopRequest(KeyboardInterrupt):
    """Ends a command that SIGUSR1 asked to stop, the way Ctrl-C does.

    The command ends with status 75, and continues when it is started again.
    """


def raise_stop_requests() -> None:
    """Has the first SIGUSR1 raise `StopRequest` in the main thread.

    Schedulers send it some minutes before they end a process. Further ones are
    ignored: the process is about to end.
    """

    def stop(*_):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        raise StopRequest

    signal.signal(signal.SIGUSR1, stop)


def run_command(
    name: str,
    run: Callable[[Sequence[str]], None],
    *,
    about: str | None,
    interrupted: str = "begin again with",
    added: Sequence[str] = (),
    library: bool = True,
    traceback: Callable[[], bool] = lambda: False,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the flags that are defined, and runs a command to its end.

    Args:
        name: Name of the command, which begins the line of an error.
        run: What the command does, given what is left of the command line.
        about: What `--help` says above the flags, at most 80 columns wide.
        interrupted: What to say at Ctrl-C, before the command line.
        added: Flags that the command line has then, in addition.
        library: Whether the command needs TensorFlow.
        traceback: Returns whether the user wants to see where an error was
            raised.
        argv: The command line. None: that of the process.
    """

    def run_quietly(argv):
        quiet_start.our_messages(name)
        if library:
            quiet_start.load_library()
            quiet_start.our_messages(name)  # of TensorFlow's logger, too
        run(argv)

    ends = one_line(
        name,
        run_quietly,
        interrupted=interrupted,
        added=added,
        traceback=traceback,
    )
    app.run(
        ends,
        argv=argv,
        flags_parser=functools.partial(_parsed, name, about or ""),
    )


def _parsed(name, about, argv):
    """Returns what is left of a command line, or ends with help or an error."""
    if command_line.asks_for_help(argv):
        print(command_line.help_text(name, about))
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        said = command_line.flag_error(error)
        _end(f"{name}: {said} {command_line.called(name)} --help lists all.", 2)


def one_line(
    name: str,
    run: Callable[[Sequence[str]], None],
    *,
    interrupted: str = "begin again with",
    added: Sequence[str] = (),
    traceback: Callable[[], bool] = lambda: False,
) -> Callable[[Sequence[str]], None]:
    """Returns what `app.run` takes, which ends with a line where it fails.

    The arguments are those of `run_command`. A ValueError, a package that is
    missing, a disk that is full or read-only, a folder that may not be
    written: the user can mend these, and needs no traceback. All else is
    raised.
    """

    @functools.wraps(run)
    def run_or_tell(argv):
        try:
            run(argv)
            sys.stdout.flush()  # which a full disk may be at the end of
        except StopRequest:
            again = command_line.repeated(name, added)
            _end(
                f"{name}: stopped, as SIGUSR1 asked; {interrupted}: {again}",
                os.EX_TEMPFAIL,
            )
        except KeyboardInterrupt:
            again = command_line.repeated(name, added)
            _end(f"\n{name}: interrupted; {interrupted}: {again}", 130)
        except Exception as error:  # TensorFlow and HDF5 have their own
            said = _said(
                error,
                (ValueError, FailedError, MissingPackageError, app.UsageError),
            )
            if said is None or traceback():
                raise
            _end(f"{name}: {said}", 1 if isinstance(error, FailedError) else 2)

    return run_or_tell


def _end(line, status):
    print(line, file=sys.stderr)
    _give_up_output()
    sys.exit(status)


def _said(error, refusals):
    """Returns what to say of an error, or None if the user can't mend it."""
    if isinstance(error, refusals):
        return _message(error)
    if isinstance(error, ModuleNotFoundError):
        # Imported once flags are parsed.
        if error.name is None or error.name not in _extras.OPTIONAL:
            return None
        return f"this needs {_extras.missing(error.name)}"
    return _of_a_file(error)


def _message(error):
    """Returns an error's own words."""
    # gin adds which of its calls failed; the message says more.
    return "\n".join(
        printable(line)
        for line in (str(error) or type(error).__name__).split("\n")
        if "In call to configurable" not in line
    )


def _of_a_file(error):
    """Returns what to say of an error, or None if it is no file's."""
    name = getattr(error, "filename", None)
    of = "" if name is None else f" of {str(name)!r}"
    reason = disk_is_full(error)
    if isinstance(error, OSError) and error.errno is None:
        return _message(error)  # in our own words
    if reason:
        return f"The disk{of} is full ({reason}). Make room and try again."
    if isinstance(error, OSError):
        file = "A file" if name is None else repr(str(name))
        return f"{file} cannot be used ({os.strerror(cast(int, error.errno))})."
    return None


def _give_up_output():
    """Drops what the output doesn't take.

    Python would try once more as it ends, and end with a status of its own.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
