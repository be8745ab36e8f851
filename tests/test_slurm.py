"""Workers in a real SLURM: two nodes, an array, a stopped and a killed worker.

The test is skipped if SLURM is not installed. Debian and Ubuntu have it:
`apt-get install slurm-wlm`. It needs no configuration: the tests start their
own daemons, which keep their files in a temporary folder.
"""

import csv
import functools
import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import time

import pytest
import yaml
from absl import flags

from rigl_keras.experiments import exits
from rigl_keras.experiments.reproduction import (
    costs,
    reproduce_command,
    slurm,
    workers,
)

REPRODUCE = "rigl_keras.experiments.reproduction.reproduce_command"
NEEDED = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=one,two Default=YES State=UP
"""
# Epochs of six steps, enough of them to be stopped in.
PRESET = """\
PRESET_ROWS = "*_wrn"
train.model = @mlp
mlp.hidden = (16,)
train.dataset = "digits"
train.epochs = 60
train.batch_size = 256
train.diagnostics = False
sgd.warmup_steps = 0
UPDATE_FREQUENCY = 4
UPDATE_END = 200
"""
PATIENCE = 240.0  # seconds, on a machine that others use


def until(condition, what):
    """Waits until something holds, and returns it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"In {PATIENCE:.0f} s there was no {what}.")


