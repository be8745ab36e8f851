"""The op library of the sparse kernels, which is built on first use.

It is built into a cache, where every later process finds it. Environment
variables decide where that is, how it is built and whether at all:

    RIGL_KERAS_KERNELS  `on`, which is the default; `off`: it is neither built
                        nor loaded; `address` or `thread`: a variant of its
                        own, under that sanitizer.
    RIGL_KERAS_CACHE    The folder of the cache; else `XDG_CACHE_HOME` and, in
                        the end, `~/.cache` have one.
    CXX                 The compiler; else the first of g++, c++ and clang++.

A library is loaded only from where nobody else can have put it: the file and
every folder above it belong to this user or to root, and only they can write
them. Operations that are in the process already, as those of an exported model
may be, are used as they are.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import tensorflow as tf

from rigl_keras import writing

__all__ = ["BuildError", "build", "load", "path", "unavailable"]

_SOURCES = Path(__file__).with_name("csrc")
_NAME = "rigl_keras_kernels.so"
_PER_INSTRUCTION_SET = ("lanes.cc", "rows.cc")
_COMPILERS = ("g++", "c++", "clang++")
_SANITIZERS = ("address", "thread")
# What these are compiled for on x86_64; elsewhere only for the last.
_INSTRUCTION_SETS = {
    "avx512": [
        "-mavx512f",
        "-mavx512vl",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
# An operation that tells which ones they are, and its Python function.
_ASKED, _FUNCTION = "RiglKerasComputedBy", "rigl_keras_computed_by"
# What is wrong, in the lines of a compiler or a linker.
_ERROR = re.compile(r"\berror: |undefined reference|cannot find ")

_log = logging.getLogger("rigl_keras")
_lock = threading.Lock()
_module: types.ModuleType | None = None
_reason: str | None = None


class BuildError(RuntimeError):
    """There is no op library, for a reason that is one line."""

    def __init__(self, reason: str):
        super().__init__(" ".join(reason.split()))


@tf.autograph.experimental.do_not_convert  # where a trace asks for it first
def load() -> types.ModuleType | None:
    """Returns the op library, which is built if it is not in the cache.

    It is loaded once in a process, and not at all where the process has its
    operations already: `tf.load_op_library` of an exported model's. Where it
    cannot be had, that is said once, as a warning of the logger `rigl_keras`,
    and not tried again.

    Returns:
        What `tf.load_op_library` returns, or None.
    """
    global _module, _reason
    if _module is None and _reason is None:
        with _lock:  # the others wait, and find it done
            if _module is None and _reason is None:
                try:
                    _module = _registered(_plan()) or _loaded(build())
                except BuildError as error:
                    _reason = str(error).rstrip(".")
                    _log.warning(
                        "Sparse kernels are not available: %s. Masked layers "
                        "are computed densely.",
                        _reason,
                    )
    return _module


def unavailable() -> str | None:
    """Returns why there is no op library, or None.

    None if it has been loaded, and if nothing has asked for it. Nothing is
    built.
    """
    return _reason


def path() -> Path:
    """Returns where the op library is, or would be. Nothing is built.

    Raises:
        BuildError: It cannot be built here: there is no compiler, say.
    """
    plan = _plan()
    found = _existing(plan)
    if found is None:
        places = [place for place, _ in _places()]
        usable = [
            place
            for place in places
            if _writable(place) and not _refused(place, plan)
        ]
        found = [*usable, *places][0] / plan.version / _NAME
    return found


def build(*, force: bool = False) -> Path:
    """Builds the op library if it is not in the cache.

    Of processes that ask at once, one builds, and the others wait for it. A
    process that is killed leaves nothing that another would load.

    Args:
        force: Whether to build it even so.

    Returns:
        Its path.

    Raises:
        BuildError: It cannot be built: what is wrong, and what to do.
    """
    plan = _plan()
    found = _existing(plan)
    if found is not None and not force:
        return found
    failures = []
    for place, private in _places():
        folder = place / plan.version
        library = folder / _NAME
        try:
            refused = _refused(place, plan)
            if not refused:
                _make(folder, mode=0o700 if private else 0o755)
                with writing.lock(folder / ".lock"):
                    if force or _exposed(library) or not library.exists():
                        _build(plan, folder)
                return library.resolve()
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


def main() -> None:
    """Builds the op library and prints where it is."""
    parser = argparse.ArgumentParser(
        prog="build_kernels",
        description="Builds the op library of the sparse kernels.",
    )
    parser.add_argument(
        "--force", action="store_true", help="Build it even if it is there."
    )
    force = parser.parse_args().force
    start = time.perf_counter()
    try:
        plan = _plan()
        there = _existing(plan) is not None and not force
        built = build(force=force)
    except BuildError as error:
        sys.exit(f"Sparse kernels cannot be built: {error}")
    seconds = time.perf_counter() - start
    if there:
        print(f"{built}\nwas there")
    else:
        compiler, identity = _compiler()
        print(f"{built}\nbuilt in {seconds:.1f} s by {compiler[0]}: {identity}")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is built.

    Attributes:
        objects: `{file name: [source, flag, ...]}`.
        link: Flags that make a library of the objects.
        version: Name of a folder in the cache: it changes with all of these,
            the sources and TensorFlow.
        sources: What changes with the sources alone; the operations tell it.
    """

    objects: dict[str, list[str]]
    link: list[str]
    version: str
    sources: str


