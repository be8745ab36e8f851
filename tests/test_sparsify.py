"""From a dense model to a masked one and back."""

import math
import warnings

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from keras import layers
from support.small_models import compiled, examples, kernels, masks, small_model

import rigl_keras
from rigl_keras import distributions
from rigl_keras.conventions import REPORT
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify, with_masks
from rigl_keras.masking.stripping import strip


def ones(model):
    return sum(int(mask.sum()) for mask in masks(model).values())


def size(model):
    return sum(mask.size for mask in masks(model).values())


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
@pytest.mark.parametrize("density", [0.03, 0.1, 0.77, 1.0])
def test_total_is_exact(distribution, density):
    model = sparsify(small_model(), density, distribution=distribution)
    assert ones(model) == round(density * size(model))
    named = {m.name for m in masked_layers(model)}
    first = {"conv1"} if distribution != "uniform" else set()
    assert named == first | {"depthwise", "conv2", "head"}
    if density == 1.0:
        assert all(mask.all() for mask in masks(model).values())


def test_weights_are_kept_and_the_original_is_left_alone():
    dense = small_model()
    before = [v.numpy() for v in dense.variables]
    sparse = sparsify(dense, 0.2)
    for layer in masked_layers(sparse):
        kernel = dense.get_layer(layer.name).kernel.numpy()
        np.testing.assert_array_equal(
            layer.kernel.numpy(), kernel * layer.mask.numpy()
        )
        np.testing.assert_array_equal(
            layer.layer.bias.numpy(), dense.get_layer(layer.name).bias.numpy()
        )
    compiled(sparse).fit(*examples(), verbose=0)
    for old, variable in zip(before, dense.variables, strict=True):
        np.testing.assert_array_equal(old, variable.numpy())
    assert not masked_layers(dense)


def test_seed():
    dense = small_model()
    first, again = sparsify(dense, 0.2), sparsify(dense, 0.2)
    other = sparsify(dense, 0.2, seed=1)
    for name, mask in masks(first).items():
        np.testing.assert_array_equal(mask, masks(again)[name])
    assert any((m != masks(other)[n]).any() for n, m in masks(first).items())


def test_report_draws_each_entry():
    model = sparsify(small_model(), 0.2, conventions=REPORT)
    assert ones(model) != round(0.2 * size(model))
    assert ones(model) == pytest.approx(0.2 * size(model), rel=0.15)


def nested_model():
    inputs = keras.Input((8, 8, 3))
    inner = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.Conv2D(4, 1, name="point"),
        ],
        name="inner",
    )
    shared = layers.Dense(4, name="shared")
    x = layers.Flatten()(inner(inputs))
    x = layers.Dense(4, name="first")(x)
    return keras.Model(inputs, shared(shared(x)))


@pytest.mark.parametrize("build", [small_model, nested_model])
def test_strip(build):
    model = sparsify(build(), 0.3)
    plain = strip(model)
    x, _ = examples(4)
    np.testing.assert_array_equal(
        plain.predict(x, verbose=0), model.predict(x, verbose=0)
    )
    assert not masked_layers(plain)
    again = sparsify(plain, 0.3)
    assert masks(again).keys() == masks(model).keys()
    with pytest.raises(ValueError, match="nothing to strip"):
        strip(plain)


def test_nested_and_shared_layers_are_masked_once():
    model = sparsify(nested_model(), 0.3)
    assert [m.name for m in masked_layers(model)] == [
        "conv",
        "point",
        "first",
        "shared",
    ]


def test_which_layers():
    dense = small_model()
    head = dense.get_layer("head")

    def names(layers):
        return {
            m.name for m in masked_layers(sparsify(dense, 0.5, layers=layers))
        }

    assert names(head) == {"head"}
    assert names(keras.layers.Dense) == {"head"}
    assert names(lambda layer: "conv" in layer.name) == {"conv1", "conv2"}
    assert names([head, dense.get_layer("conv2")]) == {"conv2", "head"}
    assert names([head, keras.layers.DepthwiseConv2D]) == {"depthwise", "head"}


