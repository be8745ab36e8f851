"""Updates of the newer methods, by hand.

The values of the examples are the weights of one output unit.
"""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.resumed import fit, tiny

import rigl_keras
from rigl_keras import fan_in, with_masks
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.training.optimizer_state import slots

ALWAYS = dict(decay="constant", frequency=1, end_step=99)


def layer_of(weights, mask=None):
    """Returns a model with one masked layer, its optimizer and the layer."""
    weights = np.asarray(weights, np.float32)
    if weights.ndim == 1:
        weights = weights[:, np.newaxis]
    mask = np.ones_like(weights) if mask is None else np.reshape(mask, -1)
    inputs = keras.Input(weights.shape[:1])
    dense = layers.Dense(weights.shape[1], name="d", use_bias=False)
    model = keras.Model(inputs, dense(inputs))
    model = with_masks(model, {"d": np.reshape(mask, weights.shape)})
    (layer,) = masked_layers(model)
    layer.kernel.assign(weights * layer.mask.numpy())
    return model, keras.optimizers.SGD(0.1, momentum=0.9), layer


def attached(method, weights, mask=None, steps=100):
    """Attaches a method at the start of a run; returns the layer."""
    model, optimizer, layer = layer_of(weights, mask)
    method.attach(model, optimizer)
    method._plan(0, 1, steps)
    for slot in slots(optimizer, layer.kernel).values():
        slot.assign(tf.ones_like(slot.value))
    return layer


def update(method, layer, gradient, step=50):
    """Runs an update; returns the mask and the weights after it."""
    gradient = np.reshape(np.asarray(gradient, np.float32), layer.kernel.shape)
    method.change_masks(
        method.optimizer,
        [layer],
        [tf.constant(gradient)],
        tf.constant(step, tf.int64),
    )
    return found(layer)


def found(layer):
    return (
        layer.mask.numpy().astype(int).ravel().tolist(),
        layer.kernel.numpy().ravel().tolist(),
    )


def memory_of(method, layer):
    found = slots(method.optimizer, layer.kernel)["momentum"]
    return found.numpy().ravel().tolist()


# GraNet.


def test_granet_prunes_then_drops_and_grows():
    """4 of 6 active weights stay; 2 of these are dropped, and 2 grown."""
    method = rigl_keras.GraNet(
        final_density=0.5, prune_end_step=40, drop_fraction=0.5, **ALWAYS
    )
    layer = attached(method, [8, 7, 6, 5, 4, 3, 0, 0], [1] * 6 + [0] * 2)
    mask, weights = update(method, layer, [0, 0, 0, 9, 1, 2, 5, 0])
    assert mask == [1, 1, 0, 1, 0, 0, 1, 0]
    assert weights == [8, 7, 0, 5, 0, 0, 0, 0]  # the fourth was regrown
    assert memory_of(method, layer) == [1, 1, 0, 1, 0, 0, 0, 0]


def test_what_granet_has_pruned_starts_at_zero():
    """A pruned connection loses its weight and its momentum."""
    method = rigl_keras.GraNet(
        final_density=0.5, prune_end_step=40, drop_fraction=0.0,
        final_drop_fraction=0.0, **ALWAYS,
    )  # fmt: skip
    layer = attached(method, [4, 3, 2, 1])
    method.drop_fraction = 0.5
    mask, weights = update(method, layer, [0, 0, 9, 0])
    assert (mask, weights) == ([1, 0, 1, 0], [4, 0, 0, 0])
    assert memory_of(method, layer) == [1, 0, 0, 0]


def test_granet_follows_its_cubic():
    method = rigl_keras.GraNet(
        final_density=0.1,
        initial_density=0.9,
        prune_begin_step=10,
        prune_end_step=30,
        **ALWAYS,
    )
    layer = attached(method, np.arange(1, 1001))
    for step, density in ((10, 0.9), (20, 0.1 + 0.8 / 8), (30, 0.1), (60, 0.1)):
        update(method, layer, np.ones(1000), step)
        assert layer.mask.numpy().sum() == round(1000 * density)


