"""A search: its trials, run one after another."""

import dataclasses
import fnmatch
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

import gin
from rigl_keras import _checks
from rigl_keras._text import exact
from rigl_keras.experiments.data import recipe_of
from rigl_keras.experiments.protocol import variations
from rigl_keras.experiments.protocol.variations import Changes
from rigl_keras.experiments.reproduction import plans
from rigl_keras.experiments.reproduction.plans import Preset, Run
from rigl_keras.experiments.reproduction.progress import Progress
from rigl_keras.experiments.reproduction.results import Results
from rigl_keras.experiments.reproduction.workers import train_missing
from rigl_keras.experiments.tuning.studies import Study

__all__ = [
    "DISTRIBUTIONS",
    "ENDED",
    "REFERENCE",
    "Search",
    "TrialProgress",
    "check_runs",
    "with_commas",
    "runs_of",
    "search",
]

# The rows of Table 4, by the distribution of their density.
DISTRIBUTIONS = {"uniform": "rigl_uniform_wrn", "erk": "rigl_erk_wrn"}
REFERENCE = (0.3, 100)  # drop fraction and frequency of the paper
_STEP = 0.001  # of the drop fraction: Table 4 has three digits
_WAIT = 2.0  # seconds between checks of others' trials
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclasses.dataclass(frozen=True)
class Search:
    """The search of `updates`, and its settings.

    Args:
        row: The gin file, one of `DISTRIBUTIONS`' values.
        preset: How large the experiment is.
        density: Fraction of the weights kept, in (0, 1].
        seeds: Seeds for the mean accuracy of a trial.
        trials: Number of settings to try.
        drop_fraction: Lowest and highest, in (0, 1], to three digits.
        frequency: Lowest, highest and step, in steps of the report's runs.
        sampler_seed: Seed of the sampler.

    Raises:
        ValueError: An argument is out of range, or the preset does not fit the
            row.
    """

    row: str
    preset: Preset
    density: float
    _: dataclasses.KW_ONLY
    seeds: tuple[int, ...] = variations.SEEDS
    trials: int = 15
    drop_fraction: tuple[float, ...] = (0.1, 0.6)
    frequency: tuple[int, ...] = (50, 1_000, 50)
    sampler_seed: int = 0

    def __post_init__(self):
        check_runs(self.row, self.preset, self.density, self.seeds)
        _checks.integer("--trials", self.trials, at_least=1)
        _checks.integer("--sampler_seed", self.sampler_seed, at_least=0)
        low_high = self.drop_fraction
        digits = all(round(value, 3) == value for value in low_high)
        if not (
            len(low_high) == 2
            and digits
            and 0 < low_high[0] <= low_high[1] <= 1
        ):
            raise ValueError(
                "--drop_fraction takes the lowest and the highest, in (0, 1] "
                f"and to three digits, such as 0.1,0.6. Received: "
                f"{with_commas(low_high)}."
            )
        good = len(self.frequency) == 3
        if good:
            low, high, step = self.frequency
            good = 0 < low <= high and step > 0 and (high - low) % step == 0
        if not good:
            raise ValueError(
                "--frequency takes the lowest, the highest and the step, whole "
                "numbers above 0 such as 50,1000,50. The highest must be the "
                "lowest plus a number of steps. Received: "
                f"{with_commas(self.frequency)}."
            )
        steps = self.steps(self.runs(low_high[0], low)[0])
        if steps < 1:
            raise ValueError(
                f"--frequency={low} is in steps of the report's runs, and "
                f"below one step of the preset {self.preset.name!r}. Pass a "
                "higher lowest value."
            )

    @property
    def name(self) -> str:
        """The name of its study."""
        return f"updates-{self.row}-density{exact(self.density)}"

    @property
    def space(self) -> dict:
        """The space that the sampler draws from."""
        lowest, highest = self.drop_fraction
        low, high, step = self.frequency
        return {
            "drop_fraction": FloatDistribution(lowest, highest, step=_STEP),
            "frequency": IntDistribution(low, high, step=step),
        }

    @property
    def about(self) -> dict[str, str]:
        """The settings that a study must keep, by flag."""
        return {
            "drop_fraction": with_commas(self.drop_fraction),
            "frequency": with_commas(self.frequency),
            "seeds": with_commas(self.seeds),
            "sampler_seed": str(self.sampler_seed),
        }

    def runs(self, drop_fraction: float, frequency: int) -> list[Run]:
        """Returns the runs of a setting, one for each seed."""
        # The sampler's 0.19700000000000001 is 0.197.
        changes = plans.updates_of(round(drop_fraction, 3), frequency)
        return runs_of(self.row, self.preset, self.density, self.seeds, changes)

    def reference(self) -> list[Run]:
        """Returns the runs to compare the optimum with."""
        return self.runs(*REFERENCE)

    def steps(self, run: Run) -> int:
        """Returns the frequency of a run, in steps of that run."""
        run.configure()
        return gin.query_parameter("UPDATE_FREQUENCY/gin.macro.value")


