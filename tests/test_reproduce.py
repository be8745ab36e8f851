"""Runs that several processes share, with kills, failures and resuming.

This file is also two programs: a fast stand-in for bin/train, and a process
that trains runs with it.
"""

import contextlib
import fcntl
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__)


def stand_in(name, configuration, seconds, epochs, fails):
    """Writes the files that bin/train would write."""
    run = pathlib.Path(name)
    directory = run / "run"
    directory.mkdir(exist_ok=True)
    with (run / "busy").open("w") as busy:
        # Raises if two processes train a run at once.
        fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        train(run, directory, configuration, seconds, epochs, fails)


def train(run, directory, configuration, seconds, epochs, fails):
    parent = os.getppid()
    if fails:
        print("a stack of frames\ntrain: there is no such thing")
        sys.exit(2)
    (directory / "config.gin").write_text(configuration)
    metrics = directory / "metrics.csv"
    if not metrics.exists():
        metrics.write_text("epoch\n")
    while (done := metrics.read_text().count("\n") - 1) < int(epochs):
        time.sleep(float(seconds) / int(epochs))
        if os.getppid() != parent:
            sys.exit(1)
        with metrics.open("a") as file:
            file.write(f"{done}\n")
    with (run / "finished").open("a") as file:
        file.write("once\n")
    result = directory / "result.json"
    result.with_suffix(".new").write_text('{"test_accuracy": 0.5}')
    result.with_suffix(".new").replace(result)


if __name__ == "__main__" and sys.argv[1] == "run":
    stand_in(*sys.argv[2:6], fails=sys.argv[6:])
    sys.exit()

import pytest  # noqa: E402

import gin  # noqa: E402
from rigl_keras.experiments import exits  # noqa: E402
from rigl_keras.experiments.reproduction import (  # noqa: E402
    costs,
    plans,
    progress,
    reproduce,
    reproduce_command,
    workers,
)
from rigl_keras.experiments.reproduction.results import (  # noqa: E402
    Results,
)

FULL = plans.Preset("full")


def command_of(run, *, data_dir=None, parent=None, seconds=0.2, failing=()):
    command = [sys.executable, str(HERE), "run", run.name, run.configure()]
    command += [str(seconds), "2"]
    return [*command, "fails"] if run.row in failing else command


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


@pytest.fixture
def quick(monkeypatch):
    """Trains with the stand-in. Some rows may fail."""
    failing = set()
    monkeypatch.setattr(
        workers,
        "command_of",
        lambda run, **options: command_of(run, failing=failing),
    )
    monkeypatch.setattr(workers, "_POLL", 0.05)
    monkeypatch.setattr(workers, "_WAIT", 0.05)
    return failing


class Told(progress.Progress):
    """Records the events."""

    def __init__(self):
        self.events = []

    def start(self, run):
        self.events.append(("start", run.name))

    def epoch(self, run, epochs):
        pass

    def finish(self, run, *, seconds, failure):
        self.events.append(("failed" if failure else "finish", run.name))

    def elsewhere(self, run):
        self.events.append(("elsewhere", run.name))

    def wait(self, runs):
        self.events.append(("wait", tuple(run.name for run in runs)))


def some_runs(seeds=(0, 1)):
    rows = ("static_erk_wrn", "rigl_erk_wrn")
    return [plans.Run(row, FULL, 0.1, seed) for seed in seeds for row in rows]


def finished(results, runs):
    """Checks that each run was trained to its end once, by one process."""
    for run in runs:
        folder = results.folder(run)
        assert results.finished(run)
        assert (folder / "finished").read_text() == "once\n"
        assert results.epochs(run) == 2
        assert "BlockingIOError" not in (folder / "log.txt").read_text()


def test_what_is_missing_is_trained(tmp_path, quick):
    runs, told = some_runs(), Told()
    results = Results(tmp_path, "full")
    assert workers.train_missing(runs[1:2], results, progress=told) == {}
    assert workers.train_missing(runs, results, progress=told) == {}
    finished(results, runs)
    order = [name for what, name in told.events if what == "start"]
    assert order == [runs[i].name for i in (1, 0, 2, 3)]
    assert workers.train_missing(runs, results, progress=Told()) == {}
    finished(results, runs)
    about = (results.folder(runs[1]) / "about.json").read_text()
    assert '"row": "rigl_erk_wrn"' in about and '"seed": 0' in about


