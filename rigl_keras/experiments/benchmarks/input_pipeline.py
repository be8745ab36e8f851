"""The speed of the input pipeline."""

import time

from rigl_keras.experiments import data

__all__ = ["measure_input_pipeline"]


def measure_input_pipeline(
    name: str = "cifar10", *, data_dir: str | None = None, steps: int = 300
) -> float:
    """Returns the images per second of the training pipeline alone.

    Args:
        name: One of `data.DATASETS`.
        data_dir: Folder of the prepared data.
        steps: Number of timed batches, of 128 images.

    Returns:
        Images per second.
    """
    examples = data.load(name, data_dir=data_dir)
    batches = iter(examples.train(batch_size=128, seed=0, epochs=10))
    for _ in range(10):
        next(batches)
    start = time.perf_counter()
    images = sum(int(next(batches)[1].shape[0]) for _ in range(steps))
    return images / (time.perf_counter() - start)
