"""The flags of `bin/benchmark`'s parts, parsed without TensorFlow."""

from collections.abc import Callable, Mapping

from absl import flags

from rigl_keras.experiments.benchmarks.engines.catalogue import ENGINES

__all__ = ["DEFINE", "KERNEL_PARTS"]

# The arguments of a part: its flags by name, and the flag of its output.
Given = tuple[Mapping[str, flags.FlagHolder], flags.FlagHolder | None]
KERNEL_PARTS = ("kernels", "train", "inference")
_MODEL = "Network, one of wide_resnet, resnet50."
_NETWORK = (
    "Network, one of wide_resnet, resnet50, vision_transformer, lstm, dense."
)
_KEPT = "Fractions of the weights kept."
_DISTRIBUTIONS = (
    "Distributions of density over layers: erdos_renyi_kernel, erdos_renyi, "
    "uniform, uniform_all."
)


def _of_kernels(part: str) -> Given:
    given = {
        "model": flags.DEFINE_string(
            "model", "wide_resnet", _MODEL if part == "inference" else _NETWORK
        ),
        "densities": flags.DEFINE_list(
            "densities",
            "0.02,0.05,0.1,0.2,0.3,0.5"
            if part == "kernels"
            else "0.02,0.05,0.1,0.2,0.5,1.0",
            _KEPT,
        ),
        "rounds": flags.DEFINE_integer(
            "rounds", 7 if part == "train" else 15, "Timed turns of each side."
        ),
    }
    if part == "inference":
        given["batch_sizes"] = flags.DEFINE_list(
            "batch_sizes", "1,16,128", "Images in a call."
        )
    else:
        given["batch_size"] = flags.DEFINE_integer(
            "batch_size", 128, "Examples in a call."
        )
    if part == "kernels":
        given["granularities"] = flags.DEFINE_list(
            "granularities",
            "element",
            "Patterns of the masks, such as element,kernel,4x16,fan_in.",
        )
    else:
        given["distributions"] = flags.DEFINE_list(
            "distributions", "uniform,erdos_renyi_kernel", _DISTRIBUTIONS
        )
    if part == "train":
        given["torch"] = flags.DEFINE_bool(
            "torch", False, "Also measure a step of PyTorch."
        )
    output = flags.DEFINE_string(
        "output", None, f"Folder for {part}.csv and {part}.png."
    )
    return given, output


def _of_plans(_: str) -> Given:
    given = {
        "sizes": flags.DEFINE_integer("sizes", 64, "Sizes of images."),
        "channels": flags.DEFINE_integer(
            "channels", 512, "Channels of the images."
        ),
        "filters": flags.DEFINE_integer(
            "filters", 512, "Filters of the layer."
        ),
        "density": flags.DEFINE_float(
            "density", 0.3, "Fraction of the weights kept."
        ),
    }
    return given, None


def _of_engines(_: str) -> Given:
    given = {
        "models": flags.DEFINE_list(
            "models", "wide_resnet,resnet50,mobilenet_v2", "Networks."
        ),
        "densities": flags.DEFINE_list("densities", "0.05,0.1,0.2", _KEPT),
        "batches": flags.DEFINE_list(
            "batches", "1,16,128", "Examples in a call."
        ),
        "engines": flags.DEFINE_list(
            "engines",
            list(ENGINES),
            "Engines to measure.",
        ),
        "distributions": flags.DEFINE_list(
            "distributions", "erdos_renyi_kernel", _DISTRIBUTIONS
        ),
        "rounds": flags.DEFINE_integer(
            "rounds", 15, "Turns of each engine, at most."
        ),
        "seconds": flags.DEFINE_float(
            "seconds", 60.0, "Time for the turns of a network and batch size."
        ),
        "isa": flags.DEFINE_enum(
            "isa", None, ["avx2", "avx512"], "Newest instruction set to use."
        ),
        "again": flags.DEFINE_bool(
            "again", False, "Measure again what --output has already."
        ),
        "install": flags.DEFINE_bool(
            "install", True, "Create missing environments."
        ),
    }
    flags.DEFINE_alias("distribution", "distributions")
    output = flags.DEFINE_string(
        "output", "engines", "Folder for results and figure; empty: none."
    )
    return given, output


def _of_workers(_: str) -> Given:
    given = {
        "model": flags.DEFINE_string("model", "wide_resnet", _MODEL),
        "densities": flags.DEFINE_list("densities", "0.1", _KEPT),
        "distribution": flags.DEFINE_string(
            "distribution", "erdos_renyi_kernel", "How density is spread."
        ),
        "batch_size": flags.DEFINE_integer(
            "batch_size", 128, "Images in a step, over both workers."
        ),
        "gigabits": flags.DEFINE_list(
            "gigabits",
            "1",
            "Bandwidths in Gbit/s, in addition to the machine's.",
        ),
        "sides": flags.DEFINE_list(
            "sides", "dense,all,active", "What the workers exchange."
        ),
        "rounds": flags.DEFINE_integer(
            "rounds", 7, "Turns of each side, of two steps."
        ),
    }
    output = flags.DEFINE_string(
        "output", None, "Folder for a table with the model's name."
    )
    return given, output


def _of_language(_: str) -> Given:
    sizes = {
        "batch_size": (8, "Windows of text in a step."),
        "context": (256, "Characters in a window."),
        "layers": (12, "Blocks of the network."),
        "width": (512, "Width of the network."),
        "heads": (8, "Heads of attention."),
        "rounds": (5, "Timed turns of each side."),
    }
    given = {
        name: flags.DEFINE_integer(name, default, said)
        for name, (default, said) in sizes.items()
    }
    given["densities"] = flags.DEFINE_list(
        "densities", "0.1,0.05", "Fractions of the masked weights kept."
    )
    given["products"] = flags.DEFINE_list(
        "products", "auto", "Products to measure: auto, sparse or dense."
    )
    given["updates"] = flags.DEFINE_bool(
        "updates", True, "Also measure steps that are mask updates."
    )
    given["torch"] = flags.DEFINE_bool(
        "torch", False, "Also measure a step of PyTorch."
    )
    given["runs"] = flags.DEFINE_list(
        "runs", [], "Directories of runs: write their losses, measure nothing."
    )
    output = flags.DEFINE_string("output", None, "Folder for CSV and figure.")
    return given, output


def _of_updates(_: str) -> Given:
    given = {
        "networks": flags.DEFINE_list(
            "networks",
            "wide_resnet,dense",
            "Networks: wide_resnet, or dense, which is one layer.",
        ),
        "size": flags.DEFINE_integer(
            "size", 8192, "Inputs and outputs of the dense layer."
        ),
        "batch_size": flags.DEFINE_integer(
            "batch_size", 128, "Examples in a step."
        ),
        "rounds": flags.DEFINE_integer(
            "rounds", 7, "Turns of each method, each an update and two steps."
        ),
    }
    output = flags.DEFINE_string("output", None, "Folder for updates.csv.")
    return given, output


# Functions that define the flags of a part, by its name. Each takes the name
# and may be called once in a process.
DEFINE: dict[str, Callable[[str], Given]] = {
    **dict.fromkeys(KERNEL_PARTS, _of_kernels),
    "plans": _of_plans,
    "engines": _of_engines,
    "workers": _of_workers,
    "language": _of_language,
    "updates": _of_updates,
}
