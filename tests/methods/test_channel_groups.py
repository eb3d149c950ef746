"""Tests of channel groups: the number of channels to keep, and their ranking across layers."""

import numpy as np
import pytest
from keras import ops

from keras_dst._backend.jit import jit
from keras_dst.masks import KERNEL, Layout
from keras_dst.methods import Magnitude
from keras_dst.methods.channels import ChannelGroups, Channels, alive, channel_scores
from tests.backends import every

pytestmark = every(24)

# The model adds the outputs of a stem (3 -> 4 channels) and a branch (4 -> 2 -> 4 channels). The
# head of the model (4 inputs, 5 outputs) is not pruned. The first group of coupled channels
# contains the channels of the sum. The second group of coupled channels contains the two channels
# inside the branch.
STAYS = [0.0, 0.0, 1.0]
SUM, INSIDE = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
GROUPS = ChannelGroups(
    sizes=[4, 2],
    shares=np.array([[STAYS, SUM], [SUM, INSIDE], [INSIDE, SUM], [SUM, STAYS]]),
    costs=np.array([[12, 1200], [8, 800], [8, 200], [20, 20]]),
)
SHAPES = [(3, 4), (4, 2), (2, 4)]
NAMES = ["stem/kernel", "inside/kernel", "outer/kernel"]
LAYOUTS = [Layout(channels=Channels(ids, GROUPS)) for ids in ([0, 1, 2, 3], [4, 5], [0, 1, 2, 3])]


def counts(method, sparsity):
    return method.kept_counts(SHAPES, LAYOUTS, sparsity, NAMES).tolist()


def uniform(sparsity=0.5, **arguments):
    return Magnitude(sparsity, "uniform", "channel", **arguments)


def rank(method, scores, kept=None):
    kept = method.kept_counts(SHAPES, LAYOUTS, 0.5, NAMES) if kept is None else kept
    ranked = jit(lambda s, k: method.rank(s, LAYOUTS, k))
    tensors = [ops.convert_to_tensor(np.asarray(s, "float32")) for s in scores]
    return [ops.convert_to_numpy(m) for m in ranked(tensors, ops.convert_to_tensor(kept, "int32"))]


def columns(score, shape):
    """Return scores in the shape of a weight: all weights of a unit get the score of the unit."""
    return np.broadcast_to(np.asarray(score, "float32"), shape)


def test_kept_share_of_channels_parameters_and_flops():
    kept = np.array([2.0, 1.0])
    assert GROUPS.kept_share(kept, "channels") == 3 / 6
    assert GROUPS.kept_share(kept, "parameters") == pytest.approx((6 + 2 + 2 + 10) / 48)
    assert GROUPS.kept_share(kept, "flops") == pytest.approx((600 + 200 + 50 + 10) / 2220)
    tensor = GROUPS.kept_share(ops.array([2.0, 1.0]), "flops")
    assert float(tensor) == pytest.approx(860 / 2220)


@pytest.mark.parametrize(
    ("counted_in", "sparsity", "expected"),
    [
        ("channels", 0.0, [4, 2]),
        ("channels", 0.5, [2, 1]),
        ("channels", 0.9, [1, 1]),
        # The target is 24 of 48 parameters. The channel counts [2, 1] (2 channels of the sum,
        # 1 channel inside the branch) keep 20 parameters. The channel counts [3, 1] would keep 30
        # parameters, which is farther from the target.
        ("parameters", 0.5, [2, 1]),
        # The target is 1110 of 2220 FLOPs. The channel counts [3, 1] keep 1290 FLOPs. The channel
        # counts [2, 1] would keep 860 FLOPs, which is farther from the target.
        ("flops", 0.5, [3, 1]),
        # The target is 666 FLOPs. The channel counts [2, 1] keep 860 FLOPs. The channel counts
        # [1, 1] would keep 430 FLOPs, which is farther from the target.
        ("flops", 0.7, [2, 1]),
    ],
)
def test_uniform_counts_are_nearest_to_the_target(counted_in, sparsity, expected):
    assert counts(uniform(counted_in=counted_in), sparsity) == expected


def test_counts_of_wide_groups_are_multiples():
    groups = ChannelGroups([64, 20, 12], np.zeros((1, 2, 4)), np.ones((1, 2)))
    layout = Layout(channels=Channels(np.arange(96), groups))
    for sparsity in np.linspace(0, 0.99, 34):
        found = uniform().kept_counts([(3, 96)], [layout], sparsity, ["a"])
        assert found[0] in range(8, 65, 8)
        assert found[1] in (8, 16, 20)
        assert 1 <= found[2] <= 12


def test_every_group_keeps_at_least_min_kept():
    assert counts(uniform(min_kept=3), 0.9) == [3, 2]


