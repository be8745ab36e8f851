"""The contents and the order of batches, and errors."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.datasets import arrays

from rigl_keras.experiments import data
from rigl_keras.experiments.data import recipes

RECIPE = data.Recipe(
    name="toy",
    input_shape=(32, 32, 3),
    num_classes=10,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    augmentation="none",
    validation=3,
    examples=12,
)


def toy(count, augmentation="none"):
    """Returns `count` examples with labels 0, 1, 2, ... and pixels of places.

    Channel 0 holds 4 * row, channel 1 holds 4 * column.
    """
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0] = 4 * np.arange(32)[:, None]
    image[..., 1] = 4 * np.arange(32)[None, :]
    images = np.repeat(image[None], count, axis=0)
    labels = np.arange(count, dtype=np.int32)
    recipe = dataclasses.replace(RECIPE, augmentation=augmentation)
    return data.Data(
        recipe=recipe,
        train_images=images,
        train_labels=labels,
        validation_images=images[:3],
        validation_labels=labels[:3],
        test_images=images[:2],
        test_labels=labels[:2],
    )


def where(images):
    """Reads (top, left, flip) of pad_crop_flip from toy images.

    Offsets are within -4..4, so the centre is never a reflected pixel.
    """
    pixels = np.rint(images * 255 / 4).astype(int)
    flips = pixels[:, 16, 17, 1] < pixels[:, 16, 16, 1]
    middle = np.where(flips, pixels[:, 16, 15, 1], pixels[:, 16, 16, 1])
    return pixels[:, 16, 16, 0] - 12, middle - 12, flips


def key(number):
    return tf.constant([number, 0], tf.int64)


# --- crops, flips and scales, by hand


def test_a_row_is_reflected_cropped_and_flipped_by_hand():
    row = tf.reshape(tf.constant([10, 20, 30, 40], tf.uint8), [1, 1, 4, 1])
    image = tf.repeat(row, 4, axis=1)
    padded = [30, 20, 10, 20, 30, 40, 30, 20]  # c b | a b c d | c b
    for left in range(5):
        for flip in (False, True):
            crop = data.crop_and_flip(
                image,
                tf.constant([2]),
                tf.constant([left]),
                tf.constant([flip]),
                pad=2,
            )
            wanted = padded[left : left + 4][:: -1 if flip else 1]
            assert crop[0, 0, :, 0].numpy().tolist() == wanted


def test_every_crop_is_a_slice_of_numpys_reflected_image():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    padded = np.pad(image, [(4, 4), (4, 4), (0, 0)], mode="reflect")
    offsets = list(itertools.product(range(9), range(9), (0, 1)))
    tops, lefts, flips = np.array(offsets).T
    images = np.repeat(image[None], len(offsets), axis=0)
    crops = data.crop_and_flip(
        tf.constant(images),
        tf.constant(tops, tf.int32),
        tf.constant(lefts, tf.int32),
        tf.constant(flips, tf.bool),
    ).numpy()
    assert crops.dtype == np.uint8
    for crop, (top, left, flip) in zip(crops, offsets, strict=True):
        wanted = padded[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(crop, wanted[:, ::-1] if flip else wanted)
    middle = crops[offsets.index((4, 4, 0))]
    np.testing.assert_array_equal(middle, image)


@pytest.mark.parametrize(
    ("name", "pixel", "wanted"),
    [
        ("cifar10", (0, 0, 0), (-2.4291, -2.4183, -2.2214)),
        ("cifar100", (255, 255, 255), (1.8440, 2.0027, 2.0243)),
        ("mnist", (255,), (2.8215,)),
        ("digits", (51,), (-0.2808,)),  # 51 / 255 = 0.2
    ],
)
def test_normalisation_by_hand(name, pixel, wanted):
    recipe = recipes.DATASETS[name]
    image = tf.constant([[[pixel]]], tf.uint8)
    scaled = data.normalise(image, recipe)
    assert scaled.dtype == tf.float32
    np.testing.assert_allclose(scaled[0, 0, 0], wanted, atol=1e-4)


def test_recipes_are_those_of_the_report():
    held_out = {name: r.validation for name, r in recipes.DATASETS.items()}
    assert held_out == {
        "cifar10": 5_000,
        "cifar100": 5_000,
        "mnist": 6_000,
        "digits": 180,
    }
    augmentations = [r.augmentation for r in recipes.DATASETS.values()]
    assert augmentations == [
        "pad_crop_flip",
        "resized_crop_flip",
        "none",
        "none",
    ]


# --- resized crops


def test_first_fit_takes_the_first_that_fits_or_the_whole_image():
    heights = tf.constant([[9, 4, 2], [9, 0, 3], [8, 1, 1]])
    widths = tf.constant([[4, 8, 2], [4, 4, 9], [8, 1, 1]])
    heights, widths = data.first_fit(heights, widths, height=8, width=8)
    assert heights.numpy().tolist() == [4, 8, 8]
    assert widths.numpy().tolist() == [8, 8, 8]


def test_boxes_stay_inside_and_cover_the_range_of_sizes():
    boxes = data.draw_boxes(20_000, height=32, width=32, key=key(0)).numpy()
    tops, lefts, heights, widths = boxes.T
    assert min(tops.min(), lefts.min()) == 0
    assert (tops + heights).max() == 32
    assert (lefts + widths).max() == 32
    area = heights * widths / 32**2
    # Rounding to pixels changes the sides of a small box by up to half a pixel.
    assert 0.06 < area.min() < 0.09
    assert area.max() == 1.0
    # Uniform in 0.08..1 has mean 0.54; the boxes that do not fit are large.
    assert 0.45 < area.mean() < 0.54
    aspect = np.log(widths / heights)
    assert -0.40 < aspect.min() < -0.28  # log(3/4) = -0.288, and rounding
    assert 0.28 < aspect.max() < 0.40
    assert abs(aspect.mean()) < 0.01
    small = (heights == 16) & (widths == 16)
    assert set(tops[small]) == set(range(17))  # every place is possible
    assert abs(np.corrcoef(tops[small], lefts[small])[0, 1]) < 0.2


def test_a_resized_box_is_the_resized_slice():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    boxes = np.array(
        [[0, 0, 32, 32], [3, 5, 9, 20], [31, 31, 1, 1], [20, 0, 12, 32]],
        np.int32,
    )
    images = tf.constant(np.repeat(image[None], len(boxes), axis=0))
    got = data.resize_boxes(images, tf.constant(boxes), tf.fill([4], False))
    mirrored = data.resize_boxes(images, tf.constant(boxes), tf.fill([4], True))
    for index, (top, left, height, width) in enumerate(boxes):
        piece = image[top : top + height, left : left + width]
        wanted = tf.image.resize(piece, [32, 32]).numpy()
        np.testing.assert_allclose(got[index], wanted, atol=1e-2)
        np.testing.assert_allclose(mirrored[index], wanted[:, ::-1], atol=1e-2)
    np.testing.assert_array_equal(got[0], image)


def test_a_resized_box_takes_nothing_from_outside():
    boxes = data.draw_boxes(500, height=32, width=32, key=key(1))
    images = np.zeros((500, 32, 32, 1), np.uint8)
    for index, (top, left, height, width) in enumerate(boxes.numpy()):
        images[index, top : top + height, left : left + width] = 200
    flips = tf.constant([False, True] * 250)
    stretched = data.resize_boxes(tf.constant(images), boxes, flips)
    np.testing.assert_array_equal(stretched, np.full_like(stretched, 200))


# --- epochs: order, streams, resuming


@pytest.mark.slow_but("none", "pad_crop_flip")
@pytest.mark.parametrize(
    "augmentation", ["none", "pad_crop_flip", "resized_crop_flip"]
)
def test_same_seed_and_epoch_are_bit_identical_and_resume(augmentation):
    source = toy(50, augmentation)
    images, labels = arrays(source.train(batch_size=16, seed=7, epochs=2))
    again = arrays(source.train(batch_size=16, seed=7, epochs=2))
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(labels, again[1])
    resumed = arrays(
        source.train(batch_size=16, seed=7, first_epoch=1, epochs=2)
    )
    np.testing.assert_array_equal(images[50:], resumed[0])
    np.testing.assert_array_equal(labels[50:], resumed[1])
    assert (labels[:50] != labels[50:]).any()
    other = arrays(source.train(batch_size=16, seed=8, epochs=2))
    assert (labels != other[1]).any()
    # The order must not depend on a sum such as seed + epoch.
    assert (labels[50:] != other[1][:50]).any()


def test_every_example_comes_once_per_epoch_in_a_mixed_order():
    source = toy(50)
    dataset = source.train(batch_size=16, seed=0, epochs=3)
    sizes = [len(labels) for _, labels in dataset]
    assert sizes == [16, 16, 16, 2] * 3
    assert len(dataset) == 12
    epochs = arrays(dataset)[1].reshape(3, 50)
    for order in epochs:
        assert sorted(order) == list(range(50))
        assert list(order) != list(range(50))
    whole = source.train(batch_size=99, seed=0, epochs=3)
    np.testing.assert_array_equal(arrays(whole)[1].reshape(3, 50), epochs)


def test_image_and_label_stay_together():
    source = toy(20)
    source.train_images[:, 0, 0, 2] = np.arange(20)
    images, labels = arrays(source.train(batch_size=6, seed=3, epochs=1))
    np.testing.assert_array_equal(np.rint(images[:, 0, 0, 2] * 255), labels)


def test_crops_and_flips_are_uniform_and_independent():
    source = toy(1_800, "pad_crop_flip")
    images, _ = arrays(source.train(batch_size=900, seed=0, epochs=1))
    tops, lefts, flips = where(images)
    for offsets in (tops, lefts):
        counts = np.bincount(offsets, minlength=9)
        assert len(counts) == 9
        # 200 each; the bounds are five standard deviations of 13.3.
        assert 134 < counts.min() <= counts.max() < 266
    assert 794 < flips.sum() < 1_006  # 900, standard deviation 21
    pairs = [(tops, lefts), (tops, flips), (lefts, flips)]
    pairs += [(draw[:900], draw[900:]) for draw in (tops, lefts, flips)]
    for first, second in pairs:
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.17


def test_seeds_epochs_and_batches_draw_from_streams_of_their_own():
    source = toy(600, "pad_crop_flip")
    seen = {}
    for seed in (0, 1, 2):
        images, _ = arrays(source.train(batch_size=300, seed=seed, epochs=3))
        draws = np.stack(where(images)).reshape(3, 3, 2, 300)
        for epoch in range(3):
            for batch in range(2):
                for draw in draws[:, epoch, batch]:
                    seen[draw.tobytes()] = (seed, epoch, batch)
    assert len(seen) == 3 * 3 * 2 * 3


def test_training_images_are_augmented_and_the_others_are_not():
    source = toy(30, "pad_crop_flip")
    raw = source.train_images / np.float32(255)
    images, _ = arrays(source.train(batch_size=30, seed=0, epochs=1))
    assert (images != raw).any()
    for dataset, count in (
        (source.validation(batch_size=2), 3),
        (source.test(batch_size=2), 2),
    ):
        images, labels = arrays(dataset)
        np.testing.assert_array_equal(images, raw[:count])
        np.testing.assert_array_equal(labels, np.arange(count))
        assert (images.dtype, labels.dtype) == (np.float32, np.int32)


def test_batches_have_a_static_image_shape():
    dataset = toy(5, "resized_crop_flip").train(batch_size=2, seed=0, epochs=1)
    images, labels = dataset.element_spec
    assert images == tf.TensorSpec([None, 32, 32, 3], tf.float32)
    assert labels == tf.TensorSpec([None], tf.int32)


def test_steps_count_the_short_batch():
    assert toy(45).steps_per_epoch(16) == 3
    assert toy(48).steps_per_epoch(16) == 3
    assert toy(49).steps_per_epoch(16) == 4


def test_fit_takes_whole_epochs_and_never_runs_out():
    source = data.load("digits")
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(10)])
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        source.train(batch_size=64, seed=0, epochs=3),
        steps_per_epoch=source.steps_per_epoch(64),
        epochs=3,
        shuffle=False,
        validation_data=source.validation(batch_size=64),
        verbose=0,
    )
    assert model.optimizer.iterations == 3 * 23
    assert history.history["val_accuracy"][-1] > 0.7


# --- arguments


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1.*=0"),
        ({"batch_size": 2.0}, "batch_size must be an integer >= 1.*=2.0"),
        ({"batch_size": True}, "batch_size must be an integer >= 1.*=True"),
        ({"seed": 0.5}, "seed must be an integer.*=0.5"),
        ({"seed": 2**63}, "seed must be an integer .* < 9223372036854775808"),
        ({"first_epoch": -1}, "first_epoch must be an integer >= 0.*=-1"),
        ({"epochs": 0}, "epochs must be an integer >= 1.*=0"),
        ({"first_epoch": 2}, "greater than first_epoch.*epochs=2, first_ep"),
    ],
)
def test_training_arguments_are_checked(change, text):
    arguments = {"batch_size": 2, "seed": 0, "epochs": 2} | change
    with pytest.raises(ValueError, match=text):
        toy(5).train(**arguments)


def test_evaluation_batch_sizes_are_checked():
    for method in (toy(5).validation, toy(5).test):
        with pytest.raises(ValueError, match="batch_size must be .*=0"):
            method(batch_size=0)
    with pytest.raises(ValueError, match="batch_size must be .*=-1"):
        toy(5).steps_per_epoch(-1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"augmentation": "cutout"}, "must be one of.*'pad_crop_flip'.*cutout"),
        ({"mean": (0.5,)}, "one value per channel, 3 .*mean=\\(0.5,\\)"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be > 0"),
        ({"validation": -1}, "validation must be an integer >= 0"),
    ],
)
def test_recipes_are_checked(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(RECIPE, **change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"train_images": np.zeros((5, 8, 8, 3), np.uint8)}, "train_images"),
        ({"test_images": np.zeros((2, 32, 32, 3))}, "test_images.*float64"),
        ({"test_images": np.zeros((0, 32, 32, 3), np.uint8)}, "test_images"),
        ({"test_labels": np.zeros(3, np.int32)}, "test_labels.*\\(3,\\)"),
        ({"test_labels": np.zeros(2)}, "test_labels.*float64"),
    ],
)
def test_arrays_are_checked(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(toy(5), **change)
