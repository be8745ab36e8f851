"""One training run, from data to result.

    bin/train                                 a small run on 8x8 digits
    bin/train --gin_file=gin/rigl_erk_wrn.gin  the report's run on CIFAR-10

The options of the command are in `command.py`.
"""

import importlib.metadata
import inspect
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras import flops
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.diagnostics import TopologyDiagnostics
from rigl_keras.experiments import data, devices
from rigl_keras.experiments.run_directory import (
    EarlierRun,
    KeepWeights,
    Metrics,
    RunDirectory,
    Trajectory,
)
from rigl_keras.experiments.tensorboard_log import TensorBoardLog
from rigl_keras.training_step import StepUpdate

__all__ = ["WarmUpAndSteps", "sgd", "train"]


@keras.saving.register_keras_serializable("rigl_keras")
class WarmUpAndSteps(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly, then falls in steps.

    With W the warm-up:

        t < W:   learning_rate x t / W
        t >= W:  learning_rate x decay_factor ^ floor((t - W) / decay_every)

    The report's code, utils/warmup_scheduler.py and utils/train_helper.py:52.

    Args:
        learning_rate: Rate after the warm-up, positive.
        decay_factor: Factor at each fall, positive.
        decay_every: Steps from one fall to the next. None: no fall.
        warmup_steps: W, at least 0.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        learning_rate: float,
        decay_factor: float,
        decay_every: int | None,
        warmup_steps: int,
    ):
        for name, value in (
            ("learning_rate", learning_rate),
            ("decay_factor", decay_factor),
            ("decay_every", 1 if decay_every is None else decay_every),
        ):
            if not value > 0:
                raise ValueError(
                    f"{name} must be positive. Received: {name}={value!r}."
                )
        if warmup_steps < 0:
            raise ValueError(
                "warmup_steps must be at least 0. Received: "
                f"warmup_steps={warmup_steps!r}."
            )
        self.learning_rate = learning_rate
        self.decay_factor = decay_factor
        self.decay_every = decay_every
        self.warmup_steps = warmup_steps

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        rate = tf.constant(self.learning_rate, tf.float32)
        if self.decay_every is not None:
            falls = tf.floor((step - self.warmup_steps) / self.decay_every)
            rate *= self.decay_factor ** tf.maximum(falls, 0.0)
        if self.warmup_steps:
            rate *= tf.minimum(step / self.warmup_steps, 1.0)
        return rate

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "decay_factor": self.decay_factor,
            "decay_every": self.decay_every,
            "warmup_steps": self.warmup_steps,
        }


