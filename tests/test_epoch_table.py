"""The table of a run: a row for each epoch, at most 80 characters wide."""

import io
import sys

import pytest

from rigl_keras.experiments.runs import epoch_table
from rigl_keras.experiments.runs.epoch_table import EpochTable, row_of

LOGS = {
    "loss": 1.23456,
    "accuracy": 0.98765,
    "val_accuracy": 0.5,
    "density": 0.1,
    "drop_fraction": 0.29876,
    "training_flops_ratio": 0.123,
    "seconds": 12.34,
}


def test_a_row_by_hand():
    assert row_of(1, 30, LOGS, left=3_725.2) == (
        "     2/30  1.2346   98.77 %     50.00 %   0.1000"
        "  0.299  0.123x     12.3  1 h 02"
    )


@pytest.mark.parametrize(
    ("left", "shown"), [(0, "0:00"), (59.6, "1:00"), (3_600, "1 h 00")]
)
def test_the_time_that_is_left(left, shown):
    assert row_of(0, 1, LOGS, left=left).endswith(shown)


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (99.99994, "99.9999"),
        (99.99996, "100.00"),
        (9_999.994, "9999.99"),
        (9_999.996, "1.0e+04"),
        (1.8e11, "1.8e+11"),
        (-1.25, "-1.2500"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_a_large_loss_stays_in_its_column(loss, shown):
    assert row_of(0, 1, {"loss": loss}, left=0).split()[:2] == ["1/1", shown]


def test_what_there_is_not_is_a_dash():
    assert row_of(0, 1, {"loss": 1.0}, left=0).split() == [
        *["1/1", "1.0000", "-", "-", "-", "-", "-", "-", "0:00"]
    ]


def epochs_of(table, logs):
    table.on_train_begin()
    for epoch in range(3):
        table.on_epoch_begin(epoch)
        for batch in range(2):
            table.on_train_batch_end(batch)
        table.on_epoch_end(epoch, logs)
    table.on_train_end()


def test_rows_fit_a_terminal(capsys):
    large = {"loss": 123.4, "accuracy": 1, "density": 1, "seconds": 98_765.4}
    for logs in (LOGS, large):
        epochs_of(EpochTable(epochs=range(1_000), steps_per_epoch=2), logs)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert "validation" in lines[1]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("earlier", "expected"),
    [
        ([], "known after 15 steps"),
        # 20 epochs of three minutes; the first one includes tracing.
        ([600, 180, 190, 170], "about 60 min, at the pace of epochs 1 to 10"),
    ],
)
def test_what_is_said_before_a_run(earlier, expected, capsys, monkeypatch):
    """After some steps, the expected time is printed too."""
    now = iter(range(1_000))
    monkeypatch.setattr(epoch_table.time, "perf_counter", lambda: next(now))
    table = EpochTable(
        epochs=range(10, 30),  # as in a resumed run
        steps_per_epoch=40,
        about={"method": "RigL, a network"},
        earlier=earlier,
    )
    table.on_train_begin()
    said = capsys.readouterr().out.splitlines()
    assert said == ["method RigL, a network", f"time   {expected}"]
    for epoch in (10, 11):
        table.on_epoch_begin(epoch)
        for batch in range(40):
            table.on_train_batch_end(batch)
        table.on_epoch_end(epoch, LOGS)
    lines = capsys.readouterr().out.splitlines()
    # A step takes a second; there are 20 epochs of 40 steps.
    assert lines[0] == "time   about 13 min, at the pace of steps 6 to 15"
    assert lines[1].split()[0] == "epoch" and len(lines) == 4


@pytest.mark.parametrize(
    ("epochs", "earlier", "expected"),
    [
        (range(3), [], "known after the first epoch"),
        (range(1, 3), [20.4], "about 41 s, at the pace of epoch 1"),
    ],
)
def test_the_time_of_epochs_of_a_few_steps(epochs, earlier, expected, capsys):
    table = EpochTable(epochs=epochs, steps_per_epoch=14, earlier=earlier)
    table.on_train_begin()
    assert capsys.readouterr().out == f"time   {expected}\n"


def test_a_bar_is_shown_at_a_terminal_and_taken_away(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    epochs_of(EpochTable(epochs=range(3), steps_per_epoch=2), LOGS)
    assert "epoch 3/3" in shown.getvalue()
    assert "steps" not in shown.getvalue().rsplit("\r", 1)[-1]
    assert len(capsys.readouterr().out.splitlines()) == 5
