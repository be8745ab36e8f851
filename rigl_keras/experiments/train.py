"""One training run, from data to result.

    bin/train                                 a small run on 8x8 digits
    bin/train --gin_file=gin/rigl_erk_wrn.gin  the report's run on CIFAR-10

The options of the command are in `command.py`.
"""

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable

import keras
import tensorflow as tf

import rigl_keras
from rigl_keras import flops
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.experiments import data
from rigl_keras.experiments.run_directory import RunDirectory

__all__ = ["sgd", "train"]


def sgd(
    *,
    learning_rate: float = 0.1,
    decay_factor: float = 0.2,
    decay_every: int | None = 30_000,
    momentum: float = 0.9,
    nesterov: bool = True,
) -> keras.Optimizer:
    """Returns SGD whose learning rate falls in steps, as in the report.

    At step t the rate is learning_rate x decay_factor ^ floor(t /
    decay_every).

    Args:
        learning_rate: Rate at the start, positive.
        decay_factor: Factor at each fall, positive.
        decay_every: Steps from one fall to the next. None: constant rate.
        momentum: Momentum, in [0, 1].
        nesterov: Whether Nesterov's momentum is used.

    Returns:
        A Keras optimizer.
    """
    if decay_every is not None:
        learning_rate = keras.optimizers.schedules.ExponentialDecay(
            learning_rate, decay_every, decay_factor, staircase=True
        )
    return keras.optimizers.SGD(
        learning_rate, momentum=momentum, nesterov=nesterov
    )