def _plan():
    """Returns the `_Plan` for this machine, from the environment."""
    sanitizer = _sanitizer()
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(
            f"they are built on Linux and macOS, and this is {sys.platform!r}"
        )
    told = hashlib.sha256()
    for name, source in _sources().items():
        told.update(f"{name} {len(source)} ".encode() + source)
    sources = told.hexdigest()[:12]
    objects, link = _flags(sanitizer)
    objects["ops.o"].append(f'-DRIGL_SOURCES="{sources}"')
    # Not the compiler: what it has built serves machines that have none.
    told.update(repr((objects, link)).encode())
    parts = [tf.__version__, platform.system(), platform.machine(), sanitizer]
    parts.append(told.hexdigest()[:12])
    version = "-".join(part for part in parts if part)
    return _Plan(objects, link, version, sources)


def _sanitizer():
    """Returns which sanitizer is asked for, or an empty string."""
    asked = os.environ.get("RIGL_KERAS_KERNELS", "") or "on"
    if asked == "off":
        raise BuildError("RIGL_KERAS_KERNELS=off")
    if asked not in ("on", *_SANITIZERS):
        raise BuildError(
            f"RIGL_KERAS_KERNELS={asked} is none of on, off, "
            f"{' and '.join(_SANITIZERS)}. Set it to one of these, or unset it"
        )
    return "" if asked == "on" else asked


def _compiler():
    """Returns the command of the compiler, and what it says that it is."""
    asked = os.environ.get("CXX", "").strip()
    try:
        words = [asked] if shutil.which(asked) else shlex.split(asked)
    except ValueError as error:
        raise BuildError(
            f"CXX={asked!r} is no command ({error}). Set it to a C++ compiler"
        ) from error
    for name, *flags in [words] if words else [[c] for c in _COMPILERS]:
        program = shutil.which(name)
        if program is not None:
            # The compiler runs in another folder.
            command = [os.path.abspath(program), *flags]
            break
    else:
        if words:
            raise BuildError(
                f"the compiler CXX={asked!r} was not found. Set CXX to a C++ "
                "compiler, or unset it"
            )
        raise BuildError(
            f"no C++ compiler was found: none of {', '.join(_COMPILERS)} is "
            "on the PATH. Install one (on Debian or Ubuntu: apt install g++), "
            "or set CXX to one"
        )
    try:
        done = _run([*command, "--version"])
    except OSError as error:
        raise BuildError(
            f"the compiler {command[0]} cannot be run ({error.strerror}). Set "
            "CXX to another"
        ) from error
    if done.returncode:
        raise BuildError(
            f"{shlex.join(done.args)} failed: {_first_error(done)}. Set CXX "
            "to a C++ compiler"
        )
    return command, (done.stdout.splitlines() or [""])[0]


