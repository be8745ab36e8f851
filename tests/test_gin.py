"""Every gin file: its header, and that it trains."""

import contextlib
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.datasets import write_metadata

import gin
import rigl_keras
from rigl_keras.experiments.runs import config, run_directory, train_command
from rigl_keras.experiments.runs.exports import Exports
from rigl_keras.models import resnet

pytestmark = pytest.mark.usefixtures("blank_figures")

GIN = pathlib.Path(rigl_keras.__file__).parents[1] / "gin"
EVERY = sorted(path.stem for path in GIN.glob("*.gin"))
TEXTS = [name for name in EVERY if name.endswith("_gpt")]
FILES = [name for name in EVERY if name not in TEXTS]  # for images

# Two steps of the real configuration, on networks of fewer blocks.
SHORT = [
    "train.epochs = 1",
    "train.batch_size = 2",
    "train.validation = 2",
    "train.diagnostics = False",
    "train.keep_weights = [1]",
    "wide_resnet.depth = 10",
    "UPDATE_FREQUENCY = 1",
    "UPDATE_END = 9",
    "SparsityRamp.begin_step = 0",
    "SparsityRamp.end_step = 1",
    "LONG_FREQUENCY = 1",
    "ITOP_FREQUENCY = 1",
    "MEST_FREQUENCY = 1",
    "RUN_END = 9",
    "HALF_RUN = 1",
    "GSE_END = 9",
    "SRIGL_FREQUENCY = 1",
    "SRIGL_END = 9",
    "MEST_END = 1",
    "SWITCH_STEPS = [1]",
    "synflow.rounds = 3",
]
METHODS = {
    "dense": "dense",
    "small_dense": "small-dense",
    "static": "static",
    "set": "SET",
    "rigl": "RigL",
    "rigl_kernel": "RigL",
    "rigl_2_4": "RigL",
    "rigl_sg": "RigL-SG",
    "rigl_sm": "RigL-SM",
    "rigl_reinit": "RigL",
    "snfs": "SNFS",
    "pruning": "MagnitudePruning",
    "lottery": "lottery",
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "magnitude": "Magnitude",
    "itop": "RigL",
    "granet": "GraNet",
    "mest": "MEST",
    "gse": "GSE",
    "srigl": "SRigL",
    "acdc": "ACDC",
}
NEWER = (
    "rigl_2_4",
    "grasp",
    "synflow",
    "magnitude",
    "itop",
    "granet",
    "mest",
    "gse",
    "srigl",
    "acdc",
)
# Runs that start from another run.
AFTER = {
    name: name.replace("lottery", "pruning").replace("reinit", "sm")
    for name in FILES
    if "lottery" in name or "reinit" in name
}
AFTER["magnitude_wrn"] = "dense_wrn"


def row_of(name):
    """Returns the name of a row, for any network and length."""
    return re.sub(r"(_\dx|_50k)?_(wrn|resnet50)$", "", name)


MODELS = ("resnet50", "wrn")
ROWS = sorted({row_of(name) for name in FILES if name != "quickstart"})
OLDER = [row for row in ROWS if row not in NEWER]  # for both networks
# Rows whose files for the two networks differ by more than the network.
OF_BOTH = ("pruning", "snip")
# Rows that differ from another, trained row only by the distribution.
LIKE_OTHERS = {
    "set_uniform": "set_erk",
    "snfs_uniform": "snfs_erk",
    "rigl_sg_erk": "rigl_sg_uniform",
    "rigl_sm_uniform": "rigl_sm_erk",
    "rigl_reinit_uniform": "rigl_reinit_erk",
    "rigl_kernel_erk": "rigl_kernel_uniform",
}


def trained_files():
    """Returns a file for each kind of row, with alternating networks."""
    names = [f"{row}_{model}" for row in OF_BOTH for model in MODELS]
    names.append("rigl_uniform_2x_wrn")
    for row in set(ROWS) - set(LIKE_OTHERS):
        # A run that starts from another one has the same network.
        source = row_of(AFTER.get(f"{row}_wrn", f"{row}_wrn"))
        turn = OLDER.index(source) % 2 if row in OLDER else MODELS.index("wrn")
        names.append(f"{row}_{MODELS[turn]}")
    return sorted(set(names))