def test_a_failure_stops_nothing_else(tmp_path, quick):
    """A failed run is named, with its error; the next command repeats it."""
    ticket = plans.Run("lottery_wrn", FULL, 0.1, 0)
    runs = [ticket.source, ticket, *some_runs([0])]
    results, told = Results(tmp_path, "full"), Told()
    quick.add("pruning_wrn")
    failed = workers.train_missing(runs, results, progress=told)
    assert failed == {
        ticket.source: "train: there is no such thing",
        ticket: f"it starts from {ticket.source.name}, which failed",
    }
    finished(results, runs[2:])
    assert results.failure(ticket.source) == "train: there is no such thing"
    assert not results.folder(ticket).exists()
    quick.clear()
    assert workers.train_missing(runs, results) == {}
    finished(results, runs)
    assert results.failure(ticket.source) is None


@pytest.fixture(params=[-60, 60], ids=["behind", "ahead"])
def skewed(request, monkeypatch):
    """The file server's clock is a minute off; all runs fail, or some rows."""
    record = Results.record_failure

    def record_failure(results, run, reason):
        record(results, run, reason)
        path = results.folder(run) / "failure.txt"
        there = time.time() + request.param
        os.utime(path, (there, there))

    failing = {"pruning_wrn", "static_erk_wrn"}
    monkeypatch.setattr(Results, "record_failure", record_failure)
    monkeypatch.setattr(
        workers,
        "_trained",
        lambda run, *args: "no luck" if run.row in failing else None,
    )
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        assert len(waits) < 5, "it waits for a run that has failed"

    monkeypatch.setattr(workers.time, "sleep", sleep)
    return failing


def test_no_failure_is_lost_by_a_clock(tmp_path, skewed):
    """Runs that start from a failed one do not wait for it."""
    ticket = plans.Run("lottery_wrn", FULL, 0.1, 0)
    (run, *_) = some_runs()
    runs, results = [ticket.source, ticket, run], Results(tmp_path, "full")
    wanted = {
        ticket.source: "no luck",
        ticket: f"it starts from {ticket.source.name}, which failed",
        run: "no luck",
    }
    assert workers.train_missing(runs, results) == wanted
    # These failures are of an earlier command: this one tries again.
    told = Told()
    assert workers.train_missing(runs, results, progress=told) == wanted
    started = [name for what, name in told.events if what == "start"]
    assert started == [ticket.source.name, run.name]
    skewed.clear()
    assert workers.train_missing(runs[2:], results) == {}
    assert results.failure(run) is None


@pytest.mark.parametrize("before", [False, True])
def test_no_failure_elsewhere_is_lost_by_a_clock(
    tmp_path, skewed, monkeypatch, before
):
    """Another process fails a run again that had failed before."""
    (run, *_) = some_runs()
    results = Results(tmp_path, "full")
    results.folder(run).mkdir()
    if before:
        results.record_failure(run, "no luck")

    looks = []

    def other(seconds):
        results.record_failure(run, "no luck")
        looks.append(seconds)
        assert len(looks) < 5, "it waits for a run that has failed"

    monkeypatch.setattr(workers.time, "sleep", other)
    with results.claim(run):
        failed = workers.train_missing([run], Results(tmp_path, "full"))
    assert failed == {run: "no luck"}


def test_a_run_waits_for_nobody_who_is_not_there(tmp_path):
    ticket = plans.Run("lottery_wrn", FULL, 0.1, 0)
    with pytest.raises(ValueError, match="starts from pruning.*Pass it, too"):
        workers.train_missing([ticket], Results(tmp_path, "full"))


def test_results_that_cannot_be_read(tmp_path):
    """Damaged results are an error that names the file."""
    (run, *_) = some_runs()
    results = Results(tmp_path, "full")
    folder = results.folder(run)
    (folder / "run").mkdir(parents=True)
    (folder / "run/result.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="another configuration"):
        results.finished(run)
    (folder / "run/config.gin").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="another configuration"):
        results.finished(run)
    (folder / "run/config.gin").write_text(run.configure())
    assert results.finished(run)
    with pytest.raises(ValueError, match="too deep.*trained again"):
        results.result(run)
    (folder / "run/metrics.csv").write_bytes(b"epoch\n\xff\n")
    assert results.epochs(run) == 1
    (folder / "failure.txt").write_bytes(b"no \xff luck")
    assert results.failure(run) == "no \ufffd luck"


