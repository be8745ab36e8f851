"""The progress bar of commands, and lines above it."""

import contextlib
import statistics
import sys
from collections.abc import Iterable, Iterator

import tqdm

__all__ = ["ProgressBar", "say"]


def say(line: str) -> None:
    """Prints a line on standard output, above the bar if there is one."""
    tqdm.tqdm.write(line)
    sys.stdout.flush()


class ProgressBar(contextlib.AbstractContextManager):
    """A bar on standard error, if that is a terminal.

    Args:
        unit: What it counts, as in "3/15 runs".
        total: Number of items. None: unknown.
        done: Number of items that are already done.
        doing: What is being done.
        leave: Whether the bar stays when it is closed.
    """

    def __init__(
        self,
        *,
        unit: str,
        total: int | None = None,
        done: int = 0,
        doing: str = "",
        leave: bool = True,
    ):
        self._pace: list[float] = []  # seconds taken over seconds estimated
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            bar_format="{n_fmt}/{total_fmt} "
            + unit
            + " |{bar:20}| {elapsed}{desc}",
            dynamic_ncols=True,
            leave=leave,
            disable=not sys.stderr.isatty(),
        )
        if doing:
            self._bar.set_description_str(f"  {doing}")

    def advance(self) -> None:
        """Counts one more item."""
        self._bar.update()

    def over(self, items: Iterable) -> Iterator:
        """Yields items, and counts each when it is done."""
        for item in items:
            yield item
            self.advance()

    def set_done(self, done: int, *, show: bool = False) -> None:
        """Sets the number of items that are done, here and elsewhere.

        Args:
            done: The number.
            show: Whether the bar shows it now, if some time has passed.
        """
        if show:
            self._bar.update(done - self._bar.n)
        else:
            self._bar.n = done

    def learn_pace(self, seconds: float, estimated: float) -> None:
        """Learns the pace from an estimate and the time it really took."""
        self._pace.append(seconds / max(estimated, 1e-9))

    def show_left(self, estimated: float, doing: str = "") -> str:
        """Shows and returns the time left, at the pace so far.

        Args:
            estimated: Estimated seconds for the rest.
            doing: What is being done.
        """
        pace = statistics.fmean(self._pace) if self._pace else 1.0
        left = tqdm.tqdm.format_interval(pace * estimated)
        self._bar.set_description_str(f"<{left}  {doing}")
        return left

    def close(self) -> None:
        """Closes the bar."""
        self._bar.close()

    def __exit__(self, *_) -> None:
        self.close()
