"""The code of the README and the guides runs, and the names in them exist.

`python tests/test_docs.py` prints the README's table of speeds, from the data
of the benchmarks.
"""

import csv
import json
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import keras
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
DOCS = ROOT / "docs"
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted(DOCS.glob("*.md")))]


def text_of(page):
    return (ROOT / page).read_text()


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def block_with(page, words, language="python"):
    (found,) = [b for b in blocks(page, language) if words in b]
    return found


# The names that code blocks of a page may use without defining them.


def a_model():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2), name="image"),
            keras.layers.Conv2D(8, 3, name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.ReLU(name="relu"),
            keras.layers.Conv2D(8, 3, name="conv2"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(3, name="dense"),
        ]
    )


def a_dataset():
    draw = np.random.default_rng(0)
    images = draw.standard_normal((16, 6, 6, 2)).astype(np.float32)
    targets = draw.standard_normal((16, 3)).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices((images, targets)).batch(4)


def a_compiled_model():
    model = rigl_keras.sparsify(a_model(), 0.5)
    model.compile("sgd", "mse")
    return model


WITH_CODE = [page for page in PAGES if blocks(page)]
SLOW = ("README.md", "docs/getting_started.md", "docs/serving.md")
NAMES = {
    "docs/methods.md": lambda: {"make_model": a_model},
    "docs/training.md": lambda: {
        "model": a_compiled_model(),
        "train": a_dataset(),
        "optimizer": keras.optimizers.SGD(0.01),
        "loss_of": keras.losses.MeanSquaredError(),
    },
    "docs/speed.md": lambda: {"dense": a_model()},
    "docs/serving.md": lambda: {"model": a_compiled_model()},
    "docs/several_machines.md": lambda: {
        "make_model": a_model,
        "model": a_compiled_model(),
        "train": a_dataset(),
    },
    "docs/flops.md": lambda: {"model": a_compiled_model()},
}


# `fit` warns about its default, shuffle=True, on every tf.data.Dataset.
fits = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")


@fits
@needs_kernels
@pytest.mark.slow_but(*[page for page in WITH_CODE if page not in SLOW])
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"rigl_keras": rigl_keras, "tf": tf}
    for number, code in enumerate(blocks(page)):
        names |= NAMES.get(page, dict)()
        # From a file, because `tf.function` reads the source.
        file = tmp_path / f"block{number}.py"
        file.write_text(code)
        exec(compile(code, str(file), "exec"), names)


def test_the_quickstart_prints_what_the_readme_shows(capsys, tmp_path):
    """The table in the README is the printed one."""
    code = blocks("README.md")[0].partition("loss =")[0]
    keras.utils.clear_session()  # layer names are numbered from here
    names = {}
    exec(code, names)
    shown = blocks("README.md", "text")[0]
    assert str(rigl_keras.count(names["model"])) == shown.strip()


def test_the_readme_fits_a_page():
    assert len(text_of("README.md").encode()) <= 8_000


@pytest.mark.parametrize("page", PAGES)
def test_code_that_is_not_run_can_be_read(page):
    for code in blocks(page, "py"):
        compile(code, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_exists(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page)):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_names_exists(page):
    folders = "rigl_keras|gin|bin|tests|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`", text_of(page)):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?<![\w/])((?:gin|bin)/[\w./]+)", text_of(page)):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_the_architecture_names_files():
    rows = re.findall(r"\| [^|]+\? \| (.+) \|", text_of("docs/architecture.md"))
    assert len(rows) > 10
    for path in re.findall(r"`([\w./]+)`", " ".join(rows)):
        found = [ROOT / "rigl_keras" / path, ROOT / path]
        assert any(place.exists() for place in found), path


def test_what_is_supported_is_what_is_tested():
    assert support_table() in text_of("docs/supported_models.md")


