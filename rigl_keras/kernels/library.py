"""The op library of the sparse kernels, built on first use.

It is built into a cache, where later processes find it, together with the
library that runs a network without TensorFlow. A wheel may bring both
(`packaged`); they are used if the cache has none. Environment variables decide
where, how and whether they are built:

    RIGL_KERAS_KERNELS  `on`, the default; `off`: nothing is built or
                        loaded; `address` or `thread`: a separate variant, under
                        that sanitizer.
    RIGL_KERAS_CACHE    The folder of the cache; otherwise it is in
                        `XDG_CACHE_HOME` or `~/.cache`.
    CXX                 The compiler; else the first of g++, c++ and clang++.

A library is loaded only from a folder where nobody else can put files: the file
and every folder above it belong to this user or to root, and only they can
write there. The libraries of a wheel are trusted like the Python files beside
them. Operations that the process already has, for example from an exported
model, are used.
"""

import concurrent.futures
import contextlib
import functools
import logging
import os
import shlex
import shutil
import stat
import sys
import tempfile
import threading
import types
from pathlib import Path

import tensorflow as tf

from rigl_keras import _files
from rigl_keras._patience import said_if_slow
from rigl_keras.kernels import packaged
from rigl_keras.kernels.toolchain import (
    LIBRARY_NAME,
    NETWORK_LIBRARY_NAME,
    BuildError,
    compile_commands,
    find_compiler,
    first_error,
    link_commands,
    planned_build,
    run_compiler,
)

__all__ = [
    "build",
    "build_network",
    "cache_folder",
    "is_loaded",
    "load",
    "path",
    "required",
    "unavailable",
]

# An operation whose attribute holds their version, and its Python function.
_ASKED, _FUNCTION = "RiglKerasComputedBy", "rigl_keras_computed_by"
_log = logging.getLogger("rigl_keras")
_lock = threading.Lock()
_module: types.ModuleType | None = None
_reason: str | None = None


@tf.autograph.experimental.do_not_convert  # a trace may be the first to call it
def load() -> types.ModuleType | None:
    """Returns the op library, and builds it if there is none.

    It is loaded once in a process, and not if the process already has its
    operations: by `tf.load_op_library` of an exported model. If it is not
    available, the logger `rigl_keras` warns once, and it is not tried again.

    Returns:
        The result of `tf.load_op_library`, or None.
    """
    global _module, _reason
    if _module is None and _reason is None:
        with _lock:  # the others wait, and then find it
            if _module is None and _reason is None:
                try:
                    _module = _registered(planned_build()) or _found()
                except BuildError as error:
                    _reason = str(error).rstrip(".")
                    _log.warning(
                        "Sparse kernels are not available: %s. Masked layers "
                        "are computed densely.",
                        _reason,
                    )
    return _module


def is_loaded() -> bool:
    """Returns whether the op library is loaded. Nothing is built."""
    return _module is not None


def required() -> types.ModuleType:
    """Returns the op library, as `load` does.

    Raises:
        RuntimeError: It is not available.
    """
    module = load()
    if module is None:
        raise RuntimeError(
            f"Sparse kernels are not available: {unavailable()}. Use the "
            "masked product of dense TensorFlow."
        )
    return module


def unavailable() -> str | None:
    """Returns why there is no op library, or None.

    It is also None if nothing has asked for it yet. Nothing is built.
    """
    return _reason


def path() -> Path:
    """Returns where the op library is, or would be. Nothing is built.

    Raises:
        BuildError: It cannot be built here, for example without a compiler.
    """
    plan = planned_build()
    found = _existing(plan) or packaged.op_library(plan)
    return found or _usable_place(plan)[0] / plan.version / LIBRARY_NAME


def cache_folder() -> Path:
    """Returns the folder for what is kept of these libraries; it is made.

    Raises:
        BuildError: There can be no libraries here.
        OSError: It cannot be made.
    """
    plan = planned_build()
    found = _existing(plan)
    if found is not None:
        return found.parent
    place, private = _usable_place(plan)
    if _refused(place, plan):
        raise PermissionError(f"others can write {str(place)!r}")
    _make(place / plan.version, mode=0o700 if private else 0o755)
    return place / plan.version


