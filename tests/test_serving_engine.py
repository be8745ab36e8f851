"""Networks on the C++ engine, compared with NumPy in float64."""

import os
import subprocess
import sys

import numpy as np
import pytest

from rigl_keras.serving.network import (
    Activation,
    Cell,
    Network,
    Node,
    Operation,
    Output,
    Padding,
)
from rigl_keras.serving.network_file import to_bytes
from tests.support.engine_checks import (
    IMAGES,
    WAYS,
    a_network,
    check,
    computed_network,
    first,
    load,
)
from tests.support.network_library import (
    KINDS,
    built,  # noqa: F401 - a fixture
    common_folder,
    kind_of_code,
    loaded,
    outputs_begin_as_nan,
    sanitized_library,
)
from tests.support.network_reference import evaluate
from tests.support.networks_of_nodes import random_inputs, random_network
from tests.support.threads import in_threads

BATCHES = (1, 3, 16, 33, 130)
THREADS = (1, 2, 5)
SIZES = ((7, 9), (1, 1), (20, 3), (5, 18))
SIDE_BY_SIDE = ("groups", "together")  # of `WAYS`
SANITIZED = os.environ.get("RIGL_KERAS_KERNELS") in ("address", "thread")


@pytest.fixture(autouse=True)
def outputs_of_no_numbers(monkeypatch):
    outputs_begin_as_nan(monkeypatch)


def check_network_of(seed, kinds=KINDS, batches=BATCHES):
    """Runs a random network on all kinds of code, batches and threads."""
    network = random_network(seed)
    inputs = random_inputs(network, IMAGES)
    expected = evaluate(network, inputs)
    for i, kind in enumerate(kinds):
        threads = THREADS[(seed + i) % len(THREADS)]
        with kind_of_code(kind) as name:
            with load(network, threads=threads) as engine:
                if engine.instruction_set != name:
                    continue  # not supported by this processor
                for batch in batches:
                    check(
                        engine(**first(inputs, batch)),
                        first(expected, batch),
                        (seed, kind, threads, batch),
                    )


# Fewer under a sanitizer, which is slow.
@pytest.mark.parametrize("seed", range(0, 30, 3 if SANITIZED else 1))
def test_a_random_network(seed):
    check_network_of(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 700, 50))
def test_more_random_networks(seed, pytestconfig):
    """With batches as above; the one of 130 takes most of the time."""
    every = pytestconfig.getoption("every_combination")
    for more in range(50 if every else 10):
        check_network_of(seed + more, batches=BATCHES[:-1])


def check_sizes_of(seed):
    """Checks a random network on several sizes of inputs, each twice."""
    network = random_network(seed, sizes=SIZES)
    cases = []
    for at in (0, 1, 2, 0, 3):
        inputs = random_inputs(network, 18, size=SIZES[at])
        cases.append((inputs, evaluate(network, inputs)))
    for kind in KINDS:
        with kind_of_code(kind):
            with load(network, threads=1 + seed % 3) as engine:
                for inputs, expected in cases:
                    check(engine(**inputs), expected, (seed, kind))
                    check(
                        engine(**first(inputs, 1)),
                        first(expected, 1),
                        (seed, kind),
                    )


@pytest.mark.parametrize("seed", range(6))
def test_inputs_of_any_size(seed):
    check_sizes_of(seed)


@pytest.mark.parametrize(
    "padding", [Padding(same=True), Padding(), Padding(False, 1, 0, 3, 2)]
)
def test_depthwise_convolutions_of_every_other_column(padding):
    """Images that end anywhere within a vector."""
    draw = np.random.default_rng(0)
    kernel = draw.standard_normal((3, 3, 1, 5)).astype(np.float32)
    for columns in (3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 67):
        for row_stride in (1, 2):
            nodes = (
                Node(Operation.INPUT, "x", shape=(6, columns, 5)),
                Node(
                    Operation.CONVOLUTION,
                    "y",
                    (0,),
                    groups=5,
                    kernel=kernel,
                    strides=(row_stride, 2),
                    padding=padding,
                ),
            )
            network = Network(nodes, (Output("y", 1),))
            inputs = random_inputs(network, 3)
            expected = evaluate(network, inputs)
            with load(network) as engine:
                for batch in (1, 3):
                    found = engine(**first(inputs, batch))
                    check(found, first(expected, batch), columns)


