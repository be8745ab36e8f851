"""What a sparse network costs at inference, by format and runtime, measured.

    bin/benchmark_inference                      all of it, ten minutes or more
    bin/benchmark_inference --models=wide_resnet --batches=1

TensorFlow, LiteRT (TFLite) and PyTorch compute the dense product, also where
a kernel is stored sparse: zeros anywhere in it save space, and no time is
expected of them here. The compact side is faster where it does less: batch
norms are part of the convolutions, and units that sparsity has cut off are
gone. It is the measure for kernels that do skip zeros.

All sides compute the same function, which is checked before they are timed,
take the same NumPy arrays and return NumPy arrays. They alternate in one
process, so that whatever else the machine does falls on all of them; medians
are compared. Each runtime has threads of its own, on all cores, which wait
actively for some milliseconds after a call, and so slow down whoever comes
next. Therefore a turn is many calls where one is short, and PyTorch's threads
wait passively (OMP_WAIT_POLICY, unless it is set): where other programs use
the cores, active waiting makes it up to a hundred times slower.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras import arguments, artefacts, serving
from rigl_keras.compaction import fold_batch_norm, remove_dead_units
from rigl_keras.experiments import torch_network
from rigl_keras.export_report import size_of
from rigl_keras.timing import interleaved

__all__ = [
    "DENSE",
    "MODELS",
    "SIDES",
    "TORCH",
    "Comparison",
    "Measurement",
    "compare",
    "draw",
    "sparse_network",
]

MODELS = {
    "wide_resnet": functools.partial(rigl_keras.models.wide_resnet, 22, 2),
    "resnet50": functools.partial(rigl_keras.models.resnet50, 100),
}

DENSE = "SavedModel, dense"  # what the others are compared with
COMPACT = "SavedModel, sparse, compact"
TORCH = "PyTorch"
SIDES = (
    DENSE,
    "SavedModel, sparse",
    COMPACT,
    "TFLite, dense",
    "TFLite, sparse",
    TORCH,
)

_TOLERANCE = 1e-4  # difference of outputs, in units of the largest
_TURN = 0.1  # seconds that a side runs before the next one does, at least
_FEWEST = 3  # rounds of which a median is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One side on one network and batch.

    Attributes:
        model: One of `MODELS`.
        density: Fraction of its masked weights that is kept.
        batch: Examples in a call.
        side: One of `SIDES`.
        seconds: Median time of a call.
        bytes: Size of the artefact on disk; None for PyTorch, which has none.
        difference: Largest difference of the outputs from those of the Keras
            model, in units of the largest output.
        rounds: Turns of which the median was taken.
    """

    model: str
    density: float
    batch: int
    side: str
    seconds: float
    bytes: int | None
    difference: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All measurements; printing it shows tables.

    Attributes:
        measurements: `Measurement`s, sides in the order of `SIDES`.
        notes: What was done to the networks, and what could not be measured.
        environment: Versions, and the threads of each runtime.
    """

    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...]
    environment: dict

    def values(self, field: str) -> list:
        """Returns what a field of the measurements is, each value once."""
        return list(dict.fromkeys(getattr(m, field) for m in self.measurements))

    def of(self, **fields) -> Measurement | None:
        """Returns the measurement of these fields, if there is one."""
        wanted = fields.items()
        return next(
            (
                m
                for m in self.measurements
                if all(getattr(m, name) == value for name, value in wanted)
            ),
            None,
        )

    def ratio(self, measured: Measurement) -> float:
        """Returns a time in units of that of the dense SavedModel."""
        dense = self.of(
            model=measured.model,
            density=measured.density,
            batch=measured.batch,
            side=DENSE,
        )
        return measured.seconds / dense.seconds

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON."""
        content = json.dumps(dataclasses.asdict(self), indent=2)
        Path(path).write_text(content + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Comparison":
        """Returns what `save` has written."""
        content = json.loads(Path(path).read_text())
        rows = tuple(Measurement(**row) for row in content["measurements"])
        return cls(rows, tuple(content["notes"]), content["environment"])

    def __str__(self) -> str:
        def time_and_ratio(m):
            return f"{1e3 * m.seconds:9.2f} {self.ratio(m):5.2f}x"

        def megabytes(m):
            return "-" if m.bytes is None else f"{m.bytes / 1e6:.2f}"

        lines = []
        batches = self.values("batch")
        for model in self.values("model"):
            for batch in batches:
                title = f"{model}, batch {batch}: ms of a call, and of dense"
                lines += self._table(title, model, batch, time_and_ratio)
            title = f"{model}: MB on disk"
            lines += self._table(title, model, batches[0], megabytes)
        return "\n".join([*lines, *self.notes, *self._about()])

    def _table(self, title, model, batch, shown):
        densities = self.values("density")
        heads = [f"density {density:g}" for density in densities]
        lines = [title, f"  {'':28}" + "".join(f"{h:>18}" for h in heads)]
        for side in self.values("side"):
            cells = [
                self.of(model=model, density=d, batch=batch, side=side)
                for d in densities
            ]
            lines.append(
                f"  {side:28}" + "".join(f"{shown(m):>18}" for m in cells)
            )
        return [*lines, ""]

    def _about(self):
        def listed(name):
            found = self.environment[name].items()
            return ", ".join(f"{key} {value}" for key, value in found)

        rounds = self.values("rounds")
        return [
            f"Medians of {min(rounds)} to {max(rounds)} rounds, interleaved.",
            f"Threads: {listed('threads')}; {self.environment['cores']} cores.",
            f"Versions: {listed('versions')}.",
        ]


def compare(
    models: Sequence[str] = tuple(MODELS),
    densities: Sequence[float] = (0.05, 0.1, 0.2),
    batches: Sequence[int] = (1, 128),
    *,
    rounds: int = 15,
    seconds: float = 20.0,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measures all sides on some networks.

    Args:
        models: Some of `MODELS`.
        densities: Fractions of the weights kept, each in (0, 1].
        batches: Examples in a call, each at least 1.
        rounds: Turns of each side, at most.
        seconds: Time for the turns of one network, density and batch, after
            which there are no more rounds than 3.
        progress: Called with a line on what is being done.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: An argument is out of range, or a side computes something
            else than the Keras model does.

    Example:

    >>> print(compare(["wide_resnet"], [0.1], [1]))
    """
    _check(models, densities, batches, rounds, seconds)
    measurements, notes = [], []
    if not torch_network.is_installed():
        notes.append(
            f"PyTorch is not installed and not measured: "
            f"{torch_network.INSTALL}"
        )
        progress(notes[-1])
    for name in models:
        for density in densities:
            progress(f"{name} at density {density:g}: writing all formats")
            network = sparse_network(name, density)
            with tempfile.TemporaryDirectory() as folder:
                sides, sizes, note = _sides(network, Path(folder))
                notes.append(f"{name} at density {density:g}: {note}")
                for batch in batches:
                    progress(f"{name} at density {density:g}, batch {batch}")
                    taken, differences, turns = _measured(
                        network, sides, batch, rounds, seconds
                    )
                    measurements += [
                        Measurement(
                            model=name,
                            density=density,
                            batch=batch,
                            side=side,
                            seconds=taken[side],
                            bytes=sizes.get(side),
                            difference=differences[side],
                            rounds=turns,
                        )
                        for side in sides
                    ]
    return Comparison(tuple(measurements), tuple(notes), _environment())


def sparse_network(name: str, density: float) -> keras.Model:
    """Returns a network that is like a trained one, its kernels sparse.

    Its masks are of the ERK distribution. Training is what gives batch norms
    their values: gamma is drawn from U(0.5, 1.5) and beta from N(0, 0.1^2),
    so that none is 0 as `zero_init_residual` leaves it, and the statistics
    are those of a random batch.

    Args:
        name: One of `MODELS`.
        density: Fraction of the weights kept.

    Returns:
        A plain model: outside the masks the kernels are zero.
    """
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    model = rigl_keras.strip(rigl_keras.sparsify(model, density))
    random = np.random.default_rng(0)
    norms = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        size = norm.gamma.shape
        norm.gamma.assign(random.uniform(0.5, 1.5, size))
        norm.beta.assign(random.normal(0, 0.1, size))
        norm.momentum = 0.0  # one batch sets the statistics
    signature = serving.signature_of(model)
    model(signature.pack(signature.random(32)), training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def _check(models, densities, batches, rounds, seconds):
    for name, values in (
        ("models", models),
        ("densities", densities),
        ("batches", batches),
    ):
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"{name} must be one or more, each once. Received: "
                f"{list(values)}."
            )
    for name in models:
        arguments.choice("models", name, tuple(MODELS))
    for density in densities:
        arguments.number(
            "densities",
            density,
            above=0,
            at_most=1,
            rule="must be fractions of the weights kept, in (0, 1]",
        )
    for batch in batches:
        arguments.integer("batches", batch, at_least=1)
    arguments.integer("rounds", rounds, at_least=1)
    arguments.number("seconds", seconds, above=0, rule="must be above 0")


def _sides(network, folder):
    """Returns `{side: runner}`, `{side: bytes}`, and what was made compact."""
    signature = serving.signature_of(network)
    small, folding = fold_batch_norm(network)
    small, removal = remove_dead_units(small)
    norms = len(folding.folded) + len(folding.kept)
    note = (
        f"compact, {len(folding.folded)} of {norms} batch norms are folded "
        f"and {removal.parameters_after / removal.parameters_before:.1%} of "
        "the weights left, zeros included."
    )
    runners, sizes = {}, {}
    for side, model, format, sparse in (
        (DENSE, network, "saved_model", False),
        ("SavedModel, sparse", network, "saved_model", True),
        (COMPACT, small, "saved_model", True),
        ("TFLite, dense", network, "tflite", False),
        ("TFLite, sparse", network, "tflite", True),
    ):
        path = folder / side
        path.mkdir()
        artefacts.write(model, signature, path, format, sparse=sparse)
        sizes[side] = size_of(path)
        runners[side] = artefacts.load(path, format, signature, ["output_0"])
    if torch_network.is_installed():
        runners[TORCH] = _torch_runner(network)
    return runners, sizes, note


def _torch_runner(network):
    """Returns PyTorch's network in the form of the other sides."""
    compute = torch_network.torch_network(network)

    def run(arrays):
        (array,) = arrays.values()
        return {"output_0": compute(array)}

    return run


def _measured(network, sides, batch, rounds, seconds):
    """Returns seconds and differences of each side, and how many rounds."""
    signature = serving.signature_of(network)
    arrays = signature.random(batch)
    wanted = serving.outputs_of(network, signature, arrays)["output_0"]
    differences, calls, round_seconds, turns = {}, {}, 0.0, {}
    for side, run in sides.items():
        differences[side] = _difference(side, run(arrays)["output_0"], wanted)
        start = time.perf_counter()
        run(arrays)
        once = max(time.perf_counter() - start, 1e-6)
        calls[side] = math.ceil(_TURN / once)
        round_seconds += calls[side] * once
        turns[side] = functools.partial(_turn, run, arrays, calls[side])
    rounds = int(min(max(seconds / round_seconds, _FEWEST), rounds))
    taken = interleaved(turns, rounds=rounds)
    return {s: t / calls[s] for s, t in taken.items()}, differences, rounds


def _turn(run, arrays, calls):
    for _ in range(calls):
        run(arrays)


def _difference(side, got, wanted):
    """Returns how far outputs are off; not the same is an error."""
    largest = np.abs(wanted).max()
    difference = float(np.abs(got - wanted).max() / largest)
    if not difference <= _TOLERANCE:  # NaN is none
        raise ValueError(
            f"{side} disagrees with the Keras model: outputs differ by "
            f"{difference:.1e} of the largest, at most {_TOLERANCE:.0e} is "
            "rounding. There is nothing to compare; this is a defect of the "
            "runtime or of this benchmark."
        )
    return difference


def _environment():
    cores = os.cpu_count()
    chosen = tf.config.threading.get_intra_op_parallelism_threads()
    threads = {"TensorFlow": chosen or cores, "TFLite": cores}
    packages = ["tensorflow", "keras", "numpy"]
    if torch_network.is_installed():
        import torch

        threads[TORCH] = torch.get_num_threads()
        packages.append("torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "cores": cores,
        "machine": platform.machine(),
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "versions": {"python": platform.python_version(), **versions},
    }


# The figure. Colours are Okabe and Ito's, which colour-blind people can tell
# apart; hatches tell them apart without colour.

_LOOKS = {
    "SavedModel, sparse": ("#0072B2", ""),
    COMPACT: ("#56B4E9", "///"),
    "TFLite, dense": ("#D55E00", "xxx"),
    "TFLite, sparse": ("#E69F00", "..."),
    TORCH: ("#FFFFFF", ""),
}
_TITLE, _TEXT, _TICKS = 10, 9, 8  # sizes of letters


def draw(comparison: Comparison, path: str | os.PathLike) -> None:
    """Draws latencies in units of the dense SavedModel's.

    A panel for each network and batch; bars of all other sides for each
    density.

    Args:
        comparison: What `compare` returned.
        path: Image to write, of a type that matplotlib knows.
    """
    from matplotlib.figure import Figure

    models, batches = comparison.values("model"), comparison.values("batch")
    figure = Figure(
        figsize=(1 + 5 * len(batches), 1.2 + 2.9 * len(models)),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    panels = figure.subplots(len(models), len(batches), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        for axes, batch in zip(row, batches, strict=True):
            _draw_panel(axes, comparison, model, batch)
    for axes in panels[:, 0]:
        axes.set_ylabel("time of a call / dense SavedModel", fontsize=_TEXT)
    for axes in panels[-1]:
        axes.set_xlabel(
            "density (below it, the dense SavedModel's time)", fontsize=_TEXT
        )
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=_TEXT,
        handlelength=2.5,
        handleheight=1.2,
    )
    figure.savefig(path, dpi=120)


def _draw_panel(axes, comparison, model, batch):
    densities = comparison.values("density")
    others = [side for side in comparison.values("side") if side != DENSE]
    width = 0.84 / len(others)
    highest = 1.0
    for i, side in enumerate(others):
        ratios = [
            comparison.ratio(
                comparison.of(model=model, density=d, batch=batch, side=side)
            )
            for d in densities
        ]
        highest = max(highest, *ratios)
        at = np.arange(len(densities)) + (i - (len(others) - 1) / 2) * width
        colour, hatch = _LOOKS[side]
        bars = axes.bar(
            at,
            ratios,
            0.9 * width,
            label=side,
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.7,
        )
        labels = axes.bar_label(
            bars, fmt="%.2f", fontsize=_TICKS - 1, rotation=90, padding=3
        )
        for label in labels:  # the line at 1 stays off the numbers
            label.set_bbox(
                {"facecolor": "white", "edgecolor": "none", "pad": 1}
            )
    axes.axhline(
        1, color="black", lw=1.2, ls="--", label=DENSE + " (1)", zorder=0.5
    )
    dense = [
        comparison.of(model=model, density=d, batch=batch, side=DENSE)
        for d in densities
    ]
    axes.set_xticks(
        np.arange(len(densities)),
        [f"{m.density:g}\n{_milliseconds(m.seconds)}" for m in dense],
    )
    axes.set_ylim(0, 1.2 * highest)
    axes.set_title(f"{model}, batch {batch}", fontsize=_TITLE, loc="left")
    axes.tick_params(labelsize=_TICKS)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _milliseconds(seconds):
    digits = max(0, 2 - math.floor(math.log10(1e3 * seconds)))
    return f"{1e3 * seconds:,.{min(digits, 3)}f} ms"


def _check_paths(figure, json_path):
    """Refuses, before minutes are spent, what could not be written."""
    for path in filter(None, (figure, json_path)):
        if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
            raise ValueError(
                f"A file is needed, in a folder that exists. Received: {path!r}"
            )
    if not figure:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ValueError(
            "The figure needs matplotlib: install rigl_keras[experiments], "
            "or pass --figure= to draw none."
        ) from error
    types = FigureCanvasAgg.get_supported_filetypes()
    if Path(figure).suffix[1:] not in types:
        raise ValueError(
            f"--figure must end with one of {', '.join(sorted(types))}. "
            f"Received: {figure!r}."
        )


def _numbers(name, texts, kind):
    try:
        return [kind(text) for text in texts]
    except ValueError as error:
        raise ValueError(
            f"--{name} must be numbers with commas between. Received: "
            f"{','.join(texts)!r}."
        ) from error


def main() -> None:
    """Prints the tables that the command line asks for, and draws them."""
    from absl import app, flags
    from absl import logging as absl_logging

    models = flags.DEFINE_list("models", list(MODELS), "Networks to measure.")
    densities = flags.DEFINE_list(
        "densities", ["0.05", "0.1", "0.2"], "Fractions of the weights kept."
    )
    batches = flags.DEFINE_list("batches", ["1", "128"], "Examples in a call.")
    rounds = flags.DEFINE_integer("rounds", 15, "Turns of a side, at most.")
    seconds = flags.DEFINE_float(
        "seconds", 20.0, "Time for one network, density and batch."
    )
    figure = flags.DEFINE_string(
        "figure", "inference.png", "Image to draw; empty: none."
    )
    json_path = flags.DEFINE_string("json", None, "File for the numbers.")

    def run(argv):
        if len(argv) > 1:
            raise app.UsageError(f"Unexpected: {' '.join(argv[1:])}.")
        # TensorFlow tells of each SavedModel that it writes.
        absl_logging.set_verbosity(absl_logging.WARNING)
        tf.get_logger().setLevel("WARNING")
        # Read when PyTorch is imported, which is later: see the top.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            _check_paths(figure.value, json_path.value)
            comparison = compare(
                models.value,
                _numbers("densities", densities.value, float),
                _numbers("batches", batches.value, int),
                rounds=rounds.value,
                seconds=seconds.value,
                progress=functools.partial(print, file=sys.stderr, flush=True),
            )
        except ValueError as error:
            print(f"benchmark_inference: {error}", file=sys.stderr)
            sys.exit(2)
        if json_path.value:
            comparison.save(json_path.value)
        print(comparison)
        if figure.value:
            draw(comparison, figure.value)
            print(f"Figure: {figure.value}")

    app.run(run)


if __name__ == "__main__":
    main()
