"""Compares formats and runtimes for a sparse network at inference.

    bin/benchmark_inference                      everything, ten minutes or more
    bin/benchmark_inference --models=wide_resnet --batches=1

TensorFlow, LiteRT (TFLite) and PyTorch compute dense products, even if a
kernel is stored sparse: zeros save space, but no time. The compact side may be
faster because it computes less: batch norms are folded into convolutions, and
units that sparsity has disconnected are removed. Kernels that skip zeros
should be compared with it.

All sides compute the same function, which is checked before they are timed.
They take and return NumPy arrays. They take turns in one process, in a new
random order each round, so other work on the machine affects all of them;
medians are compared. Each runtime uses all cores. Its threads wait actively
for some milliseconds after a call, which slows down the next side. Therefore a
turn has many calls if a call is short, and PyTorch's threads wait passively
(OMP_WAIT_POLICY, unless you set it). If other programs use the cores, active
waiting makes PyTorch up to a hundred times slower.
"""

import functools
import os
import sys

from absl import app, flags
from absl import logging as absl_logging

from rigl_keras.experiments import exits

__all__ = ["main"]


def main() -> None:
    """Prints and draws the comparison that the command line asks for."""
    models = flags.DEFINE_list(
        "models", ["wide_resnet", "resnet50"], "Networks to measure."
    )
    densities = flags.DEFINE_list(
        "densities", ["0.05", "0.1", "0.2"], "Fractions of the weights kept."
    )
    batches = flags.DEFINE_list("batches", ["1", "128"], "Examples in a call.")
    rounds = flags.DEFINE_integer("rounds", 15, "Turns of a side, at most.")
    seconds = flags.DEFINE_float(
        "seconds", 20.0, "Time for one network, density and batch."
    )
    figure = flags.DEFINE_string(
        "figure", "inference.png", "Image to draw; empty: none."
    )
    json_path = flags.DEFINE_string("json", None, "File for the numbers.")

    def run(argv):
        if len(argv) > 1:
            raise app.UsageError(f"Unexpected: {' '.join(argv[1:])}.")
        import tensorflow as tf

        from rigl_keras.experiments.benchmarks.inference_command import compare
        from rigl_keras.experiments.benchmarks.runtime_tables import (
            check_paths,
            draw,
        )

        # TensorFlow logs each SavedModel that it writes.
        absl_logging.set_verbosity(absl_logging.WARNING)
        tf.get_logger().setLevel("WARNING")
        # For PyTorch, which is imported later: see --help.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        check_paths(figure.value, json_path.value)
        comparison = compare(
            models.value,
            exits.numbers("densities", densities.value, float),
            exits.numbers("batches", batches.value, int),
            rounds=rounds.value,
            seconds=seconds.value,
            progress=functools.partial(print, file=sys.stderr, flush=True),
        )
        print(comparison, flush=True)  # before writing, which may fail
        if json_path.value:
            comparison.save(json_path.value)
        if figure.value:
            draw(comparison, figure.value)
            print(f"Figure: {figure.value}")

    exits.run_command("benchmark_inference", run, about=__doc__)


if __name__ == "__main__":
    main()
