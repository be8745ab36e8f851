"""How commands begin to use TensorFlow: without a line that is not ours.

TensorFlow, CUDA and XLA print to standard error while they are imported, before
anybody can set a level. That is kept, and shown only where the import fails.
"""

import contextlib
import importlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

from absl import logging as absl_logging

__all__ = ["LIGHT", "Messages", "load_library", "our_messages", "silence"]

# Set by the scripts of bin/, so that `--help` need not wait for TensorFlow.
LIGHT = "RIGL_KERAS_WITHOUT_TENSORFLOW"


class Messages(logging.Formatter):
    """Formats what is logged as a line for a user.

    A warning begins with `warning:`. A record with a true `progress` is no
    warning: it says what a command waits for, and begins with its name.

    Args:
        name: Name of the command.
    """

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, and a traceback where there is one."""
        begin = record.levelname.lower()
        if record.levelno < logging.WARNING or getattr(
            record, "progress", False
        ):
            begin = self._name
        lines = [f"{begin}: {record.getMessage()}"]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        return "\n".join(lines)


class AboveBars:
    """Standard error, where lines go above progress bars and not into them."""

    def write(self, text: str) -> None:
        tqdm = sys.modules.get("tqdm")
        if tqdm is None:  # nothing has made a bar
            sys.stderr.write(text)
            return
        with tqdm.tqdm.external_write_mode(file=sys.stderr):
            sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def close(self) -> None:
        """Leaves standard error open."""


def our_messages(name: str) -> None:
    """Has all that is logged, and all warnings, printed as `Messages` does.

    Args:
        name: Name of the command.
    """
    messages, printed = Messages(name), AboveBars()
    ours = absl_logging.get_absl_handler()
    if ours is not None:
        ours.setFormatter(messages)
        ours.python_handler.setStream(printed)
    for handler in logging.getLogger("tensorflow").handlers:
        handler.setFormatter(messages)
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(printed)

    def show(message, category, filename, lineno, file=None, line=None):
        (file or printed).write(f"warning: {message}\n")

    warnings.showwarning = show


def load_library() -> None:
    """Imports TensorFlow and the library, if that was put off.

    Raises:
        ValueError: Something that they need is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    put_off = os.environ.pop(LIGHT, None)
    with silence():
        if put_off:
            importlib.reload(sys.modules["rigl_keras"])
        missing = getattr(sys.modules["rigl_keras"], "_WITHOUT_KERAS", None)
        if missing is not None:
            raise ValueError(f"This needs TensorFlow and Keras 3, {missing}.")
        # CUDA tells, here as well, that there is none.
        sys.modules["tensorflow"].config.list_physical_devices()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps standard error from what is done within, unless that fails.

    Python's `sys.stderr` and what C++ prints are kept alike. All is shown where
    TF_CPP_MIN_LOG_LEVEL asks for more than errors.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2") in ("0", "1"):
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept, contextlib.ExitStack() as last:
        before = os.dup(2)
        last.callback(os.close, before)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except Exception:
            sys.stderr.flush()
            kept.seek(0)
            os.write(before, kept.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
