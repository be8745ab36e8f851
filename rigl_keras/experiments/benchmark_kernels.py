"""What sparse kernels save: layer by layer, in training and at inference.

    bin/benchmark kernels                     the layers of WRN-22-2
    bin/benchmark kernels --model=resnet50    those of ResNet-50
    bin/benchmark train                       a training step, by density
    bin/benchmark train --torch               and one of PyTorch
    bin/benchmark inference                   a call of the model, by batch
    bin/benchmark train --output=speed        writes speed/train.csv and .png

A dense side and its sparse ones take turns in one process, so that whatever
else the machine does falls on all of them; medians of their times are
compared. How long it takes is for `--densities` and `--rounds` to say.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tqdm

import rigl_keras
from rigl_keras import arguments, kernels, writing
from rigl_keras.distributions import DISTRIBUTIONS
from rigl_keras.experiments import torch_network
from rigl_keras.experiments.benchmark import stepper
from rigl_keras.experiments.benchmark_inference import (
    MODELS,
    check_densities,
    check_each_once,
)
from rigl_keras.experiments.kernel_speeds import (
    Measurement,
    lines_of,
    table_head,
    table_row,
    write_csv,
)
from rigl_keras.fusion import Fused
from rigl_keras.timing import interleaved

__all__ = [
    "PARTS",
    "define_command",
    "inference",
    "layers",
    "machine",
    "problems",
    "train",
]

PARTS = ("kernels", "train", "inference")

FORWARD, BOTH = "forward", "forward + backward"
AUTO, MASKED = "kernels=auto", "kernels=dense"
UPDATE, AMORTISED = f"{AUTO}, a mask update", f"{AUTO}, 1 update in 100"
TORCH = "PyTorch, dense and masked"
CALLED, SERVED = "masked model", "served"
_DENSE = "dense", None  # the side that whole networks are compared with

_TOLERANCE = 1e-4  # difference of outputs, in units of the largest
_TURN = 0.02  # seconds that a side runs before the next one does, at least
_UPDATES = 0.01  # of the steps: RigL's usual frequency is 100

Say = Callable[[str], None]


def machine() -> str:
    """Returns what all times depend on, as in "avx2 against Eigen, 2 cores"."""
    found = "no sparse kernels"
    if kernels.load() is not None:
        found = f"{kernels.instruction_set()} against {kernels.dense_library()}"
    cores = os.cpu_count()
    return f"{found}, {cores} core{'s' if cores > 1 else ''}"


# Layer by layer.


def problems(model: keras.Model, batch_size: int) -> dict[str, kernels.Problem]:
    """Returns the distinct convolutions of a model.

    Args:
        model: A dense model, whose images have a size.
        batch_size: Images in a batch.

    Returns:
        `{"3x3 16x16x64>64": problem}`, in the order of the model: rows and
        columns of the kernel, rows, columns and channels of the images that
        it is given (padded ones, where the model pads them), filters, and
        `/2` for a stride of 2.
    """
    found = {}
    for layer in model._flatten_layers():
        if type(layer) is not keras.layers.Conv2D:
            continue
        rows, columns, channels, filters = layer.kernel.shape
        images = tuple(layer.input.shape[1:3])
        stride = f"/{layer.strides[0]}" if max(layer.strides) > 1 else ""
        name = (
            f"{rows}x{columns} {images[0]}x{images[1]}x{channels}>{filters}"
            f"{stride}"
        )
        found[name] = kernels.Problem(
            kernel=(rows, columns, channels, filters),
            images=(batch_size, *images),
            strides=tuple(layer.strides),
            padding=layer.padding.upper(),
            dilations=tuple(layer.dilation_rate),
        )
    return found


def layers(
    model: str = "wide_resnet",
    densities: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
    *,
    batch_size: int = 128,
    rounds: int = 15,
    say: Say = print,
) -> list[Measurement]:
    """Measures each convolution of a network, dense and sparse.

    Args:
        model: One of `benchmark_inference.MODELS`.
        densities: Of random masks.
        batch_size: Images in a call.
        rounds: Turns of each side.
        say: Called with each line of the table as it is measured.

    Returns:
        Measurements of a forward pass, and of one forwards and backwards.

    Raises:
        ValueError: An argument is out of range, or the sparse kernels compute
            something else than the dense ones do.
        RuntimeError: There are no sparse kernels.
    """
    _check(model, densities, rounds, batch_sizes=[batch_size])
    densities = sorted(densities)
    about = machine()
    found = problems(MODELS[model](), batch_size)
    say(
        table_head(f"Layers of {model}, batch {batch_size}: {about}", densities)
    )
    measured = []
    for name, problem in _progress(found.items(), len(found)):
        sides, size = _layer_sides(problem, densities)
        seconds = interleaved(sides, rounds=rounds, turn=_TURN)
        measured += _measurements(
            seconds,
            {FORWARD: (FORWARD, None), BOTH: (BOTH, None)},
            densities,
            say,
            model=model,
            layer=name,
            size=size,
            batch_size=batch_size,
            rounds=rounds,
            machine=about,
        )
    return measured


def _layer_sides(problem, densities):
    """Returns `{(side, density or None): call}`, and the size of outputs."""
    draw = np.random.default_rng(0)

    def normal(*shape):
        return tf.constant(draw.standard_normal(shape, np.float32))

    images = normal(*problem.images, problem.kernel[2])
    kernel = normal(*problem.kernel)
    settings = {
        "strides": problem.strides,
        "padding": problem.padding,
        "dilations": problem.dilations,
    }

    def dense(images, kernel):
        return tf.nn.convolution(images, kernel, **settings)

    outputs = dense(images, kernel)
    upstream = normal(*outputs.shape)

    def calls(product):
        @tf.function(autograph=False)
        def forward(images, kernel):
            return product(images, kernel)

        @tf.function(autograph=False)
        def both(images, kernel, upstream):
            with tf.GradientTape() as tape:
                tape.watch([images, kernel])
                outputs = product(images, kernel)
            return outputs, tape.gradient(
                outputs, [images, kernel], output_gradients=upstream
            )

        return {
            FORWARD: lambda: forward(images, kernel),
            BOTH: lambda: both(images, kernel, upstream),
        }

    sides = {(side, None): call for side, call in calls(dense).items()}
    for density in densities:
        size = kernel.shape.num_elements()
        count = max(1, round(density * size))
        kept = (draw.permutation(size) < count).reshape(kernel.shape)
        mask = tf.constant(kept.astype(np.float32))
        sparse = functools.partial(kernels.sparse_conv2d, mask=mask, **settings)
        _check_same(sparse(images, kernel), dense(images, kernel * mask))
        for side, call in calls(sparse).items():
            sides[side, density] = call
    rows, columns = outputs.shape[1:3]
    return sides, f"{rows}x{columns} outputs"


# A training step.


def train(
    model: str = "wide_resnet",
    densities: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    distributions: Sequence[str] = ("uniform", "erdos_renyi_kernel"),
    *,
    batch_size: int = 128,
    rounds: int = 7,
    torch: bool = False,
    say: Say = print,
) -> list[Measurement]:
    """Measures training steps of a network, dense and with RigL.

    All go through the function that `fit` calls for a batch. RigL has its
    masks updated in one of a hundred steps, which needs dense gradients: such
    a step is measured, too, and counted in at that rate. The masked product of
    dense kernels, as the library had it before, is one more side.

    Args:
        model: One of `benchmark_inference.MODELS`.
        densities: Fractions of the masked weights kept.
        distributions: Of the masks over the layers. All sides of one take
            turns.
        batch_size: Images in a step.
        rounds: Turns of each side.
        torch: Whether PyTorch is measured (`torch_training_step`).
        say: Called with each line of the tables.

    Returns:
        Measurements.

    Raises:
        ValueError: An argument is out of range.
    """
    _check(model, densities, rounds, distributions, batch_sizes=[batch_size])
    densities = sorted(densities)
    about = machine()
    if torch and not torch_network.is_installed():
        say(f"PyTorch is not measured: {torch_network.INSTALL}")
        torch = False
    measured = []
    for distribution in distributions:
        say(
            table_head(
                f"Training step of {model}, masks {distribution}, batch "
                f"{batch_size}: {about}",
                densities,
            )
        )
        sides = _train_sides(model, densities, distribution, batch_size, torch)
        seconds = _timed(sides, rounds, f"{model}, {distribution}")
        for density in densities:
            plain, update = seconds[AUTO, density], seconds[UPDATE, density]
            seconds[AMORTISED, density] = (
                1 - _UPDATES
            ) * plain + _UPDATES * update
            if torch:  # whose step is the same at any density
                seconds[TORCH, density] = seconds[TORCH, None]
        names = [AUTO, UPDATE, AMORTISED, MASKED, *([TORCH] * torch)]
        measured += _measurements(
            seconds,
            dict.fromkeys(names, _DENSE),
            densities,
            say,
            model=model,
            distribution=distribution,
            batch_size=batch_size,
            rounds=rounds,
            machine=about,
        )
    return measured


def _train_sides(name, densities, distribution, batch_size, torch):
    """Returns `{(side, density or None): call}`."""
    dense = MODELS[name]()
    draw = np.random.default_rng(0)
    images = draw.standard_normal(
        (batch_size, *dense.input_shape[1:]), np.float32
    )
    labels = np.arange(batch_size) % dense.output_shape[-1]
    batches = tf.data.Dataset.from_tensors((images, labels)).repeat()

    def sparse(density, product):
        return rigl_keras.sparsify(
            dense, density, distribution=distribution, kernels=product
        )

    sides = {}
    for density in densities:
        # Updates have a model of their own: the step after one puts the
        # weights in order anew, which is a cost of the update.
        for side, product, frequency in (
            (AUTO, "auto", 10**6),
            (UPDATE, "auto", 1),
            (MASKED, "dense", 10**6),
        ):
            method = rigl_keras.RigL(frequency=frequency, end_step=10**7)
            sides[side, density] = stepper(
                sparse(density, product), batches, method, {}
            )
    if torch:
        step = torch_network.torch_training_step(
            sparse(min(densities), "dense")
        )
        sides[TORCH, None] = functools.partial(step, images, labels)
    sides[_DENSE] = stepper(dense, batches, None, {})
    return sides


# A call of the model.


def inference(
    model: str = "wide_resnet",
    densities: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    distributions: Sequence[str] = ("uniform", "erdos_renyi_kernel"),
    *,
    batch_sizes: Sequence[int] = (1, 16, 128),
    rounds: int = 15,
    say: Say = print,
) -> list[Measurement]:
    """Measures what a network takes at inference, dense and sparse.

    Args:
        model: One of `benchmark_inference.MODELS`.
        densities: Fractions of the masked weights kept.
        distributions: Of the masks over the layers.
        batch_sizes: Images in a call. All sides of one take turns.
        rounds: Turns of each side.
        say: Called with each line of the tables.

    Returns:
        Measurements.

    Raises:
        ValueError: An argument is out of range, or a side computes something
            else than the network does.
    """
    _check(model, densities, rounds, distributions, batch_sizes=batch_sizes)
    densities = sorted(densities)
    about = machine()
    dense = MODELS[model]()
    measured = []
    for distribution in distributions:
        calls = {_DENSE: _called(dense)}
        plain = {}
        for density in densities:
            network = rigl_keras.sparsify(
                dense, density, distribution=distribution
            )
            plain[density] = rigl_keras.strip(network)
            calls[CALLED, density] = _called(network)
            calls[SERVED, density] = _served(network)
        for batch_size in batch_sizes:
            say(
                table_head(
                    f"Inference of {model}, masks {distribution}, batch "
                    f"{batch_size}: {about}",
                    densities,
                )
            )
            images = tf.constant(
                np.random.default_rng(0).standard_normal(
                    (batch_size, *dense.input_shape[1:]), np.float32
                )
            )
            for density, network in plain.items():
                wanted = network(images[:1], training=False)
                for side in (CALLED, SERVED):
                    _check_same(calls[side, density](images)[:1], wanted)
            sides = {
                key: functools.partial(call, images)
                for key, call in calls.items()
            }
            seconds = _timed(
                sides,
                rounds,
                f"{model}, {distribution}, batch {batch_size}",
                turn=_TURN,
            )
            measured += _measurements(
                seconds,
                dict.fromkeys((CALLED, SERVED), _DENSE),
                densities,
                say,
                model=model,
                distribution=distribution,
                batch_size=batch_size,
                rounds=rounds,
                machine=about,
            )
    return measured


def _called(model):
    """Returns a model's inference as a graph, as `predict` makes one."""
    # Anything but a model is called without the bookkeeping of a layer.
    return tf.function(lambda x: model(x, training=False))