def test_granet_ends_with_the_run():
    """p falls to 0.005 at the last step, along a cosine."""
    method = rigl_keras.GraNet(final_density=0.5, frequency=1)
    layer = attached(method, np.arange(1, 9), steps=100)
    fractions = []
    for step in (0, 50, 100):
        update(method, layer, np.ones(8), step)
        fractions.append(float(method.extra_logs()["drop_fraction"]))
    assert fractions == pytest.approx([0.5, 0.2525, 0.005])
    assert (method._window["end_step"], method._ramp.end_step) == (100, 50)


def test_granet_says_where_it_will_not_come():
    method = rigl_keras.GraNet(
        final_density=0.1, prune_end_step=50, frequency=30
    )
    with pytest.warns(UserWarning, match=r"ends at density 0\.1256.*step=50"):
        attached(method, np.ones(8), steps=35)
    with pytest.raises(ValueError, match="prune_end_step=None"):
        method = rigl_keras.GraNet(final_density=0.1, end_step=9)
        model, optimizer, _ = layer_of(np.ones(8))
        method.wrap(lambda x: x, model=model, optimizer=optimizer)


# AC/DC.


def test_acdc_by_turns():
    method = rigl_keras.ACDC(density=0.5, switch_steps=[10, 20, 30])
    layer = attached(method, [4, 1, 3, 2])
    due = [t for t in range(40) if bool(method.is_due(t))]
    assert due == [10, 20, 30]
    assert update(method, layer, np.zeros(4), 10) == (
        [1, 0, 1, 0],
        [4, 0, 3, 0],
    )
    assert memory_of(method, layer) == [1, 0, 1, 0]
    assert update(method, layer, np.zeros(4), 20) == ([1] * 4, [4, 0, 3, 0])
    layer.kernel.assign([[1], [5], [3], [2]])
    assert update(method, layer, np.zeros(4), 30) == (
        [0, 1, 1, 0],
        [0, 5, 3, 0],
    )


def test_acdc_of_the_paper():
    """Compressed phases begin at epochs 10, 20 ... 70 and 85 of 100."""
    method = rigl_keras.ACDC(density=0.5)
    attached(method, np.ones(4), steps=1000)
    assert method._switches[::2] == (100, 200, 300, 400, 500, 600, 700, 850)
    assert method._switches[1::2] == (150, 250, 350, 450, 550, 650, 750)
    with pytest.raises(ValueError, match="fewer of them"):
        attached(rigl_keras.ACDC(density=0.5), np.ones(4), steps=9)
    with pytest.warns(UserWarning, match="plans 0 updates"):
        late = rigl_keras.ACDC(density=0.5, switch_steps=[100])
        attached(late, np.ones(4), steps=99)


# MEST.


def test_mest_moves_a_share_of_all_entries():
    """k = 0.25 x 8 = 2, although half of the entries are active."""
    method = rigl_keras.MEST(soft=False, drop_fraction=0.25, **ALWAYS)
    layer = attached(method, [4, 3, 2, 1] + [0] * 4, [1] * 4 + [0] * 4)
    mask, weights = update(method, layer, np.zeros(8))
    assert mask[:2] == [1, 1] and sum(mask[2:]) == 2
    assert weights[:2] == [4, 3]


