"""Reads the files of one run, and checks each number.

Any file in a folder of results is either read, or a ValueError says what is
wrong with it.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rigl_keras._reading import is_number, json_object, text
from rigl_keras._text import brief

__all__ = [
    "RATIOS",
    "UNREADABLE",
    "about",
    "about_in",
    "curve",
    "curve_in",
    "disagreement",
    "history",
    "history_in",
    "is_rate",
    "learning_rate",
    "result",
    "result_in",
    "why_not",
]

UNREADABLE = (OSError, ValueError)
# The fields of a result that a report needs.
RATIOS = (
    "inference_flops_ratio",
    "training_flops_ratio",
    "training_flops_ratio_with_sources",
)
_CURVE_POINTS = 120  # most points that are kept of a curve
_REASON = 400  # most letters that are kept of a failure
_STEPS = 10**12  # more than any run takes
_LONGEST = 200  # most letters of a name
_KEPT = (
    "method",
    "model",
    "dataset",
    "seed",
    "density",
    "test_accuracy",
    "validation_accuracy",
    "test_loss",
    "inference_flops",
    *RATIOS,
    "parameters",
    "nonzeros",
    "steps",
    "seconds",
    "settings",
    "versions",
)
# The numbers of a result, and their bounds. The bounds are wide: within them
# sums, ratios and the axes of figures are finite.
_BOUNDS = {
    "test_accuracy": (0.0, 1.0),
    "inference_flops": (1.0, 1e24),
    "steps": (1, _STEPS),
    **dict.fromkeys(RATIOS, (1e-9, 1e6)),
}
# Bounds of the values of changes.
_CHANGES = {
    "UPDATE_FRACTION": (0.0, 1.0),
    "UPDATE_FREQUENCY": (1, _STEPS),
    "sgd.learning_rate": (1e-12, 1e6),
    "train.length": (1e-9, 1e6),
}


# The identity of a run.


def about(path: Path) -> dict:
    """Returns the identity of a run from its about.json.

    Args:
        path: The file.

    Raises:
        OSError, ValueError: It cannot be read, or a value is impossible.
    """
    return about_in(json_object(path))


def about_in(content: Mapping) -> dict:
    """Returns the identity of a run, if all values have the right types.

    Args:
        content: Content of an about.json, or of a line of results.jsonl.

    Raises:
        ValueError: A value has another type.
    """
    names = ("row", "preset", "density", "seed", "changes")
    found: dict[str, Any] = {name: content.get(name) for name in names}
    density, seed, changes = (found[name] for name in names[2:])
    fits = {
        "row": _is_name(found["row"]),
        "preset": _is_name(found["preset"]),
        "density": density is None or is_number(density, least=1e-12, most=1.0),
        "seed": isinstance(seed, int) and is_number(seed, least=0, most=2**63),
        "changes": isinstance(changes, dict)
        and all(
            _is_name(name)
            and is_number(
                value,
                **dict(
                    zip(("least", "most"), _CHANGES.get(name, ()), strict=False)
                ),
            )
            for name, value in changes.items()
        ),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"{name} is {brief(found[name])}")
    found["changes"] = tuple(sorted(changes.items()))
    return found


def _is_name(value):
    return isinstance(value, str) and 0 < len(value) <= _LONGEST


# Results.


def result(path: Path) -> dict:
    """Returns the fields that are kept of a result.json.

    Args:
        path: The file.

    Raises:
        OSError, ValueError: It cannot be read, or a value is impossible.
    """
    return result_in(json_object(path))


def result_in(content: Mapping) -> dict:
    """Returns the fields that are kept of a result, if they are possible.

    Args:
        content: Content of a result.json, or of a line of results.jsonl.

    Raises:
        ValueError: A value is impossible.
    """
    for name, (least, most) in _BOUNDS.items():
        value = content.get(name)
        if not is_number(value, least=least, most=most):
            raise ValueError(f"{name} is {brief(value)}")
    validation = content.get("validation_accuracy")
    if validation is not None and not is_number(validation, least=0, most=1):
        raise ValueError(f"validation_accuracy is {brief(validation)}")
    for name in ("method", "model", "dataset"):
        if content.get(name) is not None and not _is_name(content[name]):
            raise ValueError(f"{name} is {brief(content[name])}")
    if not isinstance(content.get("settings"), dict):
        raise ValueError(f"settings is {brief(content.get('settings'))}")
    kept: dict[str, Any] = {name: content.get(name) for name in _KEPT}
    kept["steps"] = int(kept["steps"])
    if not is_number(kept["seconds"], least=0, most=1e12):
        kept["seconds"] = 0.0
    layers = content.get("layers")
    kept["layers"] = [
        {"name": layer["name"], "density": layer["density"]}
        for layer in (layers if isinstance(layers, list) else [])
        if isinstance(layer, dict)
        and _is_name(layer.get("name"))
        and is_number(layer.get("density"), least=0, most=1)
    ]
    if not kept["layers"]:
        raise ValueError("layers are missing")
    return kept


def disagreement(known: Mapping, kept: Mapping) -> str | None:
    """Returns how a result contradicts the run it is stored with, or None.

    Args:
        known: Identity of the run, from `about_in`.
        kept: Its result, from `result_in`.
    """
    settings = kept["settings"]
    method = settings.get("method")
    method = method if isinstance(method, dict) else {}
    changes = dict(known["changes"])
    pairs = [("seed", kept["seed"], known["seed"])]
    if "density" in settings and not _is_pruned(settings, kept, known):
        pairs.append(("density", settings["density"], known["density"]))
    for macro, name in (
        ("UPDATE_FRACTION", "drop_fraction"),
        ("UPDATE_FREQUENCY", "frequency"),
    ):
        if macro in changes and name in method:
            pairs.append((name, method[name], changes[macro]))
    for name, own, wanted in pairs:
        if own != wanted:
            return f"its {name} is {brief(own)}, not {brief(wanted)}"
    return None


def _is_pruned(settings, kept, known):
    """Returns whether a run began denser and ended near its density.

    It began dense, or its method was to prune it to that density, as GraNet is.
    """
    wanted = known["density"]
    method = settings.get("method")
    return (
        wanted is not None
        and (
            settings["density"] == 1.0
            or isinstance(method, dict)
            and method.get("final_density") == wanted
        )
        and is_number(kept["density"], least=wanted / 2, most=wanted * 2)
    )


def why_not(folder: Path) -> dict:
    """Returns why a run has no result, as fields of its record.

    Args:
        folder: The folder of the run.
    """
    try:
        reason = text(folder / "failure.txt").strip()
        return {"failure": reason[:_REASON] or "unknown", "failed": True}
    except FileNotFoundError:
        pass
    except UNREADABLE as error:
        reason = f"its failure.txt cannot be read ({error})"
        return {"failure": reason, "failed": True}
    try:
        epochs = max(text(folder / "run/metrics.csv").count("\n") - 1, 0)
    except UNREADABLE:  # usually none yet
        epochs = 0
    return {"failure": f"unfinished, after {epochs} epochs"}


def learning_rate(path: Path) -> float | None:
    """Returns the learning rate of a config.gin, or None if unreadable.

    Args:
        path: The file.
    """
    try:
        content = text(path)
    except UNREADABLE:
        return None
    line = r"^sgd\.learning_rate = ([\d.e+-]+)$"
    found = re.search(line, content, re.MULTILINE)
    try:
        rate = float(found[1]) if found else None
    except ValueError:
        return None
    return rate if is_rate(rate) else None


def is_rate(value: object) -> bool:
    """Returns whether a value can be a learning rate."""
    least, most = _CHANGES["sgd.learning_rate"]
    return is_number(value, least=least, most=most)


# Curves: the cost of inference over the steps.


def curve(path: Path, kept: Mapping) -> tuple[tuple[int, float], ...]:
    """Returns `((step, inference FLOPs over the dense network's), ...)`.

    Args:
        path: A flops.csv.
        kept: The result of the run, from `result_in`.

    Returns:
        At most 121 points, including the last step. Empty if the file is
        missing or impossible: figures omit it.
    """
    dense = kept["inference_flops"] / kept["inference_flops_ratio"]
    try:
        # Lines without line ends, otherwise a quote could span many lines.
        lines = csv.DictReader(text(path).splitlines())
        points = _thinned(
            curve_in(
                (int(line["step"]), float(line["inference_flops"]) / dense)
                for line in lines
            )
        )
    except (*UNREADABLE, KeyError, TypeError, csv.Error):
        return ()
    if points and kept["steps"] > points[-1][0]:
        points.append((kept["steps"], points[-1][1]))
    return tuple(points)


def curve_in(points: Iterable) -> list[tuple[int, float]]:
    """Returns the points of a curve, if all are possible.

    Args:
        points: Pairs of a step and a ratio.

    Raises:
        ValueError: They are not possible.
    """
    found: list[tuple[int, float]] = []
    for point in points:
        if not isinstance(point, list | tuple) or len(point) != 2:
            raise ValueError(f"a point of the curve is {brief(point)}")
        step, ratio = point
        if not (
            is_number(step, least=found[-1][0] if found else 0, most=_STEPS)
            and is_number(ratio, least=0, most=1e6)
        ):
            raise ValueError(f"a point of the curve is {brief(point)}")
        found.append((int(step), float(ratio)))
    return found


# How well a run did after each epoch.


def history(path: Path) -> tuple[tuple[int, float], ...]:
    """Returns `((epoch, accuracy in percent), ...)`, the first epoch being 1.

    Args:
        path: A metrics.csv.

    Returns:
        At most 120 points, of the images held out where there are such. None
        at all where the file is not there or cannot be right.
    """
    points = []
    try:
        for line in csv.DictReader(text(path).splitlines()):
            accuracy = line.get("val_accuracy") or line["accuracy"]
            points.append((int(line["epoch"]) + 1, 100 * float(accuracy)))
        return tuple(history_in(_strided(points)))
    except (*UNREADABLE, KeyError, TypeError, csv.Error):
        return ()


def history_in(points: object) -> list[tuple[int, float]]:
    """Returns the points of a history, if all can be of one.

    Args:
        points: Pairs of an epoch and an accuracy.

    Raises:
        ValueError: They are not.
    """
    if not isinstance(points, list | tuple):
        raise ValueError(f"history is {brief(points)}")
    found: list[tuple[int, float]] = []
    for point in points:
        if not (
            isinstance(point, list | tuple)
            and len(point) == 2
            and is_number(point[0], least=found[-1][0] if found else 0)
            and is_number(point[0], most=_STEPS)
            and is_number(point[1], least=0, most=100)
        ):
            raise ValueError(f"a point of the history is {brief(point)}")
        found.append((int(point[0]), float(point[1])))
    return found


def _thinned(points):
    """Returns a limited number of points at which a curve changes."""
    kept = [
        point
        for before, point in zip([None, *points], points, strict=False)
        if before is None or point[1] != before[1]
    ]
    return _strided(kept)


def _strided(points):
    """Returns not too many of some points, the first and last among them."""
    if len(points) <= _CURVE_POINTS:
        return points
    stride = (len(points) - 1) / (_CURVE_POINTS - 1)
    return [points[round(i * stride)] for i in range(_CURVE_POINTS)]
