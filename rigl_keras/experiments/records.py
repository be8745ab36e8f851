"""What is known of finished, failed and missing runs.

Read from a folder of results (see `results.py`), or from a `results.jsonl`, a
line for each run, which holds all of it that a report needs.
"""

import collections
import csv
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rigl_keras.experiments import rows

__all__ = ["TUNED", "Record", "Records", "as_lines", "read"]

Changes = tuple[tuple[str, float], ...]

# The changes by which Figure 2 and Table 4 search; others make other rows.
TUNED = frozenset({"UPDATE_FRACTION", "UPDATE_FREQUENCY", "sgd.learning_rate"})

_CURVE_POINTS = 120  # of a curve that are kept
_REASON = 400  # letters of a failure that are kept

# What a report needs of a result, and whether each must be a number.
_RATIOS = (
    "inference_flops_ratio",
    "training_flops_ratio",
    "training_flops_ratio_with_sources",
)
_KEPT = (
    "method",
    "model",
    "dataset",
    "seed",
    "density",
    "test_accuracy",
    "validation_accuracy",
    "test_loss",
    "inference_flops",
    *_RATIOS,
    "parameters",
    "nonzeros",
    "steps",
    "seconds",
    "settings",
    "versions",
)
# Settings of which runs of a row may differ: by density, by seed, by where
# their folder is.
_FREE = {"density", "masks_from", "weights_from", "replicas"}
_FREE_OF_METHOD = {"seed", "schedule", "drop_fraction", "frequency"}


@dataclasses.dataclass(frozen=True)
class Record:
    """One run, as it was found.

    Args:
        folder: `PRESET/RUN_NAME`.
        row: The gin file, without folder and ending. None: the folder does
            not say what it is, and `failure` says why.
        preset: The name of its preset's folder.
        density: Fraction of the weights kept. None: a dense model.
        seed: The seed.
        changes: gin bindings over the files, sorted by name.
        result: What `train` returned, as far as a report needs it. None: it
            has none.
        failure: Why it has none.
        failed: Whether it failed; otherwise it is unfinished.
        learning_rate: Of its configuration, where that could be read.
        curve: `((step, inference FLOPs over the dense network's), ...)`.
    """

    folder: str
    row: str | None
    preset: str
    density: float | None = None
    seed: int | None = None
    changes: Changes = ()
    result: Mapping | None = None
    failure: str | None = None
    failed: bool = False
    learning_rate: float | None = None
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def key(self) -> tuple:
        """What two runs have in common that are the same run."""
        return self.row, self.density, self.seed, self.changes

    @property
    def variant(self) -> Changes:
        """Its changes without those that are searched for."""
        return tuple(pair for pair in self.changes if pair[0] not in TUNED)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.split("/", 1)[-1]

    @property
    def test(self) -> float:
        """Test accuracy in percent, of a finished run."""
        return 100 * self.result["test_accuracy"]

    @property
    def validation(self) -> float | None:
        """Validation accuracy in percent; None where none was held out."""
        accuracy = self.result["validation_accuracy"]
        return None if accuracy is None else 100 * accuracy

    @property
    def training_flops_ratio(self) -> float:
        """Over training the dense model once; of tickets, with Pruning's."""
        of_ticket = rows.row(self.row).method == "Lottery"
        name = "training_flops_ratio" + "_with_sources" * of_ticket
        return self.result[name]

    @property
    def inference_flops_ratio(self) -> float:
        """Over the dense model's, at the end."""
        return self.result["inference_flops_ratio"]


@dataclasses.dataclass(frozen=True)
class Records:
    """The runs of one preset.

    Args:
        preset: The name of its folder.
        runs: Each run once, in the order of folders; those that cannot be
            averaged with the others are left out.
        notes: What was left out or counted once, and why.
        found: All that was found, to be written down.
    """

    preset: str
    runs: tuple[Record, ...]
    notes: tuple[str, ...]
    found: tuple[Record, ...]

    @property
    def finished(self) -> tuple[Record, ...]:
        """Those with a result."""
        return tuple(run for run in self.runs if run.result is not None)


