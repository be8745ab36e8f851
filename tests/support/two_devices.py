"""Checks on two devices, which test_devices.py runs in separate processes.

    python -m support.two_devices NAME...

TensorFlow must know of two devices before it starts. Two strategies at a time
mix up their sums, so `a_run_on_two_devices` must run alone.
"""

import dataclasses
import functools
import pathlib
import sys
import tempfile
import traceback
import warnings

import keras
import matplotlib.figure
import numpy as np
import tensorflow as tf
from keras import layers

import gin
import rigl_keras
from rigl_keras.conventions import ORIGINAL
from rigl_keras.experiments.runs import train_command
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.methods.pruning import MagnitudePruning
from rigl_keras.methods.rigl import SET, SNFS, RigL
from rigl_keras.schedules import SparsityRamp
from support.exchanged import noting_shapes

ONE = tf.distribute.get_strategy()
WINDOW = dict(frequency=3, drop_fraction=0.4, end_step=12)
RAMP = SparsityRamp(
    final_density=0.2,
    initial_density=0.5,
    begin_step=1,
    end_step=9,
    frequency=2,
)
METHODS = {
    "RigL": lambda: RigL(**WINDOW),
    "SET": lambda: SET(**WINDOW),
    "SNFS": lambda: SNFS(**WINDOW),
    "RigL-SG": lambda: RigL(redistribution="gradient", **WINDOW),
    "MagnitudePruning": lambda: MagnitudePruning(RAMP),
}


@functools.cache
def two():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def examples():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((48, 6)).astype(np.float32)
    return x, draw.integers(0, 3, 48)


