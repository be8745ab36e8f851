"""Import of whole models as networks: each kind, Keras's own, random ones."""

import collections

import keras
import numpy as np
import pytest
from keras import layers
from support.imported import check_imported, operations
from support.kinds import KINDS
from support.random_networks import draw_weights, random_model

import rigl_keras
from rigl_keras.exporting.networks import import_model
from rigl_keras.exporting.signatures import signature_of
from rigl_keras.serving.network import Activation, Operation

C = layers.Conv2D


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind(kind):
    model = KINDS[kind]()
    draw_weights(model, np.random.default_rng(0))
    imported = check_imported(model)
    partly = {
        "MultiHeadAttention, EinsumDense": "BatchMatMulV2",
        "Conv2DTranspose": "Conv2DBackpropInput",
        "Embedding": "GatherV2",
    }
    if kind in partly:
        assert imported.network is None and imported.segments
        assert partly[kind] in {one.operation for one in imported.unknown}
    else:
        assert imported.network is not None and not imported.unknown


LOOPS = {
    "LSTM": lambda x: layers.LSTM(4)(x),
    "all outputs": lambda x: layers.LSTM(4, return_sequences=True)(x),
    "no bias": lambda x: layers.LSTM(4, use_bias=False)(x),
    "GRU": lambda x: layers.GRU(4, return_sequences=True, dropout=0.5)(x),
    "GRU, reset before": lambda x: layers.GRU(4, reset_after=False)(x),
    "GRU, no bias": lambda x: layers.GRU(4, use_bias=False)(x),
    "backwards": lambda x: layers.LSTM(4, go_backwards=True)(x),
    "backwards, all outputs": lambda x: layers.GRU(
        4, go_backwards=True, return_sequences=True
    )(x),
    "both ways": lambda x: layers.Bidirectional(
        layers.LSTM(4, return_sequences=True), merge_mode="sum"
    )(x),
    "stacked": lambda x: layers.LSTM(3)(
        layers.Dense(5)(layers.GRU(4, return_sequences=True)(x))
    ),
    "unrolled": lambda x: layers.LSTM(4, unroll=True)(x),
}


@pytest.mark.parametrize("kind", LOOPS)
def test_recurrent_layers(kind):
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, LOOPS[kind](inputs))
    draw_weights(model, np.random.default_rng(0))
    network = check_imported(model, rebuild=False).network
    assert network is not None
    kinds = operations(network).split()
    times = 2 if kind in ("both ways", "stacked") else 1
    assert kinds.count("RECURRENT") == times
    assert kinds.count("DENSE") == times + (kind == "stacked")


def test_a_norm_before_a_loop_becomes_part_of_its_product():
    inputs = keras.Input((None, 3))
    x = layers.BatchNormalization()(inputs)
    model = keras.Model(inputs, layers.GRU(4)(x))
    draw_weights(model, np.random.default_rng(0))
    network = check_imported(model, rebuild=False).network
    assert operations(network) == "DENSE RECURRENT"
    assert network.nodes[0].shape == (-1, 3)


def test_a_loop_beside_what_stays():
    """Its part is a network, and what TensorFlow keeps has no mark."""
    inputs = keras.Input((4, 3))
    x = layers.LSTM(4, return_sequences=True)(inputs)
    x = layers.MultiHeadAttention(2, 2)(x, x)
    outputs = layers.LSTM(4, activation="relu")(x)
    model = keras.Model(inputs, outputs)
    draw_weights(model, np.random.default_rng(0))
    imported = check_imported(model)
    assert imported.network is None
    kinds = [operations(segment.network) for segment in imported.segments]
    assert "DENSE RECURRENT" in kinds[0]
    # A part that is too small calls the function that was marked.
    assert not check_imported(model, least_work=10**6).segments


def test_masked_models():
    """Networks have no masks, but kernels with zeros."""
    model = rigl_keras.models.wide_resnet(10, 1, input_shape=(8, 8, 3))
    model = rigl_keras.sparsify(model, 0.2)
    network = check_imported(model).network
    kept = sum(np.count_nonzero(node.kernel) for node in network.nodes)
    wanted = sum(
        np.count_nonzero(layer.kernel.numpy())
        for layer in rigl_keras.masked_layers(model)
    )
    stem = model.get_layer("conv1").kernel.numpy().size
    assert wanted <= kept <= wanted + stem + 10 * 64
    # In pre-activation blocks, norms after a sum stay; others are folded.
    assert operations(network).split().count("AFFINE") == 4