def read(path: str | os.PathLike, preset: str | None = None) -> Records:
    """Returns the runs of one preset.

    Args:
        path: A folder of results, or a `results.jsonl`.
        preset: Which one. None: the only one there is.

    Raises:
        ValueError: There is nothing to read, or several presets.
    """
    path = Path(path)
    if path.is_dir():
        found, broken = _in_folder(path), []
    elif path.is_file():
        found, broken = _in_file(path)
    else:
        raise ValueError(
            f"There are no results at {str(path)!r}. Pass --results_dir with "
            "the folder that bin/reproduce was given, or a results.jsonl."
        )
    presets = sorted({record.preset for record in found})
    if not presets:
        raise ValueError(
            f"{str(path)!r} holds no run of bin/reproduce. Pass --results_dir "
            "with the folder that bin/reproduce was given, or a results.jsonl."
        )
    if preset is None:
        if len(presets) > 1:
            raise ValueError(
                f"{str(path)!r} holds runs of several presets, which are not "
                f"to be mixed. Pass --preset with one of {', '.join(presets)}."
            )
        (preset,) = presets
    # A preset of one's own may be named by its file, as for bin/reproduce.
    preset = Path(preset).stem if preset.endswith(".gin") else preset
    if preset not in presets:
        raise ValueError(
            f"{str(path)!r} holds no run of the preset {preset!r}. Pass "
            f"--preset with one of {', '.join(presets)}."
        )
    chosen = sorted(
        (record for record in found if record.preset == preset),
        key=lambda record: record.folder,
    )
    return _selected(preset, chosen, broken)


def as_lines(records: Records) -> str:
    """Returns all that was found as `results.jsonl`, which `read` reads."""
    lines = []
    for record in records.found:
        fields = dataclasses.asdict(record)
        fields["changes"] = dict(record.changes)
        lines.append(json.dumps(fields) + "\n")
    return "".join(lines)


# From a folder.


def _in_folder(path):
    found = []
    try:
        for folder in sorted(path.iterdir()):
            inner = _folders(folder)
            # A folder without any run is no preset.
            if any((run / "about.json").exists() for run in inner):
                found += [_record(folder.name, run) for run in inner]
    except OSError as error:
        raise ValueError(
            f"{error.filename!r} cannot be read ({error.strerror})."
        ) from error
    if not found and any((f / "about.json").exists() for f in _folders(path)):
        raise ValueError(
            f"{str(path)!r} is the folder of a preset. Pass --results_dir with "
            f"the folder it is in, and --preset={path.resolve().name}."
        )
    return found


def _folders(path):
    if not path.is_dir() or path.name.startswith("."):
        return []
    return sorted(p for p in path.iterdir() if p.is_dir())


def _record(preset, path):
    unknown = Record(f"{preset}/{path.name}", None, preset)
    if not (path / "about.json").exists():
        return dataclasses.replace(
            unknown, failure="it has no about.json: not of bin/reproduce"
        )
    try:
        about = _about(_json(path / "about.json"))
    except _UNREADABLE as error:
        return dataclasses.replace(
            unknown, failure=f"its about.json cannot be read ({error})"
        )
    if about["preset"] != preset:
        return dataclasses.replace(
            unknown,
            failure=f"its about.json says that it is of {about['preset']!r}",
        )
    record = dataclasses.replace(unknown, **about)
    run = path / "run"
    if not (run / "result.json").exists():
        return dataclasses.replace(record, **_why_not(path))
    try:
        result = _result(_json(run / "result.json"), record)
    except _UNREADABLE as error:
        reason = f"its result.json cannot be read ({error})"
        return dataclasses.replace(record, failure=reason, failed=True)
    return dataclasses.replace(
        record,
        result=result,
        learning_rate=_learning_rate(run / "config.gin"),
        curve=_curve(run / "flops.csv", result),
    )


# Broken JSON, text that is none, and what a check of ours finds.
_UNREADABLE = (OSError, ValueError, RecursionError)


