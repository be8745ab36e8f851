"""bin/report, of made-up folders: what it reads and counts, and its notes."""

import json
import shutil

import pytest
from support.run_folders import failed, made, one_row

from rigl_keras.experiments.report import (
    page,
    reading,
    records,
    sections,
    summaries,
)


@pytest.fixture
def results(tmp_path):
    return one_row(tmp_path / "results")


def test_duplicates_count_once(results):
    first = results / "full" / "rigl_erk_wrn-density0.1-seed0"
    shutil.copytree(first, results / "full" / "z-copy")
    made(results, "rigl_erk_wrn", 0.1, 1, 0.5, folder="z-other")
    found = reading.read(results)
    summary = summaries.of(found, "rigl_erk_wrn", 0.1)
    assert summary.n == 3
    assert summary.mean == pytest.approx(93.5)
    same, different = found.notes
    assert same == (
        "rigl_erk_wrn-density0.1-seed0 is there 2 times and counts once; the "
        "same result is in z-copy."
    )
    assert different == (
        "rigl_erk_wrn-density0.1-seed1 (93.00 %) is there 2 times and counts "
        "once; not counted: z-other (50.00 %)."
    )


def test_a_finished_duplicate_counts_before_a_failed_one(results):
    failed(results, "set_erk_wrn", 0.1, 0, "killed")
    made(results, "set_erk_wrn", 0.1, 0, 0.91, folder="z")
    found = reading.read(results)
    assert summaries.of(found, "set_erk_wrn", 0.1).n == 1
    assert "z (91.00 %) is there 2 times" in found.notes[0]
    assert "set_erk_wrn-density0.1-seed0 (no result)" in found.notes[0]


def test_runs_of_earlier_versions_are_averaged_with_later_ones(results):
    """Their files lack settings that have come since."""
    early = {
        "grow_init": "zeros",
        "decay_power": 3.0,
        "conventions": (
            "Conventions(first_update='frequency', sampling='exact')"
        ),
    }
    late = {
        **early,
        "grow_divisor": 1.0,
        "final_drop_fraction": 0.0,
        "conventions": early["conventions"].replace(
            ")", ", unit_score='mean_of_magnitudes')"
        ),
    }
    other = {**late, "final_drop_fraction": 0.1}
    odd = {**late, "conventions": late["conventions"].replace("exact", "drawn")}
    text = {**late, "conventions": "those of a paper"}
    for seed, settings in enumerate((early, early, late, other, odd, text)):
        path = made(results, "set_erk_wrn", 0.1, seed, 0.9) / "run"
        result = json.loads((path / "result.json").read_text())
        result["settings"]["method"] |= settings
        (path / "result.json").write_text(json.dumps(result))
    found = reading.read(results)
    assert summaries.of(found, "set_erk_wrn", 0.1).n == 3
    (fraction, sampling, unread) = found.notes
    assert "final_drop_fraction 0.1 where the others have 0.0" in fraction
    assert "conventions.sampling" in sampling and "'drawn'" in sampling
    assert "those of a paper" in unread


def test_other_settings_are_not_averaged(results):
    for seed in (0, 1):
        made(results, "set_erk_wrn", 0.1, seed, 0.9)
    made(results, "set_erk_wrn", 0.1, 2, 0.1, epochs=3)
    made(results, "set_erk_wrn", 0.2, 0, 0.1, updates=(0.5, 100))
    found = reading.read(results)
    summary = summaries.of(found, "set_erk_wrn", 0.1)
    assert summary.accuracies == (90.0, 90.0)
    assert not summaries.of(found, "set_erk_wrn", 0.2).n
    epochs, fraction = found.notes
    assert "set_erk_wrn-density0.1-seed2 is left out" in epochs
    assert "epochs 3 where the others have 250" in epochs
    assert "drop_fraction 0.5 where the others have 0.3" in fraction


