"""The processes of engines that are measured, their turns and environments."""

import ast
import os
import pathlib
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from support import fake_engine

from rigl_keras.experiments.benchmarks.engines import (
    catalogue,
    environments,
    network_files,
    processes,
    turns,
    worker,
)
from rigl_keras.experiments.benchmarks.engines.environments import (
    Environment,
    UnavailableError,
)
from rigl_keras.experiments.benchmarks.engines.processes import (
    EngineError,
    Process,
)
from rigl_keras.experiments.benchmarks.engines.records import Turn

FAKE = pathlib.Path(fake_engine.__file__)
LIMIT = 60.0


# Processes.


@pytest.fixture
def started(tmp_path):
    """Returns a function that starts a fake engine with a loaded network."""
    matrix, vector = np.eye(3, dtype=np.float32), np.float32([0, 10, 20])
    np.savez(tmp_path / "network.npz", matrix=matrix, vector=vector)
    np.save(tmp_path / "inputs.npy", np.ones((2, 4, 4, 3), np.float32))
    running = []

    def start(kind="right", *, load=True):
        process = Process(
            [sys.executable, str(FAKE), kind],
            environment={"FAKE": "1"},
            log=tmp_path / f"{kind}.log",
        )
        running.append(process)
        if load:
            answer = process.ask(
                "load",
                limit=LIMIT,
                path=str(tmp_path / "network.npz"),
                threads=1,
                batch=2,
            )
            assert answer == {"version": "1.2"}
        return process

    yield start
    for process in running:
        process.close()


def compute(process, tmp_path, limit=LIMIT):
    process.ask(
        "compute",
        limit=limit,
        inputs=str(tmp_path / "inputs.npy"),
        outputs=str(tmp_path / "outputs.npy"),
    )
    return np.load(tmp_path / "outputs.npy")


def test_a_process_computes_and_times(started, tmp_path):
    process = started()
    # Printed lines are not answers.
    assert "this is no answer" in (tmp_path / "right.log").read_text()
    found = compute(process, tmp_path)
    np.testing.assert_allclose(found, [[1, 11, 21]] * 2)
    taken = process.ask("run", limit=LIMIT, seconds=0.01, warm_up=0.0)
    assert len(taken["seconds"]) > 1 and min(taken["seconds"]) > 0
    assert sum(taken["seconds"]) >= 0.01
    # At least one call, however short the turn is.
    taken = process.ask("run", limit=LIMIT, seconds=0.0, warm_up=0.0)
    assert len(taken["seconds"]) == 1


def test_errors_are_answers(started, tmp_path):
    process = started("fails", load=False)
    for _ in range(2):  # it still answers
        with pytest.raises(EngineError, match="^ValueError: cannot read x$"):
            process.ask("load", limit=LIMIT, path="x", threads=1, batch=1)
    with pytest.raises(EngineError, match="or needs another one before"):
        process.ask("run", limit=LIMIT, seconds=0.0, warm_up=0.0)
    assert process.is_alive


def state(process):
    """Returns Linux's letter for the state of a process."""
    path = pathlib.Path(f"/proc/{process._process.pid}/stat")
    return path.read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says it in /proc")
def test_a_process_is_stopped_while_it_is_not_asked(started, tmp_path):
    process = started()
    assert state(process) == "T"
    compute(process, tmp_path)
    assert state(process) == "T"
    process.close()
    assert not process.is_alive


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says it in /proc")
def test_where_memory_runs_out_an_engine_is_ended_first(started):
    process = started("fails", load=False)
    with pytest.raises(EngineError):  # it has written a part of an answer
        process.ask("load", limit=LIMIT, path="x", threads=1, batch=1)
    path = pathlib.Path(f"/proc/{process._process.pid}/oom_score_adj")
    assert path.read_text() == "1000\n"


def test_a_process_that_ends(started, tmp_path):
    process = started("dies")
    compute(process, tmp_path)
    with pytest.raises(EngineError, match="with status 3: out of luck"):
        process.ask("run", limit=LIMIT, seconds=60.0, warm_up=0.0)
    assert not process.is_alive
    with pytest.raises(EngineError, match="its process ended with status 3"):
        process.ask("run", limit=LIMIT, seconds=60.0, warm_up=0.0)
    process = started()
    os.killpg(process._process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="its process ended by .* SIGKILL"):
        compute(process, tmp_path)