def _json(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is no object")
    return content


def _about(content):
    """Returns what a run is, if all of it is of the kind it should be."""
    found = {
        "row": content.get("row"),
        "preset": content.get("preset"),
        "density": content.get("density"),
        "seed": content.get("seed"),
        "changes": content.get("changes"),
    }
    fits = {
        "row": isinstance(found["row"], str),
        "preset": isinstance(found["preset"], str),
        "density": found["density"] is None
        or (_is_number(found["density"]) and 0 < found["density"] <= 1),
        "seed": isinstance(found["seed"], int)
        and not isinstance(found["seed"], bool),
        "changes": isinstance(found["changes"], dict)
        and all(map(_is_number, found["changes"].values())),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"{name} is {found[name]!r}")
    found["changes"] = tuple(sorted(found["changes"].items()))
    return found


def _result(content, record):
    """Returns what is kept of a result, if it can be one of the run."""
    for name in ("test_accuracy", "inference_flops", "steps", *_RATIOS):
        value = content.get(name)
        positive = name != "test_accuracy"
        if not _is_number(value) or (positive and value <= 0):
            raise ValueError(f"{name} is {value!r}")
    accuracies = [content["test_accuracy"]]
    if content.get("validation_accuracy") is not None:
        accuracies.append(content["validation_accuracy"])
    for accuracy in accuracies:
        if not (_is_number(accuracy) and 0 <= accuracy <= 1):
            raise ValueError(f"an accuracy is {accuracy!r}")
    if content.get("seed") != record.seed:
        raise ValueError(
            f"it is of seed {content.get('seed')!r}, about.json of "
            f"{record.seed!r}"
        )
    if not isinstance(content.get("settings"), dict):
        raise ValueError(f"settings is {content.get('settings')!r}")
    kept = {name: content.get(name) for name in _KEPT}
    kept["steps"] = int(kept["steps"])
    if not _is_number(kept["seconds"]):
        kept["seconds"] = 0.0
    layers = content.get("layers")
    kept["layers"] = [
        {"name": layer["name"], "density": layer["density"]}
        for layer in (layers if isinstance(layers, list) else [])
        if isinstance(layer, dict)
        and isinstance(layer.get("name"), str)
        and _is_number(layer.get("density"))
    ]
    if not kept["layers"]:
        raise ValueError("layers are missing")
    return kept


def _is_number(value):
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def _why_not(path):
    """Returns why a run has no result, as fields of its record."""
    failure = path / "failure.txt"
    try:
        if failure.exists():
            reason = failure.read_text(errors="replace").strip()
            return {"failure": reason[:_REASON] or "unknown", "failed": True}
        metrics = path / "run/metrics.csv"
        epochs = 0
        if metrics.exists():
            lines = metrics.read_text(errors="replace").count("\n")
            epochs = max(lines - 1, 0)
    except OSError as error:
        return {"failure": f"it cannot be read ({error})", "failed": True}
    return {"failure": f"unfinished, after {epochs} epochs"}


def _learning_rate(path):
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^sgd\.learning_rate = ([\d.e+-]+)$", text, re.MULTILINE)
    try:
        return float(found[1]) if found else None
    except ValueError:
        return None


def _curve(path, result):
    """Returns what inference costs from which step on, thinned."""
    dense = result["inference_flops"] / result["inference_flops_ratio"]
    points = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                step = int(line["step"])
                value = float(line["inference_flops"]) / dense
                if not math.isfinite(value):
                    return ()
                if not points or value != points[-1][1]:
                    points.append((step, value))
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return ()  # the figure does without
    if not points:
        return ()
    if len(points) > _CURVE_POINTS:
        stride = (len(points) - 1) / (_CURVE_POINTS - 1)
        points = [points[round(i * stride)] for i in range(_CURVE_POINTS)]
    if result["steps"] > points[-1][0]:
        points.append((result["steps"], points[-1][1]))
    return tuple(points)


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
        except (*_UNREADABLE, TypeError) as error:
            broken.append(
                f"Line {number} of {path.name} is left out: it cannot be read "
                f"({error})."
            )
    return found, broken


def _from_line(line):
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("it is no object")
    rate = fields.get("learning_rate")
    fits = {
        "folder": isinstance(fields.get("folder"), str),
        "preset": isinstance(fields.get("preset"), str),
        "failure": isinstance(fields.get("failure"), str | None),
        "failed": isinstance(fields.get("failed"), bool),
        "learning_rate": rate is None or _is_number(rate),
        "result": isinstance(fields.get("result"), dict | None),
        "curve": isinstance(fields.get("curve"), list),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"{name} is {fields.get(name)!r}")
    if fields.get("row") is None:
        fields["changes"] = ()
    else:
        fields |= _about(fields)
    fields["curve"] = tuple(
        (int(step), float(value)) for step, value in fields["curve"]
    )
    record = Record(**fields)  # a field too many is a TypeError
    if record.result is not None:
        result = _result(record.result, record)
        record = dataclasses.replace(record, result=result)
    return record


# What of it counts.


def _selected(preset, found, broken):
    notes = list(broken)
    known = set(rows.known())
    runs = []
    for record in found:
        if record.row is None:
            notes.append(f"{record.name} is left out: {record.failure}.")
        elif record.row not in known:
            notes.append(
                f"{record.name} is left out: there is no gin file "
                f"{record.row!r}."
            )
        elif _misplaced(record):
            notes.append(
                f"{record.name} is left out: a row {record.row} has not the "
                f"density {record.density}."
            )
        else:
            runs.append(record)
    runs = _once(runs, notes)
    runs = _alike(runs, notes, _settings)
    runs = _alike(
        runs, notes, _updates, only=lambda run: run.changes == run.variant
    )
    for run in runs:
        if run.result is None:
            continue
        loss = run.result.get("test_loss")
        if loss is not None and not _is_number(loss):
            notes.append(
                f"{run.name} has diverged, its test loss is {loss}; its "
                "accuracy counts like any other."
            )
    return Records(preset, tuple(runs), tuple(notes), tuple(found))


def _misplaced(record):
    """Whether a row of the report has the density of another kind of row."""
    row = rows.row(record.row)
    return row.network != "" and row.dense != (record.density is None)


def _once(runs, notes):
    """Returns each run once, a finished one before others."""
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run.key].append(run)
    chosen = []
    for group in groups.values():
        first = min(group, key=lambda run: (run.result is None, run.folder))
        chosen.append(first)
        if len(group) == 1:
            continue
        values = {
            run.name: "no result" if run.result is None else f"{run.test:.2f} %"
            for run in group
        }
        others = [run for run in group if run is not first]
        same = all(_numbers(run) == _numbers(first) for run in others)
        listed = ", ".join(
            run.name if same else f"{run.name} ({values[run.name]})"
            for run in others
        )
        value = "" if same else f" ({values[first.name]})"
        notes.append(
            f"{first.name}{value} is there {len(group)} times and counts once; "
            + ("the same result is in " if same else "not counted: ")
            + f"{listed}."
        )
    return chosen


