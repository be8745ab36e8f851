"""Exports and reports that others have changed, and unusual paths."""

import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from keras import layers

import rigl_keras
from rigl_keras.exporting.comparison import difference, write_and_compare
from rigl_keras.exporting.export_report import (
    REPORT,
    check_export,
    foreign_files,
)


@pytest.fixture(scope="module")
def model():
    return rigl_keras.sparsify(
        keras.Sequential([keras.Input((40,)), layers.Dense(40)]), 0.1
    )


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """Returns an export, which tests copy."""
    path = tmp_path_factory.mktemp("exported") / "out"
    report = rigl_keras.export(model, path, measure=False)
    assert check_export(path) == report
    return path


@pytest.fixture
def copied(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


def test_threads_export_one_model(model, tmp_path):
    """Threads take turns: files are whole, and reports of one thread."""

    def export(name):
        return rigl_keras.export(model, tmp_path / name, measure=False)

    with ThreadPoolExecutor(3) as threads:
        reports = list(threads.map(export, "abc"))
    for name, report in zip("abc", reports, strict=True):
        assert check_export(tmp_path / name) == report
        assert report.inference_flops == reports[0].inference_flops


def test_threads_count_one_model(model):
    counted = rigl_keras.count(model)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(rigl_keras.count, [model] * 8):
            assert found.inference_flops == counted.inference_flops


BROKEN = {
    "deep": b"[" * 200_000,
    "deep within": b'{"files": ' + b'{"a":' * 60 + b"1" + b"}" * 61,
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe{}",
    "empty": b"",
    "a list": b"[]",
    "no files": b"{}",
    "files a number": b'{"files": 5}',
    "files a text": b'{"files": "abc"}',
    "digests are none": b'{"files": {"a": 1}}',
    "an integer of 5,000 digits": b'{"files": {}, "bytes": '
    + b"9" * 5000
    + b"}",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_report_that_is_none(model, copied, content):
    """Checking it is an error, and it is not overwritten."""
    (copied / REPORT).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged, or not an"):
        check_export(copied)
    assert foreign_files(copied)
    with pytest.raises(ValueError, match="holds something else"):
        rigl_keras.export(model, copied, overwrite=True, measure=False)
    assert (copied / REPORT).read_bytes() == content


WRONG = (
    True,
    "0.1",
    -1,
    10**400,
    float("nan"),
    float("inf"),
    ["a", "b"],
    {"a": [1]},
    {"x": "y", "z": 10**400},
)
# Fields, and the values of WRONG that are valid for them.
TEXTS = {
    "format": ["0.1"],
    "dense_format": ["0.1"],
    "quantization": ["0.1"],
    "inputs": [["a", "b"]],
    "loading": [["a", "b"]],
    "notes": [["a", "b"]],
}


def test_every_field_of_a_report_may_be_anything(copied):
    """Any wrong value makes a report damaged; missing measurements are fine."""
    good = json.loads((copied / REPORT).read_text())
    for name, value in itertools.product(good, WRONG):
        if name == "path" or value in TEXTS.get(name, ()):
            continue
        (copied / REPORT).write_text(json.dumps({**good, name: value}))
        with pytest.raises(ValueError, match="is damaged"):
            check_export(copied)
            pytest.fail(f"{name} may be {value!r:.40}")
    for name in set(good) - {"path"}:
        fewer = {key: good[key] for key in good if key != name}
        (copied / REPORT).write_text(json.dumps(fewer))
        try:
            check_export(copied)
        except ValueError as error:
            assert "is damaged" in str(error), name
    (copied / REPORT).write_text(json.dumps({**good, "more": 1}))
    with pytest.raises(ValueError, match="is damaged"):
        check_export(copied)
    (copied / REPORT).write_text(json.dumps(good))
    check_export(copied)


def test_what_is_neither_file_nor_folder(model, copied, tmp_path):
    """An object that is neither is named; it is not read or removed."""
    (tmp_path / "precious").mkdir()
    for make in (
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(tmp_path / "precious"),
    ):
        make(copied / "more")
        with pytest.raises(ValueError, match="more is not part of the export"):
            check_export(copied)
        with pytest.raises(ValueError, match="holds something else: more"):
            rigl_keras.export(model, copied, overwrite=True, measure=False)
        (copied / "more").unlink()
    (copied / REPORT).unlink()
    os.mkfifo(copied / REPORT)
    with pytest.raises(ValueError, match="is not an export"):
        check_export(copied)
    assert foreign_files(copied)


def test_a_link_stays_a_link(model, copied, tmp_path):
    """The export is written to the folder that the link names."""
    before = (copied / REPORT).stat().st_ino
    link = tmp_path / "link"
    link.symlink_to(copied)
    with pytest.raises(ValueError, match="link' exists"):
        rigl_keras.export(model, link, measure=False)
    report = rigl_keras.export(model, link, overwrite=True, measure=False)
    assert link.is_symlink() and not copied.is_symlink()
    assert (copied / REPORT).stat().st_ino != before
    assert report.path == str(link)
    assert check_export(link) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_to_nothing_is_refused(model, tmp_path, overwrite):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a link to .*does not exist"):
        rigl_keras.export(model, link, overwrite=overwrite, measure=False)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(ValueError, match="path must be one|is a link to"):
        rigl_keras.export(model, link, overwrite=overwrite, measure=False)
    assert os.listdir(tmp_path) == ["link"]


def test_up_is_where_the_folder_is(model, tmp_path):
    """`..` is relative to the folder, not to the link that led to it."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "s").symlink_to(tmp_path / "a/b")
    path = f"{tmp_path}/s/../out"
    report = rigl_keras.export(model, path, measure=False)
    assert [p.parent for p in tmp_path.rglob(REPORT)] == [tmp_path / "a/out"]
    assert report.path == path and check_export(path) == report


@pytest.mark.parametrize("path", ["a\udcff", "a\0b", "a" * 300, b"a"])
def test_paths_that_cannot_be(model, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="path|cannot be written"):
        rigl_keras.export(model, path, measure=False)
    assert not os.listdir(tmp_path)


def test_patterns_within_the_working_folder(model, tmp_path, monkeypatch):
    """TensorFlow would also look for a folder a1."""
    (tmp_path / "a[1]").mkdir()
    monkeypatch.chdir(tmp_path / "a[1]")
    with pytest.raises(ValueError, match="for a pattern"):
        rigl_keras.export(model, "out", measure=False)


# Python's max of 0.5 and NaN is 0.5, so NaN could agree with anything.


@pytest.mark.parametrize("wrong", ["first", "second"])
def test_a_nan_in_any_output_differs(wrong):
    wanted = {name: np.array([1.0, 2.0]) for name in ("first", "second")}
    got = {name: array.copy() for name, array in wanted.items()}
    assert difference(got, wanted) == 0.0
    got[wrong][0] = np.nan
    assert np.isnan(difference(got, wanted))
    del got[wrong]
    assert difference(got, wanted) == np.inf


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_nan_in_any_batch_is_not_written(wrong):
    batches = [{"x": np.full(2, float(n))} for n in range(2)]
    outputs = [{"y": np.array([1.0, 2.0])} for _ in batches]

    def load():
        def run(arrays):
            number = int(arrays["x"][0])
            return {"y": np.array([1.0, np.nan if number == wrong else 2.0])}

        return run

    with pytest.raises(ValueError, match="differ by nan"):
        write_and_compare(lambda: load, (), batches, outputs, 1e-5)
