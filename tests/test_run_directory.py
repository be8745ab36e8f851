"""A run directory belongs to one process, and survives power failures."""

import errno
import gc
import os
import pathlib

import keras
import pytest
from support.disk import check_kept

from rigl_keras import _files
from rigl_keras.experiments.reproduction import results
from rigl_keras.experiments.reproduction.plans import Preset, Run
from rigl_keras.experiments.runs.run_directory import EarlierRun, RunDirectory


def begun(path, **options):
    return RunDirectory(path, config="x", resume=True, **options)


def names(path):
    return {p.name for p in path.iterdir()}


def test_a_second_process_is_refused(tmp_path):
    """Opening the lock file again acts like another process."""
    path = tmp_path / "run"
    with begun(path) as first:
        for resume in (True, False):  # even if the other run has not begun
            with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
                RunDirectory(path, config="x", resume=resume)
        first.begin()
        with _files.whole(path / "model.keras") as unfinished:
            unfinished.write_text("half")
            with pytest.raises(ValueError, match="is in use by process"):
                begun(path)
            with pytest.raises(ValueError, match="is in use by process"):
                RunDirectory(path, config="another", resume=True)
        assert (path / "model.keras").read_text() == "half"
        # Only the chief writes and locks.
        begun(path, writes=False)
    with begun(path) as second:
        second.begin()


def test_it_is_free_when_nobody_has_it(tmp_path):
    first = begun(tmp_path / "run")
    first.begin()
    del first
    gc.collect()
    with begun(tmp_path / "run"):
        pass
    # A refused run frees the folder, and leaves no files.
    for resume in (False, True):
        with pytest.raises(ValueError, match="another configuration"):
            RunDirectory(tmp_path / "run", config="y", resume=resume)
    with begun(tmp_path / "run"):
        pass
    with begun(tmp_path / "never" / "begun"):
        pass
    assert not (tmp_path / "never").exists()
    (tmp_path / "given").mkdir()
    with begun(tmp_path / "given"):
        pass
    assert names(tmp_path / "given") == set()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        begun(tmp_path / "mine")
    assert names(tmp_path / "mine") == {"thesis.tex"}


def test_what_other_machines_have_left_goes(tmp_path):
    """A run continues on another machine of a cluster, and removes them."""
    with begun(tmp_path) as run:
        run.begin()
    for folder in (tmp_path, tmp_path / "weights"):
        left = folder / f"{_files.UNFINISHED}elsewhere-1"
        left.mkdir(parents=True)
    with begun(tmp_path) as run:
        run.begin()
    assert names(tmp_path) == {".lock", "config.gin", "weights"}
    assert names(tmp_path / "weights") == set()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(descriptor, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with begun(tmp_path) as run:
        run.begin()
    (record,) = [r for r in caplog.records if r.name == "rigl_keras"]
    assert "No locks available" in record.getMessage()
    # For results that machines share, this is an error.
    shared = results.Results(tmp_path / "results", "small")
    run = Run("rigl_erk_wrn", Preset("small"), 0.1, 0)
    with pytest.raises(ValueError, match="claim.*cannot be locked"):
        with shared.claim(run):
            pass


def model():
    made = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2)], name="tiny"
    )
    made.compile("sgd", "mse")
    return made


def test_a_power_cut_loses_nothing_that_is_there(tmp_path, disk):  # noqa: F811
    with begun(tmp_path) as run:
        run.begin()
        checkpoints = run.checkpoints(model())
        for epoch in (0, 1):
            checkpoints.save(epoch)
        # .data is moved first: a checkpoint with an index is complete.
        check_kept(disk, moves=1 + 4)
        moves = [i for i, (what, _) in enumerate(disk) if what == "move"]
        for data, index in (moves[1:3], moves[3:5]):
            folder = disk[data + 1][1]
            assert ("sync", folder) in disk[data:index]
        run.write_metrics([{"epoch": 0, "loss": 1.0}])
        run.save_model(model())
        run.write_result({"a": 1})
    check_kept(disk, moves=8)
    assert list(checkpoints.saved) == [0, 1]
    assert {p.name for p in tmp_path.rglob("*") if "unfin" in p.name} == set()
    disk.clear()
    shared = results.Results(tmp_path / "results", "small")
    with shared.claim(Run("rigl_erk_wrn", Preset("small"), 0.1, 0)):
        pass
    check_kept(disk, moves=1)


@pytest.mark.parametrize("name", ["mkdir", "write_bytes"])
def test_results_on_a_full_disk(tmp_path, monkeypatch, name):
    shared = results.Results(tmp_path, "small")

    def full(path, *args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(pathlib.Path, name, full)
    with pytest.raises(_files.DiskFullError, match="rigl_erk_wrn"):
        with shared.claim(Run("rigl_erk_wrn", Preset("small"), 0.1, 0)):
            pass


def test_a_run_on_a_full_disk(tmp_path, monkeypatch):
    def full(path, *args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(_files, "sign", full)
        with pytest.raises(_files.DiskFullError, match="lock.*--resume"):
            begun(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "mkdir", full)
        with pytest.raises(_files.DiskFullError, match="--resume"):
            begun(tmp_path)
    with begun(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", '{"a": 1', "[]", "[" * 100_000])
def test_a_damaged_result(tmp_path, text):
    with begun(tmp_path) as run:
        run.begin()
        run.write_result({"loss": float("nan"), "density": 0.1})
        assert run.result["density"] == EarlierRun(tmp_path).result["density"]
        (tmp_path / "result.json").write_text(text)
        for damaged in (run, EarlierRun(tmp_path)):
            with pytest.raises(ValueError, match="Remove it, then pass --res"):
                _ = damaged.result


def test_configurations_in_any_language(tmp_path):
    text = "train.dataset = 'Ziffern für Übung'\n"
    with RunDirectory(tmp_path, config=text, resume=False) as run:
        run.begin()
    assert (tmp_path / "config.gin").read_bytes() == text.encode()
    with RunDirectory(tmp_path, config=text, resume=True):
        pass
    for other in (text + "\n", text + text, f"b = 1\n{text}", ""):
        with pytest.raises(ValueError, match="holds another configuration"):
            RunDirectory(tmp_path, config=other, resume=True)
