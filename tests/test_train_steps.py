"""Training within `fit`: nested calls, own train steps, and frozen layers.

Networks run eagerly, unless a test is about the graph.
"""

import warnings

import keras
import pytest
import tensorflow as tf
from support.regressions import (
    Applies,
    At,
    assert_sparse,
    equal_masks,
    examples,
    fit,
    momentum,
    network,
    stopped,
    updates,
)
from support.small_models import masks

import rigl_keras
from rigl_keras.diagnostics.callback import TopologyDiagnostics
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.methods.rigl import SNFS, RigL
from rigl_keras.training.train_function import installed_update

# Epochs of 6 steps, with an update at every second one, all of one fraction.
DATA = examples(24)
EVERY_SECOND = dict(frequency=2, end_step=99, decay="constant")


# Calls that callbacks make within `fit`.

ACTIONS = {
    # The action, and the number of steps that it adds.
    "train_on_batch": (lambda m: m.train_on_batch(DATA[0][:4], DATA[1][:4]), 1),
    "fit": (lambda m: m.fit(DATA[0][:8], DATA[1][:8], 4, verbose=0), 2),
    "make": (lambda m: m.make_train_function(), 0),
    "make by force": (lambda m: m.make_train_function(force=True), 0),
    "compile": (
        lambda m: m.compile(m.optimizer, "mse", run_eagerly=m.run_eagerly),
        0,
    ),
    "compile anew": (
        lambda m: m.compile("adam", "mse", run_eagerly=m.run_eagerly),
        0,
    ),
}


@pytest.mark.slow_but(
    "train_on_batch-eager",
    "make by force-eager",
    "compile-graph",
    "compile anew-eager",
)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("name", ACTIONS)
def test_updates_go_on(name, eager):
    action, more = ACTIONS[name]
    model = network(momentum(), run_eagerly=eager)
    method = RigL(frequency=4, end_step=99, decay="constant")
    fit(model, [method, At("on_epoch_end", action)], DATA, epochs=2)
    assert updates(method) == list(range(4, 12 + more, 4))
    own = 6 if name == "compile anew" else 12 + more
    assert int(model.optimizer.iterations) == own
    assert_sparse(model)
    assert installed_update(model) is None
    assert not {"train_step", "make_train_function"} & vars(model).keys()


@pytest.mark.slow
def test_topology_is_recorded_across_optimizers():
    rows = {}
    for name in ("make", "compile anew"):
        topology = TopologyDiagnostics()
        again = At("on_epoch_end", ACTIONS[name][0])
        fit(network(), [RigL(**EVERY_SECOND), topology, again], DATA, epochs=2)
        whole = [row for row in topology.rows if row["layer"] == "all"]
        rows[name] = [row["step"] for row in whole]
        assert all(row["loss_after"] is not None for row in whole[1:])
    assert rows["make"] == rows["compile anew"] == [0, 2, 4, 6, 8, 10]


def test_a_train_step_that_is_replaced_within_fit():
    model, seen = network(), []
    method = RigL(**EVERY_SECOND)

    def exchange(model):
        own = type(model).train_step

        def train_step(data):
            seen.append(1)
            return own(model, data)

        model.train_step = train_step
        model.make_train_function(force=True)

    fit(model, [method, At("on_epoch_end", exchange)], DATA, epochs=2)
    assert updates(method) == [2, 4, 6, 8, 10] and len(seen) == 6
    # It is the model's own train step now.
    assert fit(model, [], DATA) and len(seen) == 12


def test_training_before_the_plan_is_refused():
    early = At("on_train_begin", ACTIONS["train_on_batch"][0])
    with pytest.raises(ValueError, match="list that callback after RigL"):
        fit(network(), [RigL(**EVERY_SECOND), early], DATA)


@pytest.mark.slow_but("same")
@pytest.mark.parametrize("other", [False, True], ids=["same", "other model"])
def test_a_callback_trains_one_model_at_a_time(other):
    model, second = network(), network()
    method, refused = RigL(**EVERY_SECOND), []
    before = masks(second)

    def nested(model):
        with pytest.raises(ValueError, match="has not ended.*another") as info:
            fit(second if other else model, [method], DATA)
        refused.append(info)

    fit(model, [method, At("on_epoch_end", nested)], DATA, epochs=2)
    assert len(refused) == 1
    assert updates(method) == [2, 4, 6, 8, 10]
    assert equal_masks(before, masks(second))
    # It is allowed afterwards.
    fit(second, [method], DATA)
    assert not equal_masks(before, masks(second))


