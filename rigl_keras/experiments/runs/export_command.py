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

__all__ = ["main"]


def main() -> None:
    """Reads the command line and exports."""
    wanted = flags.DEFINE_list(
        "formats",
        ["saved_model"],
        "Formats: any of saved_model, sparse_saved_model, native, tflite, onnx "
        "and keras.",
    )
    output = flags.DEFINE_string(
        "output",
        None,
        "Folder of the exports, with a folder for each format. Default: "
        "exported/ in the run's directory, or beside the file.",
    )
    fold = flags.DEFINE_bool(
        "fold_batch_norm",
        False,
        "Fold batch norms into the layers before them.",
    )
    remove = flags.DEFINE_bool(
        "remove_dead_units",
        False,
        "Remove units without a connection to the input or the output.",
    )
    quantization = flags.DEFINE_enum(
        "quantization", None, ["float16", "int8"], "Quantization of tflite."
    )
    inputs = flags.DEFINE_string(
        "inputs",
        None,
        "An .npy or .npz file of examples, for the comparison with the model "
        "and for the calibration of int8.",
    )
    data_dir = flags.DEFINE_string(
        "data_dir", None, "Folder of prepared data sets, over TFDS_DATA_DIR."
    )
    sizes = flags.DEFINE_list(
        "batch_sizes",
        ["1", "32", "128"],
        "Batch sizes whose latency is measured, and for which native and "
        "sparse_saved_model choose the fastest products. Other sizes can be "
        "served, too.",
    )
    measure = flags.DEFINE_bool(
        "measure",
        True,
        "Measure size, loading time and latency against the dense model.",
    )
    overwrite = flags.DEFINE_bool(
        "overwrite", False, "Replace existing exports."
    )
    check = flags.DEFINE_string(
        "check", None, "Check that this export is intact, and export nothing."
    )

    def run(argv):
        import rigl_keras
        from rigl_keras.experiments.runs.exports import Exports

        # TensorFlow logs each SavedModel it writes.
        logging.set_verbosity(logging.WARNING)
        if check.value is not None:
            if len(argv) > 1:
                raise app.UsageError(
                    "--check exports nothing. Received with it: "
                    f"{' '.join(argv[1:])}."
                )
            print(rigl_keras.check_export(check.value))
            print("All files are as they were written.")
            return
        if len(argv) != 2:
            raise app.UsageError(
                "Pass one run directory or .keras file. Received: "
                f"{' '.join(argv[1:]) or 'none'}."
            )
        if not wanted.value:
            raise app.UsageError("Pass at least one format.")
        if sizes.present and not measure.value:
            raise app.UsageError(
                "--batch_sizes says what to measure, and --nomeasure turns "
                "measuring off. Pass one of them."
            )
        Exports(
            formats=wanted.value,
            fold_batch_norm=fold.value,
            remove_dead_units=remove.value,
            quantization=quantization.value,
            batch_sizes=exits.numbers("batch_sizes", sizes.value, int),
            measure=measure.value,
        ).write(
            argv[1],
            output.value,
            inputs=inputs.value,
            data_dir=data_dir.value,
            overwrite=overwrite.value,
        )

    exits.run_command(
        "export",
        run,
        about=__doc__,
        interrupted="nothing is half-written; start again with",
    )


if __name__ == "__main__":
    main()