def test_given_densities():
    dense = small_model()
    model = sparsify(
        dense, 0.2, densities={"conv1": 0.5, dense.get_layer("head"): 0.1}
    )
    densities = {m.name: m.density for m in masked_layers(model)}
    assert densities["conv1"] == pytest.approx(0.5, abs=0.01)
    assert densities["head"] == pytest.approx(0.1, abs=0.01)
    assert ones(model) == round(0.2 * size(model))
    first = sparsify(
        dense, 0.2, distribution="uniform", densities={"conv1": 1.0}
    )
    assert first.get_layer("conv1").density == 1.0
    assert ones(first) == round(0.2 * size(first))


def test_table():
    text = str(masked_layers(sparsify(small_model(), 0.2)))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "kernel", "density", "nonzeros", "of"]
    conv2 = next(line.split() for line in lines if "conv2" in line)
    assert conv2[1] == "3x3x8x16" and conv2[4] == "1,152"
    assert "norm: normalisation, never masked" in text
    total = next(line for line in lines if line.startswith("all masked"))
    assert total.split()[3] == "0.2000"
    assert repr(masked_layers(sparsify(small_model(), 0.2))) == text
    many = str(
        masked_layers(sparsify(rigl_keras.models.wide_resnet(10, 1), 0.2))
    )
    assert (
        "\n  block1_0_bn1, block1_0_bn2, block2_0_bn1, ... (7 layers): " in many
    )
    assert max(map(len, many.splitlines())) <= 80
    uniform = sparsify(small_model(), 0.2, distribution="uniform")
    assert "conv1: left dense" in str(masked_layers(uniform))


