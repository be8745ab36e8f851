"""The arguments of methods, also of a custom class."""

import dataclasses
import inspect

import keras
import pytest
import tensorflow as tf
from support.methods import DYNAMIC
from support.small_models import compiled, masks
from support.updates import changed, train, two_layers

import rigl_keras
from rigl_keras.conventions import REPORT
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.methods.rigl import SET, SNFS, RigL


@pytest.mark.parametrize("method", DYNAMIC)
def test_config_round_trip(method):
    """The config has every argument of the signature."""
    (callback,) = DYNAMIC[method](
        frequency=7,
        drop_fraction=0.2,
        begin_step=5,
        end_step=50,
        decay="polynomial",
        decay_power=2.0,
        gradient_batches=2,
        grow_init="random_normal",
        grow_divisor=10.0,
        seed=3,
        conventions=REPORT,
    )
    config = callback.get_config()
    assert set(config) == set(inspect.signature(type(callback)).parameters)
    assert type(callback)(**config).get_config() == config
    twice = callback.lengthened(2)
    assert twice.get_config() == {**config, "end_step": 100}
    assert type(twice) is type(callback)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frequency": 0}, "frequency.*at least 1.*frequency=0"),
        ({"frequency": 2.5}, "frequency.*whole numbers"),
        ({"begin_step": -1}, "begin_step.*at least 0"),
        ({"begin_step": 9, "end_step": 5}, "end_step must not come before"),
        ({"end_step": 1.5}, "end_step.*whole numbers"),
        ({"drop_fraction": 1.5}, r"must be in \[0, 1\]"),
        ({"drop_fraction": float("nan")}, r"must be in \[0, 1\]"),
        ({"decay": "cos"}, "decay must be one of"),
        ({"decay_power": 0}, "must be positive"),
        ({"seed": -1}, "seed"),
        ({"conventions": "REPORT"}, "rigl_keras.ORIGINAL"),
        ({"redistribution": "weights"}, "redistribution must be one"),
        ({"gradient_batches": 0}, "gradient_batches.*at least 1"),
        ({"gradient_batches": 4, "frequency": 3}, "at most frequency.*=4"),
        ({"grow_init": "ones"}, "grow_init must be one of.*'ones'"),
        ({"grow_init": "zeros_2"}, "grow_init must be one of"),
        ({"grow_init": "random_normal", "grow_divisor": 0}, "positive number"),
        ({"grow_init": "random_normal_0"}, "positive number"),
        ({"grow_init": "random_normal_2", "grow_divisor": 3}, "two divisors"),
        ({"grow_divisor": 2}, "zeros stay zeros.*grow_divisor=2"),
        ({"grow_init": None}, "grow_init must be one of"),
    ],
)
@pytest.mark.parametrize("method", [RigL, SET, SNFS])
def test_bad_arguments(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"drop_fraction": "0.3"}, "drop_fraction"),
        ({"drop_fraction": None}, "drop_fraction"),
        ({"decay_power": "3"}, "decay_power"),
        ({"seed": 2**64}, "seed"),  # too large for a seed
    ],
    ids=str,
)
def test_wrong_types_are_named(options, name):
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        SET(**options)


def test_when_gradients_are_dense_is_one_of_three():
    class Sometimes(RigL):
        dense_gradients = "sometimes"

    with pytest.raises(ValueError, match="dense_gradients.*'sometimes'"):
        Sometimes().attach(sparsify(two_layers(), 0.2), keras.optimizers.SGD())


def test_gradients_that_are_never_dense():
    """They are zero outside the masks, and nothing can grow by them."""
    seen = []

    class Look(SET):
        def drop_scores(self, layer, gradient, step):
            seen.append((layer.mask.numpy(), gradient.numpy()))
            return super().drop_scores(layer, gradient, step)

    model = compiled(sparsify(two_layers(), 0.2))
    method = Look(frequency=1, end_step=9)
    method.attach(model, model.optimizer)
    variables = model.trainable_variables
    for _ in range(2):
        method.update([tf.ones(v.shape) for v in variables], variables)
    assert len(seen) == 2  # one of each layer
    for mask, gradient in seen:
        assert gradient[mask].all() and not gradient[~mask].any()

    class Grow(rigl_keras.MaskUpdate):
        dense_gradients = "never"

        def grow_scores(self, layer, gradient, step):
            return abs(gradient)

    with pytest.raises(ValueError, match="(?s)Grow has dense_gradients = 'nev"):
        train(model, [Grow(frequency=1, end_step=9)])


def test_nan_scores_are_refused():
    """A custom method may compute NaN from finite gradients and kernels."""

    class Logarithm(rigl_keras.MaskUpdate):
        def grow_scores(self, layer, gradient, step):
            return tf.math.log(gradient)

    model = compiled(sparsify(two_layers(), 0.2))
    before = masks(model)
    with pytest.raises(ValueError, match="at step 3.*a score was NaN"):
        train(model, [Logarithm(frequency=3, end_step=5)])
    assert not changed(before, masks(model))


def test_a_method_with_arguments_of_its_own_is_lengthened_whole():
    class Warm(RigL):
        def __init__(self, temperature=1.0, **options):
            super().__init__(**options)
            self.temperature = temperature

    warm = Warm(temperature=5.0, end_step=10)
    assert warm.lengthened(2).temperature == 5.0
    assert (warm.end_step, warm.lengthened(2).end_step) == (10, 20)


def test_the_fields_of_a_method_are_its_arguments():
    @dataclasses.dataclass(kw_only=True, eq=False, repr=False)
    class Seldom(RigL):
        frequency: int = 500
        temperature: float = 1.0

    assert list(inspect.signature(Seldom).parameters) == [
        *inspect.signature(RigL).parameters,
        "temperature",
    ]
    seldom = Seldom(temperature=5.0, end_step=10)
    assert seldom.get_config() == {
        **RigL(frequency=500, end_step=10).get_config(),
        "temperature": 5.0,
    }
    assert seldom.lengthened(2).get_config()["temperature"] == 5.0
    with pytest.raises(ValueError, match="frequency.*at least 1"):
        Seldom(frequency=0)
    with pytest.raises(TypeError, match="positional"):
        Seldom(500)


def test_a_lengthened_method_is_not_attached():
    model = compiled(sparsify(two_layers(), 0.2))
    method = RigL(end_step=50, frequency=2)
    method.attach(model, model.optimizer)
    longer = method.lengthened(2)
    assert longer.optimizer is None and method.optimizer is model.optimizer
    longer.attach(model, model.optimizer)
    train(model, [longer])
    assert len(longer.trajectory) > 1 == len(method.trajectory)


def test_steps_that_are_no_list():
    with pytest.raises(ValueError, match="list of steps.*switch_steps=5"):
        rigl_keras.ACDC(density=0.1, switch_steps=5)
    with pytest.raises(ValueError, match="above prune_begin_step=3.*=3"):
        rigl_keras.GraNet(
            final_density=0.1, prune_begin_step=3, prune_end_step=3
        )
