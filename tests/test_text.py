"""Text data: windows, their order, and runs."""

import csv
import dataclasses
import hashlib
import math
import platform

import keras
import numpy as np
import pytest
import tensorflow as tf

import gin
import rigl_keras
from rigl_keras.experiments import data
from rigl_keras.experiments.data import recipes, text
from rigl_keras.experiments.reproduction import costs, plans
from rigl_keras.experiments.runs import optimizers, train_command
from rigl_keras.experiments.runs.run_directory import RunDirectory

# For each version of Python: characters, and the start of their SHA-256.
KNOWN = {
    "3.10.13": (1_587_142, "c76c3e4393ff4dd9"),
    "3.11.7": (1_618_510, "ca05ba63b1d53038"),
    "3.12.1": (1_647_813, "2da78c0e37773ebc"),
    "3.13.0": (1_701_876, "eb75d5e3133d359c"),
}


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def alphabet(count, **changes):
    """Returns a text of `count` characters, the repeated alphabet."""
    recipe = data.TextRecipe(
        name="toy", vocabulary=97, context=4, validation=10, test=10
    )
    recipe = dataclasses.replace(recipe, **changes)
    return data.Text(recipe, "".join(chr(97 + i % 26) for i in range(count)))


def windows(dataset):
    """All inputs and all labels of a dataset, as text."""
    pairs = [
        (text.decoded(x), text.decoded(y))
        for inputs, labels in dataset.as_numpy_iterator()
        for x, y in zip(inputs, labels, strict=True)
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


# --- the text


def test_what_every_python_ships():
    docs = text.python_docs()
    assert 1_200_000 < len(docs) < 2_500_000
    assert docs.count("\n\n\n") > 150
    # A topic of the language, and a docstring of a module.
    assert 'The "while" statement is used for repeated execution' in docs
    assert "Find lowest index i such that" not in docs
    assert "Return the sample arithmetic mean of data." in docs
    shares = np.bincount(text.encoded(docs), minlength=97) / len(docs)
    assert (shares[:96] > 0).all()  # each symbol is used
    assert 0 < shares[96] < 1e-3
    known = KNOWN.get(platform.python_version())
    if known and "pyenv" in text.sysconfig.get_path("stdlib"):
        found = hashlib.sha256(docs.encode()).hexdigest()[:16]
        assert (len(docs), found) == known


def test_symbols_by_hand():
    codes = text.encoded("a b\n~ \N{BULLET}\t")
    assert codes.tolist() == [66, 1, 67, 0, 95, 1, 96, 96]
    assert codes.dtype == np.uint8
    assert text.decoded(codes) == "a b\n~ \ufffd\ufffd"
    assert len(text.SYMBOLS) == recipes.TEXTS["python_docs"].vocabulary == 97


def test_a_python_without_its_documentation(monkeypatch, tmp_path):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(text.TextUnavailableError, match="source of _pydecimal"):
        text.python_docs.__wrapped__()
    monkeypatch.setattr(
        "rigl_keras.experiments.data.datasets._TEXTS",
        {"python_docs": text.python_docs.__wrapped__},
    )
    with pytest.raises(data.DatasetUnavailableError, match="standard library"):
        data.load("python_docs")


# --- batches


def test_parts_follow_one_another():
    toy = alphabet(60)
    inputs, labels = windows(toy.validation(batch_size=2))
    # Characters 40 to 49, o p q r | s t u v, and the character after each.
    assert inputs == ["opqr", "stuv"] and labels == ["pqrs", "tuvw"]
    inputs, labels = windows(toy.test(batch_size=3))
    assert inputs == ["yzab", "cdef"] and labels == ["zabc", "defg"]
    assert toy.first_inputs(2).tolist() == [[66, 67, 68, 69], [70, 71, 72, 73]]


def test_an_epoch_has_windows_that_do_not_overlap():
    """They start at one of the first four characters, before the validation."""
    numbered = data.Text(
        alphabet(60).recipe, "".join(chr(32 + i) for i in range(60))
    )
    assert numbered.training_examples == 9  # (40 - 4) / 4
    assert numbered.steps_per_epoch(4) == 3
    epoch = numbered.train(batch_size=4, seed=0, epochs=1)
    assert [len(x) for x, _ in epoch.as_numpy_iterator()] == [4, 4, 1]
    begin, orders = set(), set()
    for inputs, labels in numbered.train(
        batch_size=9, seed=0, epochs=30
    ).as_numpy_iterator():
        places, following = inputs - 1, labels - 1  # indices of symbols
        np.testing.assert_array_equal(following, places + 1)
        assert (np.diff(places, axis=1) == 1).all()
        starts = sorted(places[:, 0])
        assert np.diff(starts).tolist() == [4] * 8
        assert following.max() < 40
        begin.add(starts[0])
        orders.add(tuple(np.argsort(places[:, 0])))
    assert begin == {0, 1, 2, 3}
    assert len(orders) > 25


def test_batches_depend_on_seed_and_epoch_alone():
    toy = alphabet(200)

    def of(**options):
        return windows(toy.train(batch_size=3, **options))[0]

    both = of(seed=1, epochs=2)
    assert of(seed=1, epochs=2, first_epoch=1) == both[len(both) // 2 :]
    assert of(seed=1, epochs=1) == both[: len(both) // 2]
    assert of(seed=2, epochs=2) != both
    assert both[: len(both) // 2] != both[len(both) // 2 :]


def test_an_epoch_of_some_windows():
    toy = alphabet(200, epoch_examples=5)
    assert toy.training_examples == 5
    assert toy.steps_per_epoch(2) == 3
    dataset = toy.train(batch_size=2, seed=0, epochs=2)
    assert [len(x) for x, _ in dataset.as_numpy_iterator()] == [2, 2, 1] * 2
    whole = alphabet(200).train(batch_size=5, seed=0, epochs=1)
    first = windows(whole)[0][:5]
    assert windows(dataset)[0][:5] == first
    assert alphabet(200, epoch_examples=10**6).training_examples == 44


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: alphabet(23), "too few are left for windows of 4"),
        (lambda: alphabet(60, context=0), "context must be an integer >= 1"),
        (lambda: alphabet(60, context=10), "longer than one example"),
        (lambda: alphabet(60, validation=3), "longer than one example"),
        (lambda: alphabet(60, epoch_examples=0), "epoch_examples must be"),
        (lambda: data.load("digits", context=4), "context is a setting of"),
        (
            lambda: alphabet(60).train(batch_size=1, seed=0, epochs=0),
            "epochs must be an integer",
        ),
        (
            lambda: alphabet(60, validation=0).validation(batch_size=1),
            "none are left",
        ),
        (lambda: alphabet(60).test(batch_size=0), "batch_size must be"),
        (lambda: optimizers.adamw(learning_rate=0.0), "learning_rate must be"),
        (lambda: optimizers.adamw(warmup_steps=-1), "warmup_steps must be"),
        (lambda: optimizers.adamw(final_fraction=2.0), "final_fraction must"),
        (lambda: optimizers.adamw(beta_2=1.0), "beta_2 must be in"),
        (lambda: optimizers.adamw(clip_norm=0.0), "clip_norm must be positive"),
        (lambda: optimizers.adamw(decay_steps=0), "decay_steps must be"),
        (lambda: optimizers.adamw(weight_decay=-0.1), "weight_decay must be"),
    ],
)
def test_nonsense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- AdamW


def test_rates_by_hand():
    rate = optimizers.adamw(
        learning_rate=0.4, warmup_steps=4, decay_steps=8, final_fraction=0.1
    )._learning_rate
    wanted = {0: 0.0, 1: 0.1, 4: 0.4, 8: 0.4 * 0.55, 12: 0.04, 99: 0.04}
    for step, value in wanted.items():
        assert float(rate(step)) == pytest.approx(value), step
    longer = optimizers.adamw(
        learning_rate=0.4, warmup_steps=4, decay_steps=8, length=2
    )._learning_rate
    assert float(longer(12)) == pytest.approx(0.4 * 0.55)
    at_once = optimizers.adamw(learning_rate=0.4, warmup_steps=0)._learning_rate
    assert float(at_once(0)) == pytest.approx(0.4)


def test_kernels_alone_decay_and_masks_hold():
    """With zero gradients, a step is only the decay: 1 - 0.1 x 0.5."""
    model = rigl_keras.sparsify(rigl_keras.models.gpt(97, 4, 1, 8, 2), 0.5)
    for variable in model.trainable_variables:
        variable.assign_add(tf.ones(variable.shape))
    before = {v.path: v.numpy() for v in model.trainable_variables}
    optimizer = optimizers.adamw(
        learning_rate=0.1, warmup_steps=0, weight_decay=0.5
    )
    optimizer.apply(
        [tf.zeros(v.shape) for v in model.trainable_variables],
        model.trainable_variables,
    )
    masks = {
        masked.kernel.path: masked.mask.numpy()
        for masked in rigl_keras.masked_layers(model)
    }
    assert len(masks) == 7
    for variable in model.trainable_variables:
        kept = masks.get(variable.path)
        wanted = before[variable.path]
        if kept is not None:
            wanted = wanted * 0.95 * kept
        np.testing.assert_allclose(variable.numpy(), wanted, rtol=1e-5)


def test_gradients_are_clipped_by_their_norm_together():
    """Adam ignores a common scale, so the first means are compared."""
    one, two = (keras.Variable(np.zeros(2, np.float32)) for _ in range(2))
    optimizer = optimizers.adamw(clip_norm=1.0, warmup_steps=0, beta_1=0.9)
    gradients = [tf.constant([3.0, 0.0]), tf.constant([0.0, 4.0])]
    optimizer.apply(gradients, [one, two])
    means = [v.numpy() for v in optimizer.variables if "momentum" in v.path]
    np.testing.assert_allclose(means[0], [0.1 * 3 / 5, 0.0], rtol=1e-5)
    np.testing.assert_allclose(means[1], [0.0, 0.1 * 4 / 5], rtol=1e-5)


# --- runs

TINY = ["gin/rigl_gpt.gin", "gin/presets/tiny_gpt.gin"]
# Three epochs of 25 steps, with dropout so that its state matters.
SHORT = [
    "train.epoch_examples = 1600",
    "train.batch_size = 64",
    "train.epochs = 3",
    "train.validation = 4096",
    "gpt.layers = 1",
    "gpt.dropout = 0.1",
    "UPDATE_FREQUENCY = 10",
    "UPDATE_END = 60",
    "train.diagnostics = False",
]


def short_run(run_dir, *more, **options):
    return train_command.run(
        TINY, bindings=[*SHORT, *more], run_dir=run_dir, **options
    )


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    result = short_run(run_dir)
    gin.clear_config()
    return run_dir, result


def metrics(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_a_run_says_of_a_text(straight):
    run_dir, result = straight
    assert (result["method"], result["model"]) == ("RigL", "gpt")
    assert result["dataset"] == "python_docs"
    assert result["density"] == pytest.approx(0.1, rel=0.01)
    assert result["steps"] == 75
    assert result["settings"]["epoch_examples"] == 1600
    for split in ("test", "validation"):
        loss = result[f"{split}_loss"]
        assert result[f"{split}_perplexity"] == pytest.approx(math.exp(loss))
        assert result[f"{split}_bits_per_character"] == pytest.approx(
            loss / math.log(2)
        )
        assert 0 < result[f"{split}_accuracy"] < 1
    assert result["text"] == data.load("python_docs").about
    assert result["text"]["characters"] == len(text.python_docs())
    table = train_command.table(result)
    assert "bits per character, perplexity" in table
    # Attention has costs without kernels, which do not depend on density.
    assert 0.12 < result["inference_flops_ratio"] < 0.25
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == ["25", "50", "75"]
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"]) < 4.0


@pytest.mark.slow
def test_a_run_on_text_resumes_exactly(straight, tmp_path):
    """After an interruption in the second epoch, it ends the same."""
    run_dir = tmp_path / "run"
    write = RunDirectory.write_metrics

    def stop(run, rows):
        write(run, rows)
        if len(rows) == 2:
            raise Interrupted  # before the checkpoint of this epoch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "write_metrics", stop)
        with pytest.raises(Interrupted):
            short_run(run_dir)
    gin.clear_config()
    result = short_run(run_dir, resume=True)
    for old, new in zip(
        keras.models.load_model(straight[0] / "model.keras").get_weights(),
        keras.models.load_model(run_dir / "model.keras").get_weights(),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    assert result["test_loss"] == straight[1]["test_loss"]
    losses = [
        [row["loss"] for row in metrics(d)] for d in (run_dir, straight[0])
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_it_learns_more_than_how_often_characters_are_there(tmp_path):
    result = train_command.run(TINY, run_dir=tmp_path / "run")
    shares = np.bincount(text.encoded(text.python_docs()), minlength=97)
    shares = shares / shares.sum()
    unigram = -(shares * np.log(shares)).sum()
    assert 3.2 < unigram < 3.4
    assert result["validation_loss"] < unigram - 0.7
    assert result["test_loss"] < unigram - 0.7


def test_models_and_data_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="vocabulary and context, such as gpt"):
        train_command.run(
            bindings=["train.dataset = 'python_docs'"], run_dir=tmp_path / "a"
        )
    with pytest.raises(ValueError, match="num_classes and input_shape, such"):
        train_command.run(
            bindings=["train.model = @gpt"], run_dir=tmp_path / "b"
        )
    with pytest.raises(ValueError, match="context is a setting of texts"):
        train_command.run(
            bindings=["train.context = 8"], run_dir=tmp_path / "c"
        )


# --- plans


@pytest.mark.parametrize("row", ["dense_gpt", "static_gpt", "rigl_gpt"])
def test_planned_costs_are_those_of_count(row):
    density = None if row.startswith("dense") else 0.1
    plans.Run(row, plans.Preset("tiny_gpt"), density, seed=0).configure()
    cost = costs.planned()
    model = rigl_keras.models.gpt(97, 16, 2, 32, 4)
    whole = rigl_keras.count(model)
    if density:
        model = rigl_keras.sparsify(model, density)
    counted = rigl_keras.count(model)
    assert cost.inference_flops == pytest.approx(
        counted.inference_flops, rel=5e-3
    )
    assert cost.dense_flops == whole.dense_inference_flops
    examples = data.load("python_docs", context=16).training_examples
    assert cost.samples == examples
    assert cost.steps == math.ceil(examples / 256)


@pytest.mark.slow
def test_a_step_is_measured():
    plans.Run("rigl_gpt", plans.Preset("tiny_gpt"), 0.1, seed=0).configure()
    assert 0 < costs.seconds_of_step(costs.planned().step) < 60
