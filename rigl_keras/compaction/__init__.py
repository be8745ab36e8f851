"""Smaller models that compute the same: folded batch norms, dead units."""

from rigl_keras.compaction.dead_units import Removal, remove_dead_units
from rigl_keras.compaction.folding import Folding, fold_batch_norm

__all__ = ["Folding", "Removal", "fold_batch_norm", "remove_dead_units"]
