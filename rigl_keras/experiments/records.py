"""What is known of finished, failed and missing runs.

Read from a folder of results (see `results.py`), or from a `results.jsonl`, a
line for each run, which holds all of it that a report needs.
"""

import collections
import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rigl_keras.experiments import plans, record_files, rows
from rigl_keras.experiments.record_files import RATIOS, UNREADABLE
from rigl_keras.reading import brief, is_number, object_in, printable

__all__ = ["TUNED", "Record", "Records", "as_lines", "collapsed", "read"]

Changes = tuple[tuple[str, float], ...]

# The changes by which Figure 2 and Table 4 search; others make other rows.
TUNED = frozenset({"UPDATE_FRACTION", "UPDATE_FREQUENCY", "sgd.learning_rate"})

_COLLAPSED = 10.0  # points below the other seeds
_CLASSES = {"cifar10": 10, "cifar100": 100, "mnist": 10, "digits": 10}
_NOTE = 1_000  # letters of a note that are kept

# Settings of which runs of a row may differ: by density, by seed, by where
# their folder is.
_FREE = {"density", "masks_from", "weights_from", "replicas"}
_FREE_OF_METHOD = {"seed", "schedule", "drop_fraction", "frequency"}
# How the failure of a run begins whose result is another run's.
_OF_ANOTHER = "its result.json and about.json disagree: "


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
        found, broken = _in_folder(path)
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
    return _selected(preset, chosen, broken)


