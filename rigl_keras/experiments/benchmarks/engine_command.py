"""Measures which engine serves sparse networks the fastest.

    bin/benchmark engines                        everything, some hours
    bin/benchmark engines --models=wide_resnet --densities=0.1
    bin/benchmark engines --engines=native,deepsparse,openvino
    bin/benchmark engines --isa=avx2             without AVX-512, for engines
                                                 with such an option

Each engine runs in a separate process. If its packages conflict with
TensorFlow's, it also has a separate environment, which the first command
creates in the cache. All engines get the same weights and images, and must
agree with the Keras model before they are timed. They take turns in random
order. During a turn the processes of all other engines are stopped, so that
their threads cannot wait actively. An engine that cannot be measured is
listed with the reason.

After each network, density and batch size, the results are written to
`engines.json` and `engines.csv` in the folder `--output`. The same command
continues from there, and draws `engines.png`. `--again` measures everything
again.

pip may install PyTorch with some GB of CUDA libraries. To avoid this, set
PIP_EXTRA_INDEX_URL to an index of CPU builds.
"""

import functools
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from rigl_keras import _checks, _figure_style, kernels
from rigl_keras.distributions import DISTRIBUTIONS
from rigl_keras.experiments import exits
from rigl_keras.experiments.benchmarks.engines.catalogue import ENGINES
from rigl_keras.experiments.benchmarks.engines.environments import (
    UnavailableError,
    folder_of_environments,
    own_python,
)
from rigl_keras.experiments.benchmarks.engines.network_files import (
    MODELS,
    network_of,
)
from rigl_keras.experiments.benchmarks.engines.records import (
    Case,
    LeftOut,
    Machine,
    Records,
    table,
)
from rigl_keras.experiments.benchmarks.engines.serving import (
    measured_case,
    serving,
)
from rigl_keras.experiments.benchmarks.inference_command import (
    check_densities,
    check_each_once,
)
from rigl_keras.experiments.benchmarks.kernel_command import (
    prepared_folder,
)
from rigl_keras.experiments.progress_bar import ProgressBar, say
from rigl_keras.experiments.runs import provenance

__all__ = ["measure_engines", "run"]

ISAS = ("avx2", "avx512")


def measure_engines(
    models: Sequence[str] = tuple(MODELS),
    densities: Sequence[float] = (0.05, 0.1, 0.2),
    batches: Sequence[int] = (1, 16, 128),
    engines: Sequence[str] = tuple(ENGINES),
    *,
    distributions: Sequence[str] = ("erdos_renyi_kernel",),
    rounds: int = 15,
    seconds: float = 60.0,
    isa: str | None = None,
    folder: Path | None = None,
    again: bool = False,
    install: bool = True,
    say: Callable[[str], None] = say,
) -> Records:
    """Measures engines on some networks.

    Args:
        models: Names from `network_files.MODELS`.
        densities: Fractions of the weights kept, each in (0, 1].
        batches: Examples in a call, each at least 1.
        engines: Names from `catalogue.ENGINES`.
        distributions: How density is spread over layers.
        rounds: Turns of each engine, at most.
        seconds: Time for the turns of one network and batch size. Once it has
            passed, no round begins after the third.
        isa: Newest instruction set that engines may use, avx2 or avx512.
            None: all that the processor has.
        folder: Folder of the results, which this call extends. None: results
            are not written.
        again: Whether to measure existing results again.
        install: Whether to create missing environments.
        say: Called with lines about the progress, and with tables.

    Returns:
        All results in the folder.

    Raises:
        ValueError: An argument is out of range, or the folder has results of
            another machine.
    """
    _check(models, densities, batches, engines, distributions)
    _checks.integer("rounds", rounds, at_least=1)
    _checks.number("seconds", seconds, above=0, rule="must be above 0")
    _checks.choice("isa", isa, (None, *ISAS))
    if isa:  # for the files that this process writes, too
        os.environ["RIGL_KERAS_ISA"] = isa
    machine, commit = _machine(isa), provenance.commit()
    records = Records(folder, machine)
    pythons, missing = _pythons(engines, install, say)
    networks = {
        (model, distribution, density): [
            Case(model, distribution, density, batch) for batch in batches
        ]
        for model in models
        for distribution in distributions
        for density in densities
    }
    to_do = {
        case
        for cases in networks.values()
        for case in cases
        if again or not records.has(case, list(pythons))
    }
    with ProgressBar(unit="cases", total=len(to_do)) as bar:
        for about, cases in networks.items():
            for case in cases:
                if case not in to_do:
                    say(
                        table(case, records.of(case), records.left_out_of(case))
                    )
            cases = [case for case in cases if case in to_do]
            if not cases:
                continue
            bar.show_left(len(to_do) * seconds, f"{about[0]}: a network")
            with serving(
                network_of(*about),
                {name: ENGINES[name] for name in ENGINES if name in pythons},
                pythons=pythons,
                batches=[case.batch for case in cases],
                threads=machine.threads,
                isa=isa,
            ) as served:
                for case in cases:
                    measured, left_out = measured_case(
                        served,
                        case,
                        machine,
                        commit,
                        rounds=rounds,
                        seconds=seconds,
                        doing=functools.partial(
                            bar.show_left, len(to_do) * seconds
                        ),
                    )
                    left_out += _left_out(case, machine, missing)
                    records.put(case, measured, left_out)
                    say(table(case, measured, left_out))
                    bar.advance()
                    to_do.remove(case)
    return records


