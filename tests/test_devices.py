"""Several devices give the same masks as one, and lost workers are named.

TensorFlow counts devices once, at its start, so each test runs in separate
processes.
"""

import json
import pathlib
import re
import signal
import socket
import time

import keras
import numpy as np
import pytest
from support import two_devices, two_workers

import gin
import rigl_keras
from rigl_keras.experiments.runs import train_command

pytestmark = pytest.mark.usefixtures("blank_figures")

TESTS = pathlib.Path(__file__).parent
LIMIT = 600  # seconds after which a process is taken to hang


ALONE = "a_run_on_two_devices"
FIRST, REFUSED = "RigL", "what_does_not_work_is_refused"
TRAVEL = "active_gradients_alone_travel"


@pytest.mark.slow_but("a method")
@pytest.mark.parametrize(
    "names",
    [
        [FIRST, REFUSED, TRAVEL],
        [name for name in two_devices.METHODS if name != FIRST],
        [
            name
            for name in two_devices.CHECKS
            if name not in (*two_devices.METHODS, REFUSED, TRAVEL, ALONE)
        ],
        [ALONE],
    ],
    ids=["a method", "other methods", "library", "run"],
)
def test_on_two_devices(names, fresh):
    done = fresh("-m", two_devices.__name__, *names, cwd=TESTS, timeout=LIMIT)
    output = done.stdout + done.stderr
    assert re.findall(r"^(\S+): failed", done.stdout, re.M) == [], output
    assert done.returncode == 0, output
    passed = re.findall(r"^(\S+): passed", done.stdout, re.M)
    assert passed == names


def free_ports():
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in (one, two)]


SMALL = [
    "train.model = @mlp",
    "mlp.hidden = (24, 16)",
    "train.density = 0.3",
    "train.epochs = 3",
    "RigL.frequency = 5",
]


def train(fresh, run_dir, *flags, **env):
    """Starts a process of a run."""
    return fresh.start(
        "-m",
        "rigl_keras.experiments.runs.train_command",
        *[f"--gin_bindings={binding}" for binding in SMALL],
        *[f"--run_dir={run_dir}", *flags],
        env=env,
    )


def pair(fresh, run_dir, *flags):
    """Starts the two workers of a run."""
    return [
        train(
            fresh, run_dir, "--strategy=multi_worker", *flags, TF_CONFIG=config
        )
        for config in tf_configs()
    ]


def tf_configs():
    """Returns TF_CONFIG for each of two workers."""
    workers = [f"localhost:{port}" for port in free_ports()]
    return [
        json.dumps(
            {
                "cluster": {"worker": workers},
                "task": {"type": "worker", "index": index},
            }
        )
        for index in range(2)
    ]


def ended(*processes):
    """Waits for processes; returns their exit codes and output."""
    try:
        said = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [p.returncode for p in processes], [out + err for out, err in said]


def trained(run_dir):
    model = keras.models.load_model(run_dir / "model.keras")
    return rigl_keras.masked_layers(model).masks, model.get_weights()


@pytest.mark.slow
def test_two_workers(fresh, tmp_path):
    """Two workers end as one does, also if one is killed and both resume."""
    chief, worker = pair(fresh, tmp_path / "killed")
    first_epoch = tmp_path / "killed" / "checkpoints" / "epoch-1.index"
    start = time.monotonic()
    while not first_epoch.exists() and chief.poll() is None:
        assert time.monotonic() < start + LIMIT, ended(chief, worker)
        time.sleep(0.005)
    worker.send_signal(signal.SIGKILL)
    # The chief needs some seconds to notice; meanwhile the undisturbed run.
    undisturbed = pair(fresh, tmp_path / "pair")
    codes, said = ended(chief, worker)
    assert codes == [1, -signal.SIGKILL], said
    assert "worker 1 (localhost:" in said[0]
    assert "stopped answering" in said[0] and "--resume" in said[0]
    assert not (tmp_path / "killed" / "result.json").exists()

    codes, said = ended(*undisturbed)
    assert codes == [0, 0], said
    masks, weights = trained(tmp_path / "pair")
    result = json.loads((tmp_path / "pair" / "result.json").read_text())
    assert (result["settings"]["replicas"], result["steps"]) == (2, 69)

    codes, said = ended(*pair(fresh, tmp_path / "killed", "--resume"))
    assert codes == [0, 0], said
    assert "Resuming" in said[0]
    resumed_masks, resumed_weights = trained(tmp_path / "killed")
    for name, mask in resumed_masks.items():
        np.testing.assert_array_equal(mask, masks[name])
    for ours, theirs in zip(resumed_weights, weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert names_in(tmp_path / "killed") == names_in(tmp_path / "pair")

    train_command.run(bindings=SMALL, run_dir=tmp_path / "one")
    gin.clear_config()
    masks_of_one, weights_of_one = trained(tmp_path / "one")
    for name, mask in masks_of_one.items():
        np.testing.assert_array_equal(masks[name], mask)
    for ours, theirs in zip(weights, weights_of_one, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_what_two_workers_exchange(fresh):
    codes, said = ended(
        *(
            fresh.start(
                "-m",
                two_workers.__name__,
                cwd=TESTS,
                env={"TF_CONFIG": config},
            )
            for config in tf_configs()
        )
    )
    names = [*two_workers.CHECKS, "other masks"]
    for words in said:
        assert re.findall(r"^(.+): failed", words, re.M) == [], words
        assert re.findall(r"^(.+): passed", words, re.M) == names, words
    assert codes == [0, 0], said


def names_in(run_dir):
    """Returns the files of a run; only the chief must have written any."""
    return sorted(
        path.relative_to(run_dir).as_posix()
        for path in run_dir.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    )


def test_without_a_tpu(fresh, tmp_path):
    codes, said = ended(train(fresh, tmp_path / "run", "--strategy=tpu"))
    assert codes == [2], said
    assert "--strategy=tpu has never been run" in said[0]
    assert "finds no TPU named 'local'" in said[0]


@pytest.mark.parametrize(
    "config",
    [
        None,
        "{",
        '{"cluster": {"worker": ["a:1"]}}',
        '{"cluster": {"worker": ["a:1"]}, "task": '
        '{"type": "worker", "index": 1}}',
    ],
    ids=["none", "not json", "no task", "no such task"],
)
def test_workers_need_a_cluster(config, tmp_path, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match="multi_worker needs TF_CONFIG"):
        train_command.run(run_dir=tmp_path / "run", strategy="multi_worker")
    assert not (tmp_path / "run").exists()


def test_strategies_have_names(tmp_path):
    with pytest.raises(ValueError, match="must be one of one, mirrored"):
        train_command.run(run_dir=tmp_path / "run", strategy="many")
