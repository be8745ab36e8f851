"""Checks that an artefact computes what the model does."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from rigl_keras import _keras
from rigl_keras._files import disk_is_full
from rigl_keras._text import as_sentence
from rigl_keras.exporting.base_format import Concession, Runner
from rigl_keras.exporting.signatures import Signature

__all__ = [
    "DisagreesError",
    "TOLERANCES",
    "comparison_inputs",
    "difference",
    "usual_tolerance",
    "write_and_compare",
]

# By how much outputs may differ, in units of `_spread`, for each precision; at
# least float32. The loss of int8 depends on the network: a few hundredths for
# convolutional ones.
TOLERANCES = {"float32": 1e-5, "float16": 2e-2, "int8": 0.1}
# Rounding of one layer in the worst output, in units of float32's epsilon. A
# ResNet-50 with folded norms differs by about 1.9e-5, 15 of these; networks
# whose norms have seen data by less than 1.
_ROUNDINGS = 24


def comparison_inputs(
    signature: Signature, inputs: Any, *, calibrated: bool
) -> list[dict[str, np.ndarray]]:
    """Returns named inputs for the comparison of outputs, examples last.

    Random inputs have two batch sizes, to check that both can be served.

    Args:
        signature: The model's inputs.
        inputs: Examples in the structure of the model's call, or None.
        calibrated: Whether the examples give the ranges of activations. The
            model then knows nothing else, and no inputs are drawn.
    """
    given = [] if inputs is None else [signature.named(inputs)]
    if calibrated:
        return given
    try:
        drawn = [signature.random(n, seed=n) for n in (1, 3)]
    except ValueError:
        if not given:
            raise
        return given
    return [*drawn[signature.batch_size is not None :], *given]


def usual_tolerance(
    model: keras.Model,
    quantization: str | None,
    *,
    folded: int | None = 0,
) -> float:
    """Returns the tolerance for a model and a precision.

    Two correct ways to compute a network in float32 differ by rounding. Each
    layer adds to it independently, so it grows with the square root of their
    number. A folded batch norm rounds the kernel and the bias of its layer, and
    counts as a layer:

        24 x 2^-23 x sqrt(layers + folded), at least 1e-5.

    That is 3e-5 for a ResNet-50 with folded batch norms (53 convolutions, a
    dense layer and 53 norms). A single weight of the first or last layer with
    an error of 1 % differs by more.

    Args:
        model: The model.
        quantization: As in `export`. If not None, one of `TOLERANCES`, as for
            models that compute in half precision.
        folded: Number of folded batch norms. None: all of them.
    """
    if quantization is not None:
        return TOLERANCES[quantization]
    every = _keras.flatten_layers(model)
    if any("16" in (layer.compute_dtype or "") for layer in every):
        return TOLERANCES["float16"]
    layers = sum(
        any(len(weight.shape) > 1 for weight in _keras.direct_weights(layer))
        for layer in every
    )
    if folded is None:
        norm = keras.layers.BatchNormalization
        folded = sum(isinstance(layer, norm) for layer in every)
    rounding = _ROUNDINGS * float(np.finfo(np.float32).eps)
    return max(TOLERANCES["float32"], rounding * math.sqrt(layers + folded))


_DISAGREES = "the artefact, loaded back, disagrees with the model:"


class DisagreesError(ValueError):
    """An artefact does not compute what the model does."""


def write_and_compare(
    write: Callable[..., Callable[[], Runner]],
    concessions: Sequence[Concession],
    examples: Sequence[Mapping[str, np.ndarray]],
    wanted: Sequence[Mapping[str, np.ndarray]],
    tolerance: float,
) -> tuple[float, list[str]]:
    """Writes an artefact and checks its outputs after loading it.

    Args:
        write: Writes it, given the changes of a concession, and returns a
            loader.
        concessions: What may be given up, in this order.
        examples, wanted: Inputs and outputs by name, a pair for each batch.
        tolerance: Largest accepted difference of outputs.

    Returns:
        `(difference, notes)`: the largest difference, and what was given up.

    Raises:
        ValueError: No way of writing it agrees. It says why the first does not.
    """
    failures = []
    for concession in [Concession({}, ""), *concessions]:
        try:
            load = write(**concession.changes)
            # Loaded for each batch, so that its states begin as the model's do.
            largest = 0.0
            for arrays, outputs in zip(examples, wanted, strict=True):
                got = load()(arrays)
                why = _why_not_compared(got, outputs)
                if why is not None:
                    raise ValueError(f"{_DISAGREES} {why}.")
                # Python's max may pass over a NaN.
                largest = float(np.maximum(largest, difference(got, outputs)))
            if not largest <= tolerance:
                raise DisagreesError(
                    f"{_DISAGREES} its outputs differ by {largest:.1e} of "
                    f"their spread, more than {tolerance:.0e}."
                )
        except ValueError as error:
            failures.append(error)
        except Exception as error:  # Keras, TensorFlow, ONNX runtimes, ...
            if not _is_foreign(error) or disk_is_full(error):
                raise
            failures.append(_as_value_error(error))
        else:
            if not failures:
                return largest, []
            return largest, [f"{concession.note}: otherwise {failures[0]}"]
    raise failures[0]


def _is_foreign(error):
    """Returns whether another package raised an error that it defines.

    Those of Python (a full disk, no memory) and of this one say enough.
    """
    package = type(error).__module__.partition(".")[0]
    return package not in ("builtins", "rigl_keras") or isinstance(
        error, (TypeError, AttributeError, NotImplementedError)
    )


def _as_value_error(error):
    told = ValueError(f"{type(error).__name__}: {as_sentence(error)}")
    told.__cause__ = error
    return told


def _why_not_compared(got, wanted):
    """Returns which output is missing or has another shape, or None."""
    for name, want in wanted.items():
        if name not in got:
            return f"it has no output {name!r}"
        if got[name].shape != want.shape:
            return (
                f"its output {name!r} has the shape {got[name].shape} instead "
                f"of {want.shape}. If the model's input has free axes (None), "
                "Keras may compute something else with them: give keras.Input "
                "a fixed shape"
            )
    return None


def difference(
    got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
) -> float:
    """Returns the largest difference of outputs from those wanted.

    It is in units of `_spread`. It is infinite if an output is missing or has
    another shape, or if strings differ.

    Args:
        got, wanted: Outputs by name.
    """
    if _why_not_compared(got, wanted) is not None:
        return math.inf
    differences = []
    for name, want in wanted.items():
        if want.dtype.kind in "SUO":
            differences.append(0.0 if (got[name] == want).all() else math.inf)
        elif want.size:
            want = want.astype(np.float64)
            apart = np.abs(got[name].astype(np.float64) - want)
            differences.append(float(np.max(apart) / _spread(want)))
    # Python's max may pass over a NaN.
    return float(np.max(differences, initial=0.0))


def _spread(output):
    """Returns the largest distance of an output from its mean.

    It is at least a tenth of the largest number, since rounding is relative to
    the size of numbers, and at least a thousandth, for outputs near zero.
    """
    spread = np.max(np.abs(output - np.mean(output)))
    return max(spread, np.max(np.abs(output)) / 10, 1e-3)