def _check(models, densities, batches, engines, distributions):
    check_each_once(
        {
            "models": models,
            "densities": densities,
            "batches": batches,
            "engines": engines,
            "distributions": distributions,
        }
    )
    for name in models:
        _checks.choice("models", name, tuple(MODELS))
    for name in engines:
        _checks.choice("engines", name, tuple(ENGINES))
    for name in distributions:
        _checks.choice("distributions", name, DISTRIBUTIONS)
    check_densities(densities)
    for batch in batches:
        _checks.integer("batches", batch, at_least=1)


def _pythons(names, install, say):
    """Returns the Python of each engine, and why other engines have none."""
    pythons: dict[str, str] = {}
    missing: dict[str, str] = {}
    folder = folder_of_environments()
    for name in names:
        environment = ENGINES[name].environment
        try:
            pythons[name] = (
                own_python()
                if environment is None
                else environment.python(folder, install=install, say=say)
            )
        except UnavailableError as error:
            missing[name] = str(error)
            say(f"{ENGINES[name].label} is not measured: {error}.")
    return pythons, missing


def _left_out(case, machine, missing: Mapping[str, str]):
    return [
        LeftOut(
            case=case,
            machine=machine,
            engine=name,
            reason=reason,
            tried=False,
        )
        for name, reason in missing.items()
    ]


def _machine(isa):
    best = platform.machine()
    if kernels.load() is not None:
        best = kernels.instruction_set()
    threads = len(os.sched_getaffinity(0))
    return Machine(provenance.processor(), isa or best, threads)


# The command.


def run(given: Mapping[str, Any], output: Any, argv: Sequence[str]) -> None:
    """Runs the command after its flags have been parsed.

    Args:
        given: The flags by name, as `benchmark_flags` defines them.
        output: The flag of the folder to write to, if there is one.
        argv: The command line without flags.
    """
    from absl import logging

    logging.set_verbosity(logging.WARNING)
    tf.get_logger().setLevel("ERROR")
    exits.check_flags_alone(argv)
    values = {name: flag.value for name, flag in given.items()}
    for name, kind in (("densities", float), ("batches", int)):
        values[name] = exits.numbers(name, values[name], kind)
    folder = prepared_folder(output.value) if output.value else None
    records = measure_engines(**values, folder=folder)
    if folder and records.measurements:
        # Imported here, as it needs matplotlib.
        from rigl_keras.experiments.benchmarks.engines.engine_figure import (
            engine_figure,
        )

        image = folder / "engines.png"
        _figure_style.save(engine_figure(records.measurements), image)
        for path in (folder / "engines.csv", folder / "engines.json", image):
            say(f"Written: {path}")
