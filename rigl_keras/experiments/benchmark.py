"""What sparsity costs: the training step and the mask update, measured.

    bin/benchmark                  all tables, half an hour on 2 cores
    bin/benchmark --part=step      the training step alone
    bin/benchmark --part=compiled  it under XLA, and in blocks of ten
    bin/benchmark --part=update    the mask update alone
    bin/benchmark kernels          what it saves, too: layer by layer,
    bin/benchmark train            in training and
    bin/benchmark inference        at inference (`benchmark_kernels`)
    bin/benchmark plans            and what it keeps in memory for that, by
                                   sizes of images (`benchmark_plans`)

Both sides of a comparison alternate in one process, so that whatever else
the machine does falls on both; medians of their times are compared.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf

import rigl_keras
from rigl_keras import topology
from rigl_keras.experiments import data, exits
from rigl_keras.timing import interleaved

__all__ = ["input_pipeline", "mask_update", "stepper", "training_step"]


def training_step(
    *,
    depth: int = 22,
    width: int = 2,
    batch_size: int = 128,
    density: float = 0.1,
    rounds: int = 15,
    jit_compile: bool = False,
    steps_per_execution: int = 1,
) -> dict[str, float]:
    """Times a training step of a wide ResNet, dense and sparse with RigL.

    Both go through the function that `fit` calls for a batch. No update falls
    on the timed steps of `RigL`; `update` is a step that is one.

    Args:
        depth: Depth of the network.
        width: Width of the network.
        batch_size: Images in a step.
        density: Fraction of the weights kept.
        rounds: Timed calls of each.
        jit_compile: As in `model.compile`.
        steps_per_execution: As in `model.compile`; so many steps are a call.

    Returns:
        `{"dense" | "RigL" | "update": median seconds of a step}`.
    """
    options = {
        "jit_compile": jit_compile,
        "steps_per_execution": steps_per_execution,
    }
    images = np.random.default_rng(0).standard_normal(
        (batch_size, 32, 32, 3), np.float32
    )
    labels = np.arange(batch_size) % 10
    batches = tf.data.Dataset.from_tensors((images, labels)).repeat()
    dense = rigl_keras.models.wide_resnet(depth, width)
    sides = {
        "dense": stepper(dense, batches, None, options),
        "RigL": stepper(
            rigl_keras.sparsify(dense, density),
            batches,
            rigl_keras.RigL(frequency=10**6, end_step=10**7),
            options,
        ),
        "update": stepper(
            rigl_keras.sparsify(dense, density),
            batches,
            rigl_keras.RigL(frequency=1, end_step=10**7),
            options,
        ),
    }
    seconds = interleaved(sides, rounds=rounds)
    return {name: s / steps_per_execution for name, s in seconds.items()}


def mask_update(*, density: float = 0.1, rounds: int = 7) -> dict[str, float]:
    """Times one update of all masks of a ResNet-50, and one by full sorts.

    The kernels are those of the ResNet-50 for 32x32 images, 54 of them with
    23,652,032 weights. The other side ranks them with `tf.argsort`.

    Args:
        density: Fraction of the weights kept, uniform.
        rounds: Timed updates of each.

    Returns:
        `{"selection" | "sort": median seconds}`.
    """
    draw = np.random.default_rng(0)
    kernels = []
    for shape in _resnet50_shapes():
        mask = (draw.random(shape, np.float32) < density).astype(np.float32)
        weights = draw.standard_normal(shape, np.float32) * mask
        gradient = draw.standard_normal(shape, np.float32)
        kernels.append(tuple(map(tf.constant, (mask, weights, gradient))))

    def update(move):
        # All results are summed: what is not used would not be computed.
        return tf.function(
            lambda: tf.add_n(
                [
                    tf.reduce_sum(move(mask, tf.abs(weights), tf.abs(gradient)))
                    for mask, weights, gradient in kernels
                ]
            )
        )

    def select(mask, drop_scores, grow_scores):
        return topology.drop_and_grow(
            mask, drop_scores, grow_scores, drop_fraction=0.3
        )[0]

    selection, sort = update(select), update(_drop_and_grow_by_sorting)
    # The same sums, up to the order of addition: both do the same work.
    np.testing.assert_allclose(float(selection()), float(sort()), rtol=1e-5)
    return interleaved(
        {
            "selection": lambda: selection().numpy(),
            "sort": lambda: sort().numpy(),
        },
        rounds=rounds,
    )


def input_pipeline(
    name: str = "cifar10", *, data_dir: str | None = None, steps: int = 300
) -> float:
    """Returns how many images a second the training pipeline alone yields.

    Args:
        name: One of `data.DATASETS`.
        data_dir: Folder of the prepared data.
        steps: Batches of 128 that are timed.

    Returns:
        Images per second.
    """
    examples = data.load(name, data_dir=data_dir)
    batches = iter(examples.train(batch_size=128, seed=0, epochs=10))
    for _ in range(10):
        next(batches)
    start = time.perf_counter()
    images = sum(int(next(batches)[1].shape[0]) for _ in range(steps))
    return images / (time.perf_counter() - start)


def stepper(
    model: keras.Model,
    batches: tf.data.Dataset,
    method: rigl_keras.MaskUpdate | None,
    options: Mapping,
) -> Callable[[], None]:
    """Returns a function that trains a model on one batch, as `fit` does.

    Args:
        model: A model, dense or masked; it is compiled.
        batches: Endless pairs of images and labels.
        method: What updates its masks, if anything does.
        options: For `model.compile`.
    """
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **options,
    )
    model.optimizer.build(model.trainable_variables)
    model.test_step(next(iter(batches)))  # builds the metrics, traces nothing
    model.make_train_function(force=True)
    if method is not None:
        method.set_model(model)
        method.set_params({"epochs": 1, "steps": 10**7, "verbose": 0})
        method.on_train_begin()
        method.on_epoch_begin(0)
    iterator: Iterator = iter(batches)

    def step():
        float(model.train_function(iterator)["loss"])

    return step


def _drop_and_grow_by_sorting(mask, drop_scores, grow_scores):
    """Returns the new mask of an update at fraction 0.3, by two sorts."""
    active = tf.reshape(mask, [-1]) > 0
    size = tf.size(active)
    ones = tf.math.count_nonzero(active, dtype=tf.int32)
    count = tf.cast(tf.floor(0.3 * tf.cast(ones, tf.float64)), tf.int32)

    def best(scores, among, number):
        scores = tf.where(among, tf.reshape(scores, [-1]), -np.inf)
        order = tf.argsort(scores, direction="DESCENDING", stable=True)
        return tf.scatter_nd(
            order[:number, tf.newaxis], tf.ones([number], tf.bool), [size]
        )

    kept = best(drop_scores, active, ones - count)
    new = kept | best(grow_scores, ~kept, count)
    return tf.reshape(tf.cast(new, mask.dtype), tf.shape(mask))


def _resnet50_shapes():
    """Yields the kernel shapes of the report's ResNet-50, 100 classes."""
    yield 3, 3, 3, 64
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield 1, 1, channels, width
            yield 3, 3, width, width
            yield 1, 1, width, 4 * width
            if block == 0:
                yield 1, 1, channels, 4 * width
            channels = 4 * width
    yield channels, 100


