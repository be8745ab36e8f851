"""Predicts the FLOPs and the seconds of a run before it is trained.

FLOPs follow from closed forms, the library's `count` of the dense network and
the densities of its masks. Seconds follow from a training step, measured on
this machine.
"""

import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import gin
import rigl_keras
from rigl_keras import distributions, flops
from rigl_keras.conventions import ORIGINAL, Conventions
from rigl_keras.experiments import data
from rigl_keras.experiments.runs import optimizers, train
from rigl_keras.experiments.runs.argument_checks import check_length
from rigl_keras.schedules import lengthened
from rigl_keras.training.step_update import StepUpdate

__all__ = ["Cost", "Step", "planned", "planned_epochs", "seconds_of_step"]

_STEPS = 8  # steps that are timed, one by one
_WARM_UP = 3  # steps before these
_GRID = 200  # steps at which the density of a pruning run is evaluated


@dataclasses.dataclass(frozen=True)
class Step:
    """What the time of a training step depends on.

    Args:
        make: Makes the dense network.
        arguments: Its arguments, `((name, value), ...)`.
        batch_size: Examples in a step.
        density: Density of the initial masks. None: no masks.
        distribution, granularity, conventions: Of these masks.
        method: The method, if it computes dense gradients at each step. None:
            other methods, whose updates take a percent or two of the time.
    """

    make: Callable[..., keras.Model]
    arguments: tuple[tuple[str, Any], ...]
    batch_size: int
    density: float | None = None
    distribution: str = "uniform"
    granularity: str = "element"
    conventions: Conventions = ORIGINAL
    method: type[StepUpdate] | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the configured run will cost.

    Args:
        step: What the time of a step depends on.
        inference_flops: FLOPs of one sample, with the initial masks, or with
            the final masks of pruning.
        dense_flops: FLOPs of one sample in the dense network.
        training_flops: FLOPs of one sample in a step, the mean over the run.
        samples: Training examples seen in the run.
        epochs: Epochs of the run.
        steps: Steps of the run.
        times_as_long: Length of the run over that of a row of length 1.
        certain: Whether the densities of layers are known before the run.
            They are not if density moves between layers, if pruning compares
            weights of all layers, or if masks are made from data or come from
            another run.
    """

    step: Step
    inference_flops: float
    dense_flops: float
    training_flops: float
    samples: int
    epochs: int
    steps: int
    times_as_long: float
    certain: bool

    @property
    def total_flops(self) -> float:
        """Training FLOPs of the whole run."""
        return self.training_flops * self.samples

    @property
    def inference_flops_ratio(self) -> float:
        """Inference FLOPs over those of the dense network."""
        return self.inference_flops / self.dense_flops

    @property
    def training_flops_ratio(self) -> float:
        """Training FLOPs over those of the dense network, as in a result."""
        ratio = self.training_flops / (3 * self.dense_flops)
        return self.times_as_long * ratio


def planned() -> Cost:
    """Returns the cost of the run that gin is configured for.

    It uses the closed form of the method (`flops.training_flops`) and the
    densities of the initial masks. SNFS and redistribution move density
    between layers and then cost more. Masks of an earlier run are taken to be
    uniform.
    """
    settings = _settings()
    length, density = settings["length"], settings["density"]
    scale = math.sqrt(density) if settings["small_dense"] else 1.0
    dense = _counted(_network(settings, 1.0))
    dense_flops = dense.dense_inference_flops
    update = settings["method"] and settings["method"]()
    if update and length != 1:
        update = update.lengthened(length)
    epochs = planned_epochs()
    examples = _examples(settings)
    steps = epochs * math.ceil(examples / settings["batch_size"])
    if settings["small_dense"]:
        small = _counted(_network(settings, scale))
        inference = mean = small.dense_inference_flops
    elif density is None:
        inference = mean = dense_flops
    elif hasattr(update, "schedule"):
        densities = 1 - _sparsities(update.schedule, steps)
        inference, mean = _last_and_mean(dense, densities, settings)
    elif hasattr(update, "planned_density"):
        densities = [
            update.planned_density(step, steps, density)
            for step in _grid(steps).tolist()
        ]
        inference, mean = _last_and_mean(dense, densities, settings)
    else:
        inference = mean = _sparse_flops(dense, density, settings)
    gradients = update.dense_gradients if update else "never"
    training = 3 * mean
    if gradients == "updates":
        training = flops.training_flops(
            "RigL",
            sparse_flops=mean,
            dense_flops=dense_flops,
            frequency=update.frequency,
            gradient_batches=update.gradient_batches,
        )
    elif gradients == "always":
        training = 2 * mean + dense_flops
    return Cost(
        step=_step(settings, scale, update),
        inference_flops=inference,
        dense_flops=dense_flops,
        training_flops=training,
        samples=epochs * examples,
        epochs=epochs,
        steps=steps,
        times_as_long=epochs / settings["epochs"],
        certain=not (
            settings["one_shot"]
            or settings["masks_from"]
            or getattr(update, "redistribution", None)
            or getattr(update, "scope", None) == "global"
        ),
    )


def _step(settings, scale, update):
    """Returns what the time of a step depends on."""
    make, arguments = _network(settings, scale)
    if settings["density"] is None or settings["small_dense"]:
        return Step(make, arguments, settings["batch_size"])
    method = None
    if update is not None and update.dense_gradients == "always":
        method = type(update)
    return Step(
        make,
        arguments,
        settings["batch_size"],
        density=settings["density"],
        distribution=_distribution(settings),
        granularity=settings["granularity"],
        conventions=settings["conventions"],
        method=method,
    )


def planned_epochs() -> int:
    """Returns the epochs of the run that gin is configured for."""
    settings = _settings()
    check_length(settings["length"], settings["epochs"])
    return lengthened(settings["epochs"], settings["length"])


@functools.cache
def seconds_of_step(step: Step) -> float:
    """Returns the time of a training step on this machine, the least of 8.

    The step uses the kernels that the run will use: masks are drawn, and each
    layer chooses its product, as in a run. The minimum is taken because other
    work on the machine only makes a step longer. If density falls in a run,
    this is the time of its first steps.

    Args:
        step: What the time depends on.
    """
    model = _made(step.make, step.arguments)
    if step.density is not None:
        model = rigl_keras.sparsify(
            model,
            step.density,
            distribution=step.distribution,
            granularity=step.granularity,
            conventions=step.conventions,
        )
    model.compile(
        optimizers.sgd(),
        keras.losses.CategoricalCrossentropy(from_logits=True),
    )
    *places, classes = model.output_shape[1:]
    shape = (step.batch_size, *model.input_shape[1:])
    examples = _classes(shape, classes)  # the symbols of a text
    if model.inputs[0].dtype.startswith("float"):
        examples = tf.random.stateless_normal(shape, seed=(0, 0))
    labels = _classes((step.batch_size, *places), classes)
    batch = examples, tf.one_hot(labels, classes)
    model.optimizer.build(model.trainable_variables)
    model.test_step(batch)  # builds the metrics, traces nothing
    model.make_train_function()
    if step.method is not None:
        method = step.method()
        method.set_model(model)
        method.set_params({"epochs": 1, "steps": 10**6, "verbose": 0})
        method.on_train_begin()
        method.on_epoch_begin(0)
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    made: Any = model  # with a train function; Keras declares it as None
    seconds = []
    for _ in range(_WARM_UP + _STEPS):
        start = time.perf_counter()
        logs = made.train_function(batches)
        float(logs["loss"])  # waits until the step is over
        seconds.append(time.perf_counter() - start)
    return min(seconds[_WARM_UP:])


def _classes(shape, count):
    return tf.random.stateless_uniform(shape, (0, 1), 0, count, tf.int32)


def _settings():
    """Returns the arguments that `train` will have, defaults included."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(train.train).parameters.items()
    }
    return defaults | gin.get_bindings("train")