def said_by(*command):
    return subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Starts a SLURM with two nodes of one processor each on this machine."""
    if MISSING:
        pytest.skip(
            f"SLURM is not installed ({', '.join(MISSING)}): apt-get install "
            "slurm-wlm"
        )
    folder = tmp_path / "cluster"
    (folder / "state").mkdir(parents=True)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    path = folder / "slurm.conf"
    path.write_text(
        CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            ports=ports,
            user=pwd.getpwuid(os.getuid()).pw_name,
            folder=folder,
        )
    )
    monkeypatch.setenv("SLURM_CONF", str(path))
    daemons = [["slurmctld", "-D"]]
    daemons += [["slurmd", "-D", "-N", name] for name in ("one", "two")]
    with (folder / "said").open("w") as said:
        processes = [
            subprocess.Popen(daemon, stdout=said, stderr=said)
            for daemon in daemons
        ]
    try:
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]

        def both_idle():
            asked = subprocess.run(idle, capture_output=True, text=True)
            return asked.stdout.strip() == "2"

        until(both_idle, "SLURM of two nodes")
        yield
        subprocess.run(["scancel", "--me", "--signal=KILL"])
        subprocess.run(["scancel", "--me"])
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)


@pytest.mark.slow
def test_an_array_survives_a_stopped_and_a_killed_worker(
    cluster, tmp_path, fresh
):
    preset = tmp_path / "tiny.gin"
    preset.write_text(PRESET)
    command = ["-m", REPRODUCE, "table2"]
    command += [f"--preset={preset}", "--rows=rigl_erk_wrn", "--seeds=0,1"]
    command += ["--densities=0.5", f"--results_dir={tmp_path / 'results'}"]
    options = "--slurm_options=--signal=B:USR1@60 --time=60"
    submitted = fresh(*command, "--slurm=2", options, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.startswith("Submitted 2 workers, array ")
    results = tmp_path / "results" / "tiny"
    (script,) = results.glob("slurm/*.sh")
    job = script.stem
    runs = [
        results / f"rigl_erk_wrn-density0.5-seed{seed}" for seed in range(2)
    ]

    def trained(run):
        metrics = run / "run/metrics.csv"
        return metrics.exists() and metrics.read_text().count("\n") > 1

    def log(task):
        return (results / f"slurm/{job}_{task}.log").read_text()

    def worker_of(run):
        """Returns the process that claims a run, and its task."""
        _, process, _, task = (run / "claim").read_text().split()
        return int(process), task

    until(lambda: all(map(trained, runs)), "run with an epoch")
    at_work = {worker_of(run)[1]: run for run in runs}
    assert set(at_work) == {f"{job}_0", f"{job}_1"}
    # The first worker is asked to stop, as before its time limit.
    said_by("scancel", "--signal=USR1", "--batch", f"{job}_0")
    until(lambda: "stopped, as SIGUSR1 asked" in log(0), "worker that stops")
    stopped = at_work[f"{job}_0"]
    assert not (stopped / "run/result.json").exists()
    # The second is killed, as by the kernel when memory runs out.
    killed = at_work[f"{job}_1"]
    os.kill(worker_of(killed)[0], signal.SIGKILL)
    until(lambda: f"{job}_1" not in said_by("squeue"), "end of a killed worker")
    assert not (killed / "run/result.json").exists()
    # A table of runs and tasks. The children of the killed worker end with it,
    # but a little later.
    seen = []

    def is_left():
        seen.append(fresh(*command, "--status", cwd=tmp_path).stdout)
        return f"task {job}_1" not in seen[-1]

    until(is_left, "run that a killed worker has left")
    status = seen[-1]
    print(status)
    rows = {line.split()[0]: line for line in status.splitlines() if line}
    assert any(s in rows[killed.name] for s in ("interrupted", "training"))
    assert f"task {job}_0" in status
    assert f"Array {job}, 2 workers: 1 " in status and "1 ended" in status
    # The stopped worker starts again, and finishes all runs.
    until(lambda: not said_by("squeue", "--noheader"), "end of the array")
    print(log(0), log(1))
    nodes = [log(task).split(",")[0] for task in range(2)]
    assert {node.split()[-1] for node in nodes} == {"one", "two"}
    assert ", start 2" in log(0) and ", start 2" not in log(1)
    assert log(0).count(" begins\n") == 1 and log(0).count("continues\n") == 2
    assert log(0).endswith("2 of 2 runs are finished, 0 failed.\n")
    assert not any((run / "failure.txt").exists() for run in runs)
    # The result has the same bits as an undisturbed run.
    straight = fresh(
        *["-m", "rigl_keras.experiments.runs.train_command"],
        *["--gin_file=gin/rigl_erk_wrn.gin", f"--gin_file={preset}"],
        *["--seed=0", "--density=0.5", f"--run_dir={tmp_path / 'straight'}"],
    )
    assert straight.returncode == 0, straight.stderr
    assert metrics(tmp_path / "straight") == metrics(runs[0] / "run")
    # It is an error if SLURM refuses a job.
    refused = fresh(*command, "--slurm=1", "--slurm_options=--partition=no")
    assert refused.returncode == 1
    assert "reproduce: sbatch failed: " in refused.stderr
    assert "invalid partition" in refused.stderr


def metrics(run):
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and all(row.pop("seconds") for row in rows)
    return rows


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    submit = {"name": "table2", "options": [], "folder": tmp_path}
    with pytest.raises(ValueError, match="--slurm needs SLURM.*no sbatch"):
        slurm.submit(["true"], workers=2, **submit)
    with pytest.raises(ValueError, match="--slurm"):
        slurm.submit(["true"], workers=0, **submit)
    assert slurm.arrays(tmp_path) == []
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/7.sh").write_text("#SBATCH --array=0-3\n")
    with pytest.raises(
        exits.FailedError, match="SLURM's squeue is not on the PATH"
    ):
        slurm.arrays(tmp_path)


def test_a_dry_run_shows_what_would_be_submitted(tmp_path, monkeypatch, capsys):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    for name in ("string", "list", "multi_string", "bool", "integer"):
        define = functools.partial(
            getattr(flags, f"DEFINE_{name}"), flag_values=values
        )
        monkeypatch.setattr(flags, f"DEFINE_{name}", define)
    monkeypatch.setattr(exits, "raise_stop_requests", lambda: None)
    monkeypatch.setattr(costs, "seconds_of_step", lambda step: 0.1)
    monkeypatch.setenv("PATH", str(tmp_path))  # without sbatch
    array = reproduce_command._define_flags()
    command = ["table2", "--rows=set_erk_wrn", "--seeds=1", "--densities=0.1"]
    command += ["--preset=small", f"--results_dir={tmp_path}"]
    options = "--slurm_options=--time=60 --partition=gpu"
    argv = values(["", *command, "--slurm=2", options, "--dry_run"])
    reproduce_command._run(array, argv)
    said = capsys.readouterr().out
    assert "1 runs, 0 finished, 1 left" in said
    assert "2 workers as one array: sbatch --time=60 --partition=gpu," in said
    assert "There is no sbatch on the PATH" in said
    lines = said.splitlines()
    assert "#SBATCH --array=0-1" in lines
    (worker,) = [line for line in lines if line.endswith(" &")]
    assert worker.split()[1:4] == ["-m", REPRODUCE, "table2"]
    assert {*command[1:], "--worker"} == {*worker.split()[4:-1]}
    assert not (tmp_path / "small/slurm").exists()


def test_the_job_for_kubernetes(tmp_path, fresh):
    path = pathlib.Path(__file__).parents[1] / "docs/kubernetes.yaml"
    job = yaml.safe_load(path.read_text())
    spec = job["spec"]
    assert job["kind"] == "Job" and spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    (worker,) = spec["template"]["spec"]["containers"]
    assert worker["command"] == ["python", "-m", REPRODUCE]
    # The command accepts this command line.
    results = f"--results_dir={tmp_path}"
    asked = [w for w in worker["args"] if not w.startswith("--results_dir=")]
    assert len(asked) == len(worker["args"]) - 1
    done = fresh(*worker["command"][1:], *asked, results, "--status")
    assert done.returncode == 0, done.stderr
    assert "runs: " in done.stdout and "--worker" in asked
    # A pod that is asked to stop restarts later, and has time to end its epoch.
    rules = spec["podFailurePolicy"]["rules"]
    statuses = [rule.get("onExitCodes", {}).get("values") for rule in rules]
    assert [os.EX_TEMPFAIL] in statuses
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > workers.GRACE
