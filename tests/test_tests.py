"""The tests themselves: their imports, their choice and their times."""

import ast
import pathlib
import time
import types

import conftest
import pytest

TESTS = pathlib.Path(__file__).parent


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_test_modules_import_no_test_modules():
    """Shared code is in tests/support."""
    for path in TESTS.rglob("*.py"):
        names = [n for n in imported(path) if n.startswith("test_")]
        assert not names, f"{path.name} imports {names}."


@pytest.mark.parametrize("slow", [False, True])
def test_what_takes_long_is_marked(slow, monkeypatch):
    item = types.SimpleNamespace(get_closest_marker=lambda name: slow)

    def run(task):
        with monkeypatch.context() as patch:  # not for this test
            patch.setattr(conftest, "LONGEST", 0.1)
            call = conftest.pytest_runtest_call(item)
            next(call)
            task()
            with pytest.raises(StopIteration):
                call.send(None)

    def work():
        start = time.process_time()
        while time.process_time() < start + 0.3:
            pass

    run(lambda: time.sleep(0.3))  # as on a busy machine
    if slow:
        run(work)
    else:
        with pytest.raises(pytest.fail.Exception, match="mark.slow"):
            run(work)


def test_few_files_need_no_workers():
    def workers(*paths):
        config = types.SimpleNamespace(args=list(map(str, paths)))
        return conftest.pytest_xdist_auto_num_workers(config)

    here, other = TESTS / "test_tests.py", TESTS / "test_topology.py"
    assert workers(here) == workers(f"{here}::test_x[a]", here, other) == 0
    # None means as many as processors.
    assert workers(TESTS) is workers() is None
    assert workers(here, other, TESTS / "test_scores.py") is None


class Item:
    """A test, or a case of one."""

    def __init__(self, nodeid, *marks):
        self.nodeid, self.marks = nodeid, {m.name: m for m in marks}
        case = nodeid.partition("[")[2].removesuffix("]")
        self.callspec = types.SimpleNamespace(id=case)
        self.stash = pytest.Stash()

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, name):
        self.marks[name] = getattr(pytest.mark, name).mark


@pytest.mark.parametrize(
    "every, args, want",
    [
        (False, ["tests"], "fast case[a]"),
        (True, ["tests"], "fast slow case[a] case[b]"),
        (False, ["tests/test_x.py::slow"], "fast slow case[a]"),
        (False, ["tests/test_x.py::case[b]"], "fast case[a] case[b]"),
    ],
)
def test_slow_tests_are_left_out(every, args, want):
    but = pytest.mark.slow_but("a").mark
    items = [
        Item("tests/test_x.py::fast"),
        Item("tests/test_x.py::slow", pytest.mark.slow.mark),
        *(Item(f"tests/test_x.py::case[{case}]", but) for case in "ab"),
    ]
    left = []
    config = types.SimpleNamespace(
        option=types.SimpleNamespace(all=every),
        args=args,
        hook=types.SimpleNamespace(
            pytest_deselected=lambda items: left.extend(items)
        ),
    )
    conftest.pytest_collection_modifyitems(config, items)
    assert [i.nodeid.partition("::")[2] for i in items] == want.split()
    assert len(items) + len(left) == 4
    # With --all, one case of each test has rewritten graphs.
    as_traced = [i.stash[conftest.AS_TRACED] for i in items]
    assert as_traced == ([False] * 3 + [True] if every else [True] * len(items))


def test_cases_that_are_not_there_are_refused():
    but = pytest.mark.slow_but("a", "c").mark
    items = [Item(f"tests/test_x.py::case[{case}]", but) for case in "ab"]
    with pytest.raises(pytest.UsageError, match=r"no cases \['c'\]"):
        conftest.mark_other_cases(items, some=False)
    # If cases are given by name, others may be missing.
    conftest.mark_other_cases(items, some=True)
