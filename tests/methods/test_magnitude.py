"""Tests that compare the masks of Magnitude with a stable sort in NumPy."""

import functools
import math

import numpy as np
import pytest
from keras import ops

from keras_dst._backend.jit import jit
from keras_dst.allocation import floor_counts
from keras_dst.masks import KERNEL, Layout
from keras_dst.methods import Magnitude
from keras_dst.schedules import Constant, Cubic, Sigmoid
from tests.backends import every

pytestmark = every(48)

DEPTHWISE = Layout(outputs=(-2, -1), inputs=())


def tensor(values):
    return ops.convert_to_tensor(np.asarray(values, "float32"))


def random(*shape, scale=1.0, seed=0):
    return np.random.RandomState(seed).uniform(-scale, scale, shape).astype("float32")


@functools.cache
def compiled_rank(method, layout, shapes):
    """Return a compiled function that ranks weights of the given shapes."""

    def rank(weights, kept):
        scores = method.scores(weights, [{} for _ in shapes])
        return method.rank(scores, [layout for _ in shapes], kept)

    return jit(rank)


def masks_of(method, weights, kept, layout=KERNEL):
    rank = compiled_rank(method, layout, tuple(np.shape(w) for w in weights))
    found = rank([tensor(w) for w in weights], ops.convert_to_tensor(kept, dtype="int32"))
    return [ops.convert_to_numpy(mask) for mask in found]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


# -- scores ----------------------------------------------------------------------------------------


def test_scores_are_magnitudes():
    (score,) = Magnitude(0.5).scores([tensor([[-2, 0.5], [0, 1]])], [{}])
    np.testing.assert_array_equal(ops.convert_to_numpy(score), [[2, 0.5], [0, 1]])


def test_scores_with_revival_use_the_dense_weights():
    masked, dense = tensor([[0, 0.5]]), tensor([[-2, 0.5]])
    (score,) = Magnitude(0.5, revival=True).scores([masked], [{"dense": dense}])
    np.testing.assert_array_equal(ops.convert_to_numpy(score), [[2, 0.5]])


# -- rank ------------------------------------------------------------------------------------------

# In the second weight tensor, the 3 entries are very small, so a global ranking keeps only
# `min_kept` entries of this tensor.
LAYERS = [random(2, 2, 3, 5), random(1, 3, scale=1e-3, seed=1)]


def best(w, kept):
    """Return a mask of the `kept` largest magnitudes.

    If magnitudes are equal, the first entries are kept.
    """
    mask = np.zeros(w.size, bool)
    mask[np.argsort(-np.abs(w.ravel()), kind="stable")[:kept]] = True
    return mask.reshape(w.shape)


def reference_global(weights, kept, min_kept):
    """Keep the `min_kept` largest entries of every tensor, and then the largest other entries."""
    floors = np.broadcast_to(min_kept, len(weights))
    masks = [best(w, n) for w, n in zip(weights, floors)]
    protected = np.concatenate([np.ravel(mask) for mask in masks])
    scores = np.concatenate([np.abs(np.ravel(w)) for w in weights])
    order = [i for i in np.argsort(-scores, kind="stable") if not protected[i]]
    protected[order[: kept - protected.sum()]] = True
    ends = np.cumsum([w.size for w in weights])[:-1]
    return [m.reshape(w.shape) for m, w in zip(np.split(protected, ends), weights)]


@pytest.mark.parametrize("min_kept", [1, 4])
@pytest.mark.parametrize("kept", [7, 8, 30, 62, 63])
def test_global_rank(kept, min_kept):
    found = masks_of(Magnitude(0.5, min_kept=min_kept), LAYERS, [kept])
    assert sum(mask.sum() for mask in found) == kept
    assert found[1].sum() >= min(min_kept, 3)
    assert_equal(found, reference_global(LAYERS, kept, min_kept))


@pytest.mark.parametrize("kept", [7, 8, 30, 62])
def test_global_rank_of_ties(kept):
    weights = [np.round(2 * w) for w in LAYERS]
    found = masks_of(Magnitude(0.5, min_kept=4), weights, [kept])
    assert_equal(found, reference_global(weights, kept, 4))


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([17, 2], [17, 2]),
        ([60, 3], [60, 3]),
        ([0, 1], [2, 2]),  # Every layer keeps at least `min_kept` weights.
    ],
)
def test_rank_by_layer(kept, expected):
    found = masks_of(Magnitude(0.5, "uniform", min_kept=2), LAYERS, kept)
    assert_equal(found, [best(w, n) for w, n in zip(LAYERS, expected)])


@pytest.mark.parametrize(("kept", "min_kept"), [(0, 1), (1, 1), (6, 4)])
def test_min_kept_holds_when_the_count_of_two_layers_is_smaller(kept, min_kept):
    found = masks_of(Magnitude(0.5, min_kept=min_kept), LAYERS, [kept])
    assert_equal(found, [best(w, min_kept) for w in LAYERS])


def test_min_kept_holds_when_the_count_of_one_layer_is_smaller():
    assert_equal(masks_of(Magnitude(0.5, min_kept=4), LAYERS[:1], [0]), [best(LAYERS[0], 4)])


