"""Writes the files of a run, with advice for the case of a full disk."""

import functools

from rigl_keras import _files

__all__ = ["naming", "whole", "write"]

_ADVICE = (
    "The last checkpoint is intact. Make room, then pass --resume to continue."
)
naming = functools.partial(_files.naming, advice=_ADVICE)
whole = functools.partial(_files.whole, advice=_ADVICE)
write = functools.partial(_files.write, advice=_ADVICE)
