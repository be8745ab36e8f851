"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

__all__ = ["DiskFullError", "naming", "set_aside"]


class DiskFullError(OSError):
    """Something could not be written, for want of space.

    Args:
        path: The file, or the folder that it is in.
        reason: What the system says.
        advice: What is left, and what to do.
    """

    def __init__(self, path: str | os.PathLike, reason: str, advice: str):
        super().__init__(
            f"The disk is full: {str(path)!r} could not be written "
            f"({reason}). {advice}"
        )


@contextlib.contextmanager
def naming(path: str | os.PathLike, *, advice: str) -> Iterator[None]:
    """Within the context, a full disk is an error that names `path`.

    Args:
        path: What is being written.
        advice: What the error says of what to do.

    Raises:
        DiskFullError: Something within the context ran out of space.
    """
    try:
        yield
    except (OSError, RuntimeError, tf.errors.OpError) as error:
        # TensorFlow and HDF5 tell by their message alone.
        for code in (errno.ENOSPC, errno.EDQUOT):
            reason = os.strerror(code)
            if getattr(error, "errno", None) == code or reason in str(error):
                raise DiskFullError(path, reason, advice) from error
        raise


def _aside(target):
    """Returns how the name of a folder begins that this machine makes."""
    return f".{target.name}-{platform.node()}-"


def _clear_abandoned(target):
    """Clears up what processes of this machine have left that were killed.

    One that was killed between its last two steps has put the old folder
    aside, and not yet the new one in its place: the old one goes back.
    """
    begin = _aside(target)
    for folder in target.parent.glob(f"{glob.escape(begin)}*"):
        process = folder.name.removeprefix(begin).split("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            if (folder / "old").exists() and not target.exists():
                (folder / "old").rename(target)
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, OSError):  # not ours to judge
            continue


@contextlib.contextmanager
def set_aside(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives a new folder, which takes the place of `target` at the end.

    It lies beside `target`, so that the two are on one disk and the last step
    is a rename. If the context is left by an error, the folder goes and
    `target` is as it was.

    Args:
        target: A folder.
        replace: Whether there may be one already.

    Raises:
        ValueError: Nothing can be written there, or a folder is there that
            may not be replaced.
    """
    # Renaming may move the folder that relative paths begin with.
    target = Path(os.path.abspath(target))
    advice = "Nothing was written. Make room, or pass another path."
    aside = None
    made = [p for p in target.parents if not os.path.exists(p)]
    try:
        try:
            with naming(target, advice=advice):
                target.parent.mkdir(parents=True, exist_ok=True)
                _clear_abandoned(target)
                aside = Path(
                    tempfile.mkdtemp(
                        prefix=f"{_aside(target)}{os.getpid()}-",
                        dir=target.parent,
                    )
                )
        except DiskFullError:
            raise
        except OSError as error:
            raise ValueError(
                f"{str(target)!r} cannot be written ({error.strerror}). Pass "
                "a path in a folder that can."
            ) from error
        new, old = aside / "new", aside / "old"
        with naming(target, advice=advice):
            new.mkdir()
            yield new
            _put(new, target, old, replace)
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if not os.path.lexists(target):
            for folder in made:  # the innermost first
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _put(new, target, old, replace):
    """Puts a folder in the place of another, or leaves all as it is."""
    if os.path.lexists(target) and not replace:
        raise ValueError(
            f"{str(target)!r} has appeared in the meantime. Pass another path."
        )
    try:
        if os.path.lexists(target):
            target.rename(old)
        new.rename(target)
    except BaseException:  # Ctrl-C as well
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        raise
