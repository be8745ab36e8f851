"""Records what replicas sum, for checks on two devices and two workers."""

import contextlib

from rigl_keras import _keras


@contextlib.contextmanager
def noting_shapes():
    """Yields the shapes of the sums of replicas, for each call or trace."""
    own, shapes = _keras.replica_sum, []

    def noting(optimizer, pairs):
        shapes.append([tuple(gradient.shape) for gradient, _ in pairs])
        return own(optimizer, pairs)

    _keras.replica_sum = noting
    try:
        yield shapes
    finally:
        _keras.replica_sum = own
