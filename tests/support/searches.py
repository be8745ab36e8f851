"""Small searches of bin/tune, in which nothing is trained, and their checks."""

import json
import time

import pytest

from rigl_keras.experiments.reproduction import plans
from rigl_keras.experiments.reproduction.results import Results
from rigl_keras.experiments.tuning.search import Search
from rigl_keras.experiments.tuning.studies import Study

SMALL = plans.Preset("small")
ROW = "rigl_erk_wrn"
SEEDS = (0, 1)


def searched(**options):
    """Returns a search of 12 trials, two seeds each, with other options."""
    options = {"seeds": SEEDS, "trials": 12, **options}
    return Search(ROW, SMALL, 0.1, **options)


def study_of(results, found):
    """Returns the study of a search, in a folder of results."""
    return Study(
        results.path / "studies" / found.name,
        space=found.space,
        about=found.about,
        seed=found.sampler_seed,
    )


def begun(tmp_path, **options):
    """Returns a search, its study, which has begun, and a folder of results."""
    results = Results(tmp_path, "small")
    found = searched(**options)
    study = study_of(results, found)
    study.begin()
    return found, study, results


def accuracy(run):
    """Returns a run's accuracy, best at drop fraction 0.4 and 200 steps."""
    changes = dict(run.changes)
    drop = changes.get("UPDATE_FRACTION", 0.3)
    steps = changes.get("UPDATE_FREQUENCY", 50)
    off = (drop - 0.4) ** 2 + ((steps - 200) / 1000) ** 2
    return 0.9 - off + 0.001 * run.seed


def write_result(run, results):
    """Writes the files of a run that has finished."""
    folder = results.folder(run) / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.gin").write_text(run.configure())
    result = {
        "validation_accuracy": accuracy(run),
        "test_accuracy": accuracy(run) - 0.01,
    }
    unfinished = folder / "unfinished"
    unfinished.write_text(json.dumps(result))
    unfinished.replace(folder / "result.json")


class Trainer:
    """Replaces `train_missing`, and records its calls."""

    def __init__(self, fails=lambda run: False, seconds=0.0):
        self.trained = []
        self._fails, self._seconds = fails, seconds

    def __call__(self, runs, results, *, progress, data_dir):
        failed = {}
        for run in runs:
            if results.finished(run):
                continue
            with results.claim(run) as claim:
                if claim is None:  # a child of a killed process still has it
                    time.sleep(0.01)
                    return self(runs, results, progress=progress, data_dir="")
                progress.start(run)
                time.sleep(self._seconds)
                self.trained.append(run)
                reason = "no luck" if self._fails(run) else None
                if reason:
                    failed[run] = reason
                else:
                    write_result(run, results)
                progress.finish(run, seconds=1.0, failure=reason)
        return failed


def settings(study):
    """Returns all settings, in the order of their trials."""
    return [tuple(study.params(t).values()) for t in study.trials()]


def states(study):
    """Returns how each trial ended, in the order of the trials."""
    return [trial.state.name for trial in study.trials()]


def check_finished(study, found, results, trials):
    """Checks that all trials are finished, each once, with their runs."""
    assert set(states(study)) <= {"COMPLETE", "PRUNED"}
    assert len(states(study)) == len(set(settings(study))) == trials
    for trial in study.trials():
        runs = found.runs(**study.params(trial))
        if trial.state.name == "PRUNED":
            runs = runs[: len(trial.intermediate_values)]
        assert all(results.finished(run) for run in runs)
        mean = sum(map(accuracy, runs)) / len(runs)
        assert trial.value == pytest.approx(mean)
    assert not list(study.path.glob("trial-*"))  # claims
