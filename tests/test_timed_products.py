"""With `product="auto"`, products are timed, and choices are remembered."""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import random
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.small_models import compiled, examples, small_model
from support.small_products import chosen, losses_of, needs_library, small

from rigl_keras import _timing
from rigl_keras.kernels import choice, layer_products, library
from rigl_keras.kernels.choice import Choice
from rigl_keras.kernels.problems import Problem, Recurrence
from rigl_keras.masking.masked import Masked
from rigl_keras.masking.masked_layers import choose_kernels, masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.methods.rigl import RigL


@pytest.fixture
def loaded():
    if library.load() is None:
        pytest.skip(f"no sparse kernels: {library.unavailable()}")


@pytest.fixture
def unavailable(monkeypatch):
    monkeypatch.setattr(library, "_module", None)
    monkeypatch.setattr(library, "_reason", "there is no compiler")


# The faster product.

BIG = Problem((3, 3, 16, 16), (16, 12, 12))


def big_model(**options):
    keras.utils.set_random_seed(0)
    dense = keras.Sequential(
        [
            keras.Input((12, 12, 16)),
            layers.Conv2D(16, 3, padding="same", name="big"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, name="head"),
        ],
        name="net",  # masks are drawn from it
    )
    return compiled(sparsify(dense, 0.1, **options))


def big_examples():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((32, 12, 12, 16)).astype(np.float32)
    return x, draw.integers(0, 3, 32)


@pytest.fixture
def cache(tmp_path, monkeypatch, timed_kernels, loaded):
    """Returns an empty cache of choices for this test."""
    path = tmp_path / "choices.json"
    monkeypatch.setattr(choice, "_path", lambda: path)
    monkeypatch.setattr(choice, "_known", {})
    return path


@pytest.fixture
def forgotten(monkeypatch):
    """Returns a function that clears what this process remembers."""
    return lambda: monkeypatch.setattr(choice, "_known", {})


@pytest.fixture
def timings(monkeypatch):
    """Records the problems that are timed, and sets their times."""
    timed = []

    def seconds(problem, density, backward, in_lanes):
        assert backward
        timed.append((problem, density))
        return 3.0, 2.0, False

    monkeypatch.setattr(choice, "_seconds", seconds)
    return timed


def test_timed_once_and_kept(cache, forgotten, monkeypatch):
    monkeypatch.setattr(_timing, "_QUIET", math.inf)  # on a busy machine too
    model = big_model()
    choose_kernels(model, batch_size=16)
    big = model.get_layer("big")
    ((shape, found),) = big.chosen_products().items()
    assert shape == (16, 12, 12, 16)
    assert found.batch == 16
    assert 0 < found.sparse_seconds < 1
    assert 0 < found.dense_seconds < 1
    assert found.sparse == (found.sparse_seconds <= 1.05 * found.dense_seconds)
    assert re.fullmatch(r"\d+\.\dx at batch 16", found.reason)
    kind = "sparse" if found.sparse else "dense"
    assert f"{kind}: {found.reason}" in str(masked_layers(model))
    assert "dense: density above 0.75" in str(masked_layers(model))
    ((key, kept),) = json.loads(cache.read_text()).items()
    assert kept == [found.dense_seconds, found.sparse_seconds, 16]
    for part in ("3x3x16x16", "16x12x12", "SAME"):
        assert part in key.split()

    def fail(*_):
        raise AssertionError("It is timed again.")

    monkeypatch.setattr(choice, "_seconds", fail)
    assert choice.choose(BIG, big.density) == found
    forgotten()
    assert choice.choose(BIG, big.density) == found


def test_auto_trains(cache, timings):
    """Products are timed when the step is traced."""
    losses = []
    for product in ("auto", "dense"):
        model = big_model(product=product)
        method = RigL(frequency=2, end_step=9)
        losses.append(losses_of(model, big_examples(), [method], epochs=3))
        if product == "auto":
            assert chosen(model) == {"big": True, "head": False}
            assert "sparse: 1.5x at batch 16" in str(masked_layers(model))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert len(timings) == 1
    assert timings[0][0] == BIG


def test_a_change_in_training_shows_after_an_evaluation(monkeypatch):
    """Training uses lanes and evaluation does not, with separate choices."""
    wins = True
    monkeypatch.setattr(
        layer_products,
        "faster_product",
        lambda *_, in_lanes, **_options: Choice(in_lanes and wins, "a test"),
    )
    layer = layers.Conv2D(4, 3)
    layer.build((None, 8, 8, 3))
    choices = layer_products.ProductChoices(layer, "auto")
    shape = tf.TensorShape((5, 8, 8, 3))
    mask = keras.Variable(np.ones((3, 3, 3, 4), bool), trainable=False)
    assert choices.choose(shape, [mask], in_lanes=True).sparse
    assert not choices.choose(shape, [mask]).sparse
    assert choices.by_shape == {(5, 8, 8, 3): Choice(False, "a test")}
    assert not choices.changes()
    wins = False
    assert choices.changes()
    assert not choices.changes()


