"""The op library of the sparse kernels, which is built on first use.

It is built into a cache, where every later process finds it. Environment
variables decide where that is, how it is built and whether at all:

    RIGL_KERAS_KERNELS  `on`, which is the default; `off`: it is neither built
                        nor loaded; `address` or `thread`: a variant of its
                        own, under that sanitizer.
    RIGL_KERAS_CACHE    The folder of the cache; else `XDG_CACHE_HOME` and, in
                        the end, `~/.cache` have one.
    CXX                 The compiler; else the first of g++, c++ and clang++.
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
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

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

    It is loaded once in a process. Where it cannot be had, that is said once,
    as a warning of the logger `rigl_keras`, and not tried again.

    Returns:
        What `tf.load_op_library` returns, or None.
    """
    global _module, _reason
    if _module is None and _reason is None:
        with _lock:  # the others wait, and find it done
            if _module is None and _reason is None:
                try:
                    _module = _loaded(build())
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
        places = [place for place, _ in _places() if _writable(place)]
        place = places[0] if places else _places()[0][0]
        found = place / plan.version / _NAME
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
    refused = []
    for place, private in _places():
        folder = place / plan.version
        try:
            place.mkdir(mode=0o700 if private else 0o777, parents=True)
        except FileExistsError:
            pass
        except OSError as error:
            refused.append(f"{str(place)!r} ({error.strerror})")
            continue
        if private and not _ours(place):
            refused.append(f"{str(place)!r} (it is not yours alone)")
            continue
        try:
            folder.mkdir(exist_ok=True)
            with _locked(folder):
                if force or not (folder / _NAME).exists():
                    _build(plan, folder)
            return folder / _NAME
        except OSError as error:
            refused.append(f"{str(folder)!r} ({error.strerror})")
    raise BuildError(
        f"the cache cannot be written: {' nor '.join(refused)}. Set "
        "RIGL_KERAS_CACHE to a folder that can"
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
    """

    objects: dict[str, list[str]]
    link: list[str]
    version: str


def _plan():
    """Returns the `_Plan` for this machine, from the environment."""
    sanitizer = _sanitizer()
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(
            f"they are built on Linux and macOS, and this is {sys.platform!r}"
        )
    objects, link = _flags(sanitizer)
    # Not the compiler: what it has built serves machines that have none.
    told = hashlib.sha256(repr((objects, link)).encode())
    for name, source in _sources().items():
        told.update(f"{name} {len(source)} ".encode() + source)
    parts = [tf.__version__, platform.system(), platform.machine(), sanitizer]
    parts.append(told.hexdigest()[:12])
    version = "-".join(part for part in parts if part)
    return _Plan(objects, link, version)


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
    """Returns the folders that may be the cache, and which is in `/tmp`.

    `[(folder, whether it must be the user's own)]`: anyone could have put a
    library into a folder of that name.
    """
    places = []
    cache = os.environ.get("RIGL_KERAS_CACHE")
    if not cache:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        cache = os.path.join(root, "rigl_keras")
    cache = os.path.expanduser(cache)
    if not cache.startswith("~"):  # a user without a home
        places.append((Path(os.path.abspath(cache)), False))
    own = Path(tempfile.gettempdir(), f"rigl_keras-{os.getuid()}")
    return [*places, (own, True)]


def _ours(folder):
    """Returns whether a folder is the user's, and nobody else may write it."""
    about = folder.lstat()
    return (
        stat.S_ISDIR(about.st_mode)
        and about.st_uid == os.getuid()
        and not about.st_mode & 0o077
    )


def _writable(folder):
    """Returns whether a folder, or the one to make it in, can be written."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _existing(plan):
    """Returns the path of what has been built, or None."""
    for place, private in _places():
        library = place / plan.version / _NAME
        # In this order: what is in another's folder is not looked at.
        with contextlib.suppress(OSError):
            if (not private or _ours(place)) and library.is_file():
                return library
    return None


@contextlib.contextmanager
def _locked(folder) -> Iterator[None]:
    """Within the context, no other process builds in a folder."""
    import fcntl  # not on every platform; `_plan` has refused those

    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
        log.write_text(
            "\n".join(f"$ {shlex.join(s.args)}\n{s.stdout}" for s in done)
        )
        for step in done:
            if step.returncode:
                raise BuildError(
                    f"the build failed: {_first_error(step)} (all of it is in "
                    f"{str(log)!r}). Set CXX to a newer compiler, perhaps"
                )
        os.replace(os.path.join(work, _NAME), folder / _NAME)


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
