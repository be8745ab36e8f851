"""The README's code runs, and what it names exists."""

import csv
import json
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorflow as tf
from support.setups import support_table

import rigl_keras
from rigl_keras import kernels

needs_kernels = pytest.mark.skipif(
    kernels.load() is None, reason="there are no sparse kernels here"
)

ROOT = pathlib.Path(rigl_keras.__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def dataset():
    draw = np.random.default_rng(0)
    images = draw.standard_normal((2, 32, 32, 3)).astype(np.float32)
    return tf.data.Dataset.from_tensors((images, np.arange(2))).repeat(2)


# `fit` warns of its own default, shuffle=True, on every tf.data.Dataset.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_the_first_ten_lines(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[0]
    assert "rigl_keras.sparsify(model, density=0.1)" in code
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Two steps an epoch: the update at step 100 is within three quarters.
    code = code.replace("depth=22", "depth=10").replace(
        "epochs=250", "epochs=68"
    )
    names = {"train": dataset(), "loss": loss}
    exec(code, names)
    model = names["model"]
    assert len(rigl_keras.masked_layers(model)) == 11
    assert model.history.history["drop_fraction"][-1] > 0
    assert (tmp_path / "exported" / "saved_model.pb").exists()
    assert "FLOPs" in capsys.readouterr().out


@pytest.mark.slow
def test_the_server_answers(tmp_path):
    """In a process that cannot import this package."""
    model = rigl_keras.sparsify(rigl_keras.models.wide_resnet(10, 1), 0.1)
    call = next(b for b in blocks("python") if "remove_dead_units" in b)
    call = call.replace('"exported/"', repr(str(tmp_path / "exported")))
    exec(call, {"rigl_keras": rigl_keras, "model": model})
    code = next(b for b in blocks("python") if "serve_forever" in b)
    assert "rigl_keras" not in code
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = code.replace("8501", str(port))
    code = f"import sys; sys.modules['rigl_keras'] = None\n{code}"
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3))
    request = urllib.request.Request(
        f"http://localhost:{port}",
        json.dumps({"instances": images.tolist()}).encode(),
    )
    server = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        answer = None
        while answer is None:
            assert server.poll() is None, "The server has ended."
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.load(response)
            except urllib.error.URLError:
                time.sleep(0.2)  # it imports TensorFlow first
    finally:
        server.kill()
        server.wait()
    np.testing.assert_allclose(
        answer["predictions"], model(images), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@needs_kernels
def test_the_sparse_saved_model_is_loaded(tmp_path):
    """In a process that cannot import this package, by the lines it has."""
    model = rigl_keras.sparsify(rigl_keras.models.wide_resnet(10, 1), 0.1)
    rigl_keras.export(
        model,
        tmp_path / "exported",
        format="sparse_saved_model",
        measure=False,
    )
    code = "\n".join(
        [
            "import sys; sys.modules['rigl_keras'] = None",
            "import tensorflow as tf",
            next(b for b in blocks("python") if "load_op_library" in b),
            "(name,) = serve.structured_input_signature[1]",
            "images = tf.ones((2, 32, 32, 3))",
            "print(serve(**{name: images})['output_0'].numpy().tolist())",
        ]
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    np.testing.assert_allclose(
        json.loads(answer.stdout),
        model(tf.ones((2, 32, 32, 3))),
        rtol=1e-4,
        atol=1e-5,
    )


@needs_kernels
def test_choosing_kernels(capsys):
    code = next(b for b in blocks("python") if "choose_kernels" in b)
    names = {
        "rigl_keras": rigl_keras,
        "model": rigl_keras.models.mlp(hidden=(8,)),
    }
    exec(code, names)
    assert "product" in capsys.readouterr().out
    assert rigl_keras.masked_layers(names["model"])


# Where the data of each row is, and which of it.
SPEEDS = {
    "training step": ("train", "kernels=auto", 0.1, 128),
    "training step, 95 % sparse": ("train", "kernels=auto", 0.05, 128),
    "with its mask updates": (
        "train",
        "kernels=auto, 1 update in 100",
        0.1,
        128,
    ),
    "step of PyTorch": ("train", "PyTorch, dense and masked", 0.1, 128),
    "inference, batch 128": ("inference", "served", 0.1, 128),
    "inference, batch 1": ("inference", "served", 0.1, 1),
}


def speeds():
    """Returns `{(file, library, model, masks, side, density, batch): x}`."""
    found = {}
    for path in (ROOT / "docs" / "kernels").rglob("*.csv"):
        if path.stem == "kernels":
            continue  # of single layers
        for row in csv.DictReader(path.read_text().splitlines()):
            (library,) = re.findall("against (\\w+)", row["machine"])
            key = library, row["model"], row["distribution"], row["side"]
            sizes = float(row["density"]), int(row["batch_size"])
            found[(path.stem, *key, *sizes)] = float(row["speed_up"])
    return found


def test_speeds_are_those_of_the_data():
    table = README[README.index("| speed-up over dense") :].split("\n\n")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    ]
    assert {row[0] for row in rows} == set(SPEEDS)
    measured = speeds()
    for name, *cells in rows:
        file, *what = SPEEDS[name]
        for column, cell in zip(head[1:], cells, strict=True):
            model, masks = column.split(", ")
            model = {"WRN-22-2": "wide_resnet", "ResNet-50": "resnet50"}[model]
            masks = {"ERK": "erdos_renyi_kernel"}.get(masks, masks)
            both = [
                measured.get((file, library, model, masks, *what))
                for library in ("oneDNN", "Eigen")
            ]
            wanted = " / ".join(f"{x:.2f}x" if x else "–" for x in both)
            assert cell == wanted, (name, column)


def test_adding_a_method():
    code = next(b for b in blocks("python") if "MaskUpdate)" in b)
    assert len(code.strip().splitlines()) <= 15
    names = {"rigl_keras": rigl_keras}
    exec(code, names)
    method = next(
        value
        for value in names.values()
        if isinstance(value, type) and issubclass(value, rigl_keras.MaskUpdate)
    )
    model = rigl_keras.sparsify(rigl_keras.models.mlp(hidden=(8,)), 0.1)
    model.compile("sgd", "mse")
    before = [m.mask.numpy() for m in rigl_keras.masked_layers(model)]
    x = np.random.default_rng(0).standard_normal((32, 28, 28, 1))
    y = np.ones((32, 10))
    callback = method(frequency=2, end_step=9, decay="constant")
    model.fit(x, y, batch_size=4, callbacks=[callback], verbose=0)
    after = [m.mask.numpy() for m in rigl_keras.masked_layers(model)]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    for a, b in zip(before, after, strict=True):
        assert a.sum() == b.sum()


def test_every_file_it_names_exists():
    folders = "rigl_keras|gin|bin|tests|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


def test_every_method_of_its_table():
    table = README[README.index("| method | callback") :].split("\n\n")[0]
    calls = re.findall(r"`([\w.]+\(.*?\))` ?[|,o]", table)
    made = [c for c in calls if not c.startswith("sparsify")]
    assert len(made) == 18
    names = {**vars(rigl_keras), "model": None, "masks": {}}
    for call in calls:
        if call.startswith(("one_shot", "with_masks", "sparsify")):
            assert callable(eval(call.partition("(")[0], names))
        else:
            assert isinstance(eval(call, names), rigl_keras.StepUpdate)


def test_a_loop_of_ones_own():
    code = next(b for b in blocks("python") if "rigl.update(" in b)
    model = rigl_keras.sparsify(rigl_keras.models.mlp(hidden=(8,)), 0.1)
    names = {
        "rigl_keras": rigl_keras,
        "tf": tf,
        "loss_of": tf.keras.losses.MeanSquaredError(),
        "model": model,
        "optimizer": tf.keras.optimizers.SGD(0.01),
    }
    code = code.replace("end_step=750", "end_step=750, frequency=2")
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        # From a file, because `tf.function` reads the source.
        exec(compile(code, file.name, "exec"), names)
        x = np.random.default_rng(0).normal(size=(4, 28, 28, 1))
        x, y = x.astype("float32"), np.ones((4, 10), np.float32)
        before = float(names["loss_of"](y, model(x)))
        for _ in range(5):
            names["train_step"](x, y)
    assert float(names["loss_of"](y, model(x))) < before
    names["rigl"].fetch()
    assert [step for step, _ in names["rigl"].trajectory] == [0, 2, 4]


def test_what_is_supported_is_what_is_tested():
    assert support_table() in README
