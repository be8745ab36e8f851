"""Fixtures of all tests, the choice of tests, and the number of workers.

This module does not import TensorFlow, which takes seconds.
"""

import difflib
import gc
import os
import pathlib
import sys
import time

import pytest
from support import fresh as fresh_processes
from support.disk import disk  # noqa: F401 - a fixture

# XLA compiles faster by a quarter, to slower code with the same results. With
# --all, tests run the code that users get. (Workers inherit the choice.)
if "--all" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Seconds above which a test must be marked as slow.
LONGEST = 20

# Whether a test runs graphs as they were traced, without TensorFlow's rewrites.
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
        help="Kinds of models x methods x set-ups, not only each pair, and all "
        "random networks and damaged files, not only some of them.",
    )
    parser.addoption(
        "--every-kill",
        action="store_true",
        help="Runs are killed at many random moments, not only at a few.",
    )


def pytest_configure(config):
    option = config.option
    option.all |= option.every_combination or option.every_kill
    # With workers, pytest would say only that no tests ran.
    for path in asked_for(config):
        if not option.pyargs and not pathlib.Path(path).exists():
            names = pathlib.Path(__file__).parent.glob("test_*.py")
            near = difflib.get_close_matches(
                pathlib.Path(path).name, [name.name for name in names], n=1
            )
            hint = f" Did you mean {near[0]}?" if near else ""
            raise pytest.UsageError(f"There is no {path}.{hint}")


def asked_for(config):
    """Returns the paths on the command line, without what follows `::`."""
    return {argument.split("::")[0] for argument in config.args}


def pytest_xdist_auto_num_workers(config):
    """Uses no workers for one or two files, which are done sooner without."""
    paths = asked_for(config)
    if 0 < len(paths) <= 2 and all(pathlib.Path(p).is_file() for p in paths):
        return 0
    return None


@pytest.hookimpl(tryfirst=True)  # before others deselect cases
def pytest_collection_modifyitems(config, items):
    """Deselects slow tests, except those whose names were given."""
    mark_other_cases(items, some=any("[" in path for path in config.args))
    rewritten = {}  # a case of each test: one that is not slow, if there is one
    for item in sorted(items, key=is_slow):
        rewritten.setdefault(function_of(item), item)
    for item in items:
        one = rewritten[function_of(item)] is item
        item.stash[AS_TRACED] = not (config.option.all and one)
    if config.option.all:
        return
    named = {last(path) for path in config.args if "::" in path}

    def is_run(item):
        return not is_slow(item) or last(item.nodeid) in named

    config.hook.pytest_deselected(items=[i for i in items if not is_run(i)])
    items[:] = [item for item in items if is_run(item)]


def mark_other_cases(items, *, some):
    """Marks as slow the cases that `slow_but` does not name.

    With `some`, cases were asked for by name, and others may be missing.
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


def is_slow(item):
    return item.get_closest_marker("slow") is not None


def function_of(item):
    """Returns the name of a test without its parameters."""
    return item.nodeid.split("[")[0]


def last(path):
    """Returns `test_x.py::test_name` of `tests/test_x.py::test_name[...]`."""
    return path.split("[")[0].rpartition("/")[2]


def pytest_collection_finish():
    if "keras" in sys.modules:
        # Registers the small network with gin.
        import support.small_models  # noqa: F401
    # Imports leave a million objects. Without them, garbage collection is
    # faster, which saves a twentieth of the time of all tests.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def spent():
    """Returns the processor seconds of this process and its children."""
    times = os.times()
    return sum(times[:4]) + fresh_processes.spent


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Turns TensorFlow's graph rewrites on with `--all`, as for users.

    With `--all` they are on in one case of each test. They are off otherwise,
    since they take a tenth of the time or more.
    """
    if "tensorflow" in sys.modules:
        fresh_processes.run_graphs_as_traced(item.stash[AS_TRACED])


