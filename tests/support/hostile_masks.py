"""Random calls of functions of masks, scores and shares, and their checks."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from rigl_keras import redistribution, scores, topology
from rigl_keras.conventions import REPORT
from support.hostile import mixed, of_one_shape, part, presets, step

# Masks.


def best(scores, count, among):
    """Returns the `count` highest among some; ties go to the lower index."""
    flat, among = np.ravel(scores).astype(np.float64), np.ravel(among)
    order = sorted(np.flatnonzero(among), key=lambda i: (-flat[i], i))
    chosen = np.zeros(flat.shape, bool)
    chosen[order[: int(count)]] = True
    return chosen.reshape(np.shape(scores))


def check_highest(got, scores, count, among):
    """Checks which entries are the highest."""
    assert got.dtype == tf.bool
    assert (got.numpy() == best(scores, count, np.asarray(among) > 0)).all()


def rounded(n, fraction, conventions):
    """Returns a share of a number, rounded as conventions say."""
    exact = np.float64(n) * np.float64(float(fraction))
    round_it = math.ceil if conventions is REPORT else math.floor
    return round_it(exact)


def after_drop(active, scores, fraction, conventions):
    """Returns what is kept of a mask."""
    count = rounded(active.sum(), fraction, conventions)
    scores = np.asarray(scores, np.float64)
    if conventions is not REPORT:
        return active & ~best(-scores, count, active)
    ranked = np.where(active, scores, 0)
    count += (~active).sum()
    return active & ~best(-ranked, count, np.ones_like(active))


def after_growth(active, kept, scores, count, conventions):
    """Returns a mask after growth, and what has grown."""
    scores = np.asarray(scores, np.float64)
    if conventions is not REPORT:
        joined = best(scores, count, ~kept)
        return kept | joined, joined & ~active
    ranked = np.where(kept, 0, scores)
    joined = best(ranked, count, np.ones_like(kept))
    return kept | joined, joined


def check_drop(got, active, scores, drop_fraction, conventions):
    """Checks what is kept of a mask."""
    active = np.asarray(active) > 0
    want = after_drop(active, scores, drop_fraction, conventions)
    assert (got.numpy() == want).all()


def check_grow(got, active, kept, scores, count, conventions):
    """Checks a mask after growth, and what has grown."""
    active, kept = np.asarray(active) > 0, np.asarray(kept) > 0
    want = after_growth(active, kept, scores, count, conventions)
    for one, other in zip(got, want, strict=True):
        assert (one.numpy() == other).all()


def check_drop_and_grow(
    got, mask, drop_scores, grow_scores, drop_fraction, grow_count, conventions
):
    """Checks a mask after an update, and what has grown."""
    active = np.asarray(mask) > 0
    kept = after_drop(active, drop_scores, drop_fraction, conventions)
    if grow_count is None:
        grow_count = active.sum() - kept.sum()
    want = after_growth(active, kept, grow_scores, grow_count, conventions)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == np.asarray(mask).dtype
        assert (one.numpy() == other).all()


LAYERS = [np.eye(3, 4), np.array([1, 1, 0, 1])]
FIRST = [np.arange(12.0).reshape(3, 4), np.array([2.0, 1.0, 9.0, 1.0])]
SECOND = [1 / (1 + FIRST[0]), np.array([0.0, 5.0, 4.0, 3.0])]


def no_growth(dropped, free):
    """Lets no connection grow."""
    return [0, 0]


def check_update(
    got, masks, drop_scores, grow_scores, drop_fraction, shares, grow_counts,
    conventions,
):  # fmt: skip
    """Checks the masks of several layers after an update."""
    if shares is not None and conventions is REPORT:
        return  # a layer may drop less
    layers = zip(masks, drop_scores, grow_scores, strict=True)
    for *moved, layer in zip(*got, layers, strict=True):
        count = None if grow_counts is None else 0
        check_drop_and_grow(moved, *layer, drop_fraction, count, conventions)


def check_drop_count(got, mask, drop_fraction, conventions):
    """Checks the number of connections that are dropped."""
    ones = np.count_nonzero(np.asarray(mask))
    assert int(got) == rounded(ones, drop_fraction, conventions) <= ones


def check_drop_fractions(got, masks, shares, drop_fraction, conventions):
    """Checks the range of the drop fractions of layers."""
    assert len(got) == len(masks)
    assert all(0 <= float(f) <= float(drop_fraction) for f in got)


# Scores and shares.

floats = st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4).map(
    lambda values: np.array(values, np.float32)
)
counts = st.lists(st.integers(0, 50), min_size=2, max_size=2)


def check_magnitude(got, **arguments):
    """Checks magnitudes."""
    (values,) = arguments.values()
    with np.errstate(over="ignore"):
        values = np.asarray(values, got.dtype.as_numpy_dtype)
    np.testing.assert_array_equal(got, np.abs(values))
    assert not (np.asarray(got) < 0).any()


def check_saliency(got, kernel, gradient):
    """Checks magnitudes of products."""
    # Some devices flush subnormal numbers to zero.
    want = np.abs(kernel * gradient)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-37)


def check_random(got, shape, key, step):
    """Checks the range of random scores, and that they repeat."""
    assert got.shape == tuple(shape) and got.dtype == tf.float32
    assert (0 <= got.numpy()).all() and (got.numpy() < 1).all()
    again = scores.random(shape, key=key, step=step)
    assert (got.numpy() == again.numpy()).all()


def check_mean(got, statistic, mask):
    """Checks the mean magnitude of what is on."""
    active = np.asarray(mask) > 0
    values = np.abs(np.asarray(statistic, np.float64))[active]
    assert float(got) == pytest.approx(values.mean() if values.size else 0)


def check_shares(got, values):
    """Checks that shares of some values sum to 1."""
    assert got.shape == (len(values),) and (got.numpy() >= 0).all()
    assert float(tf.reduce_sum(got)) == pytest.approx(1)


def check_shares_of(got, kernels):
    """Checks that shares of some kernels sum to 1."""
    check_shares(got, kernels)


def check_state(got, state, connections):
    """Checks the state of a correction."""
    assert got.shape == (4,) and float(got[2]) == state[2] + 1
    assert float(got[1]) == state[1] + state[3] - float(connections)


def check_grow_counts(got, shares, dropped, free, correction, conventions):
    """Checks how many connections grow in each layer."""
    assert (got.numpy() >= 0).all() and (got.numpy() <= free).all()
    if conventions is not REPORT:
        assert got.numpy().sum() == sum(dropped)


def check_corrected(got, correction, missing, mean_missing):
    """Checks a correction, of which a quarter is kept."""
    want = 0.25 * float(correction) + 0.75 * float(missing)
    assert float(got) == pytest.approx(want + float(mean_missing))


CASES = {
    "magnitude": (scores.magnitude, mixed(kernel=floats), check_magnitude, 200),
    "gradient_magnitude": (
        scores.gradient_magnitude,
        mixed(gradient=floats),
        check_magnitude,
        100,
    ),
    "saliency": (
        scores.saliency,
        mixed(kernel=floats, gradient=floats),
        check_saliency,
        200,
    ),
    "random": (
        scores.random,
        mixed(
            shape=st.lists(st.integers(0, 5), max_size=3),
            key=st.integers(0, 2**32),
            step=step,
        ),
        check_random,
        300,
    ),
    "select_highest": (
        topology.select_highest,
        of_one_shape(
            dict(scores="scores", among="mask"), count=st.integers(0, 12)
        ),
        check_highest,
        300,
    ),
    "drop": (
        topology.drop,
        of_one_shape(
            dict(active="mask", scores="scores"),
            drop_fraction=part,
            conventions=presets,
        ),
        check_drop,
        250,
    ),
    "grow": (
        topology.grow,
        of_one_shape(
            dict(active="mask", kept="mask", scores="scores"),
            count=st.integers(0, 12),
            conventions=presets,
        ),
        check_grow,
        200,
    ),
    "drop_and_grow": (
        topology.drop_and_grow,
        of_one_shape(
            dict(mask="mask", drop_scores="scores", grow_scores="scores"),
            drop_fraction=part,
            grow_count=st.none() | st.integers(0, 12),
            conventions=presets,
        ),
        check_drop_and_grow,
        300,
    ),
    "update_masks": (
        topology.update_masks,
        mixed(
            masks=st.just(LAYERS),
            drop_scores=st.sampled_from([FIRST, SECOND]),
            grow_scores=st.sampled_from([FIRST, SECOND]),
            drop_fraction=part,
            shares=st.sampled_from([None, [0.5, 0.5], [0.1, 0.9], [1.0]]),
            grow_counts=st.sampled_from([None, no_growth]),
            conventions=presets,
        ),
        check_update,
        60,
    ),
    "drop_count": (
        topology.drop_count,
        of_one_shape(
            dict(mask="mask"),
            drop_fraction=part,
            conventions=presets,
        ),
        check_drop_count,
        200,
    ),
    "layer_drop_fractions": (
        topology.layer_drop_fractions,
        mixed(
            masks=st.just([np.eye(3), np.ones([2, 2])]),
            shares=st.sampled_from([[0.5, 0.5], [0.1, 0.9], [1.0]]),
            drop_fraction=part,
            conventions=presets,
        ),
        check_drop_fractions,
        200,
    ),
    "layer_mean": (
        redistribution.layer_mean,
        of_one_shape(dict(statistic="scores", mask="mask")),
        check_mean,
        200,
    ),
    "shares": (
        redistribution.shares,
        mixed(values=st.lists(st.floats(0, 9), max_size=4)),
        check_shares,
        200,
    ),
    "mean_shares": (
        redistribution.mean_shares,
        mixed(statistics=st.just(FIRST), masks=st.just(LAYERS)),
        lambda got, statistics, masks: check_shares(got, masks),
        100,
    ),
    "nonzero_shares": (
        redistribution.nonzero_shares,
        mixed(kernels=st.just(LAYERS)),
        check_shares_of,
        50,
    ),
    "next_correction": (
        redistribution.next_correction,
        mixed(
            state=st.just([1.0, 2.0, 3.0, 90.0]),
            connections=st.integers(0, 100),
        ),
        check_state,
        100,
    ),
    "grow_counts": (
        redistribution.grow_counts,
        mixed(
            shares=st.sampled_from([[0.5, 0.5], [0.1, 0.9], [0.2, 0.2], [1.0]]),
            dropped=counts,
            free=counts,
            correction=st.floats(-9, 9),
            conventions=presets,
        ),
        check_grow_counts,
        150,
    ),
    "corrected": (
        redistribution.corrected,
        mixed(
            correction=st.floats(-9, 9),
            missing=st.integers(-9, 9),
            mean_missing=st.floats(-9, 9),
        ),
        check_corrected,
        100,
    ),
}
