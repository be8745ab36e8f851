"""The runs of each table and figure, and their cost."""

import dataclasses

import pytest

import gin
import rigl_keras
from rigl_keras.experiments import data
from rigl_keras.experiments.protocol import published, variations
from rigl_keras.experiments.reproduction import costs, estimates, plans
from rigl_keras.experiments.runs import train_command

FULL = plans.Preset("full")
SMALL = plans.Preset("small")


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def names(target, preset=SMALL, **options):
    return [run.name for run in plans.runs(target, preset=preset, **options)]


def test_figure_1_is_rows_x_densities_x_seeds():
    runs = names("figure1", densities=[0.05, 0.1])
    assert len(runs) == len(set(runs)) == 3 * (10 * 2 + 1)
    assert runs[:3] == [
        "dense_wrn-seed0",
        "small_dense_wrn-density0.05-seed0",
        "small_dense_wrn-density0.1-seed0",
    ]
    # Runs are ordered by seed, as three seeds of half the rows allow no
    # comparison.
    assert [run[-5:] for run in runs] == sorted(run[-5:] for run in runs)
    assert names("figure1", FULL, seeds=[7])[-1].endswith("density0.5-seed7")


def test_what_a_run_starts_from_comes_before_it():
    runs = plans.runs("table2", preset=FULL, densities=[0.2], seeds=[1])
    ticket = next(run for run in runs if run.row == "lottery_wrn")
    assert ticket.source.name == "pruning_wrn-density0.2-seed1"
    assert runs.index(ticket.source) < runs.index(ticket)
    ticket.configure()
    bound = gin.get_bindings("train")
    assert bound["masks_from"] == f"{ticket.source.name}/run"
    assert bound["weights_from"] == f"{ticket.source.name}/run"
    again = plans.Run("rigl_reinit_erk_wrn", FULL, 0.1, seed=0)
    assert again.source.row == "rigl_sm_erk_wrn"
    assert plans.Run("rigl_erk_wrn", FULL, 0.1, seed=0).source is None


def test_a_run_is_the_one_that_bin_train_makes():
    """The configuration in the plan is that of its command."""
    run = plans.Run("rigl_erk_wrn", SMALL, 0.1, 2, plans.learning_rate_of(0.05))
    text = run.configure()
    assert "DENSITY = 0.1" in text and "train.seed = 2" in text
    assert "sgd.learning_rate = 0.05" in text
    assert "wide_resnet.depth = 10" in text  # from the preset, over the row's
    train_command.configure(
        ["gin/rigl_erk_wrn.gin", "gin/presets/small.gin"],
        bindings=["sgd.learning_rate = 0.05"],
        seed=2,
        density=0.1,
    )
    assert gin.config_str() == text
    assert run.name == "rigl_erk_wrn-density0.1-learning_rate0.05-seed2"


def test_figure_2_shares_what_it_has_in_common():
    """A change to the row's own value is not a change."""
    runs = names("figure2", FULL, densities=[0.1], seeds=[0])
    assert len(runs) == 2 * 4 * 4
    assert "rigl_erk_wrn-density0.1-seed0" in runs  # 0.3, 100 and 0.1
    assert set(names("figure1", FULL, densities=[0.1], seeds=[0])) & set(runs)


def test_frequencies_are_in_the_steps_of_the_preset():
    """The preset's frequency is 50, and the report's is 100."""
    (run,) = [
        run
        for run in plans.runs(
            "figure2", preset=SMALL, densities=[0.1], seeds=[0]
        )
        if run.name.startswith("rigl_erk")
        and dict(run.changes)
        == {"UPDATE_FRACTION": 0.5, "UPDATE_FREQUENCY": 375}
    ]
    run.configure()
    assert gin.get_bindings("RigL")["frequency"] == 375


