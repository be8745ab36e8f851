"""Plain dense Keras models; `rigl_keras.sparsify` makes them sparse."""

from rigl_keras.models.gpt import gpt
from rigl_keras.models.lenet import lenet5
from rigl_keras.models.mlp import mlp
from rigl_keras.models.resnet import resnet18, resnet50
from rigl_keras.models.wide_resnet import wide_resnet

__all__ = ["gpt", "lenet5", "mlp", "resnet18", "resnet50", "wide_resnet"]
