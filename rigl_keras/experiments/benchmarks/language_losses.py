"""Losses of language models, read from the directories of their runs."""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

from rigl_keras import _reading
from rigl_keras.experiments.benchmarks.csv_files import write_rows

__all__ = ["Point", "read_losses", "write_losses"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """The state of a run after an epoch.

    Attributes:
        run: Name of its directory.
        step: Optimizer steps so far.
        density: Fraction of the masked weights kept; 1 for a dense model.
        loss: Loss on the batches of the epoch, in nats.
        validation_loss: Loss on the validation characters, in nats.
        validation_accuracy: Share of validation characters that are predicted.
        training_flops_ratio: FLOPs so far over those of the whole dense
            training.
    """

    run: str
    step: int
    density: float
    loss: float
    validation_loss: float
    validation_accuracy: float
    training_flops_ratio: float

    @property
    def bits_per_character(self) -> float:
        """The validation loss in bits."""
        return self.validation_loss / math.log(2)


def read_losses(run_dirs: Sequence[str | os.PathLike]) -> list[Point]:
    """Returns the points of runs, finished or not, in order.

    Args:
        run_dirs: Directories of runs of `bin/train`.

    Raises:
        ValueError: A run has no epoch, or no validation loss.
    """
    points = []
    for run_dir in run_dirs:
        path = Path(run_dir) / "metrics.csv"
        try:
            rows = list(csv.DictReader(io.StringIO(_reading.text(path))))
        except OSError as error:
            raise ValueError(
                f"{str(run_dir)!r} is not the directory of a run that has "
                f"trained an epoch: {path.name} cannot be read "
                f"({error.strerror})."
            ) from error
        for row in rows:
            try:
                points.append(
                    Point(
                        run=Path(run_dir).resolve().name,
                        step=int(row["step"]),
                        density=float(row["density"]),
                        loss=float(row["loss"]),
                        validation_loss=float(row["val_loss"]),
                        validation_accuracy=float(row["val_accuracy"]),
                        training_flops_ratio=float(row["training_flops_ratio"]),
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{str(path)!r} has a row without loss and validation "
                    f"loss: {row}. Train with train.validation > 0."
                ) from error
    if not points:
        raise ValueError("There is no run. Pass --runs with directories.")
    return points


def write_losses(points: Sequence[Point], path: str | os.PathLike) -> None:
    """Writes points as CSV, whole or not at all.

    Args:
        points: At least one point.
        path: The file.
    """
    rows = [
        {
            **dataclasses.asdict(point),
            "bits_per_character": point.bits_per_character,
        }
        for point in points
    ]
    write_rows(rows, path)