def test_figure_3_compares_at_equal_training_flops():
    runs = plans.runs("figure3", preset=FULL, densities=[0.2], seeds=[0])
    uniform, erk, equal = runs
    assert (uniform.row, erk.row) == ("rigl_uniform_wrn", "rigl_erk_wrn")
    assert equal.row == erk.row and equal.density < erk.density
    ratios = []
    for run in runs:
        run.configure()
        ratios.append(costs.planned().training_flops_ratio)
    assert ratios[2] == pytest.approx(ratios[0], rel=0.01)
    assert ratios[1] > 1.5 * ratios[0]


def test_methods_are_compared_over_a_length_of_their_own():
    at_full = names("methods", FULL, seeds=[0], rows=["rigl_*", "dense_wrn"])
    assert at_full == [
        "dense_wrn-seed0",
        "rigl_erk_wrn-density0.05-seed0",
        "rigl_erk_wrn-density0.02-seed0",
        "rigl_erk_wrn-density0.5-seed0",
        "rigl_2_4_wrn-density0.5-seed0",
    ]
    small = names("methods", densities=[0.1], seeds=[0])
    assert len(small) == 1 + 9 + 2
    assert all(name.endswith("-length4-seed0") for name in small)


@pytest.mark.parametrize("target", plans.TARGETS)
def test_every_target_can_be_planned(target):
    runs = plans.runs(target, preset=FULL, seeds=[0])
    assert len(set(runs)) == len(runs) > 3
    for run in runs:
        assert (variations.GIN_FOLDER / f"{run.row}.gin").is_file()
        assert run.source is None or run.source in runs


def test_a_preset_is_for_some_rows():
    with pytest.raises(ValueError, match="table3 has no row.*--preset=full"):
        plans.runs("table3", preset=SMALL)
    assert all("resnet50" not in name for name in names("table5"))


def test_some_rows_and_bindings_of_ones_own():
    """They are different runs with different names."""
    chosen = names(
        "figure1",
        densities=[0.1],
        seeds=[0],
        rows=["static_*", "rigl_erk_wrn"],
        changes=(("train.length", 4),),
    )
    assert chosen == [
        f"{row}-density0.1-length4-seed0"
        for row in ("static_uniform_wrn", "static_erk_wrn", "rigl_erk_wrn")
    ]
    run = plans.Run("rigl_erk_wrn", SMALL, 0.1, 0, (("train.length", 4),))
    run.configure()
    assert costs.planned().epochs == 12


def test_bindings_of_the_user_are_over_those_of_a_target():
    """Also if they are what the row has anyway; others have no frequency."""
    one = dict(preset=plans.Preset("full"), densities=[0.1], seeds=[0])
    one["rows"] = ["rigl_erk_wrn"]
    row, tuned = names("table4", **one)
    assert tuned == row.replace(
        "-seed0", "-update_fraction0.416-update_frequency200-seed0"
    )
    assert names("table4", **one, changes=(("UPDATE_FRACTION", 0.3),)) == [
        row,
        row.replace("-seed0", "-update_frequency200-seed0"),
    ]
    every = dict(preset=plans.Preset("full"), seeds=[0])
    changed = names("figure1", **every, changes=(("UPDATE_FREQUENCY", 200),))
    assert {
        "dense_wrn-seed0",
        "rigl_erk_wrn-density0.1-update_frequency200-seed0",
    } <= set(changed)


def test_files_of_rows_are_those_of_the_package(tmp_path, monkeypatch):
    run = plans.Run("rigl_erk_wrn", SMALL, 0.1, 0)
    before = run.configure()
    (tmp_path / "gin").mkdir()
    (tmp_path / "gin/rigl_erk_wrn.gin").write_text("train.epochs = 1")
    monkeypatch.chdir(tmp_path)
    assert run.configure() == before