def sgd(
    *,
    learning_rate: float = 0.1,
    decay_factor: float = 0.2,
    decay_every: int | None = 30_000,
    warmup_steps: int = 0,
    momentum: float = 0.9,
    nesterov: bool = True,
    length: float = 1.0,
) -> keras.Optimizer:
    """Returns SGD whose learning rate falls in steps, as in the report.

    Args:
        learning_rate: Rate at the start, or after the warm-up, positive.
        decay_factor: Factor at each fall, positive.
        decay_every: Steps from one fall to the next. None: constant rate.
        warmup_steps: Steps in which the rate rises from 0, at least 0.
        momentum: Momentum, in [0, 1].
        nesterov: Whether Nesterov's momentum is used.
        length: Factor on `decay_every`, for runs that are longer.

    Returns:
        A Keras optimizer, with `WarmUpAndSteps` as its learning rate.
    """
    schedule = WarmUpAndSteps(
        learning_rate=learning_rate,
        decay_factor=decay_factor,
        decay_every=decay_every and int(decay_every * length),
        warmup_steps=warmup_steps,
    )
    return keras.optimizers.SGD(schedule, momentum=momentum, nesterov=nesterov)


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
    _check(
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
        masks = _masks(source, density)
        if shuffle_masks:
            masks = _shuffled(masks, granularity, seed)
        network = rigl_keras.with_masks(
            dense,
            masks,
            granularity=granularity,
            scale_to_fan_in=scale_to_fan_in,
            seed=seed,
        )
    elif one_shot is not None:
        first = examples.train(batch_size=batch_size, seed=seed, epochs=1)
        batch = _smoothed(
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
                lambda x, y: _smoothed(x, y, recipe.num_classes, smoothing)
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
                _EpochLogs(
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
    name = _name(update, density, small_dense, one_shot, masks_from)
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
        "training_flops_ratio_closed_form": _closed_form(
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
        "versions": _versions(),
    }
    # The optimizer is in the checkpoints; the model to keep loads without it.
    network.compiled = False
    run.save_model(network)
    run.write_result(result)  # last: it says that the run is finished
    return result


def _check(
    *,
    model,
    method,
    optimizer,
    density,
    small_dense,
    one_shot,
    masks_from,
    shuffle_masks,
    granularity,
    scale_to_fan_in,
    keep_weights,
    epochs,
    batch_size,
    length,
    label_smoothing,
):
    if batch_size < devices.replica_count():
        raise ValueError(
            "batch_size counts the examples of all replicas and must leave "
            f"each at least one. Received: batch_size={batch_size} for "
            f"{devices.replica_count()} replicas."
        )
    whole = isinstance(keep_weights, Sequence) and all(
        isinstance(epoch, int) and epoch > 0 for epoch in keep_weights
    )
    if not whole:
        raise ValueError(
            "keep_weights lists the epochs after which weights are kept, such "
            f"as [1, 2]. Received: keep_weights={keep_weights!r}."
        )
    if small_dense and callable(model):
        if "channel_scale" not in inspect.signature(model).parameters:
            raise ValueError(
                "small_dense scales the channels of wide_resnet, resnet18 or "
                "resnet50, or of a model of yours that takes `channel_scale`. "
                f"Received: model={getattr(model, '__name__', model)!r}."
            )
    if one_shot is not None and granularity != "element":
        raise ValueError(
            "one_shot chooses single weights. Set train.granularity = "
            f"'element'. Received: granularity={granularity!r}."
        )
    if scale_to_fan_in and (density is None or small_dense or one_shot):
        raise ValueError(
            "scale_to_fan_in scales the weights that masks keep: set "
            "train.density, and neither train.small_dense nor train.one_shot."
        )
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
    if one_shot is not None and not callable(one_shot):
        raise ValueError(
            "one_shot must be something that makes masks from a batch, in gin "
            f"train.one_shot = @snip, or None. Received: {one_shot!r}."
        )
    if not length > 0 or int(epochs * length) < 1:
        raise ValueError(
            "length is a factor on the epochs of the run and must leave one "
            f"at least. Received: length={length!r} of epochs={epochs}."
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            "label_smoothing must be in [0, 1). Received: "
            f"label_smoothing={label_smoothing!r}."
        )
    if small_dense and method is not None:
        raise ValueError(
            "A small dense network has no masks to update. Set train.method = "
            "None, or train.small_dense = False."
        )
    makers = {
        "small_dense": small_dense,
        "one_shot": one_shot,
        "masks_from": masks_from,
    }
    given = [name for name, value in makers.items() if value]
    if len(given) > 1:
        raise ValueError(
            f"A run starts in one way, and {' and '.join(given)} are two. Set "
            "one of them."
        )
    if given and density is None:
        raise ValueError(
            f"train.{given[0]} needs train.density, which is None (the dense "
            "model)."
        )
    if shuffle_masks and masks_from is None:
        raise ValueError(
            "shuffle_masks shuffles the masks of another run: set "
            "train.masks_from."
        )


def _masks(source, density):
    """Returns the masks of an earlier run, if they are of this density."""
    masks = source.masks
    ones = sum(int(np.count_nonzero(mask)) for mask in masks.values())
    found = ones / sum(mask.size for mask in masks.values())
    if abs(found - density) > 0.01 * density:
        raise ValueError(
            f"The masks of {str(source.path)!r} keep {found:.4f} of the "
            f"weights, and train.density is {density}. Pass "
            f"--density={found:.4g}, or the directory of another run."
        )
    return masks


def _shuffled(masks, granularity, seed):
    """Returns masks of the same counts, placed anew by unit."""
    draw = np.random.default_rng(seed)
    shuffled = {}
    for name, mask in masks.items():
        # Where units are kernels, one entry of each tells them all.
        units = mask[(0,) * (mask.ndim - 2)]
        if granularity == "element" or (mask != units).any():
            units = mask
        placed = draw.permutation(units.ravel()).reshape(units.shape)
        shuffled[name] = np.broadcast_to(placed, mask.shape)
    return shuffled


def _smoothed(images, labels, classes, smoothing):
    targets = tf.one_hot(labels, classes)
    return images, targets * (1 - smoothing) + smoothing / classes


def _name(update, density, small_dense, one_shot, masks_from):
    if update is not None:
        return update.name
    if density is None:
        return "dense"
    if small_dense:
        return "small-dense"
    if one_shot is not None:
        return "SNIP"
    return "static" if masks_from is None else "lottery"


def _closed_form(update, inference, dense_flops, times_as_long):
    """Returns the paper's ratio, at the mean forward cost of the run."""
    method = type(update).__name__ if update else "static"
    try:
        cost = flops.training_flops(
            method,
            sparse_flops=float(np.mean(inference)),
            dense_flops=dense_flops,
            frequency=getattr(update, "frequency", None),
            gradient_batches=getattr(update, "gradient_batches", 1),
        )
    except ValueError:  # a method of the user's own has none
        return None
    return times_as_long * cost / (3 * dense_flops)


class _EpochLogs(keras.callbacks.Callback):
    """Adds step, rate, seconds, density and cost to the logs of an epoch.

    What the method logs is left as it is.

    Args:
        network: The model, masked or not.
        cost: Its `count`.
        trajectory: The connections of each layer.
        dense_flops: Inference FLOPs of the dense model.
        training_ratio: Returns the training FLOPs so far over those of the
            dense model's whole training, given epochs and steps so far.
        share_of_dense: Of a small dense network, its density.
    """

    def __init__(
        self,
        network,
        cost,
        trajectory,
        *,
        dense_flops,
        training_ratio,
        share_of_dense,
    ):
        super().__init__()
        self._masked = rigl_keras.masked_layers(network).named
        self._cost = cost
        self._trajectory = trajectory
        self._dense_flops = dense_flops
        self._training_ratio = training_ratio
        self._share_of_dense = share_of_dense

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.model.optimizer
        step = int(optimizer.iterations.numpy())
        logs["step"] = step
        logs["learning_rate"] = float(
            tf.convert_to_tensor(optimizer.learning_rate)
        )
        connections = [sum(now.values()) for _, now in self._trajectory.rows]
        logs.setdefault("density", self._density(connections[-1]))
        logs.setdefault("grown", 0.0)
        logs.setdefault("drop_fraction", _dropped(connections, logs["grown"]))
        now = sum(
            layer.flops_at(
                self._masked[layer.name].density if layer.masked else 1.0
            )
            for layer in self._cost.layers
        )
        logs["inference_flops_ratio"] = now / self._dense_flops
        logs["training_flops_ratio"] = self._training_ratio(epoch + 1, step)
        logs["seconds"] = round(time.perf_counter() - self._start, 2)

    def _density(self, connections):
        if self._share_of_dense is not None:
            return self._share_of_dense
        weights = sum(math.prod(m.kernel.shape) for m in self._masked.values())
        return connections / weights if weights else 1.0


def _dropped(connections, grown):
    """Returns the share of the connections that the last update dropped."""
    if len(connections) < 2 or not connections[-2]:
        return 0.0
    before, after = connections[-2:]
    return (before - after + grown) / before


def _versions():
    versions = {"python": platform.python_version()}
    for package in ("tensorflow", "keras", "numpy"):
        versions[package] = importlib.metadata.version(package)
    return {**versions, "rigl_keras": rigl_keras.__version__}


if __name__ == "__main__":
    from rigl_keras.experiments import command

    command.main()
