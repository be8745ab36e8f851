"""The compiler, its flags, and a build of the two libraries.

One has TensorFlow's operations. The other runs a network without TensorFlow.
The operations link it too, because one of them runs such a network.
"""

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
    "NETWORK_LIBRARY_NAME",
    "compile_commands",
    "find_compiler",
    "first_error",
    "link_commands",
    "planned_build",
    "run_compiler",
]

LIBRARY_NAME = "rigl_keras_kernels.so"
NETWORK_LIBRARY_NAME = "rigl_keras_network.so"
# Folders of the sources, which are named "folder/name".
_SOURCES = {
    "kernels": Path(__file__).with_name("csrc"),
    "serving": Path(__file__).parents[1] / "serving" / "csrc",
}
# Sources that need TensorFlow.
_OPERATIONS = (
    "kernels/convolution_ops.cc",
    "kernels/lane_convolution_ops.cc",
    "kernels/lane_ops.cc",
    "kernels/masked_kernel_op.cc",
    "kernels/matrix_ops.cc",
    "kernels/place_ops.cc",
    "kernels/recurrent_ops.cc",
    "kernels/row_ops.cc",
    "serving/network_op.cc",
)
# Loops, compiled for each instruction set, and some of them for each length of
# its vectors.
_PER_INSTRUCTION_SET = (
    "kernels/lane_convolutions.cc",
    "kernels/lane_layers.cc",
    "kernels/lanes.cc",
    "kernels/panels.cc",
    "kernels/recurrent.cc",
    "kernels/rows.cc",
)
_PER_VECTOR_LENGTH = ("serving/tiles.cc",)
# Loops that networks need, too.
_OF_NETWORKS = ("kernels/panels.cc", "kernels/recurrent.cc")
_COMPILERS = ("g++", "c++", "clang++")
_SANITIZERS = ("address", "thread")
_X86 = ("x86_64", "AMD64")
# Instruction sets on x86_64; other machines have only the last.
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
# Floats in a vector. An unaligned load of 64 bytes always meets two cache
# lines, one of 32 bytes only every other time.
_VECTOR_LENGTHS = {"avx512": (16, 8), "avx2": (8,), "portable": (4,)}
# Errors in the output of a compiler or a linker.
_ERROR = re.compile(r"\berror: |undefined reference|cannot find ")


class BuildError(RuntimeError):
    """There is no op library. The reason is one line."""

    def __init__(self, reason: str):
        super().__init__(" ".join(reason.split()))


@dataclasses.dataclass(frozen=True)
class Build:
    """A build: what is compiled, and how.

    Attributes:
        objects: `{object file: [source, flag, ...]}`.
        libraries: `{library: [object file, ..., flag, ...]}`, what is linked
            to each of them.
        version: Name of a folder in the cache. It changes with the objects,
            the flags, the sources and TensorFlow.
        sources: Digest of the sources. The op library has an operation that
            returns it.
        tensorflow: Version of TensorFlow.
        platform: System and machine, such as `Linux-x86_64`.
        sanitizer: Under which it runs, or an empty string.
    """

    objects: dict[str, list[str]]
    libraries: dict[str, list[str]]
    version: str
    sources: str
    tensorflow: str
    platform: str
    sanitizer: str


def planned_build() -> Build:
    """Returns the build for this machine and environment.

    Raises:
        BuildError: There is none: for this platform, because it is switched
            off, or because a source is missing.
    """
    sanitizer = _sanitizer()
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(
            f"they are built on Linux and macOS, and this is {sys.platform!r}"
        )
    digest = hashlib.sha256()
    found = _sources()
    for name, source in found.items():
        digest.update(f"{name} {len(source)} ".encode() + source)
    sources = digest.hexdigest()[:12]
    objects = _objects(found, sanitizer)
    # An operation returns it.
    asked = "kernels_convolution_ops.o"
    objects[asked].append(f'-DRIGL_SOURCES="{sources}"')
    libraries = _libraries(objects, sanitizer)
    # Without the compiler: its builds also serve machines without one. Without
    # TensorFlow's folders: environments with one version of it share a build.
    commands = repr((objects, libraries))
    for folder in (tf.sysconfig.get_include(), tf.sysconfig.get_lib()):
        commands = commands.replace(folder, "")
    digest.update(commands.encode())
    where = f"{platform.system()}-{platform.machine()}"
    parts = [tf.__version__, where, sanitizer, digest.hexdigest()[:12]]
    return Build(
        objects,
        libraries,
        version="-".join(part for part in parts if part),
        sources=sources,
        tensorflow=tf.__version__,
        platform=where,
        sanitizer=sanitizer,
    )


def _sanitizer():
    """Returns the requested sanitizer, or an empty string."""
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
            f"CXX={asked!r} is not a command ({error}). Set it to a C++ "
            "compiler"
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
    """Returns `{"folder/name": bytes}` of the sources."""
    sources = {
        f"{name}/{path.name}": path.read_bytes()
        for name, folder in _SOURCES.items()
        for path in sorted([*folder.glob("*.cc"), *folder.glob("*.h")])
    }
    for name in (*_OPERATIONS, *_PER_INSTRUCTION_SET, *_PER_VECTOR_LENGTH):
        if name not in sources:
            raise BuildError(
                f"the source {str(_path(name))!r} is missing. Reinstall "
                "rigl_keras"
            )
    return sources


