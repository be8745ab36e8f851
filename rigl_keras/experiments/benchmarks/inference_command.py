"""Compares formats and runtimes of networks at inference."""

import functools
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras import _checks, _keras
from rigl_keras._timing import interleaved, rounds_within
from rigl_keras.compaction.dead_units import remove_dead_units
from rigl_keras.compaction.folding import fold_batch_norm
from rigl_keras.experiments.benchmarks import torch_network
from rigl_keras.experiments.benchmarks.networks import MODELS
from rigl_keras.experiments.benchmarks.runtime_tables import (
    COMPACT,
    DENSE,
    SPARSE,
    TFLITE_DENSE,
    TFLITE_SPARSE,
    TORCH,
    Comparison,
    Measurement,
)
from rigl_keras.exporting import signatures
from rigl_keras.exporting.base_format import WriteOptions
from rigl_keras.exporting.export_report import size_of
from rigl_keras.exporting.formats import FORMATS

__all__ = [
    "check_densities",
    "check_each_once",
    "compare",
    "outputs_in_parts",
    "set_batch_norms",
    "sparse_network",
]

_TOLERANCE = 1e-4  # difference of outputs, in units of the largest
_TURN = 0.1  # the least seconds of a turn
_PART = 16  # examples in a call of the Keras model
_FEWEST = 3  # rounds for a median


