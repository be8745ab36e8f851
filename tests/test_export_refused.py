"""Exports that are refused, as arguments are wrong or outputs disagree."""

import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.kinds import KINDS
from support.small_models import compiled, examples, small_model, two_headed

import rigl_keras
from rigl_keras.exporting.export import export
from rigl_keras.exporting.formats import FORMATS


def test_given_inputs(tmp_path):
    model = rigl_keras.sparsify(two_headed(), 0.5)
    a, b = np.ones((2, 6)), np.ones((2, 4))
    export(model, tmp_path / "out", inputs={"a": a, "b": b}, measure=False)
    for inputs, said in (
        (a, "structure with which the model is"),
        ({"a": a}, "structure with which the model is"),
        ({"a": b, "b": b}, "input 'a' is float32 of shape"),
        ({"a": a[:0], "b": b[:0]}, "at least one example"),
        ({"a": a, "b": b[:1]}, "equally many examples"),
        ({"a": a * np.nan, "b": b}, "NaN or infinite values"),
        ({"a": a.astype(complex), "b": b}, "Received: complex128"),
    ):
        with pytest.raises(ValueError, match=said):
            export(model, tmp_path / "b", inputs=inputs, measure=False)
    assert not (tmp_path / "b").exists()


def test_refuses(tmp_path):
    model = compiled(rigl_keras.sparsify(small_model(), 0.2))
    model.fit(*examples(), verbose=0)
    for options, said in (
        ({"format": "pickle"}, "format must be one of"),
        ({"format": None}, "format must be one of"),
        ({"quantization": "int4"}, "quantization must be one of"),
        ({"quantization": "int8"}, "needs format='tflite'"),
        ({"format": "tflite", "quantization": "int8"}, "Pass inputs"),
        ({"tolerance": 0}, "tolerance must be a positive number"),
        ({"tolerance": "loose"}, "tolerance must be a positive number"),
        ({"overwrite": "False"}, "overwrite must be True or False"),
        ({"fold_batch_norm": 1}, "fold_batch_norm must be True or False"),
    ):
        with pytest.raises(ValueError, match=said):
            export(model, tmp_path / "a", **options)
    with pytest.raises(ValueError, match="no masked layer"):
        export(small_model(), tmp_path / "a")
    with pytest.raises(ValueError, match="takes a built Keras model"):
        export("model.keras", tmp_path / "a")
    with pytest.raises(ValueError, match="takes for a pattern"):
        export(model, tmp_path / "lr[0.1]")
    with pytest.raises(ValueError, match="cannot be written .File name too"):
        export(model, tmp_path / ("a" * 300))
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        with pytest.raises(ValueError, match="outside of strategy.scope"):
            export(model, tmp_path / "a")
    with pytest.raises(ValueError, match="is the folder to write"):
        export(model, tmp_path / "model.tflite", format="tflite")
    with pytest.raises(ValueError, match="is subclassed"):
        subclassed = rigl_keras.sparsify(KINDS["subclassed"](), 0.5)
        export(subclassed, tmp_path / "a", fold_batch_norm=True)

    head = model.get_layer("head")
    kernel = head.kernel.numpy()
    head.kernel.assign(np.ones_like(kernel))
    with pytest.raises(ValueError, match="'head' holds .* outside its mask"):
        export(model, tmp_path / "a")
    head.kernel.assign(np.full_like(kernel, np.nan) * head.mask.numpy())
    with pytest.raises(ValueError, match="NaN"):
        export(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


NEED_KERNELS = ("sparse_saved_model", "native")


@pytest.mark.slow_but("saved_model", *NEED_KERNELS, "onnx", "keras")
@pytest.mark.parametrize("format", list(FORMATS))
def test_what_disagrees_is_not_written(format, tmp_path, monkeypatch):
    if format in NEED_KERNELS and rigl_keras.kernels.load() is None:
        pytest.skip(f"no kernels: {rigl_keras.kernels.unavailable()}")
    model = rigl_keras.sparsify(small_model(), 0.2)
    load = FORMATS[format].load

    def load_wrongly(*arguments):
        run = load(*arguments)
        return lambda x: {n: y + 1e-3 for n, y in run(x).items()}

    monkeypatch.setattr(FORMATS[format], "load", load_wrongly)
    with pytest.raises(ValueError, match="disagrees with the model"):
        export(
            model, tmp_path / "new" / "exported", format=format, measure=False
        )
    assert not list(tmp_path.iterdir())


def test_a_batch_size_fixed_by_mistake_is_noticed(tmp_path, monkeypatch):
    model = rigl_keras.sparsify(small_model(), 0.2)
    load = FORMATS["saved_model"].load

    def load_for_one(*arguments):
        run = load(*arguments)
        return lambda x: {n: y[:1] for n, y in run(x).items()}

    monkeypatch.setattr(FORMATS["saved_model"], "load", load_for_one)
    with pytest.raises(ValueError, match="has the shape .1, 10. instead"):
        export(model, tmp_path / "exported", measure=False)


@pytest.mark.slow_but("int8")
@pytest.mark.parametrize("quantization", [None, "float16", "int8"])
def test_a_constant_does_not_agree(quantization, tmp_path, monkeypatch):
    """An export that returns only the mean output is refused."""
    model = rigl_keras.sparsify(
        keras.Sequential(
            [
                keras.Input((32,)),
                layers.Dense(64, activation="relu"),
                layers.Dense(100, activation="softmax"),
            ]
        ),
        0.2,
    )
    format = "tflite" if quantization else "saved_model"
    load = FORMATS[format].load

    def load_a_constant(*arguments):
        run = load(*arguments)
        return lambda x: {n: np.full_like(y, 0.01) for n, y in run(x).items()}

    monkeypatch.setattr(FORMATS[format], "load", load_a_constant)
    with pytest.raises(ValueError, match="disagrees with the model"):
        export(
            model,
            tmp_path / "exported",
            format=format,
            quantization=quantization,
            inputs=np.random.default_rng(0).standard_normal((64, 32)),
            measure=False,
        )


def test_bits_that_are_wrong_are_noticed(tmp_path, monkeypatch):
    model = rigl_keras.sparsify(small_model(), 0.2)
    monkeypatch.setattr(
        np, "packbits", lambda bits, real=np.packbits: real(bits)[::-1]
    )
    with pytest.raises(ValueError, match="disagrees with the model"):
        export(model, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_nan_outputs_are_refused(tmp_path):
    model = rigl_keras.sparsify(small_model(), 0.2)
    norm = model.get_layer("norm")
    norm.moving_variance.assign(norm.moving_variance * 0 - 1)
    with pytest.raises(ValueError, match="NaN or infinite outputs"):
        export(model, tmp_path / "exported")


NONSENSE = [
    None,
    True,
    "",
    b"x",
    float("nan"),
    -1,
    3.7,
    [],
    {},
    [[1], [2, 3]],
    int,
    object(),
    np.array(1),
    np.array([]),
    np.array(["a"]),
    np.array([None]),
    np.array([1j]),
    tf.constant("a"),
]


@pytest.mark.parametrize(
    "name", ["path", "format", "quantization", "inputs", "tolerance"]
)
def test_nonsense(name, tmp_path, monkeypatch):
    """Each argument is used, or refused with its name and its value."""
    monkeypatch.chdir(tmp_path)
    model = rigl_keras.sparsify(KINDS["Sequential"](), 0.5)
    written = tmp_path / "out"
    for value in NONSENSE:
        arguments = {"path": written, "measure": False, name: value}
        try:
            export(model, **arguments)
        except ValueError as error:
            assert "eceived" in str(error), (value, error)
        else:
            # None, and numbers equal to 1.
            assert value is None or name in ("tolerance", "path"), value
            shutil.rmtree(written)
        assert not list(tmp_path.iterdir()), value


class Unregistered(layers.Layer):
    def call(self, x):
        return x + 1


def unregistered():
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(3)(Unregistered()(inputs)))


def grouped():
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 3, groups=2, name="pair")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def free_images():
    """Upsampling that needs the size of the images, which is free."""
    inputs = keras.Input((None, None, 4))
    x = layers.Conv2D(4, 3)(inputs)
    return keras.Model(inputs, layers.UpSampling2D(interpolation="bilinear")(x))