def _numbers(run):
    names = ("test_accuracy", "validation_accuracy", *_RATIOS)
    return run.result and [run.result[name] for name in names]


def _alike(
    runs: Sequence[Record],
    notes: list[str],
    settings: Callable[[Record], dict],
    only: Callable[[Record], bool] = lambda run: True,
) -> list[Record]:
    """Returns the runs without those whose settings are not their row's.

    A row's are those that most of its finished runs of the same changes have.
    """
    groups = collections.defaultdict(list)
    for run in runs:
        if run.result is not None and only(run):
            groups[run.row, run.variant].append(run)
    odd = set()
    for group in groups.values():
        of_run = {run.folder: settings(run) for run in group}
        counts = collections.Counter(
            json.dumps(of_run[run.folder], sort_keys=True) for run in group
        )
        usual = json.loads(counts.most_common(1)[0][0])
        for run in group:
            own = of_run[run.folder]
            differing = [
                f"{name} {own.get(name)!r} where the others have "
                f"{usual.get(name)!r}"
                for name in sorted({*own, *usual})
                if own.get(name) != usual.get(name)
            ]
            if differing:
                odd.add(run.folder)
                notes.append(
                    f"{run.name} is left out, because it cannot be averaged "
                    f"with other runs of its row: {'; '.join(differing)}."
                )
    return [run for run in runs if run.folder not in odd]


def _settings(run):
    """Returns the settings that all runs of a row have in common."""
    settings = run.result["settings"]
    method = settings.get("method")
    found = {
        name: value
        for name, value in settings.items()
        if name not in _FREE and name != "method"
    }
    found |= {
        name: value
        for name, value in (method if isinstance(method, dict) else {}).items()
        if name not in _FREE_OF_METHOD
    }
    for name in ("model", "dataset", "parameters", "steps"):
        found[name] = run.result.get(name)
    return json.loads(json.dumps(found))


def _updates(run):
    """Returns the settings that `changes` would change."""
    method = run.result["settings"].get("method")
    method = method if isinstance(method, dict) else {}
    return {
        "drop_fraction": method.get("drop_fraction"),
        "frequency": method.get("frequency"),
        "learning_rate": run.learning_rate,
    }
