"""Searches RigL's hyperparameters, as section 5.3 of the report does.

    bin/tune updates --preset=small --distribution=erk --density=0.1
    bin/tune learning_rate --preset=small --distribution=erk --density=0.1

`updates` searches the drop fraction and the frequency of mask updates: 15
trials of Optuna's TPE sampler, whose objective is the validation accuracy,
averaged over 3 seeds. `learning_rate` is the grid of Figure 2.

Frequencies are given in steps of the report's runs, whose own is 100, and
scaled to those of the preset.

The report finishes each trial. Here one is cut before its next seed if the
best mean that it has had is in the lowest quarter of what the complete trials
had after as many seeds, once 5 are complete; --noprune finishes all.

To share the work start the command again, in another terminal or on another
machine that sees the same --results_dir. Whatever is killed, there are as many
trials in the end. One with a run that fails counts as a trial, and is begun
again by the next command.
"""

import dataclasses
import fnmatch
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import tqdm
from absl import app, flags, logging
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

import gin
from rigl_keras import arguments
from rigl_keras.experiments import costs, data, exits, plans, published
from rigl_keras.experiments.plans import Preset, Run
from rigl_keras.experiments.reproduce import check_data, numbers, reproduce
from rigl_keras.experiments.results import Results
from rigl_keras.experiments.rows import exact
from rigl_keras.experiments.studies import Study
from rigl_keras.experiments.work import Progress, work_off
from rigl_keras.sparsify import aligned
from rigl_keras.writing import DiskFullError

__all__ = [
    "DISTRIBUTIONS",
    "SUBJECTS",
    "Search",
    "TrialProgress",
    "learning_rate",
    "main",
    "search",
    "updates",
]

SUBJECTS = ("updates", "learning_rate")
# The rows of Table 4, by the distribution of their density.
DISTRIBUTIONS = {"uniform": "rigl_uniform_wrn", "erk": "rigl_erk_wrn"}

_REFERENCE = (0.3, 100)  # drop fraction and frequency of the paper
_STEP = 0.001  # of the drop fraction: Table 4 has three digits
_WAIT = 2.0  # seconds between looks at trials of others
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "cut",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclasses.dataclass(frozen=True)
class Search:
    """What `updates` searches, and by what.

    Args:
        row: The gin file, one of `DISTRIBUTIONS`' values.
        preset: How large the experiment is.
        density: Fraction of the weights kept, in (0, 1].
        seeds: Seeds that a trial's accuracy is averaged over.
        trials: Settings to try.
        drop_fraction: Lowest and highest, in (0, 1], to three digits.
        frequency: Lowest, highest and step, in steps of the report's runs.
        sampler_seed: Seed of the sampler.

    Raises:
        ValueError: An argument is out of range, or the preset is not made
            for the row.
    """

    row: str
    preset: Preset
    density: float
    _: dataclasses.KW_ONLY
    seeds: tuple[int, ...] = plans.SEEDS
    trials: int = 15
    drop_fraction: tuple[float, ...] = (0.1, 0.6)
    frequency: tuple[int, ...] = (50, 1_000, 50)
    sampler_seed: int = 0

    def __post_init__(self):
        _check_runs(self.row, self.preset, self.density, self.seeds)
        arguments.integer("--trials", self.trials, at_least=1)
        arguments.integer("--sampler_seed", self.sampler_seed, at_least=0)
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
                f"{_commas(low_high)}."
            )
        good = len(self.frequency) == 3
        if good:
            low, high, step = self.frequency
            good = 0 < low <= high and step > 0 and (high - low) % step == 0
        if not good:
            raise ValueError(
                "--frequency takes the lowest, the highest and the step, whole "
                "numbers above 0 such as 50,1000,50, and the highest is some "
                f"steps above the lowest. Received: {_commas(self.frequency)}."
            )
        steps = self.steps(self.runs(low_high[0], low)[0])
        if steps < 1:
            raise ValueError(
                f"--frequency={low} is in steps of the report's runs, and less "
                f"than one step of the preset {self.preset.name!r}. Pass a "
                "higher lowest one."
            )

    @property
    def name(self) -> str:
        """The name of its study."""
        return f"updates-{self.row}-density{exact(self.density)}"

    @property
    def space(self) -> dict:
        """What the sampler draws from."""
        low, high, step = self.frequency
        return {
            "drop_fraction": FloatDistribution(*self.drop_fraction, step=_STEP),
            "frequency": IntDistribution(low, high, step=step),
        }

    @property
    def about(self) -> dict[str, str]:
        """What a study cannot be continued without, by flag."""
        return {
            "drop_fraction": _commas(self.drop_fraction),
            "frequency": _commas(self.frequency),
            "seeds": _commas(self.seeds),
            "sampler_seed": str(self.sampler_seed),
        }

    def runs(self, drop_fraction: float, frequency: int) -> list[Run]:
        """Returns the runs of a setting, one for each seed."""
        # The sampler's 0.19700000000000001 is 0.197.
        changes = plans.updates_of(round(drop_fraction, 3), frequency)
        return _runs(self.row, self.preset, self.density, self.seeds, changes)

    def reference(self) -> list[Run]:
        """Returns the runs that the optimum is compared with."""
        return self.runs(*_REFERENCE)

    def steps(self, run: Run) -> int:
        """Returns the frequency of a run, in its own steps."""
        run.configure()
        return gin.query_parameter("UPDATE_FREQUENCY/gin.macro.value")


