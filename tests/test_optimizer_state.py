"""The state of optimizers is found, and reset entry by entry."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import rigl_keras
from rigl_keras.conventions import ORIGINAL, REPORT, Conventions
from rigl_keras.training import optimizer_state

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
    # Names with the same prefix, and a name that occurs twice.
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


def every_optimizer():
    for name, kind in vars(keras.optimizers).items():
        if not (isinstance(kind, type) and issubclass(kind, keras.Optimizer)):
            continue
        try:
            kind()
        except TypeError:  # the base class and wrappers
            continue
        yield name, kind


@pytest.mark.parametrize("name, kind", list(every_optimizer()))
def test_forgetting_is_starting_afresh(name, kind):
    """Reset state equals that of a new optimizer, for all of Keras's."""
    if name == "SGD":
        optimizer, fresh = kind(momentum=0.9), kind(momentum=0.9)
    else:
        optimizer, fresh = kind(), kind()
    kernels = [variable("kernel"), variable("kernel_2")]
    optimizer.build(kernels)
    optimizer.apply([tf.fill((2, 3), 0.5)] * 2)
    keep = np.array([[True, False, True], [True, True, False]])
    # Grown connections start at zero, and some optimizers start with a copy
    # of the weights.
    kernels[0].assign(kernels[0] * keep)
    fresh.build(kernels)
    slots = optimizer_state.slots(optimizer, kernels[0])
    started = optimizer_state.slots(fresh, kernels[0])
    assert slots and slots.keys() == started.keys()
    before = {v.name: v.numpy() for v in optimizer.variables}
    own = {slot.name for slot in slots.values()}
    optimizer_state.forget(optimizer, kernels[0], keep=tf.constant(keep))
    for slot_name, slot in slots.items():
        want = np.where(keep, before[slot.name], started[slot_name].numpy())
        np.testing.assert_array_equal(slot.numpy(), want)
    for other in optimizer.variables:
        if other.name not in own and name != "Adafactor":
            np.testing.assert_array_equal(other.numpy(), before[other.name])


def start_after_forgetting(optimizer, kernel=None):
    kernel = variable("w") if kernel is None else kernel
    optimizer.build([kernel])
    slots = optimizer_state.slots(optimizer, kernel)
    for slot in slots.values():
        slot.assign(tf.fill(slot.shape, 7.0))
    optimizer_state.forget(optimizer, kernel, keep=tf.zeros((2, 3), tf.bool))
    return {name: float(slot.numpy()[0, 0]) for name, slot in slots.items()}


@pytest.mark.parametrize("jit_compile", [False, True])
def test_forget_in_a_graph(jit_compile):
    """Updates run in graphs, where no variables can be made."""
    optimizer, kernel = keras.optimizers.Adagrad(), variable("w")
    optimizer.build([kernel])
    slot = optimizer_state.slots(optimizer, kernel)["accumulator"]

    @tf.function(jit_compile=jit_compile)
    def forget(keep):
        optimizer_state.forget(optimizer, kernel, keep)

    # The second mask has another rank, so the function is traced again.
    for keep in (tf.eye(2, 3) > 0, tf.constant(False)):
        slot.assign(tf.fill((2, 3), 7.0))
        forget(keep)
        want = np.where(keep, np.float32(7.0), np.float32(0.1))
        np.testing.assert_array_equal(
            slot.numpy(), np.broadcast_to(want, (2, 3))
        )


