"""One training run, from data to result.

    bin/train                                 a small run on 8x8 digits
    bin/train --gin_file=gin/rigl_erk_wrn.gin  the report's run on CIFAR-10

The options of the command are in `train_command.py`.
"""

import math
import sys
from collections.abc import Callable, Sequence

import keras
import numpy as np

import rigl_keras
from rigl_keras import flops
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.diagnostics.callback import TopologyDiagnostics
from rigl_keras.experiments import data
from rigl_keras.experiments.runs import devices
from rigl_keras.experiments.runs.optimizers import sgd
from rigl_keras.experiments.runs.result import (
    closed_form,
    method_name,
    package_versions,
)
from rigl_keras.experiments.runs.run_callbacks import (
    EpochLogs,
    KeepWeights,
    Metrics,
    Trajectory,
)
from rigl_keras.experiments.runs.run_directory import EarlierRun, RunDirectory
from rigl_keras.experiments.runs.starting_point import (
    check_arguments,
    masks_of,
    shuffled_masks,
    smoothed_labels,
)
from rigl_keras.experiments.runs.tensorboard_log import TensorBoardLog
from rigl_keras.training.step_update import StepUpdate

__all__ = ["train"]


def train(
    run: RunDirectory,
    *,
    model: Callable[..., keras.Model] = rigl_keras.models.wide_resnet,
    dataset: str = "cifar10",
    data_dir: str | None = None,
    validation: int | None = None,
    label_smoothing: float = 0.0,
    method: Callable[[], StepUpdate] | None = None,
    density: float | None = 0.1,
    distribution: str = "erdos_renyi_kernel",
    granularity: str = "element",
    scale_to_fan_in: bool = False,
    conventions: Conventions = ORIGINAL,
    small_dense: bool = False,
    one_shot: Callable[..., keras.Model] | None = None,
    masks_from: str | None = None,
    shuffle_masks: bool = False,
    weights_from: str | None = None,
    weights_epoch: int = 0,
    keep_weights: Sequence[int] = (),
    diagnostics: bool = True,
    optimizer: Callable[..., keras.Optimizer] = sgd,
    epochs: int = 250,
    batch_size: int = 128,
    length: float = 1.0,
    seed: int = 0,
    operative_config: Callable[[], str] | None = None,
) -> dict:
    """Trains one model and returns its result, which `run` holds as well.

    A run that was interrupted continues from its last checkpoint, to the
    same masks and weights as if it had not been; a finished run is not
    repeated. In the scope of a `tf.distribute` strategy it trains on all its
    replicas, in each process that the strategy has.

    Args:
        run: Directory of the run.
        model: Makes the dense model, given `num_classes` and `input_shape`
            (and `channel_scale` where `small_dense` is set).
        dataset: One of `data.DATASETS`.
        data_dir: Folder of the prepared data. None: TFDS_DATA_DIR, or where
            TensorFlow Datasets keeps its own.
        validation: How many training examples are held out. None: as the
            data set's recipe says. 0: all are trained on.
        label_smoothing: Share of each label, in training, that is spread
            over all classes, in [0, 1).
        method: Makes the mask update. None: the masks stay as they are.
        density: Fraction of the masked weights kept, in (0, 1], at the start.
            None: the dense model, without masks.
        distribution: How density is spread over layers, where masks are
            drawn.
        granularity: What a mask keeps or removes as one, `"element"` or
            `"kernel"`. Masks from another run must be of it.
        scale_to_fan_in: Whether weights at the start are scaled to the number
            of connections that each unit keeps, as in `sparsify`. Not for
            masks of `one_shot`.
        conventions: Where the references differ, for the masks at the start.
            A method has its own.
        small_dense: Whether, instead of masks, every number of channels is
            scaled by sqrt(density), truncated (the report's Small-Dense).
        one_shot: Makes the masks from a batch of training data:
            `one_shot.snip`, which is given the model, density, batch, loss
            and seed. None: they are drawn.
        masks_from: Directory of a finished run whose final masks this run
            starts with (Frankle and Carbin, 2018, arXiv:1803.03635). They
            must be of this `density`.
        shuffle_masks: Whether the connections of each of these masks are
            placed anew, at random: the layers' densities alone are kept.
        weights_from: Directory of a run whose weights this run starts with.
            None: weights are drawn.
        weights_epoch: After how many epochs of that run. 0: those it was
            begun with, before any mask; later ones are zero where its masks
            of that time were.
        keep_weights: After which epochs the weights are kept for later runs,
            beside those of the start.
        diagnostics: Whether the run records how its masks move
            (`TopologyDiagnostics`), the loss around each update included.
        optimizer: Makes the optimizer.
        epochs: Passes over the training data, at least 1.
        batch_size: Examples in a step, of all replicas together, at least as
            many as there are replicas.
        length: Factor on the length of the run: on `epochs`, on the steps at
            which the optimizer's learning rate falls (its maker is given
            `length`) and at which mask updates end. Frequency, warm-up and
            the first update stay where they are (the report, section 5.1).
        seed: Seed of weights, masks, data order, augmentation and dropout.
        operative_config: Returns the configuration in use, as text to keep
            beside the result.

    Returns:
        The result: accuracies, density, FLOPs ratios, layers, settings.
        `inference_flops_ratio` is over the dense model,
        `training_flops_ratio` over training it for a run of length 1.

    Raises:
        ValueError: An argument is out of range, or two exclude each other.
    """
    if run.finished:
        print(f"{run.path} holds a finished run: it is not repeated.")
        return run.result
    check_arguments(
        model=model,
        method=method,
        optimizer=optimizer,
        density=density,
        small_dense=small_dense,
        one_shot=one_shot,
        masks_from=masks_from,
        shuffle_masks=shuffle_masks,
        granularity=granularity,
        scale_to_fan_in=scale_to_fan_in,
        keep_weights=keep_weights,
        epochs=epochs,
        batch_size=batch_size,
        length=length,
        label_smoothing=label_smoothing,
    )
    times_as_long = int(epochs * length) / epochs
    epochs = int(epochs * length)
    keras.utils.set_random_seed(seed)
    examples = data.load(dataset, data_dir=data_dir, validation=validation)
    recipe = examples.recipe

    def make(**scale):
        return model(
            num_classes=recipe.num_classes,
            input_shape=recipe.input_shape,
            **scale,
        )

    dense = make(channel_scale=math.sqrt(density)) if small_dense else make()
    # Whether masks are drawn, and not computed or found.
    drawn = density is not None and not (small_dense or one_shot or masks_from)
    sources = {}  # runs whose training this one could not do without
    if weights_from is not None:
        source = EarlierRun(weights_from)
        source.load_weights(dense, weights_epoch)
        if weights_epoch:
            sources[source.path] = source.result
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    if density is None or small_dense:
        network = dense
    elif masks_from is not None:
        source = EarlierRun(masks_from)
        sources[source.path] = source.result
        masks = masks_of(source, density)
        if shuffle_masks:
            masks = shuffled_masks(masks, granularity, seed)
        network = rigl_keras.with_masks(
            dense,
            masks,
            granularity=granularity,
            scale_to_fan_in=scale_to_fan_in,
            seed=seed,
        )
    elif one_shot is not None:
        first = examples.train(batch_size=batch_size, seed=seed, epochs=1)
        batch = smoothed_labels(
            *next(iter(first)), recipe.num_classes, label_smoothing
        )
        network = one_shot(dense, density, batch, loss, seed=seed)
    else:
        network = rigl_keras.sparsify(
            dense,
            density,
            distribution=distribution,
            granularity=granularity,
            scale_to_fan_in=scale_to_fan_in,
            seed=seed,
            conventions=conventions,
        )
    network.compile(
        optimizer() if length == 1 else optimizer(length=length),
        loss,
        metrics=["accuracy"],
    )
    update = None
    if method is not None:
        update = method() if length == 1 else method().lengthened(length)
    topology = None
    if diagnostics and rigl_keras.masked_layers(network):
        topology = TopologyDiagnostics(
            run.path / "topology" if run.writes else None
        )
        topology.set_model(network)
    if update is not None:
        # What the method remembers is made here, for a checkpoint to restore.
        update.attach(network, network.optimizer)
    run.begin()
    if operative_config is not None:
        run.write_operative_config(operative_config())

    checkpoints = run.checkpoints(
        network,
        variables=[
            *(update.variables if update else []),
            *(update.logged_variables if update else []),
            *(topology.variables if topology else []),
        ],
    )
    first_epoch = checkpoints.restore()
    if first_epoch is None:
        first_epoch = 0
        run.save_weights(dense, 0)
        checkpoints.save(0)
    elif first_epoch == epochs:
        print(f"Resuming {run.path} after its last epoch.")
    elif first_epoch:
        print(f"Resuming {run.path} at epoch {first_epoch + 1} of {epochs}.")
    first_step = int(network.optimizer.iterations.numpy())
    cost = rigl_keras.count(network)
    # What all ratios are over.
    whole = rigl_keras.count(make(channel_scale=1.0)) if small_dense else cost
    dense_flops = whole.dense_inference_flops
    # A small network has no masks to take its density from.
    share_of_dense = cost.nonzeros / whole.parameters if small_dense else None

    def batches(split, smoothing=0.0):
        return devices.sharded(
            split.map(
                lambda x, y: smoothed_labels(
                    x, y, recipe.num_classes, smoothing
                )
            )
        )

    trajectory = Trajectory(run, network, update, first_step=first_step)
    board = None
    if run.writes:
        board = TensorBoardLog(
            run, trajectory, cost, first_epoch=first_epoch, epochs=epochs
        )

    def curves(steps):
        return flops.training_curve(
            cost,
            trajectory.rows,
            steps=steps,
            dense_gradients=update.dense_gradients if update else "never",
            gradient_batches=update.gradient_batches if update else 1,
        )

    def training_ratio(training, epochs_trained):
        share = times_as_long * epochs_trained / epochs
        return share * float(np.mean(training)) / (3 * dense_flops)

    held_out = None
    if recipe.validation:
        held_out = batches(examples.validation(batch_size=batch_size))
    if first_epoch < epochs:
        network.fit(
            batches(
                examples.train(
                    batch_size=batch_size,
                    seed=seed,
                    first_epoch=first_epoch,
                    epochs=epochs,
                ),
                label_smoothing,
            ).map(devices.evened),
            steps_per_epoch=examples.steps_per_epoch(batch_size),
            initial_epoch=first_epoch,
            epochs=epochs,
            validation_data=held_out,
            shuffle=False,  # the data set is shuffled already
            callbacks=[
                *([update] if update else []),
                *([topology] if topology else []),
                trajectory,
                EpochLogs(
                    network,
                    cost,
                    trajectory,
                    dense_flops=dense_flops,
                    training_ratio=lambda epochs_trained, steps: training_ratio(
                        curves(steps)[1], epochs_trained
                    ),
                    share_of_dense=share_of_dense,
                ),
                *([Metrics(run, first_epoch=first_epoch)] if board else []),
                *([board] if board else []),
                KeepWeights(run, keep_weights),
                checkpoints,  # last: what it saves is logged already
            ],
            verbose=(1 if sys.stdout.isatty() else 2) if run.writes else 0,
        )

    def evaluate(split):
        return network.evaluate(split, verbose=0, return_dict=True)

    test = evaluate(batches(examples.test(batch_size=batch_size)))
    validated = evaluate(held_out) if held_out else {}
    cost = rigl_keras.count(network)
    steps = int(network.optimizer.iterations.numpy())
    inference, training = curves(steps)
    run.write_curve(inference, training)
    ratio = training_ratio(training, epochs)
    if board:
        board.write_test(steps, test)
    name = method_name(update, density, small_dense, one_shot, masks_from)
    result = {
        "method": name,
        "model": network.name,
        "dataset": dataset,
        "seed": seed,
        "density": share_of_dense if small_dense else cost.density,
        "test_accuracy": test["accuracy"],
        "validation_accuracy": validated.get("accuracy"),
        "test_loss": test["loss"],
        "validation_loss": validated.get("loss"),
        "inference_flops": cost.inference_flops,
        "inference_flops_ratio": cost.inference_flops / dense_flops,
        # By the masks of each step, by the closed form, and with the runs
        # that masks and weights come from.
        "training_flops": float(np.mean(training))
        * len(examples.train_labels)
        * epochs,
        "training_flops_ratio": ratio,
        "training_flops_ratio_closed_form": closed_form(
            update, inference, dense_flops, times_as_long
        ),
        "training_flops_ratio_with_sources": ratio
        + sum(
            earlier["training_flops_ratio_with_sources"]
            for earlier in sources.values()
        ),
        "parameters": whole.parameters,
        "nonzeros": cost.nonzeros,
        "bits": cost.bits,
        "csr_bits": cost.csr_bits,
        "steps": steps,
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
            "distribution": distribution if drawn else None,
            "granularity": granularity,
            "scale_to_fan_in": scale_to_fan_in,
            "masks_from": masks_from,
            "shuffle_masks": shuffle_masks,
            "weights_from": weights_from,
            "weights_epoch": weights_epoch,
            "epochs": epochs,
            "length": length,
            "batch_size": batch_size,
            "replicas": devices.replica_count(),
            "label_smoothing": label_smoothing,
            "method": {
                key: value
                if isinstance(value, (int, float, str, type(None)))
                else str(value)
                for key, value in (
                    update.get_config().items() if update else ()
                )
            },
        },
        "versions": package_versions(),
    }
    # The optimizer is in the checkpoints; the model to keep loads without it.
    network.compiled = False
    run.save_model(network)
    run.write_result(result)  # last: it says that the run is finished
    return result