@pytest.mark.slow
def test_the_server_answers(tmp_path):
    """In a process that cannot import this package."""
    model = rigl_keras.sparsify(rigl_keras.models.wide_resnet(10, 1), 0.1)
    page = "docs/serving.md"
    call = block_with(page, "remove_dead_units")
    call = call.replace('"exported/"', repr(str(tmp_path / "exported")))
    exec(call, {"rigl_keras": rigl_keras, "model": model})
    code = block_with(page, "serve_forever", "py")
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
                time.sleep(0.2)  # the server first imports TensorFlow
    finally:
        server.kill()
        server.wait()
    np.testing.assert_allclose(
        answer["predictions"], model(images), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@needs_kernels
def test_the_sparse_saved_model_is_loaded(tmp_path):
    """The documented lines work in a process without this package."""
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
            block_with("docs/serving.md", "load_op_library", "py"),
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


@pytest.mark.parametrize("page", PAGES)
def test_tables_end_before_the_text(page):
    """Without an empty line, the next line would be a row."""
    lines = text_of(page).splitlines()
    for line, after in zip(lines, lines[1:], strict=False):
        if line.startswith("|"):
            assert after.startswith("|") or not after, after


# Tables of speeds, from the files of the benchmarks.

CASES = [
    ("wide_resnet", 1, "Serving WRN-22-2, batch 1"),
    ("wide_resnet", 128, "Serving WRN-22-2, batch 128"),
    ("resnet50", 1, "Serving ResNet-50 (32 x 32), batch 1"),
]


def rows_of(file):
    return list(csv.DictReader((DOCS / file).read_text().splitlines()))


def engine_medians():
    """Returns `{(model, batch, density, engine): milliseconds}`, ERK masks."""
    return {
        (
            row["model"],
            int(row["batch"]),
            float(row["density"]),
            row["engine"],
        ): float(row["median_ms"])
        for row in rows_of("engines/engines.csv")
        if row["distribution"] == "erdos_renyi_kernel"
    }


def speed_table():
    """Returns the README's table."""
    lines = [
        "| density 0.1, ERK masks | dense | sparse | speed-up |",
        "|---|---|---|---|",
    ]
    (step,) = [
        row
        for row in rows_of("kernels/avx512/train.csv")
        if row["side"] == "product=auto"
        and (row["model"], row["distribution"], float(row["density"]))
        == ("wide_resnet", "erdos_renyi_kernel", 0.1)
    ]
    lines.append(
        "| Training step of WRN-22-2, batch 128 "
        f"| Keras: {1e3 * float(step['dense_seconds']):.0f} ms "
        f"| {1e3 * float(step['seconds']):.0f} ms "
        f"| **{float(step['speed_up']):.1f}x** |"
    )
    medians = engine_medians()
    for model, batch, name in CASES:
        theirs, ours = (
            medians[model, batch, 0.1, engine]
            for engine in ("openvino", "native")
        )
        lines.append(
            f"| {name} | OpenVINO: {theirs:.3g} ms | {ours:.3g} ms "
            f"| **{theirs / ours:.1f}x** |"
        )
    return "\n".join(lines)


def training_table():
    """Returns the table of training steps in docs/speed.md."""
    densities = (0.05, 0.1, 0.2)
    names = {"uniform": ", uniform", "erdos_renyi_kernel": ", ERK"}
    lines = [
        "| instruction set, network, masks | dense step | "
        + " | ".join(f"{d:g}" for d in densities)
        + " |",
        "|---|---|" + "---|" * len(densities),
    ]
    for folder, network in (
        ("avx512", "AVX-512, WRN-22-2"),
        ("avx512/resnet50", "AVX-512, ResNet-50 (32 x 32)"),
        ("avx512/vision_transformer", "AVX-512, vision transformer"),
        ("avx512/lstm", "AVX-512, LSTM"),
        ("avx2", "AVX2, WRN-22-2"),
    ):
        rows = [
            row
            for row in rows_of(f"kernels/{folder}/train.csv")
            if row["side"] == "product=auto"
        ]
        for distribution, name in names.items():
            if folder == "avx512/lstm" and distribution == "uniform":
                continue  # its first layer is dense: all inputs
            found = {
                float(row["density"]): row
                for row in rows
                if row["distribution"] == distribution
            }
            dense = 1e3 * float(found[0.1]["dense_seconds"])
            ratios = (
                f"{float(found[d]['speed_up']):.1f}x" if d in found else ""
                for d in densities
            )
            lines.append(
                f"| {network}{name} | {dense:.0f} ms | "
                + " | ".join(ratios)
                + " |"
            )
    return "\n".join(lines)


def matrix_table():
    """Returns the table of a single product in docs/speed.md."""
    densities = (0.01, 0.02, 0.05, 0.1, 0.2)
    lines = [
        "| Dense, 4,096 x 4,096 | dense | "
        + " | ".join(f"{d:g}" for d in densities)
        + " |",
        "|---|---|" + "---|" * len(densities),
    ]
    rows = rows_of("kernels/avx512/dense/kernels.csv")
    for side in ("forward", "forward + backward"):
        found = {float(r["density"]): r for r in rows if r["side"] == side}
        dense = 1e3 * float(found[0.1]["dense_seconds"])
        ratios = (f"{float(found[d]['speed_up']):.1f}x" for d in densities)
        lines.append(f"| {side} | {dense:.1f} ms | {' | '.join(ratios)} |")
    return "\n".join(lines)


def speed_up(rows, side, density):
    """Returns that of all layers together."""
    found = [
        row
        for row in rows
        if (row["side"], float(row["density"])) == (side, density)
    ]
    dense, sparse = (
        sum(float(row[column]) for row in found)
        for column in ("dense_seconds", "seconds")
    )
    return f"{dense / sparse:.1f}x"


def struct_table():
    """Returns the table of whole kernels in docs/results.md."""
    lines = [
        "| density | single weights | whole kernels |",
        "|---|---|---|",
    ]
    rows, side = rows_of("kernels/struct/kernels.csv"), "forward + backward"
    for density in (0.1, 0.2):
        cells = (speed_up(rows, s, density) for s in (side, f"{side}, kernel"))
        lines.append(f"| {density:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pattern_table():
    """Returns the table of patterns in docs/patterns.md."""
    lines = [
        "| granularity | forward | forward and backward |",
        "|---|---|---|",
    ]
    rows = rows_of("kernels/patterns/kernels.csv")
    for name in ("element", "kernel", "4x16", "fan_in"):
        cells = (
            speed_up(
                rows, side if name == "element" else f"{side}, {name}", 0.1
            )
            for side in ("forward", "forward + backward")
        )
        lines.append(f'| `"{name}"` | {" | ".join(cells)} |')
    return "\n".join(lines)


NETWORKS = {
    "wide_resnet": "WRN-22-2",
    "resnet50": "ResNet-50 (32 x 32)",
    "mobilenet_v2": "MobileNetV2 (224 x 224)",
}


def serving_table():
    """Returns the table of engines in docs/serving.md."""
    densities = (0.05, 0.1, 0.2)
    lines = [
        "| network, batch | "
        + " | ".join(f"density {d:g}" for d in densities)
        + " |",
        "|---|" + "---|" * len(densities),
    ]
    medians = engine_medians()
    for model, name in NETWORKS.items():
        for batch in (1, 16, 128):
            cells = []
            for density in densities:
                ours, *theirs = (
                    medians[model, batch, density, engine]
                    for engine in ("native", "openvino", "deepsparse")
                )
                ratios = (f"{each / ours:.2f}x" for each in theirs)
                cells.append(", ".join([f"{ours:.3g} ms", *ratios]))
            lines.append(f"| {name}, {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "README.md": [speed_table],
    "docs/serving.md": [serving_table],
    "docs/speed.md": [training_table, matrix_table],
    "docs/patterns.md": [pattern_table],
    "docs/results.md": [struct_table],
}


@pytest.mark.parametrize("page", TABLES)
def test_speeds_are_those_of_the_data(page):
    for table in TABLES[page]:
        assert table() in text_of(page)


def test_every_method_of_the_table():
    table = text_of("README.md")
    table = table[table.index("| method |") :].split("\n\n")[0]
    calls = re.findall(r"`([\w.]+\(.*?\))`", table)
    assert len(calls) >= 18
    names = {**vars(rigl_keras), "model": None, "masks": {}}
    for call in calls:
        if call.startswith(("one_shot", "with_masks", "sparsify")):
            assert callable(eval(call.partition("(")[0], names))
        else:
            assert isinstance(eval(call, names), rigl_keras.StepUpdate)


@fits
def test_adding_a_method_takes_ten_lines():
    code = block_with("docs/methods.md", "class GradientTimesWeight(")
    assert len(code.strip().splitlines()) <= 10
    names = {"rigl_keras": rigl_keras}
    exec(code, names)
    model = a_compiled_model()
    before = [m.mask.numpy() for m in rigl_keras.masked_layers(model)]
    method = names["GradientTimesWeight"](frequency=2, decay="constant")
    model.fit(a_dataset(), epochs=2, callbacks=[method], verbose=0)
    after = [m.mask.numpy() for m in rigl_keras.masked_layers(model)]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    for a, b in zip(before, after, strict=True):
        assert a.sum() == b.sum()


if __name__ == "__main__":
    for page, tables in TABLES.items():
        for table in tables:
            print(f"{page}\n{table()}\n")
