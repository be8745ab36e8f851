"""Environments for packages that conflict with TensorFlow's or each other.

Each is a virtual environment in the cache (`RIGL_KERAS_CACHE`, or else
`~/.cache/rigl_keras`), created by the first command that needs it. A file in
it lists its packages. An environment without this file, or with other
packages, is created again.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rigl_keras import _files

__all__ = [
    "Environment",
    "UnavailableError",
    "folder_of_environments",
    "own_python",
]

_STAMP = "made_of.json"
_LOG = "pip.log"


class UnavailableError(Exception):
    """An environment is not available; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """Packages for one or more engines.

    Attributes:
        name: Name of its folder.
        packages: The packages, as pip takes them.
        modules: Modules that can be imported then.
        pythons: The first and the last version of Python that has wheels.
    """

    name: str
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    pythons: tuple[tuple[int, int], tuple[int, int]] = ((3, 10), (3, 13))

    def python(
        self,
        folder: Path,
        *,
        install: bool = True,
        say: Callable[[str], None] = print,
    ) -> str:
        """Returns the Python of this environment, and creates it if needed.

        If this Python has all the modules, it is returned.

        Args:
            folder: Folder of the environments.
            install: Whether the environment may be created.
            say: Called with a line before a slow step.

        Raises:
            UnavailableError: The environment does not exist and cannot be
                created.
        """
        if all(importlib.util.find_spec(name) for name in self.modules):
            return own_python()
        home = folder / self.name
        python = home / "bin" / "python"
        if self._is_made(home):
            return str(python)
        if not install:
            raise UnavailableError(
                f"{', '.join(self.packages)}: not installed here, and "
                "--noinstall is set"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with _files.lock(folder / f".{self.name}.lock"):
            if not self._is_made(home):  # another command may have made it
                self._make(home, python, say)
        return str(python)

    def _is_made(self, home):
        try:
            return json.loads((home / _STAMP).read_text()) == self._content()
        except (OSError, ValueError):
            return False

    def _content(self):
        return {"packages": list(self.packages)}

    def _make(self, home, python, say):
        base = self._base()
        say(
            f"Installing {', '.join(self.packages)} into {home} (once; some "
            "minutes)"
        )
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        log = home / _LOG
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        imports = f"import {', '.join(self.modules)}"
        for what, command in (
            (f"{base} makes no environment", [base, "-m", "venv", str(home)]),
            ("pip fails", [*pip, "install", "--retries=2", *self.packages]),
            ("its modules fail", [str(python), "-c", imports]),
        ):
            if _run(command, log):
                raise UnavailableError(f"{what}: {_reason(log)} ({log})")
        (home / _STAMP).write_text(json.dumps(self._content()) + "\n")

    def _base(self):
        """Returns a Python that has wheels of the packages."""
        first, last = self.pythons
        if first <= sys.version_info[:2] <= last:
            return own_python()
        for minor in range(last[1], first[1] - 1, -1):
            found = shutil.which(f"python{last[0]}.{minor}")
            if found and not _run([found, "-c", "import venv"], None):
                return found
        raise UnavailableError(
            f"{self.packages[0]} has wheels for Python {_dotted(first)} to "
            f"{_dotted(last)}, and none of these is on the PATH"
        )


def own_python() -> str:
    """Returns the Python of this process."""
    return sys.executable


def folder_of_environments() -> Path:
    """Returns the folder of all environments, in the cache."""
    cache = os.environ.get("RIGL_KERAS_CACHE")
    if not cache:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        cache = os.path.join(root, "rigl_keras")
    return Path(os.path.abspath(os.path.expanduser(cache)), "engines")


def _run(command, log):
    """Returns the exit status of a command whose output goes to a file."""
    with open(log or os.devnull, "ab") as printed:
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                check=False,
            ).returncode
        except OSError as error:
            printed.write(f"{error}\n".encode())
            return 1


def _reason(log):
    """Returns the line of a log that says why a command failed."""
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines)[-1].strip()[:200]


def _dotted(version):
    return ".".join(map(str, version))
