"""TensorBoard's event files in resumed runs."""

import os
from pathlib import Path

import tensorflow as tf

from rigl_keras import _files

__all__ = ["event_files", "forget_events"]


def event_files(folder: str | os.PathLike) -> list[Path]:
    """Returns the event files directly in a folder."""
    return sorted(Path(folder).glob("events.out.tfevents.*"))


def forget_events(
    folder: str | os.PathLike, *, first_step: int, prefix: str
) -> None:
    """Removes the events that a resumed run will write again.

    A killed process leaves events beyond the checkpoint from which its run
    continues, and TensorBoard would show their steps twice.

    Args:
        folder: Folder of the event files. None of them may be open for writing.
        first_step: Removes events of this step and later ones.
        prefix: Prefix of all tags of the run. Files with other tags are not
            from the run, and are not changed.
    """
    # Also created if nothing is written: it removes what a killed process left.
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
            # TensorBoard does not read this name. The file is renamed when
            # whole.
            file = unfinished / "events.unfinished"
            with tf.io.TFRecordWriter(str(file)) as writer:
                for record in kept:
                    writer.write(record)
            _files.put(file, path)


def _records(path):
    """Yields the complete records of a file of events."""
    # Much faster than TFRecordDataset, and silent about a truncated file.
    from tensorboard.backend.event_processing import event_file_loader

    yield from event_file_loader.RawEventFileLoader(str(path)).Load()
