"""TensorBoard's event files, of runs that are resumed."""

import os
from pathlib import Path

import tensorflow as tf

from rigl_keras import _files

__all__ = ["event_files", "forget_events"]


def event_files(folder: str | os.PathLike) -> list[Path]:
    """Returns the event files of a folder, not of folders in it."""
    return sorted(Path(folder).glob("events.out.tfevents.*"))


def forget_events(
    folder: str | os.PathLike, *, first_step: int, prefix: str
) -> None:
    """Removes the events that a resumed run will write again.

    A process that is killed leaves events beyond the checkpoint from which
    its run continues, and TensorBoard would show their steps twice.

    Args:
        folder: Folder of the event files, none of which is being written.
        first_step: Events of this step and later ones go.
        prefix: How all tags of the run begin. A file with another tag is not
            the run's, and left as it is.
    """
    # Made even where nothing is written: a process that was killed here has
    # left one, and this clears it.
    with _files.unfinished_folder(folder) as unfinished:
        for path in event_files(folder):
            events = [
                (tf.compat.v1.Event.FromString(r), r) for r in _records(path)
            ]
            tags = [v.tag for event, _ in events for v in event.summary.value]
            kept = [r for event, r in events if event.step < first_step]
            own = all(tag.startswith(prefix) for tag in tags)
            if not own or len(kept) == len(events):
                continue
            # By another name until it is whole, which TensorBoard does not
            # read.
            file = unfinished / "events.unfinished"
            with tf.io.TFRecordWriter(str(file)) as writer:
                for record in kept:
                    writer.write(record)
            _files.put(file, path)


def _records(path):
    """Yields what is whole in a file of events."""
    # Much faster than TFRecordDataset, and silent where a file was cut short.
    from tensorboard.backend.event_processing import event_file_loader

    yield from event_file_loader.RawEventFileLoader(str(path)).Load()
