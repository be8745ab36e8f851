"""Random calls of public functions, a third with wrong arguments.

There are 10,000 with `--every-combination`, and a third of them with `--all`.
Each call returns a correct result, which the case checks, or raises an error
that shows the received value.
"""

import inspect
import math

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import hostile_masks, hostile_numbers
from support.hostile import (
    HOSTILE,
    RAMP,
    check_error,
    mixed,
    names,
    part,
    presets,
)

import rigl_keras
from rigl_keras import flops, schedules
from rigl_keras.conventions import ORIGINAL, REPORT, Conventions
from rigl_keras.methods import one_shot
from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.methods.rigl import SET, SNFS, RigL

# Conventions and methods.

FIELDS = {
    name: st.sampled_from([getattr(ORIGINAL, name), getattr(REPORT, name)])
    for name in inspect.signature(Conventions).parameters
}


def check_conventions(got, **fields):
    for name, value in fields.items():
        assert getattr(got, name) == value
        assert isinstance(getattr(got, name), (str, bool, int))


METHOD = dict(
    frequency=st.integers(1, 99),
    drop_fraction=part,
    begin_step=st.integers(0, 50),
    end_step=st.none() | st.integers(50, 999),
    decay=st.sampled_from(schedules.DECAYS),
    decay_power=st.floats(0.1, 9),
    final_drop_fraction=st.just(0.0),
    redistribution=st.sampled_from([None, "gradient", "momentum"]),
    gradient_batches=st.just(1),
    grow_init=st.sampled_from(["zeros", "random_normal", "initial_dist"]),
    grow_divisor=st.just(1.0),
    seed=st.integers(0, 2**32 - 1),
    conventions=presets,
)


def check_method(got, **arguments):
    config = got.get_config()
    assert config.keys() == arguments.keys()
    for name, value in arguments.items():
        kept = config[name]
        if name != "conventions":
            assert kept == value or kept == float(value)
            assert isinstance(kept, (str, int, float, type(None)))
            assert not isinstance(kept, (bool, np.generic))
    assert type(got)(**config).get_config() == config
    assert 0 < config["frequency"] and 0 <= config["drop_fraction"] <= 1
    assert (
        config["end_step"] is None or config["begin_step"] <= config["end_step"]
    )


def check_pruning(got, schedule, scope, conventions):
    assert callable(got.schedule) and got.scope in ("global", "layer")


# Costs.

METHODS = st.sampled_from(
    ["dense", "static", "SET", "RigL", "rigl_sg", "SNFS", "small-dense", "snip"]
)


def check_training_flops(got, method, sparse_flops, dense_flops, frequency):
    assert type(got) is float and math.isfinite(got)
    assert 0 <= got <= 3 * max(sparse_flops, dense_flops) * (1 + 1e-9)


def tiny():
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, name="a"),
            keras.layers.Dense(3, name="b"),
        ]
    )


keras.utils.set_random_seed(0)
MODEL = tiny()  # 24 and 18 weights
COST = flops.count(MODEL)
BATCH = (
    np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32),
    np.arange(8) % 3,
)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

rows = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.dictionaries(st.sampled_from("ab"), st.integers(0, 24)),
    ),
    min_size=1,
    max_size=3,
).map(lambda rows: sorted(rows, key=lambda row: row[0]))


def check_curve(got, cost, trajectory, steps, dense_gradients):
    inference, training = got
    assert inference.shape == training.shape == (int(steps),)
    assert (0 <= inference).all()
    assert (inference <= COST.dense_inference_flops).all()
    assert (training >= 2 * inference).all()


def check_snip(got, model, density, batch, loss, scope, densities, seed):
    masks = rigl_keras.masked_layers(got).masks
    ones = sum(int(mask.sum()) for mask in masks.values())
    assert ones == round(float(density) * 42)
    assert all(set(np.unique(mask)) <= {0, 1} for mask in masks.values())


def check_sparsified(got, model, density, densities, granularity, **options):
    masks = rigl_keras.masked_layers(got).masks
    size = sum(mask.size for mask in masks.values())
    ones = sum(int(mask.sum()) for mask in masks.values())
    assert ones == round(float(density) * size)
    for m in rigl_keras.masked_layers(got):
        mask = m.mask.numpy()
        assert set(np.unique(mask)) <= {0, 1}
        assert not m.kernel.numpy()[mask == 0].any()


def check_with_masks(got, model, masks, granularity, seed):
    found = rigl_keras.masked_layers(got).masks
    assert set(found) == set(masks)
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, masks[name])


