"""The runs of each table and figure of the report.

A run is a gin file (a row of the report), a preset (how large the experiment
is), a density, a seed and, for some runs, changed values. Its name follows
from these, so that Table 2 and Figure 1 share runs, even if these were trained
on different machines.
"""

import dataclasses
import fnmatch
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import gin
from rigl_keras import _text
from rigl_keras.experiments.protocol import published, variations
from rigl_keras.experiments.protocol.rows import run_name
from rigl_keras.experiments.protocol.variations import (
    CIFAR100,
    DENSITIES,
    FIGURE_1,
    FIGURE_1C,
    FIGURE_4,
    FULL,
    LEARNING_RATES,
    METHODS,
    METHODS_AT_HALF,
    METHODS_DENSITIES,
    RIGL,
    RIGL_RESNET50,
    SEEDS,
    UPDATES,
    Changes,
)
from rigl_keras.experiments.reproduction import costs
from rigl_keras.experiments.runs import config, train_command

__all__ = [
    "Preset",
    "Run",
    "TARGETS",
    "learning_rate_of",
    "runs",
    "same_training_flops",
    "updates_of",
    "with_changes",
]


@dataclasses.dataclass(frozen=True)
class Preset:
    """How large the experiment is: the report's setting, or a smaller one.

    Args:
        name: `"full"`, a file of `gin/presets/` without its ending, or the
            path of a user's gin file. It is read after a row's file.

    Raises:
        ValueError: There is no such preset.
    """

    name: str = FULL

    def __post_init__(self):
        _ = self.path

    @property
    def path(self) -> Path | None:
        """The gin file, or None for the report's own setting."""
        if self.name == FULL:
            return None
        if self.name.endswith(".gin"):
            return config.find(self.name).resolve()
        folder = variations.GIN_FOLDER / "presets"
        path = folder / f"{self.name}.gin"
        if not path.is_file():
            known = sorted(p.stem for p in folder.glob("*.gin"))
            raise ValueError(
                f"preset must be {FULL}, {', '.join(known)} or the path of a "
                f"gin file. Received: preset={self.name!r}."
            )
        return path

    @property
    def folder(self) -> str:
        """The name of its folder among results."""
        return Path(self.name).stem if self.path else FULL

    @property
    def rows(self) -> str:
        """The gin files that it is made for, as a pattern.

        A preset that shrinks one network sets it with PRESET_ROWS.
        """
        return self._macro("PRESET_ROWS", "*")

    @property
    def methods_length(self) -> float:
        """The length of the runs of `methods`, relative to other runs.

        A preset with few epochs sets it with METHODS_LENGTH.
        """
        return self._macro("METHODS_LENGTH", 1)

    def _macro(self, name, default):
        """Returns the value of a macro of its file."""
        if self.path is None:
            return default
        config.parse([str(self.path)], [])
        if not config.has_macro(name):
            return default
        return gin.query_parameter(f"{name}/gin.macro.value")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a table or figure.

    Args:
        row: The gin file, without folder and ending.
        preset: How large the experiment is.
        density: Fraction of the weights kept, or None for a dense model.
        seed: The seed.
        changes: gin bindings over both files, `((name, value), ...)`.
    """

    row: str
    preset: Preset
    density: float | None
    seed: int
    changes: Changes = ()

    @property
    def name(self) -> str:
        """The name of its folder among results of the preset."""
        return run_name(self.row, self.density, self.seed, self.changes)

    @property
    def arguments(self) -> dict:
        """The arguments for `train_command.configure`."""
        files = [_file_of(self.row)]
        if self.preset.path is not None:
            files.append(str(self.preset.path))
        bindings = [f"{name} = {value!r}" for name, value in self.changes]
        source = self.source
        if source is not None:
            # Relative to this run's folder, so that results can be moved.
            folder = f"{source.name}/run"
            bindings += [
                f"train.masks_from = {folder!r}",
                f"train.weights_from = {folder!r}",
            ]
        return {
            "gin_files": files,
            "bindings": bindings,
            "seed": self.seed,
            "density": self.density,
        }

    @property
    def source(self) -> "Run | None":
        """The run whose masks this one starts with, or None."""
        config.parse([_file_of(self.row)], [])
        folder = gin.get_bindings("train").get("masks_from")
        if folder is None:
            return None
        return dataclasses.replace(self, row=Path(folder).name)

    def configure(self) -> str:
        """Configures gin for this run and returns the configuration."""
        train_command.configure(**self.arguments)
        return gin.config_str()

    def as_json(self) -> dict:
        """Returns what identifies the run, to keep beside its result."""
        return {
            "row": self.row,
            "preset": self.preset.folder,
            "density": self.density,
            "seed": self.seed,
            "changes": dict(self.changes),
        }


def updates_of(drop_fraction: float, frequency: int) -> Changes:
    """Returns bindings that change the mask updates of a row."""
    return (
        ("UPDATE_FRACTION", drop_fraction),
        ("UPDATE_FREQUENCY", frequency),
    )


def learning_rate_of(learning_rate: float) -> Changes:
    """Returns bindings that change the learning rate of a row."""
    return (("sgd.learning_rate", learning_rate),)


def same_training_flops(
    row: str, like: str, density: float, preset: Preset
) -> float:
    """Returns the density at which a row has the training FLOPs of another.

    Args:
        row: The gin file whose density is returned.
        like: The gin file of the other row.
        density: The density of the other row.
        preset: The `Preset` of both.

    Returns:
        The density, to three digits.
    """

    def ratio(row, density):
        Run(row, preset, density, seed=0).configure()
        return costs.planned().training_flops_ratio

    wanted = ratio(like, density)
    low, high = 0.0, 1.0
    for _ in range(20):  # the ratio rises with the density
        middle = (low + high) / 2
        if ratio(row, middle) < wanted:
            low = middle
        else:
            high = middle
    return float(f"{high:.3g}")


def _of_table(table):
    """The rows of a table, each at its densities in the table."""

    def wanted(preset, densities):
        found = {}
        for cell in published.cells(table):
            found.setdefault(cell.gin, {})[cell.density] = None
        for row, at in found.items():
            for density in densities or at:
                yield row, density, ()

    return wanted


def _grid(rows, at, changes=((),)):
    """Rows x densities x changes."""

    def wanted(preset, densities):
        return itertools.product(rows, densities or at, changes)

    return wanted


def _at_equal_flops(uniform, erk):
    """Uniform masks, and ERK masks of equal density and of equal FLOPs."""

    def wanted(preset, densities):
        # Skipped if the preset is for another network, as densities are slow.
        if not fnmatch.fnmatch(uniform, preset.rows):
            return
        for density in densities or DENSITIES[1:]:
            equal = same_training_flops(erk, uniform, density, preset)
            yield from [
                (uniform, density, ()),
                (erk, density, ()),
                (erk, equal, ()),
            ]

    return wanted


def _table_4(preset, densities):
    """The reference settings, and the report's optima for the full preset."""
    yield from _of_table("table4")(preset, densities)
    for cell in published.cells("table4"):
        at_all = not densities or cell.density in densities
        if cell.optimal and at_all and preset.path is None:
            drop_fraction = cast(float, cell.drop_fraction)
            changes = updates_of(drop_fraction, cast(int, cell.frequency))
            yield cell.gin, cell.density, changes


