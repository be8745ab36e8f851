"""The contract that density 1 is the dense model, for all kinds of models."""

import functools
import pickle

import keras
import numpy as np
import pytest
from support import copied_kinds, hard_kinds, kinds

from rigl_keras.masking.mask_variable import MaskVariable
from rigl_keras.masking.masked_layers import masked_layers
from rigl_keras.masking.sparsify import sparsify
from rigl_keras.masking.stripping import strip

MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "XLA": {"jit_compile": True},
}

KINDS = {**kinds.KINDS, **hard_kinds.KINDS, **copied_kinds.KINDS}

# Kinds with operations that XLA does not support, even if dense.
WITHOUT_XLA = {*hard_kinds.ON_SPARSE, "scan", *copied_kinds.WITHOUT_XLA}
# Kinds for `--every-combination` only, as XLA is slow and the other kinds
# cover them.
SELDOM_XLA = {
    *kinds.KINDS,
    "TimeDistributed",
    "gradient penalty",
    "map",
    "stateful LSTM",
    "tf.function",
    "tied kernel",
    "vectorized_map",
}


def batches(kind, model):
    if kind in hard_kinds.KINDS:
        return hard_kinds.data(kind, model)
    if kind in copied_kinds.KINDS:
        return copied_kinds.data(kind, model)
    x, y = kinds.data(model, n=20)
    return [
        keras.tree.map_structure(lambda a, i=i: a[i : i + 4], (x, y))
        for i in range(0, 20, 4)
    ]


def make(kind, density=None):
    keras.utils.set_random_seed(0)
    if density is not None and kind in copied_kinds.MASKED:
        return copied_kinds.MASKED[kind](density=density)
    model = KINDS[kind]()
    if density is not None:
        options = {"product": "dense", **kinds.OPTIONS.get(kind, {})}
        model = sparsify(model, density, **options)
    return model


@functools.cache
def trained(kind, mode, density=None):
    """Returns a model after five steps, their losses, and its first weights."""
    model = make(kind, density)
    start = [v.numpy() for v in model.trainable_variables]
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0),
        "mse",
        **{"jit_compile": False, **MODES[mode]},
    )
    losses = [
        model.train_on_batch(x, y, return_dict=True)["loss"]
        for x, y in batches(kind, model)
    ]
    return model, [float(loss) for loss in losses], start


def trained_dense(kind, mode):
    """Eager and graph runs share a model; XLA draws other random numbers."""
    return trained(kind, "XLA" if mode == "XLA" else "eager")


def state(model):
    """Returns all variables of the model except masks, with generators."""
    held = [v for v in model.variables if not isinstance(v, MaskVariable)]
    if model.optimizer is not None:
        held += model.optimizer.variables
    return [v.numpy() for v in held]


def assert_close(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def outputs(kind, model):
    x, _ = batches(kind, model)[0]
    before = [v.numpy() for v in model.variables]
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            layer.reset_state()  # files do not hold states
    y = keras.tree.flatten(model(x, training=False))
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    return [np.asarray(part) for part in y]


# The kinds that plain runs train in graphs and save. Others run eagerly.
IN_GRAPHS = list(KINDS)[1::6]


@pytest.mark.slow_but(
    *(f"{k}-{'graph' if k in IN_GRAPHS else 'eager'}" for k in KINDS)
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_trains_as_the_dense_model(kind, mode, request):
    if mode == "XLA":
        if kind in WITHOUT_XLA:
            pytest.skip("the dense model does not compile")
        if kind in SELDOM_XLA and not request.config.getoption(
            "--every-combination"
        ):
            pytest.skip("with --every-combination")
    dense, want, start = trained_dense(kind, mode)
    masked, got, _ = trained(kind, mode, 1.0)
    assert all(m.density == 1.0 for m in masked_layers(masked))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert_close(state(masked), state(dense))
    # Training has changed each kernel, in the dense model too.
    for now, before in zip(dense.trainable_variables, start, strict=True):
        if now.name.endswith("kernel"):
            assert np.abs(now.numpy() - before).max() > 1e-5


@pytest.mark.parametrize("kind", copied_kinds.KINDS)
def test_cloned_and_pickled(kind):
    """A clone has the same density, and unpickling restores the model."""
    masked = make(kind, 0.4)
    want = {m.name: m.density for m in masked_layers(masked)}
    again = pickle.loads(pickle.dumps(masked))
    cloned = keras.models.clone_model(masked)
    for model in (again, cloned):
        assert want == {m.name: m.density for m in masked_layers(model)}
    assert_close(outputs(kind, again), outputs(kind, masked))


@pytest.mark.slow_but(*(k for k in IN_GRAPHS if k not in kinds.KINDS))
@pytest.mark.parametrize("kind", {**hard_kinds.KINDS, **copied_kinds.KINDS})
def test_saved_loaded_and_stripped(kind, tmp_path):
    """As in `test_kinds.py`, for further kinds."""
    dense, *_ = trained_dense(kind, "graph")
    masked, *_ = trained(kind, "graph", 1.0)
    assert_close(outputs(kind, masked), outputs(kind, dense))
    masked.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    saved = [v.numpy() for v in masked.weights]  # files hold no generators
    assert_close([v.numpy() for v in loaded.weights], saved)
    assert_close(outputs(kind, loaded), outputs(kind, dense))
    plain = strip(loaded)
    assert_close(
        [v.numpy() for v in plain.weights], [v.numpy() for v in dense.weights]
    )
    assert_close(outputs(kind, plain), outputs(kind, dense))