def test_batches_of_any_size_are_timed_at_128(cache, timings):
    layer = big_model().get_layer("big")
    layer.choose_product(tf.TensorShape((None, 12, 12, 16)))
    assert [problem.images for problem, _ in timings] == [(128, 12, 12)]


def test_a_dense_layer_is_timed_as_a_matrix(cache, timings):
    layer = Masked(layers.Dense(500))
    layer.build((None, 7, 400))
    layer.assign_mask(np.arange(200_000).reshape(400, 500) % 50 == 0)
    layer.choose_product(tf.TensorShape((3, 7, 400)))
    (found,) = timings
    problem = Problem((1, 1, 400, 500), (21, 1, 1), matrix=True)
    assert found == (problem, 0.02)


@needs_library
def test_timing_many_kinds_of_layers_is_no_retracing_to_tensorflow(caplog):
    for size in range(1, 7):
        problem = Problem((1, 1, size, 1), (1, 1, 1), matrix=True)
        for side in problem.sides(1.0, backward=False, in_lanes=False).values():
            side()
    assert "retracing" not in caplog.text


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "{",
        "[]",
        "3",
        '{"a": 3}',
        '{"a": [1, 2]}',
        '{"a": [1, "2", 3]}',
        '{"a": [1, 0, 3]}',
        '{"a": null}',
        '{"a": [-1, 2, 3]}',
        '{"a": [1, NaN, 3]}',
        b"\xff\xfe\x00",
        b"[" * 200_000,
    ],
)
def test_a_damaged_cache_is_written_anew(cache, timings, damaged):
    if isinstance(damaged, str):
        damaged = damaged.encode()
    cache.write_bytes(damaged)
    found = choice.choose(BIG, 0.1)
    assert (found.sparse, found.reason) == (True, "1.5x at batch 16")
    assert len(timings) == 1
    assert list(json.loads(cache.read_text()).values()) == [[3, 2, 16]]


def test_choices_of_others_are_kept(cache, timings, forgotten):
    choice.choose(BIG, 0.1)
    forgotten()
    choice.choose(dataclasses.replace(BIG, kernel=(3, 3, 16, 17)), 0.1)
    assert len(timings) == 2
    assert len(json.loads(cache.read_text())) == 2


def test_a_cache_that_cannot_be_written(cache, timings, monkeypatch):
    monkeypatch.setattr(choice, "_path", lambda: cache / "no" / "folder")
    for _ in range(2):
        assert choice.choose(BIG, 0.1).sparse
    assert len(timings) == 1


def test_what_the_choice_depends_on(cache, timings, monkeypatch):
    for problem in (
        BIG,
        dataclasses.replace(BIG, strides=(2, 1)),
        dataclasses.replace(BIG, padding="VALID"),
        dataclasses.replace(BIG, dilations=(2, 2)),
        dataclasses.replace(BIG, images=(17, 12, 12)),
        dataclasses.replace(BIG, kernel=(3, 3, 16, 17)),
    ):
        for density in (0.09, 0.1, 0.076):  # in one range
            choice.choose(problem, density)
    assert len(timings) == 6
    assert {density for _, density in timings} == {0.1}
    choice.choose(BIG, 0.11)
    assert len(timings) == 7
    assert timings[-1] == (BIG, 0.15)
    # Another machine with the same home folder, and another program.
    for name in ("dense_library", "_processor", "_cores", "_program"):
        before = len(timings)
        monkeypatch.setattr(choice, name, lambda: "another")
        choice.choose(BIG, 0.11)
        assert len(timings) == before + 1, name
    assert len(json.loads(cache.read_text())) == len(timings)


def test_what_a_machine_and_a_program_are():
    name = choice._processor()
    assert name and len(name.split()) == 1
    assert 1 <= choice._cores() <= os.cpu_count()
    assert re.fullmatch("[0-9a-f]{12}", choice._program())


def test_it_is_said_once_what_takes_its_time(cache, timings, caplog):
    choice._announce.cache_clear()
    choice.choose(BIG, 0.1)
    choice.choose(BIG, 0.2)
    assert len(timings) == 2
    assert caplog.text.count("Timing dense and sparse products") == 1


def test_several_threads_time_once(cache, timings):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: choice.choose(BIG, 0.1), range(8)))
    assert len(timings) == 1
    assert len(set(found)) == 1


def test_images_that_do_not_fit_are_timed_in_smaller_batches(cache, timings):
    huge = dataclasses.replace(BIG, images=(1000, 512, 512))
    assert choice.choose(huge, 0.1).batch == 16
    assert timings[0][0].images == (16, 512, 512)