def _print_steps(said, batch_size, rounds, **options):
    seconds = training_step(batch_size=batch_size, rounds=rounds, **options)
    print(
        f"Training step, WRN-22-2 at batch {batch_size}{said}, median of "
        f"{rounds}, interleaved"
    )
    for name, label in (
        ("dense", "dense"),
        ("RigL", "RigL at density 0.1, a step without update"),
        ("update", "RigL at density 0.1, a step that is an update"),
    ):
        print(
            f"  {label:46}{1e3 * seconds[name]:9.1f} ms"
            f"{seconds[name] / seconds['dense']:8.3f}x",
            flush=True,
        )
    return seconds


def main() -> None:
    """Prints the tables that the command line asks for."""
    from absl import app, flags

    # It measures steps of this module.
    from rigl_keras.experiments import benchmark_kernels, benchmark_plans

    if sys.argv[1:2] == ["plans"]:
        run_part = exits.one_line(
            "benchmark plans", benchmark_plans.define_command()
        )
        flags.adopt_module_key_flags(benchmark_plans)  # for --help
        app.run(run_part, argv=[sys.argv[0], *sys.argv[2:]])
        return
    if sys.argv[1:2] and sys.argv[1] in benchmark_kernels.PARTS:
        run_part = benchmark_kernels.define_command(sys.argv[1])
        flags.adopt_module_key_flags(benchmark_kernels)  # for --help
        run_part = exits.one_line(f"benchmark {sys.argv[1]}", run_part)
        app.run(run_part, argv=[sys.argv[0], *sys.argv[2:]])
        return
    part = flags.DEFINE_enum(
        "part",
        "all",
        ["all", "step", "compiled", "update", "input"],
        "What to measure.",
    )
    batch_size = flags.DEFINE_integer("batch_size", 128, "Images in a step.")
    rounds = flags.DEFINE_integer("rounds", 15, "Timed steps of each side.")
    data_dir = flags.DEFINE_string("data_dir", None, "Prepared data sets.")

    def run(argv):
        if len(argv) > 1:
            print(
                "benchmark: What to measure is named before all flags, one of "
                f"{', '.join(benchmark_kernels.PARTS)} and plans; without it "
                f"--part counts. Received: {argv[1]!r}.",
                file=sys.stderr,
            )
            sys.exit(2)
        rate = None
        if part.value in ("all", "step"):
            seconds = _print_steps("", batch_size.value, rounds.value)
            rate = batch_size.value / seconds["RigL"]
        if part.value in ("all", "compiled"):
            few = max(1, rounds.value // 3)
            for options in (
                {"jit_compile": True},
                {"steps_per_execution": 10},
            ):
                said = ", ".join(f"{k}={v}" for k, v in options.items())
                _print_steps(f", {said}", batch_size.value, few, **options)
        if part.value in ("all", "update"):
            seconds = mask_update()
            print("Mask update, all 54 kernels of ResNet-50 (23.7 M weights)")
            for name, label in (
                ("sort", "by full sorts"),
                ("selection", "by selection, as the library does"),
            ):
                print(
                    f"  {label:46}{1e3 * seconds[name]:9.1f} ms"
                    f"{seconds[name] / seconds['sort']:8.3f}x"
                )
        if part.value in ("all", "input"):
            try:
                images = input_pipeline(data_dir=data_dir.value)
            except (ValueError, data.DatasetUnavailableError) as error:
                print(f"Input pipeline not measured: {error}")
                return
            print("Input pipeline, CIFAR-10 with augmentation, batch 128")
            print(f"  {'alone':46}{images:9.0f} images/s")
            if rate:
                print(f"  {'the training step above':46}{rate:9.0f} images/s")

    app.run(exits.one_line("benchmark", run))


if __name__ == "__main__":
    main()