def _path(source):
    folder, name = source.split("/")
    return _SOURCES[folder] / name


def _common_flags(sanitizer):
    """Returns the flags of every command."""
    flags = ["-std=c++17", "-O3", "-fPIC", "-DNDEBUG", "-Wall", "-pthread"]
    if sanitizer:
        flags[1:2] = ["-O1", "-g", "-fno-omit-frame-pointer"]
        flags.append(f"-fsanitize={sanitizer}")
    if sanitizer == "address":
        # Checks as calls: in unrolled loops, GCC needs minutes for them.
        flags.append("--param=asan-instrumentation-with-call-threshold=0")
    if platform.machine() in _X86:
        flags.append("-DRIGL_X86=1")
    return flags


def _objects(sources, sanitizer):
    """Returns the `objects` of a `Build`."""
    common = _common_flags(sanitizer)
    undefined = _undefined_behaviour(sanitizer)
    # No warnings for TensorFlow's headers and macros.
    tensorflow = [
        *(
            re.sub("^-I", "-isystem", f)
            for f in tf.sysconfig.get_compile_flags()
        ),
        *common,
        *undefined,
        "-Wno-deprecated-declarations",
    ]
    if undefined:
        # With these, GCC does not accept addresses in headers as constants.
        tensorflow.append(
            "-fno-sanitize=vptr,null,nonnull-attribute,returns-nonnull-attribute"
        )
    plain = [*common, *undefined, "-fvisibility=hidden"]
    names = list(_INSTRUCTION_SETS)
    if platform.machine() not in _X86:
        names = names[-1:]
    objects = {}
    for source in sources:
        if not source.endswith(".cc"):
            continue
        stem = source.removesuffix(".cc").replace("/", "_")
        if source in _OPERATIONS:
            objects[f"{stem}.o"] = [source, *tensorflow]
        elif source in _PER_INSTRUCTION_SET:
            for name in names:
                objects[f"{stem}_{name}.o"] = [*(source, *plain, *_isa(name))]
        elif source in _PER_VECTOR_LENGTH:
            for name in names:
                for length in _VECTOR_LENGTHS[name]:
                    objects[f"{stem}_{name}_{length}.o"] = [
                        *(source, *plain, *_isa(name)),
                        f"-DRIGL_LENGTH={length}",
                    ]
        else:
            objects[f"{stem}.o"] = [source, *plain]
    return objects


def _undefined_behaviour(sanitizer):
    """Returns the flags that check for it, to compile and to link."""
    if sanitizer != "address":
        return []
    return ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]


def _isa(name):
    """Returns the flags of an instruction set."""
    return [f"-DRIGL_ISA={name}", *_INSTRUCTION_SETS[name]]


def _libraries(objects, sanitizer):
    """Returns the `libraries` of a `Build`."""
    link = ["-shared", *_common_flags(sanitizer)]
    link += _undefined_behaviour(sanitizer)
    operations = tf.sysconfig.get_link_flags()
    if sys.platform == "darwin":
        # As in TensorFlow's documentation; untested, for lack of a machine.
        operations += ["-undefined", "dynamic_lookup"]
    elif not sanitizer:  # a sanitizer's functions come with the process
        # Missing functions fail the build, not the load.
        link.append("-Wl,--no-undefined")
    network = [
        name
        for name, (source, *_) in objects.items()
        if source in _OF_NETWORKS
        or (source.startswith("serving/") and source not in _OPERATIONS)
    ]
    # The name by which libraries that link it find it in their folder.
    name = (
        f"-Wl,-install_name,@rpath/{NETWORK_LIBRARY_NAME}"
        if sys.platform == "darwin"
        else f"-Wl,-soname,{NETWORK_LIBRARY_NAME}"
    )
    return {
        LIBRARY_NAME: [*objects, *link, *operations],
        NETWORK_LIBRARY_NAME: [*network, *link, name],
    }


def compile_commands(build: Build, compiler: list[str]) -> list[list[str]]:
    """Returns one command for each object of a build.

    Args:
        build: The build.
        compiler: Command of the compiler.
    """
    return [
        [*compiler, *flags, "-c", str(_path(source)), "-o", made]
        for made, (source, *flags) in build.objects.items()
    ]


def link_commands(build: Build, compiler: list[str]) -> list[list[str]]:
    """Returns one command for each library of a build.

    Args:
        build: The build.
        compiler: Command of the compiler.
    """
    return [
        [*compiler, *linked, "-o", name]
        for name, linked in build.libraries.items()
    ]


def run_compiler(
    command: list[str], folder: str | os.PathLike | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a compiler. Its output and errors are in `stdout`.

    Args:
        command: Its command line.
        folder: Working directory. None: the current one.
    """
    environment = {**os.environ, "LC_ALL": "C"}  # `_ERROR` matches English
    # The sanitizer's runtime is for this process only: its output would mix
    # with the compiler's, which is part of the version.
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
        done: The result of `run_compiler`.
    """
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    lines.append(f"{done.args[0]} ended with status {done.returncode}")
    return next((line for line in lines if _ERROR.search(line)), lines[0])
