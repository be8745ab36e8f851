"""Measures what sparsity costs and saves.

    bin/benchmark                  training step and mask update, half an hour
                                   on 2 cores
    bin/benchmark --part=step      only the training step
    bin/benchmark --part=compiled  the step under XLA, and in blocks of ten
    bin/benchmark --part=update    only the mask update
    bin/benchmark kernels          sparse kernels, layer by layer
    bin/benchmark train            sparse kernels in training
    bin/benchmark inference        sparse kernels at inference
    bin/benchmark plans            memory of sparse kernels, by sizes of images
    bin/benchmark engines          engines that serve sparse networks
    bin/benchmark workers          what two workers send each other
    bin/benchmark updates          time and memory of mask updates without
                                   dense gradients
    bin/benchmark language         a training step of a GPT, and losses of runs

Both sides of a comparison alternate in one process, so other work on the
machine affects both; medians of their times are compared.
"""

import functools
import importlib
import sys

from absl import flags

from rigl_keras.experiments import command_line, exits
from rigl_keras.experiments.benchmarks import benchmark_flags

__all__ = ["main"]

_HOME = "rigl_keras.experiments.benchmarks."
_MODULES = {
    **dict.fromkeys(benchmark_flags.KERNEL_PARTS, "kernel_command"),
    "plans": "plan_memory",
    "engines": "engine_command",
    "workers": "worker_speed",
    "language": "language_command",
    "updates": "update_speed",
}


def _run_part(named, given, output, argv):
    """Runs a part. Its module imports TensorFlow."""
    run = importlib.import_module(_HOME + _MODULES[named]).run
    if named in benchmark_flags.KERNEL_PARTS:
        run = functools.partial(run, named)
    run(given, output, argv)


def main() -> None:
    """Prints the tables that the command line asks for."""
    named = sys.argv[1] if len(sys.argv) > 1 else ""
    if named in _MODULES:
        given, output = benchmark_flags.DEFINE[named](named)
        exits.run_command(
            f"benchmark {named}",
            functools.partial(_run_part, named, given, output),
            about=command_line.about_module(_HOME + _MODULES[named]),
            interrupted="the same command continues after what is measured"
            if named == "engines"
            else "start again with",
            argv=[sys.argv[0], *sys.argv[2:]],
        )
        return
    part = flags.DEFINE_enum(
        "part",
        "all",
        ["all", "step", "compiled", "update", "input"],
        "What to measure.",
    )
    batch_size = flags.DEFINE_integer("batch_size", 128, "Images in a step.")
    rounds = flags.DEFINE_integer("rounds", 15, "Timed steps of each side.")
    data_dir = flags.DEFINE_string("data_dir", None, "Prepared data sets.")

    def run(argv):
        if len(argv) > 1:
            raise ValueError(
                "Name what to measure before all flags, one of "
                f"{', '.join(_MODULES)}, or pass --part. Received: "
                f"{argv[1]!r}."
            )
        from rigl_keras.experiments import data
        from rigl_keras.experiments.benchmarks.input_pipeline import (
            measure_input_pipeline,
        )
        from rigl_keras.experiments.benchmarks.mask_updates import (
            measure_mask_update,
        )
        from rigl_keras.experiments.benchmarks.training_steps import print_steps

        rate = None
        if part.value in ("all", "step"):
            seconds = print_steps("", batch_size.value, rounds.value)
            rate = batch_size.value / seconds["RigL"]
        if part.value in ("all", "compiled"):
            few = max(1, rounds.value // 3)
            for options in (
                {"jit_compile": True},
                {"steps_per_execution": 10},
            ):
                said = ", ".join(f"{k}={v}" for k, v in options.items())
                print_steps(f", {said}", batch_size.value, few, **options)
        if part.value in ("all", "update"):
            seconds = measure_mask_update()
            print("Mask update, all 54 kernels of ResNet-50 (23.7 M weights)")
            for name, label in (
                ("sort", "by full sorts"),
                ("selection", "by selection, as the library does"),
            ):
                print(
                    f"  {label:46}{1e3 * seconds[name]:9.1f} ms"
                    f"{seconds[name] / seconds['sort']:8.3f}x"
                )
        if part.value in ("all", "input"):
            try:
                images = measure_input_pipeline(data_dir=data_dir.value)
            except (ValueError, data.DatasetUnavailableError) as error:
                print(f"Input pipeline not measured: {error}")
                return
            print("Input pipeline, CIFAR-10 with augmentation, batch 128")
            print(f"  {'alone':46}{images:9.0f} images/s")
            if rate:
                print(f"  {'the training step above':46}{rate:9.0f} images/s")

    exits.run_command("benchmark", run, about=__doc__)


if __name__ == "__main__":
    main()
