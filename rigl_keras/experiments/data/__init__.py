"""Data sets: their recipes, random augmentation, and batches."""

from rigl_keras.experiments.data.augmentation import (
    crop_and_flip,
    draw_boxes,
    first_fit,
    resize_boxes,
)
from rigl_keras.experiments.data.batches import Data, normalise
from rigl_keras.experiments.data.datasets import (
    DatasetUnavailableError,
    load,
    read,
    training_examples,
)
from rigl_keras.experiments.data.recipes import Recipe, TextRecipe, recipe_of
from rigl_keras.experiments.data.text_batches import Text

__all__ = [
    "Data",
    "DatasetUnavailableError",
    "Recipe",
    "Text",
    "TextRecipe",
    "crop_and_flip",
    "draw_boxes",
    "first_fit",
    "load",
    "normalise",
    "read",
    "recipe_of",
    "resize_boxes",
    "training_examples",
]
