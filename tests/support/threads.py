"""Runs functions at the same time."""

import threading
from collections.abc import Callable, Iterable


def in_threads(calls: Iterable[Callable[[], object]]) -> list[BaseException]:
    """Runs functions at the same time, and returns what they raise."""
    raised = []

    def run(call):
        try:
            call()
        except BaseException as error:  # also failures of the test itself
            raised.append(error)

    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised
