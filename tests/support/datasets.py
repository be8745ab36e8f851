"""Metadata of datasets that are not downloaded, and what datasets hold."""

import os

import numpy as np


def write_metadata(name, folder, sizes):
    """Writes the dataset_info.json that tfds would have prepared.

    Without the split sizes in it, tfds reads batch_size=-1 as a batch of
    sys.maxsize, and under mock_data the process aborts in C++.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=folder)
    builder.info.set_splits(
        tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[size],
                    num_bytes=0,
                    filename_template=tfds.core.ShardedFileTemplate(
                        dataset_name=name,
                        data_dir=builder.data_path,
                        split=split,
                        filetype_suffix="tfrecord",
                    ),
                )
                for split, size in sizes.items()
            ]
        )
    )
    os.makedirs(builder.data_dir)
    builder.info.write_to_directory(builder.data_dir)


def arrays(dataset):
    """All images and all labels of a dataset."""
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)
