"""Sparse training in Keras: RigL and its relatives.

>>> model = rigl_keras.sparsify(model, density=0.1)
>>> model.compile("sgd", loss, metrics=["accuracy"])
>>> model.fit(train, epochs=250, callbacks=[rigl_keras.RigL()])
>>> print(rigl_keras.count(model))
>>> rigl_keras.export(model, "exported/")
"""

import os
import sys
from typing import TYPE_CHECKING

# tfmot sets this variable itself, and MagnitudePruning takes its schedules.
_SET_BY_HAND = "tensorflow_model_optimization" not in sys.modules
_LEGACY = os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true")

if _LEGACY and _SET_BY_HAND:
    raise ImportError(
        "rigl_keras is written for Keras 3, but TF_USE_LEGACY_KERAS="
        f"{os.environ['TF_USE_LEGACY_KERAS']} turns tf.keras into Keras 2. "
        "Unset TF_USE_LEGACY_KERAS before Python starts."
    )


def _refuse_backend(backend):
    raise ImportError(
        f"rigl_keras needs Keras on TensorFlow, but the backend is {backend!r}."
        ' Set KERAS_BACKEND=tensorflow, or "backend": "tensorflow" in '
        "~/.keras/keras.json, before Python starts."
    )


# Checked first: importing Keras fails if its backend is not installed.
if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
    _refuse_backend(os.environ["KERAS_BACKEND"])


def _why_without_keras():
    """Returns why there is no Keras on TensorFlow here, or None.

    bin/report needs no TensorFlow, and does not wait for it.
    """
    if os.environ.get("RIGL_KERAS_WITHOUT_TENSORFLOW"):
        return "which RIGL_KERAS_WITHOUT_TENSORFLOW rules out: unset it"
    try:
        import tensorflow  # noqa: F401, I001 (Keras starts before it fails)
        import keras
    except ImportError as error:
        return (
            f"which cannot be imported ({error}): pip install tensorflow keras"
        )
    if keras.config.backend() != "tensorflow":
        _refuse_backend(keras.config.backend())
    return None


_WITHOUT_KERAS = _why_without_keras()

if TYPE_CHECKING or _WITHOUT_KERAS is None:
    from rigl_keras import (
        compaction,
        conventions,
        diagnostics,
        distributions,
        fan_in,
        flops,
        initial_values,
        kernels,
        models,
        patterns,
        redistribution,
        replicas,
        schedules,
        scores,
        topology,
    )
    from rigl_keras.compaction import (
        fold_batch_norm,
        remove_dead_units,
    )
    from rigl_keras.conventions import ORIGINAL, REPORT, Conventions
    from rigl_keras.diagnostics import TopologyDiagnostics
    from rigl_keras.exporting.export import export
    from rigl_keras.exporting.export_report import (
        ExportReport,
        check_export,
    )
    from rigl_keras.flops import count, training_flops
    from rigl_keras.masking.leaves import named_layers
    from rigl_keras.masking.masked import Masked
    from rigl_keras.masking.masked_layers import (
        choose_kernels,
        masked_layers,
    )
    from rigl_keras.masking.selection import named_kernels
    from rigl_keras.masking.sparsify import sparsify, with_masks
    from rigl_keras.masking.stripping import strip
    from rigl_keras.masking.tracing import dense_gradients
    from rigl_keras.masking.weight_files import load_weights
    from rigl_keras.methods import one_shot
    from rigl_keras.methods.acdc import ACDC
    from rigl_keras.methods.granet import GraNet
    from rigl_keras.methods.gse import GSE
    from rigl_keras.methods.mask_update import MaskUpdate
    from rigl_keras.methods.mest import MEST
    from rigl_keras.methods.pruning import MagnitudePruning
    from rigl_keras.methods.rigl import SET, SNFS, RigL
    from rigl_keras.methods.srigl import SRigL
    from rigl_keras.methods.stored_weights import SRSTE, TopKAST
    from rigl_keras.schedules import SparsityRamp
    from rigl_keras.training import optimizer_state
    from rigl_keras.training.gradient_exchange import exchange_gradients
    from rigl_keras.training.step_update import StepUpdate
else:

    def __getattr__(name):
        # The modules that bin/report needs are imported as usual. After a
        # reload with Keras, all are.
        there = _WITHOUT_KERAS is None or name == "experiments"
        if there or name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no {name!r}")
        raise ImportError(
            f"rigl_keras.{name} needs TensorFlow and Keras 3, {_WITHOUT_KERAS}."
        )


__version__ = "0.2.0"  # pyproject.toml reads it here

__all__ = [
    "ACDC",
    "GSE",
    "MEST",
    "ORIGINAL",
    "REPORT",
    "SET",
    "SNFS",
    "SRSTE",
    "Conventions",
    "ExportReport",
    "GraNet",
    "MagnitudePruning",
    "MaskUpdate",
    "Masked",
    "RigL",
    "SRigL",
    "SparsityRamp",
    "StepUpdate",
    "TopKAST",
    "TopologyDiagnostics",
    "check_export",
    "choose_kernels",
    "compaction",
    "conventions",
    "count",
    "dense_gradients",
    "diagnostics",
    "distributions",
    "exchange_gradients",
    "export",
    "fan_in",
    "flops",
    "fold_batch_norm",
    "initial_values",
    "kernels",
    "load_weights",
    "masked_layers",
    "models",
    "named_kernels",
    "named_layers",
    "one_shot",
    "optimizer_state",
    "patterns",
    "redistribution",
    "remove_dead_units",
    "replicas",
    "schedules",
    "scores",
    "sparsify",
    "strip",
    "topology",
    "training_flops",
    "with_masks",
]


def __dir__():
    """Completion offers what is public, and not what modules import."""
    return list(__all__)