def test_runs_that_differ_have_other_names():
    """Runs have separate folders even if they differ in the seventh digit."""

    def name(density=0.1, **changes):
        pairs = tuple((k.replace("__", "."), v) for k, v in changes.items())
        return plans.Run("rigl_erk_wrn", SMALL, density, 0, pairs).name

    assert name(0.1234561) == "rigl_erk_wrn-density0.1234561-seed0"
    others = [
        name(0.1234561),
        name(0.1234562),
        name(0.1),
        name(0.1 + 1e-16),
        name(1),
        name(train__length=2),
        name(other__length=2),
        name(other__length2=2),
        name(other__length=22),
        name(sgd__learning_rate=0.1234561),
        name(sgd__learning_rate=0.1234562),
        name(sgd__learning_rate=1e-7),
        name(sgd__learning_rate=1.0000000000000002),
        name(LENGTH=2),
        name(length=2),
    ]
    assert len(set(others)) == len(others)
    # The same run in another order, or bound twice.
    one = name(sgd__learning_rate=0.1, train__length=2)
    assert one == name(train__length=2, sgd__learning_rate=0.1)
    twice = (("train.length", 4), ("train.length", 2))
    assert plans.Run("rigl_erk_wrn", SMALL, 0.1, 0, twice).name == name(
        train__length=2
    )
    scoped = plans.Run("rigl_erk_wrn", SMALL, 0.1, 0, (("a/b.c", 2),)).name
    assert scoped == "rigl_erk_wrn-density0.1-a%2Fb.c=2-seed0"


def test_a_preset_of_ones_own(tmp_path):
    own = tmp_path / "tiny.gin"
    own.write_text("train.epochs = 1\n")
    preset = plans.Preset(str(own))
    assert preset.folder == "tiny"
    run = plans.Run("static_erk_wrn", preset, 0.1, 0)
    run.configure()
    assert gin.get_bindings("train")["epochs"] == 1


def test_nonsense():
    with pytest.raises(ValueError, match="table1.*Received: 'table9'"):
        plans.runs("table9", preset=FULL)
    with pytest.raises(ValueError, match=r"in \(0, 1\]. Received: 1.5"):
        plans.runs("table2", preset=FULL, densities=[1.5])
    with pytest.raises(ValueError, match="at least 0. Received: 0, -1"):
        plans.runs("table2", preset=FULL, seeds=[0, -1])
    with pytest.raises(ValueError, match=r"below 2 \*\* 32"):
        plans.runs("table2", preset=FULL, seeds=[2**32])
    with pytest.raises(
        ValueError, match="no row nothing. It has small_dense_wrn"
    ):
        plans.runs("table2", preset=FULL, rows=["nothing"])
    known = "full, fifth, small, small_gpt, tiny_gpt or the path.*'smal'"
    with pytest.raises(ValueError, match=known):
        plans.Preset("smal")
    with pytest.raises(ValueError, match="no gin file"):
        plans.Preset("nowhere/tiny.gin")
    with gin.unlock_config():
        gin.parse_config(["train.epochs = 3", "train.length = 0.1"])
    with pytest.raises(ValueError, match="length=0.1 of epochs=3"):
        costs.planned_epochs()


def test_a_plan_names_changes_once_and_fits_a_terminal(monkeypatch):
    changes = (("UPDATE_FRACTION", 0.5), ("UPDATE_FREQUENCY", 100))
    runs = [
        plans.Run(row, FULL, 0.1, 0, some)
        for some in ((), changes)
        for row in ("rigl_kernel_uniform_resnet50", "rigl_erk_resnet50")
    ]
    counted = estimates.counted(plans.Run("rigl_erk_wrn", SMALL, 0.1, 0))
    monkeypatch.setattr(estimates, "counted", lambda run: counted)
    found = {
        run: (counted[0], 3 * 60.0 if run.changes else 200 * 3600.0)
        for run in runs
    }
    first, *rows, _ = estimates.plan_table(runs, found).splitlines()[:6]
    assert first.split()[:2] == ["run", "density"]
    assert [row.split()[0] for row in rows] == [
        *("rigl_kernel_uniform_resnet50", "rigl_erk_resnet50", "with"),
        "rigl_kernel_uniform_resnet50",
    ]
    assert rows[2] == "with UPDATE_FRACTION = 0.5, UPDATE_FREQUENCY = 100"
    assert rows[1].endswith(" 200 h") and rows[3].endswith(" 3 min")
    assert max(len(row) for row in rows) <= 80