TRAINED = trained_files()


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def kind(name):
    found = [
        m
        for m in METHODS
        if re.match(f"{m}_(uniform|erk?|50k|2x|3x|wrn|resnet50)", name)
    ]
    return max(found, key=len)


def test_there_is_one_for_every_row():
    """Each row of tables 1, 2, 3, 5 and 7 of the report has a file."""
    of_both = [
        "dense", "small_dense", "static_uniform", "static_erk", "set_uniform",
        "set_erk", "rigl_uniform", "rigl_erk", "snfs_uniform", "snfs_erk",
        "pruning", "lottery", "rigl_uniform_2x", "rigl_erk_2x",
        "rigl_sg_uniform", "rigl_sm_uniform", "rigl_sg_erk", "rigl_sm_erk",
        "rigl_reinit_uniform", "rigl_reinit_erk",
        "rigl_kernel_uniform", "rigl_kernel_erk",
    ]  # fmt: skip
    of_one = [
        "static_uniform_2x_wrn", "set_uniform_2x_wrn", "snfs_uniform_2x_wrn",
        "rigl_uniform_3x_resnet50", "dense_50k_wrn", "static_erk_50k_wrn",
        "pruning_50k_wrn", "rigl_erk_50k_wrn",
    ]  # fmt: skip
    rows = {
        f"{row}_{model}" for row in of_both for model in ("wrn", "resnet50")
    }
    assert rows | set(of_one) <= set(FILES)


@pytest.mark.parametrize("name", [n for n in FILES if n != "quickstart"])
def test_header(name):
    """It has the row, published accuracy and cost, hours, and the command."""
    text = (GIN / f"{name}.gin").read_text()
    header = text[: text.index("\n\n")].replace("\n# ", " ")
    assert f"bin/train --gin_file=gin/{name}.gin" in header
    hours = 6 if "resnet50" in name else 2
    assert f"The report states {hours} hours a run on a GTX 1080" in header
    not_of_the_report = ("snip", "static_er_", *NEWER)
    if name.startswith(not_of_the_report):
        assert "Not a row of the report" in header
    elif name == "static_erk_wrn":
        assert "Table 1 only" in header
    else:
        assert "Table" in header and "%" in header
        assert "FLOPs" in header or "50k" in name
    for source in re.findall(r"gin/(\w+)\.gin", header):
        assert source in FILES


