"""bin/report on damaged folders always makes a page, with a note.

A made-up folder of valid runs is damaged in one place at a time, in every
place, and read again. Only tests about figures draw figures.
"""

import csv
import html.parser
import io
import json
import os
import shutil

import pytest
from support.run_folders import failed, lines_of, made, searched

from rigl_keras import _figure_style
from rigl_keras.experiments import report_command
from rigl_keras.experiments.report import (
    contents,
    method_figures,
    page,
    panels,
    reading,
    redistribution_figures,
    sections,
    summaries,
)


@pytest.fixture
def undrawn(monkeypatch):
    """Draws no figures, as each takes seconds."""
    monkeypatch.setattr(contents, "picture_of", lambda *args, **options: None)


@pytest.fixture
def results(tmp_path):
    """Returns RigL (ERK) at 0.1 with three seeds, SET with one, and dense."""
    folder = tmp_path / "results"
    for seed, accuracy in enumerate((0.92, 0.93, 0.925)):
        made(folder, "rigl_erk_wrn", 0.1, seed, accuracy)
    made(folder, "set_erk_wrn", 0.1, 0, 0.9)
    made(folder, "dense_wrn", None, 0, 0.94, flops=(1.0, 1.0))
    return folder


def written(found, output, names=()):
    """Writes a report, and returns its Markdown and the lines of its table."""
    made_report = sections.report(found, names)
    report_command.write(made_report, output)
    (output / "report.html").read_text(encoding="utf-8")
    text = (output / "report.md").read_text(encoding="utf-8")
    table = (output / "report.csv").read_text(encoding="utf-8")
    again = reading.read(output / "results.jsonl", found.preset)
    # Runs that are left out of the page are left out of the file too.
    assert again.finished == found.finished
    return text, list(csv.DictReader(io.StringIO(table)))


# Every field of every file, one at a time.

HUGE = int("9" * 400)
HOSTILE = [
    None,
    True,
    "",
    "0.1",
    "a" * 5_000,
    "\ud800[x](http://evil)|<b>\x1b[31m\n# y",
    "=HYPERLINK(1)",
    "$\\frac$",
    0,
    -1,
    1.5,
    1e308,
    -1e308,
    5e-324,
    HUGE,
    -HUGE,
    float("nan"),
    float("inf"),
    [],
    {},
    [[1, 2], "x"],
    {"a": [None]},
    {"$x$": HUGE},
]


