"""What a model costs: parameters, FLOPs and bits, layer by layer."""

from rigl_keras.flops.counting import CONVENTIONS, Count, LayerCount, count
from rigl_keras.flops.training import training_curve, training_flops

__all__ = [
    "CONVENTIONS",
    "Count",
    "LayerCount",
    "count",
    "training_curve",
    "training_flops",
]
