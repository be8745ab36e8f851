"""What a run will cost, before it is trained: FLOPs and seconds.

FLOPs are closed forms over the library's own `count` of the dense network and
the densities that its masks will have; seconds are those of a step that is
measured here.
"""

import dataclasses
import functools
import inspect
import math
import time

import keras
import numpy as np
import tensorflow as tf

import gin
import rigl_keras
from rigl_keras import distributions, flops
from rigl_keras.experiments import data
from rigl_keras.experiments.runs import optimizers, train

__all__ = ["Cost", "planned", "seconds_of_step"]

_STEPS = 8  # that are timed
_WARM_UP = 3  # steps before these
_GRID = 200  # steps of a run at which pruning is looked up


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the configured run will cost.

    Args:
        network: What the time of a step depends on, to be compared.
        inference_flops: Of one sample, with the masks of the start, or those
            that pruning ends with.
        dense_flops: Of one sample, in the dense network.
        training_flops: Of one sample and one step, the mean over the run.
        samples: Training examples seen in the run.
        epochs: Epochs of the run.
        steps: Steps of the run.
        times_as_long: Length of the run over that of a row of length 1.
    """

    network: tuple
    inference_flops: float
    dense_flops: float
    training_flops: float
    samples: int
    epochs: int
    steps: int
    times_as_long: float

    @property
    def total_flops(self) -> float:
        """Of the whole run."""
        return self.training_flops * self.samples

    @property
    def inference_flops_ratio(self) -> float:
        """Over the dense network's."""
        return self.inference_flops / self.dense_flops

    @property
    def training_flops_ratio(self) -> float:
        """Over training the dense network once, as in a result."""
        ratio = self.training_flops / (3 * self.dense_flops)
        return self.times_as_long * ratio


def planned() -> Cost:
    """Returns the cost of the run that gin is configured for.

    By the closed form of its method (`flops.training_flops`), at the densities
    that its masks start with. SNFS and redistribution move density and then
    cost more; masks of an earlier run are taken to be uniform.
    """
    settings = _settings()
    length, density = settings["length"], settings["density"]
    scale = math.sqrt(density) if settings["small_dense"] else 1.0
    dense = _counted(_network(settings, 1.0))
    dense_flops = dense.dense_inference_flops
    update = settings["method"] and settings["method"]()
    if update and length != 1:
        update = update.lengthened(length)
    epochs = int(settings["epochs"] * length)
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
        network=(*_network(settings, scale), settings["batch_size"]),
        inference_flops=inference,
        dense_flops=dense_flops,
        training_flops=training,
        samples=epochs * examples,
        epochs=epochs,
        steps=steps,
        times_as_long=epochs / settings["epochs"],
    )


@functools.cache
def seconds_of_step(network: tuple) -> float:
    """Returns the median time of a training step, measured here and now.

    Of the dense network: masks change a step by a percent or two.

    Args:
        network: What `Cost.network` names.
    """
    *made, batch_size = network
    model = _made(*made)
    model.compile(
        optimizers.sgd(), keras.losses.CategoricalCrossentropy(from_logits=True)
    )
    *places, classes = model.output_shape[1:]
    shape = (batch_size, *model.input_shape[1:])
    examples = _classes(shape, classes)  # the symbols of a text
    if model.inputs[0].dtype.startswith("float"):
        examples = tf.random.stateless_normal(shape, seed=(0, 0))
    labels = tf.one_hot(_classes((batch_size, *places), classes), classes)
    model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors((examples, labels)).repeat())
    seconds = []
    for _ in range(_WARM_UP + _STEPS):
        start = time.perf_counter()
        logs = model.train_function(batches)
        float(logs["loss"])  # fetched, so that the step is over
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[_WARM_UP:]))


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
    """Returns what makes the configured network, to be called or compared."""
    made = dict(gin.get_bindings(settings["model"].__name__))
    made |= _recipe(settings).network_arguments
    if scale != 1.0:
        made["channel_scale"] = scale
    # Without gin around it, whose configuration will be another by then.
    return inspect.unwrap(settings["model"]), tuple(sorted(made.items()))


def _made(maker, made):
    return maker(**dict(made))


@functools.cache
def _counted(network):
    return rigl_keras.count(_made(*network))


def _sparse_flops(cost, density, settings):
    """Returns the forward cost of masks of a density, as they are drawn."""
    drawn = not (settings["one_shot"] or settings["masks_from"])
    shapes = {layer.name: layer.shape for layer in cost.layers if layer.shape}
    whole = settings["granularity"] == "kernel"
    densities = distributions.layer_densities(
        shapes,
        density,
        settings["distribution"] if drawn else "uniform",
        conventions=settings["conventions"],
        # Masks of whole kernels leave layers without any dense.
        densities={n: 1.0 for n, shape in shapes.items() if len(shape) == 2}
        if whole and density < 1
        else None,
    )
    # The products of attention, which have no shape, are the same at any.
    return sum(
        layer.flops_at(densities.get(layer.name, 1.0)) for layer in cost.layers
    )


def _last_and_mean(cost, densities, settings):
    """Returns the forward cost of the last of some densities, and the mean."""
    costs = [_sparse_flops(cost, d, settings) for d in densities]
    return costs[-1], float(np.mean(costs))


def _grid(steps):
    return np.unique(np.linspace(0, steps - 1, _GRID).astype(int))


def _sparsities(schedule, steps):
    """Returns the sparsities of a run, at the steps of a fine grid."""
    return np.array([float(schedule(step)[1]) for step in _grid(steps)])