def compare(
    models: Sequence[str] = tuple(MODELS),
    densities: Sequence[float] = (0.05, 0.1, 0.2),
    batches: Sequence[int] = (1, 128),
    *,
    rounds: int = 15,
    seconds: float = 20.0,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measures all sides on some networks.

    Args:
        models: Names from `MODELS`.
        densities: Fractions of the weights kept, each in (0, 1].
        batches: Examples in a call, each at least 1.
        rounds: Turns of each side, at most.
        seconds: Time for the turns of one network, density and batch. If more
            than 3 rounds do not fit into it, there are 3.
        progress: Called with a line about the progress.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: An argument is out of range, or a side disagrees with the
            Keras model.

    Example:

    >>> print(compare(["wide_resnet"], [0.1], [1]))
    """
    _check(models, densities, batches, rounds, seconds)
    measurements, notes = [], []
    if not torch_network.is_installed():
        notes.append(
            f"PyTorch is not installed and not measured: "
            f"{torch_network.INSTALL}"
        )
        progress(notes[-1])
    for name in models:
        for density in densities:
            progress(f"{name} at density {density:g}: writing all formats")
            network = sparse_network(name, density)
            with tempfile.TemporaryDirectory() as folder:
                sides, sizes, note = _sides(network, Path(folder))
                notes.append(f"{name} at density {density:g}: {note}")
                for batch in batches:
                    progress(f"{name} at density {density:g}, batch {batch}")
                    taken, differences, turns = _measured(
                        network, sides, batch, rounds, seconds
                    )
                    measurements += [
                        Measurement(
                            model=name,
                            density=density,
                            batch=batch,
                            side=side,
                            seconds=taken[side],
                            bytes=sizes.get(side),
                            difference=differences[side],
                            rounds=turns,
                        )
                        for side in sides
                    ]
    return Comparison(tuple(measurements), tuple(notes), _environment())


def sparse_network(name: str, density: float) -> keras.Model:
    """Returns a sparse network with values like those of a trained one.

    It has ERK masks and the batch norms of `set_batch_norms`.

    Args:
        name: One of `MODELS`.
        density: Fraction of the weights kept.

    Returns:
        A plain model, whose kernels are zero outside the masks.
    """
    keras.utils.set_random_seed(0)
    model = rigl_keras.strip(rigl_keras.sparsify(MODELS[name](), density))
    set_batch_norms(model)
    return model


def set_batch_norms(model: keras.Model) -> None:
    """Sets batch norms to values like those of a trained network.

    Gamma is drawn from U(0.5, 1.5) and beta from N(0, 0.1^2), so that no gamma
    is 0, as with `zero_init_residual`. The statistics are those of a random
    batch.

    Args:
        model: A built model. Its batch norms are changed.
    """
    random = np.random.default_rng(0)
    norms = [
        layer
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        size = norm.gamma.shape
        norm.gamma.assign(random.uniform(0.5, 1.5, size))
        norm.beta.assign(random.normal(0, 0.1, size))
        norm.momentum = 0.0  # one batch sets the statistics
    signature = signatures.signature_of(model)
    model(signature.pack(signature.random(_PART)), training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def check_each_once(lists: Mapping[str, Sequence]) -> None:
    """Raises ValueError unless each list has items, and each item once.

    Args:
        lists: The lists, `{name: list}`.
    """
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"{name} must have at least one item, and each once. "
                f"Received: {list(values)}."
            )


def check_densities(densities: Sequence[float]) -> None:
    """Raises ValueError unless all are fractions of weights, above 0."""
    for density in densities:
        _checks.number(
            "densities",
            density,
            above=0,
            at_most=1,
            rule="must be fractions of the weights kept, in (0, 1]",
        )


def _check(models, densities, batches, rounds, seconds):
    check_each_once(
        {"models": models, "densities": densities, "batches": batches}
    )
    for name in models:
        _checks.choice("models", name, tuple(MODELS))
    check_densities(densities)
    for batch in batches:
        _checks.integer("batches", batch, at_least=1)
    _checks.integer("rounds", rounds, at_least=1)
    _checks.number("seconds", seconds, above=0, rule="must be above 0")


def _sides(network, folder):
    """Returns `{side: runner}`, `{side: bytes}` and a note on compaction."""
    signature = signatures.signature_of(network)
    small, folding = fold_batch_norm(network)
    small, removal = remove_dead_units(small)
    norms = len(folding.folded) + len(folding.kept)
    note = (
        f"compact, {len(folding.folded)} of {norms} batch norms are folded "
        f"and {removal.parameters_after / removal.parameters_before:.1%} of "
        "the weights left, zeros included."
    )
    runners, sizes = {}, {}
    for side, model, format, sparse in (
        (DENSE, network, "saved_model", False),
        (SPARSE, network, "saved_model", True),
        (COMPACT, small, "saved_model", True),
        (TFLITE_DENSE, network, "tflite", False),
        (TFLITE_SPARSE, network, "tflite", True),
    ):
        path = folder / side
        path.mkdir()
        written = FORMATS[format]
        written.write(model, signature, path, WriteOptions(sparse=sparse))
        sizes[side] = size_of(path)
        runners[side] = written.load(path, signature, ["output_0"])
    if torch_network.is_installed():
        runners[TORCH] = _torch_runner(network)
    return runners, sizes, note


def _torch_runner(network):
    """Returns PyTorch's network, with the signature of the other sides."""
    compute = torch_network.torch_network(network)

    def run(arrays):
        (array,) = arrays.values()
        return {"output_0": compute(array)}

    return run


def _measured(network, sides, batch, rounds, seconds):
    """Returns the seconds and difference of each side, and the rounds."""
    signature = signatures.signature_of(network)
    arrays = signature.random(batch)
    wanted = outputs_in_parts(network, signature, arrays)
    differences = {
        side: _difference(side, run(arrays)["output_0"], wanted)
        for side, run in sides.items()
    }
    calls = {
        side: functools.partial(run, arrays) for side, run in sides.items()
    }
    rounds = rounds_within(
        seconds,
        calls,
        turn=_TURN,
        at_least=min(_FEWEST, rounds),
        at_most=rounds,
    )
    taken = interleaved(calls, rounds=rounds, turn=_TURN)
    return taken, differences, rounds


def outputs_in_parts(
    network: keras.Model,
    signature: signatures.Signature,
    arrays: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Returns the outputs of a Keras model, computed in small batches.

    Small batches save memory: an eager call keeps the outputs of all layers.

    Args:
        network: A model with one input and one output.
        signature: The signature of the model.
        arrays: The input, by name.
    """
    (name,), (array,) = arrays.keys(), arrays.values()
    return np.concatenate(
        [
            signatures.outputs_of(network, signature, {name: part})["output_0"]
            for part in np.split(array, range(_PART, len(array), _PART))
        ]
    )


def _difference(side, got, wanted):
    """Returns the difference of outputs; raises ValueError if it is large."""
    largest = np.abs(wanted).max()
    difference = float(np.abs(got - wanted).max() / largest)
    if not difference <= _TOLERANCE:  # true for NaN, too
        raise ValueError(
            f"{side} disagrees with the Keras model: outputs differ by "
            f"{difference:.1e} of the largest, but rounding explains at most "
            f"{_TOLERANCE:.0e}. This is a defect of the runtime or of this "
            "benchmark."
        )
    return difference


def _environment():
    cores = os.cpu_count()
    chosen = tf.config.threading.get_intra_op_parallelism_threads()
    threads = {"TensorFlow": chosen or cores, "TFLite": cores}
    packages = ["tensorflow", "keras", "numpy"]
    if torch_network.is_installed():
        torch = importlib.import_module("torch")
        threads[TORCH] = torch.get_num_threads()
        packages.append("torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "cores": cores,
        "machine": platform.machine(),
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "versions": {"python": platform.python_version(), **versions},
    }
