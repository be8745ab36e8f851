"""Exports at the end of a run, or of what a run or `model.save` has written."""

import dataclasses
import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import rigl_keras
from rigl_keras._checks import boolean, choice
from rigl_keras._text import first_line
from rigl_keras.experiments import data
from rigl_keras.experiments.runs.run_directory import EarlierRun
from rigl_keras.exporting import signatures
from rigl_keras.exporting.export_report import ExportReport
from rigl_keras.exporting.formats import (
    FORMATS,
    QUANTIZATIONS,
    check_available,
    formats_with,
)
from rigl_keras.exporting.measurement import BATCH_SIZES, checked_sizes

__all__ = ["Exports", "load_model", "read_inputs"]

_CALIBRATED_ON = 256  # images of the run's training data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exports:
    """What is exported of a trained model, and how.

    Attributes:
        formats: Any of `exporting.formats.FORMATS`; each is written to a
            folder of its name. None: nothing is.
        fold_batch_norm, remove_dead_units: As in `rigl_keras.export`.
        quantization: As there; of the formats that offer it.
        batch_sizes, measure: As there.

    Raises:
        ValueError: A format is unknown, needs what is not installed, or is
            not one that is quantised; or a batch size is out of range.
    """

    formats: Sequence[str] = ()
    fold_batch_norm: bool = False
    remove_dead_units: bool = False
    quantization: str | None = None
    batch_sizes: Sequence[int] = BATCH_SIZES
    measure: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.formats, str):
            raise ValueError(
                "formats is a list, such as ['saved_model']. Received: "
                f"formats={self.formats!r}."
            )
        for format in self.formats:
            choice("formats", format, tuple(FORMATS))
            check_available(format)
        choice("quantization", self.quantization, (None, *QUANTIZATIONS))
        for name in ("fold_batch_norm", "remove_dead_units", "measure"):
            boolean(name, getattr(self, name))
        checked_sizes(self.batch_sizes)
        if self.quantization and not any(map(self._quantizes, self.formats)):
            offered = " or ".join(map(repr, formats_with(self.quantization)))
            raise ValueError(
                f"quantization is of the format {offered}. Received: "
                f"quantization={self.quantization!r} and "
                f"formats={tuple(self.formats)}."
            )

    def write(
        self,
        source: str | os.PathLike,
        output: str | os.PathLike | None = None,
        *,
        inputs: str | os.PathLike | None = None,
        data_dir: str | None = None,
        overwrite: bool = False,
        keep: bool = False,
    ) -> list[ExportReport]:
        """Exports a model, each format in a folder of its own.

        Args:
            source: Directory of a finished run, or a `.keras` file.
            output: Folder for the folders of the formats. None: `exported` in
                the run's directory or beside the file.
            inputs: File of examples to compare and calibrate on, as
                `read_inputs` takes it. None: random ones are compared, and
                int8 is calibrated on training images of the run.
            data_dir: Folder of prepared data sets, for these.
            overwrite: Whether exports that are there are replaced.
            keep: Whether they are kept, and left out here.

        Returns:
            A report for each format that was written.

        Raises:
            ValueError: The source cannot be read, or a format could not be
                written; the other formats are.
        """
        if not self.formats:
            return []
        source = Path(source)
        home = source if source.is_dir() else source.parent
        folder = Path(output or home / "exported")
        targets = {
            name: folder / self._folder_name(name) for name in self.formats
        }
        if keep:
            targets = {f: p for f, p in targets.items() if not p.exists()}
        if not targets:
            return []
        model = load_model(source)
        examples = read_inputs(inputs, model) if inputs else None
        reports, failures = [], []
        for format, target in targets.items():
            quantization = None
            if self._quantizes(format):
                quantization = self.quantization
            if self._is_calibrated(format) and examples is None:
                examples = _training_inputs(source, data_dir)
            try:
                report = rigl_keras.export(
                    model,
                    target,
                    format=format,
                    fold_batch_norm=self.fold_batch_norm,
                    remove_dead_units=self.remove_dead_units,
                    quantization=quantization,
                    inputs=examples,
                    batch_sizes=self.batch_sizes,
                    measure=self.measure,
                    overwrite=overwrite,
                )
            except ValueError as error:
                failures.append(str(error))
            else:
                print(f"{report}\n", flush=True)
                reports.append(report)
        if failures:
            raise ValueError("\n".join(failures))
        return reports

    def _folder_name(self, format):
        if self._quantizes(format):
            return f"{format}_{self.quantization}"
        return format

    def _quantizes(self, format):
        return self.quantization in FORMATS[format].quantizations

    def _is_calibrated(self, format):
        offered = FORMATS[format].quantizations.get(self.quantization or "")
        return offered is not None and offered.calibrated


def load_model(source: str | os.PathLike) -> keras.Model:
    """Returns the model of a finished run, or of a file.

    Args:
        source: Directory of the run, or a `.keras` file.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        _ = EarlierRun(path).result  # of a finished run
        path = path / "model.keras"
    if not path.is_file():
        raise ValueError(
            f"There is no {str(path)!r}. Pass the directory of a finished run, "
            "or a .keras file."
        )
    if not os.access(path, os.R_OK):
        raise ValueError(f"{str(path)!r} may not be read: permission denied.")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{str(path)!r} is cut short, or no .keras file: those are zip "
            "archives. Pass a file that model.save(path) has written."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Keras's annotations do not say what this is.
            loaded: Any = keras.models.load_model(path, compile=False)
            return loaded
    except Exception as error:  # what a damaged archive raises is anything
        raise ValueError(
            f"{str(path)!r} cannot be loaded: {first_line(error)} A "
            "model with layers of your own is exported from Python, where "
            "they are known: rigl_keras.export(model, path)."
        ) from error


def read_inputs(path: str | os.PathLike, model: keras.Model):
    """Returns examples from a file, in the structure of the model's call.

    Args:
        path: A `.npy` file, for a model of one input, or a `.npz` file with
            an array for each input, by name.
        model: The model.

    Raises:
        ValueError: It cannot be read, or has other inputs.
    """
    signature = signatures.signature_of(model)
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"": loaded}
        if not isinstance(loaded, np.ndarray):
            with loaded:
                arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--inputs={str(path)!r} cannot be read as .npy or .npz: {error}"
        ) from error
    if len(arrays) == len(signature.inputs) == 1:
        arrays = dict(zip(signature.inputs, arrays.values(), strict=True))
    if arrays.keys() != signature.inputs.keys():
        raise ValueError(
            f"--inputs={str(path)!r} must hold an array for each input of the "
            f"model: {', '.join(signature.inputs)}. Received: "
            f"{', '.join(arrays) or 'none'}."
        )
    return signature.pack(arrays)


def _training_inputs(source, data_dir):
    if not source.is_dir():
        raise ValueError(
            "quantization='int8' reads the ranges of activations from typical "
            "examples. Pass --inputs=FILE, an .npy or .npz with a hundred or "
            "more."
        )
    result = EarlierRun(source).result
    return data.load(
        result["dataset"],
        data_dir=data_dir,
        context=result["settings"].get("context"),  # earlier runs had none
    ).first_inputs(_CALIBRATED_ON)
