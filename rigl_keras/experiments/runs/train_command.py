"""Trains one network.

    bin/train                                      a minute, on digits
    bin/train --gin_file=gin/rigl_erk_wrn.gin      a row of the report
    bin/train --gin_file=gin/rigl_gpt.gin --density=0.05 --seed=1
    bin/train --run_dir=runs/quickstart --resume   continues a run

Gin files, in the folder gin/, say what to train. The run writes its weights,
metrics.csv and result.json to its folder, by default in runs/.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import app, flags
from absl import logging as absl_logging

from rigl_keras._files import DiskFullError
from rigl_keras.experiments import exits
from rigl_keras.experiments.protocol import variations

if TYPE_CHECKING:
    import keras

    from rigl_keras.experiments.runs import trackers

# Modules that need TensorFlow are imported where they are used, so that
# --help is fast.

__all__ = ["configure", "main", "run", "table"]

_FLAGS = flags.FLAGS


def _define_flags():
    flags.DEFINE_multi_string("gin_file", [], "Gin file of the run.")
    flags.DEFINE_multi_string(
        "gin_bindings", [], "Binding such as 'train.epochs = 2'."
    )
    flags.DEFINE_string(
        "run_dir", None, "Folder of the run. Default: runs/ and its name."
    )
    flags.DEFINE_integer("seed", None, "Seed of the run, over train.seed.")
    flags.DEFINE_float(
        "density",
        None,
        "Fraction of weights kept, over DENSITY in the gin file or, if that "
        "does not define it, over train.density.",
    )
    flags.DEFINE_string(
        "data_dir", None, "Folder of prepared data sets, over TFDS_DATA_DIR."
    )
    flags.DEFINE_bool("resume", False, "Continue an interrupted run.")
    flags.DEFINE_string(
        "strategy",
        "one",
        "Devices to train on: one, mirrored, multi_worker or tpu. The batch "
        "size is that of all devices together. tpu has never been tested.",
    )
    flags.DEFINE_enum(
        "tracker",
        None,
        ["mlflow", "wandb"],
        "Log the run to MLflow or Weights & Biases, which must be installed.",
    )
    flags.DEFINE_bool(
        "traceback", False, "Also show where an error was raised."
    )
    flags.DEFINE_integer(
        "parent",
        None,
        "End when the parent process, with this number, ends.",
    )


def configure(
    gin_files: Sequence[str] = (),
    *,
    bindings: Sequence[str] = (),
    seed: int | None = None,
    density: float | None = None,
) -> None:
    """Configures gin for one run.

    Args:
        gin_files: Paths of gin files, later ones over earlier ones.
        bindings: gin bindings, over the files.
        seed: Seed, over the files.
        density: Density, over the files.

    Raises:
        ValueError: The configuration is wrong.
    """
    from rigl_keras.experiments.runs import config

    bindings = list(bindings)
    if seed is not None:
        bindings.append(f"train.seed = {seed}")
    config.parse(gin_files, bindings)
    if density is not None:
        # Pruning starts dense; in its gin files DENSITY is the final density.
        name = "DENSITY" if config.has_macro("DENSITY") else "train.density"
        config.parse(gin_files, [*bindings, f"{name} = {density!r}"])


def run(
    gin_files: Sequence[str] = (),
    *,
    bindings: Sequence[str] = (),
    run_dir: str | os.PathLike | None = None,
    seed: int | None = None,
    density: float | None = None,
    data_dir: str | None = None,
    resume: bool = False,
    strategy: str = "one",
    tracker: trackers.Tracker | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> dict:
    """Runs one configuration and returns its result.

    Args:
        gin_files: Paths of gin files. Empty: `gin/quickstart.gin`.
        bindings: gin bindings, over the files.
        run_dir: Folder of the run. None: `runs/`, then the file's name,
            density and seed.
        seed: Seed, over the files.
        density: Density, over the files.
        data_dir: Folder of prepared data sets.
        resume: Whether to continue an interrupted run.
        strategy: Devices to train on, one of `devices.STRATEGIES`.
        tracker: The tracker to log to, or None.
        callbacks: As in `train.train`.

    Returns:
        What `train.train` returns.

    Raises:
        ValueError: The configuration is wrong, the directory holds another
            one, or the devices do not exist.
    """
    import gin
    from rigl_keras.experiments.runs import (
        config,
        devices,
        run_directory,
        trackers,
    )

    gin_files = list(gin_files) or [
        str(variations.GIN_FOLDER / "quickstart.gin")
    ]
    configure(gin_files, bindings=bindings, seed=seed, density=density)
    exports = config.configured()["Exports"]()
    trained = gin.get_bindings("train")
    if exports.formats and (
        trained.get("density", 0) is None or trained.get("small_dense")
    ):
        raise ValueError(
            "Exports.formats exports sparse models, and this run is dense. "
            "Leave it out; a dense model is exported by Keras's model.export."
        )
    if run_dir is None:
        parts = [config.find(gin_files[-1]).stem]
        parts += [f"density{density}"] if density is not None else []
        parts += [f"seed{seed}"] if seed is not None else []
        run_dir = "runs/" + "-".join(parts)
    with run_directory.RunDirectory(
        run_dir,
        config=gin.config_str(),
        resume=resume,
        writes=devices.is_chief(strategy),
    ) as directory:
        if tracker is None or not directory.writes:
            return _run(directory, exports, data_dir, strategy, callbacks)
        tracking = trackers.Tracking(tracker, directory, config.settings())
        try:
            result = _run(
                directory, exports, data_dir, strategy, [tracking, *callbacks]
            )
            tracking.finish(result)
            return result
        finally:
            tracking.leave()


def _run(directory, exports, data_dir, strategy, callbacks):
    """Runs the configuration in a directory that this process has locked."""
    import gin
    from rigl_keras.experiments.runs import config, devices

    print(f"Run directory: {directory.path}")
    # Workers meet here, after each has checked the directory.
    with devices.make_strategy(strategy).scope():
        if strategy != "one":
            print(f"Strategy {strategy}: {devices.replica_count()} replicas.")
        result = config.configured()["train"](
            directory,
            data_dir=data_dir,
            operative_config=gin.operative_config_str,
            callbacks=callbacks,
        )
    # Outside of the strategy's scope, from the saved model.
    if directory.writes:
        try:
            exports.write(directory.path, data_dir=data_dir, keep=True)
        except (ValueError, DiskFullError):
            print(f"\n{table(result)}\n")  # the run itself is finished
            raise
    return result


def table(result: dict) -> str:
    """Returns the result of a run as a table for the terminal."""
    rows = [
        ("method", f"{result['method']}, {result['model']}"),
        ("data", f"{result['dataset']}, seed {result['seed']}"),
        ("test accuracy", f"{100 * result['test_accuracy']:.2f} %"),
        ("validation accuracy", _percent(result["validation_accuracy"])),
        *_of_text(result),
        ("density of masked weights", f"{result['density']:.4f}"),
        (
            "parameters",
            f"{result['nonzeros']:,} of {result['parameters']:,} "
            f"({result['nonzeros'] / result['parameters']:.3f}x dense)",
        ),
        (
            "inference FLOPs",
            f"{result['inference_flops']:,.0f} "
            f"({result['inference_flops_ratio']:.3f}x dense)",
        ),
        (
            "training FLOPs",
            f"{result['training_flops']:.3e} "
            f"({result['training_flops_ratio']:.3f}x dense)",
        ),
        ("steps", f"{result['steps']:,}, {result['seconds']:.0f} s"),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in rows)


def _of_text(result):
    """Returns the rows of the table that only texts have."""
    return [
        (
            f"{split} loss",
            f"{result[f'{split}_loss']:.4f} nats, "
            f"{result[f'{split}_bits_per_character']:.4f} bits per character, "
            f"perplexity {result[f'{split}_perplexity']:.3f}",
        )
        for split in ("test", "validation")
        if result.get(f"{split}_bits_per_character") is not None
    ]


def _percent(fraction):
    return (
        "no examples held out"
        if fraction is None
        else f"{100 * fraction:.2f} %"
    )


def _end_with(parent):
    """Ends this process as soon as its parent process has ended.

    A killed parent must not leave a run behind, on cores that other runs then
    use too. A run may end at any point.
    """

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    import tensorflow as tf

    from rigl_keras.experiments.runs import devices, stopping, trackers

    if _FLAGS.parent is not None:
        _end_with(_FLAGS.parent)
    # TensorFlow logs each checkpoint it writes.
    absl_logging.set_verbosity(absl_logging.WARNING)
    # It also logs each sum over replicas.
    tf.get_logger().setLevel(logging.WARNING)
    # Two runs of one seed are then the same; on a CPU this costs little.
    tf.config.experimental.enable_op_determinism()
    try:
        result = run(
            _FLAGS.gin_file,
            bindings=_FLAGS.gin_bindings,
            run_dir=_FLAGS.run_dir,
            seed=_FLAGS.seed,
            density=_FLAGS.density,
            data_dir=_FLAGS.data_dir,
            resume=_FLAGS.resume,
            strategy=_FLAGS.strategy,
            tracker=_FLAGS.tracker and trackers.TRACKERS[_FLAGS.tracker](),
            callbacks=[stopping.StopAtSignal()],
        )
    except tf.errors.OpError as error:
        lost = None
        if _FLAGS.strategy == "multi_worker":
            lost = devices.lost_workers(error)
        if not lost:
            raise
        raise exits.FailedError(
            f"{', '.join(lost)} stopped answering, and the other workers "
            "cannot continue. Start all of them again, each with --resume."
        ) from error
    print(f"\n{table(result)}")


def main() -> None:
    """Reads the command line and runs it."""
    _define_flags()
    exits.run_command(
        "train",
        _main,
        about=__doc__,
        interrupted="continue with",
        added=["--resume"],
        traceback=lambda: _FLAGS.traceback,
    )


if __name__ == "__main__":
    main()