class TrialProgress(Progress):
    """What `search` tells of its work; this one keeps it to itself."""

    def begin(self, trial: Trial) -> None:
        """A trial is begun."""

    def end(self, trial: Trial, failure: str | None = None) -> None:
        """A trial is complete, or cut, or has failed."""

    def idle(self, trials: Sequence[FrozenTrial]) -> None:
        """Others work on these trials, and nothing else is left."""


def search(
    searched: Search,
    study: Study,
    results: Results,
    *,
    prune: bool = True,
    train: Callable[..., dict[Run, str]] = work_off,
    progress: TrialProgress | None = None,
    data_dir: str | None = None,
) -> dict[Run, str]:
    """Tries settings until there are as many trials as wanted.

    When all have been begun this waits for those of others, and takes over
    what they leave.

    Args:
        searched: What is searched.
        study: Its study, which has begun.
        results: Where runs are kept.
        prune: Whether hopeless trials are cut, as `Study.is_hopeless` says.
        train: Trains runs that are missing and returns those that failed, as
            `work_off` does.
        progress: Is told what happens.
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
    """Trains the runs of a trial; returns the one that failed, if one did."""
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


@dataclasses.dataclass(frozen=True)
class _Cost:
    """What is left of a search, at most: cut trials are shorter."""

    runs: int
    flops: float  # of a run
    seconds: float  # of a run


def _cost_left(searched, study, results):
    """Returns the cost of the trials to do, and of the reference's runs.

    A run costs what the reference's does: its frequency moves FLOPs by a
    percent or two, and the time not even that.
    """
    trials = study.trials()
    wanted = set(searched.reference())
    for trial in trials:
        if trial.state not in _ENDED:
            wanted |= set(searched.runs(**study.params(trial)))
    missing = sum(not results.finished(run) for run in wanted)
    to_begin = max(searched.trials - len(trials), 0) * len(searched.seeds)
    searched.reference()[0].configure()
    cost = costs.planned()
    return _Cost(
        runs=missing + to_begin,
        flops=cost.total_flops,
        seconds=cost.steps * costs.seconds_of_step(cost.network),
    )


def _plan(searched, study, results):
    """Returns what is done and to do, and what it costs."""
    states = [trial.state for trial in study.trials()]
    ended = sum(state in _ENDED for state in states)
    left = _cost_left(searched, study, results)
    low, high, step = searched.frequency
    own = searched.steps(searched.reference()[0])
    rows = [
        ("row", f"{searched.row}, density {exact(searched.density)}"),
        ("preset", searched.preset.name),
        ("drop fraction", " to ".join(map(str, searched.drop_fraction))),
        (
            "frequency",
            f"{low} to {high} by {step}, in steps of the report's runs; 100 "
            f"are {own} here",
        ),
        (
            "trials",
            f"{searched.trials}, each of seeds {_commas(searched.seeds)}: "
            f"{ended} finished, {max(searched.trials - ended, 0)} to do",
        ),
        (
            "cost",
            f"at most {left.runs} runs, with the reference's: "
            f"{left.runs * left.flops:.2e} FLOPs, about "
            f"{left.runs * left.seconds / 3600:.1f} h in one process here",
        ),
    ]
    return "\n".join(line.rstrip() for line in aligned(rows, left=2))


class _Bar(TrialProgress):
    """A progress bar over trials, with the time that is left."""

    def __init__(self, searched, study, results):
        self._searched, self._study = searched, study
        self._results = results
        self._pace = []  # seconds taken over seconds estimated, by run
        self._begun = 0.0  # part of a run that was trained before
        self._epoch = None
        self._bar = tqdm.tqdm(
            total=searched.trials,
            bar_format="{n_fmt}/{total_fmt} trials |{bar:20}| {elapsed}{desc}",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._left()

    def begin(self, trial):
        self._say(f"trial {trial.number}: {self._setting(trial.params)}")

    def end(self, trial, failure=None):
        (ended,) = [t for t in self._study.trials() if t.number == trial.number]
        if failure is not None:
            self._say(f"trial {trial.number} FAILED: {failure}")
            return
        says = "cut" if ended.state == TrialState.PRUNED else "complete"
        self._say(
            f"trial {trial.number} {says}: validation accuracy "
            f"{ended.value:.2%}; {self._left()} left"
        )

    def idle(self, trials):
        others = ", ".join(str(trial.number) for trial in trials)
        self._left(f"waiting for trials of others: {others}")

    def start(self, run):
        self._epoch = None
        self._begun = self._part(run, self._results.epochs(run))

    def epoch(self, run, epochs):
        if epochs != self._epoch:
            self._epoch = epochs
            self._left(f"seed {run.seed}: epoch {epochs + 1}")

    def finish(self, run, *, seconds, failure):
        if failure is None:
            trained = max(1 - self._begun, 0.01)
            self._pace.append(seconds / trained / self._seconds(run))

    def wait(self, runs):
        self._left(f"waiting for {runs[0].name}, which others train")

    def close(self):
        self._bar.close()

    def _setting(self, params):
        run = self._searched.runs(**params)[0]
        return (
            f"drop fraction {params['drop_fraction']:.3f}, frequency "
            f"{params['frequency']} ({self._searched.steps(run)} steps)"
        )

    def _part(self, run, epochs):
        run.configure()
        return min(epochs / costs.planned().epochs, 1.0)

    def _seconds(self, run):
        run.configure()
        cost = costs.planned()
        return max(cost.steps * costs.seconds_of_step(cost.network), 1e-9)

    def _say(self, line):
        # Above the bar, where there is one.
        tqdm.tqdm.write(line)
        sys.stdout.flush()

    def _left(self, doing=""):
        """Shows and returns the time left, at the pace of what is done."""
        left = _cost_left(self._searched, self._study, self._results)
        states = [trial.state for trial in self._study.trials()]
        at_work = max(states.count(TrialState.RUNNING), 1)
        pace = statistics.fmean(self._pace) if self._pace else 1.0
        time_left = tqdm.tqdm.format_interval(
            pace * left.runs * left.seconds / at_work
        )
        self._bar.n = sum(state in _ENDED for state in states)
        self._bar.set_description_str(f"<{time_left}  {doing}")
        return time_left


def updates(
    searched: Search,
    results: Results,
    *,
    prune: bool = True,
    train: Callable[..., dict[Run, str]] = work_off,
    data_dir: str | None = None,
    dry_run: bool = False,
) -> dict[Run, str]:
    """Shows what a search will cost, makes it and shows what it found.

    Args:
        searched: What is searched.
        results: Where runs and the study are kept.
        prune: Whether hopeless trials are cut.
        train: Trains runs that are missing, as in `search`.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.
        dry_run: Whether the plan is shown, and nothing trained.

    Returns:
        `{run: reason}` of the runs that failed.

    Raises:
        ValueError: The study was made with something else, or a run has a
            result of another configuration.
    """
    study = Study(
        results.path / "studies" / searched.name,
        space=searched.space,
        about=searched.about,
        seed=searched.sampler_seed,
    )
    print(f"Study: {study.path}")
    print(_plan(searched, study, results), flush=True)
    failed = {}
    if not dry_run:
        study.begin()
        bar = _Bar(searched, study, results)
        try:
            failed = search(
                searched,
                study,
                results,
                prune=prune,
                train=train,
                progress=bar,
                data_dir=data_dir,
            )
            failed |= train(
                searched.reference(),
                results,
                progress=bar,
                data_dir=data_dir,
            )
        finally:
            bar.close()
        _tell_failures(failed, results)
    if study.trials():
        print(f"\n{_trial_table(searched, study, results)}")
        print(f"\n{_table_4(searched, study, results)}")
    return failed


def learning_rate(
    row: str,
    preset: Preset,
    density: float,
    results: Results,
    *,
    seeds: Sequence[int] = plans.SEEDS,
    data_dir: str | None = None,
    dry_run: bool = False,
) -> dict[Run, str]:
    """Trains the grid of Figure 2 at one density and shows what is best.

    Args:
        row: The gin file, one of `DISTRIBUTIONS`' values.
        preset: How large the experiment is.
        density: Fraction of the weights kept, in (0, 1].
        results: Where runs are kept.
        seeds: Seeds that accuracies are averaged over.
        data_dir: Folder of prepared data sets, over TFDS_DATA_DIR.
        dry_run: Whether the plan is shown, and nothing trained.

    Returns:
        `{run: reason}` of the runs that failed.

    Raises:
        ValueError: An argument is out of range, or a run has a result of
            another configuration.
    """
    _check_runs(row, preset, density, seeds)
    grid = {}
    for drop_fraction, frequency in plans.UPDATES:
        for rate in plans.LEARNING_RATES:
            changes = (
                *plans.updates_of(drop_fraction, frequency),
                *plans.learning_rate_of(rate),
            )
            grid[rate, drop_fraction, frequency] = _runs(
                row, preset, density, seeds, changes
            )
    runs = [run for same in zip(*grid.values(), strict=True) for run in same]
    failed = reproduce(runs, results, data_dir=data_dir, dry_run=dry_run)
    rows = []
    for setting, group in grid.items():
        validation, test, known = _accuracies(group, results)
        cells = (*map(str, setting), _mean(validation), _mean(test), known)
        if validation:
            all_seeds = len(validation) == len(seeds)
            rows.append(((all_seeds, statistics.fmean(validation)), cells))
    if rows:
        rows.sort(reverse=True)
        head = (
            "learning rate",
            "drop fraction",
            "frequency",
            "validation",
            "test",
            "seeds",
        )
        lines = aligned([head, *(cells for _, cells in rows)], left=0)
        print("\n" + "\n".join(lines))
        (all_seeds, accuracy), (rate, fraction, frequency, *_) = rows[0]
        if all_seeds:
            print(
                f"\nBest of {len(rows)} of {len(grid)} settings by validation "
                f"accuracy, {accuracy:.2%}: learning rate {rate}, with drop "
                f"fraction {fraction} and frequency {frequency}."
            )
    return failed


def _check_runs(row, preset, density, seeds):
    """Raises ValueError for runs that cannot be."""
    arguments.number(
        "--density",
        density,
        above=0,
        at_most=1,
        rule="must be a fraction of the weights kept, in (0, 1]",
    )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            "--seeds takes one or more, each once, such as 0,1,2. Received: "
            f"{_commas(seeds) or 'none'}."
        )
    for seed in seeds:
        arguments.integer("--seeds", seed, at_least=0)
    if not fnmatch.fnmatch(row, preset.rows):
        raise ValueError(
            f"The preset {preset.name!r} is made for {preset.rows}, and not "
            f"for {row}. Pass --preset=full."
        )
    Run(row, preset, density, seed=0).configure()
    settings = gin.get_bindings("train")
    recipe = data.DATASETS[settings["dataset"]]
    if not settings.get("validation", recipe.validation):
        raise ValueError(
            f"The preset {preset.name!r} holds out no examples, and settings "
            "are compared by their validation accuracy. Take "
            "train.validation out of it."
        )


def _runs(row, preset, density, seeds, changes):
    return [
        plans.with_changes(Run(row, preset, density, seed), changes)
        for seed in seeds
    ]


def _accuracies(runs, results):
    """Returns validation and test accuracies of finished runs, their seeds."""
    finished = [run for run in runs if results.finished(run)]
    found = [results.result(run) for run in finished]
    return (
        [result["validation_accuracy"] for result in found],
        [result["test_accuracy"] for result in found],
        ",".join(str(run.seed) for run in finished),
    )


def _mean(accuracies):
    """Returns a mean and, of several, the standard deviation, in percent."""
    if not accuracies:
        return "-"
    mean = f"{100 * statistics.fmean(accuracies):.2f}"
    if len(accuracies) == 1:
        return mean
    return f"{mean} +- {100 * statistics.stdev(accuracies):.2f}"


def _trial_table(searched, study, results):
    """Returns all trials, the best first."""
    ranks = list(_STATES)
    trials = sorted(
        study.trials(),
        key=lambda t: (ranks.index(t.state), -(t.value or 0), t.number),
    )
    rows = [
        (
            "trial",
            "state",
            "drop fraction",
            "frequency",
            "steps",
            "validation",
            "test",
            "seeds",
        )
    ]
    for trial in trials:
        params = study.params(trial)
        runs = searched.runs(**params)
        validation, test, seeds = _accuracies(runs, results)
        rows.append(
            (
                str(trial.number),
                _STATES[trial.state],
                f"{params['drop_fraction']:.3f}",
                str(params["frequency"]),
                str(searched.steps(runs[0])),
                _mean(validation),
                _mean(test),
                seeds or "-",
            )
        )
    lines = aligned(rows, left=2)
    for trial in trials:
        if "failure" in trial.user_attrs and trial.state == TrialState.FAIL:
            lines.append(
                f"Trial {trial.number} failed, and is begun again by the next "
                f"command: {trial.user_attrs['failure'].strip()}"
            )
    return "\n".join(lines)


def _table_4(searched, study, results):
    """Returns the line of Table 4, here and as the report has it."""
    best = max(
        (t for t in study.trials() if t.state == TrialState.COMPLETE),
        key=lambda trial: trial.value,
        default=None,
    )
    if best is None:
        return "No trial is complete: there is no optimum yet."
    params = study.params(best)
    optimal = params["drop_fraction"], params["frequency"]
    reference, test, _ = _accuracies(searched.reference(), results)
    _, tuned, _ = _accuracies(searched.runs(*optimal), results)
    rows = [
        ("Table 4", "density", "reference", "test", "optimal", "test"),
        (
            f"{searched.row}, here",
            exact(searched.density),
            _pair(*_REFERENCE),
            _mean(test),
            _pair(*optimal),
            _mean(tuned),
        ),
    ]
    printed = {
        cell.optimal: cell
        for cell in published.cells("table4")
        if (cell.gin, cell.density) == (searched.row, searched.density)
    }
    if len(printed) == 2:
        rows.append(
            (
                "in the report",
                exact(searched.density),
                *_printed(printed[False]),
                *_printed(printed[True]),
            )
        )
    lines = aligned(rows, left=1)
    if len(reference) == len(searched.seeds):
        gain = 100 * (best.value - statistics.fmean(reference))
        lines.append(
            f"In validation accuracy the optimum is {gain:+.2f} points from "
            "the reference."
        )
    return "\n".join(lines)


def _printed(cell):
    return (
        _pair(cell.drop_fraction, cell.frequency),
        f"{cell.accuracy} +- {cell.std}",
    )


def _pair(drop_fraction, frequency):
    return f"{round(drop_fraction, 3):g}, {frequency}"


def _tell_failures(failed, results):
    for run, reason in failed.items():
        print(
            f"{run.name} failed: {reason.strip()}\n"
            f"  what it said: {results.folder(run) / 'log.txt'}",
            file=sys.stderr,
        )


def _commas(values):
    return ",".join(map(str, values))


def main() -> None:
    """Reads the command line and searches what it names."""
    preset = flags.DEFINE_string(
        "preset",
        plans.FULL,
        "full (the report's setting), small, or the path of a gin file that "
        "is read after the row's own.",
    )
    distribution = flags.DEFINE_string(
        "distribution",
        "erk",
        f"How density is spread: {', '.join(DISTRIBUTIONS)} (the report's "
        "Random is uniform).",
    )
    density = flags.DEFINE_float("density", 0.1, "Fraction of weights kept.")
    seeds = flags.DEFINE_list(
        "seeds", ["0", "1", "2"], "Seeds that accuracies are averaged over."
    )
    of_updates = [
        flags.DEFINE_integer("trials", 15, "Settings that `updates` tries."),
        flags.DEFINE_list(
            "drop_fraction", ["0.1", "0.6"], "Lowest and highest."
        ),
        flags.DEFINE_list(
            "frequency",
            ["50", "1000", "50"],
            "Lowest, highest and step, in steps of the report's runs.",
        ),
        flags.DEFINE_integer("sampler_seed", 0, "Seed of the TPE sampler."),
        flags.DEFINE_bool("prune", True, "Cut hopeless trials (see above)."),
    ]
    trials, drop_fraction, frequency, sampler_seed, prune = of_updates
    dry_run = flags.DEFINE_bool(
        "dry_run", False, "Show the plan and what there is, and stop."
    )
    results_dir = flags.DEFINE_string(
        "results_dir", "results", "Folder of all results."
    )
    data_dir = flags.DEFINE_string(
        "data_dir", None, "Folder of prepared data sets, over TFDS_DATA_DIR."
    )

    def tune(subject):
        if distribution.value not in DISTRIBUTIONS:
            raise ValueError(
                f"--distribution must be one of {', '.join(DISTRIBUTIONS)}. "
                f"Received: {distribution.value!r}."
            )
        of_runs = (
            DISTRIBUTIONS[distribution.value],
            Preset(preset.value),
            density.value,
        )
        chosen = numbers("seeds", int, seeds.value)
        needed = [] if dry_run.value else [Run(*of_runs, seed=0)]
        options = {"data_dir": data_dir.value, "dry_run": dry_run.value}
        if subject == "updates":
            searched = Search(
                *of_runs,
                seeds=chosen,
                trials=trials.value,
                drop_fraction=numbers(
                    "drop_fraction", float, drop_fraction.value
                ),
                frequency=numbers("frequency", int, frequency.value),
                sampler_seed=sampler_seed.value,
            )
            check_data(needed, data_dir=data_dir.value)
            results = Results(results_dir.value, searched.preset.folder)
            return updates(searched, results, prune=prune.value, **options)
        unused = [flag.name for flag in of_updates if flag.present]
        if unused:
            raise ValueError(
                "learning_rate is a grid, which has none of the search's "
                f"flags. Received: --{', --'.join(unused)}. Leave them out."
            )
        _check_runs(*of_runs, chosen)
        check_data(needed, data_dir=data_dir.value)
        results = Results(results_dir.value, of_runs[1].folder)
        return learning_rate(*of_runs, results, seeds=chosen, **options)

    def run(argv):
        logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) != 2 or argv[1] not in SUBJECTS:
                raise ValueError(
                    f"Pass one of {', '.join(SUBJECTS)}. Received: "
                    f"{' '.join(argv[1:]) or 'none'}."
                )
            failed = tune(argv[1])
        except (
            ValueError,
            data.DatasetUnavailableError,
            DiskFullError,
        ) as error:
            print(f"tune: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(
                "\ntune: interrupted; the same command goes on from the last "
                "epoch.",
                file=sys.stderr,
            )
            sys.exit(130)
        if failed:
            sys.exit(1)

    app.run(exits.one_line("tune", run))


if __name__ == "__main__":
    main()
