"""Source distributions and wheels, installed by pip in an empty folder."""

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import rigl_keras
import rigl_keras_commands
from rigl_keras import _extras, kernels

ROOT = pathlib.Path(rigl_keras.__file__).parents[1]
TREE = (
    *("rigl_keras", "rigl_keras_commands.py", "gin", "pyproject.toml"),
    *("setup.py", "MANIFEST.in", "requirements.txt", "README.md", "LICENSE"),
    *("CHANGELOG.md", "CITATION.cff"),
)


def run(*command, **options):
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Returns a source distribution, made in a copy of the repository."""
    tree = tmp_path_factory.mktemp("tree")
    for name in TREE:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, True, ignore)
        else:
            shutil.copy(ROOT / name, tree)
    build = "import setuptools.build_meta as b; b.build_sdist('made')"
    run(sys.executable, "-c", build, cwd=tree)
    (made,) = (tree / "made").iterdir()
    assert made.name == f"rigl_keras-{rigl_keras.__version__}.tar.gz"
    return made


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """Returns the wheel that pip makes from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "-q", "wheel", "--no-deps")
    run(*pip, "--no-build-isolation", "--wheel-dir", folder, source)
    (made,) = folder.iterdir()
    assert made.name.endswith("-py3-none-any.whl")
    return made


def environment(folder, python, *wheels, packages=None):
    """Returns the Python of a new environment with wheels installed.

    It can also import the packages in a folder.
    """
    run(python, "-m", "venv", "--without-pip", folder)
    made = folder / "bin" / "python"
    if packages is not None:
        (site,) = folder.glob("lib/python3*/site-packages")
        (site / "more.pth").write_text(str(packages))
    pip = (sys.executable, "-m", "pip", "-q", "--python", made, "install")
    run(*pip, "--no-deps", "--no-index", "--no-compile", *wheels)
    return made


