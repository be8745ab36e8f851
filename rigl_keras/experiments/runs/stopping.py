"""A callback that ends a run between two epochs."""

import signal

import keras

from rigl_keras.experiments import exits

__all__ = ["StopAtSignal"]


class StopAtSignal(keras.callbacks.Callback):
    """Ends a run after SIGUSR1, once the current epoch has its checkpoint.

    It comes after the callback that saves checkpoints. Make it in the main
    thread; from then on, the signal no longer kills the process.

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