def test_examples_are_those_of_the_data_sets(monkeypatch):
    """The cost of a run does not need its data."""
    digits = data.load("digits")
    held_out = digits.recipe.validation
    assert len(digits.train_labels) + held_out == digits.recipe.examples


# Rows of every kind, and the source of their cost.
KINDS = [
    "dense_wrn",
    "small_dense_wrn",
    "static_uniform_wrn",
    "set_erk_wrn",
    "rigl_erk_wrn",
    "rigl_uniform_2x_wrn",
]


@pytest.mark.parametrize("row", KINDS)
def test_planned_flops_are_those_of_count(row):
    """They equal the counts of the network with drawn masks."""
    density = None if row.startswith("dense") else 0.1
    plans.Run(row, SMALL, density, seed=0).configure()
    cost = costs.planned()
    scale = 0.1**0.5 if row.startswith("small") else 1.0
    model = rigl_keras.models.wide_resnet(10, 1, channel_scale=scale)
    if row not in ("dense_wrn", "small_dense_wrn"):
        distribution = "erk" if "erk" in row else "uniform"
        model = rigl_keras.sparsify(model, 0.1, distribution=distribution)
    counted = rigl_keras.count(model)
    assert cost.inference_flops == pytest.approx(
        counted.inference_flops,
        rel=5e-3,  # counts are rounded
    )
    whole = rigl_keras.count(rigl_keras.models.wide_resnet(10, 1))
    assert cost.dense_flops == whole.dense_inference_flops
    length = 2 if "2x" in row else 1
    assert cost.epochs == 3 * length
    assert cost.steps == cost.epochs * 704  # 45,000 images in batches of 64
    assert cost.samples == cost.epochs * 45_000
    method = {"dense": "dense", "rigl": "RigL"}.get(row.split("_")[0], "static")
    closed_form = rigl_keras.training_flops(
        method,
        sparse_flops=cost.inference_flops,
        dense_flops=cost.dense_flops,
        frequency=50,
    )
    assert cost.training_flops == pytest.approx(closed_form)
    assert cost.training_flops_ratio == pytest.approx(
        length * closed_form / (3 * cost.dense_flops)
    )


@pytest.mark.parametrize(
    "cell",
    [c for c in published.cells("table7") if c.row != "Small-Dense"],
    ids=lambda cell: f"{cell.gin}-{cell.density}",
)
def test_flops_of_whole_kernels_are_published(cell):
    """Inference FLOPs of Table 7, but for one number of single weights."""
    plans.Run(cell.gin, FULL, cell.density, seed=0).configure()
    ratio = costs.planned().inference_flops_ratio
    if (cell.gin, cell.density) == ("rigl_kernel_erk_resnet50", 0.1):
        assert ratio == pytest.approx(0.2145, abs=1e-4)
        assert "0.21x to test" in cell.note
        plans.Run("rigl_erk_resnet50", FULL, 0.1, seed=0).configure()
        ratio = costs.planned().training_flops_ratio
    assert ratio == pytest.approx(cell.test_flops, abs=0.008)


def test_planned_flops_of_whole_kernels_are_those_of_count():
    plans.Run("rigl_kernel_uniform_wrn", SMALL, 0.1, seed=0).configure()
    model = rigl_keras.sparsify(
        rigl_keras.models.wide_resnet(10, 1),
        0.1,
        distribution="uniform_all",
        granularity="kernel",
    )
    assert rigl_keras.masked_layers(model)[-1].density == 1
    assert costs.planned().inference_flops == pytest.approx(
        rigl_keras.count(model).inference_flops,
        rel=1e-2,  # counts are rounded
    )