def build(*, force: bool = False) -> Path:
    """Builds the libraries if they are neither in the cache nor in the package.

    If several processes ask at once, one builds, and the others wait for it. A
    killed process leaves nothing that another would load.

    Args:
        force: Whether to build them into the cache anyway.

    Returns:
        The path of the op library.

    Raises:
        BuildError: They cannot be built. It says why, and what to do.
    """
    plan = planned_build()
    found = _existing(plan) or packaged.op_library(plan)
    if found is not None and not force:
        return found
    failures = []
    for place, private in _places():
        folder = place / plan.version
        try:
            refused = _refused(place, plan)
            if not refused:
                _make(folder, mode=0o700 if private else 0o755)
                with contextlib.ExitStack() as stack:
                    with said_if_slow(
                        "Waiting for the sparse kernels, which another "
                        "process builds (once, about half a minute) ..."
                    ):
                        stack.enter_context(_files.lock(folder / ".lock"))
                    if force or not _whole(folder, plan):
                        _build(plan, folder)
                return (folder / LIBRARY_NAME).resolve()
            failures.append(f"{str(place)!r} ({refused})")
            _log.warning(
                "The cache %r is not used, where others could put a library: "
                "%s.",
                str(place),
                refused,
            )
        except OSError as error:
            failures.append(f"{str(place)!r} ({error.strerror})")
    raise BuildError(
        f"the cache cannot be written: {' nor '.join(failures)}. Set "
        "RIGL_KERAS_CACHE to a folder that can, by you alone"
    )


def build_network() -> Path:
    """Builds the library that runs a network without TensorFlow, as `build`.

    Returns:
        The path of the library. Its functions are those of `rigl_network.h`.

    Raises:
        BuildError: It cannot be built. It says why, and what to do.
    """
    plan = planned_build()
    if _existing(plan) is None:
        found = packaged.network_library(plan)
        if found is not None:
            return found
    return build().with_name(NETWORK_LIBRARY_NAME)


def _places():
    """Returns candidate folders for the cache, best first.

    They are `[(folder, whether nobody else may read it)]`.
    """
    places = []
    cache = os.environ.get("RIGL_KERAS_CACHE")
    if not cache:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        cache = os.path.join(root, "rigl_keras")
    cache = os.path.expanduser(cache)
    if not cache.startswith("~"):  # a user without a home
        places.append((_absolute(cache), False))
    own = Path(tempfile.gettempdir(), f"rigl_keras-{os.getuid()}")
    return [*places, (own, True)]


@functools.cache
def _absolute(path):
    """Returns a path relative to the process's first working directory."""
    return Path(os.path.abspath(path))


def _refused(place, plan):
    """Returns why a place cannot be the cache (others can write), or None."""
    if place in [own for own, private in _places() if private]:
        # Anybody can create this name, as a link to anywhere.
        if os.path.lexists(place) and not _ours(place):
            return "it is not only yours"
    exposed = _exposed(place / plan.version)
    return exposed and f"it is not only yours: {exposed}"


def _ours(folder):
    """Returns whether a folder is the user's, and nobody else may read it."""
    about = folder.lstat()
    return (
        stat.S_ISDIR(about.st_mode)
        and about.st_uid == os.getuid()
        and not about.st_mode & 0o077
    )


def _exposed(path):
    """Returns who else may write a file or a folder above it, or None.

    Links are followed. For a path that does not exist yet, its parent folder
    counts.
    """
    path = Path(os.path.realpath(path))
    while not os.path.lexists(path):
        path = path.parent
    for part in (path, *path.parents):
        # Who can move the home can already make Python import anything; and in
        # a container these folders may seem to belong to nobody.
        if part in _home().parents:
            continue
        about = part.lstat()
        # In a folder such as /tmp, only owners can rename or remove files.
        shared = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX
        if about.st_uid not in (0, os.getuid()):
            return f"{str(part)!r} belongs to {_user(about.st_uid)}"
        if about.st_mode & stat.S_IWOTH and not shared:
            return f"everybody can write {str(part)!r}"
        if about.st_mode & stat.S_IWGRP and not (
            shared or _of_this_user(part, about.st_gid)
        ):
            return f"the group {_group(about.st_gid)} can write {str(part)!r}"
    return None


def _make(folder, *, mode):
    """Makes a folder and those above it, which only this user can write."""
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            with contextlib.suppress(FileExistsError):  # made meanwhile
                part.mkdir(mode=mode)