@pytest.mark.parametrize("fails", [False, True])
def test_a_method_within_a_fit_that_has_none(fails):
    """The outer `fit` continues without updates, even if the inner fails."""
    model, method, seen = network(), RigL(**EVERY_SECOND), []

    def nested(model):
        if fails:
            stop = At("on_epoch_end", stopped)
            with pytest.raises(KeyboardInterrupt) as info:
                fit(model, [method, stop], DATA)
            seen.append(info)  # its traceback keeps the frames alive
        else:
            fit(model, [method], DATA)
        seen.append(masks(model))

    fit(model, [At("on_epoch_end", nested)], DATA, epochs=2)
    # From step 6, at which the inner run begins.
    assert updates(method) == [6, 8, 10]
    assert int(model.optimizer.iterations) == 18
    assert equal_masks(seen[-1], masks(model))


def test_a_loop_that_calls_callbacks():
    """A loop with `train_on_batch` may call callbacks, as Keras documents."""
    model, method = network(), RigL(**EVERY_SECOND)
    own = model.make_train_function
    callbacks = keras.callbacks.CallbackList([method], model=model)

    def begin(callbacks):  # returns before training ends
        callbacks.on_train_begin()

    begin(callbacks)
    for step in range(6):
        callbacks.on_train_batch_begin(step)
        model.train_on_batch(DATA[0][:4], DATA[1][:4])
        callbacks.on_train_batch_end(step)
    method.fetch()
    assert updates(method) == [2, 4]
    callbacks.on_train_end()
    assert model.make_train_function == own
    # An abandoned run ends when its list of callbacks is deleted.
    begin(callbacks)
    assert installed_update(model) is method
    del callbacks
    assert installed_update(model) is None


# Training steps that apply an optimizer more than once.


class Twice(keras.Model):
    def train_step(self, data):
        for part in (slice(0, 2), slice(2, 4)):
            logs = Applies.train_step(self, tuple(d[part] for d in data))
        return logs


class InALoop(keras.Model):
    def train_step(self, data):
        def body(i, _):
            return i + 1, Applies.train_step(self, data)["loss"]

        _, loss = tf.while_loop(lambda i, _: i < 2, body, (0, 0.0))
        return {"loss": loss}


class InABranch(keras.Model):
    def train_step(self, data):
        x, y = data
        loss = tf.cond(
            self.optimizer.iterations < 3,
            lambda: Applies.train_step(self, (x, y))["loss"],
            lambda: Applies.train_step(self, (x, 2 * y))["loss"],
        )
        return {"loss": loss}


@pytest.mark.parametrize(
    "options",
    [{"run_eagerly": True}, {"run_eagerly": False}, {"jit_compile": True}],
    ids=str,
)
def test_two_applies_are_refused(options):
    model = network(cls=Twice, **{"run_eagerly": False, **options})
    before = masks(model)
    with pytest.raises(ValueError, match="more than once. Make the method"):
        fit(model, [RigL(**EVERY_SECOND)], DATA)
    assert equal_masks(before, masks(model))


@pytest.mark.slow
def test_an_apply_that_is_repeated_is_refused():
    model = network(cls=InALoop, run_eagerly=False)
    before = masks(model)
    with pytest.raises(ValueError, match="optimizer more than once. Make the"):
        fit(model, [RigL(**EVERY_SECOND)], DATA)
    assert equal_masks(before, masks(model))


@pytest.mark.slow
def test_an_apply_in_each_of_two_branches():
    model = network(cls=InABranch, run_eagerly=False)
    method = RigL(**EVERY_SECOND)
    fit(model, [method], DATA)
    assert updates(method) == [2, 4]


class UpdatesTwice(keras.Model):
    def train_step(self, data):
        for part in (slice(0, 2), slice(2, 4)):
            x, y = (d[part] for d in data)
            with rigl_keras.dense_gradients(), tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
            variables = self.trainable_variables
            self.method.update(tape.gradient(loss, variables), variables)
        return {"loss": loss}


