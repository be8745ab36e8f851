"""Import of models as networks: folding, and parts that TensorFlow keeps."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support import network_library
from support.imported import check_imported, compare, operations, rebuilt
from support.random_networks import draw_weights

from rigl_keras.exporting.networks import import_model
from rigl_keras.exporting.signatures import outputs_of, signature_of
from rigl_keras.serving.importer import import_function
from rigl_keras.serving.network import Activation, Node, Operation, Padding
from rigl_keras.serving.network_file import to_bytes
from rigl_keras.serving.partition import SMALL
from rigl_keras.serving.shapes import shape_of


def of_layers(shape, *parts):
    x = inputs = keras.Input(shape)
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x)


def set_weights(layer, *weights):
    layer.set_weights([np.array(w, np.float32) for w in weights])


def test_a_batch_norm_by_hand():
    """relu((2 x + 1 - 3) * 6 / 2 + 0.5) = relu(6 x - 5.5)."""
    norm = layers.BatchNormalization(epsilon=0.25)
    model = of_layers(
        (2, 2, 1),
        layers.Conv2D(1, 1),
        norm,
        layers.ReLU(),
    )
    set_weights(model.layers[1], [[[[2.0]]]], [1.0])
    set_weights(norm, [6.0], [0.5], [3.0], [3.75])
    network = check_imported(model).network
    assert operations(network) == "CONVOLUTION relu"
    _, convolution, _ = network.nodes
    np.testing.assert_array_equal(convolution.kernel, [[[[6.0]]]])
    np.testing.assert_array_equal(convolution.bias, [-5.5])
    assert convolution.kernel.dtype == np.float32
    assert [node.name for node in network.inputs()] == ["inputs"]
    assert network.outputs[0].name == "output_0"


def test_a_norm_before_a_convolution_by_hand():
    """Channels (1, 2) have scale (2, 3) and shift (1, 1)."""

    def model(padding):
        norm = layers.BatchNormalization(epsilon=0.25)
        convolution = layers.Conv2D(1, (1, 2), padding=padding, use_bias=False)
        built = of_layers((1, 2, 2), norm, convolution)
        set_weights(norm, [2.0, 3.0], [1.0, 1.0], [0.0, 0.0], [0.75, 0.75])
        set_weights(convolution, [[[[1.0], [2.0]], [[0.0], [4.0]]]])
        return built

    network = check_imported(model("valid")).network
    assert operations(network) == "CONVOLUTION"
    np.testing.assert_array_equal(
        network.nodes[1].kernel, [[[[2.0], [6.0]], [[0.0], [12.0]]]]
    )
    np.testing.assert_array_equal(network.nodes[1].bias, [7.0])
    # The padding has zeros, which the norm does not shift.
    network = check_imported(model("same")).network
    assert operations(network) == "AFFINE CONVOLUTION"


IMAGE, SEQUENCE = (9, 11, 4), (12, 4)
PLACES = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
C = layers.Conv2D

CASES = {
    "dense, of more axes": (
        (5, 6, 4),
        [layers.Dense(3, activation="gelu"), layers.Dense(5), layers.Softmax()],
        "DENSE gelu DENSE SOFTMAX",
    ),
    "dense, of an image": (
        IMAGE,
        [C(3, 3), layers.Flatten(), layers.ReLU(), layers.Dense(7)],
        "CONVOLUTION relu CONVOLUTION RESHAPE",
    ),
    "einsum": (
        (5, 4),
        [
            layers.EinsumDense("abc,cde->abde", (None, 3, 2), bias_axes="de"),
            layers.EinsumDense("abde,dec->abc", (None, 7), bias_axes="c"),
        ],
        "DENSE DENSE",
    ),
    "grouped": (IMAGE, [C(6, 3, groups=2, strides=2)], "CONVOLUTION"),
    "dilated": (
        IMAGE,
        [
            C(3, 3, padding="same", dilation_rate=2),
            C(3, 3, dilation_rate=(2, 1)),
        ],
        "CONVOLUTION CONVOLUTION",
    ),
    "depthwise": (
        IMAGE,
        [
            layers.DepthwiseConv2D(3, padding="same", dilation_rate=2),
            layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2),
            layers.SeparableConv2D(5, 3),
        ],
        "CONVOLUTION CONVOLUTION CONVOLUTION CONVOLUTION",
    ),
    "sequences": (
        SEQUENCE,
        [
            layers.Conv1D(3, 3, padding="causal", dilation_rate=2),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv1D(3, 3, padding="same"),
            layers.AveragePooling1D(3, 2, padding="same"),
            layers.SeparableConv1D(5, 2),
            layers.UpSampling1D(2),
            layers.GlobalMaxPooling1D(),
        ],
        "RESHAPE CONVOLUTION relu CONVOLUTION POOL CONVOLUTION CONVOLUTION "
        "UPSAMPLE GLOBAL_POOL",
    ),
    "pools": (
        IMAGE,
        [
            layers.MaxPooling2D(3, 2, padding="same"),
            layers.AveragePooling2D((2, 3), 1, padding="same"),
            layers.GlobalAveragePooling2D(keepdims=True),
            layers.Flatten(),
        ],
        "POOL POOL GLOBAL_POOL",
    ),
    "padding": (
        IMAGE,
        [
            layers.ZeroPadding2D(((1, 2), (0, 3))),
            layers.ZeroPadding2D(1),
            C(3, 3, padding="same", strides=2),
            layers.Cropping2D(((1, 0), (2, 1))),
        ],
        "CONVOLUTION PAD",
    ),
    "padding of a maximum": (
        IMAGE,
        [layers.ReLU(), layers.ZeroPadding2D(1), layers.MaxPooling2D(3, 2)],
        "relu POOL",
    ),
    "padding of what may be negative": (
        IMAGE,
        [layers.ZeroPadding2D(1), layers.MaxPooling2D(3, 2)],
        "PAD POOL",
    ),
    "padding of an average": (
        IMAGE,
        [layers.ReLU(), layers.ZeroPadding2D(1), layers.AveragePooling2D(3)],
        "relu PAD POOL",
    ),
    "upsampling": (
        IMAGE,
        [
            layers.UpSampling2D((2, 3)),
            layers.UpSampling2D((3, 2), interpolation="bilinear"),
        ],
        "UPSAMPLE UPSAMPLE",
    ),
    "normalization": (
        IMAGE,
        [
            layers.Rescaling(1 / 255, offset=-1),
            layers.Normalization(mean=[1.0, 2, 3, 4], variance=[1.0, 2, 3, 4]),
            C(3, 3, padding="same"),
        ],
        "AFFINE CONVOLUTION",
    ),
    "rescaling": (
        IMAGE,
        [layers.Rescaling(1 / 255), C(3, 3, padding="same")],
        "CONVOLUTION",
    ),
    "norms around": (
        IMAGE,
        [
            layers.BatchNormalization(),
            C(4, 3, groups=2, use_bias=False),
            layers.BatchNormalization(),
            layers.Dense(3),
            layers.BatchNormalization(),
        ],
        "CONVOLUTION DENSE",
    ),
    "clipped": (
        IMAGE,
        [layers.ReLU(6.0), layers.ReLU(3.0), C(2, 1), layers.ReLU(2.0)],
        "clip CONVOLUTION clip",
    ),
    "slopes": (
        IMAGE,
        [layers.ReLU(negative_slope=0.1), layers.LeakyReLU(0.2)],
        "leaky_relu leaky_relu",
    ),
    "ELU and PReLU": (
        IMAGE,
        [layers.ELU(0.5), layers.PReLU(shared_axes=[1, 2])],
        "elu relu AFFINE relu AFFINE ADD",
    ),
    "nothing in inference": (
        IMAGE,
        [
            layers.Dropout(0.5),
            layers.GaussianNoise(0.1),
            layers.ActivityRegularization(),
            layers.Dense(3),
        ],
        "DENSE",
    ),
    "one constant for each place": (
        (3, 2),
        [layers.Lambda(lambda x: 1.0 - x / PLACES * 2)],
        "RESHAPE AFFINE RESHAPE",
    ),
    "axes of length 1": (
        (1, 7, 4),
        [layers.Permute((2, 1, 3)), C(3, (3, 1))],
        "RESHAPE CONVOLUTION",
    ),
    "free sizes": (
        (None, None, 4),
        [
            C(3, 3, strides=2, padding="same"),
            layers.MaxPooling2D(2),
            layers.ZeroPadding2D(1),
            C(3, 3),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ],
        "CONVOLUTION POOL CONVOLUTION GLOBAL_POOL DENSE",
    ),
    "free lengths": (
        (None, 4),
        [
            layers.Conv1D(3, 3, padding="same", activation="relu"),
            layers.MaxPooling1D(2),
            layers.Dense(7),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2),
        ],
        "RESHAPE CONVOLUTION relu POOL DENSE GLOBAL_POOL DENSE",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_one_network(case):
    shape, parts, wanted = CASES[case]
    model = of_layers(shape, *parts)
    draw_weights(model, np.random.default_rng(0))
    imported = check_imported(model)
    assert not imported.unknown
    assert operations(imported.network) == wanted


@pytest.mark.parametrize(
    "name, wanted",
    [
        *((a.name.lower(), a) for a in Activation),
        ("relu6", Activation.CLIP),
        ("gelu_tanh", Activation.GELU_TANH),
    ],
)
def test_activations(name, wanted):
    functions = {
        "clip": lambda x: tf.clip_by_value(x, -0.5, 0.5),
        "gelu_tanh": lambda x: keras.activations.gelu(x, approximate=True),
    }
    model = of_layers(
        (7, 4),
        layers.Lambda(functions.get(name) or keras.activations.get(name)),
    )
    network = check_imported(model).network
    assert operations(network) == wanted.name.lower()


def test_gelu_as_other_code_writes_it():
    def gelu(x):
        return x * 0.5 * (1.0 + tf.math.erf(x / np.sqrt(2.0)))

    model = of_layers((7, 4), layers.Lambda(gelu))
    assert operations(check_imported(model).network) == "gelu"


@pytest.mark.parametrize("factor", [2.0, -3.0, 0.25])
def test_gelu_of_a_scaled_value(factor):
    model = of_layers(
        (7, 4), layers.Lambda(lambda x: keras.activations.gelu(factor * x))
    )
    assert "gelu" in operations(check_imported(model).network)


def test_a_bound_on_one_side_leaves_infinity():
    """NaN stays as well; a bound of infinity changes nothing else."""
    x = np.float32([[np.inf, -np.inf, np.nan, 0.5]])
    for change in (
        lambda x: tf.maximum(x, 1.0),
        lambda x: tf.minimum(x, 1.0),
        lambda x: tf.maximum(tf.nn.relu(x), 1.0),
        lambda x: tf.maximum(x, -np.inf),
    ):
        model = of_layers((4,), layers.Lambda(change))
        network = check_imported(model).network
        with network_library.loaded(to_bytes(network)) as run:
            np.testing.assert_array_equal(run(x)["output_0"], change(x))


def test_what_lies_within_a_pattern_is_not_unknown():
    """Softsign alone needs TensorFlow, and not the Erfc of the GELU."""
    model = of_layers(
        (4,),
        layers.Dense(4, activation="gelu"),
        layers.Dense(4, activation="softsign"),
    )
    imported = import_model(model, signature_of(model))
    foreign = [one for one in imported.unknown if one.reason != SMALL]
    assert [one.operation for one in foreign] == ["Softsign"]


def test_numbers_of_a_dilated_convolution():
    """TensorFlow computes it by rearranging the image twice."""
    model = of_layers((8, 6, 2), C(3, 3, padding="same", dilation_rate=(2, 1)))
    node = check_imported(model).network.nodes[1]
    assert node.dilations == (2, 1)
    assert node.padding in (Padding(same=True), Padding(False, 2, 2, 1, 1))


def test_what_is_read_twice_is_not_folded():
    inputs = keras.Input((5, 5, 2))
    x = C(3, 3)(inputs)
    y = layers.BatchNormalization()(x)
    model = keras.Model(inputs, [x, y])
    draw_weights(model, np.random.default_rng(0))
    network = check_imported(model).network
    assert operations(network) == "CONVOLUTION AFFINE"
    assert [output.node for output in network.outputs] == [1, 2]


def around(layer, least=None):
    """Returns a model with a layer between two convolutions, and a sum."""
    inputs = keras.Input((6, 6, 2))
    x = C(4, 3, padding="same", activation="relu", name="first")(inputs)
    y = C(4, 1, name="second")(layer(x))
    model = keras.Model(inputs, layers.Add()([x, y]))
    draw_weights(model, np.random.default_rng(0))
    return model


def test_parts_are_convex():
    """A sum over an unknown layer and its input is in the second part."""
    imported = check_imported(around(layers.Activation("softsign")))
    assert imported.network is None
    assert [one.operation for one in imported.unknown] == ["Softsign"]
    first, second = imported.segments
    assert operations(first.network) == "CONVOLUTION relu"
    assert operations(second.network) == "CONVOLUTION ADD"
    assert len(first.outputs) == 1 and len(second.inputs) == 2
    assert first.outputs[0] in second.inputs
    assert "Softsign" in "".join(second.inputs)


def test_small_parts_stay():
    """6 x 6 x 9 x 2 x 4 = 2592 products, and 6 x 6 x 4 x 4 = 576."""
    model = around(layers.Activation("softsign"))
    first, second = (
        np.count_nonzero(model.get_layer(name).kernel.numpy()) * 36
        for name in ("first", "second")
    )
    for least, parts in ((second, 2), (second + 1, 1), (first + 1, 0)):
        imported = check_imported(model, least_work=least)
        assert len(imported.segments) == parts
    reasons = {one.operation: one.reason for one in imported.unknown}
    assert "small" in reasons["Conv2D"] and "small" in reasons["AddV2"]
    assert reasons["Softsign"] == "no network computes it"


def test_no_part_computes_twice():
    """Each TensorFlow operation runs once, in one of the parts."""
    calls = []

    @tf.custom_gradient
    def counted(x):
        def count(value):
            calls.append(1)
            return np.sort(value, axis=1)

        y = tf.numpy_function(count, [x], tf.float32)
        y = tf.ensure_shape(y, [None, *x.shape[1:]])
        return y, lambda upstream: upstream

    inputs = keras.Input((6, 6, 2))
    x = layers.Lambda(counted)(C(4, 3, padding="same")(inputs))
    y = layers.Lambda(counted)(C(4, 3, padding="same")(x))
    z = C(4, 3)(layers.Add()([x, y]))
    model = keras.Model(inputs, [x, z])
    signature = signature_of(model)
    arrays = signature.random(2)
    imported = import_model(model, signature, least_work=1)
    assert len(imported.segments) == 3
    wanted = outputs_of(model, signature, arrays)
    calls.clear()
    compare(rebuilt(imported, arrays), wanted, 3e-6)
    assert len(calls) == 2


def test_integers_stay_outside():
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    images = keras.Input((6, 3), name="images")
    x = layers.Concatenate()([layers.Embedding(9, 4)(tokens), images])
    model = keras.Model([tokens, images], layers.Dense(2)(x))
    (segment,) = check_imported(model).segments
    assert operations(segment.network) == "CONCATENATE DENSE"
    assert segment.inputs[1] == "images:0"


def test_an_input_as_it_is():
    inputs = keras.Input((3,), name="x")
    model = keras.Model(inputs, [inputs, layers.Dense(2)(inputs)])
    network = check_imported(model).network
    assert [output.node for output in network.outputs] == [0, 1]


def test_one_value_as_two_outputs():
    inputs = keras.Input((3,), name="x")
    x = layers.Dense(2)(inputs)
    imported = check_imported(keras.Model(inputs, {"a": x, "b": x}))
    assert [output.node for output in imported.network.outputs] == [1, 1]
    (segment,) = imported.segments
    assert [output.node for output in segment.network.outputs] == [1, 1]


def test_a_fixed_batch():
    inputs = keras.Input(batch_shape=(4, 6, 6, 2))
    x = layers.Flatten()(C(3, 3)(inputs))
    model = keras.Model(inputs, layers.Dense(2)(x))
    network = check_imported(model).network
    assert network.inputs()[0].shape == (6, 6, 2)


def test_several_ways_to_the_same():
    """Common subexpressions of a model are computed once."""
    inputs = keras.Input((4, 4, 2))
    one, other = (layers.ReLU()(inputs) for _ in range(2))
    model = keras.Model(inputs, layers.Add()([one, other]))
    network = check_imported(model).network
    assert operations(network) == "relu ADD"
    assert network.nodes[2].inputs == (1, 1)


def test_other_types_stay():
    """TensorFlow keeps the parts in half precision."""
    inputs = keras.Input((4,))
    x = layers.Dense(3, dtype="mixed_float16")(inputs)
    model = keras.Model(inputs, layers.Dense(2, dtype="float32")(x))
    imported = check_imported(model, tolerance=1e-3)
    assert [operations(s.network) for s in imported.segments] == ["DENSE"]
    assert "it computes float16" in {one.reason for one in imported.unknown}


def test_what_changes_what_it_reads():
    inputs = keras.Input(batch_shape=(2, 3, 4))
    x = layers.LSTM(3, stateful=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2)(x))
    with pytest.raises(ValueError, match="changes what it reads.*stateful"):
        import_model(model, signature_of(model))


def test_what_is_cropped_is_of_the_image():
    """Only pixels can be cropped, not padding, as in the engine."""

    def padded(*numbers):
        node = Node(Operation.PAD, padding=Padding(False, *numbers))
        return shape_of(node, [(4, 5, 2)])

    assert padded(-3, 100, 0, 0) == (101, 5, 2)
    assert padded(0, 0, -2, -2) == (4, 1, 2)
    for numbers in ((-4, 100, 0, 0), (-2, -2, 0, 0), (0, 0, 7, -5)):
        with pytest.raises(ValueError, match="crops all rows or columns"):
            padded(*numbers)


def test_arguments():
    @tf.function
    def function(**inputs):
        return {"y": inputs["x"] * 2}

    concrete = function.get_concrete_function(
        x=tf.TensorSpec((None, 3), name="x")
    )
    with pytest.raises(ValueError, match="least_work must be an int"):
        import_function(concrete, least_work=0)
    assert operations(import_function(concrete).network) == "AFFINE"
