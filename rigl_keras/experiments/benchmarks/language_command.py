"""What sparsity saves and costs in a language model.

    bin/benchmark language                     a training step of the GPT of
                                               gin/rigl_gpt.gin, some minutes
    bin/benchmark language --torch             and one of PyTorch
    bin/benchmark language --output=language   writes language/steps.csv, .png
    bin/benchmark language --runs=A,B          no times: loss over steps of the
                                               runs in these directories, as
                                               losses.csv and .png in --output

All sides of a step take turns in one process, so that whatever else the machine
does falls on all of them.
"""

import functools
import os

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

__all__ = ["define_command"]

_SIZES = {
    "batch_size": (8, "Windows of text in a step."),
    "context": (256, "Characters in a window."),
    "layers": (12, "Blocks of the network."),
    "width": (512, "Width of the network."),
    "heads": (8, "Heads of attention."),
    "rounds": (5, "Timed turns of each side."),
}


def define_command():
    """Defines the flags, and returns what to run with the arguments."""
    from absl import flags

    given = {
        name: flags.DEFINE_integer(name, default, said)
        for name, (default, said) in _SIZES.items()
    }
    given["densities"] = flags.DEFINE_list(
        "densities", "0.1,0.05", "Fractions of the masked weights kept."
    )
    given["products"] = flags.DEFINE_list(
        "products", "auto", "Of auto, sparse and dense, each measured."
    )
    given["updates"] = flags.DEFINE_bool(
        "updates", True, "Measure steps that are mask updates, too."
    )
    given["torch"] = flags.DEFINE_bool(
        "torch", False, "Measure a step of PyTorch, too."
    )
    runs = flags.DEFINE_list(
        "runs", [], "Directories of runs; their losses are written, no times."
    )
    output = flags.DEFINE_string("output", None, "Folder for CSV and figure.")
    return functools.partial(_run, given, runs, output)


def _run(given, runs, output, argv):
    from absl import logging

    logging.set_verbosity(logging.WARNING)
    # TensorFlow warns of graphs that are made in a loop, as they are here.
    tf.get_logger().setLevel("ERROR")
    # Read when PyTorch is imported, which is later: its threads would slow
    # down TensorFlow's, while they wait (`benchmark_inference`).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    exits.check_flags_alone(argv)
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
    """Writes a table and its figure, and says so."""
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