def test_what_a_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        about = email.message_from_bytes(archive.read(name))
        files = set(archive.namelist())
        commands = archive.read(name.replace("METADATA", "entry_points.txt"))
    assert about["Version"] == rigl_keras.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert set(about["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload().startswith("# rigl_keras\n")
    versions = [c for c in about.get_all("Classifier") if ":: 3.1" in c]
    assert len(versions) == 4 and about.get_all("Project-URL")
    # The sections of requirements.txt, and no other extras.
    needs = about.get_all("Requires-Dist")
    assert [re.match(r"\w+", n)[0] for n in needs if "extra" not in n] == [
        *("tensorflow", "keras", "numpy")
    ]
    extras = about.get_all("Provides-Extra")
    assert extras == ["experiments", "onnx", "dev", "docs"]
    text = (ROOT / "requirements.txt").read_text()
    for package, extra in _extras.OPTIONAL.values():
        (need,) = (n for n in needs if re.match(rf"{package}\b(?!-)", n))
        assert need.endswith(f'extra == "{extra}"')
        assert f"\n{package}" in text.partition(f"# [{extra}]")[2]
    # All files of the package, including the gin files.
    package = ROOT / "rigl_keras"
    for path in package.rglob("*"):
        wanted = path.suffix not in (".so", ".pyc") and path.is_file()
        if wanted:
            assert path.relative_to(ROOT).as_posix() in files
    for path in (ROOT / "gin").rglob("*.gin"):
        inside = path.relative_to(ROOT).as_posix()
        assert f"rigl_keras/experiments/{inside}" in files
    assert not any(name.startswith("tests/") for name in files)
    found = dict(re.findall(r"([\w-]+) = (\S+)", commands.decode()))
    assert found.keys() == rigl_keras_commands.COMMANDS.keys()
    assert set(found.values()) == {"rigl_keras_commands:main"}
    for command, module in rigl_keras_commands.COMMANDS.items():
        assert f"{module.replace('.', '/')}.py" in files
        name = command.removeprefix("rigl-").replace("-", "_")
        called = f" -m {module.removesuffix('.build_command')} "
        assert called in (ROOT / "bin" / name).read_text()


def test_one_version():
    """pyproject.toml reads the version of the package."""
    for path in ("pyproject.toml", "setup.py"):
        assert rigl_keras.__version__ not in (ROOT / path).read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {rigl_keras.__version__}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## [{rigl_keras.__version__}]" in changes


def pythons():
    """Returns a Python of each supported version, if it is installed.

    It looks on the PATH and in pyenv's folder.
    """
    found = {}
    for minor in range(10, 14):
        pattern = f".pyenv/versions/3.{minor}.*/bin/python"
        kept = sorted(pathlib.Path.home().glob(pattern))
        for path in (*kept, shutil.which(f"python3.{minor}")):
            if path and subprocess.run([path, "-V"]).returncode == 0:
                found[f"3.{minor}"] = str(path)
    return found


ALONE = """
import compileall, importlib.metadata, os, pathlib, sys
os.environ["RIGL_KERAS_WITHOUT_TENSORFLOW"] = "1"
import rigl_keras
from rigl_keras.experiments.protocol import rows, variations
package = pathlib.Path(rigl_keras.__file__).parent
assert package.is_relative_to(sys.prefix), package
if sys.version_info[:2] == (3, 10):  # the syntax of the oldest
    assert compileall.compile_dir(package, quiet=1, workers=1)
assert importlib.metadata.version("rigl_keras") == rigl_keras.__version__
assert variations.GIN_FOLDER.is_relative_to(package)
assert dir(rigl_keras) == sorted(rigl_keras.__all__)
print(len(rows.known()))
"""


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_a_wheel_on_each_python(version, wheel, tmp_path):
    """Without its dependencies, its metadata and data files are found."""
    python = pythons().get(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    made = environment(tmp_path / "an environment", python, wheel)
    printed = run(made, "-I", "-c", ALONE, cwd=tmp_path)
    assert int(printed) == len(list((ROOT / "gin").glob("*.gin")))
    # A command names the packages that it needs.
    done = subprocess.run(
        [made.with_name("rigl-report")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        "rigl-report needs absl-py: pip install 'rigl_keras[experiments]'.\n"
    )


INSTALLED = """
import pathlib, sys
import rigl_keras
from rigl_keras.experiments.runs import config
from rigl_keras.kernels import library

package = pathlib.Path(rigl_keras.__file__).parent
assert package.is_relative_to(sys.prefix), package
for name in ("gin/rigl_erk_wrn.gin", "rigl_erk_wrn.gin", "rigl_erk_wrn"):
    assert config.find(name).is_relative_to(package), name

# No compiler, and nothing in the cache.
assert library.load() is not None, library.unavailable()
assert library.path().is_relative_to(package / "kernels")
assert library.build_network().is_relative_to(package / "serving")

from rigl_keras.experiments.runs import train_command

bindings = ["train.model = @mlp", "train.epochs = 1"]
train_command.run(["gin/quickstart.gin"], bindings=bindings, run_dir="run")
"""


@pytest.mark.slow
@pytest.mark.skipif(kernels.load() is None, reason="no kernels can be built")
def test_a_wheel_with_the_operations(tmp_path):
    """It works in an empty folder, a new environment and without a compiler."""
    printed = run(ROOT / "bin" / "build_wheel", cwd=tmp_path)
    wheel = tmp_path / printed.strip()
    platform = re.sub("[-.]", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    packages = sysconfig.get_path("purelib")
    made = environment(
        tmp_path / "env", sys.executable, wheel, packages=packages
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    environ = {
        **{k: v for k, v in os.environ.items() if k != "CXX"},
        "PATH": str(tmp_path / "nothing"),
        "RIGL_KERAS_CACHE": str(tmp_path / "cache"),
    }
    run(made, "-I", "-c", INSTALLED, cwd=empty, env=environ)
    said = run(made.with_name("rigl-train"), "--help", cwd=empty, env=environ)
    assert "rigl-train --gin_file" in said
    assert (empty / "run" / "result.json").is_file()
    built = [path.name for path in (tmp_path / "cache").rglob("*.so")]
    assert built == []