def test_planned_flops_of_pruning():
    """Pruning is dense at first and sparse at the end."""
    plans.Run("pruning_wrn", SMALL, 0.1, seed=0).configure()
    pruned = costs.planned()
    plans.Run("static_uniform_wrn", SMALL, 0.1, seed=0).configure()
    static = costs.planned()
    assert pruned.inference_flops == pytest.approx(static.inference_flops)
    assert static.training_flops < pruned.training_flops
    # s_t = 0.9 (1 - (1 - x)^3) from step 50 to 1,500, whose mean is
    # 0.9 x 3 / 4 = 0.675; then 0.9 until step 2,112.
    prunable = (pruned.dense_flops - pruned.inference_flops) / 0.9
    mean_sparsity = (1_450 * 0.675 + 612 * 0.9) / 2_112
    mean = pruned.dense_flops - mean_sparsity * prunable
    assert pruned.training_flops == pytest.approx(3 * mean, rel=0.01)


def test_costs_are_those_that_the_report_counts():
    """They are the report's if training decides them; tickets add Pruning's."""

    def planned(row, density, preset=FULL, **options):
        run = plans.Run(row, preset, density, seed=0)
        cost, training = estimates.counted(run, **options)
        ratios = training, cost.inference_flops_ratio
        return cost, tuple(round(ratio, 2) for ratio in ratios)

    for row, train_and_test in (
        ("pruning_wrn", (0.32, 0.13)),
        ("lottery_wrn", (0.45, 0.13)),
        ("snfs_uniform_wrn", (0.51, 0.27)),
        ("snfs_erk_wrn", (0.52, 0.28)),
        ("snfs_uniform_2x_wrn", (1.02, 0.27)),
        ("rigl_sm_uniform_wrn", (0.28, 0.28)),
    ):
        cost, ratios = planned(row, 0.1)
        assert ratios == train_and_test, row
        assert not cost.certain
    # The cost of the pruning run is not in the ticket's own total.
    ticket, _ = planned("lottery_wrn", 0.1)
    assert ticket.training_flops_ratio == pytest.approx(0.13)
    # Without printed numbers, closed forms are used.
    assert planned("pruning_wrn", 0.3)[1][0] > planned("pruning_wrn", 0.1)[1][0]
    small = planned("lottery_wrn", 0.1, SMALL)[1]
    own, _ = planned("pruning_wrn", 0.1, SMALL)
    assert small[0] == round(own.training_flops_ratio + small[1], 2)
    assert planned("pruning_wrn", 0.1, printed=False)[1] == (0.28, 0.1)
    certain = {
        row: planned(row, 0.1)[0].certain
        for row in ("rigl_erk_wrn", "mest_wrn", "granet_wrn", "acdc_wrn")
    }
    # The last two keep the largest weights of all layers together.
    assert [*certain.values()] == [True, True, False, False], certain


def test_a_step_is_timed_with_the_masks_that_its_run_has():
    def step(row, density):
        plans.Run(row, SMALL, density, seed=0).configure()
        return costs.planned().step

    static = step("static_erk_wrn", 0.1)
    assert static.density == 0.1 and static.batch_size == 64
    assert static.distribution == "erdos_renyi_kernel"
    # These steps have the same kernels, and are timed once.
    assert step("set_erk_wrn", 0.1) == static == step("rigl_erk_wrn", 0.1)
    others = [
        step("rigl_erk_wrn", 0.2),
        step("rigl_uniform_wrn", 0.1),
        step("snfs_erk_wrn", 0.1),
        step("pruning_wrn", 0.1),
        step("small_dense_wrn", 0.1),
        step("dense_wrn", None),
    ]
    assert len({static, *others}) == 7
    assert others[2].method is rigl_keras.SNFS
    assert others[3].density == 1.0  # the initial density of pruning
    assert others[4].density is None and others[5].density is None


@pytest.mark.slow
def test_a_step_is_measured_once():
    plans.Run("small_dense_wrn", SMALL, 0.01, seed=0).configure()
    step = costs.planned().step
    assert 0 < costs.seconds_of_step(step) < 60
    assert costs.seconds_of_step(step) == costs.seconds_of_step(step)
    masked = dataclasses.replace(step, density=0.5, method=rigl_keras.SNFS)
    assert 0 < costs.seconds_of_step(masked) < 60