def places(content, path=()):
    """Yields the path of each value in a JSON object, and each key."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield (*path, key)
            yield from places(value, (*path, key))
    elif isinstance(content, list):
        for at, value in enumerate(content):
            yield (*path, at)
            yield from places(value, (*path, at))


def at(content, path):
    for key in path:
        content = content[key]
    return content


GONE = object()


def damage(file, path, value):
    """Replaces one value of a JSON file, or removes it."""
    content = json.loads(file.read_text())
    outer = at(content, path[:-1])
    if value is GONE:
        del outer[path[-1]]
    else:
        outer[path[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("value", [*HOSTILE, GONE], ids=lambda v: repr(v)[:20])
def test_every_value_of_a_run_may_be_anything(
    results, tmp_path, value, undrawn
):
    """A run counts as before, or is left out and named."""
    changes = (("UPDATE_FRACTION", 0.3), ("train.length", 2))
    whole = reading.read(results).finished
    first = made(results, "rigl_erk_wrn", 0.1, 1, 0.93, changes=changes)
    hurt = {}
    for file in ("about.json", "run/result.json"):
        for number, path in enumerate(
            places(json.loads((first / file).read_text()))
        ):
            # Each change is a separate run, so that one report shows all.
            density = 0.2 + number / 1_000 + len(file) / 100_000
            new = made(
                results, "rigl_erk_wrn", density, 1, 0.93, changes=changes
            )
            damage(new / file, path, value)
            hurt[new.name] = (file, *path)
    shutil.rmtree(first)
    found = reading.read(results)
    assert [run for run in found.finished if run.name not in hurt] == list(
        whole
    )
    text, lines = written(found, tmp_path / "out")
    told = "\n".join(found.notes)
    told += "\n".join(f"{r.name}: {r.failure}" for r in found.runs if r.failure)
    counted = {run.name: run for run in found.finished if run.name in hurt}
    for name, path in hurt.items():
        if name in counted:
            assert 0 <= counted[name].test <= 100, path
        else:
            assert name in told, path
    for line in lines:
        numbers = [line["accuracy_mean"], line["training_flops_ratio"]]
        assert all(0 <= float(n) <= 1e6 for n in numbers if n), line
    assert "Left out" in text or "Failed runs" in text


CONTENTS = {
    "none": None,
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00",
    "binary": bytes(range(256)) * 20,
    "deep": b"[" * 100_000,
    "a long integer": b'{"seed": ' + b"9" * 5_000 + b"}",
    "a folder": "folder",
    "a pipe": "pipe",
    "a link to itself": "link",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_every_file_of_a_run_may_be_anything(
    results, tmp_path, content, undrawn
):
    """A run among others, and a single one."""
    names = (
        "about.json",
        "run/result.json",
        "run/config.gin",
        "run/flops.csv",
        "run/metrics.csv",
        "failure.txt",
    )
    for number, name in enumerate(names):
        folder = made(results, "snfs_erk_wrn", 0.1, number, 0.9)
        if name in names[-2:]:
            (folder / "run/result.json").unlink()
        (folder / name).unlink(missing_ok=True)
        if content == "folder":
            (folder / name).mkdir()
        elif content == "pipe":
            os.mkfifo(folder / name)
        elif content == "link":
            (folder / name).symlink_to(folder / name)
        elif content is not None:
            (folder / name).write_bytes(content)
    found = reading.read(results)
    seeds = [run.seed for run in found.finished if run.row == "snfs_erk_wrn"]
    assert seeds == [2, 3]  # one lacks a rate, the other a curve
    assert "snfs_erk_wrn-density0.1-seed0 is left out" in str(found.notes)
    assert "snfs_erk_wrn-density0.1-seed3 has no flops.csv" in str(found.notes)
    text, _ = written(found, tmp_path / "out")
    assert "Failed runs" in text or content is None
    assert "Unfinished runs" in text
    for folder in (results / "full").iterdir():
        if not folder.name.startswith("snfs_erk_wrn-density0.1-seed"):
            shutil.rmtree(folder)
    text, _ = written(reading.read(results), tmp_path / "alone")
    assert "2 runs are finished" in text


def test_no_curve_can_be_drawn(results, tmp_path):
    """Figure 4 says so instead of drawing lines, and has its bars."""
    curves = ("", "step,inference_flops\n", "step,inference_flops\n0,inf\n")
    moved = made(results, "rigl_sg_uniform_wrn", 0.1, 0, 0.9)
    (moved / "run/flops.csv").write_text("")
    for seed, curve in enumerate(curves):
        folder = results / "full" / f"rigl_erk_wrn-density0.1-seed{seed}"
        (folder / "run/flops.csv").write_text(curve)
    for bad in ("x,1", f"0,{'9' * 400}", "-1,1", "5,1\n3,1", "nan,1", "0"):
        lines = f"step,inference_flops\n{bad}\n"
        (folder / "run/flops.csv").write_text(lines)
        assert not reading.read(results).runs[3].curve, bad
    found = reading.read(results)
    told = "seed1, rigl_erk_wrn-density0.1-seed2 and rigl_sg_uniform_wrn-"
    assert told + "density0.1-seed0 have no flops.csv" in str(found.notes)
    figure = redistribution_figures.redistribution(found)
    left = figure.axes[0]
    assert [text.get_text() for text in left.texts] == [
        "no flops.csv can be read"
    ]
    assert _figure_style.as_png(figure).startswith(b"\x89PNG")


def test_a_figure_that_cannot_be_drawn(results, tmp_path, monkeypatch):
    """The page has the rest, and says so."""

    def fails(*args, **options):
        raise OverflowError("int too large\nto convert")

    monkeypatch.setattr(panels, "across_densities", fails)
    made_report = sections.report(reading.read(results), ["figure1", "table2"])
    text = page.as_markdown(made_report.page)
    assert "The figure cannot be drawn: int too large." in text
    assert "its figure cannot be drawn (int too large)." in made_report.notes[0]
    assert "| RigL (ERK) | 92.50 ± 0.50 |" in text
    with pytest.raises(ValueError, match="too many panels"):
        _figure_style.new_figure(500, 3)
    with pytest.raises(ValueError, match="too many panels"):
        _figure_style.new_figure(300, 300)


def test_only_rows_of_no_network(tmp_path):
    made(tmp_path, "quickstart", 0.1, 0, 0.9)
    text, lines = written(reading.read(tmp_path), tmp_path / "out")
    assert [line["gin"] for line in lines] == ["quickstart"]
    assert "| quickstart | 0.1 | - | 90.00 | 1 of 3 |" in text


def test_names_that_are_not_utf_8(results, tmp_path, capsys, undrawn):
    """Names of runs and presets are escaped, also in the terminal."""
    whole = results / "full" / "set_erk_wrn-density0.1-seed0"
    for name in (b"z\xff", b"z\x1b[31m\n# new"):
        os.rename(
            shutil.copytree(whole, results / "copy"),
            os.fsencode(results / "full") + b"/" + name,
        )
    (results / "full" / "thesis\udcfe").mkdir()
    (results / "\udcff").mkdir()
    shutil.copytree(whole, results / "\udcff" / "run")
    found = reading.read(results, "full")
    text, _ = written(found, tmp_path / "out")
    assert "the same result is in z\\\\udcff, z\\\\x1b\\[31m\\\\n# new." in text
    assert "thesis\\\\udcfe is left out" in text
    report_command._tell(found, found.notes)
    said = capsys.readouterr().out
    assert "z\\udcff, z\\x1b[31m\\n# new." in said and said.isascii()
    # A preset with such a name can be requested, and holds another's run.
    other = reading.read(results, "\udcff")
    assert other.preset == "\\udcff" and "it is of 'full'" in other.notes[0]


def test_the_proper_folder_counts(results):
    """Folders with other names do not count."""
    for folder in ("a-copy", "z-copy"):
        made(results, "set_erk_wrn", 0.1, 0, 0.1, folder=folder)
    changes = (("train.length", 2), ("sgd.learning_rate", 0.1234567))
    made(results, "rigl_erk_wrn", 0.1, 0, 0.1, folder="a", changes=changes)
    name = "rigl_erk_wrn-density0.1-learning_rate0.1234567-length2-seed0"
    made(results, "rigl_erk_wrn", 0.1, 0, 0.8, folder=name, changes=changes)
    found = reading.read(results)
    assert summaries.of(found, "set_erk_wrn", 0.1).accuracies == (90.0,)
    told = "set_erk_wrn-density0.1-seed0 (90.00 %) is there 3 times"
    assert any(note.startswith(told) for note in found.notes)
    changes = tuple(sorted(changes))
    of_changes = summaries.of(found, "rigl_erk_wrn", 0.1, changes)
    assert of_changes.accuracies == (80.0,)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"seed": 7}, "its seed is 7, not 1"),
        ({"settings": {"density": 0.2}}, "its density is 0.2, not 0.1"),
        ({"settings": {"density": None}}, "its density is None, not 0.1"),
        (
            {"density": 0.9, "settings": {"density": 1.0}},
            "its density is 1.0, not 0.1",
        ),
        (
            {"settings": {"method": {"drop_fraction": 0.3}}},
            "its drop_fraction is 0.3, not 0.5",
        ),
        (
            {"settings": {"method": {"frequency": 100}}},
            "its frequency is 100, not 50",
        ),
    ],
    ids=str,
)
def test_results_of_another_run(results, tmp_path, result, said, undrawn):
    changes = (("UPDATE_FRACTION", 0.5), ("UPDATE_FREQUENCY", 50))
    path = made(
        results, "rigl_erk_wrn", 0.1, 1, 0.9, changes=changes, result=result
    )
    found = reading.read(results)
    assert path.name not in [run.name for run in found.finished]
    (note,) = [note for note in found.notes if path.name in note]
    assert note == (
        f"The result of {path.name} is left out: its result.json and "
        f"about.json disagree: {said}."
    )
    text, _ = written(found, tmp_path / "out")
    assert "and about.json disagree" in text


def test_pruning_ends_at_its_density(results):
    """It counts at its final density, not at the initial one."""
    settings = {"density": 1.0, "method": {}}
    for seed, density in enumerate((0.1, 0.0999, 0.12)):
        result = {"density": density, "settings": settings}
        made(results, "pruning_wrn", 0.1, seed, 0.9, result=result)
    assert summaries.of(reading.read(results), "pruning_wrn", 0.1).n == 3


@pytest.mark.parametrize(
    ("row", "at_start", "argument"),
    [("granet_wrn", 0.5, "final_density"), ("acdc_wrn", 1.0, "density")],
)
def test_methods_that_know_their_density(results, row, at_start, argument):
    """Runs at two densities count, although an argument of theirs differs."""
    for density in (0.02, 0.05):
        settings = {"density": at_start, "method": {argument: density}}
        result = {"density": density, "settings": settings}
        made(results, row, density, 0, 0.5, result=result)
    found = reading.read(results)
    assert found.notes == ()
    for density in (0.02, 0.05):
        assert summaries.of(found, row, density).accuracies == (50.0,)


def test_a_run_pruned_to_another_density(results):
    settings = {"density": 0.5, "method": {"final_density": 0.05}}
    result = {"density": 0.05, "settings": settings}
    made(results, "granet_wrn", 0.02, 0, 0.9, result=result)
    (note,) = reading.read(results).notes
    assert note.endswith("its density is 0.5, not 0.02.")


def test_other_seeds_than_the_reports(results, tmp_path):
    """They count with the report's seeds, or as the expected seeds alone."""
    for seed in (5, 6):
        made(results, "set_erk_wrn", 0.1, seed, 0.9)
    found = reading.read(results)
    assert summaries.of(found, "set_erk_wrn", 0.1).wanted == 5
    assert found.notes == (
        "Not the report's seeds 0, 1 and 2: 5 and 6. They count like those.",
    )
    alone = tmp_path / "alone"
    for seed in (5, 6):
        made(alone, "rigl_erk_wrn", 0.1, seed, 0.9)
        changes = (("UPDATE_FRACTION", 0.4), ("UPDATE_FREQUENCY", 200))
        made(
            alone,
            "rigl_erk_wrn",
            0.1,
            seed,
            0.9,
            changes=changes,
            updates=(0.4, 200),
        )
    found = reading.read(alone)
    (note,) = found.notes
    assert note.endswith("so that each row should have these.")
    text = page.as_markdown(sections.report(found, ["table4"]).page)
    assert "tried with all seeds 5 and 6; their number" in text
    assert "| optimum of 1 | 0.4, 200 | 90.00 | 90.00 ± 0.00 | 2 of 2 |" in text