@pytest.mark.parametrize("optimizer", ["adagrad", "ftrl"])
def test_forget_within_fit(optimizer):
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(4)]
    )
    model = rigl_keras.sparsify(model, 0.3)
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).standard_normal((42, 8)).astype("float32")
    # The last of the six batches is smaller, which traces the step again;
    # step 5, the last, is an update.
    model.fit(
        x,
        x[:, :4],
        batch_size=8,
        callbacks=[rigl_keras.RigL(frequency=5, end_step=10)],
        verbose=0,
    )
    for layer in rigl_keras.masked_layers(model):
        slots = optimizer_state.slots(model.optimizer, layer.kernel)
        inactive = slots["accumulator"].numpy()[layer.mask.numpy() == 0]
        np.testing.assert_array_equal(inactive, np.float32(0.1))


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    """A custom schedule, which Keras cannot make from a config."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / 2.0 ** (step // 1000)


def test_learning_rate_has_no_say_in_memory():
    optimizer = keras.optimizers.Adagrad(Halving(0.1))
    assert start_after_forgetting(optimizer)["accumulator"] == pytest.approx(
        0.1
    )


@pytest.mark.parametrize("error", [KeyError, AttributeError, RuntimeError])
@pytest.mark.parametrize("method", ["from_config", "get_config"])
def test_a_configuration_that_fails_is_no_end(error, method):
    def fail(*args, **kwargs):
        raise error("of the user's own making")

    mine = type("Mine", (keras.optimizers.Adam,), {method: fail})
    assert start_after_forgetting(mine()) == {"momentum": 0, "velocity": 0}


def test_one_path_and_other_shapes():
    """Two submodels have layers of one name, with other widths."""
    optimizer = keras.optimizers.SGD(momentum=0.9)
    kernels = [variable("w", shape) for shape in ((2, 3), (2, 4), (2, 3))]
    optimizer.build(kernels)
    found = [optimizer_state.slots(optimizer, k)["momentum"] for k in kernels]
    assert [slot.shape for slot in found] == [(2, 3), (2, 4), (2, 3)]
    assert [id(slot) for slot in found] == [id(m) for m in optimizer.momentums]


def test_paths_alike_but_for_their_slashes():
    with keras.name_scope("a"):
        first = variable("b_kernel")
    with keras.name_scope("a_b"):
        second = variable("kernel")
    optimizer = keras.optimizers.SGD(momentum=0.9)
    optimizer.build([first, second])
    for kernel, momentum in zip(
        (first, second), optimizer.momentums, strict=True
    ):
        found = optimizer_state.slots(optimizer, kernel)["momentum"]
        assert found is momentum


def test_moving_averages_and_accumulated_gradients():
    optimizer = keras.optimizers.SGD(
        0.1, momentum=0.9, use_ema=True, gradient_accumulation_steps=2
    )
    assert start_after_forgetting(optimizer) == {
        "momentum": 0,
        "average": 1,  # the value of the weight, as in a new optimizer
        "gradient_accumulator": 0,
    }


def test_forget_refuses_as_slots_does():
    optimizer = keras.optimizers.Adam()
    keep = tf.zeros((2, 3), tf.bool)
    with pytest.raises(ValueError, match="'adam.*' is not built.*build"):
        optimizer_state.forget(optimizer, variable("w"), keep=keep)
    optimizer.build([variable("w")])
    # Another variable with the same path does not count.
    with pytest.raises(ValueError, match="does not train 'w'"):
        optimizer_state.forget(optimizer, variable("w"), keep=keep)


def test_innermost():
    inner = keras.optimizers.Adam()
    wrapped = keras.optimizers.LossScaleOptimizer(inner)
    assert optimizer_state.innermost(wrapped) is inner
    assert optimizer_state.innermost(inner) is inner


@pytest.mark.parametrize(
    "make, first, want",
    [
        # -rate x gradient for SGD; m = 0.1 g and v = 0.001 g^2 for Adam;
        # rate x g / sqrt(0.1 g^2) for RMSprop.
        (lambda: keras.optimizers.SGD(0.5, 0.9), 4.0, -2.0),
        (lambda: keras.optimizers.Lion(), 4.0, 0.04),
        (lambda: keras.optimizers.Adam(), 4.0, 0.4 / (0.016**0.5 + 1e-8)),
        (lambda: keras.optimizers.RMSprop(0.5, momentum=0.9), 4.0, 1.5811387),
        (
            lambda: keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.5, 0.9)
            ),
            4.0 * 2**15,
            -2.0,
        ),
    ],
)
def test_momentum_after_one_step(make, first, want):
    optimizer, kernel = make(), variable("w")
    optimizer.build([kernel])
    optimizer.apply([tf.fill((2, 3), first)], [kernel])
    got = optimizer_state.momentum(optimizer, kernel)
    np.testing.assert_allclose(got, np.full((2, 3), want), rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [keras.optimizers.SGD, keras.optimizers.Adagrad, keras.optimizers.RMSprop],
)
def test_no_momentum(make):
    optimizer, kernel = make(), variable("w")
    optimizer.build([kernel])
    with pytest.raises(ValueError, match="keeps no momentum of 'w'"):
        optimizer_state.momentum(optimizer, kernel)
