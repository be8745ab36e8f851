"""bin/report, of made-up folders: what it averages, compares and writes."""

import html.parser
import json
import re
import subprocess
import sys

import pytest
from support.run_folders import failed, lines_of, made, one_row, searched

import rigl_keras
from rigl_keras.experiments import report_command
from rigl_keras.experiments.protocol import rows
from rigl_keras.experiments.report import (
    contents,
    page,
    panels,
    reading,
    sections,
    summaries,
)


@pytest.fixture
def results(tmp_path):
    return one_row(tmp_path / "results")


def test_mean_deviation_and_difference(results):
    """92.0, 93.0 and 95.5: mean 93.5, deviations -1.5, -0.5 and 2.

    The sample variance is (2.25 + 0.25 + 4) / 2 = 3.25; published is 92.4.
    """
    made_report = sections.report(reading.read(results), ["table2"])
    (line,) = lines_of(made_report, row="RigL (ERK)", density="0.1")
    assert float(line["accuracy_mean"]) == pytest.approx(93.5)
    assert float(line["accuracy_std"]) == pytest.approx(3.25**0.5)
    assert float(line["difference"]) == pytest.approx(93.5 - 92.4)
    assert (line["seeds"], line["n"], line["wanted"]) == ("0 1 2", "3", "3")
    assert line["published_accuracy"] == "92.4"
    assert line["training_flops_ratio"] == "0.17"
    text = page.as_markdown(made_report.page)
    assert (
        "| RigL (ERK) | 93.50 ± 1.80 | 3 of 3 | 0.17x | 0.16x | 92.4 ± 0.06 "
        "| 0.17x, 0.17x | +1.10 | -3.37 to +5.57 |" in text
    )
    # One seed has no deviation, and a row without runs has no numbers.
    assert "| Dense Baseline | 94.00 | 1 of 3 | 1.00x | 1.00x |" in text
    assert "| SET (ERK) | - | - | - | - | 92.2 ± 0.04 |" in text
    assert "92.6 ± 0.10 [" in text and "Table 5 prints 92.9" in text


def test_tickets_are_charged_for_pruning(results):
    made(results, "lottery_wrn", 0.1, 0, 0.9, flops=(0.13, 0.13))
    found = sections.report(reading.read(results), ["table2"])
    (line,) = lines_of(found, row="Lottery", density="0.1")
    assert float(line["training_flops_ratio"]) == pytest.approx(0.43)


def test_missing_failed_and_unfinished_runs(results):
    failed(results, "set_erk_wrn", 0.1, 0, "loss is nan\n<b>a | b</b>")
    failed(results, "static_uniform_wrn", 0.1, 0, None)
    failed(results, "rigl_erk_wrn", 0.2, 0, "out of memory")
    made(results, "rigl_erk_wrn", 0.2, 1, 0.93)
    found = reading.read(results)
    made_report = sections.report(found)
    text = page.as_markdown(made_report.page)
    assert "| SET (ERK) | failed | 0 of 3, 1 failed | - | - |" in text
    assert "| Static | unfinished | 0 of 3 | - | - |" in text
    assert "| RigL (ERK) | 93.00 | 1 of 3, 1 failed |" in text
    assert "- rigl\\_erk\\_wrn-density0.2-seed0: out of memory" in text
    assert "a | b\\</b>" in text and "<b>" not in page.as_html(made_report.page)
    assert "unfinished, after 0 epochs" in text


def test_longer_runs_are_rows_of_their_own(results):
    longer = (("train.length", 4),)
    for row in ("rigl_erk_wrn", "set_erk_wrn"):
        made(results, row, 0.1, 0, 0.97, changes=longer, epochs=1000)
    found = reading.read(results)
    assert found.notes == ()
    assert summaries.of(found, "rigl_erk_wrn", 0.1).n == 3
    made_report = sections.report(found)
    (line,) = lines_of(made_report, table="methods", row="RigL (ERK) 4x")
    assert (line["n"], line["changes"]) == ("1", "train.length=4")
    assert panels.panels(found, "wrn")["4 times as long"] == [
        ("set_erk_wrn", longer),
        ("rigl_erk_wrn", longer),
    ]


def test_rows_that_were_added(results, monkeypatch):
    """A user's gin file is shown, although it is in no table."""
    made(results, "my_row", 0.1, 0, 0.9)
    names = [*rows.known(), "my_row"]
    monkeypatch.setattr(rows, "known", lambda: names)
    made_report = sections.report(reading.read(results))
    assert [line["n"] for line in lines_of(made_report, gin="my_row")] == ["1"]
    text = page.as_markdown(made_report.page)
    assert "| my\\_row | 0.1 | - | 90.00 | 1 of 3 |" in text


