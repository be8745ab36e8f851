"""Exports of a run, at its end or later, and of files of `model.save`."""

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
    """The formats in which a trained model is exported, and their options.

    Attributes:
        formats: Any of `exporting.formats.FORMATS`; each is written to a
            folder of its name. Empty: nothing is exported.
        fold_batch_norm, remove_dead_units: As in `rigl_keras.export`.
        quantization: As in `rigl_keras.export`; it applies to the formats
            that offer it.
        batch_sizes, measure: As in `rigl_keras.export`.

    Raises:
        ValueError: A format is unknown or needs a package that is not
            installed, no format offers the quantization, or a batch size is
            out of range.
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
                f"quantization needs the format {offered}. Received: "
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
        """Exports a model, each format to a separate folder.

        Args:
            source: Directory of a finished run, or a `.keras` file.
            output: Folder for the folders of the formats. None: `exported` in
                the run's directory or beside the file.
            inputs: File of examples for the comparison and the calibration,
                as `read_inputs` takes it. None: the comparison uses random
                examples, and int8 training images of the run.
            data_dir: Folder of prepared data sets, for these images.
            overwrite: Whether existing exports are replaced.
            keep: Whether existing exports are kept, and skipped.

        Returns:
            A report for each format that was written.

        Raises:
            ValueError: The source cannot be read, or a format could not be
                written. The other formats are written.
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
            given = examples
            try:
                if given is None and self._is_calibrated(format):
                    given = _training_inputs(source, data_dir)
                report = rigl_keras.export(
                    model,
                    target,
                    format=format,
                    fold_batch_norm=self.fold_batch_norm,
                    remove_dead_units=self.remove_dead_units,
                    quantization=quantization,
                    inputs=given,
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
        ValueError: There is no model, or it cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        _ = EarlierRun(path).result  # raises if the run is not finished
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
            f"{str(path)!r} is cut short or not a .keras file, which is a zip "
            "archive. Pass a file that model.save(path) has written."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Keras's annotations do not say what this is.
            loaded: Any = keras.models.load_model(path, compile=False)
            return loaded
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(
            f"{str(path)!r} cannot be loaded: {first_line(error)} To export a "
            "model with custom layers, call rigl_keras.export(model, path) "
            "from Python."
        ) from error


def read_inputs(path: str | os.PathLike, model: keras.Model):
    """Returns examples from a file, in the structure that the model takes.

    Args:
        path: A `.npy` file, for a model with one input, or a `.npz` file with
            an array for each input, by name.
        model: The model.

    Raises:
        ValueError: The file cannot be read, or its arrays are not the
            model's inputs.
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
            "quantization='int8' measures the ranges of activations on typical "
            "examples. Pass --inputs=FILE, an .npy or .npz file with a hundred "
            "or more."
        )
    result = EarlierRun(source).result
    return data.load(
        result["dataset"],
        data_dir=data_dir,
        context=result["settings"].get("context"),  # earlier runs had none
    ).first_inputs(_CALIBRATED_ON)
