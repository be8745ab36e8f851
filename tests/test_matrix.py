"""Every kind of model in every training set-up, with every method.

Each kind is tested in each set-up, and some set-ups share a run. Methods
alternate, so that each method meets every kind and every set-up. These pairs
need a seventh of the runs of all triples. Most further pairs of a method and a
kind run eagerly, without a graph. `--every-combination` runs all triples, each
set-up alone. `python tests/test_matrix.py` prints the table of
docs/supported_models.md.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support import kinds
from support.methods import CONSTANT, CORE, METHODS, NEWER, SCHEDULED
from support.patterns import group_counts
from support.setups import (
    BATCH,
    SETUPS,
    TOGETHER,
    UNSUPPORTED,
    options_of,
    sgd,
    support_table,
)

import rigl_keras
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.stripping import strip
from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.patterns import FanIn, as_pattern
from rigl_keras.schedules import SparsityRamp

DENSITY = 0.4
WINDOW = dict(frequency=2, end_step=9, drop_fraction=0.5, decay="constant")


def pruning(**options):
    ramp = SparsityRamp(
        final_density=0.2,
        initial_density=DENSITY,
        begin_step=1,
        end_step=9,
        frequency=2,
    )
    return [MagnitudePruning(ramp)]


def combinations(every):
    """Yields kinds, set-ups of a run, and methods."""
    alone = [(setup,) for setup in SETUPS]
    eagerly = [("run_eagerly",)] * (len(CORE) - len(TOGETHER))
    others = [setups for setups in TOGETHER if setups != ("jit_compile",)]
    others += [("run_eagerly",)] * len(kinds.KINDS)
    for i, kind in enumerate(kinds.KINDS):
        for j, setups in enumerate(alone if every else [*TOGETHER, *eagerly]):
            for k, method in enumerate(METHODS if every else CORE):
                # There are as many core methods as runs of a kind.
                if every or (i + j - k) % len(CORE) == 0:
                    yield from supported(kind, setups, method)
        for k, method in enumerate(() if every else NEWER):
            # XLA is slow, and only the first kind, which is simple, has it.
            turn = (i + k) % (len(kinds.KINDS) - 1)
            setups = others[turn] if i else ("jit_compile",)
            yield from supported(kind, setups, method)


def supported(kind, setups, method):
    setups = tuple(s for s in setups if (kind, s) not in UNSUPPORTED)
    if setups:
        yield kind, setups, method


def pytest_generate_tests(metafunc):
    if "combination" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_combination")
        # Plain runs cover each kind and each set-up.
        plain = {
            (kind, TOGETHER[(i + 5) % len(TOGETHER)])
            for i, kind in enumerate(kinds.KINDS)
        }
        metafunc.parametrize(
            "combination",
            [
                pytest.param(
                    (kind, setups, method),
                    id=f"{kind} - {' + '.join(setups)} - {method}",
                    marks=[]
                    if (kind, setups) in plain and method in CORE
                    else [pytest.mark.slow],
                )
                for kind, setups, method in combinations(every)
            ],
        )


def test_each_pair_is_there():
    assert sorted(s for setups in TOGETHER for s in setups) == sorted(SETUPS)
    chosen = [
        (kind, setup, method)
        for kind, setups, method in combinations(every=False)
        for setup in setups
    ]
    pairs = {(k, s) for k, s, method in chosen if method in CORE}
    assert not pairs & UNSUPPORTED.keys()
    assert pairs | UNSUPPORTED.keys() == {
        (k, s) for k in kinds.KINDS for s in SETUPS
    }
    for method in METHODS:
        assert {k for k, _, m in chosen if m == method} == set(kinds.KINDS)
        assert {s for _, s, m in chosen if m == method} == set(SETUPS)


@pytest.fixture
def policy():
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


def weights_of(y, n):
    draw = np.random.default_rng(1)
    structure = y if isinstance(y, dict) else None
    if structure is None:
        return draw.uniform(0.5, 1.5, n).astype(np.float32)
    return {k: draw.uniform(0.5, 1.5, n).astype(np.float32) for k in structure}


def train(model, callbacks, options):
    """Trains for six optimizer steps."""
    n = 6 * BATCH
    x, y = kinds.data(model, n=n)
    optimizer = options.get("optimizer", sgd)(
        **options.get("optimizer_options", {})
    )
    if options.get("by_hand"):
        train_by_hand(model, optimizer, callbacks, x, y)
        return
    model.compile(optimizer, "mse", **options.get("compile", {}))
    model.fit(
        x,
        y,
        sample_weight=weights_of(y, n) if options.get("weighted") else None,
        batch_size=options.get("batch_size", BATCH),
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    )
    taken = int(model.optimizer.iterations)
    # The first loss scale is high: a batch that overflows is not a step.
    scaled = options.get("policy") == "mixed_float16"
    assert taken == 6 or (scaled and 4 <= taken < 6)


def train_by_hand(model, optimizer, callbacks, x, y):
    optimizer.build(model.trainable_variables)
    for updater in callbacks:
        updater.attach(model, optimizer)

    @tf.function
    def train_step(x, y):
        with rigl_keras.dense_gradients(), tf.GradientTape() as tape:
            outputs = tf.nest.flatten(model(x, training=True))
            loss = tf.add_n(
                [
                    tf.reduce_mean((tf.cast(a, b.dtype) - b) ** 2)
                    for a, b in zip(outputs, tf.nest.flatten(y), strict=True)
                ]
            )
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        if not callbacks:  # static masks
            optimizer.apply(gradients, variables)
        for updater in callbacks:
            updater.update(gradients, variables)

    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    for batch in batches:
        train_step(*batch)
    for updater in callbacks:
        updater.fetch()


def outputs(model, x):
    return [
        np.asarray(y, np.float32)
        for y in keras.tree.flatten(model(x, training=False))
    ]


def assert_same(one, two):
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def counts(model):
    named = masked_layers(model).named
    return {name: int(m.mask.numpy().sum()) for name, m in named.items()}


def test_combination(combination, policy, tmp_path):
    kind, setups, method = combination
    options = options_of(setups)
    policy(options.get("policy", "float32"))
    keras.utils.set_random_seed(0)
    model = sparsify(
        kinds.KINDS[kind](), DENSITY, **kinds.OPTIONS.get(kind, {})
    )
    make = pruning if method == "MagnitudePruning" else METHODS[method]
    given = options.get("method", {}) if method in UPDATING else {}
    before, masks = counts(model), masked_layers(model).masks
    train(model, make(**WINDOW, **given), options)

    after = counts(model)
    moved = masked_layers(model).masks
    changed = any((moved[name] != masks[name]).any() for name in masks)
    assert changed == (method != "static")
    if method == "SRigL":  # the same number in each unit, rounded down
        for name, m in masked_layers(model).named.items():
            units = FanIn().layout(m.found.axes).groups
            assert after[name] <= max(before[name], units)
    elif method in SCHEDULED:
        denser = sum(after.values()) - sum(before.values())
        assert denser != 0 if method in DENSER else denser < 0
    else:
        assert sum(after.values()) == sum(before.values())
    if method in CONSTANT:
        assert after == before
    for m in masked_layers(model):
        kernel, mask = m.kernel.numpy(), m.mask.numpy()
        assert np.isfinite(kernel).all() and not kernel[mask == 0].any()

    if method in NEWER or set(setups) <= set(LEAVE_NO_TRACE):
        return

    x, _ = kinds.data(model)
    want = outputs(model, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(outputs(loaded, x), want)
    for name, mask in masked_layers(loaded).masks.items():
        np.testing.assert_array_equal(mask, moved[name])
    plain = strip(loaded)
    assert not masked_layers(plain)
    assert_same(outputs(plain, x), want)


PATTERNED = ("RigL", "SET", "MagnitudePruning")
# Patterns, each used once in each run, and on each layer that it fits.
PATTERNS = [
    {"conv1": "kernel", "depthwise": "fan_in", "conv2": "1:2", "head": "3x2"},
    {"conv1": "1:2", "depthwise": "kernel", "conv2": "3x2", "head": "fan_in"},
    {"conv1": "3x2", "depthwise": "fan_in", "conv2": "kernel", "head": "1:2"},
    {"conv1": "fan_in", "depthwise": "kernel", "conv2": "3x2", "head": "1:2"},
    {"conv1": "1:2", "depthwise": "kernel", "conv2": "fan_in", "head": "3x2"},
]


def patterned():
    """Yields each set-up with every pattern, and alternating methods."""
    for i, setups in enumerate(TOGETHER):
        plain = ("run_eagerly",), ("mixed_bfloat16", "clipnorm")
        method = PATTERNED[i % len(PATTERNED)]
        yield pytest.param(
            PATTERNS[i % len(PATTERNS)],
            setups,
            method,
            id=f"{' + '.join(setups)} - {method}",
            marks=[] if setups in plain else [pytest.mark.slow],
        )


@pytest.mark.parametrize("patterns, setups, method", list(patterned()))
def test_patterns_in_every_setup(patterns, setups, method, policy):
    """A model with each kind of convolution and a dense layer."""
    options = options_of(setups)
    policy(options.get("policy", "float32"))
    keras.utils.set_random_seed(0)
    prunes = method == "MagnitudePruning"
    model = sparsify(
        kinds.functional(channels=8, outputs=6),
        1.0 if prunes else 0.5,
        granularity=patterns,
        densities=dict.fromkeys(patterns, 1.0 if prunes else 0.5),
    )
    named = masked_layers(model).named
    assert {name: m.granularity for name, m in named.items()} == patterns
    masks = masked_layers(model).masks
    if prunes:
        ramp = SparsityRamp(
            final_density=0.3, begin_step=1, end_step=5, frequency=2
        )
        callbacks = [MagnitudePruning(ramp, scope="layer")]
    else:
        # Large enough to grow other units, even of few.
        window = dict(WINDOW, drop_fraction=0.9)
        callbacks = METHODS[method](**window, **options.get("method", {}))
    train(model, callbacks, options)
    moved = masked_layers(model).masks
    for name, m in named.items():
        assert (moved[name] != masks[name]).any(), name
        kept, before = (
            group_counts(as_pattern(m.granularity), m.found.axes, mask[name])
            for mask in (moved, masks)
        )
        assert prunes or sum(kept) == sum(before)
        assert len(set(kept)) == 1
        assert m.granularity != "1:2" or set(kept) == {1}
        kernel = m.kernel.numpy()
        assert np.isfinite(kernel).all() and not kernel[~moved[name]].any()


# Methods whose density is above the initial one in some steps.
DENSER = ("MEST", "ACDC")
# Set-ups whose trained models are like those of others. They are not saved
# here, and neither are models of newer methods: other set-ups cover each kind,
# and test_contract.py each method.
LEAVE_NO_TRACE = ("jit_compile", "run_eagerly", "own loop")
UPDATING = [
    m for m in METHODS if m not in ("static", "MagnitudePruning", "ACDC")
]


if __name__ == "__main__":
    print(support_table())
