"""Folders of exports: replaced, damaged, left by a kill, and on a full disk."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from support.small_models import small_model

import rigl_keras
from rigl_keras import _files
from rigl_keras.exporting.export import export
from rigl_keras.exporting.export_report import check_export
from rigl_keras.exporting.formats import FORMATS

NEED_KERNELS = ("sparse_saved_model", "native")


def test_overwriting(tmp_path):
    model = rigl_keras.sparsify(small_model(), 0.2)
    target = tmp_path / "exported"
    export(model, target, measure=False)
    with pytest.raises(ValueError, match="overwrite=True"):
        export(model, target, measure=False)
    old = (target / "export.json").read_text()
    # An error changes nothing.
    with pytest.raises(ValueError, match="disagrees"):
        export(
            model,
            target,
            format="tflite",
            quantization="float16",
            tolerance=1e-12,
            overwrite=True,
            measure=False,
        )
    assert (target / "export.json").read_text() == old
    check_export(target)
    export(model, target, format="keras", overwrite=True, measure=False)
    assert check_export(target).format == "keras"
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]
    # Foreign files in an export are not removed either.
    (target / "notes.txt").write_text("Mine")
    with pytest.raises(ValueError, match="holds something else: notes.txt"):
        export(model, target, overwrite=True)
    # A folder that is not an export is never replaced.
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("All of it")
    with pytest.raises(ValueError, match="something else: chapter.tex"):
        export(model, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


@pytest.mark.parametrize("which", [0, 1])
def test_interrupted_between_the_last_steps(which, tmp_path, monkeypatch):
    """The old folder is moved away, and the new one takes its name."""
    target = tmp_path / "exported"
    target.mkdir()
    (target / "old").write_text("")
    rename, renamed = pathlib.Path.rename, []

    def interrupted(path, to):
        renamed.append(path)
        if len(renamed) == which + 1:
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(pathlib.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with _files.set_aside(target, replace=True) as folder:
            (folder / "new").write_text("")
    assert [p.name for p in target.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]


@pytest.mark.slow
def test_killed_between_the_last_steps(tmp_path):
    target = tmp_path / "exported"
    target.mkdir()
    (target / "old").write_text("")
    code = (
        "import os, sys, pathlib; from rigl_keras import _files\n"
        "pathlib.Path.rename = lambda path, to: (os.rename(path, to),\n"
        "    os.kill(os.getpid(), 9))\n"
        "with _files.set_aside(pathlib.Path(sys.argv[1]), replace=True):\n"
        "    pass"
    )
    done = subprocess.run([sys.executable, "-c", code, target])
    assert done.returncode == -9 and not target.exists()
    # The next export first restores the old one.
    with pytest.raises(RuntimeError):
        with _files.set_aside(target, replace=True):
            raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]


@pytest.mark.slow
def test_from_within_the_folder(tmp_path, monkeypatch):
    model = rigl_keras.sparsify(small_model(), 0.2)
    export(model, tmp_path / "exported", measure=False)
    monkeypatch.chdir(tmp_path / "exported")
    export(model, "../exported", measure=False, overwrite=True)
    check_export(tmp_path / "exported")
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "exported"
    with pytest.raises(ValueError, match="has appeared in the meantime"):
        with _files.set_aside(target):
            target.mkdir()
            (target / "file").write_text("")
    assert [p.name for p in target.iterdir()] == ["file"]


def test_damaged(tmp_path):
    model = rigl_keras.sparsify(small_model(), 0.2)
    export(model, tmp_path / "exported", measure=False)

    def damaged(change):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "exported", folder)
        check_export(folder)
        change(folder)
        with pytest.raises(ValueError) as caught:
            check_export(folder)
        return str(caught.value)

    def cut(folder):
        with (folder / "saved_model.pb").open("r+b") as file:
            file.truncate(1000)

    def flip(folder):
        file = next((folder / "variables").glob("*.data*"))
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)

    def foreign(folder):
        (folder / "export.json").write_text('{"files": {}}')

    def changed(**values):
        def change(folder):
            content = json.loads((folder / "export.json").read_text())
            (folder / "export.json").write_text(
                json.dumps({**content, **values})
            )

        return change

    assert "saved_model.pb has changed" in damaged(cut)
    assert "data-00000-of-00001 has changed" in damaged(flip)
    assert "fingerprint.pb is missing" in damaged(
        lambda folder: (folder / "fingerprint.pb").unlink()
    )
    assert "extra is not part" in damaged(
        lambda folder: (folder / "extra").write_text("")
    )
    assert "not an export's report" in damaged(foreign)
    assert "is damaged" in damaged(
        lambda folder: (folder / "export.json").write_text("{")
    )
    assert "is damaged" in damaged(changed(files=[]))
    assert "is damaged" in damaged(changed(files=None))
    assert "is damaged" in damaged(changed(density="x"))
    with pytest.raises(ValueError, match="path must be"):
        check_export(None)
    assert "is not an export" in damaged(
        lambda folder: (folder / "export.json").unlink()
    )


def test_where_nothing_can_be_written(tmp_path):
    model = rigl_keras.sparsify(small_model(), 0.2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        export(model, tmp_path / "file" / "exported")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.slow
def test_what_a_killed_export_has_left_goes(tmp_path):
    model = rigl_keras.sparsify(small_model(), 0.2)
    code = (
        "import os, sys, pathlib; from rigl_keras import _files\n"
        "with _files.set_aside(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('written')\n"
        "    os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "exported"
    done = subprocess.run([sys.executable, "-c", code, target])
    assert done.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1 and not target.exists()
    export(model, target, measure=False)
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]


FILL = """
import json, pathlib, sys
import rigl_keras
from rigl_keras.exporting.formats import FORMATS
from support.small_models import small_model
model = rigl_keras.sparsify(small_model(), 0.2)
disk, ends = pathlib.Path(sys.argv[1]), {}
needy = "sparse_saved_model", "native"
for format in FORMATS:
    if format in needy and rigl_keras.kernels.load() is None:
        continue
    try:
        rigl_keras.export(
            model, disk / "new" / format, format=format, measure=False
        )
    except Exception as error:
        ends[format] = type(error).__name__, str(error)
    assert not list(disk.iterdir()), list(disk.rglob("*"))
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    small = f"mount -t tmpfs -o size=4k none {disk}"
    mount = ["unshare", "-rm", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*mount, small], capture_output=True).returncode
    ):
        pytest.skip("No small file system may be mounted here.")
    done = subprocess.run(
        [*mount, f'{small} && exec "$@"', "", sys.executable, "-c", FILL, disk],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = json.loads(done.stdout.splitlines()[-1])
    without = set(NEED_KERNELS)
    if rigl_keras.kernels.load() is not None:
        without = set()
    assert set(ends) == set(FORMATS) - without
    for format, (kind, said) in ends.items():
        assert kind == "DiskFullError", (format, said)
        assert said.startswith("The disk is full") and format in said
        assert "Nothing was written" in said