def test_a_process_that_is_killed_has_failed(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(
        workers, "command_of", lambda run, **o: ["sh", "-c", "kill -9 $$"]
    )
    (run, *_) = some_runs()
    failed = workers.train_missing([run], Results(tmp_path, "full"))
    assert failed == {run: "its process was killed by SIGKILL"}
    monkeypatch.setattr(workers, "command_of", lambda run, **o: ["true"])
    failed = workers.train_missing([run], Results(tmp_path, "full"))
    assert failed == {run: "its process ended with status 0"}
    assert (
        workers._signal_name(35) == "signal 35"
    )  # a real-time signal without a name


def test_a_crash_is_told_by_its_last_line(tmp_path, quick, monkeypatch):
    """Lines before it begin as those about errors that bin/train catches."""
    lines = {
        "train: Tracing ...\n 1/50\nTraceback (most recent call last):\n"
        "  File x\nKeyError: 'y'": "KeyError: 'y'",
        "train: Tracing ...\ntrain: density must be\nmore": (
            "train: density must be\nmore"
        ),
    }
    (run, *_) = some_runs()
    for said, reason in lines.items():
        monkeypatch.setattr(
            workers,
            "command_of",
            lambda run, said=said, **o: [
                "sh",
                "-c",
                'printf "%s\\n" "$0"; exit 1',
                said,
            ],
        )
        failed = workers.train_missing([run], Results(tmp_path, "full"))
        assert failed == {run: reason}


def test_claimed_runs_are_left_to_others_and_taken_over(tmp_path, quick):
    runs, told = some_runs([0]), Told()
    results = Results(tmp_path, "full")
    claimed, release = threading.Event(), threading.Event()

    def other():
        with results.claim(runs[0]) as claim:
            assert claim is not None
            claimed.set()
            release.wait()

    process = threading.Thread(target=other, daemon=True)
    process.start()
    claimed.wait()
    with results.claim(runs[0]) as claim:
        assert claim is None
    assert results.claimed(runs[0]) and not results.claimed(runs[1])
    # The run is released once the other process waits.
    told.wait = lambda runs: release.set() or told.events.append("wait")
    assert workers.train_missing(runs, results, progress=told) == {}
    process.join()
    assert told.events[:3] == [
        ("start", runs[1].name),
        ("finish", runs[1].name),
        "wait",
    ]
    finished(results, runs)
    assert not results.claimed(runs[0])


def test_results_of_another_configuration_are_refused(tmp_path, quick):
    results = Results(tmp_path, "full")
    (run, *_) = some_runs()
    workers.train_missing([run], results)
    config = results.folder(run) / "run" / "config.gin"
    config.write_text(config.read_text() + "\ntrain.epochs = 3\n")
    with pytest.raises(ValueError, match="another configuration.*Move the"):
        workers.train_missing([run], results)


def test_the_command_is_that_of_bin_train(tmp_path):
    run = plans.Run("rigl_erk_wrn", plans.Preset("small"), 0.1, 1)
    command = workers.command_of(run, data_dir=tmp_path, parent=7)
    assert command[1:3] == ["-m", "rigl_keras.experiments.runs.train_command"]
    assert command[3].startswith("--gin_file=/")
    assert command[3].endswith("/gin/rigl_erk_wrn.gin")
    assert command[4].endswith("gin/presets/small.gin")
    assert command[5:] == [
        "--seed=1",
        "--run_dir=rigl_erk_wrn-density0.1-seed1/run",
        "--resume",
        "--density=0.1",
        f"--data_dir={tmp_path}",
        "--parent=7",
    ]


@pytest.mark.slow
def test_killed_and_shared(tmp_path):
    """One of three processes is killed with -9; each run is done once."""
    results, runs = Results(tmp_path, "full"), some_runs(range(6))
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE), "work", str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    killed, *others = processes
    assert killed.stdout.readline().startswith("start ")
    time.sleep(random.uniform(0, 0.5))  # at any moment of a run
    killed.kill()
    killed.communicate()
    ends = [process.communicate()[0] for process in others]
    assert [process.returncode for process in others] == [0, 0], ends
    finished(results, runs)
    for said in ends:  # both have trained runs
        assert "finish" in said


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ends_with_who_started_it(kill):
    """With --parent, bin/train ends when its parent is killed."""
    wait = "from rigl_keras.experiments.runs import train_command; import os, "
    wait += "time; train_command._end_with(os.getppid()); "
    wait += "print('up', flush=True); time.sleep(60)"
    starts = f"import subprocess, sys; p = subprocess.Popen([{sys.executable!r}"
    starts += f", '-c', {wait!r}]); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen(
        [sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True
    ) as parent:
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "up\n"
        parent.send_signal(kill)
        try:
            # The child keeps the pipe open as long as it lives.
            parent.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the child goes on")


