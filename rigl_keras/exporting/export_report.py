"""The report of an export: sizes, speed, and files that can be checked."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path

from rigl_keras import _reading, _text
from rigl_keras._text import aligned, grouped, wrapped

__all__ = [
    "ExportReport",
    "REPORT",
    "check_export",
    "foreign_files",
    "size_of",
    "write_report",
]

REPORT = "export.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """The report of an export; printing it shows a table.

    Attributes:
        path: The folder that was written.
        format: One of `formats.FORMATS`.
        quantization: As in `export`.
        bytes: Size of the artefact on disk.
        gzip_bytes: The size with each file compressed separately.
        dense_format: Format of the dense model that it is compared with. None:
            the same format.
        dense_bytes: Size of the dense model in that format.
        dense_gzip_bytes: The compressed size of it.
        variable_bytes: For a SavedModel, size of its `variables` folder; for
            other formats, size of the artefact.
        dense_variable_bytes: The same size for the dense model.
        operation_bytes: Size of the library in the folder that computes the
            model, 0 where there is none.
        inputs: Names of the model's inputs.
        loading: Lines that load and call it, as in `Format`.
        density: Fraction of the masked weights that is kept.
        parameters: Trainable parameters of the dense model.
        nonzeros: Remaining parameters: those of biases and normalisation, and
            the nonzero ones of kernels.
        inference_flops: Cost of one sample with the remaining parameters
            (`count`), None if it cannot be counted.
        dense_inference_flops: Cost of one sample of the dense model.
        max_difference: Largest difference of the outputs from those of the
            model, in units of how far these spread around their mean (at
            least a tenth of the largest, and a thousandth).
        tolerance: The largest accepted difference.
        load_seconds: Time to load the artefact.
        dense_load_seconds: Time to load the dense model.
        latency: `{batch size: seconds}` of one call.
        dense_latency: Latency of the dense model; the calls of both
            alternate.
        folded: `{batch norm: the layer that it was folded into}`.
        not_folded: `{batch norm: why it was kept}`, if folding was requested.
        removed: `{layer: (units before, units after)}` of the layers that lost
            dead units.
        notes: What was not done, and why.
        versions: Versions of the packages that wrote it.
    """

    path: str
    format: str
    quantization: str | None
    bytes: int
    gzip_bytes: int | None = None
    dense_format: str | None = None
    dense_bytes: int | None = None
    dense_gzip_bytes: int | None = None
    variable_bytes: int
    dense_variable_bytes: int | None = None
    operation_bytes: int = 0
    inputs: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()
    density: float
    parameters: int
    nonzeros: int
    inference_flops: float | None
    dense_inference_flops: float | None
    max_difference: float
    tolerance: float
    load_seconds: float | None = None
    dense_load_seconds: float | None = None
    latency: Mapping[int, float] = dataclasses.field(default_factory=dict)
    dense_latency: Mapping[int, float] = dataclasses.field(default_factory=dict)
    folded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    not_folded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    removed: Mapping[str, tuple[int, int]] = dataclasses.field(
        default_factory=dict
    )
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: _versions()
    )

    def __str__(self) -> str:
        rows = [
            ("on disk", self.bytes, self.dense_bytes, _megabytes),
            ("  its library", self.operation_bytes or None, None, _megabytes),
            ("  gzip", self.gzip_bytes, self.dense_gzip_bytes, _megabytes),
            ("parameters", self.nonzeros, self.parameters, "{:,}".format),
            (
                "FLOPs for one sample",
                self.inference_flops,
                self.dense_inference_flops,
                "{:,.0f}".format,
            ),
            (
                "time to load",
                self.load_seconds,
                self.dense_load_seconds,
                _milliseconds,
            ),
            *(
                (
                    f"latency at batch {batch}",
                    self.latency[batch],
                    self.dense_latency[batch],
                    _milliseconds,
                )
                for batch in self.latency
            ),
        ]
        cells = [("", "exported", "dense", "ratio")]
        for label, ours, dense, shown in rows:
            if ours is not None:
                known = bool(dense)
                cells.append(
                    (
                        label,
                        shown(ours),
                        shown(dense) if known else "-",
                        f"{ours / dense:.3f}x" if known else "-",
                    )
                )
        kind = self.format
        if self.quantization:
            kind += f", {self.quantization}"
        lines = [
            f"{self.path}: {kind}",
            f"density {self.density:.4f} of the masked weights",
        ]
        lines += [line.rstrip() for line in aligned(cells, left=1)]
        if self.dense_bytes is not None:
            dense = self.dense_format or kind
            lines.append(
                f"dense: the same model with its zeros stored, {dense}"
            )
        lines.append(
            f"outputs differ by {self.max_difference:.1e} of their spread, at "
            f"most {self.tolerance:.0e} allowed"
        )
        if self.folded or self.not_folded:
            norms = len(self.folded) + len(self.not_folded)
            lines.append(f"{len(self.folded)} of {norms} batch norms folded")
            for names, why in grouped(self.not_folded.items()):
                lines += wrapped(f"{names}: {why}", indent=2)
        if self.removed:
            before, after = map(sum, zip(*self.removed.values(), strict=True))
            lines.append(
                f"dead units removed from {len(self.removed)} layers: "
                f"{after:,} of their {before:,} units are left"
            )
        lines += self.notes
        if self.loading:
            lines.append("load and call it:")
        inputs = ", ".join(f"{name}={name}" for name in self.inputs)
        feed = ", ".join(f'"{name}": {name}' for name in self.inputs)
        for line in self.loading:
            line = line.replace("{path}", self.path)
            line = line.replace("{inputs}", inputs)
            lines.append("  " + line.replace("{feed}", f"{{{feed}}}"))
        return "\n".join(lines)


def write_report(report: ExportReport, folder: Path) -> None:
    """Writes a report, with digests of its files, into their folder."""
    content = {**dataclasses.asdict(report), "files": _digests(folder)}
    (folder / REPORT).write_text(json.dumps(content, indent=2) + "\n")


def check_export(path: str | os.PathLike) -> ExportReport:
    """Returns the report of an export, if its files are unchanged.

    Args:
        path: A folder written by `export`, perhaps moved or copied.

    Raises:
        ValueError: It is not an export, or a file of it is missing, truncated,
            changed or not part of it.

    Example:

    >>> check_export("exported/").bytes
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path must be an export's. Received: {path!r}.")
    folder = Path(path)
    report = folder / REPORT
    if not report.is_file():
        raise ValueError(
            f"{str(folder)!r} is not an export: it holds no {REPORT}."
        )
    try:
        content = _reading.json_object(report)
        files = _files_in(content)
        _check_fields(content)
        for name in ("latency", "dense_latency"):
            content[name] = {int(n): s for n, s in content[name].items()}
        content["removed"] = {
            n: tuple(u) for n, u in content["removed"].items()
        }
        for name in ("notes", "inputs", "loading"):  # earlier ones had one
            content[name] = tuple(content.get(name, ()))
        del content["files"]
        content = ExportReport(**{**content, "path": str(folder)})
        str(content)  # raises unless it can be shown
    # A KeyError means a missing field, a TypeError an extra one.
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(report)!r} is damaged, or not an export's report: {error}."
        ) from error
    try:
        found = _digests(folder)
    except OSError as error:
        raise ValueError(
            f"The export in {str(folder)!r} cannot be read: {error}."
        ) from error
    for name in files.keys() | found.keys():
        if files.get(name) == found.get(name):
            continue
        what = "has changed since it was written"
        if name not in found:
            what = "is missing"
        elif name not in files:
            what = "is not part of the export"
        raise ValueError(
            f"The export in {str(folder)!r} is damaged: {name} {what}. Export "
            "the model again."
        )
    return content