def free_steps():
    """TimeDistributed, which Keras computes otherwise in a free length."""
    inputs = keras.Input((None, 6))
    x = layers.Conv1D(8, 3, padding="same")(layers.Dense(8)(inputs))
    return keras.Model(inputs, layers.TimeDistributed(layers.Dense(3))(x))


@pytest.mark.parametrize(
    "make, format, said",
    [
        (unregistered, "keras", "register_keras_serializable.*saved_model"),
        (grouped, "onnx", "ONNX has no operation for .*pair.*'saved_model'"),
        (
            free_images,
            "saved_model",
            "cannot trace it.*are free: give keras",
        ),
        (free_steps, "saved_model", "has the shape.*keras.Input a fixed shape"),
        (free_steps, "native", "in time_distributed.*Pass format="),
    ],
)
def test_what_others_refuse_is_told_in_one_line(make, format, said, tmp_path):
    model = rigl_keras.sparsify(make(), 0.5)
    with pytest.raises(ValueError, match=said) as raised:
        export(model, tmp_path / "out", format=format, measure=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_replaced(tmp_path):
    model = rigl_keras.sparsify(grouped(), 0.5)
    (tmp_path / "out").mkdir()
    export(
        model, tmp_path / "out", format="keras", measure=False, overwrite=True
    )
    assert (tmp_path / "out" / "model.keras").exists()
