"""Tests of DST's pure functions against the formulas of the paper in NumPy."""

import functools
import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_dst
from keras_dst._backend.jit import jit
from keras_dst.allocation import floor_counts
from keras_dst.masks import KERNEL, Layout
from keras_dst.methods import DST
from keras_dst.methods.base import ScheduleState
from keras_dst.methods.channels import ChannelGroups, Channels
from keras_dst.regularizers import ThresholdPenalty
from keras_dst.schedules import Constant, Cubic, Geometric
from tests.backends import every
from tests.gradients import gradients

pytestmark = every(2)

DEPTHWISE = Layout(outputs=(-2, -1), inputs=())
TRANSPOSED = Layout(outputs=(-2,), inputs=(-1,))


def tensor(values):
    return ops.convert_to_tensor(np.asarray(values, "float32"))


def array(x):
    return ops.convert_to_numpy(ops.cast(x, "float32")).astype("float64")


def at(progress):
    """Return the `ScheduleState` after a fraction of training between 0 and 1."""
    return ScheduleState(ops.convert_to_tensor(0, "int32"), ops.convert_to_tensor(progress), None)


def random(*shape, low=-1.0, high=1.0, seed=0):
    return np.random.RandomState(seed).uniform(low, high, np.array(shape, int)).astype("float32")


def slope(q):
    """Return S'(q), the long-tailed derivative of the step function."""
    q = abs(q)
    return 2 - 4 * q if q <= 0.4 else 0.4 if q <= 1 else 0


# Columns: granularity, layout, shape of the weight, shape of the thresholds, and the axes along
# which weights have the same threshold.
SINGLE = [
    ("unit", KERNEL, (6, 4), (4,), (0,)),
    ("unit", KERNEL, (3, 2, 4, 5), (5,), (0, 1, 2)),
    ("unit", TRANSPOSED, (3, 2, 4, 5), (4, 1), (0, 1, 3)),
    ("unit", DEPTHWISE, (3, 2, 4, 2), (4, 2), (0, 1)),
    ("layer", KERNEL, (3, 2, 4, 5), (), (0, 1, 2, 3)),
    ("weight", KERNEL, (6, 4), (6, 4), ()),
]
# GROUPED has the columns of SINGLE, a column for the pattern, and a column for the shape of a
# block.
GROUPED = [
    # The pattern 1x4 splits 6 inputs into a block of 4 weights and a block of 2 weights.
    ("unit", KERNEL, (6, 4), (4,), (0,), "1x4", (4, 1)),
    ("unit", KERNEL, (6, 6), (2,), (0,), "4x1", (1, 4)),
    ("layer", KERNEL, (6, 4), (), (0, 1), "1x4", (4, 1)),
    ("weight", KERNEL, (6, 4), (2, 4), (), "1x4", (4, 1)),
    ("weight", KERNEL, (2, 2, 5, 4), (2, 2, 3, 2), (), "2x2", (1, 1, 2, 2)),
    ("unit", KERNEL, (3, 2, 4, 5), (5,), (0, 1, 2), "channel", (3, 2, 4, 1)),
    ("unit", DEPTHWISE, (3, 2, 3, 6), (3, 2), (0, 1), "4x1", (1, 1, 1, 4)),
    ("unit", DEPTHWISE, (3, 2, 4, 2), (4, 2), (0, 1), "channel", (3, 2, 1, 1)),
]


cases = pytest.mark.parametrize(
    ("granularity", "layout", "shape", "threshold", "shared", "pattern", "block"),
    [(*case, "unstructured", (1,) * len(case[2])) for case in SINGLE] + GROUPED,
)


@cases
def test_state(granularity, layout, shape, threshold, shared, pattern, block):
    layer = keras.layers.Layer()
    variable = layer.add_weight(shape=shape, initializer="ones")
    method = DST(alpha=0.125, granularity=granularity, pattern=pattern)
    state = method.build(layer, "kernel", variable, layout)
    assert state.keys() == {"threshold"}
    t = state["threshold"]
    assert (tuple(t.shape), t.name, t.trainable) == (threshold, "kernel_threshold", True)
    assert isinstance(t.regularizer, ThresholdPenalty)
    assert t.regularizer.alpha == 0.125
    np.testing.assert_array_equal(array(t), np.zeros(threshold))


