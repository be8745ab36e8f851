"""The commands that make a section again."""

import shlex

from rigl_keras._text import exact
from rigl_keras.experiments.protocol import variations
from rigl_keras.experiments.report import summaries
from rigl_keras.experiments.report.cells import Context

__all__ = ["has_own_runs", "of", "training"]

_OF_ALL = ("differences", "costs", "curves", "runs")


def has_own_runs(name: str) -> bool:
    """Returns whether a section is of runs that others do not show.

    Args:
        name: One of `contents.NAMES`.
    """
    return name not in (*_OF_ALL, "flops")


def training(name: str) -> str:
    """Returns what trains the runs of a section, without its options.

    Args:
        name: One of `contents.NAMES`.
    """
    if name == "tuning":
        return "bin/tune updates"
    return f"bin/reproduce {'figure1' if name in _OF_ALL else name}"


def of(context: Context, name: str) -> list[str]:
    """Returns the commands that make a section again.

    Args:
        context: What each section needs.
        name: One of `contents.NAMES`.
    """
    found = context.records
    shown = f"bin/report {name} --preset={found.preset}"
    if not has_own_runs(name):
        return [shown]
    if name == "methods":
        targets = _targets(found)
    else:
        targets = {training(name): [()]}
        if name in ("figure1", "figure1c", "cifar100"):
            targets = {training(name): _variants(found)}
    return [
        *(
            " ".join([command, *_flags(context, command, changes)])
            for command, variants in targets.items()
            for changes in variants
        ),
        shown,
    ]


def _flags(context, command, changes):
    found = context.records
    flags = [f"--preset={found.preset}"]
    own = {run.density for run in found.finished if run.changes == changes}
    own -= {None}
    shared = summaries.densities(found, {run.gin for run in found.finished})
    at = [density for density in shared if density in own] or sorted(own)
    # What the target has by itself need not be said.
    by_itself = context.comparable or command.endswith((" methods", "updates"))
    if at and not by_itself and tuple(at) != variations.DENSITIES:
        flags.append(f"--densities={','.join(map(exact, at))}")
    seeds = summaries.seeds(found)
    if seeds != variations.SEEDS:
        flags.append(f"--seeds={','.join(map(str, seeds))}")
    if not command.endswith(" methods"):
        flags += [
            f"--gin_bindings={shlex.quote(f'{name} = {exact(value)}')}"
            for name, value in changes
        ]
    return flags


def _variants(found):
    """Returns the changes of runs that are of no search, the fewest first."""
    return sorted(
        {run.changes for run in found.finished if not summaries.is_trial(run)},
        key=lambda changes: (len(changes), changes),
    )


def _targets(found):
    """Returns `{command: variants}` of the rows of all methods."""
    later = set(variations.METHODS) - set(variations.FIGURE_1)
    rows = {run.gin for run in found.finished}
    of_later = [run.changes for run in found.finished if run.gin in later]
    variants = [v for v in _variants(found) if v not in of_later]
    commands = {}
    if rows & set(variations.FIGURE_1) and variants:
        commands["bin/reproduce figure1"] = variants
    if of_later:
        commands["bin/reproduce methods"] = [of_later[0]]
    if any(row.endswith("_resnet50") for row in rows):
        commands["bin/reproduce cifar100"] = [()]
    return commands
