"""Searches make the requested number of trials, even after kills.

This file is also a program: a server that imports TensorFlow once, without
running it, and makes each search in a fork, which it may kill. Nothing is
trained: the result of a run is a function of its setting.
"""

import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import traceback

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from support.searches import Trainer, begun, check_finished, settings

from rigl_keras.experiments.tuning import search

FEW, MANY = 4, 8  # kills of one of two processes, at random moments


@pytest.fixture(scope="module")
def server(tmp_path_factory, pytestconfig):
    folder = tmp_path_factory.mktemp("server")
    kills = MANY if pytestconfig.getoption("every_kill") else FEW
    done = subprocess.run(
        [sys.executable, __file__, folder, str(kills)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return folder, json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_killed_at_any_point(server):
    """A search that is killed at a write, or in it, ends the same."""
    folder, report = server
    assert report["points"] > 12
    assert report["killed"] == 2 * (report["points"] + 7)
    _, study, _ = begun(folder / "straight", **AT_POINTS)
    wanted = sorted(settings(study))
    for at in folder.glob("point-*"):
        found, study, results = begun(at, **AT_POINTS)
        check_finished(study, found, results, AT_POINTS["trials"])
        assert sorted(settings(study)) == wanted, at


@pytest.mark.slow
def test_one_of_two_is_killed(server):
    """After kills at random moments, there are 15 trials and all settings."""
    folder, report = server
    assert report["pairs"] >= FEW
    repeated = 0
    for at in folder.glob("pair-*"):
        found, study, results = begun(at, **IN_PAIRS)
        check_finished(study, found, results, 15)
        everything = study._study.get_trials()
        assert {
            tuple(trial.params.values())
            for trial in everything
            if len(trial.params) == 2
        } == set(settings(study))
        repeated += len(everything) - 15
    assert repeated >= report["pairs"] / 4  # killed in a trial


AT_POINTS = {"trials": 2, "seeds": (0,)}
IN_PAIRS = {"trials": 15, "seeds": (0, 1)}


def forked(folder, options, at=None, how="", seconds=0.0):
    """Makes a search in a fork, which kills itself at some point."""
    process = os.fork()
    if process:
        return process
    try:
        count = counter(at, how)
        # Only the first trial is drawn at random, instead of 10.
        optuna.samplers.TPESampler = functools.partial(
            optuna.samplers.TPESampler, n_startup_trials=1
        )
        found, study, results = begun(folder, **options)
        trainer = Trainer(seconds=seconds)

        def train(*rest, **named):
            count(lambda: None)
            return trainer(*rest, **named)

        search._WAIT = 0.02
        search.search(found, study, results, train=train)
        (folder / "points").write_text(str(count(None)))
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def counter(at, how):
    """Counts writes to the journal and runs, and kills itself at one."""
    points = 0

    def count(go_on, half=None):
        nonlocal points
        if go_on is None:
            return points
        points += 1
        if points == at:
            if how == "after":
                go_on()
            elif half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        return go_on()

    append = JournalFileBackend.append_logs

    def counted(self, logs):
        def half():
            self._lock.acquire()
            with open(self._file_path, "ab") as file:
                file.write(json.dumps(logs[0]).encode()[:-3])

        return count(lambda: append(self, logs), half)

    JournalFileBackend.append_logs = counted
    return count


def serve(folder, pairs):
    report = {"killed": 0, "pairs": 0}

    def ended(process):
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    assert ended(forked(folder / "straight", AT_POINTS)) == 0
    report["points"] = int((folder / "straight" / "points").read_text())
    points = range(1, report["points"] + 1)
    # The points at which a process is killed, and one that takes over.
    kills = [[point] for point in points]
    kills += [[report["points"] // 2, point] for point in range(1, 8)]
    for at in kills:
        for how in ("within", "after"):
            place = folder / f"point-{'-'.join(map(str, at))}-{how}"
            for point in at:
                status = ended(forked(place, AT_POINTS, point, how))
                assert status == -signal.SIGKILL, status
            report["killed"] += 1
            assert ended(forked(place, AT_POINTS)) == 0
    draw = random.Random(0)
    for pair in range(pairs):
        place = folder / f"pair-{pair}"
        one, two = (forked(place, IN_PAIRS, seconds=0.02) for _ in range(2))
        # Only once one of them has begun, which takes longer on a busy
        # machine.
        until = time.monotonic() + 60
        while not list(place.rglob("trial-*")) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.8))
        os.kill(one, signal.SIGKILL)
        os.waitpid(one, 0)
        assert ended(two) == 0
        report["pairs"] += 1
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    serve(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
