"""Files and folders that appear whole or not at all, and locks on them.

What has appeared is on the disk: it survives a power cut, too.
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

# Before the name of a folder of files that are being written. A process that
# is killed leaves it.
UNFINISHED = ".unfinished-"


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
    except Exception as error:  # TensorFlow and HDF5 have their own
        reason = None
        if not isinstance(error, DiskFullError):  # which has its name
            reason = disk_is_full(error)
        if reason is None:
            raise
        raise DiskFullError(path, reason, advice) from error


def disk_is_full(error: Exception) -> str | None:
    """Returns what the system says, if an error is that a disk is full."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason = os.strerror(code)
        # TensorFlow and HDF5 tell by their message alone.
        if getattr(error, "errno", None) == code or reason in str(error):
            return reason
    return None


@contextlib.contextmanager
def lock(
    path: str | os.PathLike, *, shared: bool = False, wait: bool = True
) -> Iterator[int | None]:
    """Locks a file until the end of the block, which no other process has.

    The kernel frees the lock as soon as the process is gone, however it ends.
    A child process that inherits the descriptor holds the lock as well.

    Args:
        path: The file; made if it does not exist.
        shared: Whether others that share it may have it at once.
        wait: Whether to wait for the process that has it.

    Yields:
        The file's descriptor, or None where another has it and `wait` is
        False.

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
    while True:
        # Who may write the file is up to the umask: a folder of results may
        # be a group's.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            # Who had the lock has removed the file: there may be another one.
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
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
        # Shared: others may ask at the same time.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def sign(descriptor: int, *, job: str = "") -> None:
    """Writes who has a lock into its file: machine, process, time and job.

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
        content: All of it; text is written as UTF-8.
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
    """Gives a file to write, which then appears at `path`, whole.

    If the context is left by an error, what was at `path` stays.

    Args:
        path: The file. Its folder must exist.
        advice: Where there is any, a full disk is an error that names the
            file and says this of what to do.

    Yields:
        A path of the same name in another folder, on the same disk.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        if advice is not None:
            stack.enter_context(naming(path, advice=advice))
        folder = stack.enter_context(unfinished_folder(path.parent))
        # Of the same name: Keras knows the format by it.
        yield folder / path.name
        put(folder / path.name, path)


def put(finished: Path, path: Path) -> None:
    """Puts a finished file at `path` and replaces what is there."""
    keep(finished)
    finished.replace(path)
    keep(path.parent)


@contextlib.contextmanager
def unfinished_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a folder in `path` for unfinished files, gone at the end.

    What killed processes of this machine have left there goes, too.
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
    """Has the disk keep a file, or a folder's list of names, for good.

    Else a power cut may leave a file's name, and nothing in it.
    """
    if os.name == "nt":  # where folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot, of folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _keep_all(folder):
    """Keeps a folder and all that is in it."""
    for parent, _, files in os.walk(folder):
        for name in files:
            keep(os.path.join(parent, name))
        keep(parent)


def _unfinished():
    """Returns how the name of an unfinished folder of this machine begins."""
    return f"{UNFINISHED}{platform.node()}-"


def clear_unfinished(path: Path, *, of_others: bool = False) -> None:
    """Removes unfinished folders that killed processes have left in a folder.

    Args:
        path: The folder.
        of_others: Whether those of other machines go, and of processes that
            live: nobody else may be writing to the folder then.
    """
    begin = UNFINISHED if of_others else _unfinished()
    for folder in path.glob(f"{glob.escape(begin)}*"):
        if of_others or _is_gone(folder.name.removeprefix(begin)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_gone(name):
    """Returns whether the process whose number begins a name has ended."""
    try:
        os.kill(int(name.split("-")[0]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OSError):  # not ours to judge
        return False
    return False


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
        if _is_gone(folder.name.removeprefix(begin)):
            if (folder / "old").exists() and not target.exists():
                (folder / "old").rename(target)
            shutil.rmtree(folder, ignore_errors=True)


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
    """Replaces a folder by another, or leaves all as it is."""
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
