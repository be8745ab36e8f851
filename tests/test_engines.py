"""`bin/benchmark engines`, without its numbers: records, tables and errors."""

import csv
import functools
import json
import pathlib
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
    network_files,
    processes,
    records,
    serving,
)
from rigl_keras.experiments.benchmarks.engines.catalogue import Engine
from rigl_keras.experiments.benchmarks.engines.engine_figure import (
    engine_figure,
)
from rigl_keras.experiments.benchmarks.engines.environments import Environment
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


# All together.

MISSING = Environment(
    name="some", packages=("some==1", "other<2"), modules=("no_such_module",)
)


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