@pytest.mark.slow
def test_more_inputs_of_any_size(pytestconfig):
    every = pytestconfig.getoption("every_combination")
    for seed in range(100, 160 if every else 120):
        check_sizes_of(seed)


def test_random_networks_have_all_operations():
    """The random networks above have all operations and variants."""
    nodes = [node for seed in range(30) for node in random_network(seed).nodes]
    assert {node.operation for node in nodes} == set(Operation)
    of = {
        operation: [n for n in nodes if n.operation == operation]
        for operation in Operation
    }
    convolutions = of[Operation.CONVOLUTION]
    assert {n.strides[0] for n in convolutions} == {1, 2, 3}
    assert {n.dilations[1] for n in convolutions} == {1, 2, 3}
    assert {n.padding.same for n in convolutions} == {True, False}
    assert any(not n.kernel.any() for n in convolutions)
    assert any(n.kernel.all() for n in convolutions)
    assert any(n.groups == 2 for n in convolutions)
    assert any(n.groups > 2 and n.kernel.shape[2] == 1 for n in convolutions)
    assert {n.activation for n in of[Operation.ACTIVATION]} == set(Activation)
    loops = of[Operation.RECURRENT]
    assert {(n.cell, n.sequences) for n in loops} == {
        (cell, sequences) for cell in Cell for sequences in (0, 1)
    }
    assert {(n.backwards, n.reversed) for n in loops} == {
        (backwards, reversed) for backwards in (0, 1) for reversed in (0, 1)
    }
    assert {len(n.bias) > 0 for n in loops if n.cell == Cell.GRU} == {0, 1}
    pools = of[Operation.POOL]
    assert {(n.maximum, n.padding.same) for n in pools} == {
        (maximum, same) for maximum in (0, 1) for same in (0, 1)
    }
    assert any(
        len(set(n.inputs)) < len(n.inputs) for n in of[Operation.CONCATENATE]
    )


@pytest.fixture(scope="module")
def case():
    return computed_network()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_threads_change_no_bit(case, way, kind):
    """Neither threads nor other images of a batch change results."""
    network, inputs, expected = case
    batches = BATCHES if way in SIDE_BY_SIDE else (1, 3, 8)
    if way not in SIDE_BY_SIDE:
        inputs, expected = (first(arrays, 8) for arrays in (inputs, expected))
    with kind_of_code(kind) as name:
        before = None
        for threads in THREADS:
            hints = f"{name} costs {threads} {WAYS[way]}\n"
            with load(network, threads=threads, hints=hints) as engine:
                if engine.instruction_set != name:
                    pytest.skip(f"this processor has no {name}")
                found = engine(**inputs)
                check(found, expected)
                before = before or found
                for batch in batches:
                    same = first(before, batch)
                    for output, value in engine(**first(inputs, batch)).items():
                        np.testing.assert_array_equal(value, same[output])


def loops(units):
    """Returns a network with each recurrent cell, there and back.

    A few units are computed by one thread, and many by two of them.
    """
    draw = np.random.default_rng(0)

    def kernel(rows, columns):
        kept = draw.random((rows, columns)) < 0.3
        values = draw.standard_normal((rows, columns)) * kept / 6
        return values.astype(np.float32)

    nodes = [Node(Operation.INPUT, "x", shape=(-1, 6))]
    for cell in Cell:
        columns = cell.gates * units
        first = len(nodes)
        nodes.append(
            Node(Operation.DENSE, "d", (0,), kernel=kernel(6, columns))
        )
        bias = draw.standard_normal(units if cell == Cell.GRU else 0)
        for turn in range(2):
            nodes.append(
                Node(
                    Operation.RECURRENT,
                    f"{cell.name} {turn}",
                    (first,),
                    cell=cell,
                    kernel=kernel(units, columns),
                    bias=bias.astype(np.float32),
                    sequences=turn == 0,
                    backwards=turn == 0,
                )
            )
    ends = [
        Output(node.name, i)
        for i, node in enumerate(nodes)
        if node.operation == Operation.RECURRENT
    ]
    return Network(tuple(nodes), tuple(ends))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_threads_share_sequences(way, kind):
    """In each way, a sequence has the same bits with any threads."""
    draw = np.random.default_rng(1)
    with kind_of_code(kind) as name:
        for steps, units in ((1, 45), (9, 45), (3, 141)):
            network = loops(units)
            x = draw.standard_normal((3, steps, 6)).astype(np.float32)
            expected = evaluate(network, {"x": x})
            before = None
            for threads in THREADS:
                hints = f"{name} costs {threads} {WAYS[way]}\n"
                with load(network, threads=threads, hints=hints) as engine:
                    if engine.instruction_set != name:
                        pytest.skip(f"this processor has no {name}")
                    found = engine(x=x)
                    check(found, expected, (steps, threads))
                    before = before or found
                    for output, value in found.items():
                        np.testing.assert_array_equal(value, before[output])


