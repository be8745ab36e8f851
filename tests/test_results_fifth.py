"""The published page at the report's size has the numbers of its data."""

import csv
import statistics

from support import result_pages

from rigl_keras.experiments.protocol import published
from rigl_keras.experiments.report import page

FOLDER = result_pages.data("fifth").parent


def made():
    return result_pages.made("fifth", "fifth", with_published=True)


def lines_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_page_has_the_numbers_of_its_data():
    shown = result_pages.tables(result_pages.text("fifth"))
    assert len(shown) > 5
    assert set(shown) <= set(result_pages.tables(page.as_markdown(made().page)))


def test_the_data_is_as_it_was_written():
    assert made().results == result_pages.data("fifth").read_text()
    written = (FOLDER / "report.md").read_text()
    assert written == page.as_markdown(made().page)


def test_the_runs_are_of_the_preset_in_the_repository():
    for run in result_pages.runs("fifth"):
        settings = run["result"]["settings"]
        assert (settings["batch_size"], settings["epochs"]) == (128, 50)
        assert run["result"]["steps"] == 352 * 50
        folder = FOLDER / run["folder"] / "run"
        assert len(lines_of(folder / "metrics.csv")) == 50
        count, last = result_pages.planned_updates(run["row"], "fifth")
        text = result_pages.text("fifth")
        assert f"{count} updates" in text
        assert f"until step {last:,}" in text


def test_numbers_in_the_text_follow_from_the_data():
    (run,) = result_pages.runs("fifth")
    result = run["result"]
    epochs = lines_of(FOLDER / run["folder"] / "run" / "metrics.csv")
    sides = {line["side"]: line for line in lines_of(FOLDER / "train.csv")}
    sparse = sides["product=auto, 1 update in 100"]
    dense = float(sparse["dense_seconds"])
    (row,) = [
        cell
        for cell in published.cells("table2")
        if (cell.gin, cell.density) == (run["row"], run["density"])
    ]
    accuracy = 100 * result["test_accuracy"]
    known = {
        "0.1",  # the density
        f"{row.accuracy - accuracy:.1f}",
        f"{100 * float(epochs[-1]['accuracy']):.1f}",
        f"{result['training_flops_ratio']:.2f}x",
        f"{result['seconds'] / 3600:.2f}",
        f"{float(sparse['seconds']):.3f}",
        f"{dense:.3f}",
        f"{dense / float(sparse['seconds']):.1f}x",
    }
    text = result_pages.text("fifth")
    said = result_pages.numbers(text)
    assert len(said) > 8
    assert [each for each in said if each not in known] == []
    assert f"{result['nonzeros']:,} of {result['parameters']:,}" in text
    seconds = statistics.median(float(line["seconds"]) for line in epochs)
    assert f"took {seconds:.0f} seconds in the median" in text
    assert f"in {sparse['rounds']} rounds" in text


def test_links_are_there():
    for link in result_pages.links(result_pages.text("fifth")):
        assert (result_pages.DOCS / link).exists(), link
