"""Installs rigl_keras. The version ranges live in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist


def requirements(*names):
    """The lines of requirements.txt for these packages."""
    text = Path(__file__).with_name("requirements.txt").read_text()
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    by_name = {re.match(r"[\w-]+", line)[0]: line for line in lines if line}
    return [by_name[name] for name in names]


class SourceDistribution(sdist):
    """Carries requirements.txt along, because this file reads it."""

    def add_defaults(self):
        super().add_defaults()
        self.filelist.append("requirements.txt")


setup(
    name="rigl_keras",
    version="0.1.0",
    description="RigL and other sparse-to-sparse training in Keras 3",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["rigl_keras", "rigl_keras.*"]),
    package_data={
        "rigl_keras": ["py.typed"],
        "rigl_keras.experiments.protocol": ["published.csv"],
        # Compiled where they are first used.
        "rigl_keras.kernels": ["csrc/*.cc", "csrc/*.h"],
        # And an example in C, for those who serve a network.
        "rigl_keras.serving": ["csrc/*.cc", "csrc/*.h", "csrc/*.c"],
    },
    install_requires=requirements("tensorflow", "keras", "numpy"),
    extras_require={
        "experiments": requirements(
            "absl-py",
            "gin-config",
            "tensorflow-datasets",
            "importlib_resources",
            "scikit-learn",
            "matplotlib",
            "tqdm",
            "optuna",
            "tensorboard",
        ),
        "onnx": requirements("tf2onnx", "onnx", "onnxruntime"),
        "dev": requirements(
            "pytest",
            "hypothesis",
            "ruff",
            "pyright",
            "tensorflow-model-optimization",
            "tf_keras",
            "sphinx",
            "furo",
            "myst-parser",
        ),
    },
    cmdclass={"sdist": SourceDistribution},
)