def test_densities_that_print_alike(results, undrawn):
    for density in (0.1234561, 0.1234562):
        for row in ("rigl_erk_wrn", "set_erk_wrn"):
            made(results, row, density, 0, 0.9, folder=f"{row}{density!r}")
    made_report = sections.report(reading.read(results), ["methods", "table2"])
    text = page.as_markdown(made_report.page)
    for density in ("0.1234561", "0.1234562"):
        assert f"| density {density} " in text
        assert f"**density {density}**" in text
        assert lines_of(made_report, table="methods", density=density)


def test_a_seed_that_collapsed_is_flagged(results, tmp_path, undrawn):
    """92.1, 65.6 and 92.2: 65.6 is 26.55 below the others' median."""
    for seed, accuracy in enumerate((0.921, 0.656, 0.922)):
        made(results, "set_uniform_2x_wrn", 0.1, seed, accuracy)
    made(results, "static_erk_wrn", 0.1, 0, 0.115)
    found = reading.read(results)
    assert found.notes == (
        "set_uniform_2x_wrn-density0.1-seed1 has collapsed: 65.60 % is 26.5 "
        "points below the other seeds; its accuracy counts like any other.",
        "static_erk_wrn-density0.1-seed0 has collapsed: 11.50 % is hardly "
        "better than chance, 10 %; its accuracy counts like any other.",
    )
    text, _ = written(found, tmp_path / "out", ["table2"])
    assert "| SET 2x | 83.30 ± 15.33 | 3 of 3, 1 collapsed |" in text