def test_save_and_load(tmp_path, fresh):
    model = compiled(sparsify(small_model(), 0.2), "adam")
    model.fit(*examples(), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x, y = examples(8)
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )
    for name, mask in masks(model).items():
        np.testing.assert_array_equal(mask, masks(loaded)[name])
    for one, two in zip(
        masked_layers(model), masked_layers(loaded), strict=True
    ):
        assert one.draw_key == two.draw_key  # paths differ once loaded
    for old, new in zip(
        model.optimizer.variables, loaded.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(old.numpy(), new.numpy())
    loaded.fit(*examples(), verbose=0)
    for name, kernel in kernels(loaded).items():
        assert not kernel[masks(model)[name] == 0].any()
    # In a process that only imports the library.
    code = (
        "import sys, keras, numpy, rigl_keras\n"
        "m = keras.models.load_model(sys.argv[1])\n"
        "print(len(rigl_keras.masked_layers(m)))"
    )
    done = fresh("-c", code, tmp_path / "model.keras")
    assert done.stdout.strip() == "4", done.stderr


def test_a_stripped_model_loads_as_plain_keras(tmp_path, fresh):
    strip(sparsify(small_model(), 0.2)).save(tmp_path / "plain.keras")
    code = (
        "import sys, keras\n"
        "m = keras.models.load_model(sys.argv[1])\n"
        "print('rigl_keras' in sys.modules)"
    )
    done = fresh("-c", code, tmp_path / "plain.keras")
    assert done.stdout.strip() == "False", done.stderr


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


def subclassed():
    model = Subclassed()
    model(np.ones((1, 2), np.float32))
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: keras.Sequential([layers.Dense(3)]), "is not built"),
        (lambda: "model", "takes a Keras model"),
        (lambda: sparsify(small_model(), 0.5), "masked already"),
        (
            lambda: keras.Sequential(
                [keras.Input((3,)), layers.BatchNormalization(name="bn")]
            ),
            "nothing to mask.*\n.*bn: normalisation",
        ),
    ],
)
def test_bad_models(make, message):
    with pytest.raises(ValueError, match=message):
        sparsify(make(), 0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"density": 0}, r"must be in \(0, 1\]"),
        ({"density": -0.5}, r"must be in \(0, 1\]"),
        ({"density": 1.5}, r"must be in \(0, 1\]"),
        ({"density": float("nan")}, r"must be in \(0, 1\]"),
        ({"density": 1e-7}, "rounds to no connection"),
        ({"density": 0.01, "densities": {"head": 1.0}}, "No densities"),
        ({"density": 0.1, "densities": {"haed": 1.0}}, "Did you mean 'head'"),
        ({"density": 0.1, "distribution": "erk2"}, "Did you mean 'erk'"),
        ({"density": 0.1, "layers": "head"}, "not names"),
        ({"density": 0.1, "layers": layers.Conv3D}, "nothing to mask that"),
        ({"density": 0.1, "layers": layers.Dense(3)}, "not a layer of this"),
        ({"density": 0.1, "layers": 3}, "takes layer objects"),
        ({"density": 0.1, "seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments(options, message):
    density = options.pop("density")
    with pytest.raises(ValueError, match=message):
        sparsify(small_model(), density, **options)


def test_a_layer_without_connections_warns():
    with pytest.warns(UserWarning, match="no connection is left in"):
        sparsify(small_model(), 0.0004, distribution="uniform")
    assert rigl_keras.sparsify is sparsify


def cube(a, b):
    """A custom loss, which Keras cannot make from a config."""
    return keras.ops.mean(keras.ops.abs(a - b) ** 3)


def small_mlp():
    inputs = keras.Input((4,))
    x = layers.Dense(5, name="hidden")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def test_a_compiled_model():
    """A compiled model, after dense training, can be masked with any loss."""
    dense = small_mlp()
    dense.compile("sgd", cube)
    sparse = sparsify(dense, 0.5)
    assert not sparse.compiled and dense.compiled
    sparse.compile("sgd", cube)
    assert not strip(sparse).compiled


def test_state_beyond_weights_is_kept():
    """A Normalization layer keeps state that it derives from variables."""
    x = np.random.default_rng(0).normal(3, 2, (9, 4)).astype(np.float32)
    inputs = keras.Input((4,))
    normalise = layers.Normalization()
    normalise.adapt(x)
    dense = keras.Model(inputs, layers.Dense(3)(normalise(inputs)))
    sparse = sparsify(dense, 1.0)
    want = dense(x).numpy()
    np.testing.assert_allclose(sparse(x).numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(strip(sparse)(x).numpy(), want, rtol=1e-6)


def test_a_layer_shared_with_a_submodel_stays_shared():
    shared = layers.Dense(4, name="shared")
    inner_inputs = keras.Input((4,))
    inner = keras.Model(inner_inputs, shared(inner_inputs), name="inner")
    inputs = keras.Input((4,))
    dense = keras.Model(inputs, shared(inner(inputs)))
    sparse = sparsify(dense, 0.5)
    assert [m.name for m in masked_layers(sparse)] == ["shared"]
    assert len(sparse.trainable_variables) == len(dense.trainable_variables)
    assert len(strip(sparse).variables) == len(dense.variables)


def test_layers_of_one_name_draw_masks_of_their_own():
    def submodel(name):
        inputs = keras.Input((8,))
        return keras.Model(inputs, layers.Dense(8, name="d")(inputs), name=name)

    inputs = keras.Input((8,))
    dense = keras.Model(inputs, submodel("b")(submodel("a")(inputs)))
    one, two = masked_layers(sparsify(dense, 0.5))
    assert one.draw_key != two.draw_key  # SET's growth, too, would be the same
    assert (one.mask.numpy() != two.mask.numpy()).any()


def test_a_frozen_layer_stays_frozen():
    dense = small_mlp()
    dense.get_layer("hidden").trainable = False
    sparse = sparsify(dense, 0.5)
    assert len(sparse.trainable_variables) == 2
    sparse.get_layer("hidden").trainable = True
    assert len(sparse.trainable_variables) == 4


def test_seed_is_the_same_in_every_process(fresh):
    code = (
        "import keras, numpy, rigl_keras\n"
        "i = keras.Input((4,), name='i')\n"
        "m = keras.Model(i, keras.layers.Dense(5, name='hidden')(i))\n"
        "m = rigl_keras.sparsify(m, 0.5, seed=7)\n"
        "mask = rigl_keras.masked_layers(m)[0].mask.numpy()\n"
        "print(''.join(str(int(v)) for v in mask.ravel()))"
    )
    done = fresh("-c", code)  # Python salts hash() in each process
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(5, name="hidden")(inputs))
    mask = masks(sparsify(model, 0.5, seed=7))["hidden"]
    want = "".join(str(int(v)) for v in mask.ravel())
    assert done.stdout.strip() == want, done.stderr


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    units=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    density=st.floats(0.2, 1.0),
    distribution=st.sampled_from(["erdos_renyi", "erdos_renyi_kernel"]),
)
def test_total_is_exact_for_any_model(units, density, distribution):
    hypothesis.assume(round(density * 12 * units[0]) >= 1)
    model = keras.Sequential(
        [keras.Input((12,)), *(layers.Dense(n) for n in units)]
    )
    with warnings.catch_warnings():
        # A layer is left without connections.
        warnings.simplefilter("ignore", UserWarning)
        sparse = sparsify(model, density, distribution=distribution)
    assert ones(sparse) == round(density * size(sparse))


def nested_subclassed():
    inputs = keras.Input((2,))
    return keras.Model(inputs, subclassed()(inputs))


def test_a_model_without_a_config_within_another_is_masked_in_place():
    dense = nested_subclassed()
    with pytest.warns(UserWarning, match="Subclassed, cannot be copied"):
        model = sparsify(dense, 0.5)
    assert model is dense and ones(model) == 3


@pytest.mark.parametrize(
    "make, options, message",
    [
        (small_mlp, {"densities": [0.1, 0.2]}, "densities"),
        (small_mlp, {"conventions": "REPORT"}, "conventions"),
        (small_mlp, {"distribution": ["erk"]}, "distribution must be"),
    ],
)
def test_wrong_types_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        sparsify(make(), 0.5, **options)


@pytest.mark.parametrize("function", [strip, masked_layers])
def test_not_a_model(function):
    with pytest.raises(ValueError, match="Keras model"):
        function("model.keras")


def test_kernels_are_kept_or_removed_whole():
    model = small_model()
    sparse = sparsify(model, 0.6, granularity="kernel")
    found = masks(sparse)
    for name in ("conv1", "conv2", "depthwise"):
        assert (found[name] == found[name][:1, :1]).all()
        assert found[name].any()
        assert sparse.get_layer(name).granularity == "kernel"
    assert not found["conv2"].all()
    assert found["head"].all()  # no spatial axes: others compensate
    total = sum(mask.size for mask in found.values())
    assert abs(ones(sparse) - 0.6 * total) <= 9 * 3
    # The same as with given densities of the dense layers.
    shapes = {name: mask.shape for name, mask in found.items()}
    wanted = distributions.layer_densities(shapes, 0.6, densities={"head": 1.0})
    for name, mask in found.items():
        assert mask.mean() == pytest.approx(
            wanted[name], abs=1 / math.prod(mask.shape[-2:])
        )
    given = sparsify(model, 0.6, granularity="kernel", densities={"head": 0.5})
    assert masks(given)["head"].mean() == pytest.approx(0.5, abs=1e-2)


def test_bad_granularity():
    with pytest.raises(ValueError, match="granularity must be one of"):
        sparsify(small_model(), 0.3, granularity="channel")
    with pytest.raises(ValueError, match="no layer to mask is a convolution"):
        sparsify(small_mlp(), 0.3, granularity="kernel")
    # The classifier alone has more than a tenth of the weights.
    with pytest.raises(ValueError, match="No densities of the other layers"):
        sparsify(small_model(), 0.1, granularity="kernel")


def test_masks_that_are_given():
    model = small_model()
    found = masks(sparsify(model, 0.2, seed=5))
    del found["conv1"]
    sparse = with_masks(model, found)
    assert [m.name for m in masked_layers(sparse)] == [
        "depthwise", "conv2", "head",
    ]  # fmt: skip
    for layer in masked_layers(sparse):
        np.testing.assert_array_equal(layer.mask, found[layer.name])
        kernel = model.get_layer(layer.name).kernel.numpy()
        np.testing.assert_array_equal(
            layer.kernel, np.where(found[layer.name] == 1, kernel, 0)
        )
    np.testing.assert_array_equal(
        sparse.get_layer("conv1").kernel, model.get_layer("conv1").kernel
    )


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "at least one mask"),
        ({"hiden": np.ones((4, 3))}, "'hiden', which is not a kernel"),
        ({"norm": np.ones(8)}, "not a kernel of this model that can be"),
        ({"head": np.ones((3, 4))}, r"shape of its kernel.*shape \(3, 4\)"),
        ({"head": np.full((64, 10), 0.5)}, "zeros and ones only.*0.5"),
        ({"head": np.full((64, 10), np.nan)}, "zeros and ones only.*nan"),
    ],
)
def test_bad_masks(given, message):
    with pytest.raises(ValueError, match=message):
        with_masks(small_model(), given)


