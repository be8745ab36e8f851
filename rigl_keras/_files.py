"""Files and folders that appear whole or not at all, and locks on them.

A file that has appeared is on the disk, and survives a power cut.
"""

import contextlib
import errno
import glob
import itertools
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "DiskFullError",
    "UNFINISHED",
    "clear_unfinished",
    "disk_is_full",
    "is_locked",
    "keep",
    "lock",
    "naming",
    "put",
    "set_aside",
    "sign",
    "unfinished_folder",
    "whole",
    "write",
]

# How the name of a folder of unfinished files begins. A killed process leaves
# its folder behind.
UNFINISHED = ".unfinished-"


# Seconds between attempts to lock a file.
_PAUSES = (0.01, 0.02, 0.04)


class DiskFullError(OSError):
    """A file could not be written because the disk is full.

    Args:
        path: The file, or the folder that it is in.
        reason: What the system says.
        advice: What remains, and what to do.
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
        path: The file or folder that is being written.
        advice: What to do, for the error's message.

    Raises:
        DiskFullError: Something within the context ran out of space.
    """
    try:
        yield
    except Exception as error:  # TensorFlow and HDF5 raise their own
        reason = None
        if not isinstance(error, DiskFullError):  # it names a path already
            reason = disk_is_full(error)
        if reason is None:
            raise
        raise DiskFullError(path, reason, advice) from error


def disk_is_full(error: Exception) -> str | None:
    """Returns the system's message if an error means a full disk, or None."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason = os.strerror(code)
        # With TensorFlow and HDF5, only the message tells.
        if getattr(error, "errno", None) == code or reason in str(error):
            return reason
    return None


@contextlib.contextmanager
def lock(
    path: str | os.PathLike, *, shared: bool = False, wait: bool = True
) -> Iterator[int | None]:
    """Locks a file against other processes until the end of the block.

    The kernel frees the lock as soon as the process is gone, however it ends.
    A child process that inherits the descriptor holds the lock as well.

    Args:
        path: The file; made if it does not exist.
        shared: Whether several processes may hold it at once, all shared.
        wait: Whether to wait for the process that holds it.

    Yields:
        The file's descriptor, or None if another process holds the lock and
        `wait` is False.

    Raises:
        OSError: The file cannot be made, or its file system has no locks.
    """
    descriptor = _locked(path, shared=shared, wait=wait)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(path, *, shared, wait):
    """Returns the descriptor of a file that is locked now, or None."""
    import fcntl  # not on every platform that exports

    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    pauses = iter(_PAUSES)
    while True:
        # The umask decides who may write the file: a group may share a folder.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            # The previous holder removed the file. A new one may exist.
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            # Another process may hold it for an instant, in `is_locked`.
            pause = next(pauses, None)
            if pause is None:
                return None
            time.sleep(pause)
        except BaseException:  # Ctrl-C as well
            os.close(descriptor)
            raise


def is_locked(path: str | os.PathLike) -> bool:
    """Returns whether a process has locked a file, which need not exist.

    Raises:
        OSError: It cannot be read, or its file system has no locks.
    """
    import fcntl  # not on every platform that exports

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that several processes may ask at once.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def sign(descriptor: int, *, job: str = "") -> None:
    """Writes the holder of a lock into its file: machine, process, time, job.

    Args:
        descriptor: Of the locked file.
        job: What a scheduler calls the process, if it started it.
    """
    parts = (platform.node(), os.getpid(), f"{time.time():.0f}", job)
    who = " ".join(map(str, parts)).rstrip() + "\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, who.encode(), 0)


def write(
    path: str | os.PathLike, content: str | bytes, *, advice: str | None = None
) -> None:
    """Writes a file whole or not at all.

    Args:
        path: The file. Its folder must exist.
        content: The whole content; text is written as UTF-8.
        advice: As in `whole`.
    """
    with whole(path, advice=advice) as unfinished:
        if isinstance(content, str):
            content = content.encode()
        unfinished.write_bytes(content)


@contextlib.contextmanager
def whole(
    path: str | os.PathLike, *, advice: str | None = None
) -> Iterator[Path]:
    """Yields a file to write, which then appears at `path`, whole.

    After an error the old file at `path`, if any, stays.

    Args:
        path: The file. Its folder must exist.
        advice: What to do, for the error that names the file if the disk is
            full. None: the original error is raised.

    Yields:
        A path of the same name in another folder, on the same disk.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        if advice is not None:
            stack.enter_context(naming(path, advice=advice))
        folder = stack.enter_context(unfinished_folder(path.parent))
        # With the same name: Keras reads the format from it.
        yield folder / path.name
        put(folder / path.name, path)


