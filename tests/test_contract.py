"""What holds for every method, beyond one training step.

The methods are the rows of `test_callbacks.METHODS`, where the contracts of
counts, zeros, resume and config are; here are those that outlive a `fit`.
"""

import keras
import numpy as np
import pytest
from conftest import compiled, examples, masks, small_model
from keras import layers
from test_callbacks import METHODS

from rigl_keras import count, sparsify, strip

every_method = pytest.mark.parametrize("method", METHODS)


def tiny():
    """Batch norm and momentum, which a resume must restore as well.

    No dropout: Keras does not save the state of its random layers.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="hidden")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    model = sparsify(keras.Model(inputs, layers.Dense(3, name="d")(x)), 0.5)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)
    model.compile(optimizer, "mse")
    return model


def fit(model, callbacks, epochs, initial_epoch=0):
    draw = np.random.default_rng(0)
    model.fit(
        draw.standard_normal((20, 6)).astype(np.float32),
        draw.standard_normal((20, 3)).astype(np.float32),
        batch_size=4,
        shuffle=False,
        epochs=epochs,
        initial_epoch=initial_epoch,
        callbacks=callbacks,
        verbose=0,
    )


def state(model):
    return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]


def assert_equal(one, two):
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(ours, theirs)


WINDOW = dict(frequency=2, end_step=9)


@pytest.fixture(scope="module", params=METHODS)
def whole_run(request):
    """The method's name and the state after 10 steps in one go."""
    model = tiny()
    start = masks(model)
    fit(model, METHODS[request.param](**WINDOW), 2)
    moved = any((m != start[n]).any() for n, m in masks(model).items())
    assert moved == (request.param != "static")
    return request.param, state(model)


def test_saved_in_the_middle_ends_the_same(whole_run, tmp_path):
    method, want = whole_run
    model = tiny()
    fit(model, METHODS[method](**WINDOW), 1)
    assert int(model.optimizer.iterations.numpy()) == 5
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    fit(loaded, METHODS[method](**WINDOW), 2, initial_epoch=1)
    assert_equal(state(loaded), want)


def test_weights_alone_are_a_checkpoint(whole_run, tmp_path):
    """Into a model of other masks, which the file replaces."""
    method, want = whole_run
    model = tiny()
    fit(model, METHODS[method](**WINDOW), 1)
    model.save_weights(tmp_path / "at5.weights.h5")
    other = tiny()
    fit(other, METHODS[method](frequency=1, end_step=9), 1)
    other.load_weights(tmp_path / "at5.weights.h5")
    fit(other, METHODS[method](**WINDOW), 2, initial_epoch=1)
    assert_equal(state(other), want)


def test_interrupted_and_restored_by_keras(whole_run, tmp_path):
    """`BackupAndRestore` is how Keras itself resumes."""
    method, want = whole_run

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def callbacks():
        restore = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        return [restore, *METHODS[method](**WINDOW)]

    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), [*callbacks(), Stop()], 2)
    model = tiny()
    fit(model, callbacks(), 2)
    assert_equal(state(model), want)


@every_method
def test_trained_then_stripped_then_masked_anew(method):
    """The seed alone decides masks, whatever became of the weights."""
    model = compiled(sparsify(small_model(), 0.2, seed=4))
    first = masks(model)
    model.fit(
        *examples(),
        batch_size=16,
        shuffle=False,
        verbose=0,
        callbacks=METHODS[method](frequency=2, end_step=9),
    )
    cost = count(model)
    plain = strip(model)
    x, _ = examples(4, seed=9)
    np.testing.assert_array_equal(
        plain.predict(x, verbose=0), model.predict(x, verbose=0)
    )
    # Nothing was lost or added on the way: kept weights are the trained ones.
    assert cost.nonzeros == count(sparsify(plain, 0.2, seed=4)).nonzeros
    again = masks(sparsify(plain, 0.2, seed=4))
    assert again.keys() == first.keys()
    for name, mask in first.items():
        np.testing.assert_array_equal(again[name], mask)