def test_one_nan_does_not_change_the_ranking():
    broken = LAYERS[0].copy()
    broken.flat[0] = math.nan
    found = masks_of(Magnitude(0.5), [broken, LAYERS[1]], [30])
    broken.flat[0] = 0  # A NaN weight has the same rank as a weight of 0.
    assert_equal(found, reference_global([broken, LAYERS[1]], 30, 1))


def test_an_infinite_weight_does_not_remove_other_layers():
    broken = LAYERS[0].copy()
    broken.flat[-1] = math.inf
    found = masks_of(Magnitude(0.5), [broken, LAYERS[1]], [2])
    assert [mask.sum() for mask in found] == [1, 1]


# -- patterns --------------------------------------------------------------------------------------


def blocks_of(shape, block):
    """Yield `(index, slices)` for every block of a weight: `weight[slices]` is the block."""
    for index in np.ndindex(*(-(-n // b) for n, b in zip(shape, block))):
        yield index, tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, block))


def best_blocks(w, block, kept):
    """Return a mask of the blocks with the largest mean magnitudes, with at most `kept` weights in
    total."""
    owned = [own for _, own in blocks_of(w.shape, block)]
    mask, left = np.zeros(w.shape, bool), kept
    for i in np.argsort([-np.abs(w[own]).mean(dtype="float64") for own in owned], kind="stable"):
        left -= w[owned[i]].size
        if left < 0:
            break
        mask[owned[i]] = True
    return mask


@pytest.mark.parametrize("kept", [24, 39, 45])
def test_rank_of_depthwise_channels(kept):
    w = random(3, 3, 6, 2)
    found = masks_of(Magnitude(0.5, pattern="channel"), [w], [kept], DEPTHWISE)
    assert_equal(found, [best_blocks(w, (3, 3, 1, 1), kept)])


def test_rank_of_blocks_by_layer():
    weights, method = [random(10, 5), random(8, 4, seed=1)], Magnitude(0.5, "uniform", "1x4")
    found = masks_of(method, weights, [25, 14])
    expected = [best_blocks(w, (4, 1), kept) for w, kept in zip(weights, [25, 14])]
    assert_equal(found, expected)


def test_rank_of_blocks_over_all_layers():
    # Every block of the second weight tensor has a higher score than all blocks of the first weight
    # tensor. The first weight tensor still keeps one block, because every weight tensor keeps at
    # least one.
    weights = [random(8, 5), np.sign(random(8, 4, seed=1)) * 2]
    found = masks_of(Magnitude(0.5, "global", "1x4"), weights, [20])
    expected = [best_blocks(weights[0], (4, 1), 4), best_blocks(weights[1], (4, 1), 16)]
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("allocation", "shapes", "kept"),
    [("global", [(10, 5)], [5]), ("uniform", [(10, 5), (6, 4)], [5, 2])],
)
def test_every_layer_keeps_a_channel(allocation, shapes, kept):
    # A channel has 10 weights in the first layer and 6 weights in the second layer. At 90 %
    # sparsity, the layers may keep only 5 and 2 weights, but each layer still keeps a channel.
    method = Magnitude(0.9, allocation, "channel")
    assert all(mask.any() for mask in masks_of(method, [random(*s) for s in shapes], kept))


def test_min_kept_in_partial_blocks():
    # The pattern 1x4 splits the 5 inputs into a block of 4 weights and a block of 1 weight. The
    # second block has the higher score, but fewer weights than `min_kept`.
    kernel = np.array([[0.1], [0.1], [0.1], [0.1], [0.5]])
    (found,) = masks_of(Magnitude(0.5, pattern="1x4", min_kept=4), [kernel], [4])
    assert found.sum() >= 4


@pytest.mark.parametrize("shape", [(8, 3), (7, 3), (2, 2, 8, 3)])
def test_rank_in_n_of_m(shape):
    w, method = random(*shape), Magnitude(0.5, pattern="2:4")
    (found,) = masks_of(method, [w], method.kept_counts([shape], [KERNEL], 0.5, ["w"]))
    rows, kept = np.moveaxis(np.abs(w), -2, -1), np.moveaxis(found, -2, -1)
    for row in np.ndindex(*rows.shape[:-1]):
        for start in range(0, rows.shape[-1], 4):
            group, on = rows[row][start : start + 4], kept[row][start : start + 4]
            assert on.sum() == min(2, len(group))
            assert min(group[on]) > max(group[~on], default=-1)


# GOLDEN contains the bits of the masks that keep 30 of the 63 weights in LAYERS. The masks must be
# the same on every backend.
GOLDEN = "01a7fdb322130f52"


@every(1)
def test_masks_are_equal_on_every_backend():
    for masks in (reference_global(LAYERS, 30, 1), masks_of(Magnitude(0.5), LAYERS, [30])):
        assert np.packbits(np.concatenate([m.ravel() for m in masks])).tobytes().hex() == GOLDEN


# -- minimum per layer in a global ranking ---------------------------------------------------------

