"""The imports of the package and its modules, and import errors."""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

import rigl_keras

PACKAGE = pathlib.Path(rigl_keras.__file__).parent


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


@pytest.mark.slow
def test_library_needs_tensorflow_only(fresh):
    plain = fresh("-c", f"import sys, tensorflow, keras{HEAVY}")
    ours = fresh("-c", f"import sys, rigl_keras{HEAVY}")
    assert ours.returncode == 0, ours.stderr
    # The same modules as TensorFlow and Keras import themselves.
    assert plain.returncode == 0 and plain.stdout.startswith("[")
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


@pytest.mark.slow
def test_tfmot_may_come_first():
    """tfmot sets TF_USE_LEGACY_KERAS when it is imported."""
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


def rooms():
    """Returns the modules of the package, `{path: room}`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        found[path] = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
    return found


def room_of(parts):
    """Returns the room of a module from the parts of its name."""
    if parts[0] == "experiments" and len(parts) > 1:
        return "/".join(parts[:2])
    if (PACKAGE / parts[0]).is_dir():
        return parts[0]
    if parts[0] == "__init__":
        return "all"
    return "private" if parts[0].startswith("_") else "paper"


# The rooms from which each room may import. There are no import cycles.
MAY_IMPORT = {
    "private": set(),
    "paper": {"private"},
    "models": set(),
    "kernels": {"private"},
    "masking": {"private", "paper", "kernels"},
    "training": {"private", "paper", "kernels", "masking"},
    "methods": {"private", "paper", "masking", "training"},
    "flops": {"private", "paper", "masking"},
    "compaction": {"private", "paper", "masking"},
    "serving": {"private", "kernels"},
    "exporting": {
        "private",
        "kernels",
        "masking",
        "flops",
        "compaction",
        "serving",
    },
    "diagnostics": {"private", "paper", "masking", "training", "flops"},
}
LIBRARY = {*MAY_IMPORT, "all"}
MAY_IMPORT |= {
    "all": set(MAY_IMPORT),
    "experiments": set(),
    "experiments/__init__": set(),
    # These two need no TensorFlow.
    "experiments/protocol": {"private"},
    "experiments/report": {"private", "experiments/protocol"},
    # The start, the end and the progress of commands.
    "experiments/command_line": set(),
    "experiments/quiet_start": set(),
    "experiments/exits": {
        "private",
        "experiments/command_line",
        "experiments/quiet_start",
    },
    "experiments/progress_bar": set(),
    "experiments/data": {"private"},
    "experiments/runs": {
        *LIBRARY,
        "experiments/exits",
        "experiments/progress_bar",
        "experiments/protocol",
        "experiments/data",
    },
    "experiments/reproduction": {
        *LIBRARY,
        "experiments/exits",
        "experiments/progress_bar",
        "experiments/protocol",
        "experiments/data",
        "experiments/runs",
    },
    "experiments/tuning": {
        "private",
        "experiments/exits",
        "experiments/progress_bar",
        "experiments/protocol",
        "experiments/data",
        "experiments/reproduction",
    },
    "experiments/benchmarks": {
        *LIBRARY,
        "experiments/command_line",
        "experiments/exits",
        "experiments/progress_bar",
        "experiments/data",
        "experiments/runs",
    },
    "experiments/report_command": {
        "private",
        "experiments/exits",
        "experiments/quiet_start",
        "experiments/protocol",
        "experiments/report",
        "experiments/reproduction",  # with --planned alone
    },
}


def first_party(path):
    """Yields the modules of this package that a module imports, as tuples."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *parts = name.split(".")
            if first == "rigl_keras":
                while parts and not is_module(parts):
                    parts.pop()  # a name within a module
                yield tuple(parts)


def is_module(parts):
    inside = PACKAGE.joinpath(*parts)
    return inside.is_dir() or inside.with_suffix(".py").exists()


