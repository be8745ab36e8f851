"""What grows, by which gradients, from which values, and the loss around it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.regressions import (
    Applies,
    Batches,
    assert_equal,
    equal_masks,
    examples,
    fit,
    momentum,
    network,
)
from support.small_models import kernels, masks

import rigl_keras
from rigl_keras.conventions import REPORT
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.methods.rigl import SET, SNFS, RigL
from rigl_keras.training.optimizer_state import slots

EVERY_STEP = dict(frequency=1, end_step=99, decay="constant")


# Weights of samples, classes and outputs: weight 0 has no effect on growth.


def grown_on(model, *data, **options):
    model.fit(
        *data,
        batch_size=24,
        shuffle=False,
        verbose=0,
        callbacks=[RigL(**EVERY_STEP)],
        **options,
    )
    return masks(model)


def test_sample_weights_reach_growth():
    x, y = examples()
    weight = np.tile([1.0, 0.0], 24)
    noise = np.where(weight[:, None] == 0, 100 * y[::-1], y)
    still = keras.optimizers.SGD
    clean = grown_on(network(still(0.0)), x, y, sample_weight=weight)
    same = grown_on(network(still(0.0)), x, noise, sample_weight=weight)
    assert equal_masks(clean, same)
    assert not equal_masks(clean, grown_on(network(still(0.0)), x, noise))


def test_class_weights_reach_growth():
    x, _ = examples()
    y = np.arange(48) % 4
    noise = np.where(y[:, None] == 3, 100 * x[::-1], x)
    weight = {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0}

    def model():
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return network(keras.optimizers.SGD(0.0), loss=loss)

    clean = grown_on(model(), x, y, class_weight=weight)
    same = grown_on(model(), noise, y, class_weight=weight)
    assert equal_masks(clean, same)
    assert not equal_masks(clean, grown_on(model(), noise, y))


def two_headed(optimizer, weights=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="hidden")(inputs)
    outputs = {n: layers.Dense(4, name=n)(x) for n in ("a", "b")}
    model = sparsify(keras.Model(inputs, outputs), 0.5)
    model.compile(
        optimizer,
        {"a": "mse", "b": "mae"},
        loss_weights=weights,
        run_eagerly=True,
    )
    return model


def test_several_outputs_and_losses_reach_growth():
    def model(weights):
        return two_headed(keras.optimizers.SGD(0.0), weights)

    x, y = examples()
    one, two = {"a": y, "b": y}, {"a": y, "b": 100 * y[::-1]}
    weights = {"a": 1.0, "b": 0.0}
    clean = grown_on(model(weights), x, one)
    assert equal_masks(clean, grown_on(model(weights), x, two))
    assert not equal_masks(clean, grown_on(model(None), x, two))


# Gradients of several batches.


@pytest.mark.slow_but("True")
@pytest.mark.parametrize("eager", [True, False])
def test_growth_by_the_mean_of_several_batches(eager):
    """With constant weights, it is the gradient of one large batch."""
    x, y = examples(48)
    y[:, 0] *= np.repeat([1, -9, 9, 1], 12)
    after = {}
    for batches in (1, 3):
        model = network(keras.optimizers.SGD(0.0), run_eagerly=eager)
        method = RigL(
            frequency=3,
            end_step=3,
            drop_fraction=0.9,
            decay="constant",
            gradient_batches=batches,
        )
        fit(model, [method], (x, y), batch_size=12)
        after[batches] = masks(model)
    # Steps 1, 2 and 3 as one batch, after a first batch.
    model = network(keras.optimizers.SGD(0.0))
    method = RigL(**{**EVERY_STEP, "drop_fraction": 0.9})
    fit(model, [method], (np.r_[x[12:], x[12:]], np.r_[y[12:], y[12:]]), 36)
    assert equal_masks(after[3], masks(model))
    assert not equal_masks(after[1], after[3])


def test_batches_before_an_update_train_as_always():
    """They give the same weights and the same optimizer state."""
    records = []
    for batches in (1, 3):
        model, record = network(momentum()), Weights()
        method = RigL(frequency=5, end_step=9, gradient_batches=batches)
        fit(model, [method, record])
        records.append(record)
    one, two = records
    for step in range(5):
        assert_equal(one.weights[step], two.weights[step])
        assert_equal(one.memory[step], two.memory[step])
    with pytest.raises(AssertionError):
        assert_equal(one.weights[5], two.weights[5])


class Weights(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.weights, self.memory = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(self.model.get_weights())
        memory = self.model.optimizer.variables
        self.memory.append([v.numpy() for v in memory])


def several(**options):
    return RigL(
        frequency=4,
        end_step=9,
        drop_fraction=0.9,
        gradient_batches=4,
        **options,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:RigL plans 0 updates")
def test_what_was_gathered_can_be_saved():
    x, y = examples(40)
    whole = network(momentum())
    fit(whole, [several()], (x, y))
    # Stopped after step 2, so two of the steps 1 to 4 are gathered.
    start, first = network(momentum()), several()
    fit(start, [first], (x[:12], y[:12]))
    assert [v.shape for v in first.variables] == [
        (2,),
        *(m.kernel.shape for m in masked_layers(start)),
    ]
    ends = {}
    for kept in (True, False):
        model, method = network(momentum()), several()
        model.optimizer.build(model.trainable_variables)
        model.set_weights(start.get_weights())
        for ours, theirs in zip(
            model.optimizer.variables, start.optimizer.variables, strict=True
        ):
            ours.assign(theirs)
        method.attach(model, model.optimizer)
        for ours, theirs in zip(method.variables, first.variables, strict=True):
            if kept:
                ours.assign(theirs)
        fit(model, [method], (x[12:], y[12:]))
        ends[kept] = model.get_weights()
    same = [
        all((a == b).all() for a, b in zip(e, whole.get_weights(), strict=True))
        for e in (ends[True], ends[False])
    ]
    assert same == [True, False]  # the second has the mean over steps 3 and 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:RigL plans 0 updates")
def test_what_an_earlier_run_gathered_is_forgotten():
    x, y = examples(40)
    after = []
    for again in (True, False):
        model, first = network(momentum()), several()
        fit(model, [first], (x[:12], y[:12]))
        fit(model, [], (x[:4], y[:4]))  # step 3, without the method
        fit(model, [first if again else several()], (x, y))
        after.append(model.get_weights())
    assert_equal(*after)


def test_two_traces_are_enough():
    model, traces = network(momentum(), cls=Applies), []
    step = model.train_step

    def counted(data):
        traces.append(1)
        return step(data)

    model.train_step = counted
    model.run_eagerly = False
    fit(model, [several()])
    assert len(traces) == 2


@pytest.mark.parametrize("conventions", [rigl_keras.ORIGINAL, REPORT])
def test_gathered_steps_by_enumeration(conventions):
    window = dict(
        frequency=4, begin_step=3, end_step=17, conventions=conventions
    )
    due = [
        t for t in range(30) if rigl_keras.schedules.is_update_step(t, **window)
    ]
    assert len(due) == 4
    for n in (1, 3, 4):
        want = {t - i for t in due for i in range(n)} - set(range(-9, 0))
        got = {
            t
            for t in range(30)
            if rigl_keras.schedules.is_gathered_step(
                t, gradient_batches=n, **window
            )
        }
        assert got == want
        tensor = rigl_keras.schedules.is_gathered_step(
            tf.range(30, dtype=tf.int64), gradient_batches=n, **window
        )
        assert set(np.flatnonzero(tensor)) == want


def test_what_several_batches_cost():
    model = network()
    cost = rigl_keras.count(model)
    counts = {m.name: int(m.mask.numpy().sum()) for m in masked_layers(model)}
    sparse = 3 * cost.inference_flops
    dense = 2 * cost.inference_flops + cost.dense_inference_flops
    curve = dict(steps=9, dense_gradients="updates", gradient_batches=3)
    trajectory = [(0, counts), (1, counts), (6, counts)]
    _, training = rigl_keras.flops.training_curve(cost, trajectory, **curve)
    want = [dense, dense, *[sparse] * 2, *[dense] * 3, *[sparse] * 2]
    np.testing.assert_allclose(training, want)
    # Two of four steps are dense: (2 x 3 + 2 x (2 + 5)) / 4.
    options = dict(sparse_flops=1, dense_flops=5, frequency=3)
    cost = rigl_keras.training_flops("rigl", **options, gradient_batches=2)
    assert cost == 5.0
    with pytest.raises(ValueError, match="from 1 to frequency=3"):
        rigl_keras.training_flops("rigl", **options, gradient_batches=4)


# Initial values of grown weights.


@pytest.mark.slow_but("zeros-1", "initial_dist-1")
@pytest.mark.parametrize(
    "kind, divisor",
    [
        ("zeros", 1),
        ("initial_dist", 1),
        ("random_normal", 1),
        ("random_uniform", 10),
        ("grad_scale", 2.5),
        ("grad_sign", 100),
    ],
)
def test_only_grown_weights_start_anew(kind, divisor):
    """They start by the given kind, without state, and the run repeats."""
    ends = []
    for _ in range(2):
        model = network(momentum())
        initial, look = kernels(model), Batches()
        weights = Weights()
        method = RigL(
            frequency=2,
            end_step=2,
            decay="constant",
            grow_init=kind,
            grow_divisor=divisor,
        )
        fit(model, [method, look, weights], examples(12))
        before, after = look.masks[1], look.masks[2]
        paths = [v.path for v in model.weights]
        old, new = (
            dict(zip(paths, weights.weights[t], strict=True)) for t in (1, 2)
        )
        for layer in masked_layers(model):
            was, now = old[layer.kernel.path], new[layer.kernel.path]
            grown = (before[layer.name] == 0) & (after[layer.name] == 1)
            kept = (before[layer.name] == 1) & (after[layer.name] == 1)
            assert grown.any()
            np.testing.assert_array_equal(now[kept], was[kept])
            assert not now[after[layer.name] == 0].any()
            memory = slots(model.optimizer, layer.kernel)["momentum"].numpy()
            assert not memory[grown].any() and memory[kept].any()
            active = np.abs(was[before[layer.name] == 1])
            if kind == "zeros":
                assert not now[grown].any()
            else:
                assert now[grown].all()
            if kind == "initial_dist":
                assert np.isin(now[grown], initial[layer.name]).all()
            if kind == "random_uniform":
                assert (np.abs(now[grown]) <= active.mean() / 10).all()
            if kind == "grad_sign":
                np.testing.assert_allclose(np.abs(now[grown]), 0.01)
        ends.append(model.get_weights())
    assert_equal(*ends)


def test_draws_have_the_spread_of_active_weights():
    draw = np.random.default_rng(0)
    mask = draw.random((200, 300)) < 0.3
    kernel = tf.constant((draw.normal(0.5, 2.0, mask.shape) * mask), tf.float32)
    gradient = tf.constant(draw.normal(size=mask.shape), tf.float32)
    active = kernel.numpy()[mask]

    def values(kind, divisor=1.0, key=1, step=7, kernel=kernel):
        drawn = rigl_keras.initial_values.grown_values(
            kind,
            kernel,
            tf.constant(mask, tf.float32),
            divisor=divisor,
            gradient=gradient,
            initial=tf.constant([1.0, 2.0, 4.0]),
            key=key,
            step=step,
        )
        assert drawn.dtype == kernel.dtype
        return drawn.numpy()

    normal = values("random_normal")
    assert normal.std() == pytest.approx(active.std(), rel=0.02)
    assert abs(normal.mean()) < 0.02 * active.std()
    # Values beyond three standard deviations, as often as in a normal draw.
    assert np.mean(np.abs(normal) > 3 * active.std()) == pytest.approx(
        0.0027, rel=0.3
    )
    uniform = values("random_uniform")
    bound = np.abs(active).mean()
    assert np.abs(uniform).max() == pytest.approx(bound, rel=1e-3)
    assert uniform.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    chosen, count = np.unique(values("initial_dist", 2), return_counts=True)
    assert chosen.tolist() == [0.5, 1.0, 2.0]
    np.testing.assert_allclose(count / mask.size, 1 / 3, rtol=0.05)
    np.testing.assert_allclose(values("grad_scale", 4), gradient / 4)
    np.testing.assert_allclose(values("grad_sign"), np.sign(gradient))
    half = values("random_normal", 2, kernel=tf.cast(kernel, tf.float16))
    np.testing.assert_allclose(half, normal / 2, rtol=0.02, atol=1e-3)
    for other in ({"key": 2}, {"step": 8}):
        assert (values("random_normal", **other) != normal).mean() > 0.99


@pytest.mark.parametrize("method", [RigL, SNFS])
def test_a_divisor_within_the_name_is_deprecated(method):
    with pytest.warns(
        DeprecationWarning,
        match=r"grow_init='random_normal', grow_divisor=2\.5\.",
    ) as warned:
        old = method(grow_init="random_normal_2.5")
    assert [w.filename for w in warned] == [__file__]
    new = method(grow_init="random_normal", grow_divisor=2.5)
    assert old.get_config() == new.get_config()
    assert old.lengthened(2).get_config() == new.get_config()


def test_gradients_must_be_there_to_start_from():
    with pytest.raises(ValueError, match="only where a method needs dense"):
        SET(grow_init="grad_scale")
    assert SET(grow_init="random_normal").grow_init == "random_normal"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random_normal", "initial_dist"])
def test_drawn_weights_resume_exactly(kind):
    def method():
        return SET(frequency=2, end_step=99, grow_init=kind)

    x, y = examples(40)
    whole = network(momentum())
    fit(whole, [method()], (x, y))
    model, first = network(momentum()), method()
    fit(model, [first], (x[:20], y[:20]))
    second = method()
    second.attach(model, model.optimizer)
    for ours, theirs in zip(second.variables, first.variables, strict=True):
        ours.assign(theirs)
    assert len(second.variables) == (2 if kind == "initial_dist" else 0)
    fit(model, [second], (x[20:], y[20:]))
    assert_equal(model.get_weights(), whole.get_weights())


def test_a_callback_remembers_the_start_of_the_run_it_is_in():
    method = SET(frequency=2, end_step=99, grow_init="initial_dist")
    fit(network(momentum()), [method])
    model = network(momentum())
    for layer in masked_layers(model):
        layer.kernel.assign(tf.sign(layer.kernel.value))
    method.attach(model, model.optimizer)
    assert all((np.abs(v.numpy()) == 1).all() for v in method.variables)


# The loss of the batch of an update.


@pytest.mark.parametrize("eager", [True, False])
def test_loss_before_and_after_an_update(eager):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="hidden", activity_regularizer="l2")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Dropout(0.5)(x)
    model = sparsify(keras.Model(inputs, layers.Dense(4, name="d")(x)), 0.5)
    model.compile("sgd", "mse", run_eagerly=eager, metrics=["mae"])
    twin = keras.models.clone_model(model)
    twin.compile("sgd", "mse")
    data = examples(16)
    weights = Weights()
    method = RigL(frequency=2, end_step=9, drop_fraction=0.9)
    method.watch_loss = True
    fit(model, [method, weights], data)
    ((step, before, after),) = method.update_losses
    assert step == 2
    # Batch statistics change in the update's forward pass, masks after it.
    batch = [part[8:12] for part in data]
    wanted = []
    for at in (1, 2):
        twin.set_weights(weights.weights[at])
        for ours in twin.weights:
            if "moving" in ours.path:
                index = [v.path for v in model.weights].index(ours.path)
                ours.assign(weights.weights[2][index])
        wanted.append(twin.evaluate(*batch, verbose=0)[0])
    assert before != after
    assert [before, after] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_watching_the_loss_changes_nothing():
    """It does not change Keras's mean loss of an epoch either."""
    x, y = examples()
    after = []
    for watch in (True, False):
        model = two_headed(momentum())
        method = RigL(frequency=2, end_step=9)
        method.watch_loss = watch
        history = fit(model, [method], (x, {"a": y, "b": y})).history
        assert "a_loss" in history
        after.append((model.get_weights(), history))
        assert len(method.update_losses) == (4 if watch else 0)
    assert after[0][1] == after[1][1]
    assert_equal(after[0][0], after[1][0])


class WithoutLoss(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def test_a_model_without_a_loss_to_watch():
    model = network(momentum(), cls=WithoutLoss, loss=None)
    method = RigL(frequency=2, end_step=3)
    method.watch_loss = True
    fit(model, [method])
    ((step, *losses),) = method.update_losses
    assert step == 2 and np.isnan(losses).all()
