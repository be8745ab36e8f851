"""Only `_keras` uses private names of Keras and TensorFlow."""

import ast
import pathlib

import pytest

import rigl_keras

PACKAGE = pathlib.Path(rigl_keras.__file__).parent
# Names of Python, and attributes that this package sets on others' objects.
HARMLESS = {
    "_asdict",
    "_current_frames",
    "_exit",
    "_fields",
    "_getframe",
    "_make",
    "_replace",
    "_plain_class",
    "_rigl_keras_variables",
    "_WITHOUT_KERAS",
}


def is_private(name):
    plain = name.removeprefix("_")
    return name != plain and plain.isidentifier() and plain[0] != "_"


def used_by_keras():
    """Returns the private names that `_keras` uses, as code or as strings."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / "_keras.py").read_text())):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return {name for name in names if is_private(name)} - HARMLESS


def defined(tree):
    """Yields the private names that classes of a module define."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield inner.name
                elif isinstance(inner, ast.AnnAssign):
                    yield ast.unparse(inner.target)
                elif isinstance(inner, ast.Assign):
                    yield from map(ast.unparse, inner.targets)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and is_own(node)
        ):
            yield node.attr


def is_own(node):
    return ast.unparse(node.value) in ("self", "cls", "super()")


def foreign(tree, of_keras, own):
    """Yields the uses of others' private names in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
            if name == "__internal__":
                yield ast.unparse(node)
            elif not is_private(name) or name in HARMLESS:
                continue
            elif name not in own or (name in of_keras and not is_own(node)):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and "attr" in ast.unparse(node.func):
            # getattr, hasattr, setattr
            yield from (
                ast.unparse(node)
                for argument in node.args[1:2]
                if isinstance(argument, ast.Constant)
                and is_private(str(argument.value))
                and argument.value not in HARMLESS | own
            )
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or ""]
            modules += [alias.name for alias in node.names]
            if any(
                module.startswith(("keras.src", "tensorflow.python"))
                for module in modules
            ):
                yield ast.unparse(node)


def test_no_module_but_one_uses_them():
    trees = {
        path: ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path.name != "_keras.py"
    }
    own = {name for tree in trees.values() for name in defined(tree)}
    of_keras = used_by_keras()
    assert {"_layers", "_initial_epoch", "_eager_mode_decorator"} <= of_keras
    found = [
        f"{path.relative_to(PACKAGE)}: {use}"
        for path, tree in trees.items()
        for use in foreign(tree, of_keras, own)
    ]
    assert not found, "Give these a function in rigl_keras/_keras.py."


@pytest.mark.parametrize(
    "code",
    [
        "model._layers",
        "self._check_load_own_variables(store)",
        "optimizer._lr",
        'getattr(model, "_initial_epoch", None)',
        "from tensorflow.python.ops import custom_gradient",
        "import keras.src.layers",
        "tf.__internal__.decorator",
    ],
)
def test_that_they_are_found(code):
    own = {"_layers", "_masks"}
    assert list(foreign(ast.parse(code), used_by_keras(), own))


@pytest.mark.parametrize(
    "code",
    [
        "self._masks",
        "other._masks",
        'getattr(kind, "_plain_class", kind)',
        "sys._getframe()",
        "model.layers",
        "import keras",
    ],
)
def test_what_is_harmless(code):
    assert not list(foreign(ast.parse(code), used_by_keras(), {"_masks"}))
