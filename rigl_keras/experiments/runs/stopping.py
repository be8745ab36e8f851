"""Ending a run between two epochs."""

import signal

import keras

from rigl_keras.experiments import exits

__all__ = ["StopAtSignal"]


class StopAtSignal(keras.callbacks.Callback):
    """Ends a run at SIGUSR1, as soon as the epoch it is in has its checkpoint.

    It comes after the callback that saves checkpoints, and is made in the main
    thread: from then on the signal ends no process by itself.

    Raises:
        StopRequest: In `fit`, at the end of the epoch.
    """

    def __init__(self):
        super().__init__()
        self._asked = False
        signal.signal(signal.SIGUSR1, self._ask)

    def on_train_begin(self, logs=None):
        self._stop_if_asked()

    def on_epoch_end(self, epoch, logs=None):
        self._stop_if_asked()

    def _ask(self, *_):
        self._asked = True

    def _stop_if_asked(self):
        if self._asked:
            raise exits.StopRequest
