"""Outputs of a correct export differ by less than those of a wrong one."""

import keras
import numpy as np
import pytest
from keras import layers

import rigl_keras
from rigl_keras import compaction
from rigl_keras.exporting.comparison import difference, usual_tolerance
from rigl_keras.exporting.signatures import outputs_of, signature_of

EPSILON = 2.0**-23


def chain(convolutions, norms=0):
    x = inputs = keras.Input((8, 8, 2))
    for _ in range(convolutions):
        x = layers.Conv2D(2, 1)(x)
    for _ in range(norms):
        x = layers.BatchNormalization()(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize(
    "convolutions, norms, folded, terms",
    [
        (16, 0, 0, 16),
        (16, 9, 0, 16),  # rounding errors only
        (16, 9, 9, 25),
        (16, 9, None, 25),
        (16, 9, 4, 20),
    ],
)
def test_it_grows_with_the_root_of_the_layers(
    convolutions, norms, folded, terms
):
    model = chain(convolutions, norms)
    got = usual_tolerance(model, None, folded=folded)
    assert got == pytest.approx(24 * EPSILON * terms**0.5)
    masked = rigl_keras.sparsify(model, 0.5)
    assert usual_tolerance(masked, None, folded=folded) == got


def test_it_is_never_less_than_it_was():
    assert usual_tolerance(chain(2), None) == 1e-5
    assert 24 * EPSILON * 2**0.5 < 1e-5


def test_other_precisions_do_not_grow():
    model = chain(16)
    assert usual_tolerance(model, "float16") == 2e-2
    assert usual_tolerance(model, "int8", folded=None) == 0.1
    inputs = keras.Input((8,))
    half = layers.Dense(2, dtype="mixed_bfloat16")(inputs)
    assert usual_tolerance(keras.Model(inputs, half), None) == 2e-2


@pytest.fixture(scope="module")
def deep():
    """Returns a slim ResNet-50 with statistics of a random batch."""
    keras.utils.set_random_seed(0)
    model = rigl_keras.models.resnet50(channel_scale=0.25)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0  # one batch sets the statistics
    draw = np.random.default_rng(0)
    model(draw.standard_normal((16, 32, 32, 3)).astype("f"), training=True)
    return rigl_keras.sparsify(model, 0.1, product="dense")


@pytest.mark.slow
def test_a_deep_network_with_folded_norms_passes(deep, tmp_path):
    report = rigl_keras.export(
        deep, tmp_path / "e", fold_batch_norm=True, measure=False
    )
    assert len(report.folded) == 53
    assert report.tolerance == pytest.approx(24 * EPSILON * 107**0.5)
    assert 0 < report.max_difference <= report.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, -1])
def test_one_wrong_weight_does_not(deep, place, monkeypatch, tmp_path):
    """Changes the largest weight of the first layer, or a unit of the last.

    The change is a hundredth. A single weight of the last layer may have
    almost no effect, if the feature that it reads is almost 0.
    """
    fold = compaction.fold_batch_norm

    def fold_wrongly(model):
        folded, report = fold(model)
        kernels = [w for w in folded.trainable_weights if len(w.shape) > 1]
        kernel = kernels[place].numpy()
        if place == 0:
            kernel.flat[np.abs(kernel).argmax()] *= 1.01
        else:
            kernel[:, 0] *= 1.01
        kernels[place].assign(kernel)
        return folded, report

    monkeypatch.setattr(compaction, "fold_batch_norm", fold_wrongly)
    with pytest.raises(ValueError, match="disagrees with the model"):
        rigl_keras.export(
            deep, tmp_path / "e", fold_batch_norm=True, measure=False
        )


def test_one_wrong_weight_of_a_small_network():
    """In each layer, a wrong weight exceeds the tolerance."""
    keras.utils.set_random_seed(0)
    model = rigl_keras.sparsify(rigl_keras.models.lenet5(), 0.1)
    signature = signature_of(model)
    arrays = signature.random(3)
    wanted = outputs_of(model, signature, arrays)
    tolerance = usual_tolerance(model, None)
    assert difference(wanted, wanted) <= tolerance
    for layer in rigl_keras.masked_layers(model):
        right = layer.kernel.numpy()
        wrong = right.copy()
        wrong.flat[np.abs(wrong).argmax()] *= 1.01
        layer.kernel.assign(wrong)
        got = outputs_of(model, signature, arrays)
        assert difference(got, wanted) > tolerance, layer.name
        layer.kernel.assign(right)