def put(finished: Path, path: Path) -> None:
    """Moves a finished file to `path`, and replaces a file there."""
    keep(finished)
    finished.replace(path)
    keep(path.parent)


@contextlib.contextmanager
def unfinished_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a folder in `path` for unfinished files, removed at the end.

    It also removes what killed processes of this machine left there.
    """
    path = Path(path)
    clear_unfinished(path)
    folder = made = path / f"{_unfinished()}{os.getpid()}"
    for number in itertools.count(1):
        try:
            made.mkdir()
            break
        except FileExistsError:  # another thread is writing
            made = path / f"{folder.name}-{number}"
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def keep(path: str | os.PathLike) -> None:
    """Makes a file, or a folder's list of names, survive a power cut.

    Otherwise a power cut may leave a file's name without its content.
    """
    if os.name == "nt":  # where folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _keep_all(folder):
    """Keeps a folder and everything in it."""
    for parent, _, files in os.walk(folder):
        for name in files:
            keep(os.path.join(parent, name))
        keep(parent)


def _unfinished():
    """Returns the prefix of this machine's unfinished folders."""
    return f"{UNFINISHED}{platform.node()}-"


def clear_unfinished(path: Path, *, of_others: bool = False) -> None:
    """Removes unfinished folders that killed processes left in a folder.

    Args:
        path: The folder.
        of_others: Whether to remove those of other machines and of live
            processes, too. Then nobody else may be writing to the folder.
    """
    begin = UNFINISHED if of_others else _unfinished()
    for folder in path.glob(f"{glob.escape(begin)}*"):
        if of_others or _is_gone(folder.name.removeprefix(begin)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_gone(name):
    """Returns whether the process has ended whose number begins a name."""
    try:
        os.kill(int(name.split("-")[0]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OSError):  # not ours to judge
        return False
    return False


def _aside(target):
    """Returns the prefix of the folders that this machine makes."""
    return f".{target.name}-{platform.node()}-"


def _clear_abandoned(target):
    """Removes what killed processes of this machine left behind.

    A process killed between its last two steps has moved the old folder aside,
    but not the new one into its place. Then the old one goes back.
    """
    begin = _aside(target)
    for folder in target.parent.glob(f"{glob.escape(begin)}*"):
        if _is_gone(folder.name.removeprefix(begin)):
            if (folder / "old").exists() and not target.exists():
                (folder / "old").rename(target)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def set_aside(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a new folder, which replaces `target` at the end.

    It lies beside `target`: the two are on one disk, and the last step is a
    rename. After an error the folder is removed and `target` is unchanged.

    Args:
        target: A folder.
        replace: Whether an existing folder may be replaced.

    Raises:
        ValueError: Nothing can be written there, or a folder exists and may not
            be replaced.
    """
    # A rename may move the folder that relative paths start from.
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
            _keep_all(new)
            _put(new, target, old, replace)
            keep(target.parent)
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if not os.path.lexists(target):
            for folder in made:  # the innermost first
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _put(new, target, old, replace):
    """Replaces a folder by another, or changes nothing."""
    if os.path.lexists(target) and not replace:
        raise ValueError(
            f"{str(target)!r} has appeared in the meantime. Pass another path."
        )
    try:
        if os.path.lexists(target):
            target.rename(old)
            keep(old.parent)
        new.rename(target)
    except BaseException:  # Ctrl-C as well
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        raise
