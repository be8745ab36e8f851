"""Exports: their outputs elsewhere, their files and sizes, and reports."""

import dataclasses
import gc
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.kinds import KINDS, OPTIONS
from support.small_models import compiled, examples, small_model, two_headed

import rigl_keras
from rigl_keras import _timing
from rigl_keras.exporting import signatures
from rigl_keras.exporting.base_format import WriteOptions
from rigl_keras.exporting.export import export
from rigl_keras.exporting.export_report import check_export
from rigl_keras.exporting.formats import FORMATS

# Loads every export of a folder in a process that cannot import this package,
# runs the examples there, and writes the outputs.
SERVE = """
import pathlib, sys
sys.modules["rigl_keras"] = None  # importing it fails
import numpy as np, tensorflow as tf
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    serve = tf.saved_model.load(str(path / "model")).signatures[
        "serving_default"
    ]
    with np.load(path / "in.npz") as inputs:
        got = serve(**{k: tf.constant(v) for k, v in inputs.items()})
    np.savez(path / "out.npz", **{k: v.numpy() for k, v in got.items()})
"""


def shared_within():
    inner = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.Flatten()]
    )
    shared = layers.Dense(144, name="shared")
    inputs = keras.Input((8, 8, 3), name="image")
    return keras.Model(inputs, shared(shared(inner(inputs))))


def float64():
    return keras.Sequential(
        [
            keras.Input((5,), dtype="float64"),
            layers.Dense(8, dtype="float64"),
            layers.Dense(3, dtype="float64"),
        ]
    )


def half():
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(8, 3, dtype="mixed_bfloat16"),
            layers.Flatten(),
            layers.Dense(3, dtype="mixed_float16"),
        ]
    )


def stateful():
    inputs = keras.Input(batch_shape=(3, 4, 5))
    return keras.Model(
        inputs, layers.Dense(2)(layers.LSTM(6, stateful=True)(inputs))
    )


SERVED = {
    **KINDS,
    "two heads": two_headed,
    "shared within": shared_within,
    "LeNet-5": rigl_keras.models.lenet5,
    "ResNet-18": lambda: rigl_keras.models.resnet18(channel_scale=0.1),
    "float64": float64,
    "half precision": half,
    "stateful": stateful,
}


