"""Tests of weight clustering: results of k-means, and fine-tuning with few distinct values."""

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst.callbacks import KeepClusters
from keras_dst.clustering import k_means
from tests import models
from tests.backends import every, once

pytestmark = every(16)


def dense(kernel):
    """Return a model with one dense layer and no bias."""
    model = keras.Sequential(
        [keras.Input((len(kernel),)), keras.layers.Dense(len(kernel[0]), use_bias=False)]
    )
    model.layers[0].set_weights([np.array(kernel, "float32")])
    return model


def kernel_of(model):
    return keras.ops.convert_to_numpy(model.layers[0].kernel)


def distinct(model):
    """Quantize the kernels per channel to int8.

    Return the largest number of distinct int8 values in a kernel.
    """
    counts = []
    for variable in model.trainable_variables:
        if variable.name == "kernel":
            w = keras.ops.convert_to_numpy(variable)
            others = (0, 1, 3) if "depthwise" in variable.path else tuple(range(w.ndim - 1))
            scales = np.abs(w).max(others, keepdims=True)
            counts.append(len(np.unique(np.rint(127 * w / np.where(scales, scales, 1)))))
    return max(counts)


@once
@pytest.mark.parametrize(
    ("numbers", "clusters", "expected"),
    [
        # For these weights, k-means needs two iterations. The cluster values at both ends, -1 and
        # 1, do not move.
        ([-1, -0.75, 0.25, 0.5, 1], 3, [-1, 0.375, 1]),
        ([-0.75, -0.5, 0.5, 0.75], 2, [-0.625, 0.625]),  # No weight is -1 or 1.
        # These weights already have only three distinct values.
        ([-1, -1, 0.5, 0.5, 1], 3, [-1, 0.5, 1]),
        ([1, 1], 4, [1]),
        # No weight is assigned to the cluster value -0.75, so this value does not move.
        ([-1, -0.5, -0.375, -0.25, 1], 4, [-1, -0.75, -0.375, 1]),
        ([], 4, []),
    ],
)
def test_k_means_equals_manual_results(numbers, clusters, expected):
    np.testing.assert_allclose(k_means(np.array(numbers, float), clusters), expected, atol=1e-6)


@once
def test_clusters_are_scaled_per_channel_and_zeros_are_preserved():
    column = np.array([-1, -0.9375, 0, 0.0625, 0.125, 0.4375, 0.5, 1])
    model = dense(column[:, None] * [2, 8])
    assert keras_dst.cluster_weights(model, clusters=6) is model
    # One of the six cluster values is 0. The other cluster values start at -1, 0.25, 0.5, 0.75 and
    # 1.
    expected = np.array([-1, -1, 0, 0.09375, 0.09375, 0.46875, 0.46875, 1])
    np.testing.assert_array_equal(kernel_of(model), expected[:, None] * [2, 8])


@once
def test_clustering_again_changes_nothing():
    keras.utils.set_random_seed(0)
    model = models.sequential()
    keras_dst.cluster_weights(model, clusters=8)
    assert distinct(model) == 8
    before = model.get_weights()
    keras_dst.cluster_weights(model, clusters=8)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_allclose(new, old, rtol=1e-6)


@once
def test_filters_select_kernels():
    keras.utils.set_random_seed(0)
    model = models.sequential()
    before = model.get_weights()
    keras_dst.cluster_weights(model, clusters=4, filters=".*dense/kernel|.*dense_[0-9]+/kernel")
    changed = [
        v.path
        for v, old, new in zip(model.weights, before, model.get_weights())
        if not np.array_equal(old, new)
    ]
    assert len(changed) == 2
    assert all("dense" in path for path in changed)


def test_each_cluster_moves_by_the_mean_step_of_its_weights():
    column = np.array([1, 0.25, 0.25, 0.5, 0.5, 0.5, 0, 0], "float32")
    model = dense(column[:, None])
    model.compile(keras.optimizers.SGD(0.125), "mse")
    x = np.array([[2, 1, 3, 1, 0, 2, 5, 7]], "float32")
    y = x @ column[:, None] + 0.5
    model.fit(x, y, epochs=1, verbose=0, callbacks=[KeepClusters(4)])
    # For every sample, the gradient of the loss with respect to the output is -1.
    step = 0.125 * x[0]
    moved = column + [0, *[step[1:3].mean()] * 2, *[step[3:6].mean()] * 3, 0, 0]
    np.testing.assert_allclose(kernel_of(model)[:, 0], moved, rtol=1e-6)


def test_fine_tuning_preserves_the_number_of_clusters_and_zeros():
    keras.utils.set_random_seed(0)
    x, y = models.data()
    model = models.compiled(models.sequential())
    for variable in model.trainable_variables:
        if variable.name == "kernel":
            w = keras.ops.convert_to_numpy(variable)
            variable.assign(w * (np.abs(w) > np.quantile(np.abs(w), 0.5)))
    sparsity = keras_dst.report(model).sparsity
    history = model.fit(x, y, epochs=6, verbose=0, callbacks=[KeepClusters(8)])
    assert distinct(model) <= 8
    assert keras_dst.report(model).sparsity == sparsity
    assert history.history["loss"][-1] < history.history["loss"][0]


@once
@pytest.mark.parametrize("clusters", [3, 4.0, "16"])
def test_clusters_must_be_a_whole_number(clusters):
    with pytest.raises(ValueError, match=r"clusters must be a whole number >= 4"):
        keras_dst.cluster_weights(dense([[1.0]]), clusters)
    with pytest.raises(ValueError, match=r"clusters must be a whole number >= 4"):
        KeepClusters(clusters)


@once
def test_clustering_of_unsuitable_weights_raises():
    model = dense([[1.0, np.nan]])
    with pytest.raises(ValueError, match=r"Expected finite weights.*kernel"):
        keras_dst.cluster_weights(model)
    model = dense([[1.0, 2.0]])
    keras_dst.sparsify(model, keras_dst.methods.DST(0.5))
    with pytest.raises(ValueError, match=r"keras_dst\.strip"):
        keras_dst.cluster_weights(model)
    with pytest.raises(ValueError, match="does not match any name"):
        keras_dst.cluster_weights(dense([[1.0]]), filters="conv")
    with pytest.raises(ValueError, match=r"filters=\[\], which select no kernel"):
        keras_dst.cluster_weights(dense([[1.0]]), filters=[])
