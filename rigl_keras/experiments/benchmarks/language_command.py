"""Measures what sparsity saves and costs in a language model.

    bin/benchmark language                     a training step of the GPT of
                                               gin/rigl_gpt.gin, some minutes
    bin/benchmark language --torch             and one of PyTorch
    bin/benchmark language --output=language   writes language/steps.csv, .png
    bin/benchmark language --runs=A,B          writes the losses of runs to
                                               losses.csv and .png in --output,
                                               and measures nothing

All sides of a step take turns in one process, so other work on the machine
affects all of them.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from rigl_keras import _figure_style
from rigl_keras.experiments import exits
from rigl_keras.experiments.benchmarks.kernel_command import prepared_folder
from rigl_keras.experiments.benchmarks.language_losses import (
    read_losses,
    write_losses,
)
from rigl_keras.experiments.benchmarks.language_steps import (
    measure_language_steps,
    write_steps,
)

__all__ = ["run"]


def run(given: Mapping[str, Any], output: Any, argv: Sequence[str]) -> None:
    """Runs the command after its flags have been parsed.

    Args:
        given: The flags by name, as `benchmark_flags` defines them.
        output: The flag of the folder to write to, if there is one.
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
    given = dict(given)
    runs = given.pop("runs")
    if runs.value and not output.value:
        raise ValueError("--runs writes a table and a figure: pass --output.")
    folder = prepared_folder(output.value) if output.value else None
    if runs.value:
        _write("losses", read_losses(runs.value), folder)
        return
    values = {name: flag.value for name, flag in given.items()}
    values["densities"] = exits.numbers("densities", values["densities"], float)
    steps = measure_language_steps(**values, say=_say)
    if folder:
        _write("steps", steps, folder)


def _write(name, content, folder):
    """Writes a table and its figure, and prints their paths."""
    from rigl_keras.experiments.benchmarks import language_figures

    write, draw = {
        "steps": (write_steps, language_figures.step_times),
        "losses": (write_losses, language_figures.losses),
    }[name]
    table, image = folder / f"{name}.csv", folder / f"{name}.png"
    write(content, table)
    _figure_style.save(draw(content), image)
    _say(f"Written: {table}, {image}")


def _say(line: str) -> None:
    print(line, flush=True)
