"""Tests of `bin/benchmark engines`, without its numbers."""

import ast
import csv
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from keras import layers
from support import fake_engine

from rigl_keras.experiments import exits
from rigl_keras.experiments.benchmarks import engine_command
from rigl_keras.experiments.benchmarks.engines import (
    catalogue,
    environments,
    network_files,
    processes,
    records,
    serving,
    turns,
    worker,
)
from rigl_keras.experiments.benchmarks.engines.catalogue import Engine
from rigl_keras.experiments.benchmarks.engines.engine_figure import (
    engine_figure,
)
from rigl_keras.experiments.benchmarks.engines.environments import (
    Environment,
    UnavailableError,
)
from rigl_keras.experiments.benchmarks.engines.processes import (
    EngineError,
    Process,
)
from rigl_keras.experiments.benchmarks.engines.records import (
    Case,
    LeftOut,
    Machine,
    Measurement,
    Records,
    Turn,
    speed_up,
    table,
)

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


# Records.

MACHINE = Machine("Some Processor", "avx2", 2)
CASE = Case("tiny", "uniform", 0.1, 1)


def measurement(engine, *medians, case=CASE, **changes):
    return Measurement(
        **{
            "case": case,
            "machine": MACHINE,
            "date": "2026-01-02T03:04:05+00:00",
            "commit": "abc1234",
            "load": 0.25,
            "engine": engine,
            "version": "1.0",
            "precision": "float32",
            "held": True,
            "difference": 3e-7,
            "same_class": 1.0,
            "turns": tuple(Turn(m, m / 2) for m in medians),
            **changes,
        }
    )


def left_out(engine, *, tried=True, case=CASE):
    return LeftOut(
        case=case, machine=MACHINE, engine=engine, reason="why", tried=tried
    )


def test_what_a_measurement_says():
    m = measurement("litert", 0.004, 0.002, 0.003, 0.008, 0.001)
    assert m.median == 0.003 and m.minimum == 0.0005
    assert m.quartiles == (0.002, 0.004)
    # Twice as fast in rounds 1 and 3, ten times in round 2.
    other = measurement("openvino", 0.002, 0.0001, 0.001)
    slow = measurement("litert", 0.004, 0.001, 0.002)
    assert speed_up(other, slow) == pytest.approx(2)


def test_the_table():
    # Two rounds; one of them was slow for both engines.
    found = [
        measurement("litert", 0.004, 0.040),
        measurement("sparse_saved_model", 0.002, 0.020),
        measurement("openvino_int8", 0.001, 0.001, precision="int8"),
    ]
    lines = table(CASE, found, [left_out("native")]).splitlines()
    assert lines[0] == (
        "tiny, uniform, density 0.1, batch 1: milliseconds of a call"
    )
    assert lines[1].endswith("rigl_keras, SavedModel is")
    assert lines[2].split()[:5] == ["rigl_keras,", "SavedModel", "1.0"] + [
        "11",
        "1",
    ]
    assert lines[3].split() == (
        "LiteRT 1.0 22 2 13 to 31 3e-07 2.00x as fast".split()
    )
    assert lines[4] == "  in another precision:"
    assert lines[5].startswith("  OpenVINO int8")
    assert lines[6] == "  rigl_keras, native is not measured: why."
    assert len(lines) == 7
    # Others are compared with the native format, if it was measured.
    found.append(measurement("native", 0.001, 0.010))
    assert "  rigl_keras, native is" in table(CASE, found)
    busy = table(CASE, [measurement("litert", 0.1, load=1.75)])
    assert busy.splitlines()[-1] == (
        "  Other programs were running (load 1.75): medians are too high, "
        "minima more reliable."
    )


def test_the_table_says_which_engines_take_all_instructions():
    assert "  LiteRT (any instructions) " in table(
        CASE, [measurement("litert", 0.1, held=False)]
    )