def test_batches_without_images():
    network = random_network(0, sizes=SIZES)
    with load(network, threads=2) as engine:
        for size in SIZES:
            inputs = random_inputs(network, 0, size=size)
            some = random_inputs(network, 1, size=size)
            expected = first(evaluate(network, some), 0)
            check(engine(**inputs), expected)


@pytest.mark.parametrize("threads", THREADS)
def test_many_callers_of_many_sizes(threads):
    network = random_network(1, sizes=SIZES)
    cases = []
    for i, batch in enumerate((1, 2, 17, 33, 5, 40)):
        inputs = random_inputs(network, batch, size=SIZES[i % 4], seed=i)
        cases.append((inputs, evaluate(network, inputs)))
    with load(network, threads=threads) as engine:

        def call(turn):
            for at in range(12):
                inputs, expected = cases[(turn + at) % len(cases)]
                check(engine(**inputs), expected)

        assert not in_threads(
            [lambda turn=turn: call(turn) for turn in range(6)]
        )


def test_more_sizes_than_plans_are_kept_by_many_callers():
    """Each plan exists until its last call has ended."""
    network = random_network(1, sizes=SIZES)
    cases = []
    for rows in range(1, 12):
        inputs = random_inputs(network, 3, size=(rows, 4))
        cases.append((inputs, evaluate(network, inputs)))
    with load(network, threads=2) as engine:

        def call(turn):
            for inputs, expected in cases[turn:] + cases[:turn]:
                check(engine(**inputs), expected)

        assert not in_threads(
            [lambda turn=turn: call(turn) for turn in range(4)]
        )


def in_a_child(call):
    """Returns whether a function succeeds in a forked process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="processes do not fork")
@pytest.mark.skipif(SANITIZED, reason="its runtime has its own threads")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_calls_what_its_parent_has_used(case):
    network, inputs, expected = case
    with load(network, threads=3) as engine:

        def call():
            for batch in BATCHES:
                check(engine(**first(inputs, batch)), first(expected, batch))

        call()

        def call_and_close():
            call()
            assert in_a_child(call)  # a grandchild
            engine.close()

        assert in_a_child(call_and_close)
        call()


def test_the_instruction_set_is_that_of_the_load(case):
    """Later changes of the environment have no effect."""
    network, inputs, expected = case
    for kind in KINDS:
        with kind_of_code(kind):
            engine = load(network, threads=2)
        for other in KINDS:
            with kind_of_code(other):
                check(engine(**inputs), expected)
                check(engine(**first(inputs, 1)), first(expected, 1))


def resident():
    """Returns the resident memory of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
@pytest.mark.skipif(SANITIZED, reason="what is freed is kept for a while")
def test_loading_again_and_again_needs_no_more_memory():
    network = a_network(channels=32, size=(8, 16))
    data = to_bytes(network)
    inputs = random_inputs(network, 33)

    def use(turns):
        for turn in range(turns):
            with loaded(data, threads=1 + turn % 2) as engine:
                engine(**first(inputs, 1))
                engine(**inputs)

    use(40)
    before = resident()
    use(160)
    # A network takes more than a tenth of a megabyte.
    assert resident() - before < 160 * 0.1e6 / 2


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED, reason="it is what runs")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_under_sanitizers(sanitizer, tmp_path_factory):
    """Runs these tests and those of hints again, in a separate process."""
    tests = "callers or threads" if sanitizer == "thread" else ""
    common = common_folder(tmp_path_factory)
    variables = sanitized_library(sanitizer, common)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-n0", "-x", __file__),
            os.path.join(os.path.dirname(__file__), "test_serving_hints.py"),
            *("-p", "no:cacheprovider", "-k", tests),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
    assert "[100%]" in done.stdout  # some tests have run
