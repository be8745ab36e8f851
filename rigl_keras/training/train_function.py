"""What `fit` exchanges in a model, and gives back."""

import contextlib
import math

import keras
import tensorflow as tf

from rigl_keras import _keras, replicas

__all__ = ["loss_on", "traced_once", "untraced"]


def loss_on(model, data):
    """Returns a function that evaluates the loss on a batch, as it is then."""
    if (
        not _keras.has_loss(model)
        and type(model).compute_loss is keras.Model.compute_loss
    ):
        return lambda: tf.constant(math.nan)

    def loss():
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        # What the call would assign stays in the scope; of what it is given,
        # Keras takes the penalties.
        given = [(v, v.value) for v in model.trainable_variables]
        with keras.StatelessScope(given, collect_losses=True):
            outputs = model(x, training=False)
            # Keras's own way to a `compute_loss` with or without `training`.
            value = _keras.compute_loss(
                model,
                x=x,
                y=y,
                y_pred=outputs,
                sample_weight=weight,
                training=False,
            )
        return tf.cast(value, tf.float32)

    return loss


def untraced(train_step):
    """Returns the Python function within a `tf.function`.

    One trace would serve ordinary steps and updates alike.
    """
    return getattr(train_step, "python_function", train_step)


def traced_once(model):
    """Within the context, variables are made outside of the trace.

    Keras makes those of metrics as the first step is traced, and TensorFlow
    traces a function twice if it has made variables.
    """
    # Replicas make theirs together, as their strategy has it.
    if tf.executing_eagerly() or replicas.is_distributed(model):
        return contextlib.nullcontext()

    def make(next_creator, **options):
        if not callable(options.get("initial_value")):  # a tensor of the trace
            return next_creator(**options)
        options["experimental_enable_variable_lifting"] = False
        with tf.init_scope():
            return next_creator(**options)

    return tf.variable_creator_scope(make)