# Kernels of ResNet-20 for CIFAR-10 (272,282 weights).
RESNET_20 = [
    *[(3, 3, 3, 16), *[(3, 3, 16, 16)] * 6],
    *[(3, 3, 16, 32), (1, 1, 16, 32), *[(3, 3, 32, 32)] * 5],
    *[(3, 3, 32, 64), (1, 1, 32, 64), *[(3, 3, 64, 64)] * 5, (64, 10)],
]


@every(24)
@pytest.mark.parametrize("sparsity", [0.98, 0.99, 0.999])
def test_global_ranking_keeps_the_minimum_of_every_layer(sparsity):
    # Every second layer has very small weights. With `min_kept=1`, a global ranking would keep only
    # one weight of each of these layers.
    weights = [random(*s, scale=1e-3 if i % 2 else 1.0) for i, s in enumerate(RESNET_20)]
    method = Magnitude(sparsity)
    layouts = [KERNEL] * len(weights)
    kept = method.kept_counts(RESNET_20, layouts, sparsity, [""] * len(weights))
    found = masks_of(method, weights, kept)
    floors = floor_counts(RESNET_20, sparsity)
    counts = [int(mask.sum()) for mask in found]
    assert sum(counts) == kept[0]
    assert counts[1::2] == floors[1::2].tolist()
    assert_equal(found, reference_global(weights, kept[0], floors))
    plain = masks_of(Magnitude(sparsity, min_kept=1), weights, kept)
    assert {int(mask.sum()) for mask in plain[1::2]} == {1}


@every(24)
@pytest.mark.parametrize("pattern", ["1x4", "4x1", "4x4"])
def test_global_ranking_of_blocks_meets_the_target(pattern):
    shapes = [(32, 32), (64, 64), (64, 12)]
    weights = [random(*s, scale=1e-3 if i else 1.0) for i, s in enumerate(shapes)]
    found = masks_of(Magnitude(0.9, pattern=pattern), weights, [589])
    counts = [int(mask.sum()) for mask in found]
    assert 589 - 16 < sum(counts) <= 589
    assert all(c > f - 16 for c, f in zip(counts, floor_counts(shapes, 0.9)))


# -- counts and constructor ------------------------------------------------------------------------

SHAPES, PATHS = [(10, 10), (30, 10)], ["a/kernel", "b/kernel"]


@pytest.mark.parametrize(
    ("method", "sparsity", "expected"),
    [
        (Magnitude(0.9), 0.9, [40]),
        (Magnitude(0.9), 0.0, [400]),
        (Magnitude(0.9, min_kept=50), 0.9, [40]),
        (Magnitude(0.9, "uniform"), 0.9, [10, 30]),
        (Magnitude(0.9, "uniform", "1x4"), 0.5, [50, 150]),
        # With ERK, the numbers of kept weights are proportional to sum(shape): 20 and 40.
        (Magnitude(0.9, "erk"), 0.9, [13, 27]),
        (Magnitude(0.9, {"b/.*": 0.5}), 0.9, [10, 150]),
        # The schedule is halfway: the current sparsity 0.45 is half of the target 0.9.
        (Magnitude(0.9, {"b/.*": 0.5}), 0.45, [55, 225]),
    ],
)
def test_kept_counts(method, sparsity, expected):
    assert method.kept_counts(SHAPES, [KERNEL] * len(SHAPES), sparsity, PATHS).tolist() == expected


@pytest.mark.parametrize("inputs", [8, 7])
def test_n_of_m_ranking_keeps_the_counted_weights(inputs):
    method, w = Magnitude(0.5, pattern="2:4"), random(inputs, 6)
    (count,) = method.kept_counts([w.shape], [KERNEL], 0.1, ["kernel"])
    (mask,) = masks_of(method, [w], [count])
    assert mask.sum() == count


def test_schedule():
    assert Magnitude(0.9).schedule == Cubic(0.9)
    assert Magnitude(Sigmoid(0.9)).schedule == Sigmoid(0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is the fraction of zeros"),
        ({"sparsity": None}, "sparsity is the fraction of zeros"),
        ({"allocation": "local"}, "allocation must be one of"),
        ({"allocation": np.array([0.5, 0.5])}, "allocation must be one of"),
        ({"allocation": {"conv": 1.5}}, r"allocation\['conv'\] is the fraction of zeros"),
        ({"pattern": "4"}, "pattern must be 'unstructured'"),
        ({"pattern": "2:4"}, "'2:4' fixes the sparsity at 0.5. Received: sparsity=0.9"),
        ({"pattern": "1:4", "sparsity": Constant(0.5)}, "at 0.75. Received: sparsity=0.5"),
        ({"frequency": 0}, "frequency must be a whole number >= 1. Received: frequency=0"),
        ({"frequency": 10.0}, "frequency must be a whole number >= 1. Received: frequency=10.0"),
        ({"min_kept": 0}, "min_kept must be a whole number >= 1. Received: min_kept=0"),
        ({"min_kept": True}, "min_kept must be a whole number >= 1. Received: min_kept=True"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        Magnitude(**{"sparsity": 0.9, **arguments})
