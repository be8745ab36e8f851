"""Images, labels and texts for the experiments, and batches made of them.

`load` reads a whole dataset into memory; `Data.train` or `Text.train` turns it
into batches. Batch b of epoch e depends only on (seed, e, b), so a run that
resumes at the start of an epoch sees the same batches as an uninterrupted one.
A batch is augmented as a whole, by gathers, not image by image.
"""

from __future__ import annotations

import os
import socket
import urllib.request
from typing import Any

import numpy as np
import tensorflow as tf

from rigl_keras._extras import check_installed
from rigl_keras.experiments.data.batches import Data
from rigl_keras.experiments.data.recipes import (
    DATASETS,
    Recipe,
    TextRecipe,
    recipe_of,
)
from rigl_keras.experiments.data.text import TextUnavailableError, python_docs
from rigl_keras.experiments.data.text_batches import Text

# Where tfds finds each dataset: the source, or Google's prepared copies.
_HOSTS = {
    "cifar10": ("www.cs.toronto.edu", "storage.googleapis.com"),
    "cifar100": ("www.cs.toronto.edu", "storage.googleapis.com"),
    "mnist": ("storage.googleapis.com",),
}
_CONNECT_SECONDS = 10
_TEXTS = {"python_docs": python_docs}


class DatasetUnavailableError(OSError):
    """A dataset is not on this machine and cannot be downloaded."""


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation: int | None = None,
    context: int | None = None,
    epoch_examples: int | None = None,
) -> Data | Text:
    """Reads a dataset into memory and splits it by index, or by position.

    The last `Recipe.validation` training examples are held out; the test set is
    the dataset's own (for digits, which has none, the last 180 of all). Indices
    follow the order that tfds stores; it is fixed, and mixes the classes. A
    text ends with the validation and test parts.

    Args:
        name: one of `DATASETS` or `TEXTS`.
        data_dir: folder of tfds' prepared datasets. None: the environment
            variable TFDS_DATA_DIR, or tfds' default. Missing datasets are
            downloaded into it. "digits" comes with scikit-learn and
            "python_docs" with Python; both ignore it.
        validation: number of training examples to hold out, the last by index,
            or of characters of a text, >= 0. None: the recipe's.
        context: characters in an example of a text, >= 1. None: the recipe's.
            Not for images.
        epoch_examples: examples in an epoch of a text, >= 1. None: all. Not for
            images.

    Raises:
        ValueError: if name is unknown, the folder does not exist, or nothing
            would be left to train on.
        ImportError: if the package that provides the dataset is missing.
        DatasetUnavailableError: if the dataset is not on this machine and can't
            be downloaded.
    """
    recipe = recipe_of(
        name,
        validation=validation,
        context=context,
        epoch_examples=epoch_examples,
    )
    return read(recipe, data_dir=data_dir)


def read(
    recipe: Recipe | TextRecipe,
    *,
    data_dir: str | os.PathLike[str] | None = None,
) -> Data | Text:
    """Reads the dataset of a recipe into memory and splits it, as `load` does.

    Args:
        recipe: From `recipe_of`.
        data_dir: As in `load`.

    Raises: As in `load`.
    """
    name = recipe.name
    if isinstance(recipe, TextRecipe):
        return Text(recipe, _text(name))
    if name == "digits":
        splits = _digits(DATASETS[name])
    else:
        folder = _data_dir(data_dir)
        splits = [
            _tfds_split(name, split, folder) for split in ("train", "test")
        ]
    (images, labels), (test_images, test_labels) = splits
    cut = len(images) - recipe.validation
    if cut < 1:
        raise ValueError(
            f"{name!r} must have more than the {recipe.validation} training "
            f"examples that are held out. Received: {len(images)}. Hold out "
            "less or, if the copy under data_dir is incomplete, prepare "
            "it again."
        )
    return Data(
        recipe=recipe,
        train_images=images[:cut],
        train_labels=labels[:cut],
        validation_images=images[cut:],
        validation_labels=labels[cut:],
        test_images=test_images,
        test_labels=test_labels,
    )


def training_examples(recipe: Recipe | TextRecipe) -> int:
    """Returns the number of examples in an epoch.

    Args:
        recipe: From `recipe_of`. For a text, the text is read.

    Raises:
        DatasetUnavailableError: if a text is not on this machine.
    """
    if isinstance(recipe, TextRecipe):
        return recipe.training_examples(len(_text(recipe.name)))
    return recipe.examples - recipe.validation


def _text(name: str) -> str:
    try:
        return _TEXTS[name]()
    except TextUnavailableError as error:
        raise DatasetUnavailableError(str(error)) from error


def _digits(recipe: Recipe) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the training and the test part of scikit-learn's digits.

    Its ink, 0..16, becomes round(ink * 255 / 16): every dataset is uint8 in
    0..255.
    """
    check_installed("The data set 'digits'", "sklearn")
    from sklearn import datasets

    digits: Any = datasets.load_digits()
    images = np.rint(digits.images[..., None] * 255 / 16).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    cut = len(images) - recipe.validation  # the test has this size too
    return [(images[:cut], labels[:cut]), (images[cut:], labels[cut:])]


def _data_dir(data_dir: str | os.PathLike[str] | None) -> str | None:
    """Returns the given folder, the one named by TFDS_DATA_DIR, or None.

    tfds reads the variable once, on import; here it may be set at any time.
    """
    source = "data_dir"
    if data_dir is None:
        source = "the environment variable TFDS_DATA_DIR"
        data_dir = os.environ.get("TFDS_DATA_DIR")
    if not data_dir:
        return None
    folder = os.path.expanduser(os.fspath(data_dir))
    if not tf.io.gfile.isdir(folder):
        raise ValueError(
            f"{source} must be an existing folder. Received: {folder!r}. "
            "Create it to download the dataset there, or correct the path."
        )
    return folder


def _tfds_split(
    name: str, split: str, data_dir: str | None
) -> tuple[np.ndarray, np.ndarray]:
    check_installed(
        f"The data set {name!r}",
        "tensorflow_datasets",
        instead="Or train on 'digits'.",
    )
    import tensorflow_datasets as tfds

    def read(*, download: bool) -> Any:
        return tfds.load(
            name,
            split=split,
            data_dir=data_dir,
            batch_size=-1,
            shuffle_files=False,
            download=download,
        )

    try:
        try:
            examples = read(download=False)
        except AssertionError:  # tfds raises it if nothing is prepared
            _check_network(name)
            examples = read(download=True)
    # tfds does not catch the errors of requests, its file systems or its
    # readers; the way out is the same for all.
    except Exception as error:
        where = data_dir or "tfds' default folder"
        raise DatasetUnavailableError(
            f"{name!r} could not be read from {where}, or downloaded into "
            f"it ({type(error).__name__}: {_shortened(str(error))}). Either "
            "point --data_dir or TFDS_DATA_DIR at a folder where tfds has "
            "prepared it, or train on 'digits', which comes with "
            "scikit-learn and needs no download."
        ) from error
    return (
        np.asarray(examples["image"], np.uint8),
        np.asarray(examples["label"], np.int32),
    )


def _check_network(name: str) -> None:
    """Raises OSError if no host that has the dataset can be reached.

    tfds itself retries a download ten times, for about three and a half
    minutes, before it reports that there is no network.
    """
    if urllib.request.getproxies():
        return  # a proxy may reach what this machine can't; let tfds try
    for host in _HOSTS[name]:
        try:
            socket.create_connection((host, 443), _CONNECT_SECONDS).close()
            return
        except OSError:
            continue
    raise OSError(f"no connection to {' or '.join(_HOSTS[name])}")


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + " ..."
