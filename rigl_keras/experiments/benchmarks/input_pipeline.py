"""How fast batches come."""

import time

from rigl_keras.experiments import data

__all__ = ["measure_input_pipeline"]


def measure_input_pipeline(
    name: str = "cifar10", *, data_dir: str | None = None, steps: int = 300
) -> float:
    """Returns how many images a second the training pipeline alone yields.

    Args:
        name: One of `data.DATASETS`.
        data_dir: Folder of the prepared data.
        steps: Batches of 128 that are timed.

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
