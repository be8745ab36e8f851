"""What optimizers remember is found, and forgotten entry by entry."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import rigl_keras
from rigl_keras import ORIGINAL, REPORT, Conventions, optimizer_state

OPTIMIZERS = {
    "SGD": (lambda: keras.optimizers.SGD(momentum=0.9), {"momentum": 0}),
    "plain SGD": (keras.optimizers.SGD, {}),
    "Adam": (keras.optimizers.Adam, {"momentum": 0, "velocity": 0}),
    "AMSGrad": (
        lambda: keras.optimizers.Adam(amsgrad=True),
        {"momentum": 0, "velocity": 0, "velocity_hat": 0},
    ),
    "AdamW": (keras.optimizers.AdamW, {"momentum": 0, "velocity": 0}),
    "Adagrad": (keras.optimizers.Adagrad, {"accumulator": 0.1}),
    "Adadelta": (
        keras.optimizers.Adadelta,
        {"accumulated_grad": 0, "accumulated_delta_var": 0},
    ),
    "Adamax": (keras.optimizers.Adamax, {"momentum": 0, "norm": 0}),
    "Nadam": (keras.optimizers.Nadam, {"momentum": 0, "velocity": 0}),
    "Ftrl": (keras.optimizers.Ftrl, {"accumulator": 0.1, "linear": 0}),
    "RMSprop": (keras.optimizers.RMSprop, {"velocity": 0}),
    "Lion": (keras.optimizers.Lion, {"momentum": 0}),
    "Lamb": (keras.optimizers.Lamb, {"momentum": 0, "velocity": 0}),
    "loss scaling": (
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
        {"momentum": 0, "velocity": 0},
    ),
}


def variable(name, shape=(2, 3)):
    return keras.Variable(np.ones(shape, np.float32), name=name)


@pytest.mark.parametrize("make, initial", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_forget(make, initial):
    optimizer = make()
    # Names that begin alike, and one name twice.
    variables = [variable("w"), variable("w_2"), variable("w")]
    optimizer.build(variables)
    slots = [optimizer_state.slots(optimizer, v) for v in variables]
    for found in slots:
        assert set(initial) == set(found)
        for slot in found.values():
            slot.assign(np.full((2, 3), 7.0))
    keep = np.array([[True, False, True], [True, True, False]])
    optimizer_state.forget(optimizer, variables[2], keep=tf.constant(keep))
    for name, start in initial.items():
        want = np.where(keep, 7.0, np.float32(start))
        np.testing.assert_allclose(slots[2][name].numpy(), want)
        for other in slots[:2]:
            np.testing.assert_array_equal(other[name].numpy(), 7.0)


def test_shared_memory_is_left_alone():
    optimizer = keras.optimizers.Adafactor()
    kernel = variable("w")
    optimizer.build([kernel])
    assert all(
        slot.shape == kernel.shape
        for slot in optimizer_state.slots(optimizer, kernel).values()
    )


def test_an_optimizer_that_its_config_does_not_make():
    class Mine(keras.optimizers.SGD):
        def __init__(self, rate, needed):
            super().__init__(rate, momentum=0.9)

    optimizer, kernel = Mine(0.1, None), variable("w")
    optimizer.build([kernel])
    slot = optimizer_state.slots(optimizer, kernel)["momentum"]
    slot.assign(np.ones((2, 3)))
    optimizer_state.forget(optimizer, kernel, keep=tf.zeros((2, 3), tf.bool))
    assert not slot.numpy().any()


def test_errors():
    optimizer = keras.optimizers.SGD(momentum=0.9)
    with pytest.raises(ValueError, match="is not built"):
        optimizer_state.slots(optimizer, variable("w"))
    optimizer.build([variable("w")])
    with pytest.raises(ValueError, match="does not train 'other'"):
        optimizer_state.slots(optimizer, variable("other"))


def test_conventions():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ORIGINAL.drop_rounding = "ceil"
    for field in dataclasses.fields(Conventions):
        assert f" {field.name}: " in Conventions.__doc__
        if field.type != "bool" and not isinstance(field.default, bool):
            with pytest.raises(ValueError, match=field.name):
                Conventions(**{field.name: "nonsense"})
    assert rigl_keras.Conventions() == ORIGINAL != REPORT
    assert ORIGINAL.first_update == "frequency" and ORIGINAL.end_is_included
    assert REPORT.drop_rounding == "ceil" and REPORT.sampling == "bernoulli"
