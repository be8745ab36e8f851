"""Where a run or a measurement was made: processor, commit and time."""

import datetime
import functools
import platform
import subprocess
from pathlib import Path

import rigl_keras

__all__ = ["commit", "now", "processor"]


@functools.cache
def processor() -> str:
    """Returns the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """Returns the commit of this code, with a `+` if files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(rigl_keras.__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def now() -> str:
    """Returns the date and time in UTC, in ISO 8601."""
    moment = datetime.datetime.now(datetime.timezone.utc)
    return moment.isoformat(timespec="seconds")