def built_kernels_since(moment):
    """Returns whether a test built the sparse kernels, as the first does."""
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

    The smaller of wall time and processor time counts. Wall time is too long
    if other programs use the machine, and processor time if threads share the
    work of a test.
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
    """Makes `product="auto"` dense, so that nothing is built or timed."""
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
        # Batch norm and dropout are Keras's; test_fast_calls.py tests ours.
        patch.setattr(fast_calls, "_LEAST_NUMBERS", float("inf"))
        yield chosen


@pytest.fixture(autouse=True, scope="session")
def one_stack():
    """Gives every operation of a graph the same stack of calls.

    TensorFlow notes for each where it was made. Stacks are deep under pytest,
    so this takes a tenth of the time where tests trace. Only errors show it.
    """
    if "tensorflow" not in sys.modules:
        yield
        return
    from tensorflow.python.util import tf_stack

    stack = tf_stack.extract_stack()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf_stack, "extract_stack", lambda stacklevel=1: stack)
        yield


@pytest.fixture(autouse=True, scope="session")
def plain_batches():
    """Makes the same batches of arrays that are not shuffled, but faster.

    Keras traces three functions for this in each `fit`, which takes longer
    than the steps of a small model.
    """
    if "keras" not in sys.modules:
        yield
        return
    import numpy as np
    import tensorflow as tf
    from keras.src.trainers.data_adapters import array_data_adapter as adapters

    in_general = adapters.ArrayDataAdapter.get_tf_dataset

    def batches(adapter):
        arrays = adapters.tree.lists_to_tuples(
            adapters.array_slicing.convert_to_sliceable(
                adapter._inputs, target_backend="tensorflow"
            )
        )
        known = [
            isinstance(leaf, (np.ndarray, tf.Tensor))
            for leaf in tf.nest.flatten(arrays)
        ]
        if adapter._shuffle or not all(known):
            return in_general(adapter)
        return (
            tf.data.Dataset.from_tensor_slices(arrays)
            .batch(
                adapter._batch_size,
                drop_remainder=not adapter._partial_batch_size,
            )
            .with_options(options)
            .prefetch(1)
        )

    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters.ArrayDataAdapter, "get_tf_dataset", batches)
        yield


@pytest.fixture(autouse=True, scope="session")
def short_measurements():
    """Measures exports for a tenth of the usual seconds."""
    if "keras" not in sys.modules:
        yield
        return
    from rigl_keras.exporting import measurement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "_SECONDS", measurement._SECONDS / 10)
        yield


@pytest.fixture
def timed_kernels(monkeypatch, untimed_kernels):
    """Gives `product="auto"` its usual meaning."""
    from rigl_keras.kernels import layer_products

    monkeypatch.setattr(layer_products, "faster_product", untimed_kernels)


@pytest.fixture
def always_sparse(monkeypatch):
    """Makes `product="auto"` sparse, though layers of tests are too small."""
    from rigl_keras.kernels import layer_products
    from rigl_keras.kernels.choice import Choice

    monkeypatch.setattr(
        layer_products, "faster_product", lambda *_, **__: Choice(True, "test")
    )


@pytest.fixture(scope="module")
def blank_figures():
    """Writes blank figures, as drawing one takes half a second."""
    import matplotlib.figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "draw", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def fresh(pytestconfig):
    """Runs commands as `python` does, in forks that have TensorFlow loaded."""
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

    TensorFlow keeps each custom gradient, and its graph, until the process
    ends. After some hundred models these take gigabytes.
    """
    yield
    if "tensorflow" not in sys.modules:
        return
    from tensorflow.python.framework.ops import gradient_registry

    gradients = gradient_registry._registry
    kept = [n for n in gradients if n.startswith("CustomGradient")]
    for name in kept:
        del gradients[name]
    if kept:
        gc.collect()


@pytest.fixture(autouse=True)
def nothing_is_built_ahead(monkeypatch):
    """Keeps tests that mask a large layer from starting a build."""
    ahead = sys.modules.get("rigl_keras.kernels.ahead")
    if ahead is not None:
        monkeypatch.setattr(ahead, "_begun", True)
