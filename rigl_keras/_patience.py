"""A message about work that takes long."""

import contextlib
import logging
import threading
from collections.abc import Iterator

__all__ = ["said_if_slow"]

_SECONDS = 2.0  # before a message
_log = logging.getLogger("rigl_keras")


@contextlib.contextmanager
def said_if_slow(
    message: str, *, seconds: float | None = None
) -> Iterator[None]:
    """Logs a warning if the context takes longer than some seconds.

    The warning comes during the wait, not afterwards. Its record has
    `progress`, which distinguishes it from other warnings.

    Args:
        message: The warning.
        seconds: When to log it. None: after two.
    """
    # The thread sleeps: the process may fork or end meanwhile.
    timer = threading.Timer(
        _SECONDS if seconds is None else seconds,
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
