"""Tests of the benchmark of long training runs, as in the papers: data and learning rates."""

import numpy as np
import pytest

from benchmarks.accuracy.papers import BATCH, Epochs, WarmCosine

pytestmark = pytest.mark.once


def test_epochs_after_a_restart_equal_those_of_one_run():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (BATCH + 3, 8, 8, 3), "uint8"), np.arange(BATCH + 3)
    whole = Epochs(x, y, seed=1)
    for epoch in range(3):
        resumed = Epochs(x, y, seed=1, epoch=epoch)
        for expected, found in zip(whole[0], resumed[0]):
            np.testing.assert_array_equal(found, expected)
        whole.on_epoch_end()


def test_shifted_images_are_filled_with_their_mean():
    x = np.full((BATCH, 8, 8, 3), 40, "uint8")
    # One of the 64 pixels is 104, all others are 40, so the mean of each image is 41.
    x[:, 0, 0] = 104
    images, _ = Epochs(x, np.arange(BATCH), seed=0)[0]
    assert images.shape == (BATCH, 8, 8, 3)
    assert set(np.unique(images)) == {40, 41, 104}


def test_rate_rises_and_falls_to_zero():
    rate = WarmCosine(0.1, total=100, warm=5)
    assert float(rate(0)) == pytest.approx(0.02)
    assert float(rate(50)) == pytest.approx(0.05)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-8)
