"""The scripts of a fresh clone."""

import os
import pathlib
import stat
import subprocess
import sys

import pytest

import rigl_keras

ROOT = pathlib.Path(rigl_keras.__file__).parents[1]
SCRIPTS = sorted((ROOT / "bin").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_run(script):
    assert len(script.read_text().splitlines()) <= 25
    assert script.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", script], check=True)


def test_ci_parses():
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_an_activated_environment_is_used(tmp_path):
    """It works from any folder, with spaces in the path, without an install."""
    copy = tmp_path / "a clone"
    (copy / "bin").mkdir(parents=True)
    for script in SCRIPTS:
        target = copy / "bin" / script.name
        target.write_text(script.read_text())
        target.chmod(0o755)
    (copy / "requirements.txt").write_text("")
    environment = tmp_path / "an environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    sum_of_requirements = subprocess.run(
        ["cksum"], input=b"", capture_output=True, check=True
    ).stdout.decode()
    stamp = f"{sum_of_requirements.strip()} {copy}\n"
    (environment / ".rigl_keras").write_text(stamp)
    done = subprocess.run(
        [
            copy / "bin" / "python",
            "-c",
            "print('ran', __import__('os').getcwd())",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "VIRTUAL_ENV": str(environment)},
    )
    assert done.stdout.strip() == f"ran {tmp_path}", done.stderr
    assert done.stderr == ""