def test_mest_with_a_soft_bound():
    method = rigl_keras.MEST(drop_fraction=0.25, frequency=10, end_step=95)
    layer = attached(method, [4, 3, 2, 1] + [0] * 4, [1] * 4 + [0] * 4)
    mask, _ = update(method, layer, np.zeros(8), 10)
    assert mask[:4] == [1] * 4 and sum(mask[4:]) == 2
    # As after training: grown weights are now larger than the old ones.
    layer.kernel.assign(layer.kernel.value + 9 * np.reshape(mask, (8, 1)) * (
        np.arange(8).reshape(8, 1) > 3
    ))  # fmt: skip
    joined = [i for i in range(4, 8) if mask[i]]
    mask, _ = update(method, layer, np.zeros(8), 20)
    assert mask[:2] == [1, 1] and all(mask[i] for i in joined)
    assert sum(mask) == 6  # two dropped, two grown
    mask, _ = update(method, layer, np.zeros(8), 80)
    assert sum(mask) == 5  # half of the share, past 3/4 of 95 steps
    assert bool(method.is_due(95)) and not bool(method.is_due(94))
    mask, _ = update(method, layer, np.zeros(8), 95)
    assert sum(mask) == 4


def test_mest_weighs_gradients():
    method = rigl_keras.MEST(
        soft=False, drop_fraction=0.25, gradient_weight=2.0, **ALWAYS
    )
    layer = attached(method, [4, 3, 2, 0], [1, 1, 1, 0])
    gradient = np.array([0, 0, 1, 0], np.float32).reshape(4, 1)
    got = method.drop_scores(layer, tf.constant(gradient), 1)
    assert got.numpy().ravel().tolist() == [4, 3, 4, 0]


def test_a_full_layer_keeps_its_bound():
    """No connection can grow, so none is dropped afterwards."""
    method = rigl_keras.MEST(drop_fraction=0.5, **ALWAYS)
    layer = attached(method, [4, 3, 2, 1])
    for step in (1, 2, 3):
        mask, _ = update(method, layer, np.zeros(4), step)
        assert mask == [1] * 4


# GSE.


class Drawn(rigl_keras.GSE):
    """Looks at entries 5 and 6, and at two active ones."""

    def positions(self, layer, step):
        return tf.constant([5, 6, 0, 5], tf.int64)


def test_gse_grows_within_its_subset():
    method = Drawn(drop_fraction=0.5, **ALWAYS)
    layer = attached(method, [4, 3, 2, 1] + [0] * 4, [1] * 4 + [0] * 4)
    mask, weights = update(method, layer, [0, 0, 0, 0, 0, 1, 7, 9])
    assert mask == [1, 1, 0, 0, 0, 1, 1, 0]  # 7 was not looked at
    assert weights == [4, 3] + [0] * 6


def test_gse_drops_no_more_than_it_can_grow():
    """Three of four would be dropped for two places, so the largest stays."""
    method = Drawn(drop_fraction=0.75, **ALWAYS)
    layer = attached(method, [4, 3, 2, 1] + [0] * 4, [1] * 4 + [0] * 4)
    mask, weights = update(method, layer, [0, 0, 0, 0, 9, 0, 0, 9])
    assert mask == [1, 1, 0, 0, 0, 1, 1, 0]
    assert weights == [4, 3] + [0] * 6
    assert memory_of(method, layer) == [1, 1] + [0] * 6


def test_positions_are_even_and_repeat():
    method = rigl_keras.GSE(subset=100.0, **ALWAYS)
    layer = attached(method, np.ones(10), [1] * 5 + [0] * 5)
    first, again, later = (
        method.positions(layer, tf.constant(step, tf.int64)).numpy()
        for step in (3, 3, 4)
    )
    assert first.shape == (500,) and (first == again).all()
    assert (first != later).any()
    counts = np.bincount(first, minlength=10)
    assert len(counts) == 10 and counts.min() > 30 and counts.max() < 75


# Weights outside the masks.


def apply(method, layer, gradient):
    """Takes a step of SGD with rate 1 within the method's hook."""
    gradient = np.reshape(np.asarray(gradient, np.float32), layer.kernel.shape)
    taken = []

    def descend(gradients, variables):
        taken.extend(g.numpy().ravel().tolist() for g in gradients)
        for g, v in zip(gradients, variables, strict=True):
            v.assign(v.constraint(v.value - g))

    method.apply_gradients(descend, [tf.constant(gradient)], [layer.kernel])
    return taken[0]


