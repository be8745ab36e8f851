"""What a model costs: parameters, FLOPs and bits, layer by layer.

counting            `count`, the cost of a model
positions           how often each kernel is applied
training            what training costs, by method or by the masks of a run
"""

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
