"""The newer methods in runs of `fit`."""

import keras
import numpy as np
import pytest
from support.resumed import fit, tiny

import rigl_keras
from rigl_keras.masking.masked_layers import masked_layers


def test_gradients_are_gathered_for_the_last_update_of_mest():
    """The update at `end_step`, which is no multiple, is the mean of two."""
    model, before = tiny(), {m.name: m.density for m in masked_layers(tiny())}
    method = rigl_keras.MEST(
        frequency=4, end_step=9, gradient_batches=2, drop_fraction=0.2
    )
    fit(model, [method], epochs=3)
    assert [step for step, _ in method.trajectory] == [0, 4, 8, 9]
    assert {m.name: m.density for m in masked_layers(model)} == before


def test_gse_draws_in_proportion_to_what_a_layer_has_now():
    """Density moves between layers; the graph does what eager steps do."""
    found = []
    for eagerly in (False, True):
        model = tiny(run_eagerly=eagerly)
        method = rigl_keras.GSE(
            frequency=2,
            end_step=40,
            drop_fraction=0.5,
            redistribution="gradient",
        )
        fit(model, [method], epochs=3)
        found.append(method.trajectory)
    assert len({counts for _, counts in found[0]}) > 1
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "method",
    [
        rigl_keras.MEST(frequency=4, end_step=90),
        rigl_keras.RigL(frequency=4, end_step=90, grow_init="initial_dist"),
    ],
    ids=["MEST", "initial_dist"],
)
def test_a_callback_forgets_another_model(method):
    fit(tiny(), [method], epochs=1)
    first = [v.numpy() for v in method.variables]
    other = tiny()
    for layer in masked_layers(other):
        mask = layer.mask.numpy()
        mask[0] = 0
        layer.assign_mask(mask)
    fit(other, [method], epochs=2, initial_epoch=1)
    kept = [v.numpy() for v in method.variables]
    assert any(
        a.shape != b.shape or (a != b).any()
        for a, b in zip(first, kept, strict=True)
    )


@pytest.mark.parametrize("make", [rigl_keras.TopKAST, rigl_keras.SRSTE])
def test_stored_weights_leave_weights_that_another_callback_sets(make):
    """With a learning rate of 0 a step changes no weight in the mask."""
    model, other = tiny(run_eagerly=True), tiny()
    model.optimizer.learning_rate = 0.0
    for layer in masked_layers(other):
        layer.assign_mask(1 - layer.mask.numpy())
        layer.kernel.assign(np.full(layer.kernel.shape, 7) * layer.mask.numpy())
    state = other.get_weights()

    class Restore(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.set_weights(state)

        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                for layer in masked_layers(self.model):
                    kernel = layer.kernel.numpy()
                    assert (kernel == 7 * layer.mask.numpy()).all()

    fit(model, [make(frequency=4, end_step=90), Restore()], epochs=1)
