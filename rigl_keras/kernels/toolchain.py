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
    "LIBRARY_NAME",
    "compile_commands",
    "find_compiler",
    "first_error",
    "link_command",
    "planned_build",
    "run_compiler",
]

LIBRARY_NAME = "rigl_keras_kernels.so"
_SOURCES = Path(__file__).with_name("csrc")
# TensorFlow's operations, and the loops that they run, which are compiled for
# each instruction set.
_OPERATIONS = ("convolution_ops.cc", "row_ops.cc")
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
    """What is compiled, and how.

    Attributes:
        objects: `{object file: [source, flag, ...]}`.
        link: Flags that link the objects to a library.
        version: Name of a folder in the cache. It changes with the objects,
            the flags, the sources and TensorFlow.
        sources: Digest of the sources. The library has an operation that
            returns it.
    """

    objects: dict[str, list[str]]
    link: list[str]
    version: str
    sources: str


def planned_build() -> Build:
    """Returns the build for this machine, as the environment asks for it.

    Raises:
        BuildError: There is none: of this platform, because it is switched
            off, or because a source is missing.
    """
    sanitizer = _sanitizer()
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(
            f"they are built on Linux and macOS, and this is {sys.platform!r}"
        )
    digest = hashlib.sha256()
    for name, source in _sources().items():
        digest.update(f"{name} {len(source)} ".encode() + source)
    sources = digest.hexdigest()[:12]
    objects, link = _compiler_flags(sanitizer)
    # An operation returns it.
    objects["convolution_ops.o"].append(f'-DRIGL_SOURCES="{sources}"')
    # Not the compiler: what it has built serves machines that have none.
    digest.update(repr((objects, link)).encode())
    parts = [tf.__version__, platform.system(), platform.machine(), sanitizer]
    parts.append(digest.hexdigest()[:12])
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


def find_compiler() -> tuple[list[str], str]:
    """Returns the compiler's command, and the first line of its `--version`.

    Raises:
        BuildError: There is no compiler, or it cannot be run.
    """
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
    paths = [*_SOURCES.glob("*.cc"), *_SOURCES.glob("*.h")]
    sources = {path.name: path.read_bytes() for path in sorted(paths)}
    for name in (*_OPERATIONS, *_PER_INSTRUCTION_SET):
        if name not in sources:
            raise BuildError(
                f"the source {str(_SOURCES / name)!r} is missing. Reinstall "
                "rigl_keras"
            )
    return sources


def _compiler_flags(sanitizer):
    """Returns the `objects` and `link` of a `Build`."""
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
    objects = {
        f"{Path(source).stem}.o": [source, *tensorflow, *common]
        for source in _OPERATIONS
    }
    for name in names:
        flags = [*common, f"-DRIGL_ISA={name}", *_INSTRUCTION_SETS[name]]
        for source in _PER_INSTRUCTION_SET:
            objects[f"{Path(source).stem}_{name}.o"] = [source, *flags]
    link = ["-shared", *common, *tf.sysconfig.get_link_flags()]
    if sys.platform == "darwin":
        # As TensorFlow's own documentation has it; untested, for want of one.
        link += ["-undefined", "dynamic_lookup"]
    elif not sanitizer:  # whose functions come with the process
        # What is missing fails the build, and not the load.
        link.append("-Wl,--no-undefined")
    return objects, link


def compile_commands(build: Build, compiler: list[str]) -> list[list[str]]:
    """Returns one command for each object of a build.

    Args:
        build: The build.
        compiler: Command of the compiler.
    """
    return [
        [*compiler, *flags, "-c", str(_SOURCES / source), "-o", made]
        for made, (source, *flags) in build.objects.items()
    ]


def link_command(build: Build, compiler: list[str]) -> list[str]:
    """Returns the command that links the objects of a build to a library.

    Args:
        build: The build.
        compiler: Command of the compiler.
    """
    return [*compiler, *build.objects, *build.link, "-o", LIBRARY_NAME]


def run_compiler(
    command: list[str], folder: str | os.PathLike | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a compiler. What it prints, errors too, is in `stdout`.

    Args:
        command: Its command line.
        folder: Where it runs. None: in the current folder.
    """
    environment = {**os.environ, "LC_ALL": "C"}  # `_ERROR` knows English
    # The runtime of a sanitizer is for this process: it would speak up in
    # the name of the compiler, which is part of the version.
    environment.pop("LD_PRELOAD", None)
    return subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )


def first_error(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the first line of a compiler's output that is an error.

    Args:
        done: What `run_compiler` returned.
    """
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    lines.append(f"{done.args[0]} ended with status {done.returncode}")
    return next((line for line in lines if _ERROR.search(line)), lines[0])