def _sources():
    """Returns `{name: bytes}` of the sources."""
    paths = [*_SOURCES.glob("*.cc"), *_SOURCES.glob("*.h")]
    sources = {path.name: path.read_bytes() for path in sorted(paths)}
    for name in ("ops.cc", *_PER_INSTRUCTION_SET):
        if name not in sources:
            raise BuildError(
                f"the source {str(_SOURCES / name)!r} is missing. Install "
                "rigl_keras anew"
            )
    return sources


def _flags(sanitizer):
    """Returns `{object: [source, flag, ...]}`, and how these are linked."""
    common = ["-std=c++17", "-O3", "-fPIC", "-DNDEBUG", "-Wall"]
    # Of TensorFlow's own macros and names.
    common.append("-Wno-deprecated-declarations")
    if sanitizer:
        common[1:2] = ["-O1", "-g", "-fno-omit-frame-pointer"]
        common.append(f"-fsanitize={sanitizer}")
    if sanitizer == "address":
        # Checks as calls: within unrolled loops, GCC takes minutes over them.
        common.append("--param=asan-instrumentation-with-call-threshold=0")
    names = ["portable"]
    if platform.machine() in ("x86_64", "AMD64"):
        common.append("-DRIGL_X86=1")
        names = list(_INSTRUCTION_SETS)
    # TensorFlow's headers are not ours to warn about.
    tensorflow = [
        re.sub("^-I", "-isystem", f) for f in tf.sysconfig.get_compile_flags()
    ]
    objects = {"ops.o": ["ops.cc", *tensorflow, *common]}
    for name in names:
        flags = [*common, f"-DRIGL_ISA={name}", *_INSTRUCTION_SETS[name]]
        for source in _PER_INSTRUCTION_SET:
            objects[f"{Path(source).stem}_{name}.o"] = [source, *flags]
    link = ["-shared", *common, *tf.sysconfig.get_link_flags()]
    if sys.platform == "darwin":
        # As TensorFlow's own documentation has it; untested, for want of one.
        link += ["-undefined", "dynamic_lookup"]
    elif not sanitizer:  # whose functions come with the process
        # What is missing is told here, and not where it is loaded.
        link.append("-Wl,--no-undefined")
    return objects, link


def _places():
    """Returns the folders that may be the cache, the best first.

    `[(folder, whether nobody else may read it)]`.
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
    """Returns a path from the folder where the process was at first."""
    return Path(os.path.abspath(path))


def _refused(place, plan):
    """Returns why a place is no cache, if others can write it, or None."""
    if place in [own for own, private in _places() if private]:
        # Anybody can take this name, and lead a link from it anywhere.
        if os.path.lexists(place) and not _ours(place):
            return "it is not yours alone"
    exposed = _exposed(place / plan.version)
    return exposed and f"it is not yours alone: {exposed}"


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

    Links are followed to where they lead. What does not exist yet is judged
    by the folder that it would be made in.
    """
    path = Path(os.path.realpath(path))
    while not os.path.lexists(path):
        path = path.parent
    for part in (path, *path.parents):
        # Who can move the home can have Python import anything, as it is; and
        # in a container these may seem to belong to nobody.
        if part in _home().parents:
            continue
        about = part.lstat()
        # In a folder such as /tmp nobody renames or removes what is another's.
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
            with contextlib.suppress(FileExistsError):  # by now
                part.mkdir(mode=mode)