def test_another_preset_is_not_compared_with_the_report(tmp_path):
    made(tmp_path, "rigl_erk_wrn", 0.1, 0, 0.5, preset="small")
    found = reading.read(tmp_path)
    text = page.as_markdown(sections.report(found).page)
    assert "92.4" not in text and "difference" not in text
    made_report = sections.report(found, with_published=True)
    text = page.as_markdown(made_report.page)
    assert "report, its own setting: accuracy (%)" in text
    assert "92.4 ± 0.06" in text and "| difference" not in text
    (line,) = lines_of(made_report, table="table2", row="RigL (ERK)")
    assert (line["published_accuracy"], line["difference"]) == ("92.4", "")


def test_what_is_shown(results):
    text = sections.report(reading.read(results)).page.text
    told = "Without a finished run: table1, table3, table4, table5"
    assert told in text[-1]
    shown = sections.report(reading.read(results), ["figure2", "table3"])
    assert [s.anchor for s in shown.page.sections] == ["table3", "figure2"]
    markdown = page.as_markdown(shown.page)
    assert "| RigL 3x | - | - |" in markdown
    assert "bin/reproduce figure2 --preset=full trains them" in markdown
    with pytest.raises(ValueError, match="is one of methods, differences"):
        sections.report(reading.read(results), ["table6"])


def test_the_optimum_is_chosen_by_validation_of_all_seeds(results):
    searched(results)
    found = reading.read(results)
    trials = summaries.trials(found, "rigl_erk_wrn", 0.1)
    assert len(trials) == 3
    best = summaries.best(trials)
    assert (best.drop_fraction, best.frequency) == (0.4, 200)
    made_report = sections.report(found, ["table4"])
    text = page.as_markdown(made_report.page)
    assert (
        "| optimum of 2 | 0.4, 200 | 96.00 | 90.00 ± 0.00 | 3 of 3 | "
        "0.416, 200 | 92.4 ± 0.23 | -2.40 |" in text
    )
    assert "| reference | 0.3, 100 | 93.50 | 93.50 ± 1.80 | 3 of 3 |" in text
    assert summaries.best([]) is None


def test_a_change_to_the_own_value_is_known(results):
    """A trial that changes only one value has the row's other value."""
    changes = (("UPDATE_FRACTION", 0.5),)
    failed_path = made(results, "rigl_erk_wrn", 0.1, 0, 0.9, changes=changes)
    (failed_path / "run/result.json").unlink()
    (trial,) = summaries.trials(reading.read(results), "rigl_erk_wrn", 0.1)
    assert (trial.drop_fraction, trial.frequency) == (0.5, 100)


def test_results_jsonl_makes_the_same_page(results, tmp_path):
    searched(results)
    failed(results, "set_erk_wrn", 0.1, 0, "out of memory")
    (results / "full" / "thesis").mkdir()
    made(results, "rigl_erk_wrn", 0.1, 1, 0.5, folder="z-other")
    first, second = tmp_path / "first", tmp_path / "second"
    report_command.write(sections.report(reading.read(results)), first)
    again = reading.read(first / "results.jsonl", "full")
    report_command.write(sections.report(again), second)
    names = sorted(p.relative_to(first) for p in first.rglob("*"))
    assert names == sorted(p.relative_to(second) for p in second.rglob("*"))
    for name in names:
        if (first / name).is_file():
            assert (first / name).read_bytes() == (second / name).read_bytes()
    assert not [name for name in names if name.name.startswith(".")]


