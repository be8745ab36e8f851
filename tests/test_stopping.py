"""SIGUSR1, with which schedulers announce the end of a process."""

import os
import signal
import sys
import time

import pytest

from rigl_keras.experiments import exits
from rigl_keras.experiments.reproduction import plans, workers
from rigl_keras.experiments.reproduction.progress import Progress
from rigl_keras.experiments.reproduction.results import Results

RUN = plans.Run("rigl_erk_wrn", plans.Preset("full"), 0.1, 0)
# Ends its epoch when it is asked to, like bin/train, or never ends.
CHILD = """
import pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1], "run")
run.mkdir(exist_ok=True)
if (run / "begun").exists():
    (run / "config.gin").write_text(sys.argv[2])
    (run / "result.json").write_text("{}")
    sys.exit()
asked = []
if sys.argv[3] == "ends":
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
else:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
(run / "begun").write_text("")
while not asked:
    time.sleep(0.01)
(run / "epoch").write_text("is whole")
sys.exit(75)
"""


class StopOnceBegun(Progress):
    """Asks this process to stop once a run has begun."""

    def __init__(self, results):
        self._begun = results.folder(RUN) / "run/begun"

    def epoch(self, run, epochs):
        if self._begun.exists():
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def usr1():
    before = signal.getsignal(signal.SIGUSR1)
    exits.raise_stop_requests()
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("how", ["ends", "never"])
def test_a_worker_ends_the_epoch_that_it_is_in(
    how, tmp_path, monkeypatch, usr1
):
    command = [sys.executable, "-c", CHILD, RUN.name, RUN.configure(), how]
    monkeypatch.setattr(workers, "command_of", lambda *_, **__: command)
    monkeypatch.setattr(workers, "_POLL", 0.01)
    if how == "never":
        monkeypatch.setattr(workers, "GRACE", 0.1)
    results = Results(tmp_path, "full")
    with pytest.raises(exits.StopRequest):
        workers.train_missing([RUN], results, progress=StopOnceBegun(results))
    folder = results.folder(RUN)
    assert (folder / "run/epoch").exists() == (how == "ends")
    # It is not claimed and not a failure, and can continue.
    assert not results.claimed(RUN) and results.failure(RUN) is None
    # Further signals are ignored, as the process is about to end.
    os.kill(os.getpid(), signal.SIGUSR1)
    assert workers.train_missing([RUN], results) == {}
    assert results.finished(RUN)


def test_a_worker_that_does_not_wait_leaves_the_runs_of_others(tmp_path):
    results = Results(tmp_path, "full")
    with results.claim(RUN):
        assert results.worker(RUN).startswith(f"process {os.getpid()} on ")
        assert workers.train_missing([RUN], results, wait=False) == {}
    assert results.worker(RUN) is None


def test_a_run_stops_between_epochs(tmp_path, fresh):
    command = ["-m", "rigl_keras.experiments.runs.train_command"]
    for binding in (
        "train.model = @mlp",
        "mlp.hidden = (8,)",
        "train.batch_size = 512",
        "train.epochs = 60",
        "train.diagnostics = False",
    ):
        command.append(f"--gin_bindings={binding}")
    run = tmp_path / "run"
    command += ["--gin_file=gin/quickstart.gin", f"--run_dir={run}"]
    process = fresh.start(*command)
    metrics, end = run / "metrics.csv", time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    said, errors = process.communicate(120)
    assert process.returncode == 75, errors
    last = errors.splitlines()[-1]
    assert last.startswith("train: stopped, as SIGUSR1 asked")
    epochs = metrics.read_text().count("\n") - 1
    assert 1 <= epochs < 60
    saved = {path.stem for path in run.glob("checkpoints/*.index")}
    assert f"epoch-{epochs}" in saved and f"epoch-{epochs + 1}" not in saved
