"""A table of the state of runs, and of the processes that train them."""

from collections import Counter
from collections.abc import Sequence

from rigl_keras import _reading
from rigl_keras._text import aligned, brief
from rigl_keras.experiments.reproduction import costs, slurm
from rigl_keras.experiments.reproduction.plans import Run
from rigl_keras.experiments.reproduction.results import Results

__all__ = ["status_table"]


def status_table(runs: Sequence[Run], results: Results) -> str:
    """Returns a table of runs, and of the workers that SLURM has.

    A run is finished, in training, failed, interrupted (no process trains it,
    and it will continue after its last epoch) or waiting. SLURM tasks that
    train none of the runs have separate rows.

    Args:
        runs: The runs.
        results: Where they are kept.

    Raises:
        ValueError: A run has a result of another configuration.
        FailedError: Workers were submitted, but SLURM does not answer.
    """
    arrays = slurm.arrays(results.path)
    places = {f"task {t.name}": t for each in arrays for t in each.tasks}
    rows, failures = [], []
    for run in runs:
        state, worker, test = _state(run, results)
        if state == "failed":
            reason = brief(results.failure(run), 200)
            failures.append(f"{run.name} failed: {reason}")
        if worker in places:
            worker = f"{worker} {places.pop(worker).place}"
        run.configure()
        epochs = f"{results.epochs(run)}/{costs.planned_epochs()}"
        rows.append((run.name, state, worker, epochs, test))
    states = Counter(state for _, state, *_ in rows)
    for name, task in places.items():
        rows.append(("-", task.state, f"{name} {task.place}", "-", "-"))
    head = ("run", "state", "worker", "epochs", "test")
    said = ", ".join(f"{count} {state}" for state, count in states.items())
    return "\n".join(
        [
            *(line.rstrip() for line in aligned([head, *rows], left=3)),
            "",
            f"{len(runs)} runs: {said}.",
            *map(str, arrays),
            *failures,
        ]
    )


def _state(run, results):
    """Returns the state of a run, its worker and its test accuracy."""
    if results.finished(run):
        accuracy = results.result(run).get("test_accuracy")
        number = _reading.is_number(accuracy)
        return "finished", "", f"{accuracy:.2%}" if number else "-"
    worker = results.worker(run)
    if worker is not None:
        return "training", worker, "-"
    if results.failure(run) is not None:
        return "failed", "", "-"
    return ("interrupted" if results.epochs(run) else "waiting"), "", "-"