def _files_in(content):
    """Returns `{name: digest}` of the files in a report."""
    files = content["files"]
    if not isinstance(files, dict) or not all(map(_is_text, files.values())):
        raise ValueError(f"files is {_text.brief(files)}")
    return files


def _check_fields(content):
    """Checks the type of each field of a report."""
    for name, kind in _KINDS.items():
        if name in content and not kind(content[name]):
            raise ValueError(f"{name} is {_text.brief(content[name])}")
    if not content["max_difference"] <= content["tolerance"]:
        raise ValueError(
            f"outputs differ by {content['max_difference']}, more than "
            f"{content['tolerance']}"
        )


def _is_text(value):
    return isinstance(value, str)


def _is_size(value):
    return isinstance(value, int) and _reading.is_number(value, least=0)


def _is_measure(value):
    return _reading.is_number(value, least=0)


def _or_none(kind):
    return lambda value: value is None or kind(value)


def _by_name(kind):
    return lambda value: (
        isinstance(value, dict) and all(map(kind, value.values()))
    )


_KINDS = {
    "format": _is_text,
    "dense_format": _or_none(_is_text),
    "quantization": _or_none(_is_text),
    **dict.fromkeys(
        (
            "bytes",
            "variable_bytes",
            "operation_bytes",
            "parameters",
            "nonzeros",
        ),
        _is_size,
    ),
    **dict.fromkeys(
        (
            "gzip_bytes",
            "dense_bytes",
            "dense_gzip_bytes",
            "dense_variable_bytes",
        ),
        _or_none(_is_size),
    ),
    "density": lambda value: _reading.is_number(value, least=0, most=1),
    **dict.fromkeys(("max_difference", "tolerance"), _is_measure),
    **dict.fromkeys(
        (
            "inference_flops",
            "dense_inference_flops",
            "load_seconds",
            "dense_load_seconds",
        ),
        _or_none(_is_measure),
    ),
    **dict.fromkeys(("latency", "dense_latency"), _by_name(_is_measure)),
    **dict.fromkeys(("folded", "not_folded", "versions"), _by_name(_is_text)),
    "removed": _by_name(
        lambda units: (
            isinstance(units, list)
            and len(units) == 2
            and all(map(_is_size, units))
        )
    ),
    **dict.fromkeys(
        ("notes", "inputs", "loading"),
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
    ),
}


