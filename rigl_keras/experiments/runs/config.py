"""gin configuration: what gin can configure, and helpful errors.

The library itself does not use gin; this module registers what gin can
configure.
"""

import contextlib
import difflib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import gin
import rigl_keras
from rigl_keras.experiments.protocol.variations import GIN_FOLDER
from rigl_keras.experiments.runs import exports, optimizers, train
from rigl_keras.methods import one_shot

__all__ = ["configured", "find", "has_macro", "parse", "settings"]

_CONFIGURABLE: dict[str, Callable] = {
    "train": train.train,
    "sgd": optimizers.sgd,
    "adamw": optimizers.adamw,
    "wide_resnet": rigl_keras.models.wide_resnet,
    "gpt": rigl_keras.models.gpt,
    "lenet5": rigl_keras.models.lenet5,
    "mlp": rigl_keras.models.mlp,
    "resnet18": rigl_keras.models.resnet18,
    "resnet50": rigl_keras.models.resnet50,
    "Conventions": rigl_keras.Conventions,
    "RigL": rigl_keras.RigL,
    "SET": rigl_keras.SET,
    "SNFS": rigl_keras.SNFS,
    "MagnitudePruning": rigl_keras.MagnitudePruning,
    "GraNet": rigl_keras.GraNet,
    "MEST": rigl_keras.MEST,
    "GSE": rigl_keras.GSE,
    "ACDC": rigl_keras.ACDC,
    "TopKAST": rigl_keras.TopKAST,
    "SRigL": rigl_keras.SRigL,
    "SRSTE": rigl_keras.SRSTE,
    "SparsityRamp": rigl_keras.SparsityRamp,
    "snip": one_shot.snip,
    "grasp": one_shot.grasp,
    "synflow": one_shot.synflow,
    "magnitude": one_shot.magnitude,
    "Exports": exports.Exports,
}
_CONSTANTS = {"ORIGINAL": rigl_keras.ORIGINAL, "REPORT": rigl_keras.REPORT}


@functools.cache
def configured() -> dict[str, Callable]:
    """Returns what gin can configure, by its name in gin."""
    for name, value in _CONSTANTS.items():
        gin.constant(name, value)
    return {
        name: gin.external_configurable(target, name=name, module="rigl_keras")
        for name, target in _CONFIGURABLE.items()
    }


def find(gin_file: str) -> Path:
    """Returns the path of a gin file.

    Args:
        gin_file: A path, absolute or relative to the current folder, or the
            name of a file that comes with the package: `rigl_erk_wrn`,
            `rigl_erk_wrn.gin` or `gin/rigl_erk_wrn.gin`.

    Returns:
        The path of an existing file.

    Raises:
        ValueError: There is no such file; the error names similar ones.
    """
    for folder in (Path(), GIN_FOLDER.parent, GIN_FOLDER):
        for path in (folder / gin_file, folder / f"{gin_file}.gin"):
            if path.is_file():
                return path
    names = sorted(path.name for path in GIN_FOLDER.glob("*.gin"))
    near = difflib.get_close_matches(Path(gin_file).name, names, n=3)
    hint = f" Did you mean {_either(f'gin/{n}' for n in near)}?" if near else ""
    raise ValueError(
        f"There is no gin file {gin_file!r}.{hint} All {len(names)} are in "
        f"{GIN_FOLDER}."
    )


def _either(names: Iterable[str]) -> str:
    """Returns names as a choice: "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def parse(gin_files: Sequence[str], bindings: Sequence[str]) -> None:
    """Reads gin files and bindings, later ones over earlier ones.

    Args:
        gin_files: Paths, as `find` takes them. Included files are looked up
            in the current folder, then in the folders of these.
        bindings: Lines such as `train.epochs = 2`.

    Raises:
        ValueError: A file is missing, or a binding names nothing that can be
            configured; the error suggests similar names.
    """
    configured()
    gin.clear_config()
    paths = [find(gin_file).absolute() for gin_file in gin_files]
    for path in paths:
        _include_from(path.parent)
    try:
        with _quiet():
            gin.parse_config_files_and_bindings(
                [str(path) for path in paths],
                list(bindings),
                finalize_config=True,
            )
    except (ValueError, OSError) as error:
        # gin's message says where in the file the error is.
        raise ValueError(f"{error}{_nearest(str(error))}") from error
    except SyntaxError as error:
        raise ValueError(
            f"Not gin: {error.text or '; '.join(bindings)!s} ({error.msg}). "
            "A binding reads `train.epochs = 2`; strings need quotes."
        ) from error


@functools.cache  # gin would keep a folder as often as it is added
def _include_from(folder):
    """Has gin look up included files in a folder, too."""
    gin.add_config_file_search_path(folder)


def settings() -> dict[str, str | float]:
    """Returns the settings of the run, such as `{"train.epochs": 250}`.

    These are the bound parameters of `train` and of what it calls.
    """
    bound = gin.get_bindings("train")
    names = [getattr(value, "__name__", "") for value in bound.values()]
    found = {}
    for name in ["train", *(n for n in names if n in _CONFIGURABLE)]:
        for parameter, value in gin.get_bindings(name).items():
            if not isinstance(value, int | float | str):
                value = getattr(value, "__name__", str(value))
            found[f"{name}.{parameter}"] = value
    return found


def has_macro(name: str) -> bool:
    """Returns whether the parsed configuration defines a macro.

    Args:
        name: Name of the macro, without `%`.
    """
    try:
        gin.query_parameter(f"{name}/gin.macro.value")
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps gin from logging each folder that lacks an included file."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _nearest(message: str) -> str:
    """Returns a hint for a misspelt binding, or an empty string."""
    unknown = re.search(r"No configurable matching '([^']+)'", message)
    if unknown:
        return _hint(unknown[1].split(".")[-1], list(_CONFIGURABLE))
    wrong = re.search(
        r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'",
        message,
    )
    if wrong:
        target = _CONFIGURABLE.get(wrong[1].split(".")[-1])
        if target is not None:
            return _hint(wrong[2], list(inspect.signature(target).parameters))
    return ""


def _hint(name, names):
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    if near:
        return f"\nDid you mean {_either(map(repr, near))}?"
    return f"\nThere are: {', '.join(names)}."
