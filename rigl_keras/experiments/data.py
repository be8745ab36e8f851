"""Images and labels for the experiments, and the batches made of them.

`load` reads a whole dataset into memory; `Data.train` turns it into batches.
Batch b of epoch e is a function of (seed, e, b) and of nothing else, so a run
that is resumed at an epoch's start sees what the uninterrupted one would have
seen. A batch is augmented whole, by gathers, not image by image.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import socket
import urllib.request

import numpy as np
import tensorflow as tf

PAD = 4  # pixels, on each side, of "pad_crop_flip"
TRIES = 10  # boxes drawn per image by "resized_crop_flip"
AREA = (0.08, 1.0)  # of a box, as a fraction of the image
ASPECT = (3 / 4, 4 / 3)  # of a box, width over height

# Named, so that a CPU, a GPU and a TPU host draw the same numbers.
_ALGORITHM = "philox"

# Where tfds finds each dataset: the source, or Google's prepared copies.
_HOSTS = {
    "cifar10": ("www.cs.toronto.edu", "storage.googleapis.com"),
    "cifar100": ("www.cs.toronto.edu", "storage.googleapis.com"),
    "mnist": ("storage.googleapis.com",),
}
_CONNECT_SECONDS = 10


class DatasetUnavailableError(RuntimeError):
    """A dataset is neither on this machine nor to be had from the network."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one dataset is and how its images are prepared.

    An image x in 0..255 reaches the model as (x / 255 - mean) / std.

    Args:
        name: the name `load` knows it by.
        input_shape: (height, width, channels) of an image.
        num_classes: labels are 0..num_classes - 1.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, of images scaled to [0, 1], > 0.
        augmentation: of training images only. "none"; "pad_crop_flip": 4
            pixels of reflection around the image, a random crop of the
            image's own size, a random horizontal flip; or
            "resized_crop_flip": a random box of 8 to 100 % of the area,
            resized to the image's own size, and a random horizontal flip.
        validation: number of training examples held out, the last by index,
            >= 0.
        examples: number of training examples, those held out included.
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str
    validation: int
    examples: int

    def __post_init__(self) -> None:
        if self.augmentation not in _AUGMENTATIONS:
            raise ValueError(
                f"augmentation must be one of {sorted(_AUGMENTATIONS)}. "
                f"Received: augmentation={self.augmentation!r}"
            )
        channels = self.input_shape[-1]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"mean and std must have one value per channel, {channels} "
                f"for input_shape={self.input_shape}. Received: "
                f"mean={self.mean}, std={self.std}"
            )
        if min(self.std) <= 0:
            raise ValueError(
                f"std must be > 0 in every channel. Received: std={self.std}"
            )
        _check_integer("validation", self.validation, at_least=0)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A dataset in memory, split in three, and its batches.

    Images are uint8 (count, height, width, channels), labels int32 (count,).

    Raises:
        ValueError: if the arrays do not have the recipe's shape, are not of
            these types, are empty, or differ in length.
    """

    recipe: Recipe
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            images = getattr(self, f"{split}_images")
            labels = getattr(self, f"{split}_labels")
            count = len(images)
            wanted = (count, *self.recipe.input_shape)
            # Training on all examples leaves none to validate on.
            empty = count == 0 and split != "validation"
            if empty or images.shape != wanted or images.dtype != np.uint8:
                raise ValueError(
                    f"{split}_images of {self.recipe.name!r} must be uint8 of "
                    f"shape (count >= 1, *{self.recipe.input_shape}). "
                    f"Received: {images.dtype} of shape {images.shape}"
                )
            if labels.shape != (count,) or labels.dtype != np.int32:
                raise ValueError(
                    f"{split}_labels of {self.recipe.name!r} must be int32 of "
                    f"shape ({count},), one per image. Received: "
                    f"{labels.dtype} of shape {labels.shape}"
                )

    def __repr__(self) -> str:
        return (
            f"Data({self.recipe.name!r}: {len(self.train_images)} training, "
            f"{len(self.validation_images)} validation, "
            f"{len(self.test_images)} test images of "
            f"{self.recipe.input_shape})"
        )

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the batches in an epoch, the last, short one included.

        >>> load("digits").steps_per_epoch(128)  # 1,437 / 128 = 11.2
        12

        Args:
            batch_size: examples per batch, >= 1.

        Raises:
            ValueError: if batch_size is not an integer >= 1.
        """
        _check_integer("batch_size", batch_size, at_least=1)
        return math.ceil(len(self.train_images) / batch_size)

    def train(
        self,
        *,
        batch_size: int,
        seed: int,
        epochs: int,
        first_epoch: int = 0,
    ) -> tf.data.Dataset:
        """Returns the batches of all epochs, one epoch after the other.

        Every epoch holds each training example once, in an order of its own,
        and ends with a short batch where batch_size does not divide the
        count. Order and augmentation of an epoch depend on seed and epoch
        only: `train(first_epoch=1, epochs=2, ...)` is the second half of
        `train(epochs=2, ...)`, bit for bit.

        The length is known, `(epochs - first_epoch) * steps_per_epoch`; pass
        `steps_per_epoch` to `fit`, or it takes all epochs for one, and
        `shuffle=False`, or Keras warns that it won't shuffle a dataset.

        Args:
            batch_size: examples per batch, >= 1.
            seed: of order and augmentation, any 64-bit integer.
            epochs: the epoch to stop before, > first_epoch.
            first_epoch: the epoch to begin with, >= 0, counted from 0.

        Returns:
            A dataset of (float32 images, int32 labels).

        Raises:
            ValueError: if an argument is outside its limits.
        """
        steps = self.steps_per_epoch(batch_size)
        _check_integer("seed", seed, at_least=-(2**63), below=2**63)
        _check_integer("first_epoch", first_epoch, at_least=0)
        _check_integer("epochs", epochs, at_least=1)
        if epochs <= first_epoch:
            raise ValueError(
                "epochs is the epoch to stop before, not how many to add, and "
                "must be greater than first_epoch. Received: "
                f"epochs={epochs}, first_epoch={first_epoch}. A run with "
                "nothing left to train needs no dataset."
            )
        images, labels = _on_host(self.train_images, self.train_labels)
        count = len(self.train_images)
        augment = _AUGMENTATIONS[self.recipe.augmentation]

        def batches_of(epoch: tf.Tensor) -> tf.data.Dataset:
            order_key, augment_key = _epoch_keys(seed, epoch)
            order = tf.random.experimental.stateless_shuffle(
                tf.range(count), seed=order_key, alg=_ALGORITHM
            )

            def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                start = step * batch_size
                key = tf.random.fold_in(augment_key, step, alg=_ALGORITHM)
                return order[start : start + batch_size], key

            return tf.data.Dataset.range(steps).map(batch)

        def examples(
            indices: tf.Tensor, key: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            batch = augment(tf.gather(images, indices), key)
            return normalise(batch, self.recipe), tf.gather(labels, indices)

        dataset = tf.data.Dataset.range(first_epoch, epochs)
        dataset = dataset.flat_map(batches_of)
        dataset = dataset.map(
            examples, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        total = (epochs - first_epoch) * steps
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(total))
        return dataset.prefetch(tf.data.AUTOTUNE)

    def validation(self, *, batch_size: int) -> tf.data.Dataset:
        """Returns the held-out examples once, in order, not augmented.

        Args:
            batch_size: examples per batch, >= 1; the last may be short.

        Returns:
            A dataset of (float32 images, int32 labels).

        Raises:
            ValueError: if batch_size is not an integer >= 1, or nothing is
                held out.
        """
        if not len(self.validation_labels):
            raise ValueError(
                "All examples are trained on: none is held out to validate "
                "on. Load the dataset with validation > 0."
            )
        return _in_order(
            self.validation_images,
            self.validation_labels,
            batch_size=batch_size,
            recipe=self.recipe,
        )

    def test(self, *, batch_size: int) -> tf.data.Dataset:
        """Returns the test examples once, in order, not augmented.

        Args:
            batch_size: examples per batch, >= 1; the last may be short.

        Returns:
            A dataset of (float32 images, int32 labels).

        Raises:
            ValueError: if batch_size is not an integer >= 1.
        """
        return _in_order(
            self.test_images,
            self.test_labels,
            batch_size=batch_size,
            recipe=self.recipe,
        )


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation: int | None = None,
) -> Data:
    """Reads a dataset into memory and splits it by index.

    The last `Recipe.validation` training examples are held out; the test set
    is the dataset's own (for digits, which has none, the last 180 of all).
    An index is a place in the order tfds stores, which is fixed when tfds
    prepares the dataset and mixes the classes.

    Args:
        name: one of `DATASETS`.
        data_dir: folder where tfds keeps prepared datasets. Without it the
            environment variable TFDS_DATA_DIR, without that tfds' own
            default. What is not there is downloaded into it. "digits" comes
            with scikit-learn and ignores it.
        validation: how many training examples are held out, the last by
            index, >= 0. None: as many as the recipe says.

    Raises:
        ValueError: if name is unknown, the folder does not exist, or nothing
            would be left to train on.
        ImportError: if the package that provides the dataset is missing.
        DatasetUnavailableError: if the dataset is not on this machine and
            can't be downloaded.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(str(name), DATASETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"name must be one of {sorted(DATASETS)}. "
            f"Received: name={name!r}.{hint}"
        )
    recipe = DATASETS[name]
    if validation is not None:
        recipe = dataclasses.replace(recipe, validation=validation)
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
            "less, or, where the copy under data_dir is not the whole "
            "dataset, prepare it again."
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


def normalise(images: tf.Tensor, recipe: Recipe) -> tf.Tensor:
    """Returns (images / 255 - mean) / std, in float32.

    >>> white = tf.constant(255, tf.uint8, [1, 28, 28, 1])
    >>> normalise(white, DATASETS["mnist"])[0, 0, 0]  # (1 - .1307) / .3081
    [2.8215]

    Args:
        images: (batch, height, width, channels), in 0..255.
        recipe: whose mean and std are used.
    """
    images = tf.cast(images, tf.float32) / 255.0
    return (images - tf.constant(recipe.mean)) / tf.constant(recipe.std)


def crop_and_flip(
    images: tf.Tensor,
    tops: tf.Tensor,
    lefts: tf.Tensor,
    flips: tf.Tensor,
    *,
    pad: int = PAD,
) -> tf.Tensor:
    """Returns crops of the reflected-out images, of the images' own size.

    The padded image is never built: to reflect is to choose rows and columns,
    and to flip is to choose the columns in reverse. In a row a b c d with
    pad=2, that is c b a b c d c b, left=1 without a flip gives b a b c.

    Args:
        images: (batch, height, width, channels); height and width > pad.
        tops: (batch,) int32, first row of each crop in the padded image, in
            0..2 * pad; the middle, pad, leaves the image where it is.
        lefts: (batch,) int32, first column, likewise.
        flips: (batch,) bool, True for a crop to be mirrored left to right.
        pad: pixels reflected on each side, >= 0.
    """
    height, width = images.shape[1:3]
    rows = _reflect(tops[:, None] - pad + tf.range(height), height)
    columns = _reflect(lefts[:, None] - pad + tf.range(width), width)
    columns = tf.where(flips[:, None], columns[:, ::-1], columns)
    return _take(_take(images, rows, axis=1), columns, axis=2)


def resize_boxes(
    images: tf.Tensor, boxes: tf.Tensor, flips: tf.Tensor
) -> tf.Tensor:
    """Returns a box of each image, stretched to the image's own size.

    Bilinear between pixel centres, as in `tf.image.resize`, and never with
    pixels from outside the box: output row i of n looks at box row
    (i + 1/2) * box height / n - 1/2, or at the box's nearest edge.
    (`tf.image.crop_and_resize` would aim between the corners instead, and a
    rounding error at the image's edge would paint a black line.)

    Args:
        images: (batch, height, width, channels), any numeric type.
        boxes: (batch, 4) int32: top, left, height, width, in pixels, within
            the image.
        flips: (batch,) bool, True for a result to be mirrored left to right.

    Returns:
        float32 images.
    """
    tops, lefts, heights, widths = tf.unstack(boxes, axis=1)
    rows = _positions(tops, heights, images.shape[1])
    columns = _positions(lefts, widths, images.shape[2])
    columns = tf.where(flips[:, None], columns[:, ::-1], columns)
    images = tf.cast(images, tf.float32)
    return _interpolate(_interpolate(images, rows, axis=1), columns, axis=2)


def draw_boxes(
    count: int | tf.Tensor, *, height: int, width: int, key: tf.Tensor
) -> tf.Tensor:
    """Draws boxes of random area, shape and place within an image.

    Area is uniform in 8 to 100 % of the image, the logarithm of width over
    height uniform between those of 3/4 and 4/3. Of ten such shapes the first
    that fits the image is taken, and its place is uniform.

    Args:
        count: number of boxes, >= 0.
        height: of the image, in pixels.
        width: of the image, in pixels.
        key: (2,) int64, the seed of the draw.

    Returns:
        (count, 4) int32: top, left, height, width.
    """
    keys = tf.random.split(key, 4, alg=_ALGORITHM)
    shape = [count, TRIES]
    area = _uniform(shape, keys[0], *AREA) * height * width
    aspect = tf.exp(_uniform(shape, keys[1], *(math.log(a) for a in ASPECT)))
    heights, widths = first_fit(
        tf.cast(tf.round(tf.sqrt(area / aspect)), tf.int32),
        tf.cast(tf.round(tf.sqrt(area * aspect)), tf.int32),
        height=height,
        width=width,
    )
    return tf.stack(
        [
            _place(height - heights, keys[2]),
            _place(width - widths, keys[3]),
            heights,
            widths,
        ],
        axis=1,
    )


def first_fit(
    heights: tf.Tensor, widths: tf.Tensor, *, height: int, width: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns each row's first size that fits, or else the whole image.

    The whole image is the central crop of a square one.

    Args:
        heights: (count, tries) int32, in pixels.
        widths: (count, tries) int32, in pixels.
        height: of the image, the most a box may have.
        width: of the image, likewise.

    Returns:
        (count,) heights and (count,) widths.
    """
    fits = (heights >= 1) & (heights <= height)
    fits &= (widths >= 1) & (widths <= width)
    first = tf.argmax(tf.cast(fits, tf.int32), axis=1)
    fitted = tf.reduce_any(fits, axis=1)
    return (
        tf.where(fitted, tf.gather(heights, first, batch_dims=1), height),
        tf.where(fitted, tf.gather(widths, first, batch_dims=1), width),
    )


def _pad_crop_flip(images: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    keys = tf.random.split(key, 3, alg=_ALGORITHM)
    room = tf.fill([tf.shape(images)[0]], 2 * PAD)
    return crop_and_flip(
        images, _place(room, keys[0]), _place(room, keys[1]), _flips(room, keys)
    )


def _resized_crop_flip(images: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    keys = tf.random.split(key, 2, alg=_ALGORITHM)
    height, width = images.shape[1:3]
    boxes = draw_boxes(
        tf.shape(images)[0], height=height, width=width, key=keys[0]
    )
    return resize_boxes(images, boxes, _flips(boxes[:, 0], keys))


def _unchanged(images: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    del key
    return images


_AUGMENTATIONS = {
    "none": _unchanged,
    "pad_crop_flip": _pad_crop_flip,
    "resized_crop_flip": _resized_crop_flip,
}


def _epoch_keys(seed: int, epoch: tf.Tensor) -> list[tf.Tensor]:
    """Returns the keys of an epoch's order and of its augmentation.

    `fold_in` and `split` hash, so neighbouring seeds, epochs and batches
    share no stream, as they would if the numbers were added up.
    """
    key = tf.random.fold_in(
        tf.constant([seed, 0], tf.int64), epoch, alg=_ALGORITHM
    )
    return tf.unstack(tf.random.split(key, 2, alg=_ALGORITHM))


def _uniform(
    shape: list[int | tf.Tensor], key: tf.Tensor, low: float, high: float
) -> tf.Tensor:
    return tf.random.stateless_uniform(
        shape, seed=key, minval=low, maxval=high, alg=_ALGORITHM
    )


def _place(room: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Returns a uniform integer in 0..room for each entry of room."""
    draw = _uniform(tf.shape(room), key, 0.0, 1.0)
    return tf.cast(draw * tf.cast(room + 1, tf.float32), tf.int32)


def _flips(like: tf.Tensor, keys: tf.Tensor) -> tf.Tensor:
    """Returns a fair coin for each entry of like, from the last key."""
    return _uniform(tf.shape(like), keys[-1], 0.0, 1.0) < 0.5


def _reflect(index: tf.Tensor, size: int) -> tf.Tensor:
    """Returns -1 as 1, -2 as 2, size as size - 2, and so on."""
    return (size - 1) - tf.abs((size - 1) - tf.abs(index))


def _take(images: tf.Tensor, index: tf.Tensor, *, axis: int) -> tf.Tensor:
    """Returns of each image its own rows (axis 1) or columns (axis 2)."""
    return tf.gather(images, index, axis=axis, batch_dims=1)


def _positions(starts: tf.Tensor, sizes: tf.Tensor, count: int) -> tf.Tensor:
    """Returns the (batch, count) places in an image that fill an axis."""
    starts = tf.cast(starts, tf.float32)[:, None]
    sizes = tf.cast(sizes, tf.float32)[:, None]
    centres = (tf.range(count, dtype=tf.float32) + 0.5) * sizes / count - 0.5
    return starts + tf.clip_by_value(centres, 0.0, sizes - 1.0)


def _interpolate(
    images: tf.Tensor, positions: tf.Tensor, *, axis: int
) -> tf.Tensor:
    low = tf.floor(positions)
    # (batch, n, 1, 1) for rows, (batch, 1, n, 1) for columns.
    weight = tf.expand_dims(positions - low, 3 - axis)[..., None]
    low = tf.cast(low, tf.int32)
    # Beyond the last pixel the weight is 0; the index must still exist.
    high = tf.minimum(low + 1, images.shape[axis] - 1)
    below = _take(images, low, axis=axis)
    above = _take(images, high, axis=axis)
    return below + (above - below) * weight


def _in_order(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    recipe: Recipe,
) -> tf.data.Dataset:
    _check_integer("batch_size", batch_size, at_least=1)
    steps = math.ceil(len(images) / batch_size)
    all_images, all_labels = _on_host(images, labels)

    def examples(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        start = step * batch_size
        batch = all_images[start : start + batch_size]
        return (
            normalise(batch, recipe),
            all_labels[start : start + batch_size],
        )

    dataset = tf.data.Dataset.range(steps).map(
        examples, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    return dataset.prefetch(tf.data.AUTOTUNE)


def _on_host(*arrays: np.ndarray) -> list[tf.Tensor]:
    # tf.data runs on the CPU: on a GPU the constants would be copied back.
    with tf.device("CPU:0"):
        return [tf.constant(array) for array in arrays]


def _digits(recipe: Recipe) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the training and the test part of scikit-learn's digits.

    Its ink, 0..16, becomes round(ink * 255 / 16), so that every dataset is
    uint8 in 0..255.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "'digits' is part of scikit-learn, which is not installed. "
            "Run `pip install scikit-learn`."
        ) from error
    digits = datasets.load_digits()
    images = np.rint(digits.images[..., None] * 255 / 16).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    cut = len(images) - recipe.validation  # test and validation are as large
    return [(images[:cut], labels[:cut]), (images[cut:], labels[cut:])]


def _data_dir(data_dir: str | os.PathLike[str] | None) -> str | None:
    """Returns the folder given, or else named by TFDS_DATA_DIR, or None.

    tfds reads the variable once, when it is imported; here it may be set at
    any time.
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
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{name!r} is loaded by TensorFlow Datasets, which is not "
            "installed. Run `pip install tensorflow-datasets`, or train on "
            "'digits'."
        ) from error

    def read(*, download: bool) -> dict[str, tf.Tensor]:
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
        except AssertionError:  # how tfds says that nothing is prepared
            _check_network(name)
            examples = read(download=True)
    # tfds lets through whatever requests, its file systems or its readers
    # raise; the way out is the same for all of them.
    except Exception as error:
        where = data_dir or "tfds' default folder"
        raise DatasetUnavailableError(
            f"{name!r} could not be read from {where}, nor downloaded into "
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

    tfds itself tries a download ten times over, about three and a half
    minutes, before it admits that there is no network.
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


def _check_integer(
    name: str, value: int, *, at_least: int, below: int | None = None
) -> None:
    integer = isinstance(value, numbers.Integral) and type(value) is not bool
    if integer and value >= at_least and (below is None or value < below):
        return
    limits = f">= {at_least}" + ("" if below is None else f" and < {below}")
    raise ValueError(
        f"{name} must be an integer {limits}. Received: {name}={value!r}"
    )


DATASETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="cifar10",
            examples=50_000,
            input_shape=(32, 32, 3),
            num_classes=10,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
            augmentation="pad_crop_flip",
            validation=5_000,
        ),
        Recipe(
            name="cifar100",
            examples=50_000,
            input_shape=(32, 32, 3),
            num_classes=100,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            augmentation="resized_crop_flip",
            validation=5_000,
        ),
        Recipe(
            name="mnist",
            examples=60_000,
            input_shape=(28, 28, 1),
            num_classes=10,
            mean=(0.1307,),
            std=(0.3081,),
            augmentation="none",
            validation=6_000,
        ),
        Recipe(
            name="digits",
            examples=1_617,
            input_shape=(8, 8, 1),
            num_classes=10,
            mean=(0.3054,),  # of the 1,437 training images
            std=(0.3753,),
            augmentation="none",
            validation=180,
        ),
    )
}