def check_stripped(got, model):
    assert not rigl_keras.masked_layers(got)


def check_table(got, model):
    assert (len(got), "not masked" in str(got)) in ((0, True), (2, False))


def check_cost(got, model, convention):
    assert got.inference_flops <= got.dense_inference_flops
    assert got.nonzeros <= got.parameters == 42 + 9


MASKED = rigl_keras.sparsify(MODEL, 0.5)
MASKS = rigl_keras.masked_layers(MASKED).masks

CASES = {
    **hostile_numbers.CASES,
    **hostile_masks.CASES,
    "Conventions": (Conventions, mixed(**FIELDS), check_conventions, 300),
    "RigL": (RigL, mixed(**METHOD), check_method, 200),
    "SET": (SET, mixed(**METHOD), check_method, 100),
    "SNFS": (SNFS, mixed(**METHOD), check_method, 100),
    "MagnitudePruning": (
        MagnitudePruning,
        mixed(
            schedule=st.just(RAMP),
            scope=st.sampled_from(["global", "layer"]),
            conventions=presets,
        ),
        check_pruning,
        100,
    ),
    "training_flops": (
        flops.training_flops,
        mixed(
            method=METHODS,
            sparse_flops=st.floats(0, 10),
            dense_flops=st.floats(0, 10),
            frequency=st.integers(1, 99),
        ),
        check_training_flops,
        300,
    ),
    "training_curve": (
        flops.training_curve,
        mixed(
            cost=st.just(COST),
            trajectory=rows,
            steps=st.integers(1, 60),
            dense_gradients=st.sampled_from(["never", "updates", "always"]),
        ),
        check_curve,
        300,
    ),
    "snip": (
        one_shot.snip,
        mixed(
            model=st.just(MODEL),
            density=st.floats(0.4, 1.0),
            batch=st.just(BATCH),
            loss=st.just(LOSS),
            scope=st.just("global"),
            densities=st.none(),
            seed=st.integers(0, 2**32),
        ),
        check_snip,
        60,
    ),
    "sparsify": (
        rigl_keras.sparsify,
        mixed(
            model=st.just(MODEL),
            density=st.floats(0.3, 1.0),
            distribution=names,
            densities=st.none() | st.just({"a": 0.9}),
            layers=st.none() | st.just(keras.layers.Dense),
            granularity=st.just("element"),
            kernels=st.none(),
            product=st.just("auto"),
            scale_to_fan_in=st.booleans(),
            seed=st.integers(0, 2**32),
            conventions=st.just(ORIGINAL),
            strict=st.booleans(),
        ),
        check_sparsified,
        150,
    ),
    "with_masks": (
        rigl_keras.with_masks,
        mixed(
            model=st.just(MODEL),
            masks=st.just(MASKS)
            | st.just({"a": np.full((4, 6), 0.5)})
            | st.just({"b": HOSTILE}),
            granularity=st.sampled_from(["element", "kernel"]),
            seed=st.integers(0, 2**32),
        ),
        check_with_masks,
        100,
    ),
    "strip": (
        rigl_keras.strip,
        mixed(model=st.sampled_from([MODEL, MASKED])),
        check_stripped,
        60,
    ),
    "masked_layers": (
        rigl_keras.masked_layers,
        mixed(model=st.sampled_from([MODEL, MASKED])),
        check_table,
        60,
    ),
    "count": (
        rigl_keras.count,
        mixed(
            model=st.sampled_from([MODEL, MASKED]),
            convention=st.sampled_from(flops.CONVENTIONS),
        ),
        check_cost,
        80,
    ),
}


def test_there_are_ten_thousand_calls():
    assert sum(calls for *_, calls in CASES.values()) >= 10_000


@pytest.mark.filterwarnings("ignore:SNIP keeps no connection")
@pytest.mark.filterwarnings("ignore:At density.* no connection is left")
@pytest.mark.parametrize("name", CASES)
def test_hostile(name, request):
    function, arguments, check, calls = CASES[name]
    if not request.config.option.every_combination:
        calls = max(calls // (3 if request.config.option.all else 12), 24)
    made, refused = [], []

    @settings(
        max_examples=calls,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(arguments)
    def attempt(arguments):
        made.append(name)
        try:
            result = function(**arguments)
        except (TypeError, ValueError) as error:
            refused.append(name)
            check_error(error, arguments)
        else:
            check(result, **arguments)

    attempt()
    assert len(made) >= calls
    # Some calls are refused, but not all.
    assert 0.02 * calls < len(refused) < 0.98 * calls
