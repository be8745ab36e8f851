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
from rigl_keras.experiments import data, train

__all__ = ["Cost", "planned", "seconds_of_step"]

_STEPS = 8  # that are timed
_WARM_UP = 3  # steps before these


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the configured run will cost.

    Args:
        network: What the time of a step depends on, to be compared.
        inference_flops: Of one sample, as the masks start; of pruning, the
            mean over the run.
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
    recipe = data.DATASETS[settings["dataset"]]
    small = settings["small_dense"]
    density = settings["density"]
    scale = math.sqrt(density) if small else 1.0
    dense = _counted(_network(settings, 1.0))
    sparse = dense
    if small:
        sparse = _counted(_network(settings, scale))
    forward = sparse.dense_inference_flops
    update = settings["method"] and settings["method"]()
    length = settings["length"]
    epochs = int(settings["epochs"] * length)
    held_out = settings["validation"]
    held_out = recipe.validation if held_out is None else held_out
    examples = recipe.examples - held_out
    steps_per_epoch = math.ceil(examples / settings["batch_size"])
    steps = epochs * steps_per_epoch
    if density is not None and not small:
        ramp = getattr(update, "schedule", None)
        if ramp is not None:
            density = float(np.mean(1 - _sparsities(ramp, length, steps)))
        forward = _sparse_flops(dense, density, settings)
    gradients = update.dense_gradients if update else "never"
    training = 3 * forward
    if gradients == "updates":
        training = flops.training_flops(
            "RigL",
            sparse_flops=forward,
            dense_flops=dense.dense_inference_flops,
            frequency=update.frequency,
            gradient_batches=update.gradient_batches,
        )
    elif gradients == "always":
        training = 2 * forward + dense.dense_inference_flops
    return Cost(
        network=(*_network(settings, scale), settings["batch_size"]),
        inference_flops=forward,
        dense_flops=dense.dense_inference_flops,
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
        train.sgd(), keras.losses.CategoricalCrossentropy(from_logits=True)
    )
    classes = model.output_shape[-1]
    images = tf.random.stateless_normal(
        (batch_size, *model.input_shape[1:]), seed=(0, 0)
    )
    labels = tf.one_hot(tf.range(batch_size) % classes, classes)
    model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    seconds = []
    for _ in range(_WARM_UP + _STEPS):
        start = time.perf_counter()
        logs = model.train_function(batches)
        float(logs["loss"])  # fetched, so that the step is over
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[_WARM_UP:]))


def _settings():
    """Returns the arguments that `train` will have, defaults included."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(train.train).parameters.items()
    }
    return defaults | gin.get_bindings("train")


def _network(settings, scale):
    """Returns what makes the configured network, to be called or compared."""
    recipe = data.DATASETS[settings["dataset"]]
    made = dict(gin.get_bindings(settings["model"].__name__))
    made |= {
        "num_classes": recipe.num_classes,
        "input_shape": recipe.input_shape,
    }
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
    densities = distributions.layer_densities(
        {layer.name: layer.shape for layer in cost.layers},
        density,
        settings["distribution"] if drawn else "uniform",
        conventions=settings["conventions"],
    )
    return sum(layer.flops_at(densities[layer.name]) for layer in cost.layers)


def _sparsities(ramp, length, steps):
    """Returns the sparsity of a schedule at a thousand steps of a run."""
    at = np.linspace(0, steps / length, 1_000)
    return np.array([float(ramp(int(step))[1]) for step in at])
