"""A long wait prints a line with its reason."""

import time

from rigl_keras._patience import said_if_slow


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "rigl_keras"]


def test_what_is_slow_is_said_meanwhile(caplog):
    deadline = time.monotonic() + 60
    with said_if_slow("Doing 100 % of it ...", seconds=0.001):
        while not lines(caplog) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert lines(caplog) == ["Doing 100 % of it ..."]


def test_what_is_fast_is_not(caplog):
    for _ in range(3):
        with said_if_slow("Doing it ...", seconds=600):
            pass
    assert lines(caplog) == []
