"""Reads runs from a folder of results, or from a results.jsonl."""

import dataclasses
import os
from pathlib import Path

from rigl_keras._reading import object_in
from rigl_keras._text import brief, printable
from rigl_keras.experiments.protocol.rows import NOT_RUNS
from rigl_keras.experiments.report import record_files
from rigl_keras.experiments.report.record_files import UNREADABLE
from rigl_keras.experiments.report.records import OF_ANOTHER, Record, Records
from rigl_keras.experiments.report.screening import selected

__all__ = ["read"]


def read(path: str | os.PathLike, preset: str | None = None) -> Records:
    """Returns the runs of one preset.

    Args:
        path: A folder of results, or a `results.jsonl`.
        preset: Name of the preset. None: the only one.

    Raises:
        ValueError: There is nothing to read, or several presets.
    """
    path = Path(path)
    if path.is_dir():
        found, broken = _in_folder(path)
    elif path.is_file():
        found, broken = _in_file(path)
    else:
        raise ValueError(
            f"There are no results at {str(path)!r}. Pass --results_dir with "
            "the folder that bin/reproduce was given, or a results.jsonl."
        )
    presets: list[str] = sorted({record.preset for record in found})
    if not presets:
        raise ValueError(
            f"{str(path)!r} holds no run of bin/reproduce. Pass --results_dir "
            "with the folder that bin/reproduce was given, or a results.jsonl."
        )
    if preset is None:
        if len(presets) > 1:
            raise ValueError(
                f"{str(path)!r} holds runs of several presets. They cannot be "
                f"mixed. Pass --preset with one of {', '.join(presets)}."
            )
        (preset,) = presets
    # A user's preset may be given by its file, as in bin/reproduce.
    preset = Path(preset).stem if preset.endswith(".gin") else preset
    preset = printable(preset)
    if preset not in presets:
        raise ValueError(
            f"{str(path)!r} holds no run of the preset {preset!r}. Pass "
            f"--preset with one of {', '.join(presets)}."
        )
    chosen = sorted(
        (record for record in found if record.preset == preset),
        key=lambda record: record.folder,
    )
    return selected(preset, chosen, broken)


# From a folder.


def _in_folder(path):
    found, broken = [], []
    try:
        folders = _folders(path)
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error.strerror})."
        ) from error
    for folder in folders:
        if folder.name.startswith("."):
            continue
        try:
            inner = _folders(folder)
        except OSError as error:
            broken.append(
                f"{printable(folder.name)} is left out: it cannot be read "
                f"({error.strerror})."
            )
            continue
        # A folder without runs is not a preset.
        if any(os.path.lexists(run / "about.json") for run in inner):
            preset = printable(folder.name)
            found += [
                _record(preset, run)
                for run in inner
                if run.name not in NOT_RUNS
                or os.path.lexists(run / "about.json")
            ]
    if not found and any(os.path.lexists(f / "about.json") for f in folders):
        raise ValueError(
            f"{str(path)!r} is the folder of a preset. Pass --results_dir with "
            f"the folder it is in, and --preset={path.resolve().name}."
        )
    return found, broken


def _folders(path):
    return sorted(inner for inner in path.iterdir() if os.path.isdir(inner))


def _record(preset, path):
    unknown = Record(f"{preset}/{printable(path.name)}", None, preset)
    try:
        about = record_files.about(path / "about.json")
    except FileNotFoundError:
        return dataclasses.replace(
            unknown, failure="it has no about.json: not of bin/reproduce"
        )
    except UNREADABLE as error:
        return dataclasses.replace(
            unknown, failure=f"its about.json cannot be read ({error})"
        )
    if printable(about["preset"]) != preset:
        return dataclasses.replace(
            unknown,
            failure=f"its about.json says that it is of {about['preset']!r}",
        )
    record = dataclasses.replace(unknown, **about | {"preset": preset})
    run = path / "run"
    try:
        result = record_files.result(run / "result.json")
    except FileNotFoundError:
        return dataclasses.replace(record, **record_files.why_not(path))
    except UNREADABLE as error:
        reason = f"its result.json cannot be read ({error})"
        return dataclasses.replace(record, failure=reason, failed=True)
    disagreement = record_files.disagreement(about, result)
    if disagreement is not None:
        reason = OF_ANOTHER + disagreement
        return dataclasses.replace(record, failure=reason, failed=True)
    return dataclasses.replace(
        record,
        result=result,
        learning_rate=record_files.learning_rate(run / "config.gin"),
        curve=record_files.curve(run / "flops.csv", result),
        history=record_files.history(run / "metrics.csv"),
    )


# From a file.


def _in_file(path):
    found, broken = [], []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error.strerror})."
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_from_line(line))
        except (ValueError, TypeError) as error:
            broken.append(
                f"Line {number} of {path.name} is left out: it cannot be read "
                f"({error})."
            )
    return found, broken


def _from_line(line):
    fields = object_in(line)
    rate = fields.get("learning_rate")
    fits = {
        "folder": isinstance(fields.get("folder"), str),
        "preset": isinstance(fields.get("preset"), str),
        "failure": isinstance(fields.get("failure"), str | None),
        "failed": isinstance(fields.get("failed"), bool),
        "learning_rate": rate is None or record_files.is_rate(rate),
        "result": isinstance(fields.get("result"), dict | None),
        "curve": isinstance(fields.get("curve"), list),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"{name} is {brief(fields.get(name))}")
    fields["folder"] = printable(fields["folder"])
    if fields.get("row") is None:
        fields |= {"density": None, "seed": None, "changes": ()}
    else:
        fields |= record_files.about_in(fields)
    fields["preset"] = printable(fields["preset"])
    fields["curve"] = tuple(record_files.curve_in(fields["curve"]))
    history = record_files.history_in(fields.get("history", ()))
    fields["history"] = tuple(history)
    record = Record(**fields)  # an extra field is a TypeError
    if record.row is None or record.result is None:
        return dataclasses.replace(record, result=None, curve=(), history=())
    result = record_files.result_in(record.result)
    disagreement = record_files.disagreement(fields, result)
    if disagreement is not None:
        raise ValueError(f"its result is of another run: {disagreement}")
    return dataclasses.replace(
        record, result=result, failure=None, failed=False
    )
