"""Files are whole or missing, even after a power failure; and locks."""

import ast
import errno
import os
import pathlib
import platform
import subprocess
import sys
import threading
import time

import pytest
from absl import app
from support.disk import check_kept

import rigl_keras
from rigl_keras import _files
from rigl_keras.experiments import exits

PACKAGE = pathlib.Path(rigl_keras.__file__).parent


def test_a_power_cut(tmp_path, disk):
    _files.write(tmp_path / "text", "more")
    assert (tmp_path / "text").read_text() == "more"
    with _files.whole(tmp_path / "model.keras") as unfinished:
        assert unfinished.name == "model.keras"
        unfinished.write_bytes(b"bytes")
    assert (tmp_path / "model.keras").read_bytes() == b"bytes"
    check_kept(disk, moves=2)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_power_cut_while_a_folder_is_exchanged(tmp_path, disk):
    target = tmp_path / "exported"
    for text in ("old", "new"):
        with _files.set_aside(target, replace=True) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "file").write_text(text)
            inodes = [p.stat().st_ino for p in (folder, *folder.rglob("*"))]
        assert (target / "inner" / "file").read_text() == text
        assert {("sync", inode) for inode in inodes} <= set(disk)
        check_kept(disk, moves=1 if text == "old" else 3)


def test_there_is_one_writer():
    """Only `_files` moves files, as it also syncs them."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", None)
            # `str.replace` takes two, and `dataclasses.replace` keywords.
            moves = name == "rename" or (
                name == "replace" and len(node.args) + len(node.keywords) == 1
            )
            if moves:
                assert path.name == "_files.py", f"{path}:{node.lineno}"


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError):
        with _files.whole(tmp_path / "file") as unfinished:
            unfinished.write_text("half")
            raise KeyError
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_threads_write_at_once(tmp_path):
    inside, texts = threading.Barrier(4), []

    def write(number):
        with _files.whole(tmp_path / "file") as unfinished:
            unfinished.write_text(str(number))
            inside.wait()
        texts.append((tmp_path / "file").read_text())

    threads = [threading.Thread(target=write, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 4 and set(texts) <= set("0123")
    assert len(list(tmp_path.iterdir())) == 1


def test_what_killed_processes_leave_goes(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    node = platform.node()
    left = {
        f"{_files.UNFINISHED}{node}-{gone.pid}": False,
        f"{_files.UNFINISHED}{node}-{gone.pid}-2": False,
        f"{_files.UNFINISHED}{node}-{os.getppid()}": True,  # running
        f"{_files.UNFINISHED}another-machine-{gone.pid}": True,
        f"{_files.UNFINISHED}{node}-text": True,
    }
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    _files.write(tmp_path / "file", "")
    assert {p.name for p in tmp_path.iterdir()} == {
        "file",
        *(name for name, stays in left.items() if stays),
    }


def test_locks(tmp_path):
    path = tmp_path / "lock"
    with _files.lock(path) as first:
        assert first is not None
        for shared in (False, True):
            with _files.lock(path, shared=shared, wait=False) as second:
                assert second is None
    with (
        _files.lock(path, shared=True) as first,
        _files.lock(path, shared=True) as second,
    ):
        assert first is not None and second is not None
        with _files.lock(path, wait=False) as third:
            assert third is None


def test_a_look_at_a_lock_refuses_it_to_nobody(tmp_path):
    """`is_locked` holds the lock for an instant, as `--status` does."""
    path, over = tmp_path / "lock", threading.Event()
    path.touch()

    def look():
        while not over.is_set():
            _files.is_locked(path)
            time.sleep(0.001)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(300):
            with _files.lock(path, wait=False) as held:
                assert held is not None
    finally:
        over.set()
        looking.join()


def test_a_lock_is_of_the_file_that_is_there(tmp_path):
    """Waiting for the lock of a removed file ends with one on a new file."""
    path = tmp_path / "lock"
    got = []

    def wait():
        with _files.lock(path) as descriptor:
            got.append(os.fstat(descriptor).st_ino == path.stat().st_ino)

    with _files.lock(path) as descriptor:
        waiting = threading.Thread(target=wait)
        waiting.start()
        inode = os.fstat(descriptor).st_ino
        until = time.monotonic() + 60
        while inode_waits(inode) < 1:
            assert time.monotonic() < until
            time.sleep(0.001)
        path.unlink()
    waiting.join()
    assert got == [True] and path.exists()


def inode_waits(inode):
    """Returns the number of processes that wait for a file's lock."""
    if not os.path.exists("/proc/locks"):
        pytest.skip("there is no list of locks")
    lines = pathlib.Path("/proc/locks").read_text().splitlines()
    return sum("->" in s and s.split()[6].endswith(f":{inode}") for s in lines)


