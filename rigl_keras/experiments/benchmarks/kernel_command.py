"""Measures sparse kernels: layer by layer, in training, at inference.

    bin/benchmark kernels      each layer of a network, dense and sparse
    bin/benchmark train        training steps, dense and with RigL
    bin/benchmark inference    calls of the whole network

All sides take turns in one process, and medians are compared. With --output, a
table and a figure are written.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from rigl_keras import _extras, _figure_style, kernels
from rigl_keras.experiments import exits
from rigl_keras.experiments.benchmarks.inference_speed import measure_inference
from rigl_keras.experiments.benchmarks.kernel_comparison import UPDATE, check
from rigl_keras.experiments.benchmarks.layer_speed import measure_layers
from rigl_keras.experiments.benchmarks.networks import MODELS, NETWORKS
from rigl_keras.experiments.benchmarks.speed_tables import lines_of, write_csv
from rigl_keras.experiments.benchmarks.train_speed import measure_training
from rigl_keras.experiments.progress_bar import say

__all__ = ["prepared_folder", "run"]

# The fields that a figure has as rows, as columns and as lines.
_FIGURES = {
    "kernels": {"rows": "size", "columns": "side", "label": "layer"},
    "train": {"rows": "model", "columns": "distribution", "label": "side"},
    "inference": {
        "rows": "distribution",
        "columns": "batch_size",
        "label": "side",
    },
}
_MEASURES = {
    "kernels": measure_layers,
    "train": measure_training,
    "inference": measure_inference,
}


def run(
    part: str,
    given: Mapping[str, Any],
    output: Any,
    argv: Sequence[str],
) -> None:
    """Runs a part after its flags have been parsed.

    Args:
        part: One of `benchmark_flags.KERNEL_PARTS`.
        given: Its flags by name.
        output: The flag of the folder to write to.
        argv: The command line without flags.
    """
    from absl import logging

    logging.set_verbosity(logging.WARNING)
    # TensorFlow warns of graphs made in a loop, as they are here.
    tf.get_logger().setLevel("ERROR")
    # For PyTorch, which is imported later: threads that wait actively would
    # slow down TensorFlow's (see `benchmark_inference`).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    exits.check_flags_alone(argv)
    values = {name: flag.value for name, flag in given.items()}
    for name, kind in (("densities", float), ("batch_sizes", int)):
        if name in values:
            values[name] = exits.numbers(name, values[name], kind)
    check(
        values["model"],
        values["densities"],
        values["rounds"],
        values.get("distributions", ("uniform",)),
        batch_sizes=values.get("batch_sizes") or [values["batch_size"]],
        networks=MODELS if part == "inference" else NETWORKS,
    )
    folder = output.value and prepared_folder(output.value)
    why = _why_no_kernels() if part == "kernels" else None
    if why:
        raise exits.FailedError(
            f"There are no sparse kernels to measure: {why}."
        )
    table = folder and folder / f"{part}.csv"
    keep = table and functools.partial(write_csv, path=table)
    measured = _MEASURES[part](**values, say=say, keep=keep)
    if folder:
        for path in (table, _drawn(part, measured, folder)):
            say(f"Written: {path}")


def prepared_folder(output: str) -> Path:
    """Creates the output folder, after a check that figures can be drawn.

    Args:
        output: Value of the flag.

    Returns:
        The folder.

    Raises:
        ValueError: The folder cannot be created.
        MissingPackageError: matplotlib is missing.
    """
    _extras.check_installed(
        f"The figure in --output={output}",
        "matplotlib",
        instead="Or leave --output out.",
    )
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            "--output must be a folder, or one that can be created. Received: "
            f"{output!r} ({error.strerror})."
        ) from error
    return Path(output)


def _why_no_kernels():
    """Returns why there are no sparse kernels, or None."""
    try:
        kernels.build()  # raises, where `load` would only warn
    except kernels.BuildError as error:
        return str(error).rstrip(".")
    kernels.load()
    return kernels.unavailable()


def _drawn(part, measured, folder):
    """Draws the figure of some measurements, and returns its path."""
    from rigl_keras.experiments.benchmarks import speed_figures

    first = measured[0]
    batch = "" if part == "inference" else f", batch {first.batch_size}"
    title = {
        "kernels": f"Sparse kernels of {first.model}",
        "train": f"Training steps with sparse kernels, {first.model}",
        "inference": f"Inference with sparse kernels, {first.model}",
    }[part]
    figure = speed_figures.speed_ups(
        [line for line in lines_of(measured) if line.first.side != UPDATE],
        title=f"{title}: {first.processor}, {first.machine}{batch}",
        **_FIGURES[part],
    )
    image = folder / f"{part}.png"
    _figure_style.save(figure, image)
    return image
