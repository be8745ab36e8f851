"""The last update of a run that resumes in the middle of an epoch."""

import keras
import numpy as np
import pytest

from rigl_keras.masking.sparsify import sparsify
from rigl_keras.methods.rigl import RigL

STEPS, EPOCHS = 10, 4


@pytest.mark.parametrize(
    "iterations",
    [10, 13, 19],  # at the start of the second epoch, within it, at its end
)
def test_updates_end_where_they_would_have(iterations):
    model = sparsify(
        keras.Sequential([keras.Input((6,)), keras.layers.Dense(8)]), 0.5
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.optimizer.iterations.assign(iterations)
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((2, 20, 8))
    method = RigL(frequency=1, decay="constant")
    model.fit(
        x[:, :6],
        y,
        batch_size=2,
        initial_epoch=1,
        epochs=EPOCHS,
        callbacks=[method],
        verbose=0,
    )
    assert int(model.optimizer.iterations.numpy()) == iterations + 30
    updates = [step for step, _ in method.trajectory[1:]]
    # Updates end after three quarters of the whole run of 40 steps.
    assert updates == list(range(iterations, 30 + 1))
