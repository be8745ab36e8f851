"""A process with one engine, which loads a network and times calls.

    python worker.py ENGINE

It reads requests from its standard input, each a line of JSON, and answers
each with a line of JSON. The answer to a failed request is {"error": text}.

    {"do": "prepare", "path": file, "to": file, "inputs": file}
    {"do": "load", "path": file, "threads": n, "batch": n}   {"version": text}
    {"do": "compute", "inputs": file, "outputs": file}
    {"do": "run", "seconds": s, "warm_up": s}    {"seconds": [of each call]}
    {"do": "quit"}

Inputs and outputs are NumPy files (.npy). Each engine takes an array and
returns one, as a Python program would use it.

This script does not import rigl_keras. It runs on Python 3.8, in environments
that have only one engine.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time

# Python puts the folder of a script first; our modules must not hide packages.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]

__all__ = ["serve"]


# A function for each engine, which loads a file and returns a function.


def _tensorflow(path, threads, batch):
    tf = importlib.import_module("tensorflow")
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    return _served(tf, tf.saved_model.load(path))


def _sparse_saved_model(path, threads, batch):
    tf = importlib.import_module("tensorflow")
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    return _served(tf, _module(os.path.join(path, "load.py")).model())


def _served(tf, model):
    serve = model.signatures["serving_default"]
    (name,) = serve.structured_input_signature[1]
    (output,) = serve.structured_outputs
    call = {}

    def compute(images):
        call[name] = tf.constant(images)
        return serve(**call)[output].numpy()

    # Keeps the SavedModel alive, which its functions need.
    compute.model = model
    return compute


def _native(path, threads, batch):
    runtime = _module(os.path.join(path, "network.py"))
    network = runtime.Network(
        os.path.join(path, "network.rigl"), threads=threads
    )

    def compute(images):
        (output,) = network.run([images])
        return output

    return compute


def _litert(path, threads, batch):
    interpreter_class = importlib.import_module(
        "ai_edge_litert.interpreter"
    ).Interpreter
    interpreter = interpreter_class(path, num_threads=threads)
    (given,) = interpreter.get_input_details()
    shape = [batch, *given["shape"][1:].tolist()]
    interpreter.resize_tensor_input(given["index"], shape)
    interpreter.allocate_tensors()
    (output,) = interpreter.get_output_details()

    def compute(images):
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(output["index"])  # a copy

    return compute


def _onnxruntime(path, threads, batch):
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    return lambda images: session.run(None, {given.name: images})[0]


def _openvino(path, threads, batch):
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    model = core.read_model(path)
    shape = model.input(0).partial_shape
    shape[0] = batch
    model.reshape(shape)
    # Without the precision hint it uses bfloat16 if the processor supports it.
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()

    def compute(images):
        return request.infer([images], share_inputs=True)[0].copy()

    return compute


def _deepsparse(path, threads, batch):
    deepsparse = importlib.import_module("deepsparse")
    engine = deepsparse.compile_model(path, batch_size=batch, num_cores=threads)
    return lambda images: engine.run([images])[0]


def _pytorch(path, threads, batch, *, compiled=False):
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    exported = torch.export.load(path)
    network = exported.module(check_guards=False)
    if compiled:
        settings = importlib.import_module("torch._inductor.config")
        settings.freezing = True  # pyright: ignore[reportAttributeAccessIssue]
        torch.compiler.reset()
        network = torch.compile(network)

    @torch.inference_mode()
    def compute(images):
        return network(torch.from_numpy(images)).numpy()

    return compute


def _pytorch_compiled(path, threads, batch):
    return _pytorch(path, threads, batch, compiled=True)


LOADERS = {
    "tensorflow": _tensorflow,
    "sparse_saved_model": _sparse_saved_model,
    "native": _native,
    "litert": _litert,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "deepsparse": _deepsparse,
    "pytorch": _pytorch,
    "pytorch_compiled": _pytorch_compiled,
}
_PACKAGES = {
    "native": "rigl_keras",
    "sparse_saved_model": "tensorflow",
    "litert": "ai-edge-litert",
    "pytorch": "torch",
    "pytorch_compiled": "torch",
}


def _quantized(path, to, inputs):
    """Quantizes an ONNX file to int8 with NNCF, and writes it for OpenVINO."""
    import numpy as np

    nncf = importlib.import_module("nncf")
    openvino = importlib.import_module("openvino")
    model = openvino.Core().read_model(path)
    images = np.load(inputs)
    examples = nncf.Dataset([images[i : i + 1] for i in range(len(images))])
    quantized = nncf.quantize(model, examples, subset_size=len(images))
    openvino.save_model(quantized, to, compress_to_fp16=False)


PREPARERS = {"openvino": _quantized}


def _module(path):
    """Imports and returns the module of a file."""
    spec = importlib.util.spec_from_file_location("network_loader", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # as `import` does
    spec.loader.exec_module(module)
    return module


def _version(engine):
    package = _PACKAGES.get(engine) or engine
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


class _Session:
    """Handles requests; it holds a network and its inputs.

    Args:
        load: Takes the path of a file, a number of threads and a batch size.
            Returns a function from an array to an array.
        version: Returns the version of the engine.
        prepare: Writes a file that `load` takes.
    """

    def __init__(self, load, version, prepare):
        self._load, self._version, self._prepare = load, version, prepare
        self._compute, self._images = _nothing, None

    def prepare(self, path, to, inputs):
        self._prepare(path, to, inputs)
        return {}

    def load(self, path, threads, batch):
        self._compute, self._images = _nothing, None  # one network at a time
        gc.collect()
        self._compute = self._load(path, threads, batch)
        return {"version": self._version()}

    def compute(self, inputs, outputs):
        import numpy as np

        self._images = np.load(inputs)
        np.save(outputs, self._compute(self._images))
        return {}

    def run(self, seconds, warm_up):
        compute, images, now = self._compute, self._images, time.perf_counter
        taken = []
        gc.collect()
        gc.disable()
        try:
            # Warms up caches and wakes threads.
            end = now() + warm_up
            compute(images)
            while now() < end:
                compute(images)
            end = now() + seconds
            start = now()
            while not taken or start < end:
                compute(images)
                stop = now()
                taken.append(stop - start)
                start = stop
        finally:
            gc.enable()
        return {"seconds": taken}


def _nothing(*arguments):
    raise RuntimeError("the request is unknown, or needs another one before")


def serve(load, version, prepare=_nothing):
    """Answers requests until one says quit, or the input ends.

    Args:
        load: Takes the path of a file, a number of threads and a batch size.
            Returns a function from an array to an array.
        version: Takes nothing and returns the version of the engine.
        prepare: Takes three paths: of an ONNX file, of the file to write, and
            of examples.
    """
    _end_with_parent()
    _end_first()
    # Prints of the engine go to the log, so that they do not mix with answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = _Session(load, version, prepare)
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        if do == "quit":
            return
        try:
            answer = getattr(session, do)(**request)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _end_with_parent():
    """Makes Linux end this process when its parent ends, even if stopped."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes
        import signal

        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _end_first():
    """Makes Linux end this process first if memory runs out."""
    with contextlib.suppress(OSError):
        with open("/proc/self/oom_score_adj", "w") as likeliest:
            likeliest.write("1000")


if __name__ == "__main__":
    name = sys.argv[1]
    serve(LOADERS[name], lambda: _version(name), PREPARERS.get(name, _nothing))