def _methods(preset, densities):
    """RigL, its relatives and pruning, and pattern 2:4 at density 0.5."""
    length = preset.methods_length
    changes = () if length == 1 else (("train.length", length),)
    yield ("dense_wrn", 1.0, changes)
    for row in METHODS:
        for density in densities or METHODS_DENSITIES:
            yield row, density, changes
    for row in METHODS_AT_HALF:
        yield row, 0.5, changes


_LEARNING_RATE_GRID = [
    (*updates_of(*updates), *learning_rate_of(rate))
    for updates in UPDATES
    for rate in LEARNING_RATES
]
# The tables and figures, each a function that yields row, density and changes.
TARGETS = {
    **{table: _of_table(table) for table in published.TABLES},
    "table4": _table_4,
    "figure1": _grid(FIGURE_1, DENSITIES),
    "figure1c": _grid(FIGURE_1C, DENSITIES),
    "cifar100": _grid(CIFAR100, DENSITIES),
    "figure2": _grid(RIGL, DENSITIES[1:], _LEARNING_RATE_GRID),
    "figure3": _at_equal_flops(*RIGL),
    "figure3b": _at_equal_flops(*RIGL_RESNET50),
    "figure4": _grid(FIGURE_4, (0.1, 0.2)),
    "methods": _methods,
}