def made(strategy, optimizer=None, product="auto", **options):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        dense = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(
                    16,
                    activation="relu",
                    kernel_regularizer=keras.regularizers.L2(1e-2),
                    name="hidden",
                ),
                layers.Dense(3, name="head"),
            ],
            name="net",  # masks are drawn from it
        )
        model = sparsify(dense, 0.5, product=product)
        model.compile(
            optimizer() if optimizer else keras.optimizers.SGD(0.1, 0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **options,
        )
    return model


@functools.cache
def first_masks():
    return [m.mask.numpy() for m in masked_layers(made(ONE))]


@functools.cache
def trained_on_one(name, product):
    """Returns a model trained on one device, which several checks share.

    It runs eagerly, which takes less time than to trace it.
    """
    return trained(ONE, METHODS[name](), product=product, run_eagerly=True)


def trained(strategy, method, **options):
    """Returns a model after 18 steps of 8 examples, and its method."""
    model = made(strategy, **options)
    data = tf.data.Dataset.from_tensor_slices(examples()).batch(8)
    model.fit(data, epochs=3, shuffle=False, verbose=0, callbacks=[method])
    assert int(model.optimizer.iterations.numpy()) == 18
    return model, method


def copies(strategy, variable):
    return [
        copy.numpy()
        for copy in strategy.experimental_local_results(variable.value)
    ]


def assert_same(method, strategy=None, one=None, **options):
    """Checks that training on two devices gives the same as on one.

    `one` is the model trained on one device, if it exists already; otherwise
    one is trained eagerly. Returns the model of two devices.
    """
    strategy = strategy or two()
    start = first_masks()
    eagerly = options | {"run_eagerly": True, "steps_per_execution": 1}
    one, on_one = one or trained(ONE, method(), **eagerly)
    many, on_many = trained(strategy, method(), **options)
    assert on_one.trajectory == on_many.trajectory
    assert len(on_one.trajectory) > 3
    moved = False
    for was, ours, theirs in zip(
        start, masked_layers(one), masked_layers(many), strict=True
    ):
        mask = ours.mask.numpy()
        moved |= (mask != was).any()
        found = copies(strategy, theirs.mask)
        assert len(found) == strategy.num_replicas_in_sync
        for copy in found:
            np.testing.assert_array_equal(copy, mask)
        for copy in copies(strategy, theirs.kernel):
            assert not copy[mask == 0].any()
    assert moved
    state = [*one.weights, *one.optimizer.variables]
    same = [*many.weights, *many.optimizer.variables]
    for ours, theirs in zip(state, same, strict=True):
        for copy in copies(strategy, theirs):
            np.testing.assert_allclose(copy, ours.numpy(), rtol=1e-4, atol=1e-6)
    return many


def refused(action, *words):
    try:
        action()
    except ValueError as error:
        for word in words:
            assert word in str(error), error
    else:
        raise AssertionError(f"Not refused: {words}")


def check_active_gradients_alone_travel():
    """Exchanges three of six gradients of a kernel, those of its bias, and
    six numbers.

    The second device has twice the gradients of the first.
    """
    strategy = two()
    with strategy.scope():
        dense = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="d")])
        model = sparsify(dense, 0.5)
        (layer,) = masked_layers(model)
        layer.assign_mask([[1, 0], [0, 1], [1, 0]])
        layer.kernel.assign(tf.zeros([3, 2]))
        optimizer = keras.optimizers.SGD(1.0, momentum=0.5)
        optimizer.build(model.trainable_variables)
    rigl_keras.exchange_gradients(model, optimizer=optimizer)

    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        own = 1.0 + tf.cast(replica, tf.float32)
        # Entries outside the mask are not exchanged.
        kernel = own * [[1.0, 99.0], [99.0, 2.0], [4.0, 99.0]]
        bias = own * [8.0, 16.0]
        optimizer.apply([kernel, bias], model.trainable_variables)

    with noting_shapes() as shapes:
        strategy.run(step)
    assert shapes == [[(3,), (2,), (6,)]] * 2, shapes
    moved = [[-3.0, 0.0], [0.0, -6.0], [-12.0, 0.0]]
    for variable in (layer.kernel, optimizer.momentums[0]):
        for copy in copies(strategy, variable):
            np.testing.assert_array_equal(copy, moved)
    for copy in copies(strategy, layer.layer.bias):
        np.testing.assert_array_equal(copy, [-24.0, -48.0])

    # The same number of connections, but other ones.
    _, other = strategy.experimental_local_results(layer.mask.value)
    other.assign(tf.constant([[0, 1], [0, 1], [1, 0]]) == 1)
    try:
        strategy.run(step)
    except tf.errors.InvalidArgumentError as error:
        assert "The replicas hold different masks" in error.message
    else:
        raise AssertionError("Not refused.")

    rigl_keras.exchange_gradients(model, optimizer=optimizer, of="all")
    with noting_shapes() as shapes:
        strategy.run(step)
    assert shapes == [[(3, 2), (2,)]] * 2, shapes


class Exchanging(RigL):
    def on_train_begin(self, logs=None):
        rigl_keras.exchange_gradients(self.model)
        super().on_train_begin(logs)


def check_active_gradients_of_one_machine():
    """Exchanges active gradients if the user has chosen this."""
    with noting_shapes() as shapes:
        assert_same(
            lambda: Exchanging(**WINDOW), one=trained_on_one("RigL", "auto")
        )
    assert [(None,), (16,), (None,), (3,), (6,)] in shapes
    assert_same(
        lambda: Exchanging(**WINDOW),
        optimizer=lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1, 0.9), initial_scale=4.0
        ),
    )


def check_exchanges_that_are_refused():
    model = made(two())
    refused(
        lambda: rigl_keras.exchange_gradients(model, of="none"), "of must be"
    )
    rigl_keras.exchange_gradients(model)
    refused(
        lambda: model.fit(
            *examples(), batch_size=8, verbose=0, callbacks=[SNFS(**WINDOW)]
        ),
        "SNFS needs dense gradients in each step",
        "of='all'",
    )
    with two().scope():
        model.compile("sgd", "mse", jit_compile=True)
        plain = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    refused(
        lambda: rigl_keras.exchange_gradients(model),
        "jit_compile=False",
        "of='all'",
    )
    refused(
        lambda: rigl_keras.exchange_gradients(plain), "found no masked layer"
    )
    refused(
        lambda: rigl_keras.exchange_gradients(sparsify(plain, 0.5)),
        "needs the optimizer",
    )