# The output of runs, in each format.

LINK = "![x](http://evil.example) <img src=x> `a` | b_c *d* & www.e.f"


def test_nothing_a_run_has_said_is_markdown(results, tmp_path, undrawn):
    failed(results, "snfs_erk_wrn", 0.1, 0, LINK)
    failed(results, "snfs_erk_wrn", 0.1, 1, "# a\n- b")
    changes = ((LINK, 2),)
    made(results, "rigl_erk_wrn", 0.1, 0, 0.9, changes=changes, folder="[1]")
    made(results, "rigl_erk_wrn", 0.1, 0, 0.9, changes=changes, folder="# x")
    text, _ = written(reading.read(results), tmp_path / "out")
    said = [line for line in text.splitlines() if "evil" in line]
    (fenced,) = (line for line in said if line.startswith("bin/reproduce"))
    assert "`" not in fenced  # a command in a code block
    said.remove(fenced)
    assert len(said) == 4  # in two lists, and twice at the end
    whole = (
        r"\!\[x\]\(http:\//evil.example\) \<img src=x> \`a\` | b\_c "
        r"\*d\* \& www\.e.f"
    )
    for line in said:
        assert whole in line.replace(r"\|", "|")
    assert any(line.startswith("| ") and r" \| " in line for line in said)
    assert r"seed1: # a - b" in text  # not a heading
    assert "- \\# x is there 2 times" in text
    parsed = Tags((tmp_path / "out/report.html").read_text())
    assert not parsed.found & {"img", "em", "code"}


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)


