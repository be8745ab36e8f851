"""The commands of an installed rigl_keras: rigl-train and the others.

They lie beside the package, because what TensorFlow prints, and whether it is
imported at all, is decided before `rigl_keras` is.
"""

import importlib
import os
import sys
from pathlib import Path

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "rigl-train": "rigl_keras.experiments.runs.train_command",
    "rigl-export": "rigl_keras.experiments.runs.export_command",
    "rigl-reproduce": "rigl_keras.experiments.reproduction.reproduce",
    "rigl-tune": "rigl_keras.experiments.tuning.tune",
    "rigl-report": "rigl_keras.experiments.report_command",
    "rigl-benchmark": "rigl_keras.experiments.benchmarks.benchmark_command",
    "rigl-build-kernels": "rigl_keras.kernels.build_command",
}


def main() -> None:
    """Runs the command by whose name the process was started."""
    name = Path(sys.argv[0]).stem
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if name == "rigl-report":
        # --planned alone needs TensorFlow, and loads it then.
        os.environ.setdefault("RIGL_KERAS_WITHOUT_TENSORFLOW", "1")
    try:
        command = importlib.import_module(COMMANDS[name])
    except ModuleNotFoundError as error:
        from rigl_keras import _extras

        if error.name not in _extras.OPTIONAL:
            raise
        sys.exit(f"{name} needs {_extras.missing(error.name)}")
    command.main()
