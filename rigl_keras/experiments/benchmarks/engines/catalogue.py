"""The engines that serve networks, and the environment of each."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from rigl_keras.experiments.benchmarks.engines.environments import Environment

__all__ = ["ENGINES", "OURS", "WORKER", "Engine", "variables_of"]

WORKER = Path(__file__).with_name("worker.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine, or one way of using it.

    Attributes:
        label: Its name in tables.
        loader: Its name in `worker.py`.
        file: The kind of file it reads, one of `network_files.FILES`.
        environment: Its environment. None: that of this process.
        precision: The precision of its products. Only float32 engines must
            agree with the model.
        variables: Environment variables of its process.
        isas: Variables that limit it to an instruction set, `{avx2 or avx512:
            {variable: value}}`. Empty: it cannot be limited.
        script: The script that its process runs.
    """

    label: str
    loader: str
    file: str
    environment: Environment | None = None
    precision: str = "float32"
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    isas: Mapping[str, Mapping[str, str]] = dataclasses.field(
        default_factory=dict
    )
    script: Path = WORKER


# The last versions that were tested. An engine without a wheel for this
# version and this Python is left out, with pip's message.
_DEEPSPARSE = Environment(
    name="deepsparse",
    packages=("deepsparse==1.8.0", "numpy==1.26.4", "onnx==1.14.1"),
    modules=("deepsparse",),
    pythons=((3, 8), (3, 11)),
)
_OPENVINO = Environment(
    name="openvino",
    packages=("openvino==2026.4.1", "nncf==3.4.0", "numpy<3"),
    modules=("openvino", "nncf"),
)
_LITERT = Environment(
    name="litert",
    packages=("ai-edge-litert==2.3.0", "numpy<3"),
    modules=("ai_edge_litert",),
)
_ONNXRUNTIME = Environment(
    name="onnxruntime",
    packages=("onnxruntime==1.32.0", "numpy<3"),
    modules=("onnxruntime",),
)
_PYTORCH = Environment(
    name="pytorch",
    packages=("torch==2.13.0", "numpy<3"),
    modules=("torch",),
)
_OUR_ISAS = {isa: {"RIGL_KERAS_ISA": isa} for isa in ("avx2", "avx512")}
_ONEDNN_ISAS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
_TORCH_ISAS = {
    isa: {"ATEN_CPU_CAPABILITY": isa, **variables}
    for isa, variables in _ONEDNN_ISAS.items()
}
_DEEPSPARSE_ISAS = {isa: {"NM_ARCH": isa} for isa in ("avx2", "avx512")}
_TENSORFLOW_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Compile in this process, not in worker processes that keep running.
_TORCH_VARIABLES = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
# The order in which engines are loaded, and listed if they are equally fast.
ENGINES: Mapping[str, Engine] = {
    "native": Engine(
        label="rigl_keras, native",
        loader="native",
        file="native",
        isas=_OUR_ISAS,
    ),
    "sparse_saved_model": Engine(
        label="rigl_keras, SavedModel",
        loader="sparse_saved_model",
        file="sparse_saved_model",
        variables=_TENSORFLOW_VARIABLES,
        isas=_OUR_ISAS,
    ),
    "deepsparse": Engine(
        label="DeepSparse",
        loader="deepsparse",
        file="onnx",
        environment=_DEEPSPARSE,
        variables={"NM_DISABLE_ANALYTICS": "1"},
        isas=_DEEPSPARSE_ISAS,
    ),
    "openvino": Engine(
        label="OpenVINO",
        loader="openvino",
        file="onnx",
        environment=_OPENVINO,
        isas=_ONEDNN_ISAS,
    ),
    "onnxruntime": Engine(
        label="ONNX Runtime",
        loader="onnxruntime",
        file="onnx",
        environment=_ONNXRUNTIME,
    ),
    "litert": Engine(
        label="LiteRT", loader="litert", file="tflite", environment=_LITERT
    ),
    "tensorflow": Engine(
        label="TensorFlow",
        loader="tensorflow",
        file="saved_model",
        variables=_TENSORFLOW_VARIABLES,
        isas=_ONEDNN_ISAS,
    ),
    "tensorflow_folded": Engine(
        label="TensorFlow, folded",
        loader="tensorflow",
        file="folded_saved_model",
        variables=_TENSORFLOW_VARIABLES,
        isas=_ONEDNN_ISAS,
    ),
    "pytorch": Engine(
        label="PyTorch, eager",
        loader="pytorch",
        file="pytorch",
        environment=_PYTORCH,
        variables=_TORCH_VARIABLES,
        isas=_TORCH_ISAS,
    ),
    "pytorch_compiled": Engine(
        label="PyTorch, compiled",
        loader="pytorch_compiled",
        file="pytorch",
        environment=_PYTORCH,
        variables=_TORCH_VARIABLES,
        isas=_TORCH_ISAS,
    ),
    "openvino_int8": Engine(
        label="OpenVINO int8",
        loader="openvino",
        file="openvino_int8",
        environment=_OPENVINO,
        precision="int8",
        isas=_ONEDNN_ISAS,
    ),
}
# Other engines are compared with the first of these that was measured.
OURS = ("native", "sparse_saved_model")


def variables_of(engine: Engine, isa: str | None, threads: int) -> dict:
    """Returns the environment variables of an engine's process.

    Args:
        engine: The engine.
        isa: Newest instruction set to use, avx2 or avx512. None: all.
        threads: Number of threads.
    """
    variables = {**engine.variables, "OMP_NUM_THREADS": str(threads)}
    if isa is not None:
        variables.update(engine.isas.get(isa, {}))
    return variables
