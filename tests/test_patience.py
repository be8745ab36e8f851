"""A long wait prints a line with its reason."""

import time

import pytest

from rigl_keras import _patience
from rigl_keras._patience import said_if_slow


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "rigl_keras"]


@pytest.mark.parametrize("seconds", [0.001, None])
def test_what_is_slow_is_said_meanwhile(caplog, monkeypatch, seconds):
    deadline = time.monotonic() + 60
    monkeypatch.setattr(_patience, "_SECONDS", 0.002)
    with said_if_slow("Doing 100 % of it ...", seconds=seconds):
        while not lines(caplog) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert lines(caplog) == ["Doing 100 % of it ..."]


def test_what_is_fast_is_not(caplog):
    for _ in range(3):
        with said_if_slow("Doing it ...", seconds=600):
            pass
    assert lines(caplog) == []
