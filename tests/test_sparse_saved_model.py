"""Exports whose networks are TensorFlow operations."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.small_models import small_model

import rigl_keras
from rigl_keras import kernels
from rigl_keras.exporting import measurement, networks
from rigl_keras.exporting.formats import FORMATS
from rigl_keras.exporting.signatures import signature_of
from rigl_keras.kernels import layer_products
from rigl_keras.kernels.choice import Choice
from rigl_keras.serving.network_file import from_bytes

needs_library = pytest.mark.skipif(
    kernels.load() is None, reason=f"no op library: {kernels.unavailable()}"
)
pytestmark = needs_library
FORMAT = {"format": "sparse_saved_model"}


def with_statistics(model, seed=0):
    """Returns a model with random batch norms and biases."""
    draw = np.random.default_rng(seed)
    for variable in model.variables:
        if len(variable.shape) == 1 and variable.dtype == "float32":
            variable.assign(draw.uniform(0.5, 1.5, variable.shape))
    return model


def masked(inputs, outputs):
    model = with_statistics(keras.Model(inputs, outputs))
    return rigl_keras.sparsify(model, 0.3, product="dense")


def conv(filters, name, **options):
    options = {"padding": "same", "use_bias": False, **options}
    return layers.Conv2D(filters, 3, name=name, **options)


def exported(model, folder):
    """Exports a model; returns the report and `{operation: count}`."""
    report = rigl_keras.export(model, folder, **FORMAT, measure=False)
    serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
    kinds = []
    waiting = [serve.graph]
    while waiting:
        graph = waiting.pop()
        kinds += [operation.type for operation in graph.get_operations()]
        definition = graph.as_graph_def()
        kinds += [n.op for f in definition.library.function for n in f.node_def]
    return report, {kind: kinds.count(kind) for kind in kinds}


def files_of(folder):
    return sorted(path.name for path in (folder / "assets").iterdir())


# The operations that may be left if a network computes the whole model.
PLUMBING = {
    *("Placeholder", "Const", "Identity", "NoOp"),
    *("PartitionedCall", "StatefulPartitionedCall"),
}


def check_whole(model, folder, *, shape=(8, 8, 3)):
    report, found = exported(model, folder)
    assert found["RiglKerasNetwork"] == 1
    assert found.keys() <= {"RiglKerasNetwork", *PLUMBING}
    assert report.notes == ()
    assert files_of(folder) == ["network.rigl"]
    serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
    (name,) = serve.structured_input_signature[1]
    x = np.random.default_rng(1).standard_normal((17, *shape), np.float32)
    want = model(x, training=False)
    got = serve(**{name: tf.constant(x)})["output_0"]
    largest = max(1.0, float(tf.reduce_max(tf.abs(want))))
    np.testing.assert_allclose(got, want, atol=2e-5 * largest)
    return from_bytes((folder / "assets" / "network.rigl").read_bytes())


def steps(network):
    return [node.operation.name for node in network.nodes]


def test_a_model_is_one_operation(tmp_path):
    model = rigl_keras.sparsify(with_statistics(small_model()), 0.3)
    network = check_whole(model, tmp_path / "e")
    # Batch norms and dropout are gone; dense layers read whole images.
    assert steps(network) == [
        *("INPUT", "CONVOLUTION", "ACTIVATION", "CONVOLUTION"),
        *("CONVOLUTION", "CONVOLUTION", "RESHAPE"),
    ]


def test_a_residual_block_before_and_after_its_activation(tmp_path):
    inputs = keras.Input((8, 8, 16))
    x = layers.BatchNormalization(name="norm1")(inputs)
    x = layers.Activation("relu", name="relu1")(x)
    x = conv(16, "one")(x)
    x = layers.BatchNormalization(name="norm2")(x)
    x = layers.Activation("relu", name="relu2")(x)
    x = conv(16, "two")(x)
    x = layers.Add(name="add1")([inputs, x])
    y = conv(16, "three")(x)
    y = layers.BatchNormalization(name="norm3")(y)
    y = layers.Add(name="add2")([y, x])
    y = layers.ReLU(name="relu3")(y)
    network = check_whole(masked(inputs, y), tmp_path / "e", shape=(8, 8, 16))
    # One norm cannot be folded, as a sum and a convolution read its input.
    assert steps(network).count("AFFINE") == 1
    assert steps(network).count("CONVOLUTION") == 3


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("pads", [None, 1, ((2, 0), (1, 3))])
def test_strides_and_zeros_around(tmp_path, padding, strides, pads):
    inputs = keras.Input((9, 8, 5))
    x = layers.BatchNormalization()(inputs)
    x = layers.ReLU()(x)
    if pads is not None:
        x = layers.ZeroPadding2D(pads)(x)
    x = conv(7, "one", padding=padding, strides=strides)(x)
    check_whole(masked(inputs, x), tmp_path / "e", shape=(9, 8, 5))


def test_padding_between_norm_and_relu(tmp_path):
    """Padding stays before a norm, but may move behind a relu."""
    inputs = keras.Input((6, 6, 4))
    x = layers.ZeroPadding2D(1)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.ZeroPadding2D(1)(x)
    x = layers.ReLU()(x)
    x = layers.ZeroPadding2D(1)(x)
    x = conv(6, "one", padding="valid", dilation_rate=2)(x)
    check_whole(masked(inputs, x), tmp_path / "e", shape=(6, 6, 4))


def test_dense_layers_with_what_follows(tmp_path):
    inputs = keras.Input((5, 12))
    x = layers.Dense(20, name="one")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dense(12, activation="relu", name="two")(x)
    x = layers.Add(name="add")([layers.Dense(12, name="three")(x), inputs])
    network = check_whole(masked(inputs, x), tmp_path / "e", shape=(5, 12))
    assert "AFFINE" not in steps(network)


def test_a_layer_that_is_called_twice(tmp_path):
    inputs = keras.Input((8, 8, 3))
    shared = conv(3, "shared")
    model = rigl_keras.sparsify(
        keras.Model(inputs, shared(shared(inputs))), 0.3, product="dense"
    )
    check_whole(model, tmp_path / "e")


def test_several_outputs_by_their_names(tmp_path):
    inputs = keras.Input((8, 8, 3), name="image")
    one, two = conv(16, "one")(inputs), conv(16, "two")(inputs)
    model = masked(inputs, {"a": one + two, "b": layers.ReLU()(one)})
    _, found = exported(model, tmp_path / "e")
    assert found["RiglKerasNetwork"] == 1
    loaded = tf.saved_model.load(str(tmp_path / "e"))
    x = tf.random.stateless_normal((3, 8, 8, 3), seed=(0, 0))
    got = loaded.signatures["serving_default"](image=x)
    want = model(x, training=False)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def attention():
    """Returns a model with networks before and after a TensorFlow part."""
    inputs = keras.Input((16, 24), name="tokens")
    x = layers.Dense(64, activation="relu", name="before")(inputs)
    x = layers.MultiHeadAttention(2, 8, name="attention")(x, x)
    x = layers.Dense(64, activation="relu", name="after")(x)
    return keras.Model(inputs, layers.Dense(5, name="head")(x))


def test_what_stays_tensorflows(tmp_path):
    model = rigl_keras.sparsify(attention(), 0.5, product="dense")
    report, found = exported(model, tmp_path / "e")
    assert found["RiglKerasNetwork"] == len(files_of(tmp_path / "e")) > 1
    assert "network.rigl" in files_of(tmp_path / "e")
    assert report.max_difference < 1e-5
    first, *rest = report.notes
    assert first.startswith("TensorFlow computes parts of the model, and ")
    assert f"{found['RiglKerasNetwork']} are networks:" in first
    assert rest
    for note in rest:
        assert note in str(report)
    for note in rest[: networks._MOST_LINES]:
        operation, reason = note.strip().split(": ", 1)
        assert operation.split(" (")[0] in found and len(reason) > 5
    assert rigl_keras.check_export(tmp_path / "e") == report


def test_nothing_is_known(tmp_path):
    inputs = keras.Input((6, 4))
    outputs = layers.LSTM(5, name="lstm")(inputs)
    model = rigl_keras.sparsify(keras.Model(inputs, outputs), 0.5)
    with pytest.raises(ValueError, match="no part of model .* Pass format='s"):
        rigl_keras.export(model, tmp_path / "e", **FORMAT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_sparse_recurrent_layers_are_part_of_the_network(kind, tmp_path):
    inputs = keras.Input((None, 4))
    sequences = layers.Bidirectional(kind(6, return_sequences=True))(inputs)
    model = keras.Model(inputs, layers.Dense(2)(kind(5)(sequences)))
    model = rigl_keras.sparsify(model, 0.2, product="dense")
    report, found = exported(model, tmp_path / "e")
    assert found["RiglKerasNetwork"] == 1 and not report.notes
    assert not {"RiglKerasRecurrent", "While"} & set(found)
    assert_serves_as(model, tmp_path / "e", ((3, 7, 4), (1, 2, 4)))


def assert_serves_as(model, folder, shapes):
    """Asserts that an export answers what its model does."""
    loaded = tf.saved_model.load(str(folder))
    serve = loaded.signatures["serving_default"]
    for shape in shapes:
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        (outputs,) = serve(tf.constant(x)).values()
        want = model.predict(x, verbose=0)
        np.testing.assert_allclose(outputs, want, atol=1e-6)


# Loops that no network computes, because they return their states.


def with_states(kind, units, inputs, **options):
    outputs, *_ = kind(units, return_state=True, **options)(inputs)
    return outputs


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_other_loops_are_sparse_operations(kind, tmp_path, monkeypatch):
    """They need no network beside them, and read their masks as constants."""
    inputs = keras.Input((None, 4))
    sequences = with_states(kind, 6, inputs, return_sequences=True)
    model = keras.Model(inputs, with_states(kind, 5, sequences))
    model = rigl_keras.sparsify(model, 0.3, product="sparse")
    report, found = exported(model, tmp_path / "e")
    assert found["RiglKerasRecurrent"] == 2
    assert "a sparse operation computes the whole sequence" in str(report)
    assert_serves_as(model, tmp_path / "e", ((3, 7, 4), (1, 2, 4)))
    # Served examples may be few: then the dense loop is faster.
    monkeypatch.setattr(
        layer_products,
        "sparse_if_possible",
        lambda _, shape, **__: Choice(shape[0] >= 8, ""),
    )
    _, found = exported(model, tmp_path / "g")
    assert found["If"] == found["RiglKerasRecurrent"] == 2
    shapes = [(batch, 5, 4) for batch in (1, 7, 8, 20)]
    assert_serves_as(model, tmp_path / "g", shapes)


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_other_loops_that_are_no_operations(kind, tmp_path, monkeypatch):
    inputs = keras.Input((None, 4))
    # Dense where that was asked for, whatever is faster.
    monkeypatch.setattr(
        layer_products, "faster_product", lambda *_, **__: Choice(True, "")
    )
    dense = keras.Model(inputs, with_states(kind, 5, inputs))
    dense = rigl_keras.sparsify(dense, 0.3, product="dense")
    with pytest.raises(ValueError, match="no part of model"):
        rigl_keras.export(dense, tmp_path / "h", **FORMAT)
    # Dense where that is faster.
    model = keras.Model(inputs, with_states(kind, 5, inputs))
    model = rigl_keras.sparsify(model, 0.3, product="sparse")
    monkeypatch.setattr(
        layer_products, "sparse_if_possible", lambda *_, **__: Choice(False, "")
    )
    with pytest.raises(ValueError, match="no part of model"):
        rigl_keras.export(model, tmp_path / "f", **FORMAT)


@pytest.mark.parametrize("least", [1, 8])
def test_kernels_of_other_loops_are_stored_without_zeros(
    least, tmp_path, monkeypatch
):
    """The file is small, and what it computes has the same bits."""
    monkeypatch.setattr(
        layer_products,
        "sparse_if_possible",
        lambda _, shape, **__: Choice(shape[0] >= least, ""),
    )
    inputs = keras.Input((None, 40))
    sequences = with_states(
        layers.LSTM, 80, inputs, return_sequences=True, name="one"
    )
    outputs = with_states(layers.GRU, 30, sequences, name="two")
    model = keras.Model(inputs, outputs)
    model = rigl_keras.sparsify(model, 0.1, product="sparse")
    # A weight that has just grown is zero: its mask says more than its kernel.
    *_, two = rigl_keras.masked_layers(model)
    mask = two.mask.numpy()
    kernel = two.kernel.numpy()
    kernel.flat[np.flatnonzero(mask)[0]] = 0
    two.kernel.assign(kernel)
    _, found = exported(model, tmp_path / "e")
    assert found["RiglKerasRecurrent"] == 2
    entries = 4 * 80 * (40 + 80) + 3 * 30 * (80 + 30)
    weights = tmp_path / "e" / "variables" / "variables.data-00000-of-00001"
    assert weights.stat().st_size < 0.65 * entries  # of 4 and a mask's 1
    graph = tmp_path / "e" / "saved_model.pb"
    # The graph holds none of them, in either branch.
    assert graph.stat().st_size < 200_000 < 5 * entries
    loaded = tf.saved_model.load(str(tmp_path / "e"))
    serve = loaded.signatures["serving_default"]
    signature = signature_of(model)
    imported = networks.networks_within(model, signature)
    whole = tf.function(lambda **arrays: imported.rebuild(arrays, None))
    (name,) = signature.inputs
    for batch in (1, 9):
        x = np.random.default_rng(batch).normal(size=(batch, 5, 40))
        x = {name: tf.constant(x, tf.float32)}
        (got,), (want,) = serve(**x).values(), whole(**x).values()
        np.testing.assert_array_equal(got, want)


def test_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "load", lambda: None)
    monkeypatch.setattr(kernels, "unavailable", lambda: "no compiler")
    model = rigl_keras.sparsify(rigl_keras.models.lenet5(), 0.1)
    with pytest.raises(ValueError, match="no compiler.*format='saved_model'"):
        rigl_keras.export(model, tmp_path / "e", **FORMAT)
    assert not list(tmp_path.iterdir())


# Measured plans.


@pytest.fixture
def quick(monkeypatch):
    """Makes measurements short."""
    monkeypatch.setattr(networks, "_SECONDS", 0.02)
    monkeypatch.setattr(measurement, "_SECONDS", 0.0)
    monkeypatch.setattr(measurement, "_TURN", 0.0)


@pytest.fixture
def tunes(monkeypatch, quick):
    """Records the shapes that are tuned."""
    shapes = []

    def tune(self, *given, seconds):
        shapes.append(given)

    monkeypatch.setattr(networks.Runtime, "tune", tune)
    monkeypatch.setattr(networks.Runtime, "hints", lambda self: "avx2 hint")
    return shapes


def test_plans_are_measured_for_the_batch_sizes(tmp_path, tunes):
    model = rigl_keras.sparsify(small_model(), 0.3)
    report = rigl_keras.export(
        model, tmp_path / "e", **FORMAT, batch_sizes=[2, 5, 2]
    )
    assert tunes == [((2, 8, 8, 3),), ((5, 8, 8, 3),)]
    data = (tmp_path / "e" / "assets" / "network.rigl").read_bytes()
    assert from_bytes(data).hints == "avx2 hint"
    assert list(report.latency) == list(report.dense_latency) == [2, 5]
    assert "latency at batch 5" in str(report)


def test_nothing_is_measured_where_it_is_not_asked_for(tmp_path, tunes):
    model = rigl_keras.sparsify(small_model(), 0.3)
    rigl_keras.export(model, tmp_path / "e", **FORMAT, measure=False)
    assert tunes == []


def test_a_batch_size_that_is_fixed(tmp_path, tunes):
    inputs = keras.Input(batch_shape=(4, 12))
    model = keras.Model(inputs, layers.Dense(30)(inputs))
    model = rigl_keras.sparsify(model, 0.3)
    report = rigl_keras.export(model, tmp_path / "e", **FORMAT)
    assert tunes == [((4, 12),)]
    assert list(report.latency) == [4]  # not the requested ones


def test_free_axes_are_not_measured(tmp_path, tunes):
    inputs = keras.Input((None, None, 3))
    x = layers.GlobalAveragePooling2D()(conv(8, "one")(inputs))
    model = masked(inputs, layers.Dense(3)(x))
    rigl_keras.export(model, tmp_path / "e", **FORMAT, batch_sizes=[1])
    assert tunes == []
    serve = tf.saved_model.load(str(tmp_path / "e")).signatures[
        "serving_default"
    ]
    (name,) = serve.structured_input_signature[1]
    for size in (5, 9):
        x = tf.random.stateless_normal((2, size, size + 1, 3), seed=(0, 0))
        np.testing.assert_allclose(
            serve(**{name: x})["output_0"], model(x), atol=1e-5
        )


def test_plans_are_really_measured(quick):
    model = rigl_keras.sparsify(small_model(), 0.3)
    signature = signature_of(model)
    network = networks.import_model(model, signature).network
    assert network is not None
    for _ in range(5):  # on a busy machine, one way may take all the time
        data = networks.tuned(network, [1, 16])
        if "choice" in from_bytes(data).hints:
            break
    assert "choice" in from_bytes(data).hints
    assert len(data) > len(networks.tuned(network, []))


# Loading with TensorFlow but without this package.

LOAD = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
import load
assert "rigl_keras" not in sys.modules
for _ in range(2):  # the second finds the operations known
    serve = load.model().signatures["serving_default"]
x = np.load(sys.argv[2])
(name,) = serve.structured_input_signature[1]
np.save(sys.argv[3], serve(**{name: x})["output_0"])
"""


