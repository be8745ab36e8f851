"""Models as after training, with dead units, and checks of smaller ones."""

import keras
import numpy as np
from keras import layers

from rigl_keras.compaction.dead_units import remove_dead_units


def in_float64():
    """Computes in float64 until it is resumed, so that any difference shows."""
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


def settle(model, seed=0):
    """Sets batch norms and biases as after training; returns the model."""
    draw = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            for variable in layer.weights:
                variable.assign(draw.normal(size=variable.shape))
            layer.moving_variance.assign(draw.uniform(0.5, 2, layer.beta.shape))
        elif getattr(layer, "bias", None) is not None:
            layer.bias.assign(draw.normal(size=layer.bias.shape))
    return model


def cut(layer, *, incoming=(), outgoing=()):
    """Removes all connections to some units, or from some inputs."""
    kernel = layer.kernel.numpy()
    kernel[..., list(incoming)] = 0
    kernel[..., list(outgoing), :] = 0
    layer.kernel.assign(kernel)


def outputs(model, n=3, seed=5):
    """Returns the outputs of a model for random inputs, as arrays."""
    draw = np.random.default_rng(seed)
    x = keras.tree.map_structure(
        lambda t: draw.normal(size=(n, *(d or 7 for d in t.shape[1:]))),
        model.input if hasattr(model, "input") else model.inputs[0],
    )
    # Otherwise Keras passes training=True from one layer to the next.
    outputs = model(x, training=False)
    return [np.asarray(y) for y in keras.tree.flatten(outputs)]


def assert_same(model, small, tolerance=1e-12):
    """Checks that two models have the same outputs."""
    for one, other in zip(outputs(model), outputs(small), strict=True):
        assert one.shape == other.shape
        scale = np.abs(one).max()
        # Outputs that do not depend on the inputs would hide differences.
        assert np.ptp(one, axis=0).max() > 1e-4 * scale
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def removed(model):
    """Compares the smaller model; returns it and the layers that shrank."""
    before = [w.numpy() for w in model.weights]
    small, removal = remove_dead_units(model)
    assert_same(model, small)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert removal.parameters_after == small.count_params()
    for name, (_, after) in removal.layers.items():
        assert small.get_layer(name).output.shape[-1] == after
    again, nothing = remove_dead_units(small)
    assert not nothing.layers and again.count_params() == small.count_params()
    return small, removal.layers
