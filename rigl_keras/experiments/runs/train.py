"""A training run, from data to result.

    bin/train                                 a small run on 8x8 digits
    bin/train --gin_file=gin/rigl_erk_wrn.gin  the report's run on CIFAR-10

The options of the command are in `train_command.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import keras

import rigl_keras
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.diagnostics.callback import TopologyDiagnostics
from rigl_keras.experiments import data
from rigl_keras.experiments.runs import devices
from rigl_keras.experiments.runs.argument_checks import (
    check_batches,
    check_epochs,
    check_fits,
    check_initialization,
    check_makers,
)
from rigl_keras.experiments.runs.batches import Batches
from rigl_keras.experiments.runs.optimizers import sgd
from rigl_keras.experiments.runs.result import result
from rigl_keras.experiments.runs.run_callbacks import KeepWeights
from rigl_keras.experiments.runs.run_directory import RunDirectory
from rigl_keras.experiments.runs.run_log import RunLog
from rigl_keras.experiments.runs.starting_point import (
    Initialization,
    starting_point,
)
from rigl_keras.schedules import lengthened
from rigl_keras.training.step_update import StepUpdate

__all__ = ["train"]


def train(
    run: RunDirectory,
    *,
    model: Callable[..., keras.Model] = rigl_keras.models.wide_resnet,
    dataset: str = "cifar10",
    data_dir: str | None = None,
    validation: int | None = None,
    context: int | None = None,
    epoch_examples: int | None = None,
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
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> dict:
    """Trains one model and returns its result, which it also writes to `run`.

    An interrupted run continues from its last checkpoint, and ends with the
    same masks and weights as without the interruption. A finished run is not
    repeated. In the scope of a `tf.distribute` strategy it trains on all
    replicas, in each process of the strategy.

    Args:
        run: Directory of the run.
        model: Makes the dense model from `num_classes` and `input_shape` (and
            `channel_scale` if `small_dense` is set), or, for a text, from
            `vocabulary` and `context`.
        dataset: One of `data.recipes.DATASETS` or `data.recipes.TEXTS`.
        data_dir: Folder of the prepared data. None: TFDS_DATA_DIR, or the
            default folder of TensorFlow Datasets.
        validation: Number of training examples, or characters of a text, to
            hold out. None: as the data set's recipe says. 0: none.
        context: Characters in an example of a text. None: as its recipe says.
            Not for images.
        epoch_examples: Examples in an epoch of a text, drawn from all
            examples in each epoch. None: all.
        label_smoothing: Share of each label, in training, that is spread
            over all classes, in [0, 1).
        method: Makes the mask update. None: the masks do not change.
        density: Fraction of the masked weights kept at the start, in (0, 1].
            None: the dense model, without masks.
        distribution: How density is spread over layers when masks are drawn.
        granularity: Which weights a mask keeps or removes together, and which
            compete, by the name of the pattern (`patterns.as_pattern`):
            `"element"`, `"kernel"`, `"fan_in"`, `"2:4"` (with density 0.5),
            `"4x16"`. Masks from another run must have this pattern.
        scale_to_fan_in: Whether initial weights are scaled to the number of
            connections that each unit keeps, as in `sparsify`. Not for masks
            of `one_shot`.
        conventions: Which reference to follow where they differ, for the
            initial masks. A method has its own conventions.
        small_dense: Whether to scale every number of channels by
            sqrt(density), truncated, instead of using masks (the report's
            Small-Dense).
        one_shot: Makes the masks from a batch or from weights:
            `one_shot.snip`, `grasp`, `synflow` or `magnitude`, or a function
            like them. It takes a model, a density, a batch and a loss if they
            are among its arguments, a seed and, unless it is `"element"`, a
            granularity. None: the masks are drawn.
        masks_from: Directory of a finished run whose final masks this run
            starts with (Frankle and Carbin, 2018, arXiv:1803.03635). They
            must have this `density`.
        shuffle_masks: Whether the connections of each of these masks are
            placed at random, so that only the layers' densities are kept.
        weights_from: Directory of a run whose weights this run starts with.
            None: weights are drawn.
        weights_epoch: The number of epochs of that run after which to take
            its weights. 0: its initial weights, before any mask. Later ones
            are zero where its masks were.
        keep_weights: The epochs after which weights are kept for later runs,
            in addition to the initial weights.
        diagnostics: Whether the run records how its masks move
            (`TopologyDiagnostics`), the loss around each update included.
        optimizer: Makes the optimizer.
        epochs: Passes over the training data, at least 1.
        batch_size: Examples in a step, over all replicas together; at least
            the number of replicas.
        length: Factor on the length of the run. It multiplies `epochs`, the
            steps at which the learning rate falls (`optimizer` gets `length`)
            and the step at which mask updates end. It does not change the
            frequency, the warm-up and the first update (the report, section
            5.1).
        seed: Seed of weights, masks, data order, augmentation and dropout.
        operative_config: Returns the configuration in use, as text, to keep
            in the run directory.
        callbacks: Called after the run's own callbacks, when an epoch is in
            metrics.csv and its checkpoint is saved.

    Returns:
        The result: accuracies, density, FLOPs ratios, layers, settings. For a
        text, the accuracy is that of the next character and the loss is in
        nats; the result also holds it as perplexity and as bits per
        character. `inference_flops_ratio` is relative to the dense model,
        `training_flops_ratio` to training it for a run of length 1.

    Raises:
        ValueError: An argument is out of range, or two conflict.
    """
    if run.finished:
        print(f"{run.path} holds a finished run: it is not repeated.")
        return run.result
    initialization = Initialization(
        density=density,
        small_dense=small_dense,
        one_shot=one_shot,
        masks_from=masks_from,
        shuffle_masks=shuffle_masks,
        weights_from=weights_from,
        weights_epoch=weights_epoch,
        distribution=distribution,
        granularity=granularity,
        scale_to_fan_in=scale_to_fan_in,
        conventions=conventions,
        seed=seed,
    )
    check_makers(
        model=model, optimizer=optimizer, method=method, one_shot=one_shot
    )
    check_initialization(initialization, model=model, method=method)
    check_batches(batch_size=batch_size, label_smoothing=label_smoothing)
    check_epochs(epochs, length=length, keep_weights=keep_weights)
    of_text = {"context": context, "epoch_examples": epoch_examples}
    recipe = data.recipe_of(dataset, validation=validation, **of_text)
    check_fits(model, dataset, recipe.network_arguments)

    keras.utils.set_random_seed(seed)
    batches = Batches(
        examples=data.read(recipe, data_dir=data_dir),
        batch_size=batch_size,
        seed=seed,
        label_smoothing=label_smoothing,
    )
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    start = starting_point(
        functools.partial(model, **recipe.network_arguments),
        initialization,
        examples=lambda: (batches.first(), loss),
    )
    network = start.network
    network.compile(
        optimizer() if length == 1 else optimizer(length=length),
        loss,
        metrics=["accuracy"],
    )
    update = _update(method, network, length=length)
    topology = _topology(run, network) if diagnostics else None

    # No argument is refused after this.
    run.begin()
    if operative_config is not None:
        run.write_operative_config(operative_config())
    checkpoints = _checkpoints(run, network, update, topology)
    last = lengthened(epochs, length)
    left = range(_first_epoch(run, start, checkpoints, epochs=last), last)
    log = RunLog(
        run, start, update, batches=batches, epochs=left, length=last / epochs
    )
    _fit(
        network,
        batches,
        epochs=left,
        callbacks=[
            *(update, topology, *log.callbacks),
            *(KeepWeights(run, keep_weights), checkpoints),
            *callbacks,
        ],
    )
    return _finished(
        run,
        start,
        update,
        batches=batches,
        log=log,
        epochs=last,
        settings={"length": length, **of_text},
    )


def _update(method, network, *, length):
    """Returns the mask update, attached to the network, or None."""
    if method is None:
        devices.exchange_active(network)
        return None
    update = method()
    if length != 1:
        update = cast(StepUpdate, update.lengthened(length))
    # Creates the method's variables, which a checkpoint may restore.
    update.attach(network, network.optimizer)
    return update


def _topology(run, network):
    """Returns the recorder of mask moves, or None without masks."""
    if not rigl_keras.masked_layers(network):
        return None
    topology = TopologyDiagnostics(
        run.path / "topology" if run.writes else None
    )
    topology.set_model(network)
    return topology


def _checkpoints(run, network, update, topology):
    """Returns the checkpoints of a run, which save all of its variables."""
    return run.checkpoints(
        network,
        variables=[
            *(update.variables if update else []),
            *(update.logged_variables if update else []),
            *(topology.variables if topology else []),
        ],
    )


def _first_epoch(run, start, checkpoints, *, epochs):
    """Restores a run, or saves its start; returns the epoch to begin with."""
    first_epoch = checkpoints.restore()
    if first_epoch is None:
        run.save_weights(start.dense, 0)
        checkpoints.save(0)
        return 0
    if first_epoch == epochs:
        print(f"Resuming {run.path} after its last epoch.")
    elif first_epoch:
        print(f"Resuming {run.path} at epoch {first_epoch + 1} of {epochs}.")
    return first_epoch


def _fit(network, batches, *, epochs, callbacks):
    """Trains a network for a range of epochs, which may be empty."""
    if not epochs:
        return
    network.fit(
        batches.train(first_epoch=epochs.start, epochs=epochs.stop),
        steps_per_epoch=batches.steps_per_epoch,
        initial_epoch=epochs.start,
        epochs=epochs.stop,
        validation_data=batches.validation(),
        shuffle=False,  # the data set is shuffled already
        callbacks=[each for each in callbacks if each is not None],
        verbose=0,  # the table says more
    )


def _finished(run, start, update, *, batches, log, epochs, settings):
    """Tests the trained network; writes and returns the result."""
    network = start.network
    held_out = batches.validation()
    test = _metrics(network, batches.test())
    validation = _metrics(network, held_out) if held_out is not None else {}
    curves = log.cost.curves(int(network.optimizer.iterations.numpy()))
    log.finish(test, curves=curves)
    found = result(
        start,
        update,
        batches=batches,
        cost=log.cost,
        curves=curves,
        test=test,
        validation=validation,
        epochs=epochs,
        seconds=sum(float(row["seconds"]) for row in run.metrics),
        settings=settings,
    )
    # The optimizer is in the checkpoints; model.keras is saved without it.
    network.compiled = False
    run.save_model(network)
    run.write_result(found)  # last, as it marks the run as finished
    return found


def _metrics(network, batches):
    return network.evaluate(batches, verbose=0, return_dict=True)
