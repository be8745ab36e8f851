"""Tables and figures of the runs that bin/reproduce trained.

  bin/report --preset=small                  everything with a finished run
  bin/report table2 figure1 --output=page    only these; marks missing runs
  bin/report --results_dir=page/results.jsonl --output=again

Writes report.md, report.html (self-contained), report.csv (a line for each
cell), figures/ and results.jsonl, from which it can make the same page without
the folder of results.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging

from rigl_keras import _files
from rigl_keras._text import printable
from rigl_keras.experiments import exits, quiet_start

if TYPE_CHECKING:  # matplotlib, for which --help does not wait
    from rigl_keras.experiments.report.sections import Report
    from rigl_keras.experiments.report.summaries import Summary

__all__ = ["main", "planned_flops", "write"]


def planned_flops(preset: str) -> Callable[[Summary], tuple[float, float]]:
    """Returns a function for the FLOPs of runs that are not finished.

    Raises:
        ValueError: A package that it needs is not installed.
    """
    # Everything else works without waiting for TensorFlow.
    try:
        quiet_start.load_library()
        from rigl_keras.experiments.reproduction import estimates, plans
    except (ImportError, ValueError) as error:
        raise ValueError(
            "--planned counts the FLOPs of networks, and something that it "
            f"needs is missing ({error}): pip install tensorflow keras "
            "gin-config, or leave it out."
        ) from error

    def planned(summary):
        run = plans.Run(
            summary.row,
            plans.Preset(preset),
            summary.density,
            seed=0,
            changes=summary.changes,
        )
        cost, training = estimates.counted(run, printed=False)
        return training, cost.inference_flops_ratio

    return planned


# Files.


def write(made: Report, output: str | os.PathLike) -> list[Path]:
    """Writes a report, each file whole or not at all.

    Args:
        made: The report.
        output: Folder; made if it does not exist. Other files in it stay.

    Returns:
        The files.

    Raises:
        ValueError: The folder cannot be written to.
        DiskFullError: The disk is full.
    """
    from rigl_keras.experiments.report.contents import PICTURES
    from rigl_keras.experiments.report.page import as_html, as_markdown

    output = Path(output)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(made.lines)
    pictures = {
        section.picture.name: section.picture.png
        for section in made.page.sections
        if section.picture is not None
    }
    contents = {
        **{f"figures/{name}.png": png for name, png in pictures.items()},
        "results.jsonl": made.results.encode(),
        "report.csv": table.getvalue().encode(),
        "report.html": as_html(made.page).encode(),
        "report.md": as_markdown(made.page).encode(),
    }
    try:
        (output / "figures").mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            _files.write(output / name, content)
        # Figures of an earlier report.
        for name in set(PICTURES) - set(pictures):
            (output / "figures" / f"{name}.png").unlink(missing_ok=True)
    except OSError as error:
        reason = _files.disk_is_full(error)
        if reason:
            advice = "Make room, or pass another --output."
            raise _files.DiskFullError(output, reason, advice) from error
        raise ValueError(
            f"{str(output)!r} cannot be written to ({error.strerror}). Pass "
            "--output with a folder that can be, or that can be made."
        ) from error
    return [output / name for name in contents]


def main() -> None:
    """Reads the command line and writes a report."""
    results_dir = flags.DEFINE_string(
        "results_dir",
        "results",
        "Folder of all results, or a results.jsonl that this command wrote.",
    )
    preset = flags.DEFINE_string(
        "preset", None, "Preset to show. Default: the only one found."
    )
    output = flags.DEFINE_string("output", "report", "Folder to write.")
    with_published = flags.DEFINE_bool(
        "published",
        False,
        "Show the report's numbers beside those of another preset, too.",
    )
    with_planned = flags.DEFINE_bool(
        "planned",
        False,
        "Show the FLOPs of runs that are not finished, in brackets.",
    )

    def run(argv):
        from rigl_keras.experiments.report import reading
        from rigl_keras.experiments.report.sections import report

        logging.set_verbosity(logging.WARNING)
        if Path(output.value).exists() and not Path(output.value).is_dir():
            raise ValueError(
                f"{output.value!r} is no folder. Pass --output with one, or "
                "with one that can be made."
            )
        found = reading.read(results_dir.value, preset.value)
        folder = None
        if Path(results_dir.value).is_dir():
            results = Path(results_dir.value).resolve()
            folder = os.path.relpath(results, Path(output.value).resolve())
        made = report(
            found,
            argv[1:],
            folder=folder,
            with_published=with_published.value,
            planned=planned_flops(_preset_of(found, preset.value))
            if with_planned.value
            else None,
        )
        written = write(made, output.value)
        print("\n".join(printable(str(path)) for path in written))
        _tell(found, made.notes)

    exits.run_command("report", run, about=__doc__, library=False)


def _preset_of(found, received):
    """Returns the name of the preset, or the path of a user's own file."""
    if received is not None and received.endswith(".gin"):
        return received
    return found.preset or ""


def _tell(found, notes):
    """Prints how many runs count, which do not, and what is odd."""
    failed = sum(run.failed for run in found.runs)
    unfinished = len(found.runs) - len(found.finished) - failed
    print(
        f"{len(found.finished)} runs of the preset {found.preset} are "
        f"finished, {failed} failed, {unfinished} are unfinished."
    )
    for note in notes:
        print(f"  {printable(note)}")


if __name__ == "__main__":
    main()
