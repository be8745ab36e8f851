"""The scripts of `bin/` and `.ci/`, and what importing the library costs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = sorted((ROOT / "bin").iterdir())
SCRIPTS = [*COMMANDS, ROOT / ".ci" / "run"]
by_name = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


@by_name
def test_script_is_executable_and_parses(script):
    assert os.access(script, os.X_OK)
    shell = "sh" if script.read_text().startswith("#!/bin/sh") else "bash"
    subprocess.run([shell, "-n", script], check=True)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.name)
def test_command_is_short(command):
    assert len(command.read_text().splitlines()) <= 25


@pytest.fixture
def checkout(tmp_path):
    """A copy of `bin/`, at a path with a space, that has never been set up."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "bin", root / "bin")
    shutil.copy(ROOT / "requirements.txt", root)
    return root


@pytest.fixture
def environment(tmp_path):
    """A stand-in virtual environment whose Python prints its arguments.

    Asked to run pip or a line of code, it notes that down and succeeds.
    """
    python = tmp_path / "an environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        '  pip) echo "$@" >>"$VIRTUAL_ENV/installs" ;;\n'
        "  import*) ;;\n"
        '  *) printf "%s\\n" "$PWD" "$TF_CPP_MIN_LOG_LEVEL" "$@" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    return python.parent.parent


def call(command, *arguments, cwd, environment, **variables):
    """What the command prints, as lines."""
    result = subprocess.run(
        [command, *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "VIRTUAL_ENV": environment}
        | variables,
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout.splitlines()


def installs(environment):
    """How often pip was asked to install something."""
    return len((environment / "installs").read_text().splitlines())


def test_python_sets_up_once_and_keeps_directory_and_arguments(
    checkout, environment, tmp_path
):
    python = checkout / "bin" / "python"
    for _ in range(2):
        lines = call(
            python, "-m", "it", "a b", cwd=tmp_path, environment=environment
        )
        assert lines == [str(tmp_path), "2", "-m", "it", "a b"]
        assert installs(environment) == 2  # requirements and the package
    assert not (checkout / ".venv").exists()


def test_python_installs_again_when_the_requirements_change(
    checkout, environment, tmp_path
):
    python = checkout / "bin" / "python"
    call(python, "-m", "it", cwd=tmp_path, environment=environment)
    with (checkout / "requirements.txt").open("a") as requirements:
        requirements.write("another-package\n")
    call(python, "-m", "it", cwd=tmp_path, environment=environment)
    assert installs(environment) == 4


def test_failed_set_up_is_tried_again(checkout, environment, tmp_path):
    python = checkout / "bin" / "python"
    (environment / "installs").mkdir()  # the stand-in's pip cannot write
    with pytest.raises(subprocess.CalledProcessError) as failure:
        call(python, "-m", "it", cwd=tmp_path, environment=environment)
    assert "the next call tries again" in failure.value.stderr
    (environment / "installs").rmdir()
    call(python, "-m", "it", cwd=tmp_path, environment=environment)
    assert installs(environment) == 2


def test_user_setting_of_the_log_level_stays(checkout, environment, tmp_path):
    lines = call(
        checkout / "bin" / "python",
        "-m",
        "it",
        cwd=tmp_path,
        environment=environment,
        TF_CPP_MIN_LOG_LEVEL="0",
    )
    assert lines[1] == "0"


@pytest.mark.parametrize(
    "name, module, in_root",
    [
        ("train", "rigl_keras.experiments.train", False),
        ("benchmark", "rigl_keras.experiments.benchmark", False),
        ("test", "pytest", True),
    ],
)
def test_command_works_through_a_link(
    name, module, in_root, checkout, environment, tmp_path
):
    link = tmp_path / "link"
    link.symlink_to(checkout / "bin" / name)
    lines = call(link, "a b", cwd=tmp_path, environment=environment)
    directory = checkout if in_root else tmp_path
    assert lines == [str(directory), "2", "-m", module, "a b"]


def test_missing_python_is_said(checkout, environment, tmp_path):
    old = environment / "bin" / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError) as failure:
        call(checkout / "bin" / "python", cwd=tmp_path, environment=environment)
    assert "needs Python 3.10 to 3.13" in failure.value.stderr


def test_import_brings_no_experiment_package():
    """`import rigl_keras` needs TensorFlow, Keras and numpy alone.

    absl is not among the names: TensorFlow itself imports it.
    """
    heavy = {
        "gin",
        "optuna",
        "tensorboard",
        "tensorflow_datasets",
        "tensorflow_model_optimization",
        "tf_keras",
    }
    code = (
        "import sys; import tensorflow; before = set(sys.modules);"
        "import rigl_keras; print(*(set(sys.modules) - before))"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "rigl_keras" in modules
    assert not heavy & {module.partition(".")[0] for module in modules}