@pytest.mark.slow
def test_every_kind_of_model_is_served_without_this_package(tmp_path):
    wanted = {}
    for name, build in SERVED.items():
        model = rigl_keras.sparsify(build(), 0.2, **OPTIONS.get(name, {}))
        folder = tmp_path / name.replace(" ", "_")
        report = export(model, folder / "model", measure=False)
        assert report.max_difference <= 1e-5, name
        signature = signatures.signature_of(model)
        inputs = signature.random(5, seed=11)
        np.savez(folder / "in.npz", **inputs)
        wanted[folder] = signatures.outputs_of(model, signature, inputs)
    done = subprocess.run(
        [sys.executable, "-c", SERVE, tmp_path],
        cwd=tmp_path.parent,  # not the folder of the package
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, outputs in wanted.items():
        with np.load(folder / "out.npz") as got:
            assert set(got) == set(outputs)
            for name, want in outputs.items():
                # The same operations on the same numbers.
                np.testing.assert_allclose(
                    got[name].astype(np.float64),
                    want.astype(np.float64),
                    rtol=1e-5,
                    atol=1e-5,
                    err_msg=folder.name,
                )


@pytest.mark.slow
def test_states_go_on_from_call_to_call(tmp_path):
    model = rigl_keras.sparsify(stateful(), 0.5)
    before = [v.numpy() for v in model.variables]
    export(model, tmp_path / "exported", measure=False)
    # The comparison has not changed the model's variables.
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    serve = tf.saved_model.load(str(tmp_path / "exported")).signatures[
        "serving_default"
    ]
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype("float32")
    export(model, tmp_path / "given", inputs=x, measure=False)
    for _ in range(3):
        got = serve(inputs=tf.constant(x))["output_0"]
        np.testing.assert_allclose(got, model(x), atol=1e-6)


@pytest.mark.slow
def test_names_of_inputs_and_outputs(tmp_path):
    def names(build):
        model = rigl_keras.sparsify(build(), 0.5)
        export(model, tmp_path / "names", measure=False, overwrite=True)
        serve = tf.saved_model.load(str(tmp_path / "names")).signatures[
            "serving_default"
        ]
        given = serve.structured_input_signature[1]
        assert all(spec.shape[0] is None for spec in given.values())
        return sorted(given), sorted(serve.structured_outputs)

    assert names(two_headed) == (["a", "b"], ["output_0", "output_1"])
    assert names(shared_within) == (["image"], ["output_0"])
    # Named outputs keep their names; inputs without a name get one.
    several = KINDS["several inputs and outputs"]
    assert names(several) == (["one", "two"], ["a", "b"])
    assert names(small_model) == (["inputs"], ["output_0"])
    assert names(KINDS["subclassed"]) == (["inputs"], ["output_0"])

    def oddly_named():
        inputs = [
            keras.Input((4,), name="an image"),
            keras.Input((4,), name="an-image"),
            keras.Input((4,), name="1"),
            keras.Input((4,), name="class"),
            keras.Input((4,), name="self"),
        ]
        x = layers.Concatenate()(inputs)
        return keras.Model(inputs, {"class/1": layers.Dense(5)(x)})

    # Names of arguments may have only letters, digits and underscores.
    assert names(oddly_named) == (
        ["an_image", "an_image_", "class_", "input_1", "self_"],
        ["class/1"],
    )


@pytest.mark.slow
def test_in_a_session(tmp_path):
    """It loads in a session, as in TensorFlow Serving and saved_model_cli."""
    model = rigl_keras.sparsify(small_model(), 0.2)
    export(model, tmp_path / "exported", measure=False)
    x = examples(3)[0]
    np.save(tmp_path / "in.npy", x)
    command = shutil.which(
        "saved_model_cli", path=pathlib.Path(sys.executable).parent
    )
    done = subprocess.run(
        [
            *(command, "run", "--dir", tmp_path / "exported"),
            *("--tag_set", "serve", "--signature_def", "serving_default"),
            *("--inputs", f"inputs={tmp_path / 'in.npy'}"),
            *("--outdir", tmp_path),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = np.load(tmp_path / "output_0.npy")
    np.testing.assert_allclose(got, model(x), atol=1e-5)


@pytest.mark.slow
def test_what_others_make_of_it(tmp_path):
    """XLA compiles it, and converters can read its variables."""
    model = rigl_keras.sparsify(rigl_keras.models.mlp(hidden=(20,)), 0.2)
    export(model, tmp_path / "out", measure=False)
    x = np.random.default_rng(0).standard_normal((2, 28, 28, 1))
    x = x.astype(np.float32)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    serve = loaded.signatures["serving_default"]

    @tf.function(jit_compile=True)
    def compiled(x):
        return serve(input=x)["output_0"]

    np.testing.assert_allclose(compiled(x), model(x), atol=1e-5)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "out"))
    (tmp_path / "model.tflite").write_bytes(converter.convert())
    run = FORMATS["tflite"].load(tmp_path, None, None)
    got = run({"input": x})["output_0"]
    np.testing.assert_allclose(got, model(x), atol=1e-5)


@pytest.mark.slow
def test_two_in_one_process(tmp_path):
    models = [
        rigl_keras.sparsify(KINDS["Sequential"](), 0.5, seed=i)
        for i in range(2)
    ]
    x = np.ones((2, 5), np.float32)
    serve = []
    for i, model in enumerate(models):
        export(model, tmp_path / str(i), measure=False)
        # Keeps only the signature.
        loaded = tf.saved_model.load(str(tmp_path / str(i)))
        serve.append(loaded.signatures["serving_default"])
        del loaded
    gc.collect()
    for model, served in zip(models, serve, strict=True):
        got = served(inputs=tf.constant(x))["output_0"]
        np.testing.assert_allclose(got, model(x), atol=1e-6)


def bound(model):
    """Returns 1.05 x (values + one bit for each masked weight + the rest)."""
    masks = rigl_keras.masked_layers(model).masks
    masked = sum(mask.size for mask in masks.values())
    ones = sum(int(mask.sum()) for mask in masks.values())
    weights = sum(
        int(np.prod(v.shape)) for v in rigl_keras.strip(model).weights
    )
    return 1.05 * (4 * ones + masked / 8 + 4 * (weights - masked))


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [rigl_keras.models.wide_resnet, lambda: rigl_keras.models.resnet50(100)],
)
def test_size_of_the_report_networks(build, tmp_path):
    model = rigl_keras.sparsify(build(), 0.1)
    report = export(model, tmp_path / "exported", measure=False)
    variables = tmp_path / "exported" / "variables"
    size = sum(file.stat().st_size for file in variables.iterdir())
    assert report.variable_bytes == size
    # As small as promised, but not smaller than the nonzeros.
    assert 4 * report.nonzeros < size < bound(model)
    assert report.max_difference <= 1e-5
    assert report.density == pytest.approx(0.1, abs=1e-4)
    cost = rigl_keras.count(model)
    assert report.nonzeros == cost.nonzeros
    assert report.parameters == cost.parameters
    assert report.inference_flops == pytest.approx(cost.inference_flops)
    assert report.dense_inference_flops == cost.dense_inference_flops


