"""Data sets: their recipes, random augmentation, and batches."""

from rigl_keras.experiments.data.augmentation import (
    crop_and_flip,
    draw_boxes,
    first_fit,
    resize_boxes,
)
from rigl_keras.experiments.data.batches import Data, normalise
from rigl_keras.experiments.data.datasets import DatasetUnavailableError, load
from rigl_keras.experiments.data.recipes import Recipe

__all__ = [
    "Data",
    "DatasetUnavailableError",
    "Recipe",
    "crop_and_flip",
    "draw_boxes",
    "first_fit",
    "load",
    "normalise",
    "resize_boxes",
]