@pytest.mark.parametrize("name", TEXTS)
def test_header_of_texts(name):
    """It says that the report has no such row, and has the command."""
    text = (GIN / f"{name}.gin").read_text()
    header = text[: text.index("\n\n")].replace("\n# ", " ")
    assert f"bin/train --gin_file=gin/{name}.gin" in header
    assert "Not a row of the report" in header
    assert "docs/language.md" in header
    assert (GIN.parent / "docs" / "language.md").is_file()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("cifar10", "cifar100"):
        write_metadata(name, folder, {"train": 6, "test": 2})
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder of the runs so far, and their results by name."""
    return tmp_path_factory.mktemp("runs"), {}


@pytest.fixture
def short(monkeypatch, data_dir, finished):
    """Trains two steps on two classes of random images, without graphs.

    Other tests cover the graphs of these steps, which take a minute to trace
    for ResNet-50.
    """
    import tensorflow_datasets as tfds

    whole = resnet._resnet
    folder, results = finished

    def run(name, *bindings):
        if name in results:  # another run has started from it
            return results[name], folder / name
        # In a network of two blocks, the head is too large for these rows.
        large = "small_dense" in name or "kernel" in name
        blocks = (1, 1, 1, 1) if large else (1, 1)
        monkeypatch.setattr(resnet, "_resnet", lambda _, *x: whole(blocks, *x))
        with tfds.testing.mock_data(
            num_examples=6,
            policy=tfds.testing.MockPolicy.USE_FILES,
            data_dir=str(data_dir),
        ):
            results[name] = train_command.run(
                [f"{name}.gin"],
                bindings=[*SHORT, *bindings],
                run_dir=folder / name,
                data_dir=data_dir,
            )
        return results[name], folder / name

    keras.config.disable_interactive_logging()
    tf.config.run_functions_eagerly(True)
    yield run
    tf.config.run_functions_eagerly(False)


# Methods whose masks stay.
STAY = (
    "dense",
    "small-dense",
    "static",
    "lottery",
    "SNIP",
    "GraSP",
    "SynFlow",
    "Magnitude",
)


@pytest.mark.slow_but("rigl_erk_wrn")
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.filterwarnings("ignore:Even though the `tf.config")
@pytest.mark.filterwarnings("ignore:RigL plans 0 updates")
@pytest.mark.filterwarnings("ignore:SynFlow keeps no connection")
def test_two_steps(name, short):
    bindings = []
    if name in AFTER:
        source = str(short(AFTER[name])[1])
        bindings = [f"train.weights_from = {source!r}"]
        if name == "magnitude_wrn":
            bindings.append("train.weights_epoch = 1")
        else:
            bindings.append(f"train.masks_from = {source!r}")
    result, run_dir = short(name, *bindings)
    assert result["method"] == METHODS[kind(name)]
    assert result["steps"] == 2 * int(result["settings"]["length"])
    assert np.isfinite(result["test_loss"])
    if kind(name) == "dense":
        assert result["density"] == 1.0
    else:  # Small-Dense truncates channels
        near = 0.1 if kind(name) == "small_dense" else 0.01
        density = 0.5 if kind(name) == "rigl_2_4" else 0.1
        assert result["density"] == pytest.approx(density, rel=near)
    assert result["dataset"] == ("cifar10" if "wrn" in name else "cifar100")
    if kind(name) == "small_dense":
        assert result["nonzeros"] == pytest.approx(
            0.1 * result["parameters"], rel=0.1
        )
    rows = (run_dir / "trajectory.csv").read_text().splitlines()
    moved = len(rows) - 2
    dynamic = result["method"] not in STAY
    assert moved == (result["steps"] - 1 if dynamic else 0) or (
        # The step at which the ramp begins prunes nothing.
        result["method"] == "MagnitudePruning" and moved == result["steps"]
    )
    if name in AFTER:
        taken = "weights" if name == "magnitude_wrn" else "masks"
        assert result["settings"][f"{taken}_from"] == source


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.filterwarnings("ignore:Even though the `tf.config")
def test_two_steps_of_a_text(name, tmp_path):
    keras.config.disable_interactive_logging()
    tf.config.run_functions_eagerly(True)
    try:
        result = train_command.run(
            [f"{name}.gin", "gin/presets/tiny_gpt.gin"],
            bindings=[
                "train.batch_size = 1024",  # few test batches
                "train.epoch_examples = 2048",
                "train.validation = 17",
                "train.diagnostics = False",
                "UPDATE_FREQUENCY = 1",
            ],
            run_dir=tmp_path / "run",
        )
    finally:
        tf.config.run_functions_eagerly(False)
    assert result["method"] == METHODS[name.removesuffix("_gpt")]
    assert (result["model"], result["dataset"]) == ("gpt", "python_docs")
    assert result["steps"] == 2
    assert result["density"] == pytest.approx(
        1.0 if name.startswith("dense") else 0.1, rel=0.01
    )
    assert np.isfinite(result["test_loss"])
    rows = (tmp_path / "run" / "trajectory.csv").read_text().splitlines()
    assert len(rows) - 2 == name.startswith("rigl")


def test_texts_differ_by_their_method_alone():
    base = bindings_of("includes/gpt_python_docs")
    own = {
        name: {
            what: value
            for what, value in bindings_of(name).items()
            if base.get(what) != value
        }
        for name in TEXTS
    }
    masked = {"train.distribution": "'erdos_renyi_kernel'"}
    assert own == {
        "rigl_gpt": {"train.method": "@RigL", **masked},
        "static_gpt": {"train.method": "None", **masked},
        "dense_gpt": {"train.method": "None", "train.density": "None"},
    }


def bindings_of(path):
    """Returns the bindings of a gin file, `{name: value}`, as text."""
    config.parse([f"{path}.gin"], [])
    lines = gin.config_str(max_line_length=1000).splitlines()
    bound = [line.split(" = ", 1) for line in lines if not line.startswith("#")]
    return dict(pair for pair in bound if len(pair) == 2)


def own_bindings(name):
    """Returns the bindings that a file adds to those of its network."""
    model = name.rsplit("_", 1)[1]
    dataset = {"wrn": "cifar10", "resnet50": "cifar100"}[model]
    base = bindings_of(f"includes/{model}_{dataset}")
    assert base["train.dataset"] == repr(dataset)
    found = bindings_of(name)
    assert base.keys() <= found.keys()
    own = {w: value for w, value in found.items() if base.get(w) != value}
    for what in ("train.masks_from", "train.weights_from"):
        if what in own:
            assert own[what] == repr(f"runs/{AFTER[name]}")
            own[what] = "that run"
    named = re.search("_(uniform|erk)_", name)
    if named and name not in AFTER:  # those have masks of another run
        full = {"uniform": "uniform", "erk": "erdos_renyi_kernel"}[named[1]]
        if name.startswith("rigl_kernel_uniform"):
            full = "uniform_all"
        assert own.pop("train.distribution") == repr(full)
    return own


@pytest.mark.parametrize(
    "name", [n for n in FILES if n not in (*TRAINED, "quickstart")]
)
def test_differs_from_one_that_is_trained(name):
    """It differs only in what its name says."""
    model = name.rsplit("_", 1)[1]
    row = LIKE_OTHERS.get(row_of(name), row_of(name))
    same_row = [like for like in TRAINED if row_of(like) == row]
    like = max(same_row, key=lambda like: like == f"{row}_{model}")
    ours, theirs = own_bindings(name), own_bindings(like)
    longer = re.search(r"_(\d)x_", name)
    if longer:
        assert ours.pop("train.length") == longer[1]
    if "_50k_" in name:
        assert ours.pop("train.validation") == "0"
    assert ours == {w: v for w, v in theirs.items() if w != "train.length"}
    assert ours  # the file has settings


def test_lengths_are_those_of_the_rows():
    for name in EVERY:
        config.parse([f"{name}.gin"], [])
        length = gin.get_bindings("train").get("length", 1)
        multiple = re.search(r"_(\d)x_", name)
        assert length == (int(multiple[1]) if multiple else 1)


def test_density_reaches_every_row(monkeypatch):
    """`--density` sets the final density, even of runs that start dense."""
    seen = {}

    def train(run, **options):
        seen.update(gin.get_bindings("train"))
        seen["ramp"] = gin.get_bindings("SparsityRamp")

    monkeypatch.setattr(
        run_directory, "RunDirectory", lambda *a, **k: _Nowhere()
    )
    config.configured()  # registers the names in the files with gin
    configured = {"train": train, "Exports": Exports}
    monkeypatch.setattr(config, "configured", lambda: configured)
    for name in EVERY:
        if name == "quickstart" or name.startswith("dense"):
            continue
        config.parse([f"{name}.gin"], [])
        seen.clear()
        train_command.run([f"{name}.gin"], density=0.3, run_dir="nowhere")
        if name.startswith("pruning"):
            assert seen["density"] == 1.0
            assert seen["ramp"]["final_density"] == 0.3
        elif name == "granet_wrn":
            assert seen["density"] == 0.5
            assert gin.get_bindings("GraNet")["final_density"] == 0.3
        elif name == "acdc_wrn":
            assert seen["density"] == 1.0
            assert gin.get_bindings("ACDC")["density"] == 0.3
        else:
            assert seen["density"] == 0.3


class _Nowhere(contextlib.nullcontext):
    path = pathlib.Path("nowhere")
    writes = True

    def __enter__(self):
        return self