def test_a_named_group_has_its_own_sparsity_and_the_others_meet_the_target():
    method = Magnitude(0.5, {"inside": 0.0}, "channel")
    assert counts(method, 0.5) == [1, 2]
    assert counts(Magnitude(0.5, {"stem": 0.75, "outer": 0.5}, "channel"), 0.5) == [2, 1]


def test_masks_of_a_sum_agree_and_keep_the_highest_mean_score():
    scores = [
        # Division of these scores by their mean gives 2, 0.5, 1 and 0.5.
        columns([4, 1, 2, 1], SHAPES[0]),
        columns([1, 3], SHAPES[1]),
        # Division of these scores by their mean gives 0.5, 2.5, 0.5 and 0.5.
        columns([10, 50, 10, 10], SHAPES[2]),
    ]
    stem, inside, outer = rank(uniform(), scores)
    np.testing.assert_array_equal(stem, columns([1, 1, 0, 0], SHAPES[0]))
    np.testing.assert_array_equal(outer, columns([1, 1, 0, 0], SHAPES[2]))
    np.testing.assert_array_equal(inside, columns([0, 1], SHAPES[1]))


@pytest.mark.parametrize(
    ("counted_in", "expected"),
    [
        # If two channels have the same score, the channel with the smaller index is kept.
        ("channels", [[1, 1, 0, 0], [1, 0]]),
        # The target is 1110 of 2220 FLOPs. A model with the expected masks has 1020 FLOPs. With one
        # more channel, the model would have 1530 FLOPs.
        ("flops", [[1, 1, 0, 0], [1, 1]]),
    ],
)
def test_a_global_ranking_meets_the_target(counted_in, expected):
    scores = [
        columns([4, 1, 2, 1], SHAPES[0]),
        columns([1, 1], SHAPES[1]),  # Division of these scores by their mean gives 1 and 1.
        columns([10, 50, 10, 10], SHAPES[2]),
    ]  # The mean scores per channel are 1.25, 1.5, 0.75, 0.5, 1, 1.
    method = Magnitude(0.5, "global", "channel", counted_in=counted_in)
    masks = rank(method, scores)
    kept = [masks[0][0].astype(int).tolist(), masks[1][0].astype(int).tolist()]
    assert kept == expected
    np.testing.assert_array_equal(masks[0][0], masks[2][0])


def test_a_global_ranking_keeps_the_minimum_of_every_group():
    scores = [columns([9, 9, 9, 9], s) for s in (SHAPES[0], SHAPES[2])]
    scores.insert(1, np.full(SHAPES[1], 1e-9))
    for sparsity in (0.5, 0.9):
        masks = rank(Magnitude(sparsity, "global", "channel"), scores, [round(2**20 * 0.1)])
        assert all(mask.any() for mask in masks)


def test_scores_below_zero_mark_pruned_weights():
    scores = [columns([4, -1, 4, -1], SHAPES[0]), np.ones(SHAPES[1]), np.ones(SHAPES[2])]
    found = channel_scores([ops.array(s, "float32") for s in scores], LAYOUTS)
    expected = [1.5, 0.25, 1.5, 0.25, 1, 1]
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-6)


def test_a_unit_without_a_channel_is_kept():
    layouts = [
        Layout(channels=Channels([0, -1, 1], ChannelGroups([2], np.zeros((1, 2, 2)), [[1, 1]])))
    ]
    method = uniform(0.5)
    (mask,) = method.rank([ops.array([[5.0, 0.0, 1.0]])], layouts, ops.array([1]))
    np.testing.assert_array_equal(ops.convert_to_numpy(mask), [[True, True, False]])


def test_a_weight_without_channels_is_kept_in_a_coupled_model():
    method = uniform(0.5)
    scores = [ops.ones(s) for s in (*SHAPES, (2, 2))]
    masks = method.rank(scores, [*LAYOUTS, KERNEL], ops.array([2, 1]))
    assert ops.convert_to_numpy(masks[-1]).all()


def test_alive_channels_follow_from_the_masks():
    masks = rank(uniform(), [np.ones(s) for s in SHAPES])
    found = alive([ops.convert_to_tensor(m) for m in masks], LAYOUTS)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(found), [True, True, False, False, True, False, True]
    )


def test_invalid_counted_in_and_pattern_raise():
    with pytest.raises(ValueError, match=r"Received: 'latency'.*sparsity_at_latency"):
        Magnitude(0.5, pattern="channel", counted_in="latency")
    with pytest.raises(ValueError, match="can be used only with pattern='channel'"):
        Magnitude(0.5, pattern="1x4", counted_in="flops")
    with pytest.raises(ValueError, match="round_to must be a whole number"):
        Magnitude(0.5, pattern="channel", round_to=0)