BROKEN = {
    "not JSON": "{",
    "a list": "[]",
    "no accuracy": '{"seed": 0}',
    "nan": '{"seed": 0, "test_accuracy": NaN}',
    "text": '{"seed": 0, "test_accuracy": "0.9"}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_results_that_cannot_be_read(results, content):
    path = results / "full" / "rigl_erk_wrn-density0.1-seed0"
    (path / "run/result.json").write_text(content)
    found = reading.read(results)
    summary = summaries.of(found, "rigl_erk_wrn", 0.1)
    assert (summary.n, summary.failed) == (2, 1)
    (broken,) = summary.others
    assert "its result.json cannot be read" in broken.failure
    assert "result.json cannot be read" in str(sections.report(found).page)


@pytest.mark.parametrize(
    "more",
    [
        {"test_accuracy": float("nan")},
        {"test_accuracy": 92.0},
        {"training_flops_ratio": None},
        {"seed": 7},
        {"settings": []},
        {"validation_accuracy": "high"},
        {"inference_flops_ratio": True},
        {"training_flops_ratio": float("inf")},
        {"inference_flops_ratio": 0.0},
        {"steps": None},
    ],
    ids=str,
)
def test_results_that_cannot_be_right(results, more):
    made(results, "set_erk_wrn", 0.1, 0, 0.9, result=more)
    summary = summaries.of(reading.read(results), "set_erk_wrn", 0.1)
    assert (summary.n, summary.failed) == (0, 1)


def test_folders_that_are_no_runs(results):
    for own in ("slurm", "studies"):  # of bin/reproduce and bin/tune
        (results / "full" / own).mkdir()
    (results / "full" / "thesis").mkdir()
    (results / "full" / "notes.txt").write_text("mine")
    (results / "empty").mkdir()
    made(results, "my_row", 0.1, 0, 0.9)
    path = made(results, "set_erk_wrn", 0.1, 0, 0.9)
    (path / "about.json").write_bytes(b"\xff\xfe")
    moved = made(results, "static_erk_wrn", 0.1, 0, 0.9, preset="small")
    shutil.move(moved, results / "full" / "moved")
    shutil.rmtree(results / "small")
    found = reading.read(results)
    assert len(found.finished) == 4
    told = "\n".join(found.notes)
    assert "thesis is left out: it has no about.json" in told
    assert "slurm" not in told and "studies" not in told
    assert "there is no gin file 'my_row'" in told
    assert "set_erk_wrn-density0.1-seed0 is left out: its about.json" in told
    assert (
        "moved is left out: its about.json says that it is of 'small'" in told
    )


def test_densities_that_a_row_cannot_have(results):
    made(results, "dense_wrn", 0.1, 1, 0.9)
    made(results, "set_erk_wrn", None, 0, 0.9)
    made(results, "set_erk_wrn", 1.5, 0, 0.9)
    found = reading.read(results)
    assert len(found.finished) == 4
    assert ["is left out" in note for note in found.notes] == [True] * 3


def test_a_loss_that_is_no_number_is_noted(results):
    made(
        results, "set_erk_wrn", 0.1, 0, 0.1, result={"test_loss": float("nan")}
    )
    found = reading.read(results)
    assert summaries.of(found, "set_erk_wrn", 0.1).mean == 10.0
    assert "has diverged" in found.notes[0]


def test_presets_are_never_mixed(results):
    made(results, "rigl_erk_wrn", 0.1, 0, 0.5, preset="small")
    with pytest.raises(ValueError, match="--preset with one of full, small"):
        reading.read(results)
    full, small = (reading.read(results, name) for name in ("full", "small"))
    assert summaries.of(full, "rigl_erk_wrn", 0.1).n == 3
    assert summaries.of(small, "rigl_erk_wrn", 0.1).mean == 50.0
    with pytest.raises(ValueError, match="holds no run of the preset 'tiny'"):
        reading.read(results, "tiny")


def test_a_broken_line_of_results_jsonl(results, tmp_path):
    text = records.as_lines(reading.read(results))
    path = tmp_path / "results.jsonl"
    path.write_text("rubbish\n[1]\n" + '{"folder": "a/b"}\n\n' + text)
    found = reading.read(path)
    assert len(found.finished) == 4
    assert [note[:6] for note in found.notes] == ["Line 1", "Line 2", "Line 3"]


def test_lines_that_are_wrong_in_one_place(results, tmp_path):
    """A wrong line is no error, and gives no wrong number."""
    text = records.as_lines(reading.read(results)).splitlines()
    good = json.loads(text[-1])
    wrong = (None, "x", -1, 1e400, True, [], {}, [[1]], {"a": None})
    lines = []
    for outer in good:
        for value in wrong:
            lines.append(good | {outer: value})
    for inner in good["result"]:
        for value in wrong:
            result = good["result"] | {inner: value}
            lines.append(good | {"result": result})
    for at, line in enumerate(lines):
        # Each is a separate run, if it still has a density.
        if isinstance(line["density"], float):
            line["density"] = (1 + at) / 1_000
        if isinstance(line["folder"], str):
            line["folder"] = f"full/{at:03}"
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(text + [json.dumps(line) for line in lines]))
    found = reading.read(path, "full")
    accuracies = {run.test for run in found.finished}
    assert accuracies <= {92.0, 93.0, 95.5, 94.0, 100.0}  # not True
    made_report = sections.report(found)
    assert "nan" not in str(made_report.lines)
    page.as_html(made_report.page)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("missing", "There are no results at"),
        ("empty", "holds no run of bin/reproduce"),
        ("results/full", "is the folder of a preset"),
        ("results/full/dense_wrn-seed0/about.json", "holds no run"),
    ],
)
def test_nothing_to_read(results, tmp_path, where, what):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=what):
        reading.read(tmp_path / where)


def test_curves_are_thinned_and_reach_the_end(results):
    path = results / "full/rigl_erk_wrn-density0.1-seed0/run/flops.csv"
    lines = [f"{step},{1e7 + step}" for step in range(5_000)]
    path.write_text("\n".join(["step,inference_flops", *lines]))
    found = reading.read(results)
    run = summaries.of(found, "rigl_erk_wrn", 0.1).finished[0]
    assert len(run.curve) <= 121
    assert run.curve[0] == (0, pytest.approx(0.1))
    assert run.curve[-2][0] == 4_999 and run.curve[-1][0] == 88_000
