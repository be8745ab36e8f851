"""A search by Optuna that processes share, and that outlives them.

    results/small/studies/updates-rigl_erk_wrn-density0.1/
        journal.log   Optuna's record of the trials
        journal.lock  locked while a process writes the journal
        study.lock    locked while a process chooses what to do next
        trial-7       locked while a process works on trial 7

The kernel holds all locks, and frees them when their process is killed. An
abandoned trial is marked as failed. Its parameters go back into the queue as a
new trial that names it: no setting is lost or counted twice.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage, journal
from optuna.trial import FrozenTrial, Trial, TrialState

from rigl_keras._files import DiskFullError, is_locked, lock, naming
from rigl_keras.experiments.reproduction.results import ROOM

__all__ = ["Study", "end_with_a_line"]

_AGAIN = "again"  # attribute of a trial: the number of the trial it repeats
_ABOUT = "about"  # attribute of a study: the settings it was made with
# A trial with more seeds to go is cut if its best mean so far is in the lowest
# quarter of those of the complete trials after as many seeds.
_KEPT = 75.0  # percent of the complete trials
_BEFORE = 5  # complete trials before any trial is cut


class Study:
    """A search for the parameters of the highest value, in a folder.

    Args:
        path: The folder, which is made by `begin`.
        space: The search space, `{name: distribution}`.
        about: The settings of the study, `{flag: text}`. Other commands must
            have the same.
        seed: Seed of the sampler.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        space: Mapping[str, BaseDistribution],
        about: Mapping[str, str],
        seed: int = 0,
    ):
        self.path = Path(path)
        self._space, self._about, self._seed = dict(space), dict(about), seed
        self._study: optuna.Study | None = None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if (self.path / "journal.log").exists():
            self._open(create=False)

    def begin(self) -> None:
        """Makes the study, if there is none, and queues failed trials.

        Raises:
            ValueError: The folder cannot be written, or holds a study with
                other settings.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._open(create=True)
                for trial in self.trials():
                    if trial.state == TrialState.FAIL:
                        self._queue(trial)
        except DiskFullError:
            raise
        except OSError as error:
            raise ValueError(
                f"The study {str(self.path)!r} cannot be written "
                f"({error.strerror}). Pass --results_dir with a folder that "
                "you can write, on a file system that has locks."
            ) from error

    def trials(self) -> list[FrozenTrial]:
        """Returns the trials, each setting once, in the order of numbers.

        If a setting was begun several times, its last trial counts.
        """
        if self._study is None:
            return []
        everything = self._study.get_trials()
        repeated = {trial.user_attrs.get(_AGAIN) for trial in everything}
        return [
            trial
            for trial in everything
            if trial.number not in repeated
            # Otherwise it was killed before it had parameters.
            and self._params(trial, everything) is not None
        ]

    def params(self, trial: FrozenTrial) -> dict:
        """Returns the parameters of a trial, even if it has not begun."""
        everything = self._opened.get_trials(deepcopy=False)
        return cast(dict, self._params(trial, everything))

    @contextlib.contextmanager
    def claim(self, trials: int) -> Iterator[Trial | None]:
        """Claims the next trial, until the end of the block.

        Args:
            trials: Number of trials of the study.

        Yields:
            A trial with its parameters, or None if all have begun. While some
            are `TrialState.RUNNING`, ask again: they become free if their
            process is killed.
        """
        with contextlib.ExitStack() as claimed:
            with self._locked():
                trial = self._next(trials)
                if trial is not None:
                    claimed.enter_context(lock(self._claim_of(trial.number)))
            yield trial

    def is_hopeless(self, trial: Trial) -> bool:
        """Returns whether to cut a trial, from its reports so far.

        It is cut if its best mean is in the lowest quarter of those of the
        complete trials after as many seeds, and at least 5 are complete.
        """
        return trial.should_prune()

    def finish(
        self,
        trial: Trial,
        *,
        value: float | None = None,
        failure: str | None = None,
    ) -> None:
        """Ends a claimed trial.

        Args:
            trial: The trial.
            value: Its value. None: it was cut, or failed.
            failure: Why it failed, or None.
        """
        state = TrialState.COMPLETE if value is not None else TrialState.PRUNED
        if failure is not None:
            state = TrialState.FAIL
            trial.set_user_attr("failure", failure)
        with self._locked():  # `_next` must not see half of this
            self._opened.tell(trial, value, state)
            self._claim_of(trial.number).unlink(missing_ok=True)

    @property
    def _opened(self) -> optuna.Study:
        """The study, after `begin`."""
        return cast(optuna.Study, self._study)

    def _open(self, *, create):
        """Opens the study. To create it, the caller must have its lock."""
        path = self.path / "journal.log"
        try:
            storage = JournalStorage(_Journal(path))
            if not storage.get_all_studies():
                if not create:
                    return
                optuna.create_study(
                    storage=storage,
                    study_name=self.path.name,
                    direction="maximize",
                )
            self._study = optuna.load_study(
                storage=storage,
                study_name=self.path.name,
                pruner=optuna.pruners.PercentilePruner(_KEPT, _BEFORE),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is not the journal of a study ({error}). Move "
                f"{str(self.path)!r} away: trained runs are kept."
            ) from error
        made = self._study.user_attrs.get(_ABOUT)
        if made is None:
            if create:
                self._study.set_user_attr(_ABOUT, self._about)
        elif made != self._about:
            other = {k: v for k, v in made.items() if self._about.get(k) != v}
            raise ValueError(
                f"The settings of a study cannot change. Received: "
                f"{_flags({k: self._about.get(k) for k in other})}, for "
                f"{str(self.path)!r}, which was made with {_flags(other)}. "
                "Pass these, or move that folder away: trained runs are kept."
            )

    def _locked(self):
        return lock(self.path / "study.lock")

    def _next(self, trials):
        """Returns the next trial. The caller must have the study's lock."""
        self._recover_abandoned()
        now = self.trials()
        waiting = sum(trial.state == TrialState.WAITING for trial in now)
        if len(now) - waiting >= trials:
            return None
        # The sampler is seeded by the number of settings. Unlike a trial's
        # number, it does not depend on which processes were killed.
        self._opened.sampler = _sampler(self._seed, len(now))
        return self._opened.ask(self._space)

    def _recover_abandoned(self):
        """Queues trials of killed processes again, and removes their files."""
        for trial in self.trials():
            if trial.state == TrialState.RUNNING and not self._claimed(
                trial.number
            ):
                # In this order: if killed in between, it is not queued again,
                # since another trial repeats it.
                self._queue(trial)
        for trial in self._opened.get_trials(states=[TrialState.RUNNING]):
            if not self._claimed(trial.number):
                self._opened.tell(trial.number, state=TrialState.FAIL)
        for path in self.path.glob("trial-*"):  # from killed processes
            number = path.name.removeprefix("trial-")
            if number.isdecimal() and not self._claimed(int(number)):
                path.unlink(missing_ok=True)

    def _queue(self, trial):
        self._opened.enqueue_trial(
            self.params(trial), user_attrs={_AGAIN: trial.number}
        )

    def _params(self, trial, everything):
        """Returns the parameters of a trial, or of the one it repeats."""
        if trial.params.keys() == self._space.keys():
            return trial.params
        repeats = trial.user_attrs.get(_AGAIN)
        if repeats is None:
            return None
        return self._params(everything[repeats], everything)

    def _claim_of(self, number):
        return self.path / f"trial-{number}"

    def _claimed(self, number):
        """Returns whether a process has a trial. The caller has the lock."""
        return is_locked(self._claim_of(number))