def foreign_files(path: Path) -> list[str]:
    """Returns what is in an export's place but not part of it.

    Args:
        path: A folder, or anything else.

    Returns:
        Names of files. Without a report, all files; none in an empty folder.
        What Python compiles of a module that is part of it, as it is imported,
        is left out.
    """
    try:
        content = _reading.json_object(path / REPORT)
        known = {REPORT, *_files_in(content)}
    except (OSError, KeyError, ValueError):
        known = set()
    if not path.is_dir():
        return [path.name]
    for module in [name for name in known if name.endswith(".py")]:
        compiled = path.glob(f"__pycache__/{Path(module).stem}.*.pyc")
        known |= {str(entry.relative_to(path)) for entry in compiled}
    found = [str(entry.relative_to(path)) for entry in _entries(path)]
    if not any(path.iterdir()):
        return []
    return [name for name in found if name not in known] or (
        [] if known else ["no export.json"]
    )


def _entries(folder):
    """Returns all entries that are not folders: files, links and others.

    Folders that links lead to are not searched.
    """
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    ]


def _files(folder):
    return [path for path in _entries(folder) if path.is_file()]


def size_of(folder: Path, *, compressed: bool = False) -> int:
    """Returns the bytes of all files in a folder.

    Args:
        folder: The folder.
        compressed: Whether each is compressed first.
    """
    files = _files(folder)
    if compressed:
        return sum(len(gzip.compress(file.read_bytes())) for file in files)
    return sum(file.stat().st_size for file in files)


def _digests(folder):
    """Returns the digest of each entry by name; "" if it is not a file."""
    return {
        str(entry.relative_to(folder)): hashlib.sha256(
            entry.read_bytes()
        ).hexdigest()
        if entry.is_file()
        else ""
        for entry in _entries(folder)
        if entry != folder / REPORT
    }


def _versions():
    return {
        package: importlib.metadata.version(package)
        for package in ("tensorflow", "keras", "numpy")
    }


def _megabytes(size):
    return f"{size / 1e6:,.3f} MB"


def _milliseconds(seconds):
    digits = 2 if seconds >= 1e-3 else 3
    return f"{1e3 * seconds:,.{digits}f} ms"
