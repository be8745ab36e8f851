"""What replicas sum, as the checks on two devices and two workers see it."""

import contextlib

from rigl_keras import _keras


@contextlib.contextmanager
def noting_shapes():
    """Gives the shapes of what replicas sum, of each call or trace."""
    own, shapes = _keras.replica_sum, []

    def noting(optimizer, pairs):
        shapes.append([tuple(gradient.shape) for gradient, _ in pairs])
        return own(optimizer, pairs)

    _keras.replica_sum = noting
    try:
        yield shapes
    finally:
        _keras.replica_sum = own
