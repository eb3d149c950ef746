"""Tests that each combination of method, pattern and allocation works or raises a clear error."""

import math

import numpy as np
import pytest
from keras import ops

from keras_dst import methods
from keras_dst.masks import KERNEL, Layout
from keras_dst.schedules import Constant
from tests.backends import every

pytestmark = every(24)

CLASSES = [
    methods.DCIL,
    methods.OptG,
    methods.Magnitude,
    methods.FlipOut,
    methods.SET,
    methods.RigL,
]
ALLOCATIONS = ["global", "uniform", "erk", {"second": 0.25}]
SHAPES = [(16, 12), (3, 3, 8, 10)]
SIZES = [math.prod(shape) for shape in SHAPES]
NAMES = ["first", "second"]

# SET and RigL must know the density of every layer before training starts.
FIXED_BEFORE = (methods.SET, methods.RigL)


def refusal(cls, pattern, allocation):
    """Return a part of the expected error message. Return None if the method supports the pattern
    with the allocation."""
    if cls in FIXED_BEFORE and pattern == "2:4":
        return "does not support N:M patterns"
    if cls in FIXED_BEFORE and allocation == "global":
        return "fixes the density of every layer before training"
    if pattern == "2:4" and allocation not in ("global", "uniform"):
        return "fixes the sparsity of every weight"
    return None


def check_pattern(pattern, mask):
    """Check that a mask has the given pattern.

    The second to last axis of the mask is the input axis of the layer, and its length must be a
    multiple of 4. The last axis is the output axis.
    """
    *window, inputs, outputs = mask.shape
    if pattern == "2:4":
        groups = mask.reshape(-1, inputs // 4, 4, outputs)
        np.testing.assert_array_equal(groups.sum(2), 2)
    if pattern == "1x4":
        groups = mask.reshape(-1, inputs // 4, 4, outputs)
        assert set(groups.sum(2).ravel()) <= {0, 4}
    if pattern == "channel":
        columns = mask.reshape(-1, outputs).sum(0)
        assert set(columns) <= {0, math.prod(window) * inputs}


@every(56)
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2:4", "channel"])
@pytest.mark.parametrize("cls", CLASSES)
def test_every_pattern_and_allocation_is_valid_or_raises(cls, pattern, allocation):
    expected = refusal(cls, pattern, allocation)
    if expected:
        with pytest.raises(ValueError, match=expected):
            cls(0.5, allocation=allocation, pattern=pattern)
        return
    method = cls(0.5, allocation=allocation, pattern=pattern)
    rng = np.random.default_rng(0)
    scores = [ops.convert_to_tensor(rng.random(shape, "float32")) for shape in SHAPES]
    kept = method.kept_counts(SHAPES, [KERNEL] * 2, 0.5, NAMES)
    masks = method.rank(scores, [KERNEL] * 2, ops.convert_to_tensor(kept, "int32"))
    masks = [ops.convert_to_numpy(mask) for mask in masks]

    for mask in masks:
        check_pattern(pattern, mask)
    counts = np.array([mask.sum() for mask in masks])
    # `groups` contains, for each of the two kernels, the number of weights that are pruned
    # together: 4 with 1x4 blocks.
    groups = {"unstructured": [1, 1], "1x4": [4, 4], "2:4": [1, 1], "channel": [16, 72]}[pattern]
    if pattern == "2:4" or allocation == "uniform":
        wanted = 0.5 * np.array(SIZES)
    elif allocation == "erk":
        raw = np.array([28, 24]) / SIZES  # ERK densities are proportional to sum(shape) / size.
        wanted = raw * SIZES * sum(SIZES) / 2 / (raw * SIZES).sum()
        if wanted[0] > SIZES[0]:  # A density is at most 1.
            wanted = np.array([SIZES[0], sum(SIZES) / 2 - SIZES[0]])
    elif allocation == "global":
        assert abs(counts.sum() - sum(SIZES) / 2) <= max(groups)
        return
    else:
        wanted = np.array([0.5, 0.75]) * SIZES
    assert (abs(counts - wanted) <= groups).all(), (counts, wanted)


@pytest.mark.parametrize("pattern", ["2:4", "1x4"])
@pytest.mark.parametrize("cls", [methods.Magnitude, methods.DCIL])
def test_a_depthwise_kernel_has_no_input_axis_to_group(cls, pattern):
    method = cls(0.5, pattern=pattern)
    depthwise = Layout(outputs=(-2, -1), inputs=())
    with pytest.raises(ValueError, match="needs an input axis"):
        method.kept_counts([(3, 3, 8, 1)], [depthwise], 0.5, ["depthwise"])


@pytest.mark.parametrize("cls", [methods.Magnitude, methods.FlipOut, methods.OptG, methods.DCIL])
def test_n_of_m_prunes_once_the_schedule_exceeds_zero(cls):
    method = cls(Constant(0.5, begin=0.5), pattern="2:4")
    scores = [ops.convert_to_tensor(np.random.RandomState(0).rand(16, 12), "float32")]
    for target, expected in ((0.0, 192), (0.5, 96)):
        kept = ops.convert_to_tensor(
            method.kept_counts([(16, 12)], [KERNEL], target, [""]), "int32"
        )
        (mask,) = method.rank(scores, [KERNEL], kept)
        assert np.count_nonzero(ops.convert_to_numpy(mask)) == expected


def test_min_kept_with_n_of_m_raises():
    with pytest.raises(ValueError, match=r"fixes how many weights.*min_kept=3.*Omit min_kept"):
        methods.Magnitude(0.5, pattern="2:4", min_kept=3)