def check_gradients_are_averaged_before_their_magnitude():
    """Two examples, one for each device, whose gradients cancel at input 1.

    With w = 0 at inactive entries, loss = mean of y_hat: its gradient is the
    mean of the inputs, (1, 0, 0.5), while that of magnitudes is (1, 4, 0.5).
    Input 0 is active; of 1 and 2, the latter is to grow.
    """
    with two().scope():
        dense = keras.Sequential(
            [keras.Input((3,)), layers.Dense(1, use_bias=False, name="d")]
        )
        model = sparsify(dense, 1 / 3)
        layer = masked_layers(model)[0]
        layer.assign_mask([[1.0], [0.0], [0.0]])
        model.compile(
            keras.optimizers.SGD(0.0),
            lambda target, output: output - target,
        )
    x = np.array([[1, 4, 0.5], [1, -4, 0.5]], np.float32)
    data = tf.data.Dataset.from_tensor_slices((x, np.zeros((2, 1), "f")))

    class Growing(RigL):
        def drop_scores(self, layer, gradient, step):
            tf.debugging.assert_near(gradient, [[1.0], [0.0], [0.5]])
            return super().drop_scores(layer, gradient, step)

        # Otherwise dropped connections would be the first to grow.
        def grow_scores(self, layer, gradient, step):
            scores = super().grow_scores(layer, gradient, step)
            return tf.where(layer.mask.value, 0.0, scores)

    method = Growing(
        frequency=1, drop_fraction=1.0, end_step=1, decay="constant"
    )
    model.fit(
        data.batch(2).repeat(),
        steps_per_epoch=2,
        shuffle=False,
        verbose=0,
        callbacks=[method],
    )
    np.testing.assert_array_equal(layer.mask.numpy(), [[0], [0], [1]])


def check_masks_that_differ_are_refused():
    class Broken(RigL):
        def change_masks(self, optimizer, layers, gradients, step):
            grown = super().change_masks(optimizer, layers, gradients, step)
            _, other = strategy.experimental_local_results(layers[0].mask.value)
            other.assign(tf.reverse(other, axis=[1]))
            return grown

    strategy = two()
    refused(
        lambda: trained(strategy, Broken(**WINDOW)),
        "After the update at step 3 the replicas hold different masks",
    )


def check_infinite_gradients_are_refused():
    def spoilt(target, output):
        return tf.reduce_mean(output) * np.inf

    model = made(two())
    with two().scope():
        model.compile("sgd", spoilt)
    refused(
        lambda: model.fit(
            *examples(), batch_size=8, verbose=0, callbacks=[RigL(**WINDOW)]
        ),
        "RigL refused the update at step 3",
    )


class Twice(keras.Sequential):
    def train_step(self, data):
        for _ in range(2):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self(data[0], training=True) ** 2)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def check_two_applies_are_refused():
    with two().scope():
        dense = Twice([keras.Input((6,)), layers.Dense(3, name="d")])
        model = sparsify(dense, 0.5)
        model.compile(keras.optimizers.SGD(0.1))
    refused(
        lambda: model.fit(
            *examples(), batch_size=8, verbose=0, callbacks=[RigL(**WINDOW)]
        ),
        "applies its optimizer more than once",
    )


def check_steps_that_callbacks_take():
    """One of the updates is in a batch of `train_on_batch`."""
    x, y = examples()
    for strategy in (ONE, two()):
        model, method = made(strategy), RigL(**WINDOW)
        more = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, model=model: model.train_on_batch(
                x[:8], y[:8]
            )
        )
        model.fit(
            x, y, batch_size=8, epochs=2, verbose=0, callbacks=[method, more]
        )
        steps = [step for step, _ in method.trajectory]
        assert steps == [0, 3, 6, 9, 12], steps


def check_blocks_of_steps_with_loss_scaling():
    """Blocks of 4 and of 2 steps, at the end of an epoch, have updates."""

    def optimizer():
        inner = keras.optimizers.SGD(0.1, 0.9)
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)

    assert_same(METHODS["RigL"], optimizer=optimizer, steps_per_execution=4)


