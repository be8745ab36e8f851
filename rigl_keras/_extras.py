"""Packages that not every install has, and how to get them."""

import importlib.util

__all__ = ["OPTIONAL", "MissingPackageError", "check_installed", "missing"]

# What is imported: its package, and the extra of rigl_keras that brings it
# (requirements.txt).
OPTIONAL = {
    "absl": ("absl-py", "experiments"),
    "gin": ("gin-config", "experiments"),
    "matplotlib": ("matplotlib", "experiments"),
    "optuna": ("optuna", "experiments"),
    "sklearn": ("scikit-learn", "experiments"),
    "tensorboard": ("tensorboard", "experiments"),
    "tensorflow_datasets": ("tensorflow-datasets", "experiments"),
    "tqdm": ("tqdm", "experiments"),
    "onnx": ("onnx", "onnx"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "tf2onnx": ("tf2onnx", "onnx"),
}


class MissingPackageError(ImportError):
    """Something needs a package that is not installed."""


def missing(*modules: str) -> str | None:
    """Returns what is not installed and how to install it, or None.

    Args:
        modules: Names to import, of `OPTIONAL`.

    Example:

    >>> missing("numpy", "onnx")
    "onnx: pip install 'rigl_keras[onnx]'."
    """
    names = [name for name in modules if not _is_installed(name)]
    if not names:
        return None
    packages, extras = zip(*map(OPTIONAL.__getitem__, names), strict=True)
    extras = ",".join(dict.fromkeys(extras))
    return f"{' and '.join(packages)}: pip install 'rigl_keras[{extras}]'."


def check_installed(what: str, *modules: str, instead: str = "") -> None:
    """Raises MissingPackageError unless modules can be imported.

    Args:
        what: What needs them, as the start of a sentence.
        modules: Their names, of `OPTIONAL`.
        instead: What may be done without, as a sentence.
    """
    needed = missing(*modules)
    if needed is not None:
        raise MissingPackageError(f"{what} needs {needed} {instead}".rstrip())


def _is_installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # ruled out, as tests do
        return False
