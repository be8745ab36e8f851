"""Compares a model's imported networks with the model, and lists operations."""

import numpy as np
import tensorflow as tf

from rigl_keras.exporting.networks import import_model
from rigl_keras.exporting.signatures import outputs_of, signature_of
from rigl_keras.serving.network import Operation
from rigl_keras.serving.network_file import from_bytes, to_bytes
from support.network_reference import evaluate

# Relative to the largest output. Values are sums of few products.
TOLERANCE = 3e-6


def check_imported(
    model, *, batch=3, least_work=1, tolerance=TOLERANCE, rebuild=True
):
    """Imports a model, and compares its outputs with those of the networks.

    The networks are read from the bytes of a file. TensorFlow computes the
    other parts of the model. A model that is a single network is not rebuilt
    around it, which would take twice the time.

    Returns:
        What `import_model` returned.
    """
    signature = signature_of(model)
    imported = import_model(model, signature, least_work=least_work)
    arrays = signature.random(batch)
    wanted = outputs_of(model, signature, arrays)
    if imported.network is not None:
        network = from_bytes(to_bytes(imported.network))
        compare(evaluate(network, arrays), wanted, tolerance)
    if rebuild or imported.network is None:
        compare(rebuilt(imported, arrays), wanted, tolerance)
    return imported


def rebuilt(imported, arrays):
    """Returns outputs of an imported function, with networks run by NumPy."""
    networks = [from_bytes(to_bytes(s.network)) for s in imported.segments]

    def compute(number, values):
        network = networks[number]
        names = [node.name for node in network.inputs()]
        outputs = evaluate(network, dict(zip(names, values, strict=True)))
        return [y.astype(np.float32) for y in outputs.values()]

    return as_function(imported, in_numpy(imported, compute))(arrays)


def in_numpy(imported, compute):
    """Returns a function for `Imported.rebuild` that runs networks on arrays.

    Args:
        imported: What `import_model` returned.
        compute: Takes the number of a network and a list of its inputs, and
            returns a list of its outputs.
    """

    def run(number, tensors):
        outputs = imported.segments[number].outputs
        return tf.numpy_function(
            lambda *values: compute(number, list(values)),
            tensors,
            [tf.float32] * len(outputs),
        )

    return run


def as_function(imported, run):
    """Returns the imported function, as a function of arrays by names.

    Args:
        imported: What `import_model` returned.
        run: As in `Imported.rebuild`.
    """
    serve = tf.function(
        lambda **inputs: imported.rebuild(inputs, run),
        autograph=False,
        reduce_retracing=True,
    )

    def call(arrays):
        outputs = serve(**{name: tf.constant(x) for name, x in arrays.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return call


def compare(found, wanted, tolerance):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].shape == array.shape
        largest = np.abs(array).max()
        np.testing.assert_allclose(
            found[name], array, rtol=0, atol=tolerance * largest, err_msg=name
        )


def operations(network):
    """Returns the operations of a network, without inputs, in one line."""
    return " ".join(
        node.activation.name.lower()
        if node.operation == Operation.ACTIVATION
        else node.operation.name
        for node in network.nodes
        if node.operation != Operation.INPUT
    )
