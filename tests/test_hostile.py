"""Random calls of public functions, a third with wrong arguments.

There are 10,000 with `--every-combination`, and a third of them with `--all`.
Each call returns a correct result, which the case checks, or raises an error
that shows the received value.
"""

import decimal
import fractions
import inspect
import math
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rigl_keras
from rigl_keras import (
    distributions,
    flops,
    redistribution,
    schedules,
    scores,
    topology,
)
from rigl_keras.conventions import ORIGINAL, REPORT, Conventions
from rigl_keras.methods import one_shot
from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.methods.rigl import SET, SNFS, RigL
from rigl_keras.schedules import SparsityRamp

PACKAGE = pathlib.Path(rigl_keras.__file__).parent
NAN, INF = math.nan, math.inf

SCALARS = [
    None, True, False, "", "abc", b"x", NAN, INF, -INF, -0.0, 0, -1, 2, 3.7,
    0.5, 10**400, -(10**30), 2**63, 1e-320, 1e308, 1j, fractions.Fraction(1, 3),
    decimal.Decimal("0.5"), np.int64(3), np.int8(-1), np.uint64(2**63),
    np.float32(0.5), np.float16(NAN), np.bool_(True), np.str_("er"),
]  # fmt: skip
OBJECTS = [
    [], (), {}, set(), [1], [None], [[1, 2], [3]], {"a": 1}, {1: NAN}, int,
    object(), len, range(3), np.array(0.5), np.array([0.5, 2.0]),
    np.array([[1, 0], [0, 1]]), np.array([]), np.array(["a"]),
    np.array([None]), np.array([1j]), tf.constant(3), tf.constant([1, 2]),
    tf.constant("a"), tf.constant(True), tf.constant(NAN),
    tf.constant(0.5, tf.float16), tf.zeros([2, 0]), tf.constant([1j]),
    tf.ragged.constant([[1], [2, 3]]), tf.Variable(1.0),
]  # fmt: skip
HOSTILE = st.sampled_from(SCALARS + OBJECTS)


def mixed(**valid):
    """Returns a strategy of arguments that are sometimes hostile."""

    @st.composite
    def arguments(draw):
        return {
            name: draw(
                HOSTILE if draw(st.integers(0, 2 * len(valid))) == 1 else values
            )
            for name, values in valid.items()
        }

    return arguments()


