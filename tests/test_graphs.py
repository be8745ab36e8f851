"""A model is traced to a list of calls, and rebuilt from it."""

import keras
import numpy as np
import pytest
from keras import layers
from support.kinds import (
    KINDS,
    data,
    functional,
    nested,
    several_inputs_and_outputs,
)

from rigl_keras.compaction.graphs import plain_copy, rebuild, tensors_in, trace
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify


def names(graph):
    return [call.layer.name for call in graph.calls]


def assert_same(one, other, x):
    a, b = one(x), other(x)
    keras.tree.assert_same_structure(a, b)
    for p, q in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        np.testing.assert_array_equal(p, q)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "subclassed"])
def test_rebuilt_model_computes_the_same(kind):
    model = KINDS[kind]()
    x, _ = data(model)
    before = [v.numpy() for v in model.weights]
    again = rebuild(trace(model))
    assert_same(model, again, x)
    assert again.name == model.name
    assert [t.name for t in again.inputs] == [t.name for t in model.inputs]
    # Nothing is shared, and nothing was changed.
    assert not {id(v) for v in again.variables} & {
        id(v) for v in model.variables
    }
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_calls_are_those_of_the_model():
    model = functional()
    graph = trace(model)
    assert names(graph) == [layer.name for layer in model.layers[1:]]
    by_name = {call.layer.name: call for call in graph.calls}
    relu, conv2 = tensors_in(graph.calls[-3].args)
    assert relu is graph.calls[2].outputs
    assert conv2 is by_name["conv2"].outputs
    assert graph.outputs is by_name["head"].outputs


def test_models_within_are_opened():
    model = nested()
    inner = model.layers[2]
    assert names(trace(model)) == [
        "outer",
        "inner",
        inner.layers[1].name,
        "head",
    ]


def test_two_layers_of_one_name_are_told_apart():
    def part(bias):
        return keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(4, name="dense", bias_initializer=bias),
            ]
        )

    inputs = keras.Input((4,))
    x = part("ones")(part("zeros")(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="dense")(x))
    graph = trace(model)
    assert names(graph) == ["dense", "dense_1", "dense_2"]
    x = np.ones((2, 4), np.float32)
    again = rebuild(graph)
    assert_same(model, again, x)
    assert np.all(again.get_layer("dense_1").bias == 1)


def test_model_called_twice_shares_its_layers():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="d")])
    inputs = keras.Input((4,))
    model = keras.Model(inputs, inner(inner(inputs)))
    graph = trace(model)
    first, second = graph.calls
    assert first.layer is second.layer
    again = rebuild(graph)
    assert len(again.weights) == 2
    assert_same(model, again, np.ones((2, 4), np.float32))


def test_structures_and_operations_survive():
    one, two = keras.Input((4,), name="one"), keras.Input((4,), name="two")
    x = layers.Dense(4)(one + two) * 2.0
    model = keras.Model(
        {"one": one, "two": two}, {"x": x, "pair": [x, layers.ReLU()(two)]}
    )
    again = rebuild(trace(model))
    draw = np.random.default_rng(0)
    x = {k: draw.normal(size=(3, 4)).astype("f") for k in ("one", "two")}
    assert_same(model, again, x)


def test_class_with_a_call_of_its_own_is_refused():
    class Doubled(keras.Sequential):
        def call(self, x, training=None, mask=None):
            return 2 * super().call(x, training=training, mask=mask)

    inner = Doubled([keras.Input((4,)), layers.Dense(4)], name="doubled")
    model = keras.Sequential([keras.Input((4,)), inner, layers.ReLU()])
    for refused in (inner, model):
        with pytest.raises(ValueError, match="'doubled'.*is subclassed"):
            trace(refused)


def test_arguments_survive():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(name="norm")],
        name="inner",
    )
    inputs = keras.Input((4,))
    model = keras.Model(inputs, inner(inputs, training=True))
    assert names(trace(model)) == ["inner"]
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    again = rebuild(trace(model))
    assert_same(model, again, x)
    assert abs(np.mean(again(x))) < 1e-3  # uses statistics of the batch


def test_model_that_converts_its_inputs_stays_one_call():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="dense")], name="inner"
    )
    inputs = keras.Input((4,), dtype="float16")
    model = keras.Model(inputs, inner(inputs))
    assert names(trace(model)) == ["inner"]
    assert_same(model, rebuild(trace(model)), np.ones((2, 4), np.float16))


def test_layers_are_replaced_and_left_out():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, name="a"),
            layers.Dropout(0.5, name="drop"),
            layers.Dense(2, name="b"),
        ]
    )
    graph = trace(model)
    new = {"drop": None, "a": layers.Dense(3, name="a")}
    # `b` was built for 4 inputs.
    new["b"] = layers.Dense(2, name="b")
    small = rebuild(graph, lambda layer: new[layer.name])
    assert [layer.name for layer in small.layers[1:]] == ["a", "b"]
    assert small.get_layer("b").kernel.shape == (3, 2)


def test_masked_model_is_stripped():
    model = sparsify(functional(), 0.3)
    copy = plain_copy(model)
    assert masked_layers(model) and not masked_layers(copy)
    x, _ = data(model)
    assert_same(model, copy, x)


def test_one_graph_makes_many_models():
    graph = trace(functional())
    one, other = rebuild(graph), rebuild(graph)
    assert not {id(v) for v in one.variables} & {id(v) for v in other.variables}
    # Keras knows `output`, as each layer has been called only once.
    assert one.get_layer("conv1").output.shape == (None, 8, 8, 4)


def test_lists_of_outputs_of_models_within():
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="dense")(inputs)
    one = keras.Model(inputs, [x])
    two = keras.Model(inputs, {"a": x, "b": layers.ReLU(name="relu")(x)})
    x = two(one(inputs)[0])
    model = keras.Model(inputs, layers.Dense(2, name="head")(x["b"]))
    assert names(trace(model)) == ["dense", "dense", "relu", "head"]
    assert_same(model, rebuild(trace(model)), np.ones((2, 4), np.float32))


def test_many_inputs_keep_their_order():
    model = several_inputs_and_outputs()
    again = rebuild(trace(model))
    assert list(again.input) == list(model.input)
    assert list(again.output) == list(model.output)


def test_refusals():
    with pytest.raises(ValueError, match="Sequential or Functional.*keras.M"):
        trace(KINDS["subclassed"]())
    with pytest.raises(ValueError, match="not built.*keras.Input"):
        trace(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(ValueError, match="Received: 3"):
        trace(3)
