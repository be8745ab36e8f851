"""What the package imports, and where it refuses to."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

import rigl_keras

PACKAGE = pathlib.Path(rigl_keras.__file__).parent

# Each module imports only from those before it.
ORDER = [
    "arguments",
    "writing",
    "reading",
    "conventions",
    "distributions",
    "schedules",
    "scores",
    "initial_values",
    "drawing",
    "topology",
    "redistribution",
    "maskable",
    "timing",
    "kernels",
    "products",
    "between",
    "tracing",
    "mask_variable",
    "layers",
    "layer_state",
    "surgery",
    "replicas",
    "optimizer_state",
    "sparsify",
    "fit_runs",
    "masked_gradients",
    "training_step",
    "callbacks",
    "one_shot",
    "flops",
    "topology_record",
    "events",
    "diagnostics",
    "graphs",
    "compaction",
    "sparse_storage",
    "serving",
    "fusion",
    "artefacts",
    "export_report",
    "export",
    "models",
]


def run(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


HEAVY = """
heavy = ['gin', 'absl.flags', 'tensorflow_datasets', 'tf_keras',
         'tensorflow_model_optimization', 'sklearn', 'matplotlib']
print([name for name in heavy if name in sys.modules])
"""


def test_library_needs_tensorflow_only():
    plain = run(f"import sys, tensorflow, keras{HEAVY}")
    ours = run(f"import sys, rigl_keras{HEAVY}")
    assert ours.returncode == 0, ours.stderr
    # Nothing beyond what TensorFlow and Keras themselves bring.
    assert ours.stdout == plain.stdout
    assert "'gin'" not in ours.stdout and "tf_keras" not in ours.stdout


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("TF_USE_LEGACY_KERAS", "1", "Unset TF_USE_LEGACY_KERAS"),
        ("KERAS_BACKEND", "jax", "Set KERAS_BACKEND=tensorflow"),
        ("KERAS_BACKEND", "numpy", "Set KERAS_BACKEND=tensorflow"),
    ],
)
def test_other_keras_is_refused(variable, value, message):
    done = run("import rigl_keras", **{variable: value})
    assert done.returncode != 0
    assert message in done.stderr and "ImportError" in done.stderr


def test_tfmot_may_come_first():
    """It sets TF_USE_LEGACY_KERAS for itself, when it is imported."""
    # Not imported here: other tests would inherit the variable.
    if importlib.util.find_spec("tensorflow_model_optimization") is None:
        pytest.skip("tfmot is not installed")
    done = run("import tensorflow_model_optimization, rigl_keras")
    assert done.returncode == 0, done.stderr


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_who_imports_whom():
    for position, name in enumerate(ORDER):
        path = PACKAGE / f"{name}.py"
        paths = [path] if path.exists() else (PACKAGE / name).glob("*.py")
        allowed = {*ORDER[:position], name}
        for path in paths:
            for module in imported(path):
                parts = module.split(".")
                assert parts[0] not in ("gin", "absl"), path
                if parts[0] == "rigl_keras" and len(parts) > 1:
                    assert parts[1] in allowed, (path.name, module)
    modules = {p.stem for p in PACKAGE.rglob("*.py")}
    assert not modules & {"utils", "common", "helpers", "misc"}
    assert {p.stem for p in PACKAGE.glob("*.py")} <= {*ORDER, "__init__"}


# Beyond the standard library. Those of the paper's arithmetic know no Keras.
THIRD_PARTY = {
    "arguments": {"numpy"},
    "conventions": set(),
    "distributions": {"numpy"},
    "schedules": {"numpy", "tensorflow"},
    "scores": {"tensorflow"},
    "topology": {"tensorflow"},
    "redistribution": {"tensorflow"},
    "topology_record": {"numpy", "matplotlib"},
    "events": {"tensorflow", "tensorboard"},
    "timing": {"numpy"},
    "writing": {"tensorflow"},
    "sparse_storage": {"numpy", "tensorflow"},
    # The last two for one format, where that is asked for.
    "artefacts": {"numpy", "tensorflow", "keras", "onnx", "onnxruntime"},
    "export_report": set(),
}


@pytest.mark.parametrize("name", ORDER)
def test_what_each_module_needs(name):
    path = PACKAGE / f"{name}.py"
    paths = [path] if path.exists() else list((PACKAGE / name).glob("*.py"))
    assert paths
    used = {m.split(".")[0] for path in paths for m in imported(path)}
    used -= {*sys.stdlib_module_names, "rigl_keras"}
    assert used <= THIRD_PARTY.get(name, {"numpy", "tensorflow", "keras"})
