"""Chooses the runs of the report, and says why others are left out."""

import collections
import json
import re
from collections.abc import Callable, Sequence

from rigl_keras._reading import is_number
from rigl_keras._text import brief
from rigl_keras.experiments.protocol import rows, variations
from rigl_keras.experiments.report.record_files import RATIOS
from rigl_keras.experiments.report.records import (
    NOTE,
    OF_ANOTHER,
    Record,
    Records,
    collapsed,
)

__all__ = ["selected"]

# Settings in which runs of a row may differ: by density, by seed, by the
# location of their folder.
_FREE = {"density", "masks_from", "weights_from", "replicas"}
_FREE_OF_METHOD = {
    "seed",
    "schedule",
    "drop_fraction",
    "frequency",
    "density",  # of ACDC
    "final_density",  # of GraNet
}
# Settings of methods that earlier versions lack: what they had in their place,
# by a setting that comes with it.
_LATER = {
    "grow_init": ("grow_divisor", 1.0),
    "decay_power": ("final_drop_fraction", 0.0),
    "conventions.first_update": (
        "conventions.unit_score",
        "'mean_of_magnitudes'",
    ),
}


def selected(preset, found, broken):
    """Returns the records that count, with notes on those left out."""
    notes = list(broken)
    known = set(rows.known())
    runs = []
    for record in found:
        if record.row is None:
            why = record.failure or "it does not say which run it is"
            notes.append(f"{record.name} is left out: {why}.")
        elif record.row not in known:
            notes.append(
                f"{record.name} is left out: there is no gin file "
                f"{brief(record.row)}."
            )
        elif _misplaced(record):
            notes.append(
                f"{record.name} is left out: a row {record.row} does not have "
                f"the density {record.density}."
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
        if failure.startswith(OF_ANOTHER):
            notes.append(f"The result of {run.name} is left out: {failure}.")
    notes += _remarks([run for run in runs if run.result is not None])
    notes = [
        note if len(note) <= NOTE else f"{note[:NOTE]} ..." for note in notes
    ]
    return Records(preset, tuple(runs), tuple(notes), tuple(found))


def _remarks(finished):
    """Yields notes about odd runs that still count."""
    groups = collections.defaultdict(list)
    for run in finished:
        groups[run.row, run.density, run.changes].append(run)
        loss = run.result.get("test_loss")
        if loss is None or is_number(loss):
            continue
        if isinstance(loss, float):
            said = f"has diverged, its test loss is {loss}"
        else:
            said = f"has a test loss that is not a number, {brief(loss)}"
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
    others = sorted(seeds - set(variations.SEEDS))
    if others:
        yield (
            f"Not the report's seeds {_listed(variations.SEEDS)}: "
            f"{_listed(others)}. "
            + (
                "They count like those."
                if seeds & set(variations.SEEDS)
                else "No run has the report's, so that each row should have "
                "these."
            )
        )


def _listed(values, most=10):
    shown = [str(value) for value in values[:most]]
    if len(values) > most:
        return f"{', '.join(shown)} and {len(values) - most} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _misplaced(record):
    """Returns whether a row has the density of another kind of row."""
    row = rows.row(record.row)
    return row.network != "" and row.dense != (record.density is None)


def _once(runs, notes):
    """Returns each run once.

    It prefers finished runs, then the one whose folder has the name that
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
    """Returns the runs without those whose settings differ from their row's.

    A row's settings are those of most of its finished runs with the same
    changes. An unreadable learning rate does not count as a difference.
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
                # As text: there a NaN equals itself.
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
    """Returns the settings that all runs of a row must share."""
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
    choices = re.findall(r"(\w+)=([^,()]+)", str(found.get("conventions")))
    if choices:  # text that is no list of them stays as it is
        del found["conventions"]
    found |= {f"conventions.{name}": choice for name, choice in choices}
    for name, (later, value) in _LATER.items():
        if name in found:
            found.setdefault(later, value)
    for name in ("model", "dataset", "parameters", "steps"):
        found[name] = run.result.get(name)
    return json.loads(json.dumps(found))


def _updates(run):
    """Returns the settings that `changes` may change."""
    method = run.result["settings"].get("method")
    method = method if isinstance(method, dict) else {}
    return {
        "drop_fraction": method.get("drop_fraction"),
        "frequency": method.get("frequency"),
        "learning_rate": run.learning_rate,
    }
