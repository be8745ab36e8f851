"""English text that every Python ships, as a data set of characters.

`python_docs()` is what `help()` shows about the language and the standard
library: the topics of `pydoc_data`, and the docstrings of a fixed list of
modules, which are read as files and not imported.
"""

from __future__ import annotations

import ast
import functools
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = [
    "SYMBOLS",
    "TextUnavailableError",
    "decoded",
    "encoded",
    "python_docs",
]

# A line end, the printable ASCII characters, and one symbol for all others:
# less than one in a thousand characters.
SYMBOLS = ("\n", *map(chr, range(32, 127)), "\N{REPLACEMENT CHARACTER}")

# Modules of the standard library in every Python from 3.10 to 3.13, on any
# system, with useful docstrings.
_MODULES = (
    *("_pydecimal", "_pyio", "argparse", "asyncio", "base64", "bdb"),
    *("calendar", "cmd", "codecs", "collections", "concurrent"),
    *("configparser", "contextlib", "copy", "csv", "ctypes", "dataclasses"),
    *("datetime", "difflib", "doctest", "email", "enum", "fractions"),
    *("ftplib", "functools", "glob", "gzip", "hashlib", "heapq", "html"),
    *("http", "imaplib", "importlib", "inspect", "io", "ipaddress", "json"),
    *("locale", "logging", "mailbox", "mimetypes", "multiprocessing"),
    *("ntpath", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools"),
    *("platform", "poplib", "posixpath", "pprint", "profile", "pstats"),
    *("queue", "random", "sched", "selectors", "shelve", "shlex", "shutil"),
    *("smtplib", "socket", "socketserver", "sqlite3", "ssl", "statistics"),
    *("string", "subprocess", "tarfile", "tempfile", "textwrap"),
    *("threading", "timeit", "tokenize", "trace", "traceback", "types"),
    *("typing", "unittest", "urllib", "uuid", "warnings", "wave", "weakref"),
    *("webbrowser", "wsgiref", "xml", "xmlrpc", "zipapp", "zipfile"),
    "zoneinfo",
)
_TESTS = {"test", "tests"}  # folders of modules that only some installs have
_HAVE_DOCSTRINGS = (
    ast.Module,
    ast.ClassDef,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
)


class TextUnavailableError(Exception):
    """This Python lacks a part of its documentation."""


@functools.cache
def python_docs() -> str:
    """Returns the documentation of this Python, about 1.6 million characters.

    Topics and modules come in a mixed order (by the CRC-32 of their names),
    with three line ends between them: the last tenth of the text is like the
    rest. The text depends only on the version of Python, if the standard
    library is unchanged.

    Raises:
        TextUnavailableError: The topics or the source of a module are missing.
    """
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise TextUnavailableError(
            f"Python {platform.python_version()} here lacks pydoc_data, from "
            "which help() has its topics. On Debian or Ubuntu: apt install "
            "libpython3-stdlib"
        ) from error
    documents = {
        f"topic {name}": text.strip() for name, text in topics.topics.items()
    }
    root = Path(sysconfig.get_path("stdlib"))
    for name in _MODULES:
        documents[f"module {name}"] = "\n\n".join(_docstrings(root, name))
    mixed = sorted(
        documents, key=lambda name: (zlib.crc32(name.encode()), name)
    )
    return "\n\n\n".join(documents[name] for name in mixed)


def _docstrings(root: Path, name: str) -> Iterator[str]:
    """Yields the docstrings of a module or a package, files in order."""
    files = [root / f"{name}.py"]
    if (root / name).is_dir():
        files = [
            path
            for path in sorted((root / name).rglob("*.py"))
            if not _TESTS & {*path.relative_to(root).parts}
        ]
    if not files or not files[0].is_file():
        raise TextUnavailableError(
            f"Python {platform.python_version()} here lacks the source of "
            f"{name} in {root}. Run with one that has its standard library as "
            "files, as python.org and Debian ship it."
        )
    for path in files:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, _HAVE_DOCSTRINGS):
                text = ast.get_docstring(node)
                if text:
                    yield text


def encoded(text: str) -> np.ndarray:
    """Returns the index in `SYMBOLS` of each character, as uint8.

    >>> encoded("a b\N{BULLET}").tolist()
    [66, 1, 67, 96]

    Args:
        text: Any text.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known = (codes >= 32) & (codes < 127)
    indices = np.where(known, codes - 31, len(SYMBOLS) - 1)
    return np.where(codes == 10, 0, indices).astype(np.uint8)


def decoded(indices: np.ndarray) -> str:
    """Returns the text of symbols.

    Args:
        indices: Integers in 0..96, any shape.
    """
    return "".join(SYMBOLS[i] for i in np.ravel(indices))
