"""The published page of small results has the numbers of its data."""

import statistics

import pytest
from support import result_pages

from rigl_keras.experiments.protocol import published, rows
from rigl_keras.experiments.report import page
from rigl_keras.experiments.reproduction import plans
from rigl_keras.experiments.runs import config


def test_the_page_has_the_numbers_of_its_data():
    made = result_pages.made("small", "small")
    shown = result_pages.tables(result_pages.text("small"))
    assert len(shown) > 20
    assert set(shown) <= set(result_pages.tables(page.as_markdown(made.page)))


def test_the_data_is_as_it_was_written():
    """The data gives the same page again, and the CSV has the same runs."""
    made, data = result_pages.made("small", "small"), result_pages.data("small")
    assert made.results == data.read_text()
    written = (data.parent / "report.md").read_text()
    assert written == page.as_markdown(made.page)


def test_the_runs_are_of_the_preset_in_the_repository():
    """Their epochs and steps are those of the preset's file."""
    preset = plans.Preset("small")
    runs = result_pages.runs("small")
    assert len(runs) > 40
    for run in runs:
        config.parse([f"gin/{run['row']}.gin", str(preset.path)], [])
        settings = run["result"]["settings"]
        assert settings["batch_size"] == 64
        epochs = int(3 * run["changes"].get("train.length", 1))
        assert settings["epochs"] == epochs
        assert run["result"]["steps"] == 704 * epochs


@pytest.fixture(scope="module")
def cells():
    """Returns finished runs by method, masks, density and length."""
    found = {}
    for run in result_pages.runs("small"):
        row = rows.row(run["row"])
        length = run["changes"].get("train.length", 1)
        key = row.method, row.distribution, run["density"], length
        found.setdefault(key, []).append(run["result"])
    return found


def test_what_is_concluded_follows_from_the_data(cells):
    """Each number in the text of the page is computed from the data here."""

    def accuracies(*key):
        return [100 * result["test_accuracy"] for result in cells[key]]

    def mean(*key):
        return statistics.fmean(accuracies(*key))

    def flops(kind, *key):
        results = cells[key]
        return statistics.fmean(r[f"{kind}_flops_ratio"] for r in results)

    grid = [(m, d) for m in ("uniform", "ERK") for d in (0.05, 0.1)]
    known = {"0.05", "0.1", "0.02"}  # densities
    for key, results in cells.items():
        known |= {f"{a:.2f}" for a in (mean(*key), *accuracies(*key))}
        known.add(f"{statistics.stdev(accuracies(*key)):.2f}")
        for kind in ("training", "inference"):
            known.add(f"{flops(kind, *key):.2f}x")
        assert len(results) == 3
    known.add("62.85")  # of the page results_methods.md, which has its own test
    (dense,) = (c for c in published.cells("table2") if c.density is None)
    known.add(str(dense.accuracy))
    # RigL reaches pruning at equal training FLOPs.
    longer, pruning = ("RigL", "ERK", 0.05, 4), ("Pruning", "", 0.05, 1)
    static = ("Static", "ERK", 0.05, 4)
    assert mean(*longer) > mean(*pruning)
    assert flops("training", *longer) < flops("training", *pruning)
    assert flops("inference", *longer) < flops("inference", *pruning)
    assert max(accuracies(*pruning)) > min(accuracies(*longer))
    # And beats static masks.
    assert min(accuracies(*longer)) > max(accuracies(*static))
    known.add(f"{mean(*longer) - mean(*static):.2f}")

    def below(method, others):
        """Returns how much lower a method is than others in 3 epochs."""
        return [
            mean(other, *cell, 1) - mean(method, *cell, 1)
            for cell in grid
            for other in others
        ]

    def extremes(values, form="{:.2f}"):
        return {form.format(abs(each)) for each in (min(values), max(values))}

    assert min(below("RigL", ["SET", "SNFS"])) > 0
    known |= extremes(below("RigL", ["SET", "SNFS"]))
    known |= extremes(below("RigL", ["Static"]))
    assert min(below("Static", ["SET", "SNFS"])) > 0
    # Pruning is better at the same length, but costs more.
    sparse, dearer = ("SET", "SNFS", "RigL", "Static"), []
    for density in (0.05, 0.1):
        pruned = ("Pruning", "", density, 1)
        others = [
            (m, d, density, 1) for m in sparse for d in ("uniform", "ERK")
        ]
        ahead = min(mean(*pruned) - mean(*key) for key in others)
        assert ahead > 0
        known.add(f"{ahead:.2f}")
        dearer += [
            flops("training", *pruned) / flops("training", *key)
            for key in others
            if key[0] != "SNFS"
        ]
    known |= extremes(dearer, "{:.1f}")
    dearer = [
        flops("training", "SNFS", *cell, 1)
        / flops("training", "Static", *cell, 1)
        for cell in grid
    ]
    known |= extremes(dearer, "{:.1f}")
    behind = [
        mean("Static", masks, density, 1) - mean("Small-Dense", "", density, 1)
        for masks, density in grid
    ]
    assert sum(each > 0 for each in behind) == 3
    known |= extremes(behind)
    # The budget.
    seconds = {
        length: [
            r["seconds"] for k, c in cells.items() if k[-1] == length for r in c
        ]
        for length in (1, 4)
    }
    for each in seconds.values():
        known |= extremes([s / 60 for s in each], "{:.1f}")
    known.add(f"{statistics.median(seconds[1]) / 60:.1f}")
    known.add(f"{sum(map(sum, seconds.values())) / 3600:.1f}")
    text = result_pages.text("small")
    assert f"{sum(map(len, seconds.values()))} runs" in text
    said = result_pages.numbers(text)
    assert len(said) > 30
    assert [each for each in said if each not in known] == ["1.1"]  # million


def test_updates_of_a_run_are_as_many_as_the_page_says():
    text = result_pages.text("small")
    count, _ = result_pages.planned_updates("rigl_erk_wrn", "small")
    assert f"has {count} updates" in text
    assert f"the longer one has {4 * count}" in text


def test_figures_and_links_are_there():
    for name in ("results_small.md", "../README.md"):
        file = (result_pages.DOCS / name).resolve()
        for link in result_pages.links(file.read_text()):
            assert (file.parent / link).exists(), (name, link)
