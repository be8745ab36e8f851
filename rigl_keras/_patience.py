"""A line about what takes long, so that nobody waits without a word."""

import contextlib
import logging
import threading
from collections.abc import Iterator

__all__ = ["said_if_slow"]

_SECONDS = 2.0
_log = logging.getLogger("rigl_keras")


@contextlib.contextmanager
def said_if_slow(message: str, *, seconds: float = _SECONDS) -> Iterator[None]:
    """Logs a line, as a warning, if the context takes longer than a while.

    The line comes while one waits, not afterwards. That it is no warning is in
    its record, as `progress`.

    Args:
        message: What takes long.
        seconds: How long is long.
    """
    # A thread that is asleep: a process may fork, or end, meanwhile.
    timer = threading.Timer(
        seconds,
        _log.warning,
        args=("%s", message),
        kwargs={"extra": {"progress": True}},
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
