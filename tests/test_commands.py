"""The help and messages of commands, and Ctrl-C."""

import io
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import warnings

import absl.logging
import pytest
from absl import flags

import rigl_keras
from rigl_keras.experiments import command_line, quiet_start
from rigl_keras.experiments.progress_bar import ProgressBar

ROOT = pathlib.Path(rigl_keras.__file__).parents[1]
SCRIPTS = {path.name: path.read_text() for path in (ROOT / "bin").iterdir()}
# The scripts that only run a module, and the module.
MODULES = {
    name: found[1]
    for name, text in SCRIPTS.items()
    if (found := re.search(r"-m (rigl_keras\.experiments\S+)", text))
}
PARTS = (
    "kernels",
    "train",
    "inference",
    "plans",
    "engines",
    "workers",
    "language",
)
ASKED = [
    *([name, "--help"] for name in MODULES),
    *(["benchmark", part, "-h"] for part in PARTS),
    ["train", "--helpshort"],
    ["train", "--densty=0.1"],
    *([*command.split(" "), "^C"] for command in (*MODULES, "benchmark plans")),
]
# A process without imports, which forks for each command.
HELPS = """
import contextlib, io, json, os, runpy, signal, sys, warnings
import absl.app, absl.flags, numpy

warnings.simplefilter("ignore")  # of modules that are run and imported
# A shell ignores it in what it runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
for module, *arguments in json.loads(sys.argv[1]):
    if not os.fork():
        if arguments[-1:] == ["^C"]:
            from rigl_keras.experiments import quiet_start

            arguments.pop()
            quiet_start.our_messages = lambda name: os.kill(os.getpid(), 2)
        sys.argv = ["", *arguments]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code
        heavy = {"tensorflow", "keras", "torch", "tensorflow_datasets",
                 "matplotlib", "optuna"} & {*sys.modules}
        told = [code, out.getvalue(), err.getvalue(), sorted(heavy)]
        print(json.dumps(told), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def helps():
    """Returns `{command: (status, output, errors, imported modules)}`."""
    asked = [[MODULES[name], *rest] for name, *rest in ASKED]
    done = subprocess.run(
        [sys.executable, "-c", HELPS, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, quiet_start.LIGHT: "1"},
    )
    told = map(json.loads, done.stdout.splitlines())
    return dict(zip(map(" ".join, ASKED), told, strict=True))


def test_help_is_there_at_once(helps):
    """Help imports no slow module, and fits 80 columns."""
    assert len(MODULES) == 7
    for command, (code, out, err, heavy) in helps.items():
        if "densty" in command or "^C" in command:
            continue
        assert (code, err, heavy) == (0, "", []), command
        assert max(map(len, out.splitlines())) <= 80, command
        assert "\nOptions:\n" in out and "--help" in out, command
    for name in MODULES:
        assert f"export {quiet_start.LIGHT}=1" in SCRIPTS[name]


def test_help_shows_the_options_of_the_command(helps):
    _, train, *_ = helps["train --help"]
    assert "  --gin_file=TEXT\n      Gin file of the run. (may be" in train
    assert "  --[no]resume\n" in train and "--verbosity" not in train
    assert helps["train --helpshort"][1] == train
    _, kernels, *_ = helps["benchmark kernels -h"]
    for flag in ("--densities=", "--rounds=N", "--output="):
        assert f"  {flag}" in kernels
    assert "--part" not in kernels
    assert (
        "  --quantization=float16|int8\n      Quantization of tflite"
        in helps["export --help"][1]
    )


def test_a_wrong_flag_names_the_one_that_is_near(helps):
    code, out, err, heavy = helps["train --densty=0.1"]
    assert (code, out, heavy) == (2, "", [])
    assert err == (
        "train: There is no flag --densty. Did you mean --density? bin/train "
        "--help lists all.\n"
    )


def test_help_names_what_there_is(helps):
    """Help lists the same names as modules that need TensorFlow."""
    from rigl_keras.distributions import DISTRIBUTIONS
    from rigl_keras.experiments.benchmarks.engines.network_files import MODELS
    from rigl_keras.experiments.benchmarks.networks import NETWORKS
    from rigl_keras.experiments.benchmarks.worker_process import SIDES
    from rigl_keras.experiments.runs.devices import STRATEGIES
    from rigl_keras.experiments.tuning import search
    from rigl_keras.exporting.formats import FORMATS, QUANTIZATIONS
    from rigl_keras.exporting.measurement import BATCH_SIZES

    for command, names in (
        ("train --help", STRATEGIES),
        ("export --help", [*FORMATS, *QUANTIZATIONS]),
        ("export --help", [", ".join(map(str, BATCH_SIZES))]),
        ("tune --help", search.DISTRIBUTIONS),
        ("benchmark engines -h", MODELS),
        ("benchmark train -h", [*NETWORKS, *DISTRIBUTIONS]),
        ("benchmark workers -h", SIDES),
    ):
        for name in names:
            assert name in " ".join(helps[command][1].split()), (command, name)


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - MODULES - {"python"}))
def test_scripts_without_a_module_have_help(name):
    done = subprocess.run(
        [ROOT / "bin" / name, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert f"bin/{name}" in done.stdout and "#" not in done.stdout
    assert len(lines) >= 2 and max(map(len, lines)) <= 80


def test_a_misspelt_file_of_tests_is_named():
    done = subprocess.run(
        [ROOT / "bin" / "test", "tests/test_topolgy.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no tests/test_topolgy.py. Did you mean test_topology" in done.stderr


def test_an_installed_command_has_the_name_it_was_called_by(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/env/bin/rigl-train", "--seed=1"])
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    text = command_line.help_text("train", "bin/build_kernels builds.")
    assert text.startswith("rigl-build-kernels builds.")
    again = command_line.repeated("train", ["--resume"])
    assert again == "rigl-train --seed=1 --resume"


def test_nothing_is_printed_before_ours(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    with quiet_start.silence():
        os.write(2, b"I0000 from C++\n")
    assert capfd.readouterr().err == ""
    with pytest.raises(ImportError):
        with quiet_start.silence():
            os.write(2, b"why it fails\n")
            raise ImportError
    assert capfd.readouterr().err == "why it fails\n"
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")  # as a user may set it
    with quiet_start.silence():
        os.write(2, b"all\n")
    assert capfd.readouterr().err == "all\n"


def test_messages_are_lines_without_a_prefix():
    messages = quiet_start.Messages("train")

    def said(level, **extra):
        record = logging.makeLogRecord(
            {"levelno": level, "levelname": logging.getLevelName(level)}
            | {"msg": "%d of them", "args": (3,)}
            | extra
        )
        return messages.format(record)

    assert said(logging.WARNING) == "warning: 3 of them"
    assert said(logging.WARNING, progress=True) == "train: 3 of them"
    assert said(logging.INFO) == "train: 3 of them"


def test_messages_go_above_a_bar(monkeypatch):
    """A terminal of 80 columns would wrap one that went behind it."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(warnings, "showwarning", None)
    quiet_start.our_messages("train")
    with ProgressBar(unit="steps", total=9, doing="epoch 1/30"):
        stream = absl.logging.get_absl_handler().python_handler.stream
        stream.write("train: slow\n")
        warnings.showwarning("so", UserWarning, "f", 1)
    for line in ("train: slow", "warning: so"):
        before, _, after = terminal.getvalue().partition(line)
        assert "0/9 steps" in before and before.endswith("\r")
        assert after.startswith("\n\r0/9 steps")


def test_ctrl_c_in_a_run(tmp_path, fresh):
    """It prints one line, with the command that continues."""
    run = fresh.start(
        *("-m", MODULES["train"], f"--run_dir={tmp_path / 'run'}"),
        "--gin_bindings=train.epochs = 999",
    )
    deadline = time.monotonic() + 60
    while "Run directory" not in run.printed("stdout"):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(60)
    assert run.returncode == 130, err
    *_, line = err.splitlines()
    assert line == (
        "train: interrupted; continue with: bin/train "
        f"--run_dir={tmp_path}/run '--gin_bindings=train.epochs = 999' --resume"
    )
    assert "Traceback" not in err


def test_ctrl_c_in_every_command(helps):
    """It works at any time, here during the import of TensorFlow."""
    for command, (code, out, err, _) in helps.items():
        name = command.removesuffix(" ^C")
        if command.endswith("^C"):
            assert (code, out) == (130, ""), command
            says = rf"\n{name}: interrupted; .*: bin/{name}( --resume)?\n"
            assert re.fullmatch(says, err), err
