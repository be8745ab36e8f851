"""What Keras and TensorFlow write of a masked model, and ONNX of a GELU."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.small_models import examples, small_model

import rigl_keras
from rigl_keras.exporting.export import export


def archived(model, path):
    archive = keras.export.ExportArchive()
    archive.track(model)
    spec = tf.TensorSpec((None, *model.input_shape[1:]))
    archive.add_endpoint("serve", fn=model.call, input_signature=[spec])
    archive.write_out(path, verbose=False)


@pytest.mark.parametrize(
    "write, endpoint",
    [
        (lambda model, path: model.export(path, verbose=False), "serve"),
        (tf.saved_model.save, None),
        (archived, "serve"),
    ],
    ids=["export", "saved_model", "ExportArchive"],
)
def test_saved_models_that_keras_writes_can_be_loaded(
    write, endpoint, tmp_path
):
    model = rigl_keras.sparsify(small_model(), 0.2)
    x = tf.constant(examples()[0][:3])
    write(model, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    if endpoint:
        got = getattr(loaded, endpoint)(x)
        np.testing.assert_allclose(got, model(x), rtol=1e-5, atol=1e-5)
    # Checkpoints have floats, as those of earlier versions, and load as before.
    before = [m.mask.numpy() for m in rigl_keras.masked_layers(model)]
    path = tf.train.Checkpoint(model).save(str(tmp_path / "checkpoint"))
    kinds = dict(tf.train.load_checkpoint(path).get_variable_to_dtype_map())
    assert tf.bool not in kinds.values()
    tf.train.Checkpoint(model).restore(path).assert_consumed()
    for mask, layer in zip(
        before, rigl_keras.masked_layers(model), strict=True
    ):
        np.testing.assert_array_equal(mask, layer.mask.numpy())


def test_litert_converts_a_masked_model():
    model = rigl_keras.sparsify(small_model(), 0.2)
    converted = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    assert len(converted) > 4 * rigl_keras.count(model).nonzeros


def test_gelu_reaches_onnx(tmp_path):
    inputs = keras.Input((6,))
    x = layers.Dense(8, activation="gelu")(inputs)
    model = rigl_keras.sparsify(keras.Model(inputs, layers.Dense(3)(x)), 0.5)
    export(model, tmp_path / "out", format="onnx", measure=False)
