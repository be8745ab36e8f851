"""The progress bar of commands, on a terminal and elsewhere."""

import io
import sys

from rigl_keras.experiments.progress_bar import ProgressBar, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch):
    # Not in a fixture, as pytest sets stderr after fixtures.
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    return shown


def test_what_a_terminal_shows(monkeypatch, capsys):
    terminal = on_terminal(monkeypatch)
    with ProgressBar(unit="runs", total=3, done=1) as bar:
        assert "1/3 runs |" in terminal.getvalue()
        bar.advance()
        assert bar.show_left(90, "seed 2: epoch 1") == "01:30"
        say("a line above it")
    assert "2/3 runs |" in terminal.getvalue()
    assert "<01:30  seed 2: epoch 1" in terminal.getvalue()
    assert capsys.readouterr().out == "a line above it\n"


def test_time_left_follows_the_pace(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with ProgressBar(unit="runs", total=3) as bar:
        bar.learn_pace(20, 10)
        bar.learn_pace(40, 10)
        assert bar.show_left(60) == "03:00"
        bar.set_done(3)
        bar.show_left(0)
    assert "3/3 runs |" in terminal.getvalue()


def test_items_whose_number_is_not_known(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with ProgressBar(unit="calls", doing="a model") as bar:
        assert list(bar.over("abc")) == ["a", "b", "c"]
        bar.show_left(1)
    assert "3/? calls |" in terminal.getvalue()
    assert "a model" in terminal.getvalue()


def test_nothing_is_shown_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    with ProgressBar(unit="runs", total=2) as bar:
        assert list(bar.over([1, 2])) == [1, 2]
        say("a line")
        assert bar.show_left(60) == "01:00"
    assert shown.getvalue() == ""
    assert capsys.readouterr().out == "a line\n"