class Checked(html.parser.HTMLParser):
    """Finds unclosed tags, and the references of a page."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.refers, self.images = [], [], [], []
        self.ids = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        attributes = dict(attributes)
        for name in ("src", "href"):
            if name in attributes:
                self.refers.append(attributes[name])
        if tag == "img":
            self.images.append(attributes["alt"])
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture
def varied(results):
    """Adds runs for every table and figure."""
    searched(results)
    for row in ("rigl_uniform_wrn", "rigl_sg_uniform_wrn", "set_erk_wrn"):
        made(results, row, 0.1, 0, 0.9)
    made(results, "rigl_erk_wrn", 0.057, 0, 0.9, flops=(0.1701, 0.1))
    made(results, "rigl_uniform_2x_wrn", 0.1, 0, 0.91)
    made(results, "rigl_uniform_resnet50", 0.1, 0, 0.7)
    made(results, "rigl_kernel_erk_wrn", 0.1, 0, 0.89)
    made(results, "dense_50k_wrn", None, 0, 0.95)
    made(
        results,
        "rigl_erk_wrn",
        0.1,
        0,
        0.9,
        changes=(("sgd.learning_rate", 0.01),),
        rate=0.01,
    )
    return results


def test_html_stands_alone(varied, tmp_path):
    made_report = sections.report(reading.read(varied))
    files = report_command.write(made_report, tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text()
    checked = Checked(text)
    assert not checked.open and not checked.wrong
    outside = [
        to
        for to in checked.refers
        if not to.startswith(("#", "data:image/png;base64,"))
    ]
    assert not outside
    inside = [to[1:] for to in checked.refers if to.startswith("#")]
    assert inside == checked.ids
    assert not re.search(r"https?://|url\(|@import", text)
    assert all(len(alt) > 20 for alt in checked.images)
    pictures = [path for path in files if path.suffix == ".png"]
    assert {path.stem for path in pictures} == set(contents.PICTURES)
    assert len(checked.images) == len(pictures)
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_markdown_names_its_figures(varied, tmp_path):
    report_command.write(
        sections.report(reading.read(varied)), tmp_path / "out"
    )
    text = (tmp_path / "out/report.md").read_text()
    named = re.findall(r"\]\((figures/\w+\.png)\)", text)
    assert len(named) == len(contents.PICTURES)
    assert all((tmp_path / "out" / name).is_file() for name in named)
    # All lines of a table have as many cells as its head.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", s)) for s in table.splitlines()}
        assert len(cells) == 1


def test_other_files_stay_and_old_figures_go(varied, results, tmp_path):
    output = tmp_path / "out"
    report_command.write(sections.report(reading.read(varied)), output)
    (output / "mine.txt").write_text("kept")
    (output / "figures/mine.png").write_bytes(b"kept")
    report_command.write(
        sections.report(reading.read(varied), ["table1"]), output
    )
    assert {path.name for path in output.rglob("*.*")} == {
        "mine.txt",
        "mine.png",
        "results.jsonl",
        "report.csv",
        "report.html",
        "report.md",
    }


def test_output_that_cannot_be_written(results, tmp_path):
    made_report = sections.report(reading.read(results), ["table1"])
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written to"):
            report_command.write(made_report, output)


def test_planned_flops_are_marked(tmp_path):
    made(tmp_path, "rigl_erk_wrn", 0.1, 0, 0.5, preset="small")
    planned = report_command.planned_flops("small")
    made_report = sections.report(
        reading.read(tmp_path), ["table2"], planned=planned
    )
    text = page.as_markdown(made_report.page)
    line = next(s for s in text.splitlines() if s.startswith("| Static |"))
    assert "| - | - | (0.13x) | (0.13x) |" in line
    assert "They are not results" in text
    # A longer run is planned with its length.
    longer = (("train.length", 4),)
    made(tmp_path, "set_erk_wrn", 0.1, 0, 0.5, preset="small")
    made(tmp_path, "set_erk_wrn", 0.2, 0, 0.5, preset="small", changes=longer)
    methods = sections.report(
        reading.read(tmp_path), ["methods"], planned=planned
    )
    assert "| SET (ERK) 4x | (0.63x), (0.16x) | 0.17x, 0.16x |" in (
        page.as_markdown(methods.page)
    )
    (cell,) = lines_of(made_report, row="Static", density="0.1")
    assert cell["training_flops_ratio"] == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:RigL plans 0 updates")
def test_flops_are_those_that_the_library_counts(tmp_path):
    """The result of a run, report.csv and `count` agree."""
    import keras

    from rigl_keras.experiments.runs import train_command

    path = tmp_path / "tiny" / "one"
    keras.config.disable_interactive_logging()
    train_command.run(
        ["gin/quickstart.gin"],
        bindings=[
            "train.model = @mlp",
            "train.epochs = 1",
            "train.diagnostics = False",
        ],
        run_dir=path / "run",
        seed=0,
        density=0.2,
    )
    about = {"row": "rigl_erk_wrn", "preset": "tiny", "density": 0.2}
    (path / "about.json").write_text(
        json.dumps(about | {"seed": 0, "changes": {}})
    )
    result = json.loads((path / "run/result.json").read_text())
    cost = rigl_keras.count(keras.models.load_model(path / "run/model.keras"))
    ratio = cost.inference_flops / cost.dense_inference_flops
    assert result["inference_flops_ratio"] == ratio
    found = sections.report(reading.read(tmp_path))
    (line,) = lines_of(found, table="table2", gin="rigl_erk_wrn")
    assert float(line["inference_flops_ratio"]) == ratio
    assert float(line["training_flops_ratio"]) == result["training_flops_ratio"]


def test_the_command_says_what_is_wrong(results, tmp_path):
    """The command ends with status 2, without a traceback."""
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "rigl_keras.experiments.report_command"]
    command += [f"--results_dir={results}", f"--output={tmp_path / 'file'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = [s for s in done.stderr.splitlines() if s.startswith("report: ")]
    assert len(said) == 1 and "is no folder. Pass --output" in said[0]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == ""
