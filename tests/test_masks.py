"""Tests of the step function, patterns and top-k masks against NumPy and across backends."""

import contextlib
import functools
import math
import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_dst import masks
from keras_dst._backend import numbers, ranking, rows, selection
from keras_dst._backend.jit import jit
from keras_dst.masks import KERNEL, Layout, Pattern
from tests.backends import COMPILES, every
from tests.gradients import gradients

DEPTHWISE = Layout(outputs=(-2, -1), inputs=())
TRANSPOSED = Layout(outputs=(-2,), inputs=(-1,))
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True, scope="module")
def only_searches():
    """Let `top_k` always search for thresholds. On PyTorch, `top_k` usually sorts the scores of
    small models. tests/test_accelerator_ranking.py tests sorting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_SORTED_ON_CPU", 0)
        yield


def tensor(values, dtype="float32"):
    return ops.convert_to_tensor(np.asarray(values, "float32"), dtype=dtype)


def array(x):
    """Convert a tensor to float64 in NumPy, without rounding."""
    return ops.convert_to_numpy(ops.cast(x, "float32")).astype("float64")


def random(*shape, seed=0):
    return np.random.RandomState(seed).uniform(-1, 1, shape).astype("float32")


# -- step function and straight-through product ----------------------------------------------------

# Columns: x, step(x), and the derivative of the step function in arXiv 2005.06870. The derivative
# is 2 - 4|x| for |x| up to 0.4, 0.4 for |x| up to 1, and 0 otherwise.
STEP = [
    (0.0, 0, 2.0),
    (0.1, 1, 1.6),
    (-0.1, 0, 1.6),
    (0.2, 1, 1.2),
    (-0.2, 0, 1.2),
    (0.35, 1, 0.6),
    (-0.35, 0, 0.6),
    (0.4, 1, 0.4),
    (-0.4, 0, 0.4),
    (0.41, 1, 0.4),
    (-0.41, 0, 0.4),
    (0.75, 1, 0.4),
    (1.0, 1, 0.4),
    (-1.0, 0, 0.4),
    (1.01, 1, 0.0),
    (-1.01, 0, 0.0),
    (3.0, 1, 0.0),
    (-3.0, 0, 0.0),
]


@pytest.mark.parametrize("dtype", EPSILON)
def test_step(dtype):
    x, value, _ = zip(*STEP)
    result = masks.step(tensor(x, dtype))
    assert keras.backend.standardize_dtype(result.dtype) == dtype
    np.testing.assert_array_equal(array(result), value)


@pytest.mark.parametrize("dtype", EPSILON)
def test_step_derivative(dtype):
    x = tensor([x for x, _, _ in STEP], dtype)
    slope = np.array([slope for _, _, slope in STEP])
    upstream = np.resize([1.0, -0.5, 4.0], len(STEP))
    (found,) = gradients(masks.step, [x], tensor(upstream, dtype))
    # Rounding changes x by up to |x| eps/2. The derivative 2 - 4|x| then changes by up to 2|x| eps.
    allowed = np.abs(upstream) * EPSILON[dtype] * (2 * np.abs(array(x)) + 1) * (slope > 0)
    assert (np.abs(found - upstream * slope) <= allowed).all(), (found, upstream * slope)


@pytest.mark.parametrize("dtype", EPSILON)
def test_step_derivative_is_zero_beyond_one(dtype):
    beyond = 1 + EPSILON[dtype]
    x = tensor([-beyond, -1, 1, beyond], dtype)
    (found,) = gradients(masks.step, [x], tensor([1, 1, 1, 1], dtype))
    np.testing.assert_allclose(found, [0, 0.4, 0.4, 0], rtol=EPSILON[dtype], atol=0)


@pytest.mark.parametrize("dtype", EPSILON)
def test_step_of_the_smallest_numbers(dtype):
    small = 2.0**-14
    np.testing.assert_array_equal(array(masks.step(tensor([-small, 0, small], dtype))), [0, 0, 1])


def test_step_of_nan_has_zero_gradient():
    x = tensor([NAN, 0.2])
    np.testing.assert_array_equal(array(masks.step(x)), [0, 1])
    (found,) = gradients(masks.step, [x], tensor([1, 1]))
    np.testing.assert_allclose(found, [0, 1.2], rtol=1e-6)


@pytest.mark.parametrize("dtype", EPSILON)
def test_masked(dtype):
    w, mask = tensor([1.5, np.inf, -2.0, NAN], dtype), tensor([True, False, False, False], "bool")
    found = masks.masked(w, mask)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    np.testing.assert_array_equal(array(found), [1.5, 0, 0, 0])
    assert not np.signbit(array(found)).any()


@pytest.mark.parametrize("dtype", EPSILON)
def test_gradients_of_masked_weights(dtype):
    w, mask = tensor([1.5, 7.0], dtype), tensor([True, False], "bool")
    np.testing.assert_array_equal(array(masks.stop_gradient_where(mask, w)), [1.5, 7])
    for upstream, kept, others in (([2, 3], [2, 0], [0, 3]), ([NAN, 3], [NAN, 0], [0, 3])):
        g = tensor(upstream, dtype)
        (found,) = gradients(lambda w: masks.masked(w, mask), [w], g)
        np.testing.assert_array_equal(found, kept)
        (found,) = gradients(lambda w: masks.stop_gradient_where(mask, w), [w], g)
        np.testing.assert_array_equal(found, others)


@pytest.mark.parametrize(
    ("g", "mask", "expected"),
    [
        # The kept entries have the nonzero gradients 3 and -4, whose root mean square is
        # sqrt(12.5). The gradients of pruned entries are limited to twice this value.
        ([3, 0, -4, 50, -50], [1, 1, 1, 0, 0], [3, 0, -4, 2 * 12.5**0.5, -2 * 12.5**0.5]),
        # The limit is 2 * sqrt(12.5) = 7.07, so the gradients 7 and -7 do not change.
        ([3, 0, -4, 7, -7], [1, 1, 1, 0, 0], [3, 0, -4, 7, -7]),
        ([3, 50, -4], [1, 1, 0], [3, 50, -4]),
        ([3, 4], [0, 0], [3, 4]),  # If the mask keeps no entries, gradients are not limited.
        # If the gradients of all kept entries are 0, the gradients of pruned entries become 0, too.
        ([0, 4], [1, 0], [0, 0]),
    ],
)
def test_limit_of_the_gradients_of_pruned_entries(g, mask, expected):
    g, mask = tensor(g, "float32"), tensor(np.array(mask, bool), "bool")
    np.testing.assert_allclose(array(masks.limit_gradient(g, mask, 2.0)), expected, rtol=1e-6)
    w = tensor(np.arange(len(expected)), "float32")
    np.testing.assert_array_equal(array(masks.with_limited_gradient(w, mask, 2.0)), array(w))
    (found,) = gradients(lambda w: masks.with_limited_gradient(w, mask, 2.0), [w], g)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="one implementation elsewhere")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("compiled", [False, True])
def test_masked_on_torch(dtype, compiled):
    import torch

    function = torch.compile(masks.masked, backend="eager") if compiled else masks.masked
    w = torch.tensor([1.5, torch.inf, torch.nan], dtype=getattr(torch, dtype), requires_grad=True)
    found = function(w, torch.tensor([True, False, False]))
    assert found.dtype == w.dtype
    assert found.tolist() == [1.5, 0, 0]
    found.sum().backward()
    assert w.grad.tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_masked_counters(dtype):
    found = masks.masked(tensor([3, 5], dtype), tensor([True, False], "bool"))
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    np.testing.assert_array_equal(array(found), [3, 0])


@pytest.mark.parametrize("dtype", EPSILON)
def test_straight_through_product(dtype):
    w, scores, g = (tensor(random(3, 4, seed=seed), dtype) for seed in range(3))
    mask = tensor(random(3, 4, seed=3) > 0, "bool")
    result = masks.straight_through_product(w, scores, mask)
    assert keras.backend.standardize_dtype(result.dtype) == dtype
    np.testing.assert_array_equal(array(result), array(w) * array(mask))

    def product(w, scores):
        return masks.straight_through_product(w, scores, mask)

    to_w, to_scores = gradients(product, [w, scores], g)
    np.testing.assert_array_equal(to_w, array(g) * array(mask))
    np.testing.assert_allclose(to_scores, array(g) * array(w), rtol=EPSILON[dtype])


@pytest.mark.parametrize("dtype", EPSILON)
def test_straight_through_product_with_a_limit(dtype):
    w, scores, g = (tensor(random(3, 4, seed=seed), dtype) for seed in range(3))
    mask = tensor(random(3, 4, seed=3) > 0, "bool")

    def product(w, scores):
        return masks.straight_through_product(w, scores, mask, 0.5)

    np.testing.assert_array_equal(array(product(w, scores)), array(w) * array(mask))
    to_w, to_scores = gradients(product, [w, scores], g)
    np.testing.assert_array_equal(to_w, array(g) * array(mask))
    limited = array(masks.limit_gradient(g, mask, 0.5))
    assert (limited != array(g)).any()
    np.testing.assert_allclose(to_scores, limited * array(w), rtol=EPSILON[dtype])


# -- patterns --------------------------------------------------------------------------------------

# Columns: pattern, shape of the weight, layout, shape of the block.
BLOCKS = [
    ("unstructured", (8, 6), KERNEL, (1, 1)),
    ("1x1", (8, 6), KERNEL, (1, 1)),
    ("2:4", (8, 6), KERNEL, (1, 1)),
    ("1x4", (8, 6), KERNEL, (4, 1)),
    ("4x1", (8, 6), KERNEL, (1, 4)),
    ("2x2", (8, 6), KERNEL, (2, 2)),
    ("2x3", (8, 6), KERNEL, (3, 2)),
    ("channel", (8, 6), KERNEL, (8, 1)),
    # Six inputs do not fill blocks of 4, so the last block is incomplete.
    ("1x4", (6, 5), KERNEL, (4, 1)),
    ("4x1", (6, 5), KERNEL, (1, 4)),
    ("2x4", (7, 5), KERNEL, (4, 2)),
    ("1x16", (6, 5), KERNEL, (6, 1)),  # A block of 16 is cut to 6, the length of the axis.
    # The following shapes belong to kernels of convolutions.
    ("1x4", (3, 2, 6, 5), KERNEL, (1, 1, 4, 1)),
    ("4x1", (3, 2, 6, 5), KERNEL, (1, 1, 1, 4)),
    ("2x2", (3, 2, 6, 5), KERNEL, (1, 1, 2, 2)),
    ("1:3", (3, 2, 6, 5), KERNEL, (1, 1, 1, 1)),
    ("channel", (3, 2, 6, 5), KERNEL, (3, 2, 6, 1)),
    ("1x4", (3, 6, 5), KERNEL, (1, 4, 1)),
    ("1x4", (3, 2, 6, 5), TRANSPOSED, (1, 1, 1, 4)),
    ("channel", (3, 2, 6, 5), TRANSPOSED, (3, 2, 1, 5)),
    ("4x1", (3, 2, 6, 5), DEPTHWISE, (1, 1, 1, 4)),
    ("channel", (3, 2, 6, 5), DEPTHWISE, (3, 2, 1, 1)),
    ("unstructured", (3, 2, 6, 5), DEPTHWISE, (1, 1, 1, 1)),
]


def blocks_of(shape, block):
    """Yield `(index, slices)` for every block of a weight: `weight[slices]` is the block."""
    counts = [-(-n // b) for n, b in zip(shape, block)]
    for index in np.ndindex(*counts):
        yield index, tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, block))


@pytest.mark.parametrize(("name", "shape", "layout", "block"), BLOCKS)
def test_pattern(name, shape, layout, block):
    pattern = Pattern(name)
    assert pattern.block(shape, layout) == block
    assert pattern.grouped == (math.prod(block) > 1)

    weights = random(*shape)
    scores = array(jit(lambda w: pattern.scores(w, layout))(tensor(weights)))
    sizes = pattern.sizes(shape, layout)
    assert sizes.dtype == np.int32
    assert sizes.sum() == weights.size
    groups = random(*scores.shape, seed=1)
    mask = array(jit(lambda g: pattern.expand(g, shape, layout))(tensor(groups)))
    assert mask.shape == shape
    for index, members in blocks_of(shape, block):
        assert sizes[index] == weights[members].size
        assert scores[index] == pytest.approx(weights[members].mean(dtype="float64"), abs=1e-6)
        assert (mask[members] == groups[index]).all()


def test_golden_blocks():
    # The kernel has 5 inputs and 3 outputs. With the pattern 1x4, a block contains the weights of
    # one output for four inputs. The blocks of the fifth input contain only one weight.
    kernel = tensor([[1, 0, 2], [2, 0, 2], [3, 0, 2], [4, 0, 2], [6, -1, 0]])
    pattern = Pattern("1x4")
    scores = pattern.scores(kernel)
    np.testing.assert_array_equal(array(scores), [[2.5, 0, 2], [6, -1, 0]])
    np.testing.assert_array_equal(pattern.sizes((5, 3)), [[4, 4, 4], [1, 1, 1]])

    # At most six weights may be kept. The blocks with the scores 6 and 2.5 contain 1 + 4 = 5
    # weights and are kept. The block with the score 2 contains four weights, which would raise the
    # number of kept weights to nine.
    (groups,) = top_k([array(scores)], 6, [pattern.sizes((5, 3))])
    np.testing.assert_array_equal(groups, [[1, 0, 0], [1, 0, 0]])
    mask = pattern.expand(ops.convert_to_tensor(groups), (5, 3))
    np.testing.assert_array_equal(array(mask), [[1, 0, 0]] * 5)


@pytest.mark.parametrize("block", [(4, 1), (1, 4), (3, 2), (5, 3), (1, 1)])
def test_spread_reverses_pool(block):
    groups = random(*(-(-n // b) for n, b in zip((5, 3), block)))
    there_and_back = jit(lambda g: masks.pool(masks.spread(g, block, (5, 3)), block))
    np.testing.assert_allclose(array(there_and_back(tensor(groups))), groups, rtol=1e-6)


@pytest.mark.parametrize(
    "dtype",
    [
        "float16",
        "bfloat16",
    ],
)
def test_pool_in_half_precision(dtype):
    values = np.arange(12).reshape(6, 2)
    means = array(masks.pool(tensor(values, dtype), (4, 1)))
    np.testing.assert_array_equal(means, [[3, 4], [9, 10]])


def test_pool_raises_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.pool(tensor(np.ones((4, 2))), (2, 1))


MALFORMED = [
    "", "x", "1x", "x4", "4", "0x4", "4x0", "-1x4", "1x-4", "1x4x2", "1.5x4", "1 x 4", " 1x4",
    "1x4\n", "1X4", "01x4", ":", "2:", ":4", "0:4", "2:0", "2:4:8", "Channel", "channels",
    "structured", None, 4, (1, 4), ["1x4"],
]  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_pattern_raises(name):
    with pytest.raises(ValueError, match="pattern must be 'unstructured', blocks"):
        Pattern(name)


@pytest.mark.parametrize("name", ["4:4", "4:2", "1:1"])
def test_n_of_m_with_n_not_below_m_raises(name):
    with pytest.raises(ValueError, match=f"N < M. Received: '{name}'"):
        Pattern(name)


@pytest.mark.parametrize(
    ("name", "layout", "missing"),
    [
        ("1x4", DEPTHWISE, "an input"),
        ("2x2", DEPTHWISE, "an input"),
        ("2:4", DEPTHWISE, "an input"),
        ("4x1", Layout(outputs=(), inputs=(-1,)), "an output"),
        ("2x2", Layout(outputs=(), inputs=(-1,)), "an output"),
    ],
)
def test_a_pattern_without_its_axis_raises(name, layout, missing):
    with pytest.raises(ValueError, match=rf"'{name}' needs {missing} axis.*\(3, 3, 8, 2\)"):
        Pattern(name).block((3, 3, 8, 2), layout)


# -- top_k -----------------------------------------------------------------------------------------


def reference_top_k(scores, kept, sizes=None):
    """Return masks of the groups with the highest scores, with at most `kept` entries in total.

    Among groups with equal scores, the first groups are kept.
    """
    flat = np.concatenate([np.ravel(s) for s in scores])
    order = np.argsort(-flat, kind="stable")
    taken = np.ones(len(flat)) if sizes is None else np.concatenate([np.ravel(s) for s in sizes])
    mask = np.zeros(len(flat), bool)
    mask[order[np.cumsum(taken[order]) <= kept]] = True
    return split(mask, [np.shape(s) for s in scores])


def split(flat, shapes):
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes)]


@functools.cache
def compiled_top_k(shapes, sizes, kept_axes, xla):
    """Return a compiled `top_k` for scores of the given shapes. The argument `kept` is a tensor."""
    sizes = sizes and [np.reshape(n, shape) for n, shape in zip(sizes, shapes)]

    def function(scores, kept):
        return masks.top_k(scores, kept, sizes)

    if xla and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return jit(function)


def top_k(scores, kept, sizes=None, xla=False):
    shapes = tuple(np.shape(s) for s in scores)
    sizes = sizes and tuple(tuple(np.ravel(n).tolist()) for n in sizes)
    found = compiled_top_k(shapes, sizes, np.ndim(kept), xla)(
        [tensor(s) for s in scores], ops.convert_to_tensor(kept, dtype="int32")
    )
    assert all(keras.backend.standardize_dtype(mask.dtype) == "bool" for mask in found)
    return [ops.convert_to_numpy(mask) for mask in found]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


# Columns: description of the case, scores of each tensor, number of scores to keep, and expected
# mask of each tensor.
TOP_K = [
    ("the highest", [[0.1, 0.3, 0.2, 0]], 2, [[0, 1, 1, 0]]),
    ("over all tensors", [[1, 5], [[4, 2], [3, 6]]], 3, [[0, 1], [[1, 0], [0, 1]]]),
    ("ties: earlier position", [[1, 2, 1, 1]], 3, [[1, 1, 1, 0]]),
    ("ties: earlier row", [[[0, 0], [0, 0]]], 3, [[[1, 1], [1, 0]]]),
    ("ties: earlier tensor", [[1], [2, 1], [1]], 3, [[1], [1, 1], [0]]),
    ("ties: all equal", [[7, 7], [7, 7]], 1, [[1, 0], [0, 0]]),
    ("ties: zeros of both signs", [[-0.0, 0.0, -0.0, 0.0]], 1, [[1, 0, 0, 0]]),
    ("none", [[3, 1], [2]], 0, [[0, 0], [0]]),
    ("fewer than none", [[3, 1], [2]], -1, [[0, 0], [0]]),
    ("all", [[3, 1], [2]], 3, [[1, 1], [1]]),
    ("more than all", [[3, 1], [2]], 9, [[1, 1], [1]]),
    ("a single score", [[0.5]], 1, [[1]]),
    ("a scalar among them", [2.0, [1, 3]], 2, [1, [0, 1]]),
    ("negative scores", [[-3, -1, -2, -4]], 2, [[0, 1, 1, 0]]),
    ("inf ties with the largest", [[2, 5, INF, 5]], 2, [[0, 1, 1, 0]]),
    ("the largest ties with inf", [[1, 5, INF, 0]], 1, [[0, 1, 0, 0]]),
    ("-inf ties with the smallest", [[1, -INF, 0, 2]], 3, [[1, 1, 0, 1]]),
    ("-inf comes last", [[1, -INF, 0, 2]], 2, [[1, 0, 0, 1]]),
    ("nan ties with the smallest", [[1, NAN, 0, 2]], 3, [[1, 1, 0, 1]]),
    ("nan comes last", [[1, NAN, 0, 2]], 2, [[1, 0, 0, 1]]),
    ("nan, inf and -inf together", [[NAN, 1, INF, -INF]], 2, [[1, 1, 0, 0]]),
]


@every(24)
@pytest.mark.parametrize(
    ("scores", "kept", "expected"),
    [pytest.param(*case, id=what) for what, *case in TOP_K],
)
def test_top_k(scores, kept, expected):
    assert_equal(top_k(scores, kept), [np.array(mask, bool) for mask in expected])


@every(24)
@pytest.mark.skipif(COMPILES, reason="the test changes the search, which must not be compiled")
@pytest.mark.parametrize(
    ("scores", "kept", "expected"),
    [pytest.param(*case, id=what) for what, *case in TOP_K],
)
def test_top_k_that_starts_from_a_sample(scores, kept, expected, monkeypatch):
    monkeypatch.setattr(ranking, "_SAMPLE_FROM", 1)
    monkeypatch.setattr(ranking, "_SAMPLE_STRIDES", (1, 1))
    assert_equal(top_k(scores, kept), [np.array(mask, bool) for mask in expected])


def test_top_k_in_eager_mode():
    found = masks.top_k([tensor([0.1, 0.3]), tensor([0.2])], 2)
    assert_equal([ops.convert_to_numpy(mask) for mask in found], [[False, True], [True]])


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch.export is PyTorch's")
def test_a_ranking_after_an_export_of_the_same_shape():
    import torch

    class TopK(torch.nn.Module):
        def forward(self, scores):
            return masks.top_k([scores], 5)[0]

    scores = torch.arange(24.0).reshape(4, 6)
    with contextlib.suppress(Exception):  # Some versions of PyTorch cannot export `top_k`.
        torch.export.export(TopK(), (scores,))
    (mask,) = masks.top_k([scores], 5)
    np.testing.assert_array_equal(mask, scores >= 19)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch.export is PyTorch's")
@pytest.mark.parametrize("strict", [False, True])
def test_a_constant_after_an_export(strict):
    import torch

    array = np.array([3.0, int(strict)], "float32")

    class Sum(torch.nn.Module):
        def forward(self, x):
            return x + numbers.constant(array, "float32", x)

    x = torch.ones(2)
    with contextlib.suppress(Exception):  # Some versions of PyTorch cannot export the constant.
        torch.export.export(Sum(), (x,), strict=strict)
    constant = numbers.constant(array, "float32", x)
    np.testing.assert_array_equal(constant.numpy(), array)
    assert numbers.constant(array, "float32", x) is constant


@pytest.mark.skipif(not COMPILES, reason="only JAX and TensorFlow trace functions")
def test_two_models_with_the_same_shapes_share_the_trace_of_their_rankings(monkeypatch):
    traced, search = [], ranking._Ranking.thresholds
    monkeypatch.setattr(
        ranking._Ranking, "thresholds", lambda *args: traced.append(1) or search(*args)
    )
    for kept in (4, 9):
        model = jit(lambda s, k: (masks.top_k([s], k)[0], masks.kth([s], k)))
        scores = random(3, 7, seed=kept)
        mask, threshold = model(tensor(scores), ops.convert_to_tensor(kept, "int32"))
        assert array(mask).sum() == (scores > array(threshold)).sum() == kept
    assert len(traced) == 2


@pytest.mark.parametrize("score", [NAN, INF, -INF])
def test_top_k_without_a_finite_score(score):
    assert_equal(top_k([[score] * 4], 2), [[True, True, False, False]])


def test_top_k_with_a_score_near_the_lowest_float():
    assert_equal(top_k([[-3e38, 1, 2, 3]], 2), [[False, False, True, True]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_top_k_in_half_precision(dtype):
    scores = tensor([0.5, -2, 0.25, 1, 0.25], dtype)
    (mask,) = jit(lambda s: masks.top_k([s], 3))(scores)
    assert_equal([array(mask)], [[1, 0, 1, 1, 0]])


@pytest.mark.parametrize("sign", [1, -1])
def test_top_k_of_scores_over_fifteen_orders_of_magnitude(sign):
    scores = sign * np.logspace(-12, 3, 61, dtype="float32")
    scores = split(np.random.RandomState(0).permutation(scores), [(5, 8), (21,)])
    for kept in range(62):
        assert_equal(top_k(scores, kept), reference_top_k(scores, kept))


@pytest.mark.skipif(COMPILES, reason="the test counts the steps of a loop that is not compiled")
@pytest.mark.parametrize("kept", [100, 5_000, 5_010, 9_000, 16_990, 17_000, 19_000])
def test_the_threshold_search_among_zeros_takes_few_steps(kept, monkeypatch):
    scores = np.concatenate([random(2_000), np.zeros(6_000), -np.ones(2_000)]).astype("float32")
    scores, counts = [np.abs(scores), scores], []
    count = ranking._Ranking._count_above
    monkeypatch.setattr(
        ranking._Ranking, "_count_above", lambda *args: counts.append(1) or count(*args)
    )
    assert_equal(top_k(scores, kept), reference_top_k(scores, kept))
    # A search that halves its range down to denormal numbers would need 300 steps.
    assert len(counts) < 40


def test_top_k_compiled_by_xla():
    scores = [random(4, 5), random(6, seed=1)]
    for kept in range(-1, 28):
        assert_equal(top_k(scores, kept, xla=True), reference_top_k(scores, kept))


def test_top_k_stops_at_the_first_group_that_does_not_fit():
    # At most 5 weights may be kept. The two groups with the highest scores contain 2 + 1 = 3
    # weights. The third group would raise the number of kept weights to 6, so the ranking stops
    # after two groups. The fourth group, which has only 1 weight, is not kept either.
    assert_equal(top_k([[9, 8, 7, 6]], 5, [np.array([2, 1, 3, 1])]), [[1, 1, 0, 0]])


def test_top_k_of_tied_groups():
    assert_equal(top_k([[5, 5, 5, 9]], 6, [np.array([2, 3, 1, 1])]), [[1, 1, 0, 1]])


SHAPES = [((1,), (2,)), ((2, 3, 2), (1, 1), (6,), (2, 2))]
SIZES = {
    shapes: [np.random.RandomState(i).randint(1, 9, shape) for i, shape in enumerate(shapes)]
    for shapes in SHAPES
}


@st.composite
def scores_and_count(draw, largest_size=1):
    """Draw scores, with many ties or a wide range, and the number of scores to keep.

    The number of scores to keep may be negative, or larger than the number of all scores.
    """
    shapes = draw(st.sampled_from(SHAPES))
    size = sum(math.prod(shape) for shape in shapes)
    ties = st.integers(-3, 3).map(float)
    wide = st.builds(math.ldexp, st.integers(-99, 99).map(float), st.integers(-30, 9))
    values = draw(st.lists(draw(st.sampled_from([ties, wide])), min_size=size, max_size=size))
    kept = draw(st.integers(-1, largest_size * size + 1))
    return shapes, split(np.array(values, "float32"), shapes), kept


@settings(deadline=None, derandomize=True, max_examples=100)
@given(scores_and_count())
def test_top_k_equals_a_stable_sort(case):
    _, scores, kept = case
    found = top_k(scores, kept)
    assert_equal(found, reference_top_k(scores, kept))
    size = sum(s.size for s in scores)
    assert sum(mask.sum() for mask in found) == min(max(kept, 0), size)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(scores_and_count(largest_size=5))
def test_top_k_of_groups_equals_a_stable_sort(case):
    shapes, scores, kept = case
    sizes = SIZES[shapes]
    assert_equal(top_k(scores, kept, sizes), reference_top_k(scores, kept, sizes))


def test_top_k_of_arguments_with_a_wrong_type_raises():
    for scores in (3, None, [], {"kernel": np.ones(2)}, np.ones(2)):
        with pytest.raises(ValueError, match="scores must be a list of float tensors"):
            masks.top_k(scores, 1)
    for kept in (1.0, np.float32(1), np.array([1.0]), keras.ops.array([1.0])):
        with pytest.raises(ValueError, match=r"kept must be a whole number.*Received.*(float|1.0)"):
            masks.top_k([keras.ops.array([0.1, 0.3])], kept)


def test_top_k_of_each_tensor():
    scores = [[1, 5], [[4, 2], [3, 6]], [7, 8]]
    expected = [[0, 1], [[1, 0], [1, 1]], [0, 0]]
    assert_equal(top_k(scores, [1, 3, 0]), [np.array(mask, bool) for mask in expected])


@settings(deadline=None, derandomize=True, max_examples=100)
@given(scores_and_count(largest_size=5), st.lists(st.integers(-1, 30), min_size=4, max_size=4))
def test_top_k_of_each_tensor_equals_a_stable_sort(case, counts):
    shapes, scores, _ = case
    sizes, counts = SIZES[shapes], counts[: len(shapes)]
    expected = [reference_top_k([s], kept, [n])[0] for s, kept, n in zip(scores, counts, sizes)]
    assert_equal(top_k(scores, counts, sizes), expected)


@pytest.fixture
def small_rows(monkeypatch):
    """Reduce the sizes of rows, bundles and slabs in `top_k`, and return scores that need several
    rows, several bundles and several slabs.

    `top_k` arranges all scores in rows. Small tensors are combined in bundles of rows, and the rows
    of a large tensor are divided into slabs. The scores do not fill all rows, bundles and slabs
    completely.
    """
    small = {
        "ROW_WIDTH": 4,
        "_BUNDLE_SIZE": 16,
        "_SLAB_ROWS": 2,
        "_SAMPLE_FROM": 1,
        "_SAMPLE_STRIDES": (2, 3),
    }
    for name, size in small.items():
        for module in (ranking, rows, selection):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, size)
    shapes = [(19,), (3, 5), (2,), (16,)]
    scores = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    scores[0], scores[2] = np.round(scores[0]), np.round(scores[2])  # Create ties.
    sizes = [np.random.RandomState(i).randint(1, 5, shape) for i, shape in enumerate(shapes)]
    return scores, sizes


def compiled(scores, sizes=None, first=None):
    """Return a function that computes the masks of the given scores for a tensor `kept`."""
    function = jit(lambda s, kept: masks.top_k(s, kept, sizes, first))
    tensors = [tensor(s) for s in scores]
    return lambda kept: [
        array(mask) for mask in function(tensors, ops.convert_to_tensor(kept, "int32"))
    ]


@every(24)
@pytest.mark.parametrize("first", [[0, 0, 0, 0], [1, 1, 1, 1], [3, 1, 2, 5]], ids=str)
@pytest.mark.parametrize("grouped", [False, True], ids=["weights", "groups"])
def test_top_k_of_several_rows_bundles_and_slabs(small_rows, grouped, first):
    scores, sizes = small_rows
    # The ranking always keeps the best `first[i]` groups of tensor i.
    best = [m for s, n in zip(scores, first) for m in reference_top_k([s], n)]
    raised = [s + 100 * m for s, m in zip(scores, best)]
    found = compiled(scores, sizes if grouped else None, first if any(first) else None)
    # With `sizes`, each group that is always kept has up to 4 weights instead of 1.
    lowest = sum(first) * (4 if grouped else 1)
    for kept in (lowest, lowest + 7, lowest + 30, lowest + 51, 99):
        assert_equal(found(kept), reference_top_k(raised, kept, sizes if grouped else None))


@every(24)
def test_top_k_of_each_tensor_in_several_rows_bundles_and_slabs(small_rows):
    scores, sizes = small_rows
    counts = [11, 0, 2, 36]
    each = zip(scores, counts, sizes)
    expected = [reference_top_k([s], k, [n])[0] for s, k, n in each]
    assert_equal(compiled(scores, sizes)(counts), expected)


# -- kth -------------------------------------------------------------------------------------------


def test_kth_is_exceeded_by_exactly_k_scores():
    scores = [random(3, 4), random(5, seed=1)]
    kth = jit(masks.kth)
    for kept in range(18):
        threshold = array(kth([tensor(s) for s in scores], ops.convert_to_tensor(kept)))
        assert sum((s > threshold).sum() for s in scores) == kept


def test_kth_is_not_exceeded_by_tied_scores():
    threshold = array(masks.kth([tensor([3, 1, 1]), tensor([1, 0])], 2))
    assert 1 <= threshold < 3


# -- N of M ----------------------------------------------------------------------------------------


def reference_n_of_m(scores, n, m, axis):
    rows = np.moveaxis(scores, axis, -1)
    mask = np.zeros(rows.shape, bool)
    for row in np.ndindex(*rows.shape[:-1]):
        for start in range(0, rows.shape[-1], m):
            best = np.argsort(-rows[row][start : start + m], kind="stable")[:n]
            mask[row][start + best] = True
    return np.moveaxis(mask, -1, axis)


@pytest.mark.parametrize(
    ("shape", "n", "m", "axis"),
    [
        ((8, 3), 2, 4, -2),
        ((8, 3), 1, 2, -2),
        ((8, 3), 3, 8, -2),
        ((6, 3), 2, 4, -2),  # The 6 inputs form a group of 4 and a group of 2.
        ((5, 3), 2, 4, -2),
        ((3, 2), 2, 4, -2),
        ((9, 3), 1, 4, 0),
        ((3, 7), 2, 4, 1),
        ((3, 7), 2, 4, -1),
        ((2, 3, 7, 4), 2, 4, -2),
        ((7, 3, 4, 2), 1, 3, 0),
        ((11,), 1, 4, 0),
        ((8, 3), 4, 4, -2),
        ((8, 3), 1, 1, -2),
    ],
)
def test_n_of_m(shape, n, m, axis):
    function = jit(lambda s: masks.n_of_m(s, n, m, axis))
    # Test distinct scores and tied scores.
    for scores in [random(*shape), np.round(random(*shape))]:
        found = function(tensor(scores))
        assert keras.backend.standardize_dtype(found.dtype) == "bool"
        expected = reference_n_of_m(scores, n, m, axis)
        np.testing.assert_array_equal(ops.convert_to_numpy(found), expected)


# The test prunes a kernel with 6 inputs and 2 outputs with the pattern 2:4. The last group contains
# only 2 inputs, so both weights of each output are kept.
def test_golden_n_of_m():
    kernel = [[3, 1], [1, 1], [2, 2], [0, 3], [0, 9], [0, 0]]
    found = masks.n_of_m(tensor(kernel), 2, 4)
    np.testing.assert_array_equal(array(found), [[1, 0], [0, 0], [1, 1], [0, 1], [1, 1], [1, 1]])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5, 5, 5, 5], [1, 1, 0, 0]),
        ([0, 5, 5, 5], [0, 1, 1, 0]),
        ([NAN, 1, -2, NAN], [0, 1, 1, 0]),
        ([NAN, NAN, NAN, NAN], [1, 1, 0, 0]),
        ([-INF, INF, -INF, -INF], [1, 1, 0, 0]),
        ([-INF, -INF, -INF], [1, 1, 0]),
        ([-INF], [1]),
    ],
)
def test_n_of_m_of_tied_and_nonfinite_scores(scores, expected):
    found = jit(lambda s: masks.n_of_m(s, 2, 4, axis=0))(tensor(scores))
    np.testing.assert_array_equal(array(found), expected)


# -- masks with equal bits on every backend --------------------------------------------------------

CONV, DENSE = random(2, 2, 6, 5, seed=5), random(10, 6, seed=6)

# Columns: pattern, shape of a block in a convolution kernel, and the expected masks as packed bits
# in hexadecimal. A block in a dense kernel has the last two dimensions of the listed shape.
GOLDEN = [
    ("unstructured", (1, 1, 1, 1), "5026007a293a0e83d201e9744a0d4cb801383108110020"),
    ("1x4", (1, 1, 4, 1), "000003196b5acc6084212954a529ce10410445145128a0"),
    ("2x2", (1, 1, 2, 2), "0000031b39318c639c2108718f78c600030c30ccf30000"),
    ("channel", (99, 99, 99, 1), "5294a5294a5294a5294a5294a5294a0000000000000000"),
    ("2:4", None, "f2664ffe89babff7d341fff45e0ffff811b9374a93fff0"),
]


def bits(arrays):
    return np.packbits(np.concatenate([np.ravel(a).astype(bool) for a in arrays])).tobytes().hex()


def reference_masks(block, weights, kept):
    """Return masks of the blocks with the highest mean magnitudes.

    If `block` is None, return masks with the pattern 2:4.
    """
    if block is None:
        return [reference_n_of_m(np.abs(w), 2, 4, -2) for w in weights]
    result = [np.zeros(w.shape, bool) for w in weights]
    blocks = [
        (mask, members, np.abs(w[members]).mean(dtype="float64"), w[members].size)
        for w, mask in zip(weights, result)
        for _, members in blocks_of(w.shape, block[-w.ndim :])
    ]
    _, _, scores, sizes = zip(*blocks)
    (taken,) = reference_top_k([np.array(scores)], kept, [sizes])
    for (mask, members, _, _), on in zip(blocks, taken):
        mask[members] = on
    return result


@pytest.mark.parametrize(("name", "block", "golden"), GOLDEN)
def test_masks_are_equal_on_every_backend(name, block, golden):
    weights, kept = [CONV, DENSE], 61
    assert bits(reference_masks(block, weights, kept)) == golden

    pattern = Pattern(name)

    @jit
    def find(weights):
        scores = [ops.abs(w) for w in weights]
        if pattern.n_of_m:
            return [masks.n_of_m(s, *pattern.n_of_m) for s in scores]
        groups = masks.top_k(
            [pattern.scores(s) for s in scores], kept, [pattern.sizes(s.shape) for s in scores]
        )
        return [pattern.expand(g, w.shape) for g, w in zip(groups, weights)]

    assert bits([array(mask) for mask in find([tensor(w) for w in weights])]) == golden
