"""Exports a finished run or a saved model.

    bin/export runs/quickstart                  a SavedModel in its exported/
    bin/export runs/quickstart --formats=tflite --quantization=int8
    bin/export model.keras --output=served --formats=saved_model,onnx \\
        --fold_batch_norm --remove_dead_units
    bin/export model.keras --formats=native --batch_sizes=1,16
    bin/export --check=served/saved_model       checks that files are intact
"""

from absl import app, flags, logging

from rigl_keras.experiments import exits

# Modules that need TensorFlow are imported where they are used, so that
# --help is fast.

__all__ = ["main"]


def _define_flags():
    flags.DEFINE_list(
        "formats",
        ["saved_model"],
        "Formats: any of saved_model, sparse_saved_model, native, tflite, onnx "
        "and keras.",
    )
    flags.DEFINE_string(
        "output",
        None,
        "Folder of the exports, with a folder for each format. Default: "
        "exported/ in the run's directory, or beside the file.",
    )
    flags.DEFINE_bool(
        "fold_batch_norm",
        False,
        "Fold batch norms into the layers before them.",
    )
    flags.DEFINE_bool(
        "remove_dead_units",
        False,
        "Remove units without a connection to the input or the output.",
    )
    flags.DEFINE_enum(
        "quantization", None, ["float16", "int8"], "Quantization of tflite."
    )
    flags.DEFINE_string(
        "inputs",
        None,
        "An .npy or .npz file of examples, for the comparison with the model "
        "and for the calibration of int8.",
    )
    flags.DEFINE_string(
        "data_dir", None, "Folder of prepared data sets, over TFDS_DATA_DIR."
    )
    flags.DEFINE_list(
        "batch_sizes",
        ["1", "32", "128"],
        "Batch sizes whose latency is measured, and for which native and "
        "sparse_saved_model choose the fastest products. Other sizes can be "
        "served, too.",
    )
    flags.DEFINE_bool(
        "measure",
        True,
        "Measure size, loading time and latency against the dense model.",
    )
    flags.DEFINE_bool("overwrite", False, "Replace existing exports.")
    flags.DEFINE_string(
        "check", None, "Check that this export is intact, and export nothing."
    )


def _run(argv):
    # TensorFlow logs each SavedModel it writes.
    logging.set_verbosity(logging.WARNING)
    if flags.FLAGS.check is not None:
        _check(argv)
    else:
        _export(argv)


def _check(argv):
    """Says whether an export is intact."""
    import rigl_keras

    if len(argv) > 1:
        raise app.UsageError(
            f"--check exports nothing. Received with it: {' '.join(argv[1:])}."
        )
    print(rigl_keras.check_export(flags.FLAGS.check))
    print("All files are as they were written.")


def _export(argv):
    """Exports what the command line names."""
    from rigl_keras.experiments.runs.exports import Exports

    given = flags.FLAGS
    if len(argv) != 2:
        raise app.UsageError(
            "Pass one run directory or .keras file. Received: "
            f"{' '.join(argv[1:]) or 'none'}."
        )
    if not given.formats:
        raise app.UsageError("Pass at least one format.")
    if given["batch_sizes"].present and not given.measure:
        raise app.UsageError(
            "--batch_sizes says what to measure, and --nomeasure turns "
            "measuring off. Pass one of them."
        )
    Exports(
        formats=given.formats,
        fold_batch_norm=given.fold_batch_norm,
        remove_dead_units=given.remove_dead_units,
        quantization=given.quantization,
        batch_sizes=exits.numbers("batch_sizes", given.batch_sizes, int),
        measure=given.measure,
    ).write(
        argv[1],
        given.output,
        inputs=given.inputs,
        data_dir=given.data_dir,
        overwrite=given.overwrite,
    )


def main() -> None:
    """Reads the command line and exports."""
    _define_flags()
    exits.run_command(
        "export",
        _run,
        about=__doc__,
        interrupted="nothing is half-written; start again with",
    )


if __name__ == "__main__":
    main()
