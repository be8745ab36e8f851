"""Checks on two workers, which test_devices.py runs in both processes.

    python -m support.two_workers     with the worker's TF_CONFIG

Each check compares the exchanged gradients with those of an exchange of all.
"""

import json
import os
import sys
import traceback
import warnings

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import rigl_keras
from rigl_keras.masking.masked_layers import masked_layers
from support.exchanged import noting_shapes

WINDOW = dict(frequency=3, drop_fraction=0.4, end_step=12)
draw = np.random.default_rng(0)
X = draw.standard_normal((48, 6)).astype(np.float32)
Y = draw.integers(0, 3, 48)


def sgd(**options):
    return keras.optimizers.SGD(0.1, 0.9, **options)


def made(strategy, optimizer=sgd, penalty=None, **options):
    keras.utils.set_random_seed(0)
    hidden = layers.Dense(
        16, activation="relu", kernel_regularizer=penalty, name="hidden"
    )
    with strategy.scope():
        dense = keras.Sequential(
            [keras.Input((6,)), hidden, layers.Dense(3, name="head")],
            name="net",  # masks are drawn from it
        )
        model = rigl_keras.sparsify(dense, 0.5, product="dense")
        model.compile(
            optimizer(),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **options,
        )
    return model


ACTIVE = {((None,), (16,), (None,), (3,), (6,))}
LAST = {((6, 16), (16,), (None,), (3,), (6,))}
KERAS: set = set()  # Keras itself sums all gradients


def by_fit(model, method=None):
    method = method and method()
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    with noting_shapes() as shapes:
        model.fit(
            data,
            epochs=3,
            shuffle=False,
            verbose=0,
            callbacks=[method] if method else [],
        )
    assert int(model.optimizer.iterations.numpy()) == 18
    return method.trajectory if method else [], shapes


def by_loop(model):
    """Trains in a custom loop, as in TensorFlow's guide to strategies."""
    strategy = model.distribute_strategy
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    loss_of = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="sum"
    )

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True)) / 8
        variables = model.trainable_variables
        model.optimizer.apply(tape.gradient(loss, variables), variables)

    @tf.function
    def train_step(x, y):
        strategy.run(step, args=(x, y))

    with noting_shapes() as shapes:
        for x, y in strategy.experimental_distribute_dataset(data):
            train_step(x, y)
    return [], shapes


def check(strategy, *, train, travels, chosen=False, **options):
    """Trains with all gradients exchanged and with the ones to check."""
    whole = made(strategy, **options)
    rigl_keras.exchange_gradients(whole, of="all")
    active = made(strategy, **options)
    start = [m.mask.numpy() for m in masked_layers(active)]
    if chosen:
        rigl_keras.exchange_gradients(active)
    wanted, _ = train(whole)
    found, shapes = train(active)
    assert {tuple(shape) for shape in shapes} == travels, shapes
    assert found == wanted
    masks = [m.mask.numpy() for m in masked_layers(active)]
    for one, other in zip(masks, masked_layers(whole), strict=True):
        np.testing.assert_array_equal(one, other.mask.numpy())
    moved = any((a != b).any() for a, b in zip(start, masks, strict=True))
    assert moved == bool(found)
    for model in (whole, active):
        variables = [*model.weights, *model.optimizer.variables]
        if model is whole:
            wanted = [v.numpy() for v in variables]
        for variable, value in zip(variables, wanted, strict=True):
            np.testing.assert_allclose(
                variable.numpy(), value, rtol=1e-5, atol=1e-7
            )


def scaled():
    return keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=4.0)


def trained_by(kind, *arguments, **options):
    return lambda model: by_fit(model, lambda: kind(*arguments, **options))


def rigl(**options):
    return trained_by(rigl_keras.RigL, **WINDOW, **options)


def pruning():
    ramp = rigl_keras.SparsityRamp(
        final_density=0.2,
        initial_density=0.5,
        begin_step=1,
        end_step=9,
        frequency=2,
    )
    return trained_by(rigl_keras.MagnitudePruning, ramp)


# Lambdas: TensorFlow must know the workers before it makes any tensor.
CHECKS = {
    "RigL, clipped": lambda: dict(
        train=rigl(),
        travels=ACTIVE,
        optimizer=lambda: sgd(global_clipnorm=0.5),
        penalty=keras.regularizers.L2(1e-2),
    ),
    "RigL between layers, in blocks of steps": lambda: dict(
        train=rigl(redistribution="gradient"),
        travels=ACTIVE,
        steps_per_execution=4,
    ),
    "pruning, scaled loss": lambda: dict(
        train=pruning(), travels=ACTIVE, optimizer=scaled
    ),
    "SNFS": lambda: dict(
        train=trained_by(rigl_keras.SNFS, **WINDOW), travels=KERAS
    ),
    # This penalty also pulls weights outside the mask.
    "a penalty of another kind": lambda: dict(
        train=rigl(),
        travels=LAST,
        penalty=keras.regularizers.OrthogonalRegularizer(),
    ),
    "static, by itself": lambda: dict(train=by_fit, travels=KERAS),
    "static, chosen": lambda: dict(train=by_fit, travels=ACTIVE, chosen=True),
    "a loop": lambda: dict(train=by_loop, travels=ACTIVE, chosen=True),
}


def check_that_masks_differ(strategy, index):
    """Comes last, as workers cannot continue after the error."""
    model = made(strategy)
    if index == 1:
        for layer in masked_layers(model):
            layer.assign_mask(layer.mask.numpy()[::-1])
    try:
        rigl()(model)
    except tf.errors.InvalidArgumentError as error:
        assert "The replicas hold different masks" in error.message, error
    else:
        raise AssertionError("Not refused.")


def main():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "With .* many units have no active")
    # keras, where numpy 2 turns one of its variables into an array.
    warnings.filterwarnings("ignore", "__array__", DeprecationWarning)
    strategy = rigl_keras.replicas.MultiWorkerMirroredStrategy()
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    failed = False
    for name, options in CHECKS.items():
        try:
            check(strategy, **options())
            print(f"{name}: passed", flush=True)
        except Exception:
            failed = True
            print(f"{name}: failed\n{traceback.format_exc()}", flush=True)
    check_that_masks_differ(strategy, index)
    print("other masks: passed", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