def as_lines(records: Records) -> str:
    """Returns all that was found as `results.jsonl`, which `read` reads."""
    lines = []
    for record in records.found:
        fields = {
            field.name: getattr(record, field.name)
            for field in dataclasses.fields(record)
        }
        fields["changes"] = dict(record.changes)
        lines.append(json.dumps(fields) + "\n")
    return "".join(lines)


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
        # A folder without any run is no preset.
        if any(os.path.lexists(run / "about.json") for run in inner):
            preset = printable(folder.name)
            found += [_record(preset, run) for run in inner]
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
        reason = _OF_ANOTHER + disagreement
        return dataclasses.replace(record, failure=reason, failed=True)
    return dataclasses.replace(
        record,
        result=result,
        learning_rate=record_files.learning_rate(run / "config.gin"),
        curve=record_files.curve(run / "flops.csv", result),
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
    record = Record(**fields)  # a field too many is a TypeError
    if record.row is None or record.result is None:
        return dataclasses.replace(record, result=None, curve=())
    result = record_files.result_in(record.result)
    disagreement = record_files.disagreement(fields, result)
    if disagreement is not None:
        raise ValueError(f"its result is of another run: {disagreement}")
    return dataclasses.replace(
        record, result=result, failure=None, failed=False
    )


# What of it counts.


def _selected(preset, found, broken):
    notes = list(broken)
    known = set(rows.known())
    runs = []
    for record in found:
        if record.row is None:
            why = record.failure or "what it is, it does not say"
            notes.append(f"{record.name} is left out: {why}.")
        elif record.row not in known:
            notes.append(
                f"{record.name} is left out: there is no gin file "
                f"{brief(record.row)}."
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
        failure = run.failure or ""
        if failure.startswith(_OF_ANOTHER):
            notes.append(f"The result of {run.name} is left out: {failure}.")
    notes += _remarks([run for run in runs if run.result is not None])
    notes = [
        note if len(note) <= _NOTE else f"{note[:_NOTE]} ..." for note in notes
    ]
    return Records(preset, tuple(runs), tuple(notes), tuple(found))


def _remarks(finished):
    """Yields what is odd about runs that count all the same."""
    groups = collections.defaultdict(list)
    for run in finished:
        groups[run.row, run.density, run.changes].append(run)
        loss = run.result.get("test_loss")
        if loss is None or is_number(loss):
            continue
        if isinstance(loss, float):
            said = f"has diverged, its test loss is {loss}"
        else:
            said = f"has a test loss that is no number, {brief(loss)}"
        yield f"{run.name} {said}; its accuracy counts like any other."
    for group in groups.values():
        for name, why in collapsed(group).items():
            yield (
                f"{name} has collapsed: {why}; its accuracy counts like any "
                "other."
            )
    bare = [run.name for run in finished if not run.curve]
    if bare:
        yield (
            f"{_listed(bare)} {'has' if len(bare) == 1 else 'have'} no "
            "flops.csv that can be read: Figure 4 lacks their lines."
        )
    seeds = {run.seed for run in finished}
    others = sorted(seeds - set(plans.SEEDS))
    if others:
        yield (
            f"Not the report's seeds {_listed(plans.SEEDS)}: "
            f"{_listed(others)}. "
            + (
                "They count like those."
                if seeds & set(plans.SEEDS)
                else "No run has the report's, so that each row should have "
                "these."
            )
        )


def _listed(values, most=10):
    shown = [str(value) for value in values[:most]]
    if len(values) > most:
        return f"{', '.join(shown)} and {len(values) - most} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def collapsed(runs: Iterable[Record]) -> dict[str, str]:
    """Returns the seeds of a row that have learnt next to nothing.

    A seed has collapsed if it is 10 points or more below the median of the
    others, or hardly better than chance.

    Args:
        runs: Finished runs that differ by their seeds alone.

    Returns:
        `{name of the run: why}`.
    """
    runs, found = list(runs), {}
    for run in runs:
        chance = 100 / _CLASSES.get(run.result["dataset"], float("inf"))
        others = [other.test for other in runs if other is not run]
        below = statistics.median(others) - run.test if others else 0.0
        if run.test <= 1.2 * chance:
            found[run.name] = (
                f"{run.test:.2f} % is hardly better than chance, {chance:g} %"
            )
        elif below >= _COLLAPSED:
            found[run.name] = (
                f"{run.test:.2f} % is {below:.1f} points below the other seeds"
            )
    return found


def _misplaced(record):
    """Whether a row of the report has the density of another kind of row."""
    row = rows.row(record.row)
    return row.network != "" and row.dense != (record.density is None)


def _once(runs, notes):
    """Returns each run once.

    A finished one before others, then the one whose folder has the name that
    bin/reproduce gives it.
    """
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run.key].append(run)
    chosen = []
    for group in groups.values():
        first = min(
            group,
            key=lambda run: (
                run.result is None,
                run.name != rows.run_name(*run.key),
                run.folder,
            ),
        )
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
    names = ("test_accuracy", "validation_accuracy", *RATIOS)
    return run.result and [run.result[name] for name in names]


def _alike(
    runs: Sequence[Record],
    notes: list[str],
    settings: Callable[[Record], dict],
    only: Callable[[Record], bool] = lambda run: True,
) -> list[Record]:
    """Returns the runs without those whose settings are not their row's.

    A row's are those that most of its finished runs of the same changes have.
    A learning rate that could not be read is no difference.
    """
    groups = collections.defaultdict(list)
    for run in runs:
        if run.result is not None and only(run):
            groups[run.row, run.variant].append(run)
    odd = set()
    for group in groups.values():
        of_run = {run.folder: settings(run) for run in group}
        counts = collections.Counter(
            json.dumps(of_run[run.folder], sort_keys=True)
            for run in [r for r in group if r.learning_rate] or group
        )
        usual = json.loads(counts.most_common(1)[0][0])
        for run in group:
            own = of_run[run.folder]
            differing = [
                f"{brief(name)[1:-1]} {brief(own.get(name))} where the others "
                f"have {brief(usual.get(name))}"
                for name in sorted({*own, *usual})
                # As text, in which a NaN is equal to itself.
                if json.dumps(own.get(name)) != json.dumps(usual.get(name))
                and not (name == "learning_rate" and own.get(name) is None)
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
