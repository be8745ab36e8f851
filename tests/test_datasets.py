"""Datasets: their splits, the folders they are in, and their downloads."""

import os
import pathlib
import socket
import sys

import numpy as np
import pytest
import tensorflow as tf
from support.datasets import arrays, write_metadata

from rigl_keras.experiments import data
from rigl_keras.experiments.data import datasets, recipes


def test_digits_are_split_by_index(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    from sklearn.datasets import load_digits

    source = data.load("digits", data_dir="/nowhere")
    assert repr(source) == (
        "Data('digits': 1437 training, 180 validation, 180 test images of "
        "(8, 8, 1))"
    )
    ink, target = load_digits(return_X_y=True)
    ink = ink.reshape(-1, 8, 8, 1)
    for images, labels, part in (
        (source.train_images, source.train_labels, slice(0, 1437)),
        (source.validation_images, source.validation_labels, slice(1437, 1617)),
        (source.test_images, source.test_labels, slice(1617, 1797)),
    ):
        np.testing.assert_array_equal(labels, target[part])
        np.testing.assert_allclose(images / (255 / 16), ink[part], atol=0.04)
    assert source.train_images.max() == 255
    scaled, _ = arrays(source.train(batch_size=500, seed=0, epochs=1))
    assert abs(scaled.mean()) < 1e-3
    assert abs(scaled.std() - 1) < 1e-3


def needs_cifar10():
    folder = os.environ.get("TFDS_DATA_DIR")
    found = folder and any(pathlib.Path(folder).glob("cifar10/*/*.json"))
    return pytest.mark.skipif(
        not found, reason="TFDS_DATA_DIR names no folder with cifar10 in it"
    )


@pytest.mark.slow
@needs_cifar10()
def test_real_cifar10_has_the_reports_split_and_scale():
    source = data.load("cifar10")
    assert len(source.train_images) == 45_000
    assert len(source.validation_images) == 5_000
    assert len(source.test_images) == 10_000
    assert source.steps_per_epoch(128) == 352
    assert set(source.validation_labels) == set(range(10))
    images, _ = next(iter(source.train(batch_size=4_000, seed=0, epochs=1)))
    # The report's std is the mean of each image's, so pixels exceed 1.
    np.testing.assert_allclose(tf.reduce_mean(images, [0, 1, 2]), 0, atol=0.05)
    np.testing.assert_allclose(
        tf.math.reduce_std(images, [0, 1, 2]), 1.25, atol=0.1
    )


@pytest.mark.parametrize(
    ("name", "validation"), [("cifar100", 5_000), ("mnist", 6_000)]
)
def test_mocked_datasets_are_split_by_index(name, validation, tmp_path):
    """Mocked, as they need a download: images are zeros, labels indices."""
    import tensorflow_datasets as tfds

    sizes = {"train": validation + 10, "test": 7}
    write_metadata(name, tmp_path, sizes)

    def as_dataset(builder, split, **_):
        shape = (sizes[split], *recipes.DATASETS[name].input_shape)
        return tf.data.Dataset.from_tensor_slices(
            {
                "image": np.zeros(shape, np.uint8),
                "label": np.arange(sizes[split]),
            }
        )

    with tfds.testing.mock_data(
        policy=tfds.testing.MockPolicy.USE_FILES,
        data_dir=str(tmp_path),
        as_dataset_fn=as_dataset,
    ):
        source = data.load(name, data_dir=tmp_path)
    assert source.recipe is recipes.DATASETS[name]
    np.testing.assert_array_equal(source.train_labels, np.arange(10))
    np.testing.assert_array_equal(
        source.validation_labels, np.arange(10, validation + 10)
    )
    np.testing.assert_array_equal(source.test_labels, np.arange(7))
    images, _ = next(iter(source.train(batch_size=4, seed=0, epochs=1)))
    black = -np.array(source.recipe.mean) / np.array(source.recipe.std)
    np.testing.assert_allclose(images[3, 5, 5], black, rtol=1e-5)


class FakeTfds:
    """A fake tfds, which records each call of `load`, and returns or raises."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = []

    def load(self, name, **arguments):
        self.calls.append(arguments)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def examples(count, shape=(28, 28, 1)):
    return {
        "image": tf.zeros([count, *shape], tf.uint8),
        "label": tf.zeros([count], tf.int64),
    }


def fake(monkeypatch, *answers):
    tfds = FakeTfds(*answers)
    tfds.__spec__ = object()  # as an installed module has one
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    return tfds


def test_data_dir_beats_the_environment_which_beats_the_default(
    monkeypatch, tmp_path
):
    argument, variable = tmp_path / "argument", tmp_path / "variable"
    argument.mkdir()
    variable.mkdir()
    tfds = fake(monkeypatch, *[examples(6_001), examples(1)] * 3)
    monkeypatch.setenv("TFDS_DATA_DIR", str(variable))
    data.load("mnist", data_dir=argument)
    data.load("mnist")
    monkeypatch.delenv("TFDS_DATA_DIR")
    data.load("mnist")
    asked = [call["data_dir"] for call in tfds.calls]
    assert asked == [str(argument)] * 2 + [str(variable)] * 2 + [None] * 2
    assert [call["split"] for call in tfds.calls] == ["train", "test"] * 3
    assert not any(call["shuffle_files"] for call in tfds.calls)


def test_an_absent_dataset_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "_check_network", lambda name: None)
    tfds = fake(
        monkeypatch,
        AssertionError("could not find data"),
        examples(6_002),
        examples(1),
    )
    source = data.load("mnist", data_dir=tmp_path)
    assert len(source.train_images) == 2
    assert [call["download"] for call in tfds.calls] == [False, True, False]


def test_without_a_network_nothing_is_downloaded(monkeypatch, tmp_path):
    def refuse(address, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets.urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", refuse)
    tfds = fake(monkeypatch, AssertionError("could not find data"))
    with pytest.raises(data.DatasetUnavailableError) as caught:
        data.load("cifar100", data_dir=tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "no connection to www.cs.toronto.edu" in text
    assert "--data_dir" in text
    assert "TFDS_DATA_DIR" in text
    assert "'digits'" in text
    assert len(tfds.calls) == 1


def test_a_proxy_is_trusted_to_reach_the_network(monkeypatch):
    def refuse(address, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(
        datasets.urllib.request, "getproxies", lambda: {"https": "proxy:3128"}
    )
    datasets._check_network("mnist")
    monkeypatch.setattr(datasets.urllib.request, "getproxies", dict)
    with pytest.raises(OSError, match="storage.googleapis.com"):
        datasets._check_network("mnist")


def test_a_failed_download_names_both_ways_out(monkeypatch, tmp_path):
    fake(monkeypatch, ConnectionError("Max retries exceeded " + "x" * 900))
    with pytest.raises(data.DatasetUnavailableError) as caught:
        data.load("cifar10", data_dir=tmp_path)
    text = str(caught.value)
    assert "ConnectionError: Max retries exceeded" in text
    assert "--data_dir or TFDS_DATA_DIR" in text
    assert "'digits'" in text
    assert len(text) < 600
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_a_missing_package_names_the_pip_command(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        ImportError, match="tensorflow-datasets: pip install 'rigl_keras\\[exp"
    ):
        data.load("mnist")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="scikit-learn: pip install"):
        data.load("digits")


def test_a_missing_folder_is_refused_before_tfds_is_asked(
    monkeypatch, tmp_path
):
    tfds = fake(monkeypatch)
    absent = tmp_path / "absent"
    with pytest.raises(ValueError, match="data_dir must be an existing.*absen"):
        data.load("mnist", data_dir=absent)
    monkeypatch.setenv("TFDS_DATA_DIR", str(absent))
    with pytest.raises(ValueError, match="variable TFDS_DATA_DIR must be an"):
        data.load("mnist")
    assert tfds.calls == []


def test_a_dataset_cut_short_is_refused(monkeypatch, tmp_path):
    fake(monkeypatch, examples(6_000), examples(1))
    with pytest.raises(ValueError, match="more than the 6000.*Received: 6000"):
        data.load("mnist", data_dir=tmp_path)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'cifar10'"):
        data.load("cifar-10")
    with pytest.raises(ValueError, match="Received: name='zebra'.$"):
        data.load("zebra")
