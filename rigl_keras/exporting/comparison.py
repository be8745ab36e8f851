"""Whether what was written computes what the model does."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from rigl_keras import _keras
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

# By how much outputs may differ, in units of `_spread`, by the precision that
# is computed in; in float32 at least. What int8 loses depends on the network: a
# few hundredths in convolutional ones.
TOLERANCES = {"float32": 1e-5, "float16": 2e-2, "int8": 0.1}
# What rounding makes of one layer in the worst output, in units of float32's
# epsilon. A whole ResNet-50 with folded norms differs by 1.9e-5 or so, 15 of
# these; networks whose norms have seen data by less than 1.
_ROUNDINGS = 24


def comparison_inputs(
    signature: Signature, inputs: Any, *, calibrated: bool
) -> list[dict[str, np.ndarray]]:
    """Returns what outputs are compared on: inputs by name, those given last.

    Random inputs are of two batch sizes, to see that both can be served.

    Args:
        signature: Of the model.
        inputs: Examples in the structure of the model's call, or None.
        calibrated: Whether the ranges of activations come from the examples:
            then the model knows these and nothing else, and no inputs are
            drawn.
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
    """Returns the tolerance for the precision that is computed in.

    Two correct ways of computing a network in float32 differ by rounding,
    which each layer adds to, independently of the others: so it grows with the
    square root of their number. A folded batch norm has rounded the kernel and
    the bias of its layer, and counts as one more:

        24 x 2^-23 x sqrt(layers + folded), and 1e-5 at least.

    That is 3e-5 for a ResNet-50 with folded batch norms (53 convolutions, a
    dense layer and 53 norms). One weight in the first or the last layer that
    is wrong by 1 % makes more of a difference.

    Args:
        model: The model.
        quantization: As in `export`. Not None: one of `TOLERANCES`, as for
            models that compute in half precision.
        folded: How many batch norms are folded. None: all of them.
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


class DisagreesError(ValueError):
    """What was written computes something else than the model."""


def write_and_compare(
    write: Callable[..., Callable[[], Runner]],
    concessions: Sequence[Concession],
    examples: Sequence[Mapping[str, np.ndarray]],
    wanted: Sequence[Mapping[str, np.ndarray]],
    tolerance: float,
) -> tuple[float, list[str]]:
    """Writes an artefact whose outputs, loaded back, are those wanted.

    Args:
        write: Writes it, given the changes of a concession, and returns how
            to load it.
        concessions: What may be given up, in this order.
        examples, wanted: Inputs and outputs by name, a pair for each batch.
        tolerance: By how much outputs may differ.

    Returns:
        `(difference, notes)`: the largest difference, and what was given up
        to get there.

    Raises:
        ValueError: No way of writing it agrees; why the first does not.
    """
    failures = []
    for concession in [Concession({}, ""), *concessions]:
        try:
            load = write(**concession.changes)
            # Loaded for each batch: its states begin where the model's do.
            # Not Python's max, which may pass over a NaN.
            largest = float(
                np.max(
                    [
                        difference(load()(arrays), outputs)
                        for arrays, outputs in zip(
                            examples, wanted, strict=True
                        )
                    ]
                )
            )
            if not largest <= tolerance:
                raise DisagreesError(
                    "the artefact, loaded back, disagrees with the model: its "
                    f"outputs differ by {largest:.1e} of their spread, "
                    f"more than {tolerance:.0e}."
                )
        except ValueError as error:
            failures.append(error)
        else:
            if not failures:
                return largest, []
            return largest, [f"{concession.note}: otherwise {failures[0]}"]
    raise failures[0]


def difference(
    got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
) -> float:
    """Returns by how much outputs differ from those wanted, at most.

    In units of `_spread`. It is infinite where an output is missing or has
    another shape, and where strings differ.

    Args:
        got, wanted: Outputs by name.
    """
    differences = []
    for name, want in wanted.items():
        if name not in got or got[name].shape != want.shape:
            return math.inf
        if want.dtype.kind in "SUO":
            differences.append(0.0 if (got[name] == want).all() else math.inf)
        elif want.size:
            want = want.astype(np.float64)
            apart = np.abs(got[name].astype(np.float64) - want)
            differences.append(float(np.max(apart) / _spread(want)))
    # Not Python's max, which may pass over a NaN.
    return float(np.max(differences, initial=0.0))


def _spread(output):
    """Returns how far an output is from its mean, at most.

    Against that a constant is as wrong as it is. Rounding is relative to the
    size of numbers, so that it counts as a tenth of the largest at least, and
    as a thousandth where all are next to nothing.
    """
    spread = np.max(np.abs(output - np.mean(output)))
    return max(spread, np.max(np.abs(output)) / 10, 1e-3)