@pytest.mark.slow
def test_an_export_and_its_loader(tmp_path):
    model = with_statistics(rigl_keras.models.wide_resnet(10, 1))
    model = rigl_keras.sparsify(model, 0.1, product="dense")
    folder = tmp_path / "exported"
    options = {**FORMAT, "measure": False}
    report = rigl_keras.export(model, folder, **options)
    assert report.max_difference < 1e-5
    assert (folder / "assets.extra" / "rigl_keras_kernels.so").exists()
    # Again, over the first export, which has no foreign files.
    rigl_keras.export(model, folder, overwrite=True, **options)
    rigl_keras.check_export(folder)

    folder = folder.rename(tmp_path / "moved")
    x = np.random.default_rng(0).standard_normal((3, 32, 32, 3), np.float32)
    np.save(tmp_path / "x.npy", x)
    arguments = [folder, tmp_path / "x.npy", tmp_path / "y.npy"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    got, want = np.load(tmp_path / "y.npy"), model(x, training=False)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        lambda: rigl_keras.models.wide_resnet(10, 1),
        lambda: rigl_keras.models.resnet18(),
        lambda: rigl_keras.models.lenet5(input_shape=(32, 32, 3)),
    ],
    ids=["wide_resnet", "resnet18", "lenet5"],
)
def test_networks(network, tmp_path):
    model = rigl_keras.sparsify(with_statistics(network()), 0.1)
    check_whole(model, tmp_path / "e", shape=(32, 32, 3))


def test_it_is_a_format():
    assert FORMATS["sparse_saved_model"].folds