def check_error(error, arguments):
    """Checks that an error of this package shows the received value."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = pathlib.Path(trace.tb_frame.f_code.co_filename)
    ours = file.is_relative_to(PACKAGE)
    if ours and isinstance(error, ValueError):
        message = str(error)
        # For plain values, the value itself.
        assert not arguments or any(
            text.lower() in message.lower()
            for value in leaves(arguments)
            for text in (repr(value), str(value))
        ), message


def leaves(values):
    """Yields the texts by which a message may show arguments."""
    for value in values.values() if isinstance(values, dict) else values:
        yield value
        yield type(value).__name__
        if isinstance(value, float):
            yield f"{value:g}"  # as an array shows it
        if isinstance(value, (dict, list, tuple, range, set)):
            yield from leaves(value)
        if isinstance(value, dict):
            yield from value
        if tf.is_tensor(value) or isinstance(value, np.ndarray):
            yield value.shape
            yield tf.as_dtype(value.dtype).name if value.dtype != object else ""
            if tf.is_tensor(value) and value.dtype.is_floating:
                yield from np.ravel(value.numpy()).tolist()
            if isinstance(value, np.ndarray):
                yield from np.ravel(value).tolist()


# Shapes, densities, counts.

shapes = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    min_size=1,
)
share = st.floats(0.001, 1.0)
presets = st.sampled_from([ORIGINAL, REPORT])
# Some devices flush subnormal numbers to zero.
part = st.floats(0, 1, allow_subnormal=False)
names = st.sampled_from(
    ["uniform", "er", "erk", "erdos_renyi", "erdos_renyi_kernel"]
)
given_densities = st.none() | st.dictionaries(
    st.sampled_from("abcd"), share, max_size=2
)


def sizes_of(shapes):
    return {name: math.prod(map(int, shape)) for name, shape in shapes.items()}


def check_densities(got, shapes, density, distribution, conventions, densities):
    assert list(got) == list(shapes)
    assert all(type(d) is float and 0 <= d <= 1 for d in got.values())
    sizes = sizes_of(shapes)
    if densities:
        assert all(got[name] == float(d) for name, d in densities.items())
    first, *others = got
    if distribution == "uniform" and first not in (densities or {}):
        assert got[first] == 1
        kept = sum(got[n] * sizes[n] for n in others)
        wanted = float(density) * sum(sizes[n] for n in others)
    else:
        kept = sum(got[n] * sizes[n] for n in got)
        wanted = float(density) * sum(sizes.values())
    # Each layer rounds; the reproduction truncates twice.
    assert kept == pytest.approx(wanted, abs=2 * len(sizes) + 1)


def check_budgets(got, shapes, density, group_sizes, **options):
    assert set(got) <= set(shapes)
    sizes = {name: math.prod(shapes[name]) for name in got}
    assert all(0 <= got[name].count <= sizes[name] for name in got)
    kept = sum(budget.count for budget in got.values())
    assert kept == round(float(density) * sum(sizes.values()))


def check_masked_shapes(got, shapes, distribution, densities):
    first, *others = shapes
    free = distribution == "uniform" and first not in (densities or {})
    assert list(got) == (others if free else [first, *others])


def check_total(got, exact, density, weights):
    assert got == round(exact) and 1 <= got <= weights


def check_counts(got, sizes, densities, total):
    assert sum(got.values()) == total and list(got) == list(sizes)
    for name, count in got.items():
        assert type(count) is int and 0 <= count <= sizes[name]


# Schedules.

step = st.integers(0, 300) | st.integers(0, 300).map(
    lambda t: tf.constant(t, tf.int64)
)
window = dict(
    frequency=st.integers(1, 40),
    begin_step=st.integers(0, 100),
    end_step=st.integers(0, 300),
    conventions=presets,
)


def is_due(t, frequency, begin_step, end_step, conventions):
    if conventions is REPORT:
        return t > 0 and (t + 1) % frequency == 0 and begin_step <= t < end_step
    return t > 0 and t % frequency == 0 and begin_step <= t <= end_step


def check_due(got, step, **window):
    # A vector of steps gives the same.
    for t, due in zip(np.ravel(step), np.ravel(got), strict=True):
        assert due == is_due(int(t), **window)


def check_planned(got, first_step, steps, **window):
    if steps < 1000:
        run = range(int(first_step), int(first_step) + int(steps))
        assert got == sum(is_due(t, **window) for t in run)


def check_last(got, end_step, conventions):
    assert got == end_step - (conventions is REPORT)


def check_fraction(got, drop_fraction, **_):
    assert got.dtype == tf.float64 and 0 <= float(got) <= drop_fraction


def check_ramp(ramp, **arguments):
    for t in (0, ramp.begin_step, ramp.end_step, ramp.end_step + 1):
        due, sparsity = ramp(t)
        assert 0 <= float(sparsity) < 1
        assert not due or ramp.begin_step <= t <= ramp.end_step
    assert bool(ramp(ramp.end_step)[0])
    want = 1 - float(arguments["final_density"])
    assert float(ramp.sparsity(ramp.end_step)) == pytest.approx(want)
    assert ramp.lengthened(2).end_step == 2 * ramp.end_step


def check_sparsity(got, schedule, step, conventions):
    due, sparsity = got
    assert 0 <= float(sparsity) < 1 and bool(due) in (True, False)


RAMP = SparsityRamp(final_density=0.1, begin_step=3, end_step=90, frequency=7)


# Masks.


@st.composite
def kernels(draw, *parts):
    """Draws arguments of one shape: masks ("mask") and scores ("scores")."""
    shape = draw(st.sampled_from([(6,), (2, 3), (1, 2, 4), (9,)]))
    size = math.prod(shape)
    values = st.sampled_from(
        [0.0, -0.0, 1.0, 1.0, -2.0, 3.5, 1e-30, -1e30, INF, -INF]
    )
    one = {
        "mask": st.lists(st.booleans(), min_size=size, max_size=size),
        "scores": st.lists(values, min_size=size, max_size=size),
    }
    return [
        np.reshape(
            np.array(draw(one[p]), np.float32 if p == "scores" else bool), shape
        )
        for p in parts
    ]


def of_one_shape(parts, **others):
    """Is like `mixed`, but some arguments share a shape."""

    @st.composite
    def arguments(draw):
        drawn = draw(kernels(*parts.values()))
        made = dict(zip(parts, drawn, strict=True))
        for name, part in parts.items():
            if part == "mask" and draw(st.booleans()):
                made[name] = made[name].astype(
                    draw(st.sampled_from(["int32", "float32", "uint8"]))
                )
            if draw(st.integers(0, 9)) == 1:
                made[name] = draw(HOSTILE)
            elif part == "scores" and draw(st.integers(0, 15)) == 0:
                made[name].flat[0] = NAN
        return {**made, **draw(mixed(**others))}

    return arguments()


def best(scores, count, among):
    """Returns the `count` highest among some; ties go to the lower index."""
    flat, among = np.ravel(scores).astype(np.float64), np.ravel(among)
    order = sorted(np.flatnonzero(among), key=lambda i: (-flat[i], i))
    chosen = np.zeros(flat.shape, bool)
    chosen[order[: int(count)]] = True
    return chosen.reshape(np.shape(scores))


def check_highest(got, scores, count, among):
    assert got.dtype == tf.bool
    assert (got.numpy() == best(scores, count, np.asarray(among) > 0)).all()


def rounded(n, fraction, conventions):
    exact = np.float64(n) * np.float64(float(fraction))
    round_it = math.ceil if conventions is REPORT else math.floor
    return round_it(exact)


def after_drop(active, scores, fraction, conventions):
    count = rounded(active.sum(), fraction, conventions)
    scores = np.asarray(scores, np.float64)
    if conventions is not REPORT:
        return active & ~best(-scores, count, active)
    ranked = np.where(active, scores, 0)
    count += (~active).sum()
    return active & ~best(-ranked, count, np.ones_like(active))


def after_growth(active, kept, scores, count, conventions):
    scores = np.asarray(scores, np.float64)
    if conventions is not REPORT:
        joined = best(scores, count, ~kept)
        return kept | joined, joined & ~active
    ranked = np.where(kept, 0, scores)
    joined = best(ranked, count, np.ones_like(kept))
    return kept | joined, joined


def check_drop(got, active, scores, drop_fraction, conventions):
    active = np.asarray(active) > 0
    want = after_drop(active, scores, drop_fraction, conventions)
    assert (got.numpy() == want).all()


def check_grow(got, active, kept, scores, count, conventions):
    active, kept = np.asarray(active) > 0, np.asarray(kept) > 0
    want = after_growth(active, kept, scores, count, conventions)
    for one, other in zip(got, want, strict=True):
        assert (one.numpy() == other).all()


def check_drop_and_grow(
    got, mask, drop_scores, grow_scores, drop_fraction, grow_count, conventions
):
    active = np.asarray(mask) > 0
    kept = after_drop(active, drop_scores, drop_fraction, conventions)
    if grow_count is None:
        grow_count = active.sum() - kept.sum()
    want = after_growth(active, kept, grow_scores, grow_count, conventions)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == np.asarray(mask).dtype
        assert (one.numpy() == other).all()


LAYERS = [np.eye(3, 4), np.array([1, 1, 0, 1])]
FIRST = [np.arange(12.0).reshape(3, 4), np.array([2.0, 1.0, 9.0, 1.0])]
SECOND = [1 / (1 + FIRST[0]), np.array([0.0, 5.0, 4.0, 3.0])]


def no_growth(dropped, free):
    return [0, 0]


def check_update(
    got, masks, drop_scores, grow_scores, drop_fraction, shares, grow_counts,
    conventions,
):  # fmt: skip
    if shares is not None and conventions is REPORT:
        return  # a layer may drop less
    layers = zip(masks, drop_scores, grow_scores, strict=True)
    for *moved, layer in zip(*got, layers, strict=True):
        count = None if grow_counts is None else 0
        check_drop_and_grow(moved, *layer, drop_fraction, count, conventions)


def check_drop_count(got, mask, drop_fraction, conventions):
    ones = np.count_nonzero(np.asarray(mask))
    assert int(got) == rounded(ones, drop_fraction, conventions) <= ones


def check_drop_fractions(got, masks, shares, drop_fraction, conventions):
    assert len(got) == len(masks)
    assert all(0 <= float(f) <= float(drop_fraction) for f in got)


# Scores and shares.

floats = st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4).map(
    lambda values: np.array(values, np.float32)
)
counts = st.lists(st.integers(0, 50), min_size=2, max_size=2)


def check_magnitude(got, **arguments):
    (values,) = arguments.values()
    with np.errstate(over="ignore"):
        values = np.asarray(values, got.dtype.as_numpy_dtype)
    np.testing.assert_array_equal(got, np.abs(values))
    assert not (np.asarray(got) < 0).any()


def check_saliency(got, kernel, gradient):
    # Some devices flush subnormal numbers to zero.
    want = np.abs(kernel * gradient)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-37)


def check_random(got, shape, key, step):
    assert got.shape == tuple(shape) and got.dtype == tf.float32
    assert (0 <= got.numpy()).all() and (got.numpy() < 1).all()
    again = scores.random(shape, key=key, step=step)
    assert (got.numpy() == again.numpy()).all()


def check_mean(got, statistic, mask):
    active = np.asarray(mask) > 0
    values = np.abs(np.asarray(statistic, np.float64))[active]
    assert float(got) == pytest.approx(values.mean() if values.size else 0)


def check_shares(got, values):
    assert got.shape == (len(values),) and (got.numpy() >= 0).all()
    assert float(tf.reduce_sum(got)) == pytest.approx(1)


def check_shares_of(got, kernels):
    check_shares(got, kernels)


def check_state(got, state, connections):
    assert got.shape == (4,) and float(got[2]) == state[2] + 1
    assert float(got[1]) == state[1] + state[3] - float(connections)


def check_grow_counts(got, shares, dropped, free, correction, conventions):
    assert (got.numpy() >= 0).all() and (got.numpy() <= free).all()
    if conventions is not REPORT:
        assert got.numpy().sum() == sum(dropped)


def check_corrected(got, correction, missing, mean_missing):
    want = 0.25 * float(correction) + 0.75 * float(missing)
    assert float(got) == pytest.approx(want + float(mean_missing))


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


def check_gathered(got, step, gradient_batches, frequency, **window):
    if not tf.is_tensor(step):
        due = [
            schedules.is_update_step(t, frequency=frequency, **window)
            for t in range(int(step), int(step) + int(gradient_batches))
        ]
        assert bool(got) == any(map(bool, due))


MASKED = rigl_keras.sparsify(MODEL, 0.5)
MASKS = rigl_keras.masked_layers(MASKED).masks

CASES = {
    # Name: the function, its arguments, a check, and the number of calls.
    "layer_densities": (
        distributions.layer_densities,
        mixed(
            shapes=shapes,
            density=share,
            distribution=names,
            conventions=presets,
            densities=given_densities,
        ),
        check_densities,
        1300,
    ),
    "layer_budgets": (
        distributions.layer_budgets,
        mixed(
            shapes=shapes,
            density=share,
            distribution=names,
            conventions=presets,
            densities=given_densities,
            group_sizes=st.none(),
        ),
        check_budgets,
        200,
    ),
    "masked_shapes": (
        distributions.masked_shapes,
        mixed(shapes=shapes, distribution=names, densities=given_densities),
        check_masked_shapes,
        300,
    ),
    "total_count": (
        distributions.total_count,
        mixed(
            exact=st.floats(0, 100),
            density=share,
            weights=st.integers(1, 100),
        ),
        check_total,
        300,
    ),
    "layer_counts": (
        distributions.layer_counts,
        mixed(
            sizes=st.fixed_dictionaries(
                dict(a=st.integers(1, 9), b=st.just(5))
            ),
            densities=st.fixed_dictionaries(dict(a=share, b=share)),
            total=st.integers(0, 14),
        ),
        check_counts,
        1000,
    ),
    "is_update_step": (
        schedules.is_update_step,
        mixed(step=step, **window),
        check_due,
        800,
    ),
    "last_update_step": (
        schedules.last_update_step,
        mixed(end_step=st.integers(0, 99), conventions=presets),
        check_last,
        300,
    ),
    "planned_updates": (
        schedules.planned_updates,
        mixed(
            first_step=st.integers(0, 99), steps=st.integers(0, 300), **window
        ),
        check_planned,
        800,
    ),
    "decayed_drop_fraction": (
        schedules.decayed_drop_fraction,
        mixed(
            step=step,
            drop_fraction=part,
            begin_step=st.integers(0, 100),
            end_step=st.integers(0, 300),
            decay=st.sampled_from(schedules.DECAYS),
            decay_power=st.floats(0.1, 9),
            final_drop_fraction=st.just(0.0),
            conventions=presets,
        ),
        check_fraction,
        500,
    ),
    "SparsityRamp": (
        SparsityRamp,
        mixed(
            final_density=st.floats(0.01, 0.5),
            begin_step=st.integers(0, 50),
            end_step=st.integers(51, 300),
            frequency=st.integers(1, 40),
            initial_density=st.floats(0.5, 1),
            power=st.floats(0.1, 9),
        ),
        check_ramp,
        500,
    ),
    "planned_sparsity": (
        schedules.planned_sparsity,
        mixed(schedule=st.just(RAMP), step=step, conventions=presets),
        check_sparsity,
        200,
    ),
    "magnitude": (scores.magnitude, mixed(kernel=floats), check_magnitude, 200),
    "gradient_magnitude": (
        scores.gradient_magnitude,
        mixed(gradient=floats),
        check_magnitude,
        100,
    ),
    "saliency": (
        scores.saliency,
        mixed(kernel=floats, gradient=floats),
        check_saliency,
        200,
    ),
    "random": (
        scores.random,
        mixed(
            shape=st.lists(st.integers(0, 5), max_size=3),
            key=st.integers(0, 2**32),
            step=step,
        ),
        check_random,
        300,
    ),
    "select_highest": (
        topology.select_highest,
        of_one_shape(
            dict(scores="scores", among="mask"), count=st.integers(0, 12)
        ),
        check_highest,
        300,
    ),
    "drop": (
        topology.drop,
        of_one_shape(
            dict(active="mask", scores="scores"),
            drop_fraction=part,
            conventions=presets,
        ),
        check_drop,
        250,
    ),
    "grow": (
        topology.grow,
        of_one_shape(
            dict(active="mask", kept="mask", scores="scores"),
            count=st.integers(0, 12),
            conventions=presets,
        ),
        check_grow,
        200,
    ),
    "drop_and_grow": (
        topology.drop_and_grow,
        of_one_shape(
            dict(mask="mask", drop_scores="scores", grow_scores="scores"),
            drop_fraction=part,
            grow_count=st.none() | st.integers(0, 12),
            conventions=presets,
        ),
        check_drop_and_grow,
        300,
    ),
    "update_masks": (
        topology.update_masks,
        mixed(
            masks=st.just(LAYERS),
            drop_scores=st.sampled_from([FIRST, SECOND]),
            grow_scores=st.sampled_from([FIRST, SECOND]),
            drop_fraction=part,
            shares=st.sampled_from([None, [0.5, 0.5], [0.1, 0.9], [1.0]]),
            grow_counts=st.sampled_from([None, no_growth]),
            conventions=presets,
        ),
        check_update,
        60,
    ),
    "drop_count": (
        topology.drop_count,
        of_one_shape(
            dict(mask="mask"),
            drop_fraction=part,
            conventions=presets,
        ),
        check_drop_count,
        200,
    ),
    "layer_drop_fractions": (
        topology.layer_drop_fractions,
        mixed(
            masks=st.just([np.eye(3), np.ones([2, 2])]),
            shares=st.sampled_from([[0.5, 0.5], [0.1, 0.9], [1.0]]),
            drop_fraction=part,
            conventions=presets,
        ),
        check_drop_fractions,
        200,
    ),
    "layer_mean": (
        redistribution.layer_mean,
        of_one_shape(dict(statistic="scores", mask="mask")),
        check_mean,
        200,
    ),
    "shares": (
        redistribution.shares,
        mixed(values=st.lists(st.floats(0, 9), max_size=4)),
        check_shares,
        200,
    ),
    "mean_shares": (
        redistribution.mean_shares,
        mixed(statistics=st.just(FIRST), masks=st.just(LAYERS)),
        lambda got, statistics, masks: check_shares(got, masks),
        100,
    ),
    "nonzero_shares": (
        redistribution.nonzero_shares,
        mixed(kernels=st.just(LAYERS)),
        check_shares_of,
        50,
    ),
    "next_correction": (
        redistribution.next_correction,
        mixed(
            state=st.just([1.0, 2.0, 3.0, 90.0]),
            connections=st.integers(0, 100),
        ),
        check_state,
        100,
    ),
    "grow_counts": (
        redistribution.grow_counts,
        mixed(
            shares=st.sampled_from([[0.5, 0.5], [0.1, 0.9], [0.2, 0.2], [1.0]]),
            dropped=counts,
            free=counts,
            correction=st.floats(-9, 9),
            conventions=presets,
        ),
        check_grow_counts,
        150,
    ),
    "corrected": (
        redistribution.corrected,
        mixed(
            correction=st.floats(-9, 9),
            missing=st.integers(-9, 9),
            mean_missing=st.floats(-9, 9),
        ),
        check_corrected,
        100,
    ),
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
    "is_gathered_step": (
        schedules.is_gathered_step,
        mixed(
            step=st.integers(0, 60),
            gradient_batches=st.integers(1, 5),
            frequency=st.integers(5, 20),
            begin_step=st.integers(0, 30),
            end_step=st.integers(0, 60),
            conventions=presets,
        ),
        check_gathered,
        200,
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