@pytest.mark.parametrize(
    "dense, sparse, wins",
    [(2, 1, True), (1, 1, True), (1, 1.04, True), (1, 1.06, False)],
)
def test_a_near_tie_goes_to_the_fewer_flops(dense, sparse, wins):
    found = Choice.timed(dense, sparse, 8)
    assert found.sparse == wins
    assert found.reason == f"{dense / sparse:.1f}x at batch 8"


def test_what_a_busy_machine_takes_is_not_kept(cache, forgotten, monkeypatch):
    times = iter([(3.0, 2.0, True), (2.0, 3.0, False)])
    monkeypatch.setattr(choice, "_seconds", lambda *_: next(times))
    found = choice.choose(BIG, 0.1)
    assert found.reason == "1.5x at batch 16, on a busy machine"
    assert choice.choose(BIG, 0.1) == found  # this process remembers it
    assert not cache.exists()
    forgotten()
    assert choice.choose(BIG, 0.1) == Choice.timed(2.0, 3.0, 16)
    assert list(json.loads(cache.read_text()).values()) == [[2, 3, 16]]


def test_kept_choices_can_be_forgotten(cache, timings):
    for density in (0.1, 0.2):
        choice.choose(BIG, density)
    assert choice.forget() == 2
    assert not cache.exists()
    choice.choose(BIG, 0.1)
    assert len(timings) == 3
    assert choice.forget() == 1
    assert choice.forget() == 0


@pytest.mark.parametrize(
    "problem",
    [
        dataclasses.replace(BIG, dilations=(2, 2)),
        dataclasses.replace(BIG, strides=(1, 2), images=(32, 12, 12)),
        dataclasses.replace(BIG, kernel=(3, 3, 8, 16), groups=2),
        Problem((1, 1, 400, 500), (16, 1, 1), matrix=True),
        Recurrence("lstm", (16, 6, 32), 64),
        Recurrence("gru", (16, 6, 64), 64, projected=True, returns=True),
    ],
)
def test_what_else_is_timed(cache, problem):
    before = random.getstate()
    found = choice.choose(problem, 0.1)
    assert 0 < found.sparse_seconds < 1
    assert 0 < found.dense_seconds < math.inf
    assert random.getstate() == before  # the user's generator


def plans_made(*, backward, density, traced):
    """Returns the number of plans that a timing makes."""
    count = library.load().rigl_keras_plans_made
    before = int(count())

    def ask():
        choice.choose(BIG, density, backward=backward)

    if traced:
        with tf.GradientTape():
            tf.function(ask, autograph=False)()
    else:
        ask()
    return int(count()) - before


@needs_library
@pytest.mark.parametrize("traced", [False, True])
def test_gradients_are_timed_as_well(cache, traced):
    """Each of three passes has its own plan; one call is eager."""
    made = functools.partial(plans_made, traced=traced)
    assert made(backward=False, density=0.1) == 2
    assert made(backward=True, density=0.2) == 4


@pytest.fixture
def not_loaded(monkeypatch, timed_kernels):
    def fail():
        raise AssertionError("The library is loaded.")

    monkeypatch.setattr(library, "load", fail)
    monkeypatch.setattr(choice, "_known", {})


def test_dense_without_loading_anything(not_loaded):
    found = choice.choose(BIG, 0.76)
    assert found == Choice(False, "density above 0.75")
    with pytest.raises(AssertionError, match="is loaded"):
        choice.choose(BIG, 0.5)
    tiny = Problem((3, 3, 3, 8), (128, 8, 8))
    assert choice.choose(tiny, 0.1) == Choice(False, "too small to matter")


@pytest.mark.slow
def test_models_that_are_dense_or_small_load_nothing(not_loaded):
    model = small("auto")
    model.fit(*examples(), batch_size=16, verbose=0)
    assert "sparse" not in str(masked_layers(model))
    model = compiled(
        sparsify(small_model(), 0.2, product="dense"),
    )
    model.fit(*examples(), batch_size=16, verbose=0)


def test_images_of_any_size_are_dense(not_loaded):
    inputs = keras.Input((None, None, 16))
    outputs = layers.Conv2D(16, 3, name="big")(inputs)
    model = sparsify(keras.Model(inputs, outputs), 0.1)
    tf.function(model)(tf.zeros((1, 9, 9, 16)))  # a known shape
    traced = tf.function(
        model, input_signature=[tf.TensorSpec([None, None, None, 16])]
    )
    traced(tf.zeros((1, 9, 9, 16)))
    assert "dense: images of any size" in str(masked_layers(model))


# Without a library.


@pytest.mark.slow
@pytest.mark.parametrize("product", ["auto", "sparse"])
def test_without_a_library_as_before(unavailable, timed_kernels, product):
    losses = []
    for each in (product, "dense"):
        model = big_model(product=each)
        method = RigL(frequency=2, end_step=9)
        losses.append(losses_of(model, big_examples(), [method], epochs=3))
        if each == product:
            table = str(masked_layers(model))
            assert "dense: there is no compiler" in table
            assert not any(chosen(model).values())
    assert losses[0] == losses[1]
