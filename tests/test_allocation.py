"""Tests of allocations, against formulas in plain Python and against the requested number of kept
weights."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keras_dst.allocation import NAMES, check, densities, floor_counts, kept_counts

NETWORK = [(3, 3, 3, 16), (3, 3, 16, 32), (3, 3, 32, 64), (1024, 100), (100, 10)]


def sizes(shapes):
    return [math.prod(shape) for shape in shapes]


def erk(shapes, density):
    """Return ERK densities min(1, e * sum(shape) / prod(shape)), with `e` found by bisection."""
    wanted = density * sum(sizes(shapes))

    def at(e):
        return [min(1.0, e * sum(shape) / math.prod(shape)) for shape in shapes]

    low, high = 0.0, float(max(sizes(shapes)))
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(d * n for d, n in zip(at(middle), sizes(shapes)))
        low, high = (middle, high) if kept < wanted else (low, middle)
    return at(high)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_global_and_uniform_give_equal_densities(allocation):
    np.testing.assert_array_equal(densities(allocation, NETWORK, 0.25), [0.25] * 5)


@pytest.mark.parametrize(
    ("shapes", "density", "expected"),
    [
        # The ERK density of a weight tensor is proportional to sum(shape) / prod(shape): here 8/16
        # and 16/64, a ratio of 2:1. The allocation keeps 20 of the 80 weights. If d is the density
        # of the second weight tensor, the density of the first weight tensor is 2 d. The equation
        # 16 * 2 d + 64 d = 20 gives d = 5/24.
        ([(4, 4), (8, 8)], 0.25, [10 / 24, 5 / 24]),
        # The ERK densities of the two weight tensors are proportional to 20/100 and 2000/1e6. The
        # first density would be 9.9, which is more than 1, so the first weight tensor stays dense.
        # The second weight tensor gets all other kept entries.
        ([(10, 10), (1000, 1000)], 0.1, [1, (0.1 * 1000100 - 100) / 1e6]),
        # The ERK density of a convolution is proportional to sum(shape) / prod(shape), with all
        # axes of the kernel: (3 + 3 + 2 + 4) / 72 and (1 + 1 + 6 + 4) / 24.
        ([(3, 3, 2, 4), (1, 1, 6, 4)], 0.25, [1 / 6, 1 / 2]),
        ([(7, 5)], 0.3, [0.3]),
        (NETWORK, 1.0, [1] * 5),
    ],
)
def test_erk_densities_equal_manual_results(shapes, density, expected):
    np.testing.assert_allclose(densities("erk", shapes, density), expected, rtol=1e-12)


shapes_of_weights = st.lists(
    st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
)


@settings(deadline=None, derandomize=True)
@given(shapes_of_weights, st.floats(0.001, 1))
def test_erk_equals_bisection(shapes, density):
    found = densities("erk", shapes, density)
    assert found.dtype == np.float64
    assert ((found > 0) & (found <= 1)).all()
    assert found @ sizes(shapes) == pytest.approx(density * sum(sizes(shapes)))
    np.testing.assert_allclose(found, erk(shapes, density), rtol=1e-6)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
def test_erk_of_a_network_keeps_small_layers_denser(density):
    found = densities("erk", NETWORK, density)
    raw = [sum(shape) / math.prod(shape) for shape in NETWORK]
    assert list(np.argsort(found, kind="stable")[::-1]) != list(range(5))
    for i, j in zip(np.argsort(raw), np.argsort(raw)[1:]):
        assert found[i] <= found[j]


PATHS = ["net/conv_1/kernel", "net/conv_2/kernel", "net/head/kernel"]


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [
        ({}, [0.2, 0.2, 0.2]),
        ({"net/head/kernel": 0.5}, [0.2, 0.2, 0.5]),
        ({"head": 0.5}, [0.2, 0.2, 0.5]),
        ({"conv_.": 0.75}, [0.25, 0.25, 0.2]),
        ({r"conv_\d/kernel$": 0.75, "^net/head": 0}, [0.25, 0.25, 1]),
    ],
)
def test_densities_by_layer_name(allocation, expected):
    found = densities(allocation, [(4, 4)] * 3, 0.2, PATHS)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_name_without_a_matching_weight_raises():
    with pytest.raises(
        ValueError, match=r"\['dense'\] matches no weight. The weights are: net/conv_1"
    ):
        densities({"dense": 0.5}, [(4, 4)] * 3, 0.2, PATHS)


# -- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allocation", "shapes", "sparsity", "expected"),
    [
        ("uniform", [(10, 10), (30, 10)], 0.9, [10, 30]),
        # Half of 27 weights is 13.5, which is rounded to 14 kept weights.
        ("uniform", [(3, 3), (3, 3), (3, 3)], 0.5, [5, 5, 4]),
        (
            "uniform",
            [(1, 7), (1, 8), (1, 9)],
            0.5,
            [4, 4, 4],
        ),  # Before rounding, the three tensors keep 3.5, 4 and 4.5 weights, together 12.
        ("global", [(10, 10), (30, 10)], 0.9, [40]),
        ("global", [(7, 7)], 0.9, [5]),
        # Before rounding, the two tensors keep 6.67 and 13.33 weights.
        ("erk", [(4, 4), (8, 8)], 0.75, [7, 13]),
        ("erk", [(10, 10), (1000, 1000)], 0.9, [100, 99910]),
        ("uniform", [(2, 2), (3, 3)], 0.0, [4, 9]),
        ("erk", [(2, 2), (3, 3)], 0.0, [4, 9]),
    ],
)
def test_kept_counts_equal_manual_results(allocation, shapes, sparsity, expected):
    found = kept_counts(allocation, shapes, sparsity)
    assert found.dtype == np.int64
    assert found.tolist() == expected


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(NAMES), shapes_of_weights, st.floats(0, 0.999))
def test_kept_counts_add_up_exactly(allocation, shapes, sparsity):
    wanted = (1 - sparsity) * sum(sizes(shapes))
    # If the number of kept weights is exactly n + 0.5, it may be rounded up or down. Exclude such
    # numbers.
    assume(abs(wanted % 1 - 0.5) > 1e-6)
    counts = kept_counts(allocation, shapes, sparsity)
    assert counts.sum() == round(wanted)
    if allocation != "global":
        exact = densities(allocation, shapes, 1 - sparsity) * sizes(shapes)
        assert (np.abs(counts - exact) < 1 + 1e-6).all()
        assert (counts <= sizes(shapes)).all()
        assert (counts >= 0).all()


def test_kept_counts_with_a_sum_of_one_half():
    assert kept_counts("erk", [(26, 1)], 0.25).sum() == round(0.75 * 26)


@pytest.mark.parametrize(
    ("sparsity", "final", "expected"),
    [
        (0.9, None, [50, 10, 10]),
        (0.9, 0.9, [50, 10, 10]),
        # The schedule has reached 0.45, which is half of the final sparsity.
        (0.45, 0.9, [75, 55, 55]),
        (0.0, 0.9, [100, 100, 100]),
    ],
)
def test_kept_counts_by_name_follow_the_schedule(sparsity, final, expected):
    counts = kept_counts({"conv_1": 0.5}, [(10, 10)] * 3, sparsity, PATHS, final)
    assert counts.tolist() == expected


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", [*NAMES, {}, {"conv": 0.5, r"head/\w+": 0}])
def test_valid_allocations_are_accepted(allocation):
    check(allocation)


@pytest.mark.parametrize("allocation", ["local", "ERK", "", None, 0.9, ["erk"], ("conv", 0.5)])
def test_an_invalid_allocation_raises(allocation):
    with pytest.raises(ValueError, match=r"one of 'global', 'uniform', 'erk' or a dict.*Received"):
        check(allocation)


@pytest.mark.parametrize("sparsity", [1.0, -0.5, "0.5", None])
def test_an_invalid_sparsity_in_an_allocation_raises(sparsity):
    with pytest.raises(ValueError, match=r"allocation\['conv'\] is the fraction of zeros"):
        check({"conv": sparsity})


@pytest.mark.parametrize("name", ["conv(", 3])
def test_an_invalid_layer_name_in_an_allocation_raises(name):
    with pytest.raises(ValueError, match="allocation"):
        check({name: 0.5})


@pytest.mark.parametrize(
    ("shapes", "sparsity", "expected"),
    [
        # With ERK, the two tensors would keep 13.3 and 26.7 weights. The minimum for each tensor is
        # a quarter of the number that ERK would keep, rounded down.
        ([(10, 10), (30, 10)], 0.9, [3, 6]),
        # With ERK, the two tensors would keep 0.4 and 9.6 weights. A quarter of these numbers,
        # rounded down, is 0 and 2. The minimum for each tensor is at least 1 weight.
        ([(4, 4), (100, 100)], 0.999, [1, 2]),
        ([(1, 2), (100, 100)], 0.0, [1, 2500]),
    ],
)
def test_floor_counts_are_a_quarter_of_erk(shapes, sparsity, expected):
    assert floor_counts(shapes, sparsity).tolist() == expected


def test_a_shape_without_entries_raises():
    with pytest.raises(ValueError, match="shapes must be a list of shapes"):
        densities("erk", [(16, 8), (0, 8)], 0.5)


@pytest.mark.parametrize(("density", "expected"), [(0.5, [0.495, 1.0]), (1.0, [1.0, 1.0])])
def test_erk_of_a_scalar(density, expected):
    np.testing.assert_allclose(densities("erk", [(10, 10), ()], density), expected)