def train(
    run: RunDirectory,
    *,
    model: Callable[..., keras.Model] = rigl_keras.models.wide_resnet,
    dataset: str = "cifar10",
    data_dir: str | None = None,
    method: Callable[[], rigl_keras.MaskUpdate] | None = None,
    density: float | None = 0.1,
    distribution: str = "erdos_renyi_kernel",
    conventions: Conventions = ORIGINAL,
    optimizer: Callable[[], keras.Optimizer] = sgd,
    epochs: int = 250,
    batch_size: int = 128,
    seed: int = 0,
    operative_config: Callable[[], str] | None = None,
) -> dict:
    """Trains one model and returns its result, which `run` holds as well.

    A run that was interrupted continues from its last checkpoint, to the
    same masks and weights as if it had not been; a finished run is not
    repeated.

    Args:
        run: Directory of the run.
        model: Makes the dense model, given `num_classes` and `input_shape`.
        dataset: One of `data.DATASETS`.
        data_dir: Folder of the prepared data. None: TFDS_DATA_DIR, or where
            TensorFlow Datasets keeps its own.
        method: Makes the mask update. None: the masks stay as they are.
        density: Fraction of the masked weights kept, in (0, 1]. None: the
            dense model, without masks.
        distribution: How density is spread over layers.
        conventions: Where the references differ, for the masks at the start.
            A method has its own.
        optimizer: Makes the optimizer.
        epochs: Passes over the training data, at least 1.
        batch_size: Examples in a step, at least 1.
        seed: Seed of weights, masks, data order, augmentation and dropout.
        operative_config: Returns the configuration in use, as text to keep
            beside the result.

    Returns:
        The result: accuracies, density, FLOPs ratios, layers, settings.

    Raises:
        ValueError: An argument is out of range.
    """
    if run.finished:
        print(f"{run.path} holds a finished run: it is not repeated.")
        return run.result
    if density is None and method is not None:
        raise ValueError(
            "A method changes masks, and density=None trains the dense model. "
            "Set train.density, or train.method = None."
        )
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(
            f"epochs must be an int of at least 1. Received: {epochs!r}."
        )
    for name, value in (("model", model), ("optimizer", optimizer)):
        if not callable(value):
            raise ValueError(
                f"{name} must be something that makes one, in gin "
                f"train.{name} = @wide_resnet or @sgd. Received: {value!r}."
            )
    if method is not None and not callable(method):
        raise ValueError(
            "method must be something that makes a mask update, in gin "
            f"train.method = @RigL, or None. Received: {method!r}."
        )
    keras.utils.set_random_seed(seed)
    examples = data.load(dataset, data_dir=data_dir)
    recipe = examples.recipe
    network = model(
        num_classes=recipe.num_classes, input_shape=recipe.input_shape
    )
    if density is not None:
        network = rigl_keras.sparsify(
            network,
            density,
            distribution=distribution,
            seed=seed,
            conventions=conventions,
        )
    network.compile(
        optimizer(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    updates = [] if method is None else [method()]
    run.begin()
    if operative_config is not None:
        run.write_operative_config(operative_config())

    checkpoints = run.checkpoints(network)
    first_epoch = checkpoints.restore()
    if first_epoch is None:
        first_epoch = 0
        checkpoints.save(0)
    elif first_epoch:
        print(f"Resuming {run.path} at epoch {first_epoch + 1} of {epochs}.")
    run.forget_metrics_from(first_epoch)

    if first_epoch < epochs:
        network.fit(
            examples.train(
                batch_size=batch_size,
                seed=seed,
                first_epoch=first_epoch,
                epochs=epochs,
            ),
            steps_per_epoch=examples.steps_per_epoch(batch_size),
            initial_epoch=first_epoch,
            epochs=epochs,
            validation_data=examples.validation(batch_size=batch_size),
            shuffle=False,  # the data set is shuffled already
            callbacks=[
                *updates,
                _EpochLogs(),
                keras.callbacks.CSVLogger(
                    run.path / "metrics.csv", append=first_epoch > 0
                ),
                keras.callbacks.TensorBoard(
                    run.path / "tensorboard", write_graph=False
                ),
                checkpoints,  # last: what it saves is logged already
            ],
            verbose=1 if sys.stdout.isatty() else 2,
        )
    test = network.evaluate(
        examples.test(batch_size=batch_size), verbose=0, return_dict=True
    )
    validation = network.evaluate(
        examples.validation(batch_size=batch_size), verbose=0, return_dict=True
    )
    cost = rigl_keras.count(network)
    method_name = (
        type(updates[0]).__name__
        if updates
        else "dense"
        if density is None
        else "static"
    )
    training = flops.training_flops(
        method_name,
        sparse_flops=cost.inference_flops,
        dense_flops=cost.dense_inference_flops,
        frequency=getattr(updates[0], "frequency", None) if updates else None,
    )
    result = {
        "method": method_name,
        "model": network.name,
        "dataset": dataset,
        "seed": seed,
        "density": cost.density,
        "test_accuracy": test["accuracy"],
        "validation_accuracy": validation["accuracy"],
        "test_loss": test["loss"],
        "validation_loss": validation["loss"],
        "inference_flops": cost.inference_flops,
        "inference_flops_ratio": cost.inference_flops
        / cost.dense_inference_flops,
        "training_flops_ratio": training / (3 * cost.dense_inference_flops),
        "parameters": cost.parameters,
        "nonzeros": cost.nonzeros,
        "bits": cost.bits,
        "steps": int(network.optimizer.iterations.numpy()),
        "seconds": sum(float(row["seconds"]) for row in run.metrics),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "density": layer.density,
                "masked": layer.masked,
                "nonzeros": layer.nonzeros,
                "inference_flops": layer.inference_flops,
            }
            for layer in cost.layers
        ],
        "settings": {
            "density": density,
            "distribution": None if density is None else distribution,
            "epochs": epochs,
            "batch_size": batch_size,
            "method": {
                key: value if not isinstance(value, Conventions) else str(value)
                for update in updates
                for key, value in update.get_config().items()
            },
        },
        "versions": _versions(),
    }
    network.save(run.path / "model.keras")
    run.write_result(result)  # last: it says that the run is finished
    return result


class _EpochLogs(keras.callbacks.Callback):
    """Adds step, learning rate and seconds to the logs of an epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.model.optimizer
        logs["step"] = int(optimizer.iterations.numpy())
        logs["learning_rate"] = float(
            tf.convert_to_tensor(optimizer.learning_rate)
        )
        logs["seconds"] = round(time.perf_counter() - self._start, 2)


def _versions():
    versions = {"python": platform.python_version()}
    for package in ("tensorflow", "keras", "numpy"):
        versions[package] = importlib.metadata.version(package)
    return {**versions, "rigl_keras": rigl_keras.__version__}


if __name__ == "__main__":
    from rigl_keras.experiments import command

    command.main()