# -- mask and gradient -----------------------------------------------------------------------------


def blocks_of(shape, block):
    """Yield `(index, slices)` for every block of a weight: `weight[slices]` is the block."""
    for index in np.ndindex(*(-(-n // b) for n, b in zip(shape, block))):
        yield index, tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, block))


def margins(w, t, block):
    """Return the margin Q of every block, which is the mean |w| minus the threshold."""
    means = np.zeros([-(-n // b) for n, b in zip(w.shape, block)])
    for index, own in blocks_of(w.shape, block):
        means[index] = np.abs(w[own]).mean(dtype="float64")
    return means - t


def reference(w, t, g, block):
    """Return the mask and the gradients with respect to the weights and to the thresholds.

    A block has n weights w, a mask m, a threshold t and a margin Q. The gradient of the masked
    weights is g, and the derivative of the step function is S'. The gradients are
    dL/dw = g m + sum(g w) S'(Q) sign(w)/n and dL/dt = -sum(g w) S'(Q).
    """
    q = margins(w, t, block)
    mask, to_w, to_t = np.zeros(w.shape), np.zeros(w.shape), np.zeros(q.shape)
    for index, own in blocks_of(w.shape, block):
        structure = (g[own] * w[own]).sum() * slope(q[index])
        mask[own] = q[index] > 0
        to_w[own] = g[own] * mask[own] + structure * np.sign(w[own]) / w[own].size
        to_t[index] = -structure
    return mask, to_w, to_t


def draw(shape, threshold):
    """Return random weights, thresholds, and gradients of the masked weights."""
    low_and_high = [(-1.5, 1.5), (0.4, 1.0), (-1, 1)]
    shapes = [shape, threshold, shape]
    return [
        random(*s, low=a, high=b, seed=i) for i, (s, (a, b)) in enumerate(zip(shapes, low_and_high))
    ]


@cases
def test_mask(granularity, layout, shape, threshold, shared, pattern, block):
    w, t, g = draw(shape, threshold)
    expected, _, _ = reference(w, t, g, block)
    assert 0 < expected.mean() < 1
    method = DST(granularity=granularity, pattern=pattern)

    @jit
    def mask_and_apply(w, t):
        state = {"threshold": t}
        return method.mask(w, state, layout), method.apply(w, state, layout)

    mask, masked = mask_and_apply(tensor(w), tensor(t))
    assert keras.backend.standardize_dtype(mask.dtype) == "bool"
    np.testing.assert_array_equal(ops.convert_to_numpy(mask), expected)
    np.testing.assert_array_equal(array(masked), w * expected)


@cases
def test_gradients(granularity, layout, shape, threshold, shared, pattern, block):
    w, t, g = draw(shape, threshold)
    _, to_w, to_t = reference(w, t, g, block)
    method = DST(granularity=granularity, pattern=pattern)
    found_w, found_t = gradients(
        lambda w, t: method.apply(w, {"threshold": t}, layout), [tensor(w), tensor(t)], tensor(g)
    )
    np.testing.assert_allclose(found_w, to_w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found_t, to_t.sum(axis=shared).reshape(threshold), atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "block"),
    [
        ("unstructured", (1, 1)),
        ("1x4", (4, 1)),
    ],
)
def test_gradient_of_a_weight_that_is_zero(pattern, block):
    w, t, g = draw((8, 4), (4,))
    w[0] = 0.0
    _, to_w, _ = reference(w, t, g, block)
    found, _ = gradients(
        lambda w, t: DST(pattern=pattern).apply(w, {"threshold": t}, KERNEL),
        [tensor(w), tensor(t)],
        tensor(g),
    )
    np.testing.assert_allclose(found, to_w, rtol=1e-5, atol=1e-5)


def test_golden_gradients():
    #        w              g            Q = |w| - t        m          S'(Q)
    #    0.5   0.5        1   1          0.25  -0.5       1   0      1.0   0.4
    #  -0.25  -2.0        2   1          0      1.0       0   1      2.0   0.4
    #                                 t  0.25   1.0
    w, t, g = [[0.5, 0.5], [-0.25, -2.0]], [0.25, 1.0], [[1, 1], [2, 1]]
    to_w, to_t = gradients(
        lambda w, t: DST().apply(w, {"threshold": t}, KERNEL), [tensor(w), tensor(t)], tensor(g)
    )
    # The gradient of a weight is g (m + |w| S'). The gradient of a threshold is -sum(g w S'),
    # summed over one column.
    np.testing.assert_allclose(to_w, [[1.5, 0.2], [1.0, 1.8]], rtol=1e-6)
    np.testing.assert_allclose(to_t, [-0.5 + 1.0, -0.2 + 0.8], rtol=1e-6)


def test_gradients_can_revive_a_pruned_weight():
    # The magnitudes of both weights are below the threshold, and larger magnitudes would reduce the
    # loss. A gradient descent step therefore increases the magnitudes and lowers the threshold.
    to_w, to_t = gradients(
        lambda w, t: DST().apply(w, {"threshold": t}, KERNEL),
        [tensor([[0.3], [-0.3]]), tensor([0.5])],
        tensor([[-1], [1]]),
    )
    assert np.sign(to_w).tolist() == [[-1], [1]]
    assert to_t > 0


# -- the reset of thresholds -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "reset_density", "thresholds", "expected"),
    [
        (None, 0.01, [0.95, 0.95], [0.95, 0.95]),  # 10 % of the weights are still kept.
        # Thresholds are reset if the density is at most `reset_density`.
        (None, 0.1, [0.95, 0.95], [0, 0]),
        (None, 0.1, [0.85, 0.95], [0.85, 0.95]),
        (None, 0.01, [2, 3], [0, 0]),  # The thresholds 2 and 3 prune all weights.
        (None, 0.0, [2, 3], [0, 0]),
        # With a target sparsity, thresholds are reset to 0 only if at most 5 % of the weights
        # remain.
        (0.5, 0.1, [0.95, 0.95], [0.95, 0.95]),
        (0.5, 0.1, [0.95, 1.5], [0, 0]),
        (None, 0.01, [-0.5, 0.5], [-0.5, 0.5]),
        (0.5, 0.01, [-0.5, 0.5], [0, 0.5]),  # With a target sparsity, negative thresholds become 0.
        (None, 0.01, [np.nan, 0.5], [0, 0.5]),
        (None, 0.01, [-np.inf, 0.5], [0, 0.5]),
        (None, 0.01, [np.nan, np.nan], [0, 0]),
    ],
)
def test_reset(target, reset_density, thresholds, expected):
    # Both columns of the kernel contain the values 0.1, 0.2, ..., 1.0.
    layer = keras.layers.Layer()
    variable = layer.add_weight(shape=(10, 2), initializer="zeros")
    variable.assign(np.repeat(np.arange(1, 11)[:, None] / 10, 2, axis=1))
    state = DST(target, reset_density=reset_density).build(layer, "kernel", variable, KERNEL)
    found = state["threshold"].constraint(tensor(thresholds))
    np.testing.assert_array_equal(array(found), np.float32(expected))


@pytest.mark.parametrize(
    ("target", "reset_density", "expected"),
    [
        (None, 0.01, 0.01),
        (None, 0.2, 0.2),
        (0.8, 0.2, 0.02),
        (0.8, 0.01, 0.01),
        (Constant(0.99), 0.01, 0.001),
    ],
)
def test_reset_density_is_below_the_target_density(target, reset_density, expected):
    assert DST(target, reset_density=reset_density).reset_at == pytest.approx(expected)


# -- a target --------------------------------------------------------------------------------------


@functools.cache
def compiled_project(method, shapes):
    """Return a compiled version of `project` for weights and thresholds of the given shapes."""

    def project(weights, thresholds, kept):
        states = [{"threshold": t} for t in thresholds]
        states = method.project(weights, states, [KERNEL] * 2, kept)
        masks = [method.mask(w, s) for w, s in zip(weights, states)]
        return masks, [s["threshold"] for s in states]

    return jit(project)


def project(method, weights, thresholds, kept):
    function = compiled_project(method, tuple(np.shape(x) for x in [*weights, *thresholds]))
    masks, moved = function(
        [tensor(w) for w in weights],
        [tensor(t) for t in thresholds],
        ops.convert_to_tensor([kept], dtype="int32"),
    )
    return [array(m) for m in masks], [array(t) for t in moved]


@pytest.mark.parametrize(
    ("granularity", "shapes", "pattern", "block"),
    [
        ("unit", [(4,), (5,)], "unstructured", (1, 1)),
        ("weight", [(2, 4), (3, 5)], "1x4", (4, 1)),
    ],
)
def test_projection_keeps_the_requested_number_of_weights(granularity, shapes, pattern, block):
    method = DST(0.5, granularity=granularity, pattern=pattern)
    weights = [random(8, 4), random(12, 5, seed=1)]
    thresholds = [random(*shape, low=-0.2, high=0.2, seed=2) for shape in shapes]
    q = [margins(w, t, block) for w, t in zip(weights, thresholds)]
    ranked = np.sort(np.concatenate([np.ravel(x) for x in q]))[::-1]

    # With blocks of 4 weights, the number of kept weights is rounded down to a multiple of 4, for
    # example from 50 to 48.
    for kept in [20, 50, 52, 91, 92]:
        found, moved = project(method, weights, thresholds, kept)
        groups = kept // math.prod(block)
        assert sum(mask.sum() for mask in found) == groups * math.prod(block)
        # The projection keeps the blocks with the largest margin Q, which is the mean |w| minus the
        # threshold.
        lowest = ranked[groups - 1]
        for mask, x in zip(found, q):
            np.testing.assert_array_equal(mask, np.repeat(x >= lowest, block[0], axis=0))
        # The projection moves all thresholds by the same amount.
        shifts = np.concatenate([np.ravel(new - t) for new, t in zip(moved, thresholds)])
        np.testing.assert_allclose(shifts, shifts[0], atol=1e-6)


def test_projection_keeps_the_minimum_of_every_layer():
    weights = [random(8, 4), random(12, 5) / 100]
    masks, _ = project(DST(0.8), weights, [np.zeros(4), np.zeros(5)], 18)
    floor = floor_counts([(8, 4), (12, 5)], 0.8)[1]
    assert floor > 1
    assert [mask.sum() for mask in masks] == [18 - floor, floor]


@functools.cache
def compiled_update(method, shapes):
    """Return a compiled function that updates weights of the given shapes and returns new masks."""

    def update(weights, values, kept, progress):
        changes = method.update(weights, values, [KERNEL] * 2, kept, at(progress))
        return [method.mask(w, {**s, **c}) for w, s, c in zip(weights, values, changes)]

    return jit(update)


@pytest.mark.parametrize(("progress", "counts"), [(0.5, [32, 2]), (0.75, [16, 2])])
def test_an_update_keeps_the_minimum_of_a_layer_and_late_updates_meet_the_target(progress, counts):
    # The thresholds prune no weight of the first layer and all weights of the second layer.
    weights, method = [random(8, 4), random(12, 5)], DST(0.8)
    assert floor_counts([(8, 4), (12, 5)], 0.8)[1] == 2
    layer = keras.layers.Layer()
    states = [
        method.build(layer, f"kernel_{i}", layer.add_weight(shape=w.shape, name="w"), KERNEL)
        for i, w in enumerate(weights)
    ]
    values = [
        {**{k: ops.convert_to_tensor(v) for k, v in s.items()}, "threshold": tensor(t)}
        for s, t in zip(states, (np.zeros(4), np.full(5, 9.0)))
    ]
    found = compiled_update(method, None)(
        [tensor(w) for w in weights],
        values,
        ops.convert_to_tensor([18], dtype="int32"),
        tensor(progress),
    )
    assert [int(array(mask).sum()) for mask in found] == counts


@pytest.mark.parametrize(("kept", "sign"), [(5, 1), (15, -1)])
def test_alpha_pushes_all_thresholds_towards_the_target(kept, sign):
    # The magnitudes of 10 of the 20 weights exceed their thresholds.
    layer = keras.layers.Layer()
    method = DST(0.5)
    weights = [tensor([[0.1], [0.2], [0.8], [0.9]]), tensor(np.linspace(0.05, 0.95, 16)[:, None])]
    states = [
        method.build(layer, f"kernel_{i}", layer.add_weight(shape=w.shape, name="w"), KERNEL)
        for i, w in enumerate(weights)
    ]
    states = [{**s, "threshold": tensor([0.5])} for s in states]
    values = [{k: ops.convert_to_tensor(v) for k, v in s.items()} for s in states]
    update = jit(
        lambda weights, values, kept: method.update(weights, values, [KERNEL] * 2, kept, at(0.5))
    )
    one, other = update(weights, values, ops.convert_to_tensor([kept], dtype="int32"))
    assert np.sign(float(one["alpha"])) == sign
    assert float(one["alpha"]) == float(other["alpha"])


def test_schedule_of_the_target_sparsity():
    assert DST().schedule is None
    assert DST(0.9).schedule == Cubic(0.9, end=0.5)
    assert DST(Geometric(0.8)).schedule == Geometric(0.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is the fraction of zeros"),
        ({"sparsity": 90}, "sparsity is the fraction of zeros"),
        ({"granularity": "channel"}, "granularity must be .* Received: 'channel'"),
        ({"alpha": -1e-3}, "alpha must be a number >= 0. Received: -0.001"),
        ({"alpha": math.nan}, "alpha must be a number >= 0"),
        ({"reset_density": 1.0}, r"reset_density must be in \[0, 1\). Received: 1.0"),
        ({"reset_density": -0.1}, "reset_density must be in"),
        ({"pattern": "2:4"}, "does not support N:M.*Use Magnitude"),
        ({"pattern": "blocks"}, "pattern must be 'unstructured'"),
        ({"frequency": 0}, "frequency must be a whole number >= 1. Received: frequency=0"),
        ({"frequency": 2.5}, "frequency must be a whole number >= 1. Received: frequency=2.5"),
        ({"frequency": True}, "frequency must be a whole number"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        DST(**arguments)


def test_no_layer_masks_a_unit_of_a_kept_channel():
    # Each of the two weight tensors has one unit that belongs to channel 0. In the first tensor,
    # this unit is below its threshold, but it is kept, because the second tensor keeps channel 0.
    # The last unit of the second tensor belongs to no group of coupled channels and is always kept.
    method = DST(0.5, pattern="channel")
    groups = ChannelGroups([2], np.zeros((1, 2, 2)), np.ones((1, 2)))
    layouts = [Layout(channels=Channels(ids, groups)) for ids in ([0, 1], [1, 0, -1])]
    weights = [tensor(np.ones((3, 2))), tensor(np.ones((4, 3)))]
    states = [{"threshold": tensor([1.5, 1.5])}, {"threshold": tensor([1.25, 0.5, 3.0])}]
    half = ops.convert_to_tensor([2**19], "int32")
    states = method.project(weights, states, layouts, half)
    for w, state, layout, expected in zip(weights, states, layouts, ([1, 0], [0, 1, 1])):
        kept = np.broadcast_to(expected, w.shape)
        np.testing.assert_array_equal(array(method.mask(w, state, layout)), kept)
        np.testing.assert_array_equal(array(method.apply(w, state, layout)), kept)

    def forward(threshold):
        return method.apply(weights[0], {**states[0], "threshold": threshold}, layouts[0])

    # In the first tensor, the kept unit and the pruned unit both have the margin Q = -0.5. The
    # derivative of the step function at -0.5 is 0.4. Each unit has 3 weights, so the gradient is
    # -3 * 0.4 = -1.2.
    (found,) = gradients(forward, [states[0]["threshold"]], tensor(np.ones((3, 2))))
    np.testing.assert_allclose(found, [-1.2, -1.2], rtol=1e-5)


@pytest.mark.parametrize(
    "arguments", [{}, {"sparsity": 0.5, "granularity": "layer"}, {"sparsity": None}]
)
def test_costs_need_a_target_and_coupled_channels(arguments):
    with pytest.raises(ValueError, match="To count parameters or FLOPs, DST needs a sparsity"):
        DST(**arguments, pattern="channel", counted_in="flops")


def test_a_kernel_without_an_output_axis_has_one_threshold():
    model = keras.Sequential(
        [keras.Input((4, 5)), keras.layers.EinsumDense("abc,bc->ab", output_shape=(4,))]
    )
    keras_dst.sparsify(model, DST())
    (threshold,) = [v for v in model.trainable_variables if "threshold" in v.path]
    assert threshold.shape == ()
