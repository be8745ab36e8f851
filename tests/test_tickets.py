"""Runs that start from other runs: tickets, rewinding, longer runs."""

import csv
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_models import small_network

import gin
import rigl_keras
from rigl_keras.experiments import data
from rigl_keras.experiments.runs import train_command
from rigl_keras.experiments.runs.optimizers import WarmUpAndSteps, sgd
from rigl_keras.experiments.runs.run_callbacks import Metrics
from rigl_keras.experiments.runs.run_directory import EarlierRun

pytestmark = pytest.mark.usefixtures("blank_figures")

# Two epochs of 23 steps on digits.
SMALL = [
    "train.model = @small_network",
    "train.epochs = 2",
    "train.diagnostics = False",  # its figures take seconds
    "RigL.frequency = 5",
]
# For tests that do not depend on the network.
SMALLER = [*SMALL, "train.model = @mlp", "mlp.hidden = (24, 16)"]
PRUNING = [
    *SMALL,
    "train.density = 1.0",
    "train.distribution = 'uniform'",
    "train.method = @MagnitudePruning",
    "MagnitudePruning.schedule = @SparsityRamp()",
    "SparsityRamp.final_density = 0.2",
    "SparsityRamp.begin_step = 5",
    "SparsityRamp.end_step = 30",
    "SparsityRamp.frequency = 5",
    "train.keep_weights = [1]",
]
TICKET = [*SMALL, "train.method = None", "train.density = 0.2"]


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def load(run_dir):
    return keras.models.load_model(run_dir / "model.keras")


def found(run_dir):
    return {
        m.name: (m.mask.numpy(), m.kernel.numpy())
        for m in rigl_keras.masked_layers(load(run_dir))
    }


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "pruned"
    result = train_command.run(bindings=PRUNING, run_dir=run_dir, seed=1)
    gin.clear_config()
    return run_dir, result


def ticket(path, source, *more, seed=1):
    bindings = [
        *TICKET,
        f"train.masks_from = {str(source)!r}",
        f"train.weights_from = {str(source)!r}",
        *more,
    ]
    return train_command.run(bindings=bindings, run_dir=path, seed=seed)


