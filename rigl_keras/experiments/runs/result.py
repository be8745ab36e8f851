"""The result of a run, as result.json holds it."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping

import numpy as np

import rigl_keras
from rigl_keras.experiments.runs import devices, provenance
from rigl_keras.experiments.runs.batches import Batches
from rigl_keras.experiments.runs.starting_point import StartingPoint
from rigl_keras.experiments.runs.training_cost import TrainingCost
from rigl_keras.training.step_update import StepUpdate

__all__ = ["result"]


def result(
    start: StartingPoint,
    update: StepUpdate | None,
    *,
    batches: Batches,
    cost: TrainingCost,
    curves: tuple[np.ndarray, np.ndarray],
    test: Mapping[str, float],
    validation: Mapping[str, float],
    epochs: int,
    seconds: float,
    settings: Mapping[str, object],
) -> dict:
    """Returns the result of a run.

    Args:
        start: What the run started with. Its network is trained.
        update: The mask update, or None.
        batches: The batches of the run.
        cost: What the run costs.
        curves: Inference and training FLOPs of each step.
        test: Metrics on the test examples.
        validation: Metrics on the validation examples; empty if there are
            none.
        epochs: Epochs of the run.
        seconds: Seconds that training took.
        settings: Further arguments of `train` to keep in the result.
    """
    final = rigl_keras.count(start.network)
    inference, training = curves
    ratio = cost.training_ratio(training, epochs=epochs)
    small = cost.share_of_dense is not None
    examples = batches.examples
    return {
        "method": start.initialization.kind if update is None else update.name,
        "model": start.network.name,
        "dataset": examples.recipe.name,
        "seed": start.initialization.seed,
        "density": cost.share_of_dense if small else final.density,
        "test_accuracy": test["accuracy"],
        "validation_accuracy": validation.get("accuracy"),
        "test_loss": test["loss"],
        "validation_loss": validation.get("loss"),
        **_of_text(test, validation, examples.about),
        "inference_flops": final.inference_flops,
        "inference_flops_ratio": final.inference_flops / cost.dense_flops,
        # From the masks of each step, by the closed form, and including the
        # runs that masks and weights come from.
        "training_flops": float(np.mean(training))
        * examples.training_examples
        * epochs,
        "training_flops_ratio": ratio,
        "training_flops_ratio_closed_form": cost.closed_form(inference),
        "training_flops_ratio_with_sources": ratio
        + sum(
            earlier["training_flops_ratio_with_sources"]
            for earlier in start.sources.values()
        ),
        "parameters": cost.parameters,
        "nonzeros": final.nonzeros,
        "bits": final.bits,
        "csr_bits": final.csr_bits,
        "steps": len(training),
        "seconds": seconds,
        "layers": _layers(final),
        "settings": {
            **start.initialization.settings,
            "epochs": epochs,
            "batch_size": batches.batch_size,
            "replicas": devices.replica_count(),
            "label_smoothing": batches.label_smoothing,
            **settings,
            "method": _settings_of(update),
        },
        "versions": _versions(),
    }


def _of_text(test, validation, text):
    """Returns a text's losses as perplexity and bits per character.

    A loss l is the mean of -ln p over characters. Perplexity is e^l: guessing
    is as hard as among so many equally likely characters. l / ln 2 is the
    number of bits that code a character. Empty for images.
    """
    if not text:
        return {}
    found: dict[str, object] = {}
    for split, metrics in (("test", test), ("validation", validation)):
        loss = metrics.get("loss")
        found[f"{split}_perplexity"] = None if loss is None else _exp(loss)
        found[f"{split}_bits_per_character"] = (
            None if loss is None else loss / math.log(2)
        )
    return {**found, "text": dict(text)}


def _exp(loss):
    # math.exp overflows for the loss of a run that has diverged.
    return math.exp(loss) if loss < 700 else math.inf


def _layers(count):
    return [
        {
            "name": layer.name,
            "shape": list(layer.shape),
            "density": layer.density,
            "masked": layer.masked,
            "nonzeros": layer.nonzeros,
            "inference_flops": layer.inference_flops,
        }
        for layer in count.layers
    ]


def _settings_of(update):
    """Returns the configuration of a mask update, in types that JSON takes."""
    return {
        key: value
        if isinstance(value, (int, float, str, type(None)))
        else str(value)
        for key, value in (update.get_config().items() if update else ())
    }


def _versions():
    versions = {"python": platform.python_version()}
    for package in ("tensorflow", "keras", "numpy"):
        versions[package] = importlib.metadata.version(package)
    return {
        **versions,
        "rigl_keras": rigl_keras.__version__,
        "commit": provenance.commit(),
        "date": provenance.now(),
    }