def test_records_are_kept_and_gone_on_from(tmp_path):
    kept = Records(tmp_path, MACHINE)
    other = CASE._replace(batch=16)
    kept.put(
        CASE,
        [measurement("litert", 0.25, 0.75), measurement("openvino", 0.5, 0.5)],
        [left_out("native", tried=False), left_out("pytorch")],
    )
    kept.put(other, [measurement("litert", 1.0, case=other)], [])

    again = Records(tmp_path, MACHINE)
    assert again.measurements == kept.measurements
    assert again.left_out == kept.left_out
    assert again.of(other) == [measurement("litert", 1.0, case=other)]
    assert again.has(CASE, ["litert", "openvino"])
    assert again.has(CASE, ["pytorch"])  # tried, and failed
    assert not again.has(CASE, ["native"])  # it may be available now
    assert not again.has(other, ["litert", "openvino"])

    with open(tmp_path / "engines.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["engine"] for row in rows] == ["litert", "openvino", "litert"]
    first = rows[0]
    assert (first["median_ms"], first["minimum_ms"]) == ("500", "125")
    assert first["lower_quartile_ms"] == "375" and first["rounds"] == "2"
    for name, value in {
        "processor": "Some Processor",
        "isa": "avx2",
        "threads": "2",
        "commit": "abc1234",
        "date": "2026-01-02T03:04:05+00:00",
        "version": "1.0",
        "density": "0.1",
    }.items():
        assert first[name] == value

    # Measuring a case again removes its earlier records.
    again.put(CASE, [measurement("litert", 0.1)], [])
    assert [m.engine for m in Records(tmp_path, MACHINE).of(CASE)] == ["litert"]
    assert not again.left_out


def test_records_of_another_machine_are_refused(tmp_path):
    Records(tmp_path, MACHINE).put(CASE, [measurement("litert", 0.1)], [])
    with pytest.raises(ValueError, match="machine, .*avx2, .*Pass another"):
        Records(tmp_path, Machine("Some Processor", "avx512", 2))
    (tmp_path / "engines.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a file of measurements"):
        Records(tmp_path, MACHINE)


def test_the_figure(tmp_path):
    found = [
        measurement(
            engine,
            seconds * batch,
            2 * seconds * batch,
            case=Case("tiny", "uniform", density, batch),
        )
        for engine, seconds in (("native", 0.001), ("litert", 0.01))
        for density in (0.1, 0.2)
        for batch in (1, 128)
    ]
    figure = engine_figure(found)
    assert "Some Processor, avx2, 2 threads" in figure.get_suptitle()
    assert "commit abc1234" in figure.get_suptitle()
    one, many = figure.axes
    assert one.get_title(loc="left") == "tiny, uniform, batch 1"
    names = [label.get_text() for label in one.get_yticklabels()]
    assert names == ["rigl_keras, native", "LiteRT"]
    # Medians of the first engine, at both densities.
    drawn = [round(float(line.get_xdata()[0]), 6) for line in one.lines]
    assert drawn.count(1.5) == drawn.count(15.0) == 2
    assert many.lines[0].get_xdata() == [192.0]  # 128 times as long
    assert many.axison


def test_what_was_not_measured_has_no_panel():
    found = [
        measurement("native", 1.0, 2.0, case=Case(model, "uniform", 0.1, batch))
        for model, batch in (("tiny", 1), ("tiny", 128), ("other", 1))
    ]
    shown = [axes.axison for axes in engine_figure(found).axes]
    assert shown == [True, True, True, False]


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


# All together.


def tiny_network():
    inputs = keras.Input((4, 4, 3), name="image")
    x = layers.Conv2D(8, 1, use_bias=False, name="conv")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


def write_fake(network, writing):
    """Writes a network that is linear in the mean of images."""
    corners = np.concatenate([np.zeros((1, 3)), np.eye(3)])
    images = np.broadcast_to(corners[:, None, None], (4, 4, 4, 3))
    vector, *rows = network.outputs(images.astype(np.float32))
    path = writing.folder / "network.npz"
    np.savez(path, matrix=np.stack(rows) - vector, vector=vector)
    written_files.append(sorted(writing.batches))
    return path


written_files = []


@pytest.fixture
def fakes(monkeypatch):
    """Replaces all engines by fake ones."""
    written_files.clear()
    kinds = ("right", "also_right", "wrong", "nan", "fails", "dies")
    engines = {
        kind: Engine(label=f"The {kind}", loader=kind, file="fake", script=FAKE)
        for kind in kinds
    }
    engines["far"] = Engine(
        label="The far",
        loader="wrong",
        file="fake",
        script=FAKE,
        precision="int8",
    )
    engines["absent"] = Engine(
        label="The absent",
        loader="right",
        file="fake",
        environment=MISSING,
        script=FAKE,
    )
    for module in (catalogue, engine_command, records):
        monkeypatch.setattr(module, "ENGINES", engines)
    monkeypatch.setitem(network_files.MODELS, "tiny", tiny_network)
    monkeypatch.setitem(network_files._WRITERS, "fake", write_fake)
    monkeypatch.setattr(serving, "TURN", 0.001)
    return engines


def measured(tmp_path, engines, **changes):
    said = []
    found = engine_command.measure_engines(
        **{
            "models": ["tiny"],
            "densities": [0.5],
            "batches": [1, 3],
            "engines": engines,
            "rounds": 2,
            "seconds": 5.0,
            "install": False,
            "folder": tmp_path,
            "say": said.append,
            **changes,
        }
    )
    return found, said


def test_all_engines_are_measured_or_left_out_with_a_reason(fakes, tmp_path):
    found, said = measured(tmp_path, [*fakes])
    assert written_files == [[1, 3]]  # once for all batch sizes
    for batch in (1, 3):
        case = Case("tiny", "erdos_renyi_kernel", 0.5, batch)
        there = {m.engine: m for m in found.of(case)}
        assert {*there} == {"right", "also_right", "far"}
        for m in there.values():
            assert len(m.turns) == 2 and m.minimum > 0 and m.version == "1.2"
            assert (m.difference <= 1e-4) == (m.engine != "far")
        why = {x.engine: x.reason for x in found.left_out_of(case)}
        assert {*why} == {"wrong", "nan", "fails", "dies", "absent"}
        assert "disagrees with the Keras model" in why["wrong"]
        assert "outputs differ by nan" in why["nan"]
        assert why["fails"].startswith("ValueError: cannot read")
        assert "ended with status 3: out of luck" in why["dies"]
        assert "--noinstall is set" in why["absent"]
    assert said[0].startswith("The absent is not measured: some==1")
    assert len(said) == 3 and "The wrong is not measured: it" in said[1]
    assert found.measurements == Records(tmp_path, found._machine).measurements


def test_a_command_goes_on_from_an_earlier_one(fakes, tmp_path, monkeypatch):
    stopped = []

    def interrupted(*arguments, **details):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)
        return serving.measured_case(*arguments, **details)

    monkeypatch.setattr(engine_command, "measured_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, ["right"])
    content = json.loads((tmp_path / "engines.json").read_text())
    (first,) = content["measurements"]
    assert first["case"]["batch"] == 1

    monkeypatch.setattr(engine_command, "measured_case", serving.measured_case)
    found, said = measured(tmp_path, ["right"])
    assert [line.split(",")[3][:8] for line in said] == [" batch 1", " batch 3"]
    assert [m.case.batch for m in found.measurements] == [1, 3]
    assert json.loads(json.dumps(first["turns"])) == [
        list(turn) for turn in found.measurements[0].turns
    ]
    # Existing results are shown, and no network is made.
    monkeypatch.setattr(engine_command, "network_of", None)
    assert measured(tmp_path, ["right"])[1] == said


def test_what_is_there_is_measured_again(fakes, tmp_path):
    changes = {"batches": [1]}
    first, _ = measured(tmp_path, ["right"], **changes)
    again, said = measured(tmp_path, ["right"], again=True, **changes)
    assert len(said) == 1 and len(again.measurements) == 1
    assert again.measurements[0].turns != first.measurements[0].turns
    # A further engine is measured together with all others.
    more, said = measured(tmp_path, ["right", "also_right"], **changes)
    assert len(said) == 1
    assert [m.engine for m in more.measurements] == ["right", "also_right"]
    assert more.measurements[0].turns != again.measurements[0].turns


def test_a_network_that_cannot_be_written(fakes, tmp_path, monkeypatch):
    def fail(network, writing):
        raise ValueError("no format for it\nat all")

    monkeypatch.setitem(network_files._WRITERS, "fake", fail)
    found, _ = measured(None, ["right", "also_right"], batches=[1])
    assert not found.measurements
    assert [x.reason for x in found.left_out] == ["no format for it"] * 2


def test_an_engine_that_leaves_no_memory(fakes, monkeypatch):
    left = iter([9e9, 1e9, 9e9])
    monkeypatch.setattr(serving, "_memory_left", lambda: next(left))
    engines = ["right", "also_right", "far"]
    found, _ = measured(None, engines, batches=[1])
    assert [m.engine for m in found.measurements] == ["right", "far"]
    assert "leave 1.0 GB of memory" in found.left_out[0].reason


def test_no_process_stays(fakes, monkeypatch):
    started = []
    start = processes.Process.__init__

    def watched(self, *arguments, **details):
        start(self, *arguments, **details)
        started.append(self)

    monkeypatch.setattr(processes.Process, "__init__", watched)
    measured(None, ["right", "fails", "dies"])
    assert len(started) == 5  # two of them again, for the second batch
    assert not any(process.is_alive for process in started)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"models": ["none"]}, "models must be one of"),
        ({"engines": ["none"]}, "engines must be one of"),
        ({"engines": []}, "engines must have at least one item, and each once"),
        ({"densities": [0.0]}, "densities must be fractions"),
        ({"distributions": ["none"]}, "distributions must be one of"),
        ({"batches": [0]}, "batches must be an int of at least 1"),
        ({"rounds": 0}, "rounds must be an int of at least 1"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"isa": "mmx"}, "isa must be one of"),
    ],
)
def test_refuses(fakes, changes, message):
    with pytest.raises(ValueError, match=message):
        measured(None, changes.pop("engines", ["right"]), **changes)


def test_the_command(fakes, tmp_path, capsys):
    values = {
        "models": ["tiny"],
        "densities": ["0.5"],
        "batches": ["1"],
        "engines": ["right"],
        "distributions": ["uniform"],
        "rounds": 1,
        "seconds": 1.0,
        "isa": None,
        "again": False,
        "install": False,
    }

    def command(output, argv=("",), **changes):
        given = {
            name: types.SimpleNamespace(value=value)
            for name, value in {**values, **changes}.items()
        }
        output = types.SimpleNamespace(value=str(output))
        run = functools.partial(engine_command.run, given, output)
        exits.one_line("benchmark engines", run)(argv)

    command(tmp_path / "new")
    said = capsys.readouterr().out
    assert "tiny, uniform, density 0.5, batch 1: milliseconds" in said
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"engines.csv", "engines.json", "engines.png"}
    for changes, message in (
        ({"densities": ["x"]}, "--densities takes numbers"),
        ({"argv": ["", "here"]}, "There is nothing to name but flags"),
    ):
        with pytest.raises(SystemExit):
            command(tmp_path, **changes)
        assert message in capsys.readouterr().err