def test_pruning_ends_where_it_was_told(pruned):
    run_dir, result = pruned
    assert result["method"] == "MagnitudePruning"
    assert result["density"] == pytest.approx(0.2, abs=1e-4)
    with (run_dir / "trajectory.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 5, 10, 15, 20, 25, 30]
    assert "conv1" not in rows[0]  # never masked
    assert result["layers"][0]["density"] == 1.0
    curve = np.genfromtxt(run_dir / "flops.csv", delimiter=",", names=True)
    # The masks of an update apply from the next step on.
    assert curve["step"].tolist() == [0, 11, 16, 21, 26, 31, 45]
    assert (np.diff(curve["inference_flops"])[:-1] < 0).all()
    assert curve["inference_flops"][-1] == round(result["inference_flops"])
    assert (curve["training_flops"] == 3 * curve["inference_flops"]).all()
    mean = curve["training_flops_so_far"][-1] / 46
    dense = result["inference_flops"] / result["inference_flops_ratio"]
    assert result["training_flops_ratio"] == pytest.approx(
        mean / (3 * dense), rel=1e-6
    )
    assert result["training_flops_ratio"] < 1
    assert result["training_flops_ratio_closed_form"] == pytest.approx(
        (2 * result["training_flops_ratio"] + 1) / 3
    )


def test_a_ticket_has_the_final_masks_and_the_first_weights(pruned, tmp_path):
    """Masks and weights are equal; the reproduction's code loads neither."""
    source, before = pruned
    # The rate is almost 0, so the run ends with its initial weights.
    still = ["train.epochs = 1", "sgd.learning_rate = 1e-30"]
    result = ticket(tmp_path / "ticket", source, *still, seed=7)
    assert result["method"] == "lottery"
    assert result["density"] == pytest.approx(before["density"])
    assert result["training_flops_ratio_with_sources"] == pytest.approx(
        result["training_flops_ratio"] + before["training_flops_ratio"]
    )
    first = small_network()
    EarlierRun(source).load_weights(first, 0)
    trained, ours = found(source), found(tmp_path / "ticket")
    assert ours.keys() == trained.keys()
    for name, (mask, kernel) in ours.items():
        np.testing.assert_array_equal(mask, trained[name][0])
        start = first.get_layer(name).kernel.numpy()
        np.testing.assert_allclose(kernel, start * mask, atol=1e-6)
        assert not np.allclose(kernel, trained[name][1], atol=1e-3)
    # With another seed, both would differ.
    other = found_of_seed(7)
    assert any((ours[n][0] != other[n][0]).any() for n in ours)


def found_of_seed(seed):
    keras.utils.set_random_seed(seed)
    model = small_network()
    model = rigl_keras.sparsify(model, 0.2, distribution="uniform", seed=seed)
    return {
        m.name: (m.mask.numpy(), m.kernel.numpy())
        for m in rigl_keras.masked_layers(model)
    }


@pytest.mark.slow
def test_rewinding_to_an_early_epoch(pruned, tmp_path):
    source, _ = pruned
    still = ["train.epochs = 1", "sgd.learning_rate = 1e-30"]
    ticket(tmp_path / "late", source, *still, "train.weights_epoch = 1")
    network = small_network()
    EarlierRun(source).load_weights(network, 1)
    late = found(tmp_path / "late")
    for name, (mask, kernel) in late.items():
        np.testing.assert_allclose(
            kernel, network.get_layer(name).kernel * mask, atol=1e-6
        )


@pytest.mark.slow
def test_shuffled_masks_keep_the_densities(pruned, tmp_path):
    source, _ = pruned
    ticket(tmp_path / "shuffled", source, "train.shuffle_masks = True")
    trained, ours = found(source), found(tmp_path / "shuffled")
    for name, (mask, _) in ours.items():
        theirs = trained[name][0]
        assert mask.sum() == theirs.sum()
        assert (mask != theirs).any()


@pytest.mark.slow
def test_a_run_of_updates_may_start_from_masks(pruned, tmp_path):
    """The report's re-initialised RigL."""
    source, _ = pruned
    result = ticket(
        tmp_path / "again", source, "train.method = @RigL", "RigL.end_step = 40"
    )
    assert result["method"] == "RigL"
    rows = (tmp_path / "again" / "trajectory.csv").read_text().splitlines()
    assert len(rows) == 2 + 8
    start = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    for name, (mask, _) in found(source).items():
        assert int(start[name]) == mask.sum()


@pytest.mark.parametrize(
    "bindings, message",
    [
        (["train.masks_from = 'nowhere'"], "not the directory of a run"),
        (
            ["train.weights_epoch = 2"],
            r"no weights of epoch 2, but those of \[0, 1\]",
        ),
        (
            ["train.density = 0.1"],
            "keep 0.2001 of the weights.*--density=0.2001",
        ),
        (["small_network.width = 2"], "weights of .* are of another network"),
        (
            ["small_network.width = 2", "train.weights_from = None"],
            "must have the shape of its kernel",
        ),
        (["train.one_shot = @snip"], "one_shot and masks_from are two"),
        (["train.density = None"], "train.masks_from needs train.density"),
        (["train.granularity = 'kernel'"], "parts of some kernels"),
        (["train.keep_weights = 1"], "keep_weights lists the epochs"),
        (
            ["train.masks_from = None", "train.shuffle_masks = True"],
            "set train.masks_from",
        ),
    ],
    ids=str,
)
def test_bad_tickets(pruned, tmp_path, bindings, message):
    source, _ = pruned
    with pytest.raises(ValueError, match=message):
        ticket(tmp_path / "bad", source, *bindings)
    # A refused run leaves nothing.
    assert not (tmp_path / "bad").exists()


def test_masks_of_a_dense_or_unfinished_run(tmp_path):
    dense = tmp_path / "dense"
    train_command.run(
        bindings=[*SMALL, "train.method = None", "train.density = None"],
        run_dir=dense,
    )
    gin.clear_config()
    with pytest.raises(ValueError, match="was dense: it has no masks"):
        ticket(tmp_path / "one", dense)
    gin.clear_config()
    (dense / "result.json").unlink()
    with pytest.raises(ValueError, match="not finished.*--resume"):
        ticket(tmp_path / "two", dense)


@pytest.mark.slow_but("bindings0-SNIP-0.1")
@pytest.mark.parametrize(
    "bindings, method, density",
    [
        (["train.one_shot = @snip"], "SNIP", 0.1),
        (
            # Fewer channels, with a tenth of the weights.
            [
                "train.model = @wide_resnet",
                "wide_resnet.depth = 10",
                "train.small_dense = True",
            ],
            "small-dense",
            0.1,
        ),
        (
            ["train.granularity = 'kernel'", "train.density = 0.3"],
            "static",
            0.3,
        ),
        (
            ["train.granularity = '2:4'", "train.density = 0.5"],
            "static",
            0.5,
        ),
    ],
)
def test_other_starts(tmp_path, bindings, method, density):
    bindings = [*SMALL, "train.method = None", *bindings]
    result = train_command.run(bindings=bindings, run_dir=tmp_path / "run")
    assert result["method"] == method
    assert result["density"] == pytest.approx(density, abs=0.01)
    if method == "small-dense":
        assert result["nonzeros"] / result["parameters"] == pytest.approx(
            0.1, abs=0.03
        )
        assert result["inference_flops_ratio"] == pytest.approx(0.1, abs=0.03)
        assert result["training_flops_ratio"] == pytest.approx(
            result["inference_flops_ratio"]
        )
    table = train_command.table(result)
    assert "parameters" in table and "training FLOPs" in table


@pytest.mark.slow
def test_a_longer_run(tmp_path):
    """Epochs, falls of the rate and the last update scale; others do not."""
    bindings = [
        *SMALLER,
        "train.epochs = 1",
        "train.length = 2",
        "sgd.decay_every = 10",
        "sgd.warmup_steps = 3",
        "RigL.begin_step = 5",
        "RigL.end_step = 15",
    ]
    result = train_command.run(bindings=bindings, run_dir=tmp_path / "run")
    assert (result["steps"], result["settings"]["length"]) == (46, 2)
    rows = (tmp_path / "run" / "trajectory.csv").read_text().splitlines()
    steps = [int(row.split(",")[0]) for row in rows[2:]]
    assert steps == [5, 10, 15, 20, 25, 30]
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    # Rates at steps 23 and 46, with falls at 3 + 20 and 3 + 40.
    assert rates == pytest.approx([0.1 * 0.2, 0.1 * 0.2**2])
    # Relative to a run of length 1, the cost is doubled.
    assert result["training_flops_ratio"] > 2 * result["inference_flops_ratio"]


def test_a_longer_run_needs_makers_that_know(tmp_path):
    bindings = [*SMALL, "train.length = 0.1"]
    with pytest.raises(ValueError, match="must leave at least one"):
        train_command.run(bindings=bindings, run_dir=tmp_path / "run")


def test_warm_up_and_steps_by_hand():
    rate = WarmUpAndSteps(
        learning_rate=0.4, decay_factor=0.5, decay_every=10, warmup_steps=4
    )
    table = {0: 0.0, 1: 0.1, 3: 0.3, 4: 0.4, 13: 0.4, 14: 0.2, 24: 0.1}
    for step, want in table.items():
        assert float(rate(step)) == pytest.approx(want)
    again = WarmUpAndSteps.from_config(rate.get_config())
    assert again.get_config() == rate.get_config()
    constant = sgd(decay_every=None).learning_rate
    assert float(tf.convert_to_tensor(constant)) == pytest.approx(0.1)
    for name in ("learning_rate", "decay_factor", "decay_every"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            WarmUpAndSteps(**{**rate.get_config(), name: 0})
    with pytest.raises(ValueError, match="warmup_steps must be at least 0"):
        WarmUpAndSteps(**{**rate.get_config(), "warmup_steps": -1})


@pytest.mark.slow
def test_training_on_all_examples(tmp_path):
    whole = data.load("digits", validation=0)
    assert len(whole.train_labels) == 1_617  # 1,437 and the 180
    assert whole.steps_per_epoch(64) == 26
    with pytest.raises(ValueError, match="none are left"):
        whole.validation(batch_size=4)
    result = train_command.run(
        bindings=[*SMALLER, "train.validation = 0"], run_dir=tmp_path / "run"
    )
    assert result["steps"] == 52
    assert result["validation_accuracy"] is None
    assert "no examples held out" in train_command.table(result)


@pytest.mark.slow
def test_labels_are_smoothed_in_training_alone(tmp_path):
    """The training loss is that of uniform targets, the validation loss not."""
    losses = {}
    for smoothing in (0.0, 0.5):
        run_dir = tmp_path / f"{smoothing}"
        bindings = [
            *SMALL,
            "train.epochs = 1",
            "train.method = None",
            "sgd.learning_rate = 1e-30",
            "small_network.weight_decay = 0.0",
            f"train.label_smoothing = {smoothing}",
        ]
        train_command.run(bindings=bindings, run_dir=run_dir)
        gin.clear_config()
        with (run_dir / "metrics.csv").open(newline="") as file:
            losses[smoothing] = next(csv.DictReader(file))
    assert losses[0.0]["val_loss"] == losses[0.5]["val_loss"]
    assert losses[0.0]["loss"] != losses[0.5]["loss"]
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        train_command.run(
            bindings=["train.label_smoothing = 1.0"], run_dir=tmp_path / "bad"
        )


@pytest.mark.slow
def test_the_corrections_of_the_report_survive_a_restart(tmp_path):
    """Checkpoints hold the state of RigL-SM under REPORT."""
    bindings = [
        *SMALLER,
        "RigL.redistribution = 'momentum'",
        "RigL.conventions = %REPORT",
        "train.conventions = %REPORT",
        "RigL.end_step = 46",
    ]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train_command.run(bindings=bindings, run_dir=straight)
    gin.clear_config()

    class Stop(Exception):
        pass

    def stop_in_the_second_epoch(self, epoch, logs=None):
        if epoch:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "on_epoch_begin", stop_in_the_second_epoch)
        with pytest.raises(Stop):
            train_command.run(bindings=bindings, run_dir=cut)
    gin.clear_config()
    train_command.run(bindings=bindings, run_dir=cut, resume=True)
    assert (cut / "trajectory.csv").read_text() == (
        straight / "trajectory.csv"
    ).read_text()
    one, two = (
        json.loads((d / "result.json").read_text()) for d in (straight, cut)
    )
    assert one["test_loss"] == two["test_loss"]
    assert one["training_flops"] == two["training_flops"]


@pytest.mark.slow
def test_whole_kernels_stay_whole_from_run_to_run(tmp_path):
    kernel = ["train.granularity = 'kernel'", "train.density = 0.3"]
    bindings = [*SMALL, "train.method = None", *kernel]
    train_command.run(bindings=bindings, run_dir=tmp_path / "first")
    gin.clear_config()
    result = ticket(
        tmp_path / "second",
        tmp_path / "first",
        *kernel,
        "train.method = @RigL",
        "RigL.end_step = 40",
        "train.shuffle_masks = True",
    )
    assert result["settings"]["granularity"] == "kernel"
    assert result["settings"]["distribution"] is None
    for mask, _ in found(tmp_path / "second").values():
        if mask.ndim == 4:
            assert (mask == mask[:1, :1]).all()


@pytest.mark.slow
def test_weights_of_an_unfinished_run(tmp_path):
    """Its initial weights are saved at the start, and add no cost."""
    train_command.run(bindings=TICKET, run_dir=tmp_path / "first")
    gin.clear_config()
    (tmp_path / "first" / "result.json").unlink()
    source = f"train.weights_from = {str(tmp_path / 'first')!r}"
    result = train_command.run(
        bindings=[*TICKET, source], run_dir=tmp_path / "next"
    )
    assert result["training_flops_ratio_with_sources"] == pytest.approx(
        result["training_flops_ratio"]
    )


def test_small_dense_takes_a_model_that_scales(tmp_path):
    bindings = ["train.model = @mlp", "train.small_dense = True"]
    with pytest.raises(ValueError, match="takes `channel_scale`"):
        train_command.run(
            bindings=[*bindings, "train.method = None"], run_dir=tmp_path / "x"
        )