def set_weights(method, layer, weights):
    weights = np.reshape(np.asarray(weights, np.float32), layer.kernel.shape)
    mask = layer.mask.numpy()
    layer.kernel.assign(weights * mask)
    method.hidden(layer).assign(weights * ~mask)
    method.choose([layer])


def test_topkast_trains_more_than_it_multiplies_by():
    """A = {0, 1}, B = {0, 1, 2}; the last weight does not change."""
    method = rigl_keras.TopKAST(extra_density=0.25, penalty=0.5)
    layer = attached(method, [4, 3, 0, 0], [1, 1, 0, 0])
    set_weights(method, layer, [4, 3, 2, 1])
    assert found(layer) == ([1, 1, 0, 0], [4, 3, 0, 0])
    # The penalty is w / 2 on A, and w on the rest of B, as A's density is 1/2.
    assert apply(method, layer, [1, 1, 1, 1]) == [3, 2.5, 3, 0]
    assert found(layer) == ([1, 1, 0, 0], [1, 0.5, 0, 0])
    assert method.hidden(layer).numpy().ravel().tolist() == [0, 0, -1, 1]
    # The new choice is 0 and, of the tied weights 2 and 3, the first.
    update(method, layer, np.zeros(4))
    assert found(layer) == ([1, 0, 1, 0], [1, 0, -1, 0])
    assert method.trained(layer).numpy().ravel().tolist() == [1, 0, 1, 1]
    assert method.hidden(layer).numpy().ravel().tolist() == [0, 0.5, 0, 1]


def test_srste_decays_what_it_leaves_out():
    method = rigl_keras.SRSTE()
    layer = attached(method, [0.9, 0, 0.3, 0], [1, 0, 1, 0])
    set_weights(method, layer, [0.9, -0.1, 0.3, 0.2])
    assert found(layer)[0] == [1, 0, 1, 0]
    assert apply(method, layer, np.ones(4)) == pytest.approx(
        [1, 1 - 2e-5, 1, 1 + 4e-5], abs=1e-7
    )
    assert method.hidden(layer).numpy().ravel() == pytest.approx(
        [0, -1.1 + 2e-5, 0, -0.8 - 4e-5]
    )
    update(method, layer, np.zeros(4))
    assert found(layer)[0] == [0, 1, 0, 1]
    assert [bool(method.is_due(t)) for t in range(4)] == [True] * 4


@pytest.mark.parametrize("make", [rigl_keras.TopKAST, rigl_keras.SRSTE])
def test_a_run_begins_with_the_largest_weights(make):
    """Other entries get weights drawn from active ones; the largest stay."""
    weights = np.arange(1, 101) * np.resize([1, -1], 100)
    mask = np.resize([1, 0, 0, 1], 100)
    method = make()
    layer = attached(method, weights, mask)
    kernel, hidden = layer.kernel.numpy(), method.hidden(layer).numpy()
    kept = layer.mask.numpy()
    assert kept.sum() == 50 and not kernel[~kept].any()
    assert not hidden[kept].any() and hidden[~kept].all()
    assert np.abs(kernel[kept]).min() >= np.abs(hidden[~kept]).max()
    before = np.where(mask == 1, weights, 0)[:, np.newaxis]
    stay = (kernel + hidden) == before
    assert stay.sum() >= 50  # unchanged weights
    assert set((kernel + hidden).ravel()) <= set(weights[mask == 1])


def test_the_model_is_sparse_whenever_it_is_looked_at():
    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for layer in masked_layers(self.model):
                off = ~layer.mask.numpy()
                assert off.any() and not layer.kernel.numpy()[off].any()

    model = tiny()
    method = rigl_keras.TopKAST(frequency=2)
    fit(model, [method, Look()], 2)
    assert all(v.numpy().any() for v in method._hidden)