def check_sparse_kernels():
    """Sparse products on two devices give the same as dense ones on one."""
    if rigl_keras.kernels.load() is None:
        return
    for name in ("RigL", "SNFS"):
        dense = trained_on_one(name, "dense")
        sparse = assert_same(METHODS[name], product="sparse", one=dense)
        for layer in masked_layers(sparse):
            choices = layer.chosen_products().values()
            assert choices and all(choice.sparse for choice in choices)


def check_updates_after_a_step():
    after = dataclasses.replace(ORIGINAL, update_replaces_step=False)
    assert_same(lambda: RigL(conventions=after, **WINDOW))


def check_a_strategy_of_one_device():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    dense = trained_on_one("RigL", "dense")
    assert_same(METHODS["RigL"], strategy=strategy, one=dense, product="dense")


def check_masked_where_it_was_made():
    """`sparsify` masks a model in the scope in which it was made."""
    strategy = two()
    with strategy.scope():
        dense = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    model = sparsify(dense, 0.5)
    assert model.distribute_strategy is strategy
    (layer,) = masked_layers(model)
    for variable in (layer.mask, layer.kernel):
        found = copies(strategy, variable)
        assert len(found) == 2
        np.testing.assert_array_equal(*found)
    assert copies(strategy, layer.mask)[1].sum() == 9


def check_what_does_not_work_is_refused():
    accumulating = made(
        two(),
        lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    )
    refused(
        lambda: accumulating.fit(
            *examples(), batch_size=8, verbose=0, callbacks=[RigL(**WINDOW)]
        ),
        "gradient_accumulation_steps",
    )
    model = made(two())
    refused(
        lambda: RigL(**WINDOW).wrap(
            lambda x: x, model=model, optimizer=model.optimizer
        ),
        "MirroredStrategy",
        "model.fit",
    )
    by_hand = RigL(**WINDOW)
    by_hand.attach(model, model.optimizer)
    variables = model.trainable_variables
    refused(
        lambda: by_hand.update(
            [tf.zeros(v.shape) for v in variables], variables
        ),
        "update is for training steps of one device",
        "MirroredStrategy",
    )


def check_a_run_on_two_devices():
    """The last batch of an epoch has 29 examples, an odd number."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for strategy in ("one", "mirrored"):
            run_dir = pathlib.Path(folder, strategy)
            result = train_command.run(
                bindings=SMALL, run_dir=run_dir, strategy=strategy
            )
            gin.clear_config()
            model = keras.models.load_model(run_dir / "model.keras")
            found.append((result, model))
    (one, plain), (many, mirrored) = found
    assert one["settings"]["replicas"] == 1
    assert many["settings"]["replicas"] == 2
    assert many["steps"] == one["steps"] == 46
    assert many["test_accuracy"] == one["test_accuracy"]
    wanted = masked_layers(plain).masks
    for name, mask in masked_layers(mirrored).masks.items():
        np.testing.assert_array_equal(mask, wanted[name])
    for ours, theirs in zip(
        plain.get_weights(), mirrored.get_weights(), strict=True
    ):
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-6)


SMALL = [
    "train.model = @mlp",
    "mlp.hidden = (24, 16)",
    "train.density = 0.3",
    "train.epochs = 2",
    "train.keep_weights = [1]",
    "RigL.frequency = 5",
]

CHECKS = {
    **{
        name: lambda method=method: assert_same(method)
        for name, method in METHODS.items()
    },
    **{
        name.removeprefix("check_"): check
        for name, check in globals().items()
        if name.startswith("check_")
    },
}


def main(names):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "With .* many units have no active")
    # keras, where numpy 2 turns one of its variables into an array.
    warnings.filterwarnings("ignore", "__array__", DeprecationWarning)
    # Blank figures, as drawing takes as long as the run.
    matplotlib.figure.Figure.draw = lambda figure, renderer: None
    (cpu,) = tf.config.list_physical_devices("CPU")
    halves = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, halves)
    failed = False
    for name in names:
        try:
            CHECKS[name]()
            print(f"{name}: passed", flush=True)
        except Exception:
            failed = True
            print(f"{name}: failed\n{traceback.format_exc()}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