def test_plan_and_progress(tmp_path, quick, monkeypatch, capfd):
    """The plan, the costs, the progress and the failures are printed."""
    monkeypatch.setattr(costs, "seconds_of_step", lambda network: 0.5)
    runs = some_runs()
    results = Results(tmp_path, "full")
    workers.train_missing(runs[:1], results)
    quick.add("rigl_erk_wrn")
    failed = reproduce.reproduce(runs, results)
    assert set(failed) == {runs[1], runs[3]}
    said, errors = capfd.readouterr()
    table = [line.split() for line in said.splitlines()]
    assert ["static_erk_wrn", "0.1", "0,1", "1", "0.17x", "0.17x"] == next(
        row[:6] for row in table if row and row[0] == "static_erk_wrn"
    )
    # 88,000 steps of half a second.
    assert next(r for r in table if r and r[0] == "rigl_erk_wrn")[-2:] == [
        "24",
        "h",
    ]
    assert "4 runs, 1 finished, 3 left" in said
    head = next(line for line in said.splitlines() if "density" in line)
    assert head.split()[-4:] == ["train", "test", "FLOPs", "time"]
    assert "FLOPs, time: of\n  all seeds that are left" in said
    assert max(map(len, said.splitlines())) <= 80
    assert "seed1 finished after" in said
    assert "rigl_erk_wrn-density0.1-seed0 FAILED: train: there is no" in said
    assert "2 of 4 runs are finished, 2 failed." in said
    assert f"{runs[3].name} failed: train: there is no such thing" in errors
    assert str(results.folder(runs[3]) / "log.txt") in errors
    quick.clear()
    assert reproduce.reproduce(runs, results, dry_run=True) == {}
    assert not results.finished(runs[3])
    assert reproduce.reproduce(runs, results) == {}
    said = capfd.readouterr().out
    assert "4 runs, 2 finished, 2 left" in said
    assert "4 of 4 runs are finished, 0 failed." in said


def test_nonsense(fresh):
    """The command prints the error, and what to do about it."""
    done = fresh(
        *["-m", "rigl_keras.experiments.reproduction.reproduce_command"],
        *["table3", "--preset=small"],
    )
    assert done.returncode == 2
    last = [line for line in done.stderr.splitlines() if line][-1]
    assert last.startswith("reproduce: table3 has no row for the preset")
    with pytest.raises(ValueError, match="numbers, such as.*'a 4'"):
        reproduce_command._changes(["a 4"])
    assert reproduce_command._changes(["train.length = 4"]) == (
        ("train.length", 4),
    )
    for value in ("1e999", "9" * 400, "9" * 5_000, "(" * 5_000, "nan", "[1]"):
        with pytest.raises(ValueError, match="--gin_bindings takes numbers"):
            reproduce_command._changes([f"train.length = {value}"])
    with pytest.raises(ValueError, match="data_dir must be an existing folder"):
        reproduce.check_data(some_runs(), data_dir="/nowhere")
    with pytest.raises(ValueError, match="--densities takes.*0.1,much"):
        exits.numbers("densities", ["0.1", "much"], float)
    with pytest.raises(ValueError, match="cannot be made.*--results_dir"):
        Results("/dev/null/x", "full")


def _work(path):
    workers.command_of = command_of
    workers._POLL = workers._WAIT = 0.05

    class Printed(Told):
        def start(self, run):
            print("start", run.name, flush=True)

        def finish(self, run, *, seconds, failure):
            print("failed" if failure else "finish", run.name, failure)

    print("ready", flush=True)
    sys.stdin.readline()
    with contextlib.suppress(KeyboardInterrupt):
        failed = workers.train_missing(
            some_runs(range(6)), Results(path, "full"), progress=Printed()
        )
        sys.exit(len(failed))


if __name__ == "__main__":
    _work(sys.argv[2])