# SRigL. Rows are units here.

WEIGHTS = np.array([[5, 4, 0, 0], [2, 1, 0, 0]], np.float32)
GRADIENTS = np.array([[0, 0, 3, 1], [0, 0, 2, 9]], np.float32)


@pytest.mark.parametrize(
    "ablation, want",
    [
        (None, ["1100", "0011"]),
        (0.3, ["1100", "0011"]),
        (1.0, ["1100", "0011"]),
    ],
)
def test_srigl_moves_connections_between_units(ablation, want):
    """K = P = 2. {5, 4} and {3 of A, 9 of B} are salient: 3 of A, 1 of B.

    A threshold of 2 would ablate B. But four connections would fill unit A,
    which has four inputs, so another unit must stay.
    """
    new, grown = fan_in.update_fan_in(
        WEIGHTS != 0,
        WEIGHTS,
        GRADIENTS,
        drop_fraction=0.5,
        ablation=ablation,
    )
    assert rows(new) == want
    assert rows(grown) == ["0000", "0011"]


def rows(matrix):
    return ["".join(str(int(e)) for e in row) for row in matrix.numpy()]


def test_srigl_ablates_units():
    """B is ablated if a unit of eight inputs has room for all."""
    wide = [np.pad(a, ((0, 0), (0, 4))) for a in (WEIGHTS, GRADIENTS)]
    new, _ = fan_in.update_fan_in(
        wide[0] != 0, wide[0], wide[1], drop_fraction=0.5, ablation=1.0
    )
    assert rows(new) == ["11110000", "00000000"]
    # B returns when it is salient again; the budget is still four.
    weights = np.where(new, 1.0, 0.0)
    gradient = np.zeros_like(weights)
    gradient[1, 3:5] = 9
    new, grown = fan_in.update_fan_in(
        new, weights, gradient, drop_fraction=0.5, ablation=1.0
    )
    assert rows(new) == ["11000000", "00011000"]
    assert rows(grown) == ["00000000", "00011000"]


def test_srigl_keeps_the_largest_of_a_unit():
    """A has three salient connections, but each unit may keep two."""
    weights = np.array([[3, 9, 5, 0], [1, 0, 0, 0]], np.float32)
    gradient = np.array([[0, 0, 0, 0], [0, 1, 3, 2]], np.float32)
    new, _ = fan_in.update_fan_in(
        weights != 0, weights, gradient, drop_fraction=0.25
    )
    assert rows(new) == ["0110", "0011"]


@pytest.mark.parametrize("seed", range(5))
def test_srigl_counts_are_even(seed):
    """With any scores, a unit has k connections or none."""
    draw = np.random.default_rng(seed)
    mask = draw.random((7, 9)) < 0.4
    budget = int(mask.sum())
    weights, gradient = draw.random((2, 7, 9))
    for ablation in (None, 0.0, 0.5, 1.0):
        new, grown = fan_in.update_fan_in(
            mask, weights * mask, gradient,
            drop_fraction=0.4, ablation=ablation,
        )  # fmt: skip
        each = set(new.numpy().sum(axis=1)) - {0}
        left = (new.numpy().sum(axis=1) > 0).sum()
        assert each == {budget // left}
        assert left == 7 or ablation is not None
        assert not (grown.numpy() & mask).any()


def test_srigl_is_of_single_weights():
    inputs = keras.Input((4, 4, 3))
    conv = layers.Conv2D(8, 3)(inputs)
    model = rigl_keras.sparsify(
        keras.Model(inputs, conv), 0.5, granularity="kernel"
    )
    with pytest.raises(ValueError, match="granularity='fan_in'"):
        rigl_keras.SRigL().attach(model, keras.optimizers.SGD(0.1))


@pytest.mark.parametrize("granularity", ["element", "fan_in", "1:2"])
@pytest.mark.parametrize("make", [rigl_keras.SRigL, rigl_keras.SRSTE])
def test_a_method_for_a_pattern_says_that_masks_have_none(make, granularity):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(6, name="only")(inputs))
    model = rigl_keras.sparsify(model, 0.5, granularity=granularity)
    method, optimizer = make(), keras.optimizers.SGD(0.1)
    if make is rigl_keras.SRigL and granularity == "1:2":
        with pytest.raises(ValueError, match="granularity='fan_in'"):
            method.attach(model, optimizer)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        method.attach(model, optimizer)
    said = [str(warning.message) for warning in said]
    assert len(said) == (granularity == "element")
    pattern = "fan_in" if make is rigl_keras.SRigL else "2:4"
    for text in said:
        assert text.startswith(f"{make.__name__} ")
        assert "but the masks of only are of single weights" in text
        assert f"granularity={pattern!r}" in text