# Models of Keras, with their smallest images.
A = keras.applications
MODELS = {
    "MobileNetV2": (A.MobileNetV2, 32, {"alpha": 0.35}, {}),
    "MobileNet": (A.MobileNet, 32, {"alpha": 0.25}, {}),
    "MobileNetV3Small": (A.MobileNetV3Small, 32, {}, {}),
    "MobileNetV3Large": (A.MobileNetV3Large, 32, {"minimalistic": True}, {}),
    "ResNet50": (A.ResNet50, 32, {}, {}),
    "ResNet50V2": (A.ResNet50V2, 32, {}, {"PAD": 1}),
    "DenseNet121": (A.DenseNet121, 32, {}, {}),
    "EfficientNetB0": (A.EfficientNetB0, 32, {}, {}),
    "EfficientNetV2B0": (A.EfficientNetV2B0, 32, {}, {}),
    "VGG16": (A.VGG16, 32, {"include_top": False, "pooling": "max"}, {}),
    "InceptionV3": (A.InceptionV3, 75, {}, {}),
    "InceptionResNetV2": (A.InceptionResNetV2, 75, {}, {}),
    "Xception": (A.Xception, 71, {}, {}),
    # Crops of images that are padded for strides of 2 stay.
    "NASNetMobile": (A.NASNetMobile, 32, {}, {"PAD": 12}),
}


def application(build, size, options):
    model = build(weights=None, input_shape=(size, size, 3), **options)
    draw_weights(model, np.random.default_rng(0))
    return model


@pytest.mark.slow_but("MobileNetV2")
@pytest.mark.parametrize("name", MODELS)
def test_applications(name):
    build, size, options, rest = MODELS[name]
    model = application(build, size, options)
    network = check_imported(
        model, batch=2, tolerance=1e-4, rebuild=False
    ).network
    counted = collections.Counter(operations(network).split())
    assert counted["PAD"] == rest.get("PAD", 0)
    # Exactly the convolutions and dense layers.
    own = [
        layer
        for layer in model._flatten_layers()
        if isinstance(
            layer,
            (C, layers.DepthwiseConv2D, layers.SeparableConv2D, layers.Dense),
        )
    ]
    # A separable convolution counts as two.
    twice = [x for x in own if isinstance(x, layers.SeparableConv2D)]
    assert counted["CONVOLUTION"] + counted["DENSE"] == len(own) + len(twice)


@pytest.mark.slow
def test_layer_norms_stay():
    """Convolutions and dense layers between them become networks."""
    model = application(
        A.ConvNeXtTiny, 64, {"include_top": False, "pooling": "avg"}
    )
    imported = check_imported(model, batch=2, tolerance=1e-4)
    assert imported.network is None and len(imported.segments) > 18
    counted = collections.Counter(
        name
        for segment in imported.segments
        for name in operations(segment.network).split()
    )
    assert counted["gelu"] == 18


SEEDS = range(30)


@pytest.mark.slow_but(*map(str, SEEDS[:8]))
@pytest.mark.parametrize("seed", SEEDS)
def test_random_models(seed):
    model = random_model(seed)
    imported = check_imported(model)
    assert imported.network is not None, imported.unknown
    _kinds[seed] = kinds_of(imported.network)


_kinds = {}  # operations and activations of random models, by seed


def kinds_of(network):
    return {node.operation for node in network.nodes} | {
        node.activation
        for node in network.nodes
        if node.operation == Operation.ACTIVATION
    }


@pytest.mark.slow
def test_random_models_have_everything():
    """Random models have each operation and each activation."""
    for seed in SEEDS:
        if seed not in _kinds:  # another worker has tested it
            model = random_model(seed)
            network = import_model(model, signature_of(model)).network
            _kinds[seed] = kinds_of(network)
            keras.backend.clear_session()
    # Recurrent layers are tested above.
    wanted = {*Operation, *Activation} - {Operation.RECURRENT}
    assert set().union(*_kinds.values()) >= wanted
