"""The compiler, its flags, and a build of the operations."""

import dataclasses
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import tensorflow as tf

__all__ = [
    "Build",
    "BuildError",
    "NAME",
    "SOURCES",
    "compiler_flags",
    "find_compiler",
    "first_error",
    "planned_build",
    "run_compiler",
]

SOURCES = Path(__file__).with_name("csrc")
NAME = "rigl_keras_kernels.so"
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


class BuildError(RuntimeError):
    """There is no op library, for a reason that is one line."""

    def __init__(self, reason: str):
        super().__init__(" ".join(reason.split()))


@dataclasses.dataclass(frozen=True)
class Build:
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


def planned_build():
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
    objects, link = compiler_flags(sanitizer)
    objects["ops.o"].append(f'-DRIGL_SOURCES="{sources}"')
    # Not the compiler: what it has built serves machines that have none.
    told.update(repr((objects, link)).encode())
    parts = [tf.__version__, platform.system(), platform.machine(), sanitizer]
    parts.append(told.hexdigest()[:12])
    version = "-".join(part for part in parts if part)
    return Build(objects, link, version, sources)


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


def find_compiler():
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
        done = run_compiler([*command, "--version"])
    except OSError as error:
        raise BuildError(
            f"the compiler {command[0]} cannot be run ({error.strerror}). Set "
            "CXX to another"
        ) from error
    if done.returncode:
        raise BuildError(
            f"{shlex.join(done.args)} failed: {first_error(done)}. Set CXX "
            "to a C++ compiler"
        )
    return command, (done.stdout.splitlines() or [""])[0]


def _sources():
    """Returns `{name: bytes}` of the sources."""
    paths = [*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")]
    sources = {path.name: path.read_bytes() for path in sorted(paths)}
    for name in ("ops.cc", *_PER_INSTRUCTION_SET):
        if name not in sources:
            raise BuildError(
                f"the source {str(SOURCES / name)!r} is missing. Install "
                "rigl_keras anew"
            )
    return sources


def compiler_flags(sanitizer):
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


def run_compiler(command, work=None):
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


def first_error(done):
    """Returns the line that tells what went wrong."""
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    lines.append(f"{done.args[0]} ended with status {done.returncode}")
    return next((line for line in lines if _ERROR.search(line)), lines[0])
