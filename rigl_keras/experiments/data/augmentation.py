"""Random crops, flips and resized crops, drawn for each example."""

from __future__ import annotations

import math
from typing import Any, cast

import tensorflow as tf

__all__ = ["ALGORITHM", "AUGMENTATIONS"]

PAD = 4  # pixels, on each side, of "pad_crop_flip"
TRIES = 10  # boxes drawn per image by "resized_crop_flip"
AREA = (0.08, 1.0)  # of a box, as a fraction of the image
ASPECT = (3 / 4, 4 / 3)  # of a box, width over height
# Named, so that a CPU, a GPU and a TPU host draw the same numbers.
ALGORITHM = "philox"


def crop_and_flip(
    images: tf.Tensor,
    tops: tf.Tensor,
    lefts: tf.Tensor,
    flips: tf.Tensor,
    *,
    pad: int = PAD,
) -> tf.Tensor:
    """Returns crops of images extended by reflection, with unchanged size.

    The padded image is never built: a reflection is a choice of rows and
    columns, and a flip reverses the columns. In a row a b c d, pad=2 means c b
    a b c d c b, and left=1 without a flip gives b a b c.

    Args:
        images: (batch, height, width, channels); height and width > pad.
        tops: (batch,) int32, first row of each crop in the padded image, in
            0..2 * pad; pad, the middle, does not move the image.
        lefts: (batch,) int32, first column, likewise.
        flips: (batch,) bool, True for crops to mirror left to right.
        pad: pixels reflected on each side, >= 0.
    """
    height, width = _size_of(images)
    rows = _reflect(tops[:, None] - pad + tf.range(height), height)
    columns = _reflect(lefts[:, None] - pad + tf.range(width), width)
    columns = tf.where(flips[:, None], columns[:, ::-1], columns)
    return _take(_take(images, rows, axis=1), columns, axis=2)


def resize_boxes(
    images: tf.Tensor, boxes: tf.Tensor, flips: tf.Tensor
) -> tf.Tensor:
    """Returns a box of each image, stretched to the size of the image.

    It is bilinear between pixel centres, as in `tf.image.resize`, and never
    uses pixels outside the box: output row i of n reads box row (i + 1/2) * box
    height / n - 1/2, or the box's nearest edge. (`tf.image.crop_and_resize`
    aligns corners, where a rounding error at the image's edge would paint a
    black line.)

    Args:
        images: (batch, height, width, channels), any numeric type.
        boxes: (batch, 4) int32: top, left, height, width, in pixels, within
            the image.
        flips: (batch,) bool, True for results to mirror left to right.

    Returns:
        float32 images.
    """
    tops, lefts, heights, widths = tf.unstack(boxes, axis=1)
    height, width = _size_of(images)
    rows = _positions(tops, heights, height)
    columns = _positions(lefts, widths, width)
    columns = tf.where(flips[:, None], columns[:, ::-1], columns)
    images = tf.cast(images, tf.float32)
    return _interpolate(_interpolate(images, rows, axis=1), columns, axis=2)


def draw_boxes(
    count: int | tf.Tensor, *, height: int, width: int, key: tf.Tensor
) -> tf.Tensor:
    """Draws boxes of random area, shape and place within an image.

    The area is uniform in 8 to 100 % of the image, and the logarithm of width
    over height uniform between those of 3/4 and 4/3. The first of ten such
    shapes that fits the image is used. Its place is uniform.

    Args:
        count: number of boxes, >= 0.
        height: of the image, in pixels.
        width: of the image, in pixels.
        key: (2,) int64, the seed of the draw.

    Returns:
        (count, 4) int32: top, left, height, width.
    """
    keys = tf.random.split(key, 4, alg=ALGORITHM)
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
    """Returns each row's first size that fits, or the whole image.

    For a square image, the whole image is the central crop.

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
    keys = tf.random.split(key, 3, alg=ALGORITHM)
    room = tf.fill([tf.shape(images)[0]], 2 * PAD)
    return crop_and_flip(
        images, _place(room, keys[0]), _place(room, keys[1]), _flips(room, keys)
    )


def _resized_crop_flip(images: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    keys = tf.random.split(key, 2, alg=ALGORITHM)
    height, width = _size_of(images)
    boxes = draw_boxes(
        tf.shape(images)[0], height=height, width=width, key=keys[0]
    )
    return resize_boxes(images, boxes, _flips(boxes[:, 0], keys))


def _unchanged(images: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    del key
    return images


AUGMENTATIONS = {
    "none": _unchanged,
    "pad_crop_flip": _pad_crop_flip,
    "resized_crop_flip": _resized_crop_flip,
}


def _size_of(images: tf.Tensor) -> tuple[int, int]:
    """Returns height and width, which are known during tracing."""
    height, width = images.shape[1:3]
    return cast(int, height), cast(int, width)


def _uniform(shape: Any, key: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return tf.random.stateless_uniform(
        shape, seed=key, minval=low, maxval=high, alg=ALGORITHM
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
    """Returns rows (axis 1) or columns (axis 2), separately per image."""
    return tf.gather(images, index, axis=axis, batch_dims=1)


def _positions(starts: tf.Tensor, sizes: tf.Tensor, count: int) -> tf.Tensor:
    """Returns the (batch, count) positions in an image along an axis."""
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
    high = tf.minimum(low + 1, _size_of(images)[axis - 1] - 1)
    below = _take(images, low, axis=axis)
    above = _take(images, high, axis=axis)
    return below + (above - below) * weight