def test_a_group_that_shares_a_folder(tmp_path):
    before = os.umask(0o002)
    try:
        with _files.lock(tmp_path / "lock"):
            pass
        _files.write(tmp_path / "file", "")
    finally:
        os.umask(before)
    for name in ("lock", "file"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o664


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(errno.ENOSPC, FULL, "/a/b"), f"'/a/b' is full ({FULL})"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota"),
        (RuntimeError(f"HDF5 says at length: {FULL} (28)"), "The disk is full"),
        (
            _files.DiskFullError("/a/b", FULL, "Make room."),
            f"The disk is full: '/a/b' could not be written ({FULL}). Make",
        ),
        (PermissionError(errno.EACCES, "no", "/a"), "'/a' cannot be used"),
        (OSError(errno.EROFS, "no"), "Read-only file system"),
    ],
)
def test_a_command_ends_with_a_line(error, says, capsys):
    def run(argv):
        print("so far")
        raise error

    with pytest.raises(SystemExit) as end:
        exits.one_line("train", run)(["train"])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "so far\n"
    assert err.startswith("train: ") and says in err and err.count("\n") == 1


def test_what_is_no_disk_is_raised():
    def run(argv):
        raise RuntimeError("a graph is wrong")

    with pytest.raises(RuntimeError, match="a graph is wrong"):
        exits.one_line("train", run)([])

    def asked(argv):
        raise OSError(errno.ENOSPC, FULL)

    with pytest.raises(OSError, match=FULL):
        exits.one_line("train", asked, traceback=lambda: True)([])


def test_a_full_disk_at_the_end_of_what_is_printed(capsys, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            exits.one_line("report", lambda argv: print("a page"))([])
        assert end.value.code == 2
        full.flush()  # as Python does at its end
    line = capsys.readouterr().err
    assert (
        line == f"report: The disk is full ({FULL}). Make room and try again.\n"
    )


def test_every_command_ends_so():
    """Only `exits` calls absl's `run`, and it runs all commands."""
    commands = []
    for path in (PACKAGE / "experiments").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called != "app.run" or path.stem == "exits", path
            assert called != "exits.one_line", path
            if called == "exits.run_command":
                commands.append(ast.unparse(node.args[0]))
    assert sorted(commands) == [
        "'benchmark'",
        "'benchmark_inference'",
        "'export'",
        "'report'",
        "'reproduce'",
        "'train'",
        "'tune'",
        "f'benchmark {named}'",
    ]


class OfData(OSError):
    pass


@pytest.mark.parametrize(
    "error, status, says",
    [
        (ValueError("one\ntwo"), 2, "tune: one\ntwo\n"),
        (ValueError("a \x1b[31m"), 2, "tune: a \\x1b[31m\n"),
        (ValueError(), 2, "tune: ValueError\n"),
        (OfData("no network"), 2, "tune: no network\n"),
        (exits.FailedError("no kernels"), 1, "tune: no kernels\n"),
        (app.UsageError("pass one"), 2, "tune: pass one\n"),
        (
            KeyboardInterrupt(),
            130,
            "\ntune: interrupted; continue with: bin/tune 'a b' --on\n",
        ),
        (
            ValueError("wrong\n  In call to configurable 'x'\nby far"),
            2,
            "tune: wrong\nby far\n",
        ),
    ],
)
def test_what_users_can_mend(error, status, says, capsys, monkeypatch):
    def run(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["tune_command.py", "a b"])
    with pytest.raises(SystemExit) as end:
        exits.one_line(
            "tune", run, interrupted="continue with", added=["--on"]
        )([])
    assert end.value.code == status and capsys.readouterr().err == says


def test_a_file_that_outgrows_its_limit(tmp_path):
    """The system reports this like a disk that is full within a file."""
    import resource

    path = tmp_path / "file"
    _files.write(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(_files.DiskFullError, match="file' could not be"):
            with _files.naming(path, advice="Make room."):
                _files.write(path, bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_no_folder_is_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        _files.write(tmp_path / "no" / "file", "")
    assert list(tmp_path.iterdir()) == []
