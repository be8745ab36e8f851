"""Smaller models that compute the same: folded batch norms, dead units.

`fold_batch_norm` folds batch norms into the layers before them;
`remove_dead_units` removes units that sparsity has cut off. Both return a plain
dense Keras model.

folding             `fold_batch_norm`
dead_units          `remove_dead_units`
channel_rules       what each kind of layer does to single channels
graphs              converts a model to a list of calls, and back
linear_layers       kinds of layers with a kernel, and copies of other sizes
"""

from rigl_keras.compaction.dead_units import Removal, remove_dead_units
from rigl_keras.compaction.folding import Folding, fold_batch_norm

__all__ = ["Folding", "Removal", "fold_batch_norm", "remove_dead_units"]