def _served(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a masked model as `format="sparse_saved_model"` serves it."""
    if rigl_keras.kernels.load() is None:
        return _called(model)
    shape = (None, *model.input_shape[1:])
    fused = tf.function(Fused(model), autograph=False)
    return fused.get_concrete_function(tf.TensorSpec(shape))


# What they share.


def _timed(sides, rounds, doing, turn=0.0):
    """Returns seconds, as `interleaved` does, and shows how far it is."""
    with tqdm.tqdm(
        desc=doing, unit=" calls", disable=not sys.stderr.isatty()
    ) as bar:

        def counted(call):
            def run():
                call()
                bar.update()

            return run

        if not turn:  # each is called twice before, and once in a turn
            bar.reset(total=len(sides) * (2 + rounds))
        return interleaved(
            {key: counted(call) for key, call in sides.items()},
            rounds=rounds,
            turn=turn,
        )


def _progress(items, total) -> Iterator:
    return tqdm.tqdm(items, total=total, disable=not sys.stderr.isatty())


def _measurements(seconds, dense, densities, say, **about):
    """Returns a `Measurement` of each side and density, and says them.

    Args:
        seconds: `{(side, density): seconds}`.
        dense: `{side: key of what it is compared with}`.
        densities: Of each side.
        say: Called with a line for each side.
        **about: What they have in common.
    """
    measured = [
        Measurement(
            side=side,
            density=density,
            dense_seconds=seconds[dense[side]],
            seconds=seconds[side, density],
            **about,
        )
        for side in dense
        for density in densities
    ]
    for line in lines_of(measured):
        say(table_row(line))
    return measured


def _check_same(got, wanted):
    """Raises ValueError unless two outputs are the same, up to rounding."""
    largest = float(tf.reduce_max(tf.abs(wanted)))
    difference = float(tf.reduce_max(tf.abs(got - wanted)))
    if not difference <= _TOLERANCE * largest:  # NaN is none
        raise ValueError(
            "A sparse side must compute what the dense one does, up to "
            f"{_TOLERANCE:.0e} of the largest output. Received outputs that "
            f"differ by {difference:.1e}, the largest being {largest:.1e}. "
            "This is a defect of the kernels; there is nothing to compare."
        )


def _check(model, densities, rounds, names=("uniform",), *, batch_sizes):
    arguments.choice("model", model, tuple(MODELS))
    check_each_once(
        {
            "densities": densities,
            "distributions": names,
            "batch_sizes": batch_sizes,
        }
    )
    check_densities(densities)
    for name in names:
        arguments.choice("distributions", name, DISTRIBUTIONS)
    for batch_size in batch_sizes:
        arguments.integer("batch_size", batch_size, at_least=1)
    arguments.integer("rounds", rounds, at_least=1)


# The command.

# What a figure has in its rows, in its columns, and as lines.
_FIGURES = {
    "kernels": {"rows": "size", "columns": "side", "label": "layer"},
    "train": {"rows": "model", "columns": "distribution", "label": "side"},
    "inference": {
        "rows": "distribution",
        "columns": "batch_size",
        "label": "side",
    },
}
_MEASURES = {"kernels": layers, "train": train, "inference": inference}


def define_command(part: str) -> Callable[[list[str]], None]:
    """Defines the flags of a part, and returns what runs it after parsing.

    Args:
        part: One of `PARTS`.
    """
    from absl import flags

    defaults = _MEASURES[part].__kwdefaults__
    given = {
        "model": flags.DEFINE_string(
            "model", "wide_resnet", f"Network, one of {', '.join(MODELS)}."
        ),
        "densities": flags.DEFINE_list(
            "densities",
            "0.02,0.05,0.1,0.2,0.3,0.5"
            if part == "kernels"
            else "0.02,0.05,0.1,0.2,0.5,1.0",
            "Fractions of the weights kept.",
        ),
        "rounds": flags.DEFINE_integer(
            "rounds", defaults["rounds"], "Timed turns of each side."
        ),
    }
    if part == "inference":
        given["batch_sizes"] = flags.DEFINE_list(
            "batch_sizes", "1,16,128", "Images in a call."
        )
    else:
        given["batch_size"] = flags.DEFINE_integer(
            "batch_size", defaults["batch_size"], "Images in a call."
        )
    if part != "kernels":
        given["distributions"] = flags.DEFINE_list(
            "distributions",
            "uniform,erdos_renyi_kernel",
            f"Of the masks over the layers, of {', '.join(DISTRIBUTIONS)}.",
        )
    if part == "train":
        given["torch"] = flags.DEFINE_bool(
            "torch", False, "Measure a step of PyTorch, too."
        )
    output = flags.DEFINE_string(
        "output", None, f"Folder for {part}.csv and {part}.png."
    )
    return functools.partial(_run, part, given, output)


def _run(part, given, output, argv):
    from absl import logging

    logging.set_verbosity(logging.WARNING)
    # TensorFlow warns of graphs that are made in a loop, as they are here.
    tf.get_logger().setLevel("ERROR")
    # Read when PyTorch is imported, which is later: its threads would slow
    # down TensorFlow's, while they wait (`benchmark_inference`).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    def fail(error, code):
        print(f"benchmark {part}: {error}", file=sys.stderr)
        sys.exit(code)

    try:
        if len(argv) > 1:
            raise ValueError(
                f"There is nothing to name but flags. Received: {argv[1]!r}."
            )
        values = {name: flag.value for name, flag in given.items()}
        for name, kind in (("densities", float), ("batch_sizes", int)):
            if name in values:
                values[name] = _numbers(name, values[name], kind)
        _check(
            values["model"],
            values["densities"],
            values["rounds"],
            values.get("distributions", ("uniform",)),
            batch_sizes=values.get("batch_sizes") or [values["batch_size"]],
        )
        folder = output.value and _prepared(output.value)
        if part == "kernels":
            why = _why_no_kernels()
            if why:
                fail(f"There are no sparse kernels to measure: {why}.", 1)
        measured = _MEASURES[part](**values, say=_say)
    except ValueError as error:
        fail(error, 2)
    if folder:
        for path in _write(part, measured, folder):
            _say(f"Written: {path}")


def _say(line):
    # Above the bar, where there is one.
    tqdm.tqdm.write(line)
    sys.stdout.flush()


def _numbers(name, texts, kind):
    try:
        return [kind(text) for text in texts]
    except ValueError as error:
        raise ValueError(
            f"--{name} must be numbers with commas between. Received: "
            f"{','.join(texts)!r}."
        ) from error


def _prepared(output):
    """Returns a folder that is there, and that a figure can be drawn for."""
    try:
        from rigl_keras.experiments import kernel_figures  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--output has a figure, which needs matplotlib: install "
            f"rigl_keras[experiments], or leave it out. Received: {output!r}."
        ) from error
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            "--output must be a folder, or one that can be made. Received: "
            f"{output!r} ({error.strerror})."
        ) from error
    return Path(output)


def _why_no_kernels():
    """Returns why there are no sparse kernels, or None."""
    try:
        kernels.build()  # `load` would warn, and this is told as an error
    except kernels.BuildError as error:
        return str(error).rstrip(".")
    kernels.load()
    return kernels.unavailable()


def _write(part, measured, folder):
    """Returns the paths of what it has written."""
    from rigl_keras.experiments import figures, kernel_figures

    first = measured[0]
    batch = "" if part == "inference" else f", batch {first.batch_size}"
    title = {
        "kernels": f"Sparse kernels of {first.model}",
        "train": f"Training steps with sparse kernels, {first.model}",
        "inference": f"Inference with sparse kernels, {first.model}",
    }[part]
    figure = kernel_figures.speed_ups(
        [line for line in lines_of(measured) if line.first.side != UPDATE],
        title=f"{title}: {first.machine}{batch}",
        **_FIGURES[part],
    )
    table, image = folder / f"{part}.csv", folder / f"{part}.png"
    write_csv(measured, table)
    writing.write(image, figures.as_png(figure))
    return table, image
