"""Processes with one engine each, which run only during requests."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["EngineError", "Process"]


class EngineError(Exception):
    """An engine cannot do a request."""


class Process:
    """A process that runs `worker.py`, or a script with the same protocol.

    Between requests all of its threads are stopped. Otherwise they would
    actively wait for the next call and slow down the other engines.

    Args:
        command: The command to run.
        environment: Variables in addition to those of this process.
        log: File for the output of the process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
    ):
        self._log = log
        self._unread = b""
        with open(log, "ab") as printed:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env={**os.environ, **environment},
                start_new_session=True,  # a group, to stop its children too
            )
        self._requests: Any = self._process.stdin
        self._answers: Any = self._process.stdout

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, do: str, *, limit: float, **details: Any) -> dict[str, Any]:
        """Returns the answer to a request.

        Args:
            do: The kind of the request, as in `worker.py`.
            limit: Seconds after which the process is ended.
            **details: Further entries of the request, for JSON.

        Raises:
            EngineError: The process answers with an error, ends, or takes too
                long.
        """
        if self._requests.closed:
            raise EngineError(self._how_it_ended())
        request = json.dumps({"do": do, **details}) + "\n"
        try:
            self._signal(signal.SIGCONT)
            self._requests.write(request.encode())
            self._requests.flush()
            line = self._line(time.monotonic() + limit)
        except TimeoutError as error:
            self.close()
            raise EngineError(
                f"{do} takes more than {limit:.0f} seconds"
            ) from error
        except (BrokenPipeError, EOFError) as error:
            self.close()
            raise EngineError(self._how_it_ended()) from error
        self.stop()
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def stop(self) -> None:
        """Stops all threads of the process, and waits until they stop."""
        if not self.is_alive:
            return
        self._signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            # WNOWAIT leaves the status of an ended process to `Popen`.
            os.waitid(
                os.P_PID,
                self._process.pid,
                os.WSTOPPED | os.WEXITED | os.WNOWAIT,
            )

    def close(self) -> None:
        """Ends the process, even if it is working."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(BrokenPipeError):  # an unsent request
                pipe.close()

    def _line(self, deadline):
        """Returns the next line that the process answers."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError
                read = os.read(self._answers.fileno(), 1 << 16)
                if not read:
                    raise EOFError
                self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _signal(self, number):
        """Sends a signal to the process and its children."""
        if self.is_alive:  # otherwise another process may have its number
            os.killpg(self._process.pid, number)

    def _how_it_ended(self):
        status = self._process.returncode
        try:
            how = f"by signal {signal.Signals(-status).name}"
        except ValueError:
            how = f"with status {status}"
        printed = self._log.read_text(errors="replace").strip().splitlines()
        last = f": {printed[-1][:200]}" if printed else ""
        return f"its process ended {how}{last}"
