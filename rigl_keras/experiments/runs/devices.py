"""The devices of a run: one, several of a machine, or several machines."""

import logging
import os
import re

import keras
import tensorflow as tf

import rigl_keras
from rigl_keras import replicas
from rigl_keras._text import first_line

__all__ = [
    "STRATEGIES",
    "exchange_active",
    "weighted_for_replicas",
    "from_chief",
    "is_chief",
    "lost_workers",
    "make_strategy",
    "replica_count",
    "sharded",
]

_log = logging.getLogger("rigl_keras")
STRATEGIES = ("one", "mirrored", "multi_worker", "tpu")


def make_strategy(name: str) -> tf.distribute.Strategy:
    """Returns the strategy in whose scope a run is built and trained.

    Args:
        name: `"one"` device, which TensorFlow chooses; `"mirrored"`, all GPUs
            of this machine (all logical CPUs if it has no GPU);
            `"multi_worker"`, the processes that TF_CONFIG names, which must
            all be started; `"tpu"`, the TPU that TPU_NAME names, or the local
            one, with a warning: no run on a TPU has been checked.

    Returns:
        The strategy. With workers, it returns once all of them have met.

    Raises:
        ValueError: There is no strategy of this name, or what it needs is
            missing.
    """
    if name == "one":
        return tf.distribute.get_strategy()
    if name == "mirrored":
        found = (tf.config.list_logical_devices(kind) for kind in _KINDS)
        devices = next(devices for devices in found if devices)
        return tf.distribute.MirroredStrategy([d.name for d in devices])
    if name == "multi_worker":
        _cluster()
        return replicas.MultiWorkerMirroredStrategy()
    if name == "tpu":
        return _tpu_strategy()
    raise ValueError(
        f"--strategy must be one of {', '.join(STRATEGIES)}. Received: "
        f"{name!r}."
    )


_KINDS = ("GPU", "CPU")


def is_chief(name: str) -> bool:
    """Returns whether this process writes the run directory.

    Args:
        name: Name of the strategy. It may not have been made yet.

    Raises:
        ValueError: The strategy needs TF_CONFIG, which is missing or wrong.
    """
    if name != "multi_worker":
        return True
    resolver = _cluster()
    if resolver.task_type == "chief":
        return True
    first = (resolver.task_type, resolver.task_id) == ("worker", 0)
    return first and "chief" not in resolver.cluster_spec().jobs


def replica_count() -> int:
    """Returns the number of replicas of the current scope."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def from_chief(value: int) -> int:
    """Returns the chief's value in every process.

    Args:
        value: An int. Only the chief's counts.

    Returns:
        The chief's value.
    """
    strategy = tf.distribute.get_strategy()
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return value  # there is one process

    @tf.function
    def shared():
        return strategy.run(of_first, args=(tf.constant(value, tf.int64),))

    def of_first(value):
        context = tf.distribute.get_replica_context()
        first = tf.equal(context.replica_id_in_sync_group, 0)
        own = tf.where(first, value, tf.zeros_like(value))
        return context.all_reduce(tf.distribute.ReduceOp.SUM, own)

    return int(strategy.experimental_local_results(shared())[0])


def exchange_active(model: keras.Model) -> None:
    """Makes workers exchange only active gradients, for masks that stay.

    A mask update does so by itself.

    Args:
        model: A compiled model, masked or not.
    """
    strategy = tf.distribute.get_strategy()
    between = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    if between and rigl_keras.masked_layers(model):
        rigl_keras.exchange_gradients(model)


def sharded(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns a dataset that gives each worker a part of each batch."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return dataset.with_options(options)


def weighted_for_replicas(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Returns a batch with weights that make the replicas' loss its mean loss.

    A batch of n is split into parts of ceil(n / replicas), of which the last
    is shorter, and Keras takes the mean of the parts' means. Weights of
    part x replicas / n turn this into the mean over the batch.

    Args:
        x: Inputs.
        y: Targets.

    Returns:
        `(x, y, weights)`, or `(x, y)` if there is one replica.
    """
    parts = replica_count()
    if parts == 1:
        return x, y
    size = tf.shape(x)[0]
    length = -(-size // parts)
    start = tf.range(size) // length * length
    part = tf.minimum(length, size - start)
    weights = tf.cast(part * parts, tf.float32) / tf.cast(size, tf.float32)
    return x, y, weights


def lost_workers(error: tf.errors.OpError) -> list[str]:
    """Returns the other workers that an error reports as lost.

    Args:
        error: What was raised while workers trained together.

    Returns:
        Names such as `"worker 1 (host:2222)"`, or `"another worker"` if the
        error does not name one. An empty list if no worker was lost.
    """
    if not isinstance(error, _LOST):
        return []
    resolver = _cluster()
    spec = resolver.cluster_spec().as_dict()
    named = re.findall(r"/job:(\w+)/(?:replica:\d+/)?task:(\d+)", error.message)
    own = (resolver.task_type, resolver.task_id)
    others = {(job, int(task)) for job, task in named} - {own}
    return [
        f"{job} {task} ({spec[job][task]})" for job, task in sorted(others)
    ] or ["another worker"]


# What a sum over workers raises when a worker has ended.
_LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.UnavailableError,
)


def _cluster():
    """Returns the cluster that TF_CONFIG describes."""
    example = (
        '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": '
        '{"type": "worker", "index": 0}}'
    )
    try:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        spec = resolver.cluster_spec().as_dict()
        known = resolver.task_id < len(spec.get(resolver.task_type, ()))
    except (ValueError, TypeError):
        known = False
    if not known:
        raise ValueError(
            "--strategy=multi_worker needs TF_CONFIG, the same cluster and "
            f"another task in each process, such as {example}. Received: "
            f"TF_CONFIG={os.environ.get('TF_CONFIG')!r}."
        )
    return resolver


def _tpu_strategy():
    _log.warning(
        "--strategy=tpu has never been run: the authors had no TPU. Compare a "
        "short run with one of --strategy=one before you rely on its results."
    )
    name = os.environ.get("TPU_NAME", "local")
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, tf.errors.OpError) as error:
        raise ValueError(
            f"--strategy=tpu finds no TPU named {name!r} "
            f"({first_line(error)}). Set TPU_NAME, or choose another "
            "strategy."
        ) from error
