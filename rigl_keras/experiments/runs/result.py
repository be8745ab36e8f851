"""What a run found out: the content of result.json."""

import importlib.metadata
import platform

import numpy as np

import rigl_keras
from rigl_keras import flops

__all__ = ["closed_form", "method_name", "package_versions"]


def method_name(update, density, small_dense, one_shot, masks_from):
    if update is not None:
        return update.name
    if density is None:
        return "dense"
    if small_dense:
        return "small-dense"
    if one_shot is not None:
        return "SNIP"
    return "static" if masks_from is None else "lottery"


def closed_form(update, inference, dense_flops, times_as_long):
    """Returns the paper's ratio, at the mean forward cost of the run."""
    method = type(update).__name__ if update else "static"
    try:
        cost = flops.training_flops(
            method,
            sparse_flops=float(np.mean(inference)),
            dense_flops=dense_flops,
            frequency=getattr(update, "frequency", None),
            gradient_batches=getattr(update, "gradient_batches", 1),
        )
    except ValueError:  # a method of the user's own has none
        return None
    return times_as_long * cost / (3 * dense_flops)


def package_versions():
    versions = {"python": platform.python_version()}
    for package in ("tensorflow", "keras", "numpy"):
        versions[package] = importlib.metadata.version(package)
    return {**versions, "rigl_keras": rigl_keras.__version__}
