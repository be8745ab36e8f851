"""A network as a TensorFlow operation."""

import concurrent.futures
import shutil

import numpy as np
import pytest
import tensorflow as tf

from rigl_keras.kernels import library
from rigl_keras.serving.network import Network, Node, Operation, Output
from rigl_keras.serving.network_file import to_bytes
from rigl_keras.serving.operation import checksum_of, run_network

KERNEL = np.float32([[1, 0], [0, 2], [3, -1]])
BIAS = np.float32([10, 20])
SHAPES = [tf.TensorShape([None, 2]), tf.TensorShape([None, 3])]


@pytest.fixture(autouse=True)
def loaded():
    if library.load() is None:
        pytest.skip(f"no op library: {library.unavailable()}")


def network(kernel=KERNEL):
    """Returns a network of x K + b and x + z."""
    return Network(
        (
            Node(Operation.INPUT, "x", shape=(3,)),
            Node(Operation.INPUT, "z", shape=(3,)),
            Node(Operation.DENSE, "d", (0,), kernel=kernel, bias=BIAS),
            Node(Operation.ADD, "a", (0, 1)),
        ),
        (Output("product", 2), Output("sum", 3)),
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "network.rigl"
    path.write_bytes(to_bytes(network()))
    return path


def run(file, *inputs, checksum=None, shapes=SHAPES, **options):
    if checksum is None:
        checksum = checksum_of(file.read_bytes())
    return run_network(
        str(file), inputs, checksum=checksum, shapes=shapes, **options
    )


X = tf.constant([[1.0, 2, 3], [0, 0, -1]])
Z = tf.constant([[1.0, 1, 1], [2, 2, 2]])
PRODUCT = [[20, 21], [7, 21]]
SUM = [[2, 3, 4], [2, 2, 1]]


def check(outputs):
    product, total = outputs
    np.testing.assert_allclose(product, PRODUCT, rtol=1e-6)
    np.testing.assert_allclose(total, SUM, rtol=1e-6)


def test_it_computes_the_network(file):
    check(run(file, X, Z))
    check(run(file, X, Z, threads=2))


def test_in_graphs_and_sessions(file):
    in_graph = tf.function(lambda x, z: run(file, x, z), autograph=False)
    check(in_graph(X, Z))
    spec = tf.TensorSpec((None, 3), tf.float32)
    product, total = in_graph.get_concrete_function(spec, spec).outputs
    assert product.shape.as_list() == [None, 2]
    assert total.shape.as_list() == [None, 3]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x, z = tf.constant(X.numpy()), tf.constant(Z.numpy())
        product, total = run(file, x, z)
        assert product.shape.as_list() == [2, 2]
        check(session.run([product, total]))


def test_no_examples(file):
    product, total = run(file, X[:0], Z[:0])
    assert product.shape == (0, 2) and total.shape == (0, 3)


def test_many_callers(file):
    in_graph = tf.function(lambda x, z: run(file, x, z), autograph=False)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for outputs in pool.map(lambda _: in_graph(X, Z), range(64)):
            check(outputs)


def test_a_file_is_read_once(file, tmp_path):
    """Operations share a network while it is in use."""
    checksum = checksum_of(file.read_bytes())

    def call(x, z):
        return run(file, x, z, checksum=checksum)

    first, second = tf.function(call), tf.function(call)
    check(first(X, Z))
    file.unlink()
    check(first(X, Z))
    check(second(X, Z))
    with pytest.raises(tf.errors.NotFoundError, match="elsewhere"):
        run(tmp_path / "elsewhere", X, Z, checksum=checksum)


def test_an_export_that_has_taken_its_place(file):
    """A function continues with its network; a new one needs its own file."""
    checksum = checksum_of(file.read_bytes())
    call = tf.function(lambda x, z: run(file, x, z, checksum=checksum))
    check(call(X, Z))
    file.write_bytes(to_bytes(network(2 * KERNEL)))
    check(call(X, Z))
    product, _ = run(file, X, Z)
    np.testing.assert_allclose(product, 2 * (PRODUCT - BIAS) + BIAS)


def test_a_file_of_another_model(file, tmp_path):
    other = tmp_path / "other.rigl"
    other.write_bytes(to_bytes(network(2 * KERNEL)))
    with pytest.raises(tf.errors.DataLossError, match="is not the one"):
        run(other, X, Z, checksum=checksum_of(file.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"x" + data[1:],
        lambda data: data + b"\0",
    ],
)
def test_a_damaged_file(file, change):
    checksum = checksum_of(file.read_bytes())
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(tf.errors.DataLossError, match="cannot be loaded: .+"):
        run(file, X, Z, checksum=checksum)


@pytest.mark.parametrize("size", [0, 10])
def test_no_file_of_ours(file, size):
    file.write_bytes(b"\0" * size)
    with pytest.raises(tf.errors.DataLossError, match="is not the one"):
        run(file, X, Z, checksum=7)


def test_inputs_that_do_not_fit(file):
    refused = pytest.raises(tf.errors.InvalidArgumentError)
    with refused as caught:
        run(file, X)
    assert "has 2 inputs and 2 outputs. Received: 1 and 2" in str(caught.value)
    with refused as caught:
        run(file, X, Z, shapes=SHAPES[:1])
    assert "Received: 2 and 1" in str(caught.value)
    with refused as caught:
        run(file, X[:, :2], Z)
    assert "axis 1 of input 'x' must be 3. Received: 2" in str(caught.value)
    with refused as caught:
        run(file, X[None], Z[None])
    assert "input 'x' has 2 axes" in str(caught.value)
    with refused as caught:
        run(file, X[:1], Z)
    assert "one batch size" in str(caught.value)
    with pytest.raises(ValueError, match="threads must be .* 1024"):
        run(file, X, Z, threads=5000)
    check(run(file, X, Z))  # it continues


def test_what_a_graph_refuses(file):
    spec = [tf.TensorSpec((None, 3)), tf.TensorSpec((None, 3))]

    def traced(call, spec=spec):
        tf.function(call).get_concrete_function(*spec)

    with pytest.raises(ValueError, match="a shape is needed for each of 1"):
        module = library.load()
        traced(
            lambda x, z: module.rigl_keras_network(
                path="", inputs=[x, z], results=1, checksum=0, shapes=SHAPES
            )
        )
    with pytest.raises(ValueError, match="must be at least rank 1"):
        traced(lambda x, z: run(file, x[0, 0], z))
    with pytest.raises(ValueError, match="equal|must be"):
        traced(
            lambda x, z: run(file, x, z),
            [tf.TensorSpec((2, 3)), tf.TensorSpec((4, 3))],
        )


def test_there_are_no_gradients(file):
    with tf.GradientTape() as tape:
        tape.watch(X)
        product, _ = run(file, X, Z)
    with pytest.raises(LookupError, match="RiglKerasNetwork"):
        tape.gradient(product, X)


def test_a_saved_model_is_relocatable(file, tmp_path):
    checksum = checksum_of(file.read_bytes())

    class Served(tf.Module):
        def __init__(self):
            super().__init__()
            self.asset = tf.saved_model.Asset(str(file))

        @tf.function(input_signature=[tf.TensorSpec((None, 3))] * 2)
        def serve(self, x, z):
            return run_network(
                self.asset.asset_path,
                [x, z],
                checksum=checksum,
                shapes=SHAPES,
            )

    tf.saved_model.save(Served(), str(tmp_path / "saved"))
    file.unlink()
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    check(tf.saved_model.load(str(tmp_path / "moved")).serve(X, Z))
