"""Keras models on the C++ engine: every kind, and random ones.

They have masks, and run on every instruction set and by several threads.
"""

import contextlib

import keras
import numpy as np
import pytest
from support import hard_kinds, kinds
from support.imported import as_function, in_numpy
from support.network_library import (
    KINDS,
    kind_of_code,
    loaded,
    outputs_begin_as_nan,
    path,
)
from support.random_networks import draw_weights, random_model

import rigl_keras
from rigl_keras.exporting.comparison import difference, usual_tolerance
from rigl_keras.exporting.networks import import_model, output_shapes
from rigl_keras.exporting.signatures import outputs_of, signature_of
from rigl_keras.kernels import library
from rigl_keras.serving.network_file import to_bytes
from rigl_keras.serving.operation import checksum_of, run_network

BATCHES = (1, 3, 16, 128, 130)
THREADS = (1, 2, 5)
SEEDS = range(30)

every_kind = pytest.mark.parametrize("kind", kinds.KINDS)


@pytest.fixture(autouse=True, scope="module")
def built():
    path()


@pytest.fixture(autouse=True)
def outputs_of_no_numbers(monkeypatch):
    outputs_begin_as_nan(monkeypatch)


class Case:
    """A masked model, its networks, and its outputs.

    Args:
        model: A model with weights.
        density: Density of its masks.
        options: Further options of `sparsify`.
    """

    def __init__(self, model, density=0.3, **options):
        model = rigl_keras.sparsify(model, density, product="dense", **options)
        signature = signature_of(model)
        self.imported = import_model(model, signature, least_work=1)
        whole = self.imported.network
        networks = [s.network for s in self.imported.segments]
        self.files = [to_bytes(n) for n in ([whole] if whole else networks)]
        self.tolerance = usual_tolerance(model, None, folded=None)
        self.batches = []
        for n in BATCHES:
            arrays = signature.random(n, seed=n)
            self.batches.append((arrays, outputs_of(model, signature, arrays)))

    def check(self, run, *about):
        """Compares outputs of all batches.

        Args:
            run: A function from arrays by name to outputs.
            about: What to show if outputs differ.
        """
        for arrays, wanted in self.batches:
            apart = difference(run(arrays), wanted)
            size = len(next(iter(arrays.values())))
            assert apart <= self.tolerance, (*about, size, apart)

    def check_engine(self):
        """Runs it on all kinds of code, with all numbers of threads.

        TensorFlow's part of the computation is traced once.
        """
        engines = []
        in_parts = as_function(
            self.imported,
            in_numpy(self.imported, lambda i, arrays: engines[i].run(arrays)),
        )

        def run(arrays):
            if self.imported.network is None:
                return in_parts(arrays)
            return engines[0](**arrays)

        for kind in KINDS:
            for threads in THREADS:
                with contextlib.ExitStack() as stack:
                    name = stack.enter_context(kind_of_code(kind))
                    engines[:] = [
                        stack.enter_context(loaded(data, threads=threads))
                        for data in self.files
                    ]
                    # Unsupported instruction sets are replaced by others.
                    if all(e.instruction_set == name for e in engines):
                        self.check(run, kind, threads)


def of_kind(kind):
    """Returns a model of a kind with random weights, and its options."""
    model = kinds.KINDS[kind]()
    draw_weights(model, np.random.default_rng(0))
    return Case(model, **kinds.OPTIONS.get(kind, {}))


@every_kind
def test_models_of_every_kind(kind):
    case = of_kind(kind)
    assert case.files
    case.check_engine()


# Code that changes what it reads, or does not read arrays, cannot be a network.
# Keras does not trace rematerialised layers with `training=`.
HARD = sorted(
    hard_kinds.KINDS.keys()
    - {
        *hard_kinds.ON_SPARSE,
        "stateful LSTM",
        "RematScope, keras.remat of layers",
    }
)


@pytest.mark.slow_but("SpectralNormalization", "vectorized_map", "cond")
@pytest.mark.parametrize("kind", HARD)
def test_models_that_read_kernels_unusually(kind):
    model = hard_kinds.KINDS[kind]()
    draw_weights(model, np.random.default_rng(0))
    case = Case(model, 0.8)
    assert case.files
    case.check_engine()


@pytest.mark.filterwarnings("ignore:At density.*no connection:UserWarning")
@pytest.mark.slow_but(*map(str, SEEDS[:8]))
@pytest.mark.parametrize("seed", SEEDS)
def test_random_models(seed, pytestconfig):
    if seed >= 15 and not pytestconfig.getoption("every_combination"):
        pytest.skip("with --every-combination")
    keras.utils.set_random_seed(seed)  # the same weights each time
    draw = np.random.default_rng(seed)
    case = Case(
        random_model(seed),
        draw.choice([0.1, 0.3, 0.7]),
        distribution=draw.choice(["uniform", "erk"]),
        seed=seed,
    )
    assert case.imported.network is not None, case.imported.unknown
    case.check_engine()


def test_a_nan_is_the_largest():
    """A maximum over an image is NaN if any pixel is, as in Keras."""
    inputs = keras.Input((5, 21, 3), name="x")
    outputs = keras.layers.GlobalMaxPooling2D()(inputs)
    model = keras.Model(inputs, outputs)
    network = import_model(model, signature_of(model)).network
    x = np.random.default_rng(0).standard_normal((40, 5, 21, 3)).astype("f")
    for i in range(0, 40, 2):
        x[i, i % 5, i % 21, i % 3] = np.nan
    for kind in KINDS:
        with kind_of_code(kind), loaded(to_bytes(network)) as engine:
            for n in (1, 3, 40):
                np.testing.assert_array_equal(
                    engine(x[:n])["output_0"], x[:n].max((1, 2))
                )


PARTLY = ("MultiHeadAttention, EinsumDense", "Conv2DTranspose", "Embedding")


@pytest.mark.slow_but("Functional", "Embedding")
@every_kind
def test_operations_of_every_kind(kind, tmp_path):
    """Networks run as operations of a graph, as in `sparse_saved_model`."""
    if library.load() is None:
        pytest.skip(f"no op library: {library.unavailable()}")
    case = of_kind(kind)
    segments = case.imported.segments
    assert (case.imported.network is None) == (kind in PARTLY)
    paths = []
    for i, segment in enumerate(segments):
        paths.append(tmp_path / f"{i}.rigl")
        paths[i].write_bytes(to_bytes(segment.network))
    for threads in THREADS:

        def run(number, tensors, threads=threads):
            return run_network(
                str(paths[number]),
                tensors,
                checksum=checksum_of(paths[number].read_bytes()),
                shapes=output_shapes(segments[number].network),
                threads=threads,
            )

        case.check(as_function(case.imported, run), threads)
