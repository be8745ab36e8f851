"""What every test is run with, which tests are run, and by how many workers.

Nothing here imports TensorFlow, which takes seconds, before a test module does.
"""

import gc
import os
import pathlib
import sys
import time

import pytest
from support import fresh as fresh_processes
from support.disk import disk  # noqa: F401 - a fixture

# XLA compiles a quarter sooner: its code is slower, and computes the same. All
# tests together see the code that users get. (Workers inherit the choice.)
if "--all" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Seconds of this process and of those it started, above which a test must be
# marked as slow.
LONGEST = 20

# Whether a test runs its graphs as they were traced.
AS_TRACED = pytest.StashKey[bool]()


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="Tests that are marked as slow, too.",
    )
    parser.addoption(
        "--every-combination",
        action="store_true",
        help="Kinds of models x methods x set-ups, not only each pair.",
    )
    parser.addoption(
        "--every-kill",
        action="store_true",
        help="Runs are killed at many random moments, not only at a few.",
    )


def pytest_configure(config):
    option = config.option
    option.all |= option.every_combination or option.every_kill


def asked_for(config):
    """Returns the paths on the command line, without what follows `::`."""
    return {argument.split("::")[0] for argument in config.args}


def pytest_xdist_auto_num_workers(config):
    """One or two files are done before workers have started."""
    paths = asked_for(config)
    if 0 < len(paths) <= 2 and all(pathlib.Path(p).is_file() for p in paths):
        return 0
    return None


@pytest.hookimpl(tryfirst=True)  # all cases are still there
def pytest_collection_modifyitems(config, items):
    """Leaves slow tests out, except those whose names were given."""
    mark_other_cases(items, some=any("[" in path for path in config.args))
    shown = {function_of(i) for i in items if not i.get_closest_marker("slow")}
    for item in items:
        is_slow = item.get_closest_marker("slow")
        another_case = is_slow and function_of(item) in shown
        item.stash[AS_TRACED] = bool(not config.option.all or another_case)
    if config.option.all:
        return
    named = {last(path) for path in config.args if "::" in path}

    def is_run(item):
        return not item.get_closest_marker("slow") or last(item.nodeid) in named

    config.hook.pytest_deselected(items=[i for i in items if not is_run(i)])
    items[:] = [item for item in items if is_run(item)]


def mark_other_cases(items, *, some):
    """Marks as slow what `slow_but` does not name.

    Where `some` cases were asked for by name, others may be missing.
    """
    kept, found = {}, {}
    for item in items:
        mark = item.get_closest_marker("slow_but")
        if mark is not None:
            function, case = function_of(item), item.callspec.id
            kept[function] = set(mark.args)
            found.setdefault(function, set()).add(case)
            if case not in mark.args:
                item.add_marker("slow")
    for function, cases in found.items():
        if len(cases) > 1 and not some and not kept[function] <= cases:
            missing = sorted(kept[function] - cases)
            raise pytest.UsageError(f"{function} has no cases {missing}.")


def function_of(item):
    """Returns the name of a test without that of its case."""
    return item.nodeid.split("[")[0]


def last(path):
    """Returns `test_x.py::test_name` of `tests/test_x.py::test_name[...]`."""
    return path.split("[")[0].rpartition("/")[2]


def pytest_collection_finish():
    if "keras" in sys.modules:
        # It has gin know the small network by its name.
        import support.small_models  # noqa: F401
    # A million objects of what has been imported stay: no collection of garbage
    # need look at them again. A twentieth of the time of all tests.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def spent():
    """Returns seconds of processors: this process, and those it started."""
    times = os.times()
    return sum(times[:4]) + fresh_processes.spent


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """TensorFlow rewrites graphs, as it does for users, in all tests together.

    Alone it does not, nor in cases that `--all` adds to those of a test: that
    takes a tenth of their time, or more.
    """
    if "tensorflow" in sys.modules:
        fresh_processes.run_graphs_as_traced(item.stash[AS_TRACED])


def built_kernels_since(moment):
    """Returns whether a test had to wait for the sparse kernels: the first."""
    library = sys.modules.get("rigl_keras.kernels.library")
    if library is None:
        return False
    try:
        return library.path().stat().st_mtime > moment
    except (OSError, library.BuildError):
        return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a test that takes longer than `LONGEST` and is not marked as slow.

    What counts is the lesser of two clocks. That of the wall says too much
    where others use the machine; that of processors, where threads share a
    test, and where it waits, too little.
    """
    began, wall, processors = time.time(), time.monotonic(), spent()
    result = yield
    took = min(time.monotonic() - wall, spent() - processors)
    slow = item.get_closest_marker("slow") or built_kernels_since(began)
    if took > LONGEST and not slow:
        pytest.fail(
            f"The test took {took:.0f} s, and every one above {LONGEST} s must "
            "be marked with @pytest.mark.slow, or be made faster."
        )
    return result


@pytest.fixture(autouse=True, scope="session")
def untimed_kernels():
    """`product="auto"` is dense, and nothing is built, loaded or timed."""
    if "keras" not in sys.modules:
        yield
        return
    from rigl_keras.kernels import fast_calls, layer_products
    from rigl_keras.kernels.choice import Choice

    def never(*_, backward=True, in_lanes=False, projected=False):
        return Choice(False, "tests")

    chosen = layer_products.faster_product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_products, "faster_product", never)
        # Batch norm and dropout are Keras's; test_fast_calls.py has the others.
        patch.setattr(fast_calls, "_LEAST_NUMBERS", float("inf"))
        yield chosen


@pytest.fixture(autouse=True, scope="session")
def short_measurements():
    """An export is measured for a tenth of the seconds that it may take."""
    if "keras" not in sys.modules:
        yield
        return
    from rigl_keras.exporting import measurement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "_SECONDS", measurement._SECONDS / 10)
        yield


@pytest.fixture
def timed_kernels(monkeypatch, untimed_kernels):
    """`product="auto"` is what it is outside tests."""
    from rigl_keras.kernels import layer_products

    monkeypatch.setattr(layer_products, "faster_product", untimed_kernels)


@pytest.fixture
def always_sparse(monkeypatch):
    """`product="auto"` is sparse: layers of tests are too small to win."""
    from rigl_keras.kernels import layer_products
    from rigl_keras.kernels.choice import Choice

    monkeypatch.setattr(
        layer_products, "faster_product", lambda *_, **__: Choice(True, "test")
    )


@pytest.fixture(scope="module")
def blank_figures():
    """Figures are written, and blank: to draw one takes half a second."""
    import matplotlib.figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "draw", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def fresh(pytestconfig):
    """Runs commands as `python` does, in processes that know TensorFlow."""
    server = fresh_processes.Server(
        graphs_as_traced=not pytestconfig.option.all
    )
    yield server
    server.close()


@pytest.fixture(autouse=True)
def seeded():
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def no_graphs_left():
    """Frees the graphs of a module's models once its tests are done.

    TensorFlow registers each custom gradient of a graph for as long as the
    process lives, and the graph with it: gigabytes after some hundred models.
    """
    yield
    if "tensorflow" not in sys.modules:
        return
    from tensorflow.python.framework.ops import gradient_registry

    gradients = gradient_registry._registry
    for name in [n for n in gradients if n.startswith("CustomGradient")]:
        del gradients[name]
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_is_built_ahead(monkeypatch):
    """By tests that happen to mask a large layer."""
    ahead = sys.modules.get("rigl_keras.kernels.ahead")
    if ahead is not None:
        monkeypatch.setattr(ahead, "_begun", True)