def runs(
    target: str,
    *,
    preset: Preset,
    densities: Sequence[float] = (),
    seeds: Sequence[int] = (),
    rows: Sequence[str] = (),
    changes: Changes = (),
) -> list[Run]:
    """Returns the runs of a table or figure, each after those it needs.

    Args:
        target: One of `TARGETS`.
        preset: How large the experiment is.
        densities: Densities instead of the report's. Dense rows ignore them.
        seeds: Seeds instead of the report's 0, 1 and 2.
        rows: The rows to return, names or patterns such as `"rigl_*"`. Empty:
            all.
        changes: The user's gin bindings, over those of all runs.

    Returns:
        The runs, without duplicates, ordered by seed.

    Raises:
        ValueError: There is no such table or figure, the preset is not made
            for its rows, or a density or seed is out of range.
    """
    if target not in TARGETS:
        raise ValueError(
            f"A table or figure is one of {', '.join(TARGETS)}. Received: "
            f"{target!r}."
        )
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(
                f"Densities must be in (0, 1]. Received: {density!r}."
            )
    if any(seed < 0 for seed in seeds):
        raise ValueError(
            f"Seeds must be at least 0. Received: {', '.join(map(str, seeds))}."
        )
    if any(seed >= 2**32 for seed in seeds):  # NumPy takes no larger ones
        raise ValueError(
            f"Seeds must be below 2 ** 32. Received: "
            f"{', '.join(map(_text.brief, seeds))}."
        )
    pattern = preset.rows
    wanted = [
        (row, None if _is_dense(row) else density, (*own, *changes))
        for row, density, own in TARGETS[target](preset, densities)
        if fnmatch.fnmatch(row, pattern)
    ]
    if not wanted:
        raise ValueError(
            f"{target} has no row for the preset {preset.name!r}, which is "
            f"made for {pattern}. Pass --preset=full."
        )
    if rows:
        there = {row: None for row, _, _ in wanted}
        chosen = {r for p in rows for r in fnmatch.filter(there, p)}
        if not chosen:
            raise ValueError(
                f"{target} has no row {', '.join(rows)}. It has "
                f"{', '.join(there)}."
            )
        wanted = [each for each in wanted if each[0] in chosen]
    ordered: dict[Run, None] = {}
    for seed in seeds or SEEDS:
        for row, density, changed in wanted:
            run = with_changes(Run(row, preset, density, seed), changed)
            if run.source is not None:
                ordered[run.source] = None
            ordered[run] = None
    return list(ordered)


def with_changes(run: Run, changes: Changes) -> Run:
    """Returns a run with other values than its row has.

    Args:
        run: The run as its row has it.
        changes: The values, as `updates_of` and `learning_rate_of` return
            them. A frequency is in steps of the report's runs, and is scaled
            to the preset's.

    Returns:
        The run. Its name holds only values that differ from the row's.
    """
    return dataclasses.replace(run, changes=_different(run, changes))


def _file_of(row):
    """Returns the path of a row's file, whatever the current folder holds."""
    return str(variations.GIN_FOLDER / f"{row}.gin")


def _is_dense(row):
    config.parse([_file_of(row)], [])
    return gin.get_bindings("train").get("density", 0) is None


def _different(run, changes):
    """Returns the changes that differ from the row, in steps of the preset.

    A frequency is in steps of the report's runs, where the default is 100.
    """
    run.configure()
    found = []
    for name, value in dict(changes).items():  # the last of a name counts
        own = _own_value(name)
        if name == "UPDATE_FREQUENCY":
            if own is None:  # the row has no such updates
                continue
            value = round(value * own / 100)
        if value != own:
            found.append((name, value))
    return tuple(found)


def _own_value(name):
    """Returns the configured value of a binding, or None."""
    try:
        return gin.query_parameter(
            name if "." in name else f"{name}/gin.macro.value"
        )
    except ValueError:  # it is not bound
        return None