def test_einsum_is_masked():
    inputs = keras.Input((7, 6))
    x = layers.EinsumDense("abc,cde->abde", (7, 2, 3), name="heads")(inputs)
    model = keras.Model(inputs, layers.Dense(4, name="d")(x))
    sparse = sparsify(model, 0.5)
    x = np.random.default_rng(0).normal(size=(2, 7, 6)).astype(np.float32)
    np.testing.assert_allclose(strip(sparse)(x), sparse(x), rtol=1e-5)
    assert masks(sparse)["heads"].shape == (6, 2, 3)
    assert ones(sparse) == round(0.5 * size(sparse))


def test_einsum_has_no_kernels_to_keep_whole():
    inputs = keras.Input((8, 6))
    x = layers.EinsumDense("abc,cde->abde", (8, 2, 3), name="heads")(inputs)
    x = layers.Reshape((8, 6))(x)
    model = keras.Model(inputs, layers.Conv1D(6, 3, name="conv")(x))
    sparse = sparsify(model, 0.6, granularity="kernel")
    assert masks(sparse)["heads"].all()
    assert sparse.get_layer("heads").granularity == "element"
    assert sparse.get_layer("conv").granularity == "kernel"


def test_masks_of_layers_of_one_name():
    """In two submodels, each layer gets its own mask."""

    def part(inputs):
        x = keras.Input((5,))
        return keras.Model(x, layers.Dense(5, name="d")(x))(inputs)

    inputs = keras.Input((5,))
    model = keras.Model(inputs, part(part(inputs)))
    found = masked_layers(sparsify(model, 0.4)).masks
    assert list(found) == ["d", "d'"]
    ticket = masked_layers(with_masks(model, found)).masks
    for name, mask in found.items():
        np.testing.assert_array_equal(ticket[name], mask)
    # A predicate selects only the second layer of the name.
    second = rigl_keras.named_layers(model)["d'"]
    alone = masked_layers(sparsify(model, 0.4, layers=second)).masks
    assert list(alone) == ["d'"]


def test_whole_kernels_are_asked_of_given_masks():
    mask = masks(sparsify(small_model(), 0.2))["conv2"]
    with pytest.raises(ValueError, match="parts of some kernels"):
        with_masks(small_model(), {"conv2": mask}, granularity="kernel")