@pytest.mark.slow_but("4")
@pytest.mark.parametrize("frequency", [3, 4])
def test_update_judges_each_apply(frequency):
    """The advice of the error message works, also for odd steps."""
    model = network(cls=UpdatesTwice, run_eagerly=False)
    model.method = RigL(frequency=frequency, end_step=99, decay="constant")
    model.method.attach(model, model.optimizer)
    fit(model, [], DATA)
    model.method.fetch()
    assert int(model.optimizer.iterations) == 12
    assert updates(model.method) == list(range(frequency, 12, frequency))


# Layers that a method cannot update.


class TwoOptimizers(keras.Model):
    """The layer `d` has a second optimizer, unknown to `fit`."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        ours = self.get_layer("hidden").trainable_variables
        theirs = self.get_layer("d").trainable_variables
        gradients = tape.gradient(loss, [*ours, *theirs])
        self.optimizer.apply(gradients[: len(ours)], ours)
        self.other.apply(gradients[len(ours) :], theirs)
        return {"loss": loss}


@pytest.mark.slow_but("False")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_layers_of_another_optimizer_are_named_once(jit_compile):
    model = network(
        cls=TwoOptimizers, run_eagerly=False, jit_compile=jit_compile
    )
    # Built before, as variables cannot be made under XLA.
    model.other = keras.optimizers.SGD(0.1)
    model.other.build(model.get_layer("d").trainable_variables)
    before, seen = masks(model), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        look = At("on_epoch_end", lambda model: seen.extend(caught), nth=1)
        method = RigL(frequency=4, end_step=99)
        fit(model, [method, look], DATA, epochs=2)
    texts = [str(w.message) for w in caught if "reach" in str(w.message)]
    assert len(texts) == 1
    assert "RigL does not reach these masked layers: d. They" in texts[0]
    assert any("reach" in str(w.message) for w in seen)  # in the first epoch
    after = masks(model)
    assert (before["d"] == after["d"]).all()
    assert (before["hidden"] != after["hidden"]).any()


def test_a_loop_of_ones_own_names_them_too():
    model = network(cls=TwoOptimizers)
    model.other = keras.optimizers.SGD(0.1)
    method = RigL(frequency=4, end_step=99)
    step = method.wrap(model.train_step, model=model, optimizer=model.optimizer)
    step(tuple(tf.constant(part) for part in DATA))
    with pytest.warns(UserWarning, match="does not reach.*: d. They"):
        method.fetch()
    method.fetch()


def test_thawed_layers_join_and_frozen_ones_leave():
    model = network()
    hidden, d = (model.get_layer(name) for name in ("hidden", "d"))
    hidden.trainable = False
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True),
        "mse",
        run_eagerly=True,
    )
    model.optimizer.build(
        [v for layer in (hidden, d) for v in (layer.kernel, layer.layer.bias)]
    )
    states = [masks(model)]

    def exchange(model):
        states.append(masks(model))
        hidden.trainable, d.trainable = True, False
        model.make_train_function(force=True)

    method = SNFS(frequency=2, end_step=99, decay="constant")
    fit(model, [method, At("on_epoch_end", exchange)], DATA, epochs=2)
    states.append(masks(model))
    for name, moves in (("hidden", (False, True)), ("d", (True, False))):
        changed = [
            (one[name] != two[name]).any()
            for one, two in zip(states, states[1:], strict=False)
        ]
        assert tuple(changed) == moves
    assert_sparse(model)
    # The record has both layers.
    counts = [tuple(int(m.sum()) for m in s.values()) for s in states]
    assert method.trajectory[0][1] == counts[0]
    assert method.trajectory[-1][1] == counts[-1]


def test_all_may_be_frozen_within_fit():
    model = network()

    def freeze(model):
        for layer in masked_layers(model):
            layer.trainable = False
        model.add_weight(name="bias")  # Keras warns where nothing is trained
        model.make_train_function(force=True)

    states = []
    look = At("on_epoch_end", lambda model: states.append(masks(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of missing gradients
        model.optimizer.build(
            [*model.trainable_variables, model.add_weight(name="bias")]
        )
        freeze_once = At("on_epoch_end", freeze)
        fit(model, [RigL(**EVERY_SECOND), look, freeze_once], DATA)
    assert equal_masks(states[0], masks(model))
    with pytest.raises(ValueError, match="do not freeze all"):
        fit(model, [RigL(**EVERY_SECOND)], DATA)