class TrialProgress(Progress):
    """Receives the events of `search`; this class ignores them."""

    def begin(self, trial: Trial) -> None:
        """A trial begins."""

    def end(self, trial: Trial, failure: str | None = None) -> None:
        """A trial is complete, was cut, or failed."""

    def idle(self, trials: Sequence[FrozenTrial]) -> None:
        """Only these trials are left, and others work on them."""


def search(
    searched: Search,
    study: Study,
    results: Results,
    *,
    prune: bool = True,
    train: Callable[..., dict[Run, str]] = train_missing,
    progress: TrialProgress | None = None,
    data_dir: str | None = None,
) -> dict[Run, str]:
    """Tries settings until there are as many trials as wanted.

    When all trials have begun, this waits for those of others, and takes over
    any that they abandon.

    Args:
        searched: The search.
        study: Its study, which has begun.
        results: Where runs are kept.
        prune: Whether to cut hopeless trials (`Study.is_hopeless`).
        train: Trains runs that are missing and returns those that failed, as
            `train_missing` does.
        progress: Receives events.
        data_dir: Folder of prepared data sets.

    Returns:
        `{run: reason}` of the runs that failed here.

    Raises:
        ValueError: A run has a result of another configuration.
    """
    progress = progress or TrialProgress()
    failed: dict[Run, str] = {}
    while True:
        with study.claim(searched.trials) as trial:
            if trial is not None:
                failed |= _tried(
                    trial,
                    searched,
                    study,
                    results,
                    prune,
                    lambda run: train(
                        [run], results, progress=progress, data_dir=data_dir
                    ),
                    progress,
                )
                continue
        running = [t for t in study.trials() if t.state == TrialState.RUNNING]
        if not running:
            return failed
        progress.idle(running)
        time.sleep(_WAIT)


def _tried(trial, searched, study, results, prune, train, progress):
    """Trains the runs of a trial; returns the failed one, if any."""
    progress.begin(trial)
    accuracies = []
    for run in searched.runs(**trial.params):
        if accuracies and prune and not results.finished(run):
            if study.is_hopeless(trial):
                study.finish(trial)
                break
        failed = train(run)
        if failed:
            (reason,) = failed.values()
            study.finish(trial, failure=f"{run.name}: {reason}")
            progress.end(trial, reason)
            return failed
        accuracies.append(results.result(run)["validation_accuracy"])
        trial.report(statistics.fmean(accuracies), len(accuracies))
    else:
        study.finish(trial, value=statistics.fmean(accuracies))
    progress.end(trial)
    return {}


def check_runs(
    row: str, preset: Preset, density: float, seeds: Sequence[int]
) -> None:
    """Raises ValueError for impossible runs."""
    _checks.number(
        "--density",
        density,
        above=0,
        at_most=1,
        rule="must be a fraction of the weights kept, in (0, 1]",
    )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            "--seeds takes at least one seed, each once, such as 0,1,2. "
            f"Received: {with_commas(seeds) or 'none'}."
        )
    for seed in seeds:
        _checks.integer("--seeds", seed, at_least=0)
    if not fnmatch.fnmatch(row, preset.rows):
        raise ValueError(
            f"The preset {preset.name!r} is for {preset.rows}, not for "
            f"{row}. Pass --preset=full."
        )
    Run(row, preset, density, seed=0).configure()
    settings = gin.get_bindings("train")
    recipe = recipe_of(
        settings["dataset"],
        validation=settings.get("validation"),
        context=settings.get("context"),
    )
    if not recipe.validation:
        raise ValueError(
            f"The preset {preset.name!r} has no validation examples, but the "
            "search compares settings by validation accuracy. Remove "
            "train.validation from it."
        )


def runs_of(
    row: str,
    preset: Preset,
    density: float,
    seeds: Sequence[int],
    changes: Changes,
) -> list[Run]:
    """Returns the runs of a setting, one for each seed."""
    return [
        plans.with_changes(Run(row, preset, density, seed), changes)
        for seed in seeds
    ]


def with_commas(values: Iterable) -> str:
    return ",".join(map(str, values))
