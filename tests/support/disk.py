"""Records the order of system calls that write to the disk."""

import os
import pathlib

import pytest


@pytest.fixture
def disk(monkeypatch):
    """Returns the recorded calls in order, `[(call, inode)]`."""
    asked = []
    fsync, replace = os.fsync, pathlib.Path.replace
    rename = pathlib.Path.rename

    def synced(descriptor):
        asked.append(("sync", os.fstat(descriptor).st_ino))
        return fsync(descriptor)

    def moved(act):
        def move(path, target):
            asked.append(("move", path.stat().st_ino))
            made = act(path, target)
            asked.append(("moved into", made.parent.stat().st_ino))
            return made

        return move

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(pathlib.Path, "replace", moved(replace))
    monkeypatch.setattr(pathlib.Path, "rename", moved(rename))
    return asked


def check_kept(asked, moves):
    """Checks that files are synced before a move, and folders after it."""
    found = [i for i, (what, _) in enumerate(asked) if what == "move"]
    assert len(found) == moves
    for i in found:
        _, moved = asked[i]
        what, folder = asked[i + 1]
        assert what == "moved into"
        assert ("sync", moved) in asked[:i]
        assert ("sync", folder) in asked[i + 2 :]