def _examples(settings):
    return data.training_examples(_recipe(settings))


def _recipe(settings):
    return data.recipe_of(
        settings["dataset"],
        validation=settings["validation"],
        context=settings["context"],
        epoch_examples=settings["epoch_examples"],
    )


def _network(settings, scale):
    """Returns the function that makes the network, and its arguments."""
    made = dict(gin.get_bindings(settings["model"].__name__))
    made |= _recipe(settings).network_arguments
    if scale != 1.0:
        made["channel_scale"] = scale
    # Without gin's wrapper, as gin's configuration changes before the call.
    return inspect.unwrap(settings["model"]), tuple(sorted(made.items()))


def _made(maker, made):
    return maker(**dict(made))


@functools.cache
def _counted(network):
    return rigl_keras.count(_made(*network))


def _sparse_flops(cost, density, settings):
    """Returns the forward FLOPs with masks of a density, as they are drawn."""
    shapes = {layer.name: layer.shape for layer in cost.layers if layer.shape}
    whole = settings["granularity"] == "kernel"
    densities = distributions.layer_densities(
        shapes,
        density,
        _distribution(settings),
        conventions=settings["conventions"],
        # Masks of whole kernels leave layers without any dense.
        densities={n: 1.0 for n, shape in shapes.items() if len(shape) == 2}
        if whole and density < 1
        else None,
    )
    # The products of attention have no shape and cost the same at any density.
    return sum(
        layer.flops_at(densities.get(layer.name, 1.0)) for layer in cost.layers
    )


def _distribution(settings):
    """Returns how density is spread; uniform if masks aren't drawn."""
    drawn = not (settings["one_shot"] or settings["masks_from"])
    return settings["distribution"] if drawn else "uniform"


def _last_and_mean(cost, densities, settings):
    """Returns the forward FLOPs at the last of some densities, and the mean."""
    costs = [_sparse_flops(cost, d, settings) for d in densities]
    return costs[-1], float(np.mean(costs))


def _grid(steps):
    return np.unique(np.linspace(0, steps - 1, _GRID).astype(int))


def _sparsities(schedule, steps):
    """Returns the sparsities of a run, at the steps of `_grid`."""
    return np.array([float(schedule(step)[1]) for step in _grid(steps)])
