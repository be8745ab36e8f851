"""Layer densities by hand, exact counts, and errors."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rigl_keras.conventions import REPORT
from rigl_keras.distributions import (
    full_name,
    layer_budgets,
    layer_counts,
    layer_densities,
)

SHAPES = {"a": (3, 3, 2, 8), "b": (10, 10), "c": (40, 10)}


def kept(shapes, densities):
    return sum(densities[n] * math.prod(s) for n, s in shapes.items())


def test_uniform_keeps_the_first_layer_dense_outside_the_budget():
    assert layer_densities(SHAPES, 0.1, "uniform") == {
        "a": 1.0,
        "b": 0.1,
        "c": 0.1,
    }


def test_uniform_all_masks_the_first_layer_too():
    assert set(layer_densities(SHAPES, 0.1, "uniform_all").values()) == {0.1}
    # 144, 100 and 400 weights; "c" dense: 0.7 x 644 - 400 of the other 244.
    got = layer_densities(SHAPES, 0.7, "uniform_all", densities={"c": 1.0})
    left = (0.7 * 644 - 400) / 244
    assert got == pytest.approx({"a": left, "b": left, "c": 1.0})
    assert list(layer_budgets(SHAPES, 0.1, "uniform_all")) == [*SHAPES]


def test_erdos_renyi_by_hand():
    # (n_in + n_out) / (n_in n_out): 10 x 10 -> 0.2, 40 x 10 -> 0.125. The sum
    # of n_in + n_out is 20 + 50 = 70, for a budget of 0.14 x 500.
    shapes = {"b": (10, 10), "c": (40, 10)}
    got = layer_densities(shapes, 0.14, "er")
    assert got == pytest.approx({"b": 0.2, "c": 0.125})


def test_erdos_renyi_kernel_counts_the_kernel():
    # Sum of dimensions / product: 16 / 144 and 20 / 100.
    shapes = {"a": (3, 3, 2, 8), "b": (10, 10)}
    got = layer_densities(shapes, 0.125, "erk")
    assert got["a"] / got["b"] == pytest.approx((16 / 144) / 0.2)
    # ER ignores height and width of the kernel.
    er = layer_densities(shapes, 0.125, "er")
    assert er["a"] / er["b"] == pytest.approx((10 / 16) / 0.2)


def test_a_layer_over_the_top_becomes_dense():
    # `small` would need more weights than it has; `large` takes the rest.
    shapes = {"small": (2, 2), "large": (100, 100)}
    got = layer_densities(shapes, 0.1, "erk")
    assert got["small"] == 1.0
    assert kept(shapes, got) == pytest.approx(0.1 * 10_004, abs=2)


@pytest.mark.parametrize("distribution", ["erk", "er"])
def test_density_one_is_all_ones(distribution):
    assert set(layer_densities(SHAPES, 1.0, distribution).values()) == {1.0}
    report = layer_densities(SHAPES, 1.0, distribution, conventions=REPORT)
    assert set(report.values()) == {1.0}


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_given_densities_count_towards_the_whole(distribution):
    got = layer_densities(
        SHAPES, 0.3, distribution, densities={"a": 0.5, "b": 0.25}
    )
    assert (got["a"], got["b"]) == (0.5, 0.25)
    total = sum(map(math.prod, SHAPES.values()))
    assert kept(SHAPES, got) == pytest.approx(0.3 * total, abs=3)


@pytest.mark.parametrize(
    "density, densities",
    [(0.1, {"c": 1.0}), (0.9, {"b": 0.1, "c": 0.1})],
)
@pytest.mark.parametrize("distribution", ["er", "erk"])
def test_unreachable(distribution, density, densities):
    with pytest.raises(ValueError, match="No densities of the other layers"):
        layer_densities(SHAPES, density, distribution, densities=densities)


@pytest.mark.parametrize("bad", [0, -0.1, 1.01, float("nan"), True, "0.1"])
def test_bad_density(bad):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        layer_densities(SHAPES, bad)


def test_bad_names():
    with pytest.raises(ValueError, match="Did you mean 'erdos_renyi'"):
        layer_densities(SHAPES, 0.1, "erdos_reny")
    with pytest.raises(ValueError, match="not a masked layer.*a, b, c"):
        layer_densities(SHAPES, 0.1, densities={"d": 0.1})
    with pytest.raises(ValueError, match="at least one kernel"):
        layer_densities({}, 0.1)


def test_largest_remainder_by_hand():
    sizes = {"a": 10, "b": 10, "c": 10}
    densities = {"a": 0.25, "b": 0.29, "c": 0.21}  # 2.5, 2.9 and 2.1
    assert layer_counts(sizes, densities, 7) == {"a": 2, "b": 3, "c": 2}
    assert layer_counts(sizes, densities, 8) == {"a": 3, "b": 3, "c": 2}
    # The total is too large, so the smallest remainder is rounded down.
    assert layer_counts(sizes, densities, 5) == {"a": 2, "b": 2, "c": 1}
    with pytest.raises(ValueError, match="total=31"):
        layer_counts(sizes, densities, 31)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=4), min_size=1),
    st.floats(0.001, 1.0),
    st.sampled_from(["er", "erk"]),
)
def test_counts_are_exact(shapes, density, distribution):
    shapes = {str(i): shape for i, shape in enumerate(shapes)}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    densities = layer_densities(shapes, density, distribution)
    assert all(0 < d <= 1 for d in densities.values())
    total = round(density * sum(sizes.values()))
    counts = layer_counts(sizes, densities, total)
    assert sum(counts.values()) == total
    for name, count in counts.items():
        assert 0 <= count <= sizes[name]
        # TF1 rounds zeros, which changes the counts by up to one in each layer.
        assert abs(count - densities[name] * sizes[name]) < 1 + len(shapes)


def test_first_layer_named_is_part_of_the_budget():
    # 0.3 x 644 = 193.2, less 72 for `a`, leaves 121.2 for 500 weights.
    got = layer_densities(SHAPES, 0.3, "uniform", densities={"a": 0.5})
    assert got == pytest.approx({"a": 0.5, "b": 121.2 / 500, "c": 121.2 / 500})
    # Otherwise the first layer is dense, and 0.3 x 500 less 50 for `b` is left.
    got = layer_densities(SHAPES, 0.3, "uniform", densities={"b": 0.5})
    assert got == pytest.approx({"a": 1.0, "b": 0.5, "c": 0.25})


@pytest.mark.parametrize(
    "density, densities",
    [(0.1, {"a": 1.0}), (0.9, {"a": 0.1}), (0.5, dict.fromkeys("abc", 0.2))],
)
def test_uniform_unreachable(density, densities):
    with pytest.raises(ValueError, match="No densities of the other layers"):
        layer_densities(SHAPES, density, "uniform", densities=densities)


def test_no_density_above_one():
    # 0.77 x 20 = 15.4, less 5 for `a`: 10.4 connections for 10 weights, which
    # rounding to whole connections puts right.
    shapes = {"a": (2, 5), "b": (10, 1)}
    for distribution in ("uniform", "er", "erk"):
        got = layer_densities(shapes, 0.77, distribution, densities={"a": 0.5})
        assert got == {"a": 0.5, "b": 1.0}


def test_given_density_may_be_left_nothing_else():
    shapes = {"a": (2, 5), "b": (10, 1)}
    given = {"a": 0.5, "b": 0.1}
    for distribution in ("uniform", "er", "erk"):
        got = layer_densities(shapes, 0.3, distribution, densities=given)
        assert got == given


def test_rounding_of_both_references_by_hand():
    # Two equal layers of 15 weights at density 0.3: 10.5 zeros and 4.5 ones.
    shapes = {"a": (3, 5), "b": (3, 5)}
    # ORIGINAL: 10 zeros, so 5 ones. REPORT: 10 zeros and 4 ones.
    assert layer_densities(shapes, 0.3, "erk")["a"] == pytest.approx(5 / 15)
    assert layer_densities(shapes, 0.3, "erk", conventions=REPORT)[
        "a"
    ] == pytest.approx(4 / 15)


def test_dense_layers_by_hand():
    # 2 x 2 at raw 1 and 20 x 20 at raw 0.1; 0.25 x 404 is 101 ones.
    # epsilon = 101 / (4 + 40) > 1: the small one is dense, 97 are left.
    shapes = {"small": (2, 2), "large": (20, 20)}
    for distribution in ("er", "erk"):
        got = layer_densities(shapes, 0.25, distribution)
        assert got == pytest.approx({"small": 1.0, "large": 97 / 400})


def test_order_is_the_models():
    shapes = {name: (4, 4) for name in "zyxa"}
    for distribution in ("uniform", "er", "erk"):
        assert list(layer_densities(shapes, 0.5, distribution)) == [*"zyxa"]


def test_short_names():
    for short, name in (("er", "erdos_renyi"), ("erk", "erdos_renyi_kernel")):
        assert layer_densities(SHAPES, 0.2, short) == layer_densities(
            SHAPES, 0.2, name
        )


@pytest.mark.parametrize("bad", [0, -0.1, 1.01, float("nan"), True, "0.1"])
def test_bad_given_density(bad):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\].*b="):
        layer_densities(SHAPES, 0.1, densities={"b": bad})


@pytest.mark.parametrize("bad", [None, 3, ["erk"]])
def test_distribution_is_a_name(bad):
    with pytest.raises(ValueError, match="distribution must be one of"):
        layer_densities(SHAPES, 0.1, bad)


@pytest.mark.parametrize("shape", [(), (5,), (5, 0)])
@pytest.mark.parametrize("distribution", ["er", "erk"])
def test_shape_of_no_kernel(shape, distribution):
    with pytest.raises(ValueError, match="odd"):  # the layer by name
        layer_densities({"b": (10, 10), "odd": shape}, 0.1, distribution)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), min_size=1),
    st.data(),
)
def test_counts_stay_within_one_of_their_quotas(layers, data):
    sizes = {str(i): size for i, (size, _) in enumerate(layers)}
    densities = {str(i): density for i, (_, density) in enumerate(layers)}
    quotas = {name: densities[name] * size for name, size in sizes.items()}
    total = round(sum(quotas.values()))
    counts = layer_counts(sizes, densities, total)
    assert sum(counts.values()) == total
    for name, count in counts.items():
        assert abs(count - quotas[name]) < 1 + 1e-9
        assert 0 <= count <= sizes[name]
    # Any total up to the number of weights is met.
    total = data.draw(st.integers(0, sum(sizes.values())))
    counts = layer_counts(sizes, densities, total)
    assert sum(counts.values()) == total
    assert all(0 <= count <= sizes[name] for name, count in counts.items())


def test_budgets_are_densities_and_counts():
    """Budgets apply to masked layers, and count units if masks have these."""
    shapes = {"a": (3, 3, 3, 16), "b": (3, 3, 16, 16), "c": (16, 10)}
    for distribution in ("uniform", "erk"):
        budgets = layer_budgets(shapes, 0.1, distribution)
        solved = layer_densities(shapes, 0.1, distribution)
        assert list(budgets) == list("abc" if distribution == "erk" else "bc")
        sizes = {n: math.prod(shapes[n]) for n in budgets}
        total = round(0.1 * sum(sizes.values()))
        assert {n: b.density for n, b in budgets.items()} == {
            n: solved[n] for n in budgets
        }
        assert {n: b.count for n, b in budgets.items()} == layer_counts(
            sizes, solved, total
        )
    numbers = {"a": 48, "b": 256, "c": 160}  # whole kernels, and weights
    budgets = layer_budgets(
        shapes, 0.2, densities={"c": 1.0}, group_sizes=numbers
    )
    assert budgets["c"] == (1.0, 160)
    exact = sum(budgets[n].density * number for n, number in numbers.items())
    assert sum(b.count for b in budgets.values()) == round(exact)
    assert all(0 < b.count <= numbers[n] for n, b in budgets.items())


def test_groups_keep_a_number_of_their_own():
    """round(density x size), at least one, independently of other layers."""
    shapes = {"a": (3, 3, 3, 16), "b": (3, 3, 16, 16), "c": (16, 10)}
    fan_in = {"a": 27, "b": 144, "c": 16}
    budgets = layer_budgets(
        shapes, 0.02, group_sizes=fan_in, apart=["a", "b", "c"]
    )
    for name, (density, count) in budgets.items():
        assert count == max(1, round(density * fan_in[name]))
    assert {n: b.count for n, b in budgets.items()} == {"a": 1, "b": 2, "c": 2}
    least = layer_budgets(shapes, 0.005, group_sizes=fan_in, apart=fan_in)
    assert all(0.5 > b.density * fan_in[n] for n, b in least.items())
    assert all(budget.count == 1 for budget in least.values())
    # Other layers share a separate total: 2:4 and single weights.
    sizes = {"a": 432, "b": 4, "c": 160}
    budgets = layer_budgets(
        shapes, 0.45, densities={"b": 0.5}, group_sizes=sizes, apart={"b"}
    )
    assert budgets["b"] == (0.5, 2)
    assert budgets["a"].count + budgets["c"].count == round(
        0.45 * (432 + 2304 + 160) - 1152
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(density=2.0), "must be in .0, 1.*density=2.0"),
        (dict(density=1e-9), "rounds to no connection"),
        (dict(group_sizes={"a": 9}), "name every masked layer"),
        (dict(group_sizes={"a": 9, "b": 17}), "b must be an int from 1 to 16"),
        (dict(group_sizes={"a": 9, "b": 0}), "b must be an int from 1 to 16"),
        (dict(group_sizes=3), "group_sizes must map"),
    ],
)
def test_bad_budgets(options, message):
    shapes = {"a": (3, 3, 4, 4), "b": (4, 4)}
    with pytest.raises(ValueError, match=message):
        layer_budgets(shapes, **{"density": 0.5, **options})


def test_full_names():
    assert full_name("er") == "erdos_renyi" == full_name("erdos_renyi")
    with pytest.raises(ValueError, match="Did you mean 'uniform'"):
        full_name("unifrom")
