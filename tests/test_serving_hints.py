"""Networks that are tuned, and hints, which may be wrong or hostile."""

import numpy as np
import pytest

from tests.support.engine_checks import (
    WAYS,
    check,
    computed_network,
    first,
    load,
)
from tests.support.network_library import (
    KINDS,
    built,  # noqa: F401 - a fixture
    kind_of_code,
    outputs_begin_as_nan,
)
from tests.support.network_reference import evaluate
from tests.support.networks_of_nodes import random_inputs, random_network

BATCHES = (1, 3, 16, 33, 130)
SETS = ("avx512", "avx2", "portable")


@pytest.fixture(autouse=True)
def outputs_of_no_numbers(monkeypatch):
    outputs_begin_as_nan(monkeypatch)


@pytest.fixture(scope="module")
def case():
    return computed_network()


@pytest.mark.parametrize("kind", KINDS)
def test_tuned_networks_compute_the_same(case, kind):
    network, inputs, expected = case
    with kind_of_code(kind) as name:
        with load(network, threads=2) as engine:
            if engine.instruction_set != name:
                pytest.skip(f"this processor has no {name}")
            for batch in (1, 40):
                engine.tune((batch, *inputs["x"].shape[1:]), seconds=0.02)
            hints = engine.hints()
            for batch in BATCHES:
                check(engine(**first(inputs, batch)), first(expected, batch))
        # Hints hold the faster choices.
        assert f"{name} costs 2 " in hints
        # A file keeps all hints.
        with load(network, threads=2, hints=hints) as engine:
            assert engine.hints() == hints
            for batch in BATCHES:
                check(engine(**first(inputs, batch)), first(expected, batch))


@pytest.mark.slow
def test_random_networks_are_tuned():
    for seed in range(0, 40, 3):
        network = random_network(seed)
        inputs = random_inputs(network, 33)
        expected = evaluate(network, inputs)
        with load(network, threads=1 + seed % 3) as engine:
            for batch in (1, 33):
                some = first(inputs, batch)
                shapes = [array.shape for array in some.values()]
                engine.tune(*shapes, seconds=0.02)
                check(engine(**some), first(expected, batch), seed)


def a_number(draw):
    return draw.choice(
        [
            *(
                "0",
                "1",
                "-1",
                "2",
                "3",
                "4",
                "7",
                "8",
                "16",
                "17",
                "-2147483648",
            ),
            *("2147483647", "2147483648", "99999999999999999999", "1e308", "x"),
            *("-1e308", "nan", "inf", "-inf", "1e-320", "0.5", "0x10", "", "é"),
        ]
    )


def a_hint(draw, name):
    """Draws a hint that is nearly valid, or does not fit."""

    def layout():
        return draw.choice(["p", "i", "q", ""]) + draw.choice(
            ["16", "8", "4", "0", "-8", "5", "16x", "4294967312", ""]
        )

    def number():
        return a_number(draw)

    def small():
        return str(draw.integers(-2, 12))

    def either():
        return number() if draw.random() < 0.3 else small()

    kind = draw.choice(
        ["choice", "route", "costs", "words"], p=[0.5, 0.3, *[0.1] * 2]
    )
    words = [draw.choice([name] * 6 + ["avx2", "sse", ""]), kind]
    if kind == "choice":
        words += [layout(), either(), draw.choice(list("sdgwsdgwx"))]
        words += [either() for _ in range(3)]
    elif kind == "route":
        words.append(either())
        for _ in range(draw.integers(0, 4)):
            words += [layout(), either()]
        if draw.random() < 0.7:
            words += [layout(), "-1"]
    elif kind == "costs":
        words.append(draw.choice(["1", "2", "5"]))
        words += [number() for _ in range(draw.integers(3, 5))]
    else:
        words += [number() for _ in range(draw.integers(0, 6))]
    return (
        " ".join(words[: draw.integers(1, len(words) + 1)])[:200]
        if (draw.random() < 0.2)
        else " ".join(words)
    )


def check_hints(case, hints, threads):
    network, inputs, expected = case
    with load(network, threads=threads, hints=hints) as engine:
        for batch in (1, 3, 40):
            check(
                engine(**first(inputs, batch)),
                first(expected, batch),
                hints,
            )


@pytest.mark.parametrize("seed", range(4))
def test_hints_that_are_nonsense(case, seed):
    """Wrong hints do not change results or cause errors."""
    draw = np.random.default_rng(seed)
    with kind_of_code("") as name:
        with load(case[0]) as engine:
            name = engine.instruction_set
    for turn in range(40):
        lines = [a_hint(draw, name) for _ in range(draw.integers(1, 30))]
        check_hints(case, "\n".join(lines), 1 + turn % 2)


def every(name, *words):
    """Returns hints for all instruction sets."""
    return "".join(f"{isa} {name} {' '.join(words)}\n" for isa in SETS)


HINTS = {
    "costs whose sums are infinite": every("costs", "2", *["1e308"] * 3),
    "costs below zero": every("costs", "2", *["-5"] * 3),
    "costs that are next to nothing": every("costs", "2", *["1e-320"] * 3),
    "a cut at the end": every("route", "2", "p8", "8", "p8", "-1"),
    "a cut within a residual block": every("route", "2", "p8", "5", "p8", "-1"),
    "cuts that go back": every("route", "0", *"p8 7 p8 4 p8 -1".split()),
    "a route that has no end": every("route", "0", "p8", "4"),
    "positions that follow images": "".join(
        f"{isa} route 0 i{n} 4 p{n} -1\n{isa} costs 2 1e-9 1 1\n"
        for isa, n in zip(SETS, (16, 8, 4), strict=True)
    ),
    "images that follow positions, together": "".join(
        f"{isa} route 0 p{n} 4 i{n} -1\n{isa} costs 2 1 1 1 1e-9\n"
        for isa, n in zip(SETS, (16, 8, 4), strict=True)
    ),
    **{
        f"legs of {way}, cut at an output": "".join(
            f"{isa} route {mode} {leg}{n} 2 {leg}{n} 4 {leg}{n} 6 {leg}{n} -1\n"
            f"{isa} costs 2 {costs}\n"
            for isa, n in zip(SETS, (16, 8, 4), strict=True)
        )
        for mode, leg, (way, costs) in zip(
            (0, 1, 2, 0), "ipsi", WAYS.items(), strict=True
        )
    },
    "bytes of zero": "\0" * 50 + "\n" + every("choice", "p8", "\0"),
    "a line that is long": "avx512 choice " + "p" * 100_000,
    "many lines": every("choice", "p8", "1", "s", "1", "1", "1") * 3000,
    **{
        f"a tile of {rows} x {cells} for {product}": "".join(
            every("choice", kind, str(node), product, str(rows), str(cells), b)
            for kind in ("p16", "p8", "p4", "i16", "i8", "i4")
            for node in (1, 3, 5, 8)
            for b in ("0", "4", "12", "-1", "2147483647")
        )
        for product in "sdgw"
        for rows, cells in ((0, 1), (-1, -1), (5, 2), (16, 8), (1, 2**31 - 1))
    },
}


@pytest.mark.parametrize("hints", HINTS)
def test_hints_that_are_hostile(case, hints):
    check_hints(case, HINTS[hints], 2)