@pytest.mark.parametrize(
    "layer, shape",
    [
        (layers.Conv2D(6, 3), (5, 5, 4)),
        (layers.Conv2DTranspose(6, 3), (5, 5, 4)),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 5, 4)),
    ],
)
def test_srigl_knows_what_a_unit_is(layer, shape):
    inputs = keras.Input(shape)
    model = rigl_keras.sparsify(keras.Model(inputs, layer(inputs)), 0.4)
    (masked,) = masked_layers(model)
    optimizer = keras.optimizers.SGD(0.1)
    method = rigl_keras.SRigL(ablation=None, **ALWAYS)
    method.attach(model, optimizer)
    method._plan(0, 1, 100)
    draw = np.random.default_rng(0).random(masked.kernel.shape)
    update(method, masked, draw)
    units = [axis % 4 for axis in masked.found.output_axes]
    others = tuple(axis for axis in range(4) if axis not in units)
    each = masked.mask.numpy().sum(axis=others)
    assert len(set(each.ravel())) == 1 and each.min() > 0


# Plans.


def test_densities_before_a_run():
    """`bin/reproduce` uses the planned densities to count costs."""
    granet = rigl_keras.GraNet(final_density=0.1, frequency=10)
    # The masks of an update count from the step after it.
    at = [granet.planned_density(t, 200, 0.5) for t in (0, 50, 51, 101, 199)]
    after_40 = 0.1 + 0.4 * 0.6**3
    assert at == pytest.approx([0.5, after_40, 0.1 + 0.4 / 8, 0.1, 0.1])
    acdc = rigl_keras.ACDC(density=0.1)
    at = [acdc.planned_density(t, 100, 1.0) for t in (10, 11, 15, 16, 84, 99)]
    assert at == [1.0, 0.1, 0.1, 1.0, 1.0, 0.1]
    mest = rigl_keras.MEST(frequency=10, drop_fraction=0.2, end_step=80)
    at = [mest.planned_density(t, 100, 0.1) for t in (10, 11, 61, 71, 99)]
    assert at == pytest.approx([0.1, 0.3, 0.2, 0.2, 0.1])
    hard = rigl_keras.MEST(soft=False, frequency=10)
    assert hard.planned_density(50, 100, 0.1) == 0.1


# Options of all methods.


def test_the_drop_fraction_follows_the_learning_rate():
    """It is 0.3 at rate 0.1 and 0.03 at rate 0.01, whatever the warm-up."""
    method = rigl_keras.RigL(
        drop_fraction=0.3, **ALWAYS | dict(decay="learning_rate")
    )
    layer = attached(method, np.ones(10), [1] * 5 + [0] * 5)
    fractions = []
    for rate in (0.1, 0.2, 0.02, 0.0):
        method.optimizer.learning_rate.assign(rate)
        update(method, layer, np.zeros(10))
        fractions.append(float(method.extra_logs()["drop_fraction"]))
    assert fractions == pytest.approx([0.3, 0.3, 0.03, 0.0])
    assert len(method.variables) == 1  # the largest rate