def test_who_imports_whom():
    for path, room in rooms().items():
        for parts in first_party(path):
            # The package itself exports names of all rooms.
            other = room_of(parts) if parts else "all"
            assert other == room or other in MAY_IMPORT[room], (path, parts)
            if other == room and path.name != "__init__.py":
                assert parts != (room,), f"{path} imports from its own package"


def test_no_circles():
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[parts] = {
            other
            for other in first_party(path)
            if PACKAGE.joinpath(*other).with_suffix(".py").is_file()
        }
    while files:
        floor = {name for name, needs in files.items() if not needs & {*files}}
        assert floor, f"These import each other: {sorted(files)}"
        for name in floor:
            del files[name]


def test_gin_and_absl_are_for_commands():
    for path, room in rooms().items():
        used = {name.split(".")[0] for name in imported(path)}
        if not room.startswith("experiments"):
            assert not used & {"gin", "absl"}, path
        if room in ("experiments/protocol", "experiments/report"):
            assert not used & {"gin", "absl", "tensorflow", "keras"}, path


def test_names_and_sizes():
    for path in PACKAGE.rglob("*.py"):
        assert path.stem not in ("utils", "common", "helpers", "misc")
        assert len(path.read_text().splitlines()) <= 600, path
    for path in pathlib.Path(__file__).parent.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 600, path


# Phrases that are hard to read, each with a plainer one.
PLAIN = {
    r"anew": "again",
    r"hence": "so",
    r"whence": "from where",
    r"as ever": "as usual",
    r"but for (the|an?|some|its|those)": "except",
    r"in the place of": "instead of, or replaces",
    r"of one's own": "custom, or the user's",
    r"such that": "so that, or a new sentence",
    r"(is|are) told": "gets",
    r"for want of": "without",
    r"afresh": "again",
    r"(go|goes|gone|going) on": "continue",
    r"(sees?|seen) to it": "ensure, or make sure",
    r"(wherein|whereof|thereof)": "in which, of which",
}


def test_plain_words():
    words = re.compile(rf"\b({'|'.join(PLAIN)})\b", re.IGNORECASE)
    root = PACKAGE.parent
    for path in [
        *PACKAGE.rglob("*.py"),
        *(p for folder in ("docs", "gin") for p in (root / folder).rglob("*")),
        *root.glob("*.md"),
    ]:
        if path.suffix in (".py", ".gin", ".md") and "_build" not in path.parts:
            found = words.search(" ".join(path.read_text().split()))
            assert not found, (path, found)


# Third-party packages of modules. The paper's arithmetic does not use Keras.
THIRD_PARTY = {
    "_checks": {"numpy"},
    "_extras": set(),
    "_figure_style": {"matplotlib"},
    "_files": set(),
    "_patience": set(),
    "_reading": set(),
    "_sparse_arrays": {"numpy"},
    "_tensor_checks": {"numpy", "tensorflow"},
    "_text": set(),
    "_timing": {"numpy"},
    "conventions": set(),
    "distributions": {"numpy"},
    "schedules": {"numpy", "tensorflow"},
    "scores": {"tensorflow"},
    "topology": {"tensorflow"},
    "redistribution": {"tensorflow"},
    "diagnostics/events": {"tensorflow", "tensorboard"},
    "diagnostics/plots": {"numpy", "matplotlib"},
    "diagnostics/table": set(),
    "exporting/export_report": set(),
    "exporting/onnx": {"numpy", "keras", "onnx", "onnxruntime"},
    "exporting/sparse_storage": {"numpy", "tensorflow"},
    # Copied into exports, for machines without TensorFlow.
    "serving/runtime": {"numpy"},
    "serving/network_file": {"numpy"},
}


def test_what_each_module_needs():
    expected = dict(THIRD_PARTY)
    for path, room in rooms().items():
        if room.startswith("experiments"):
            continue
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        used = {m.split(".")[0] for m in imported(path)}
        used -= {*sys.stdlib_module_names, "rigl_keras"}
        may = expected.pop(name, {"numpy", "tensorflow", "keras"})
        assert used <= may, (name, used)
    assert not expected  # all modules exist