@pytest.mark.slow
def test_what_is_measured(tmp_path):
    model = rigl_keras.sparsify(rigl_keras.models.mlp(), 0.1)
    report = export(model, tmp_path / "exported")
    assert report.dense_variable_bytes > 4 * 266_610 > report.variable_bytes
    assert report.bytes < report.dense_bytes
    assert report.gzip_bytes < report.dense_gzip_bytes
    assert report.load_seconds > 0 and report.dense_load_seconds > 0
    assert set(report.latency) == set(report.dense_latency) == {1, 32, 128}
    assert min(report.latency.values()) > 0
    table = str(report)
    for said in ("on disk", "gzip", "time to load", "latency at batch 32"):
        assert said in table
    assert f"{report.bytes / report.dense_bytes:.3f}x" in table
    # The check reads the same report, also after the folder was moved.
    (tmp_path / "exported").rename(tmp_path / "moved")
    moved = dataclasses.replace(report, path=str(tmp_path / "moved"))
    assert check_export(tmp_path / "moved") == moved


def trained():
    """Returns a trained masked model, with trained batch norms."""
    model = rigl_keras.sparsify(small_model(), 0.1)
    compiled(model).fit(*examples(), epochs=2, verbose=0)
    return model


def test_folded_and_without_dead_units(tmp_path):
    model = trained()
    plain = export(model, tmp_path / "plain", measure=False)
    small = export(
        model,
        tmp_path / "small",
        measure=False,
        fold_batch_norm=True,
        remove_dead_units=True,
    )
    assert small.folded == {"norm": "conv1"} and not small.not_folded
    assert "conv1" in small.removed or "conv2" in small.removed
    assert small.variable_bytes < plain.variable_bytes
    assert small.nonzeros < plain.nonzeros
    assert small.inference_flops < plain.inference_flops
    assert small.parameters == plain.parameters
    assert small.max_difference <= 1e-5
    assert "1 of 1 batch norms folded" in str(small)
    assert "dead units removed from" in str(small)
    kept = dataclasses.replace(small, not_folded={"bn": "it follows an Add"})
    assert "1 of 2 batch norms folded\n  bn: it follows an Add" in str(kept)