def test_a_process_that_takes_too_long_is_ended(started, tmp_path):
    process = started("hangs")
    with pytest.raises(EngineError, match="compute takes more than 0 seconds"):
        compute(process, tmp_path, limit=0.2)
    assert not process.is_alive


PARENT = """
import importlib.util, os, pathlib, sys
spec = importlib.util.spec_from_file_location("processes", sys.argv[1])
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)
process = processes.Process(
    [sys.executable, sys.argv[2], "fails"], environment={},
    log=pathlib.Path(os.devnull),
)
try:
    process.ask("load", limit=60, path="x", threads=1, batch=1)
except processes.EngineError:
    print(process._process.pid, flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux does that")
def test_a_stopped_process_ends_with_its_parent():
    # Both files need only the standard library.
    done = subprocess.run(
        [sys.executable, "-c", PARENT, processes.__file__, str(FAKE)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,  # the pipe closes when the process ends
    )
    with pytest.raises(ProcessLookupError):
        for _ in range(600):
            os.kill(int(done.stdout), 0)
            signal.sigtimedwait([], 0.05)


def test_the_worker_runs_in_old_and_small_environments():
    text = pathlib.Path(worker.__file__).read_text()
    tree = ast.parse(text, feature_version=(3, 8))
    imported = {
        alias.name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= sys.stdlib_module_names


def test_the_catalogue():
    for engine in catalogue.ENGINES.values():
        assert engine.loader in worker.LOADERS
        assert engine.file in network_files.FILES
        assert {*engine.isas} in (set(), {"avx2", "avx512"})
    assert {*catalogue.OURS} < {*catalogue.ENGINES}
    torch = catalogue.ENGINES["pytorch"]
    assert catalogue.variables_of(torch, "avx2", 2) == {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    litert = catalogue.ENGINES["litert"]
    assert catalogue.variables_of(litert, "avx2", 1) == {"OMP_NUM_THREADS": "1"}
    assert "ATEN_CPU_CAPABILITY" not in catalogue.variables_of(torch, None, 2)


# Turns.


class Timed:
    """A fake process with given answers."""

    def __init__(self, name, order, *, fails_at=None):
        self.name, self.order, self.fails_at = name, order, fails_at
        self.stops = 0

    def stop(self):
        self.stops += 1

    def ask(self, do, *, limit, seconds, warm_up):
        assert do == "run" and 0 < warm_up < seconds
        self.order.append(self.name)
        turn = self.order.count(self.name)
        if turn == self.fails_at:
            raise EngineError("no more")
        return {"seconds": [turn, 3.0 * turn, 100.0 * turn]}


def take_turns(**changes):
    order, lost = [], []
    names = changes.pop("names", "abc")
    fails_at = changes.pop("fails_at", {})
    timed = changes.pop("timed", [])
    timed += [Timed(n, order, fails_at=fails_at.get(n)) for n in names]
    found = turns.timed_turns(
        {one.name: one for one in timed},
        **{
            "rounds": 8,
            "at_least": 3,
            "seconds": 60.0,
            "turn": 1.0,
            "lost": lambda name, error: lost.append((name, str(error))),
            **changes,
        },
    )
    return found, order, lost


def test_engines_take_turns_in_random_order():
    timed = []
    found, order, lost = take_turns(timed=timed)
    assert not lost and len(order) == 24
    rounds = ["".join(order[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    # All others were stopped each time, in case something resumed them.
    assert [process.stops for process in timed] == [24, 24, 24]
    assert len({*rounds}) > 2
    assert found["b"][:2] == [Turn(3.0, 1), Turn(6.0, 2)]


def test_turns_end_with_the_time():
    found, _, _ = take_turns(seconds=1e-9)
    assert [len(found[name]) for name in "abc"] == [3, 3, 3]


def test_an_engine_that_fails_loses_its_turns():
    found, order, lost = take_turns(fails_at={"b": 2})
    assert lost == [("b", "no more")]
    assert {*found} == {"a", "c"} and len(found["a"]) == len(found["c"]) == 8
    assert order.count("b") == 2


def test_agreement(started, tmp_path):
    process, inputs = started(), tmp_path / "inputs.npy"
    # The outputs are 1, 11 and 21: they spread by 10.
    wanted = np.float32([[1, 11, 21], [1, 11, 21]])
    found = turns.agreement(process, inputs, wanted, tolerance=1e-4)
    assert found.difference < 1e-6 and found.same_class == 1
    wanted[1] = 21.01, 11, 1
    with pytest.raises(EngineError, match="differ by 2.0e.00 of their spread"):
        turns.agreement(process, inputs, wanted, tolerance=1e-4)
    # In another precision, the difference is only reported.
    found = turns.agreement(process, inputs, wanted, tolerance=None)
    assert found.same_class == 0.5
    assert found.difference == pytest.approx(2, rel=1e-2)
    assert not (tmp_path / "outputs.npy").exists()


@pytest.mark.parametrize("got", [np.full((2, 3), np.nan), np.ones((2, 4))])
def test_nothing_agrees_with_nan_and_other_shapes(got):
    wanted = np.arange(6.0).reshape(2, 3)
    found = turns.Agreement(got.astype(np.float32), wanted)
    assert not found.difference <= 1e9


# Environments.


@pytest.fixture
def commands(monkeypatch):
    """Records commands instead of running them; some can be made to fail."""
    run = types.SimpleNamespace(done=[], failing="")

    def pretend(command, log):
        run.done.append(command)
        if "venv" in command:
            pathlib.Path(command[-1], "bin").mkdir()
        if run.failing and run.failing in command:
            with open(log, "a") as printed:
                printed.write("collecting\nERROR: no wheel\nnotice\n")
            return 1
        return 0

    monkeypatch.setattr(environments, "_run", pretend)
    return run


MISSING = Environment(
    name="some", packages=("some==1", "other<2"), modules=("no_such_module",)
)


def test_an_environment_is_made_once(tmp_path, commands):
    said = []
    python = MISSING.python(tmp_path / "new", say=said.append)
    assert python == str(tmp_path / "new/some/bin/python")
    venv, pip, imports = commands.done
    assert venv == [sys.executable, "-m", "venv", str(tmp_path / "new/some")]
    assert pip[0] == python and pip[-2:] == ["some==1", "other<2"]
    assert imports == [python, "-c", "import no_such_module"]
    assert "Installing some==1, other<2 into" in said[0] and len(said) == 1
    assert MISSING.python(tmp_path / "new", install=False) == python
    assert len(commands.done) == 3
    # Another version of a package needs another environment.
    newer = Environment(
        name="some", packages=("some==2",), modules=("no_such_module",)
    )
    newer.python(tmp_path / "new", say=said.append)
    assert len(commands.done) == 6 and len(said) == 2


def test_what_is_there_already_needs_no_environment(tmp_path, commands):
    numpy = Environment(name="n", packages=("numpy",), modules=("numpy",))
    assert numpy.python(tmp_path) == sys.executable
    assert not commands.done and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "failing, message",
    [
        ("venv", "makes no environment: ERROR: no wheel"),
        ("pip", "pip fails: ERROR: no wheel .*pip.log"),
        ("-c", "its modules fail: ERROR: no wheel"),
    ],
)
def test_an_environment_that_cannot_be_made(
    tmp_path, commands, failing, message
):
    commands.failing = failing
    for _ in range(2):  # each call tries again
        with pytest.raises(UnavailableError, match=message):
            MISSING.python(tmp_path, say=lambda line: None)
    commands.failing = ""
    MISSING.python(tmp_path, say=lambda line: None)


def test_an_environment_that_may_not_be_made(tmp_path, commands):
    with pytest.raises(UnavailableError, match="some==1.*--noinstall is set"):
        MISSING.python(tmp_path, install=False)
    assert not commands.done


def test_an_environment_for_another_python(tmp_path, commands, monkeypatch):
    old = Environment(
        name="old",
        packages=("old==1",),
        modules=("no_such_module",),
        pythons=((3, 8), (3, 9)),
    )
    found = {"python3.8": "/some/python3.8"}
    monkeypatch.setattr(environments.shutil, "which", found.get)
    old.python(tmp_path, say=lambda line: None)
    assert commands.done[1][:3] == ["/some/python3.8", "-m", "venv"]
    found.clear()
    (tmp_path / "old/made_of.json").unlink()
    with pytest.raises(UnavailableError, match="wheels for Python 3.8 to 3.9"):
        old.python(tmp_path)


def test_the_environments_are_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RIGL_KERAS_CACHE", str(tmp_path))
    assert environments.folder_of_environments() == tmp_path / "engines"
    monkeypatch.delenv("RIGL_KERAS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    folder = environments.folder_of_environments()
    assert folder == tmp_path / "x/rigl_keras/engines"