def _home():
    """Returns the home folder of this user's account."""
    import pwd  # not on every platform

    try:
        return Path(os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir))
    except KeyError:
        return Path("/")


def _of_this_user(path, gid):
    """Returns whether a group has only this user, as on Debian and Fedora.

    If an access control list names others, they have the group's bits.
    """
    import grp
    import pwd

    with contextlib.suppress(KeyError, OSError, AttributeError):
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
        return (
            (gid, group.gr_name) == (user.pw_gid, user.pw_name)
            and set(group.gr_mem) <= {user.pw_name}
            and "system.posix_acl_access" not in os.listxattr(path)
        )
    return False


def _user(uid):
    import pwd

    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def _group(gid):
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _usable_place(plan):
    """Returns the best place that can be the cache, and if it is private."""
    places = _places()
    usable = [
        (place, private)
        for place, private in places
        if _writable(place) and not _refused(place, plan)
    ]
    return [*usable, *places][0]


def _writable(folder):
    """Returns whether a folder, or its nearest parent, can be written."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _existing(plan):
    """Returns the path of a finished build, or None."""
    for place, _ in _places():
        folder = place / plan.version
        # In this order: files in others' folders are not examined.
        with contextlib.suppress(OSError):
            if not _refused(place, plan) and _whole(folder, plan):
                return (folder / LIBRARY_NAME).resolve()
    return None


def _whole(folder, plan):
    """Returns whether a folder has all libraries, all of this user."""
    return all(
        not _exposed(folder / name) and (folder / name).is_file()
        for name in plan.libraries
    )


def _build(plan, folder):
    """Builds into a folder that the caller has locked."""
    compiler, _ = find_compiler()
    _log.warning(
        "Building the sparse kernels with %s (once, about half a minute) ...",
        compiler[0],
        extra={"progress": True},
    )
    # Removes killed builds; nobody else is building.
    for abandoned in folder.glob(".building-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=".building-", dir=folder
    ) as scratch:
        run = functools.partial(run_compiler, folder=scratch)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(run, compile_commands(plan, compiler)))
            if not any(step.returncode for step in done):
                done += pool.map(run, link_commands(plan, compiler))
        log = folder / "build.log"
        text = "\n".join(f"$ {shlex.join(s.args)}\n{s.stdout}" for s in done)
        log.write_text(text, encoding="utf-8", errors="replace")
        for step in done:
            if step.returncode:
                raise BuildError(
                    f"the build failed: {first_error(step)} (full output in "
                    f"{str(log)!r}). Perhaps set CXX to a newer compiler"
                )
        for name in plan.libraries:
            built = Path(scratch, name)
            # For any umask: files that everybody can write are not loaded.
            built.chmod(0o755)
            _files.put(built, folder / name)


def _registered(plan):
    """Returns the op library that the process already has, or None.

    A second one would have no effect: TensorFlow keeps the first.
    """
    try:
        with tf.Graph().as_default() as graph:
            found = graph.create_op(_ASKED, [], [tf.string, tf.string])
    except (RuntimeError, tf.errors.NotFoundError):  # no such operation
        return None
    try:
        sources = found.get_attr("sources").decode()
    except ValueError:  # a version without this attribute
        sources = None
    if sources != plan.sources:
        raise BuildError(
            "the process has operations of another version of rigl_keras, from "
            "tf.load_op_library. Load their model in another process, or "
            "export it again"
        )
    for module in list(sys.modules.values()):
        # Other modules would load themselves when accessed.
        if type(module) is types.ModuleType and _FUNCTION in vars(module):
            return module
    raise BuildError(
        "the process has their operations, but no functions for them. Load "
        "them by tf.load_op_library"
    )


def _found():
    """Returns the op library, from wherever it can be loaded."""
    found = build()
    try:
        return _loaded(found)
    except BuildError:
        if found != packaged.op_library(planned_build()):
            raise
        # Another build of that version of TensorFlow than the wheel's.
        return _loaded(build(force=True))


def _loaded(built):
    """Returns the op library in a file."""
    try:
        return tf.load_op_library(str(built))
    except (OSError, RuntimeError, tf.errors.OpError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise BuildError(
            f"{str(built)!r} cannot be loaded ({lines[0]}). Remove it to have "
            "it built again"
        ) from error