@pytest.mark.parametrize(
    "format", ["saved_model", "native", "tflite", "onnx", "keras"]
)
def test_the_lines_that_load_it_do(format, tmp_path, monkeypatch):
    """The printed lines load it, with the model's input and output names."""
    why = FORMATS[format].why_unavailable()
    if why is not None:
        pytest.skip(why)
    dense = keras.Sequential([keras.Input((6,), name="image"), layers.Dense(3)])
    model = rigl_keras.sparsify(dense, 0.5)
    path = tmp_path / "exported"
    report = export(model, path, format=format, measure=False)
    *_, head, one, two = str(report).splitlines()
    assert head == "load and call it:"
    monkeypatch.syspath_prepend(path)
    image = np.ones((4, 6), np.float32)
    names = {"tf": tf, "keras": keras, "image": image, "inputs": image}
    if format == "onnx":
        names["onnxruntime"] = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from tf.lite.Interpreter
        exec(f"{one.strip()}\n{two.strip()}", names)
    outputs = names["outputs"]
    if format == "onnx":
        (output,) = names["session"].get_outputs()
        outputs = {output.name: outputs[0]}
    if format != "keras":
        assert list(outputs) == ["output_0"]
        outputs = outputs["output_0"]
    np.testing.assert_allclose(
        outputs, model.predict(image, verbose=0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow_but(
    "Functional-onnx", "subclassed-tflite", "several inputs and outputs-keras"
)
@pytest.mark.parametrize("format", ["tflite", "onnx", "keras"])
@pytest.mark.parametrize(
    "kind", ["Functional", "several inputs and outputs", "subclassed"]
)
def test_other_formats(format, kind, tmp_path):
    model = rigl_keras.sparsify(KINDS[kind](), 0.2)
    masks = rigl_keras.masked_layers(model).masks
    report = export(model, tmp_path / "out", format=format, measure=False)
    file = FORMATS[format].file
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        file,
        "export.json",
    }
    assert report.bytes >= (tmp_path / "out" / file).stat().st_size
    assert report.max_difference <= 1e-5 and not report.notes
    # The export does not change a subclassed model.
    for name, mask in rigl_keras.masked_layers(model).masks.items():
        np.testing.assert_array_equal(mask, masks[name])


@pytest.mark.slow
def test_sparse_files_are_smaller(tmp_path):
    model = rigl_keras.sparsify(rigl_keras.models.mlp(), 0.1)
    signature = signatures.signature_of(model)
    for format in ("saved_model", "tflite", "onnx"):
        sizes = {}
        for sparse in (True, False):
            folder = tmp_path / f"{format}{sparse}"
            folder.mkdir()
            options = WriteOptions(sparse=sparse)
            FORMATS[format].write(model, signature, folder, options)
            files = [p for p in folder.rglob("*") if p.is_file()]
            sizes[sparse] = sum(p.stat().st_size for p in files)
        assert sizes[False] > 4 * 266_000, format
        # Values and indices: a byte, 8 to 16 bits, and 8 bytes each.
        assert sizes[True] < (0.35 if format == "onnx" else 0.2) * sizes[False]


def test_quantised(tmp_path):
    model = rigl_keras.sparsify(rigl_keras.models.mlp(), 0.2)
    x = np.random.default_rng(0).standard_normal((100, 28, 28, 1))
    sizes = []
    for quantization in (None, "float16", "int8"):
        report = export(
            model,
            tmp_path / str(quantization),
            format="tflite",
            quantization=quantization,
            inputs=x if quantization else None,
            measure=False,
        )
        assert report.max_difference <= report.tolerance and not report.notes
        assert report.quantization == quantization
        sizes.append(report.bytes)
    assert sizes[0] > sizes[1] > sizes[2]
    with pytest.raises(ValueError, match="differ by .* more than 1e-06"):
        export(
            model,
            tmp_path / "strict",
            format="tflite",
            quantization="float16",
            tolerance=1e-6,
            measure=False,
        )


def test_what_a_format_gives_up_is_said(tmp_path):
    """LiteRT supports loops only with a fixed batch size."""
    model = rigl_keras.sparsify(KINDS["Embedding"](), 0.5)
    report = export(model, tmp_path / "out", format="tflite", measure=False)
    assert any("the batch size is 1" in note for note in report.notes)
    with pytest.raises(ValueError, match="cannot calibrate the loops"):
        export(
            model,
            tmp_path / "int8",
            format="tflite",
            quantization="int8",
            inputs=np.ones((4, 4), np.int32),
            measure=False,
        )


def test_a_layer_of_which_one_kernel_is_masked(tmp_path):
    """The first layer under `uniform` has a dense kernel for its inputs."""
    inputs = keras.Input((4, 5))
    model = keras.Model(inputs, layers.Dense(3)(layers.LSTM(4)(inputs)))
    model = rigl_keras.sparsify(model, 0.5, distribution="uniform")
    report = export(model, tmp_path / "out", measure=False)
    cost = rigl_keras.count(model)
    assert report.inference_flops == pytest.approx(cost.inference_flops)
    assert report.nonzeros == cost.nonzeros


def test_no_optimizer_is_written(tmp_path):
    plain = compiled(rigl_keras.strip(rigl_keras.sparsify(small_model(), 0.1)))
    before = export(plain, tmp_path / "a", format="keras", measure=False)
    plain.optimizer.build(plain.trainable_variables)
    after = export(plain, tmp_path / "b", format="keras", measure=False)
    assert after.bytes == pytest.approx(before.bytes, rel=0.05)


def test_outputs_of_strings(tmp_path):
    inputs = keras.Input((4,), name="text", dtype="string")
    index = layers.StringLookup(vocabulary=["a", "b"], output_mode="int")
    back = layers.StringLookup(vocabulary=["a", "b"], invert=True)
    x = index(inputs)
    outputs = {
        "label": back(x),
        "score": layers.Dense(8)(layers.Flatten()(layers.Embedding(3, 4)(x))),
    }
    model = rigl_keras.sparsify(keras.Model(inputs, outputs), 0.2)
    text = np.array([["a", "b", "a", "c"]])
    export(model, tmp_path / "out", inputs=text, measure=False)
    with pytest.raises(ValueError, match="is of string: no random"):
        export(model, tmp_path / "b", measure=False)


def test_a_stripped_model(tmp_path):
    plain = rigl_keras.strip(rigl_keras.sparsify(small_model(), 0.1))
    report = export(plain, tmp_path / "out", measure=False)
    assert report.density == pytest.approx(0.1, abs=1e-3)
    masked = rigl_keras.with_masks(
        plain,
        {
            name: (kernel.variable.numpy() != 0).astype(np.float32)
            for name, kernel in rigl_keras.named_kernels(plain).items()
        },
    )
    again = export(masked, tmp_path / "again", measure=False)
    assert again.nonzeros == report.nonzeros


def test_integers_reach_all_rows_of_an_embedding(tmp_path, monkeypatch):
    few = keras.Input((4,), dtype="int32", name="few")
    many = keras.Input((4,), dtype="int32", name="many")
    image = keras.Input((4,), dtype="uint8", name="image")
    x = layers.Concatenate()(
        [
            layers.Flatten()(layers.Embedding(10, 3, name="e1")(few)),
            layers.Flatten()(layers.Embedding(5000, 3, name="e2")(many)),
            layers.Rescaling(1 / 255)(image),
        ]
    )
    model = keras.Model([few, many, image], layers.Dense(3)(x))
    signature = signatures.signature_of(rigl_keras.sparsify(model, 0.5))
    assert signature.limits == {"few": 10, "many": 5000, "image": 256}
    drawn = signature.random(200)
    assert drawn["few"].max() == 9 and drawn["image"].max() > 250
    assert drawn["many"].max() > 4900


@pytest.mark.slow
def test_free_image_sizes(tmp_path):
    def network(padding, size=3, depth=4):
        x = inputs = keras.Input((None, None, 3), name="image")
        for _ in range(depth):
            x = layers.Conv2D(6, size, padding=padding)(x)
            x = layers.MaxPooling2D()(x)
        x = layers.GlobalAveragePooling2D()(x)
        model = keras.Model(inputs, layers.Dense(3)(x))
        return rigl_keras.sparsify(model, 0.5)

    # Of 8 pixels, none would be left.
    report = export(network("same"), tmp_path / "a", measure=False)
    assert report.max_difference <= 1e-5 and report.inference_flops is None
    export(network("valid"), tmp_path / "b", measure=False)
    large = network("valid", 60, depth=3)  # at least 428 pixels
    export(
        large,
        tmp_path / "c",
        inputs=np.ones((1, 450, 450, 3)),
        measure=False,
    )
    with pytest.raises(ValueError, match="fails with lengths"):
        export(large, tmp_path / "d", measure=False)
    with pytest.raises(ValueError, match="fails on the inputs"):
        export(
            large,
            tmp_path / "d",
            inputs=np.ones((1, 9, 9, 3)),
            measure=False,
        )


def test_times_are_of_the_side_that_they_name(tmp_path, monkeypatch):
    model = rigl_keras.sparsify(small_model(), 0.2)
    monkeypatch.setattr(
        _timing,
        "interleaved",
        lambda sides, **_: {"ours": 1.0, "dense": 2.0},
    )
    report = export(model, tmp_path / "exported")
    assert (report.load_seconds, report.dense_load_seconds) == (1.0, 2.0)
    assert report.latency == {1: 1.0, 32: 1.0, 128: 1.0}
    assert report.dense_latency == {1: 2.0, 32: 2.0, 128: 2.0}