def _home():
    """Returns the home that this user's account has."""
    import pwd  # not on every platform

    try:
        return Path(os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir))
    except KeyError:
        return Path("/")


def _of_this_user(path, gid):
    """Returns whether a group has this user alone, as Debian and Fedora do.

    Where an access control list names others, the group's bits are theirs.
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


def _writable(folder):
    """Returns whether a folder, or the one to make it in, can be written."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _existing(plan):
    """Returns the path of what has been built, or None."""
    for place, _ in _places():
        library = place / plan.version / _NAME
        # In this order: what is in another's folder is not looked at.
        with contextlib.suppress(OSError):
            if (
                not (_refused(place, plan) or _exposed(library))
                and library.is_file()
            ):
                return library.resolve()
    return None


def _build(plan, folder):
    """Builds into a folder, which the caller has locked."""
    compiler, _ = _compiler()
    _log.warning(
        "Building the sparse kernels with %s (once, about half a minute) ...",
        compiler[0],
    )
    # Builds that were killed; nobody else is at work.
    for abandoned in folder.glob(".building-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as work:
        compiles = [
            [*compiler, *flags, "-c", str(_SOURCES / source), "-o", made]
            for made, (source, *flags) in plan.objects.items()
        ]
        link = [*compiler, *plan.objects, *plan.link, "-o", _NAME]
        run = functools.partial(_run, work=work)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(run, compiles))
        if not any(step.returncode for step in done):
            done.append(run(link))
        log = folder / "build.log"
        text = "\n".join(f"$ {shlex.join(s.args)}\n{s.stdout}" for s in done)
        log.write_text(text, encoding="utf-8", errors="replace")
        for step in done:
            if step.returncode:
                raise BuildError(
                    f"the build failed: {_first_error(step)} (all of it is in "
                    f"{str(log)!r}). Set CXX to a newer compiler, perhaps"
                )
        built = Path(work, _NAME)
        # Whatever the umask is: what everybody can write is not loaded.
        built.chmod(0o755)
        writing.put(built, folder / _NAME)


def _run(command, work=None):
    """Runs a compiler; what it prints is in `stdout`."""
    environment = {**os.environ, "LC_ALL": "C"}  # `_ERROR` knows English
    # The runtime of a sanitizer is for this process: it would speak up in
    # the name of the compiler, which is part of the version.
    environment.pop("LD_PRELOAD", None)
    return subprocess.run(
        command,
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )


def _first_error(done):
    """Returns the line that tells what went wrong."""
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    lines.append(f"{done.args[0]} ended with status {done.returncode}")
    return next((line for line in lines if _ERROR.search(line)), lines[0])


def _registered(plan):
    """Returns the op library that the process has already, or None.

    A second one would bring nothing: TensorFlow keeps what it has first.
    """
    try:
        with tf.Graph().as_default() as graph:
            found = graph.create_op(_ASKED, [], [tf.string, tf.string])
    except (RuntimeError, tf.errors.NotFoundError):  # no such operation
        return None
    try:
        sources = found.get_attr("sources").decode()
    except ValueError:  # of a version that did not tell
        sources = None
    if sources != plan.sources:
        raise BuildError(
            "the process has operations of another version of rigl_keras, by "
            "tf.load_op_library. Load the model that they came with in a "
            "process of its own, or export it again"
        )
    for module in list(sys.modules.values()):
        # Others load themselves as they are looked at.
        if type(module) is types.ModuleType and _FUNCTION in vars(module):
            return module
    raise BuildError(
        "the process has their operations and no functions for them. Load "
        "them by tf.load_op_library"
    )


def _loaded(built):
    """Returns the op library in a file."""
    try:
        return tf.load_op_library(str(built))
    except (OSError, RuntimeError, tf.errors.OpError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise BuildError(
            f"{str(built)!r} cannot be loaded ({lines[0]}). Remove it to have "
            "it built anew"
        ) from error