@pytest.mark.parametrize(
    ("text", "inline"),
    [
        ("RigL (ERK)!", "RigL (ERK)!"),
        ("a](b)", r"a\]\(b\)"),
        ("a [1]", r"a \[1\]"),
        ("~~a~~ $x$", r"\~\~a\~\~ \$x\$"),
        ("a\\b", r"a\\b"),
    ],
)
def test_markdown_within_a_line(text, inline):
    assert page._inline(text) == inline


@pytest.mark.parametrize("start", ["#", ">", "-", "+", "=", "1.", "20)"])
def test_markdown_at_the_start_of_a_line(start):
    assert page._plain(f"{start} a") == f"{start[:-1]}\\{start[-1]} a"
    assert page._plain(f"a {start}") == f"a {start}"


def test_a_mark_is_one_where_it_has_a_note():
    block = page.Block(["a", "b"], [["x [1]", "y [2]"]])
    section = page.Section("s", "S", blocks=[block], notes=["why"])
    made_page = page.Page("T", [], [section])
    assert r"| x [1] | y \[2\] |" in page.as_markdown(made_page)
    shown = page.as_html(made_page)
    assert "x<sup>[1]</sup>" in shown and "<td>y [2]</td>" in shown


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1+cmd|' /C calc'!A0", "'+1+cmd|' /C calc'!A0"),
        ("-1+1", "'-1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'=1"),
        ("\r=1", "'=1"),
        ("\uff1d1", "'\uff1d1"),
        ("-2.5", "-2.5"),
        ("+1e-05", "+1e-05"),
        ("-inf", "'-inf"),
        ("RigL (ERK)", "RigL (ERK)"),
        ("a\nb", "a b"),
        ("\udcff", "\\udcff"),
        ("", ""),
    ],
)
def test_no_cell_is_a_formula(text, cell):
    assert page.as_csv_cell(text) == cell


def test_formulas_among_changes(results, tmp_path, undrawn):
    changes = (("=HYPERLINK(1)", -1.5),)
    made(results, "rigl_erk_wrn", 0.1, 0, 0.9, changes=changes, folder="x")
    _, lines = written(reading.read(results), tmp_path / "out")
    (line,) = [line for line in lines if line["changes"]]
    assert line["changes"] == "'=HYPERLINK(1)=-1.5"
    (line,) = [
        line
        for line in lines
        if line["table"] == "table2"
        and line["gin"] == "set_erk_wrn"
        and line["density"] == "0.1"
    ]
    assert float(line["difference"]) == pytest.approx(90.0 - 92.2)


def test_names_in_figures_are_no_formulas(results):
    """Matplotlib would raise for a wrong formula, and draw a long one."""
    for name in ("$\\frac$", "x" * 190, "\u4e2d\u6587"):
        changes = ((name, 2),)
        made(results, "rigl_erk_wrn", 0.1, 0, 0.9, changes=changes, folder=name)
    found = reading.read(results)
    assert _figure_style.as_png(method_figures.methods(found)).startswith(
        b"\x89PNG"
    )
    assert sections.report(found, ["methods"]).page.sections[0].picture


def test_settings_that_are_no_numbers(results):
    """A search whose drop fraction is text is not in the figure."""
    searched(results)
    for path in (results / "full").glob("rigl_erk_wrn-density0.1-seed*"):
        for name, value in (("drop_fraction", "0.3"), ("frequency", 10**400)):
            damage(
                path / "run/result.json", ("settings", "method", name), value
            )
    found = reading.read(results)
    reference = summaries.of(found, "rigl_erk_wrn", 0.1)
    assert summaries.settings_of(found, reference) == (None, None)
    text = page.as_markdown(sections.report(found, ["table4", "tuning"]).page)
    assert "| reference | - | " in text
    assert "| optimum of 2 | 0.4, 200 |" in text