class _Journal(journal.JournalFileBackend):
    """A journal that names its file if the disk is full."""

    def __init__(self, path):
        # Any: Optuna annotates only its own locks.
        journal_lock: Any = _JournalLock(path)
        super().__init__(str(path), lock_obj=journal_lock)
        self._path = path

    def append_logs(self, logs):
        with naming(self._path, advice=ROOM):
            super().append_logs(logs)


class _JournalLock:
    """The lock on a journal; it removes a killed process's partial line.

    Optuna's own locks are files, which a killed process leaves behind: others
    wait half a minute, or for ever if the journal's path is relative.
    """

    def __init__(self, path):
        self._path = path
        self._lock = contextlib.ExitStack()

    def acquire(self):
        self._lock.enter_context(lock(self._path.with_suffix(".lock")))
        end_with_a_line(self._path)
        return True

    def release(self):
        self._lock.close()


def end_with_a_line(path: Path) -> None:
    """Removes a partial last line, so that a line can be appended."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _sampler(seed, settings):
    """Returns the report's sampler, of Bergstra et al. (2011).

    It draws each parameter independently, as Optuna did then. Running trials
    count as bad ones, so that processes try different settings.
    """
    seed = np.random.SeedSequence([seed, settings]).generate_state(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=int(seed), multivariate=False, constant_liar=True
        )


def _flags(values):
    return " ".join(f"--{name}={value}" for name, value in values.items())
