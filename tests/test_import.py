"""What the package imports, and where it refuses to."""

import ast
import pathlib
import subprocess
import sys

import pytest

import rigl_keras

PACKAGE = pathlib.Path(rigl_keras.__file__).parent

# Each module imports only from those before it.
ORDER = [
    "conventions",
    "distributions",
    "schedules",
    "scores",
    "topology",
    "layers",
    "optimizer_state",
    "sparsify",
    "callbacks",
    "flops",
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


def test_library_needs_tensorflow_only():
    done = run(
        "import sys, rigl_keras\n"
        "heavy = ['gin', 'absl.flags', 'tensorflow_datasets', 'tf_keras',"
        " 'tensorflow_model_optimization', 'sklearn', 'matplotlib']\n"
        "import tensorflow\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert done.stdout.strip() in ("[]", "['absl.flags']"), done.stderr


def test_absl_flags_come_with_tensorflow_if_at_all():
    code = "import sys, {}; print('absl.flags' in sys.modules)"
    plain, ours = (
        run(code.format("tensorflow, keras")),
        run(code.format("rigl_keras")),
    )
    assert plain.stdout == ours.stdout


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
