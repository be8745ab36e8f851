"""The engines that serve networks, and where each runs."""

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
        file: What it reads, one of `network_files.FILES`.
        environment: Where it runs. None: where this process does.
        precision: What it computes in. Only float32 has to agree.
        variables: Of its process.
        isas: Variables that hold it to a set of instructions, `{avx2 or
            avx512: {variable: value}}`. Empty: it takes all that there are.
        script: What its process runs.
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


# The last versions that were tried. What has a wheel for this Python only in
# other versions is left out, with what pip says.
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
# Compiled in the process, and not by others that stay.
_TORCH_VARIABLES = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
# In this order they get their memory, and stand in tables of equals.
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
OURS = ("native", "sparse_saved_model")  # the first there is compared with


def variables_of(engine: Engine, isa: str | None, threads: int) -> dict:
    """Returns the variables of an engine's process.

    Args:
        engine: The engine.
        isa: Instructions to do with: avx2 or avx512. None: all there are.
        threads: With which it computes.
    """
    variables = {**engine.variables, "OMP_NUM_THREADS": str(threads)}
    if isa is not None:
        variables.update(engine.isas.get(isa, {}))
    return variables
