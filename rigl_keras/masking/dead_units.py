"""Units that a mask cuts off from their inputs or outputs."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rigl_keras._warn import warn
from rigl_keras.masking.kernel_mask import KernelMask

__all__ = ["Axes", "dead_units", "unit_count", "warn_of_dead_units"]

# An axis of a kernel, or several.
Axes = int | Sequence[int]

# A layer is named if this share of its output units has no active input, and
# at least two have. A few are lost in most runs, without harm.
_SHARE, _LEAST = 0.1, 2
_LISTED = 4  # layers that the warning names


def dead_units(
    mask: np.ndarray, *, input_axes: Axes = -2, output_axes: Axes = -1
) -> tuple[int, int]:
    """Returns how many units of a kernel are cut off.

    An output without incoming connections computes its bias only. An input
    without outgoing connections is not read by this kernel. The units of a
    convolution are its channels.

    Args:
        mask: Array of zeros and ones, with at least two axes unless both kinds
            of axes are given.
        input_axes: The axis or axes of input units. By default as in the kernel
            of a Dense or Conv layer.
        output_axes: Likewise for output units. An axis may be in both, such as
            the channels of a depthwise convolution.

    Returns:
        `(no_incoming, no_outgoing)`: outputs, then inputs.

    Raises:
        ValueError: The mask lacks an axis.

    Example:

    >>> dead_units(np.array([[1, 0], [0, 0], [1, 0]]))  # 3 inputs, 2 outputs
    (1, 1)
    """
    mask = np.asarray(mask) > 0
    incoming, outgoing = (
        mask.any(axis=_other_axes(mask.shape, axes))
        for axes in (output_axes, input_axes)
    )
    return int(np.sum(~incoming)), int(np.sum(~outgoing))


def unit_count(shape: Sequence[int], axes: Axes) -> int:
    """Returns the number of units along an axis, or some axes, of a kernel."""
    return math.prod(shape[axis] for axis in _tuple(axes))


def warn_of_dead_units(method: str, layers: Mapping[str, KernelMask]) -> bool:
    """Warns of layers where many output units have no active input.

    They are many if they are at least a tenth of the layer's units, and at
    least two. Gates of recurrent layers are not counted, because they have two
    kernels.

    Args:
        method: Name of the method that trained the layers.
        layers: `{name: masked layer}`.

    Returns:
        Whether there are such layers.
    """
    found = {}
    for name, layer in layers.items():
        if hasattr(layer.found.owner, "recurrent_kernel"):
            continue
        outputs = layer.found.output_axes
        dead, _ = dead_units(
            layer.mask.numpy(),
            input_axes=layer.found.input_axes,
            output_axes=outputs,
        )
        units = unit_count(layer.mask.shape, outputs)
        if dead >= max(_SHARE * units, _LEAST):
            found[name] = f"{name!r} {dead:,} of {units:,}"
    if not found:
        return False
    named = ", ".join([*found.values()][:_LISTED])
    if len(found) > _LISTED:
        named += f", and {len(found) - _LISTED} more layers"
    depthwise = [name for name in found if layers[name].found.is_depthwise]
    example = [*depthwise, *found][0]
    paper = ", as the RigL paper does with depthwise kernels"
    warn(
        f"With {method} many units have no active input, and output a "
        f"constant: {named}. This may cost accuracy. In sparsify, keep these "
        f"layers dense (densities={{{example!r}: 1.0}}"
        f"{paper if depthwise else ''}), raise density, use "
        "distribution='erdos_renyi_kernel', or give all units of a layer "
        "equally many inputs (granularity='fan_in', for SRigL, too). "
        "TopologyDiagnostics shows when units are lost.",
    )
    return True


def _tuple(axes):
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _other_axes(shape, axes):
    rank = len(shape)
    axes = _tuple(axes)
    if not all(-rank <= axis < rank for axis in axes):
        raise ValueError(
            f"A mask of shape {shape} has no axes {axes}: pass the input_axes "
            "and output_axes of its kernel."
        )
    counted = {axis % rank for axis in axes}
    return tuple(axis for axis in range(rank) if axis not in counted)
