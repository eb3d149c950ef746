"""Tests of FlipOut: pruning events, scores, counters of sign flips, and noise."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_dst
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import FlipOut
from keras_dst.schedules import Constant, Cubic, Geometric
from tests import models
from tests.backends import every

pytestmark = every(2)


def numbers(*values):
    """Return the number of finished steps and the length of training as int32 tensors."""
    return [ops.convert_to_tensor(value, "int32") for value in values]


@pytest.mark.parametrize(
    ("sparsity", "every"),
    [(0.75, 117), (0.9375, 70), (1 - 0.5**6, 50), (1 - 0.5**8, 39), (0.999, 32)],
)
def test_pruning_events_are_at_the_epochs_of_the_paper(sparsity, every):
    found = FlipOut(sparsity).schedule.jumps(350)
    events = round(np.log2(1 / (1 - sparsity)))
    # The paper rounds the time of each pruning event to whole epochs. The highest sparsity in the
    # paper is 1 - 0.5^10 = 0.99902, which this test rounds to 0.999.
    assert len(found) == events
    np.testing.assert_allclose(found, every * np.arange(1, events + 1), atol=0.03 * 350)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_events_remove_a_constant_share_and_the_last_event_reaches_the_sparsity(sparsity, rate):
    schedule = FlipOut(sparsity, rate=rate).schedule
    events = schedule.jumps(1000)
    for number, event in enumerate(events[:-1], start=1):
        assert schedule.at(event - 1, 1000) == pytest.approx(1 - (1 - rate) ** (number - 1))
        assert schedule.at(event, 1000) == pytest.approx(1 - (1 - rate) ** number)
    assert schedule.at(events[-1] - 1, 1000) < sparsity
    assert schedule.at(events[-1], 1000) == pytest.approx(sparsity, abs=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_score(power):
    w = np.float32([-2, 0.5, 0, 3])
    state = {"flips": ops.convert_to_tensor(np.int16([0, 1, 0, 7])),
             "mask": ops.convert_to_tensor([True, True, True, False])}  # fmt: skip
    (score,) = FlipOut(0.9, power=power).scores([ops.convert_to_tensor(w)], [state])
    expected = [2**power, 0.5**power / 2, 0, -1]
    np.testing.assert_allclose(ops.convert_to_numpy(score), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "dtype"),
    [(None, "int32"), (254, "uint8"), (255, "int16"), (2**15 - 2, "int16"), (2**15 - 1, "int32")],
)
def test_counters_cannot_overflow(steps, dtype):
    assert FlipOut(0.9).init([None], steps) == [{"flips": ("zeros", dtype)}]


def test_the_callback_passes_the_number_of_steps_to_the_method():
    x, y = models.data()
    optimizer = keras_dst.SparseOptimizer(keras.optimizers.SGD(0.5), FlipOut(0.5))
    model = models.compiled(models.residual(), optimizer)
    counted = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # On JAX, Keras updates the variables of the model only when a callback reads
            # `self.model`.
            _ = self.model
            counted.append(sum(int(s["flips"].numpy().sum()) for s in optimizer.states))

    model.fit(x, y, batch_size=32, epochs=2, verbose=0, callbacks=[SparseTraining(), Watch()])
    assert {s["flips"].dtype for s in optimizer.states} == {"uint8"}
    assert max(counted) > 0


def test_noise_scales_with_the_gradient_and_skips_pruned_weights():
    rng = np.random.default_rng(0)
    grad = rng.standard_normal((200, 300)).astype("float32") * 0.01
    mask = rng.random(grad.shape) < 0.25
    grads = [ops.convert_to_tensor(grad * mask), None, ops.convert_to_tensor(grad[0])]
    found = FlipOut(0.9, noise=2.0).perturb(
        grads, [ops.convert_to_tensor(mask), None, None], *numbers(3, 100)
    )
    assert found[1] is None
    added = ops.convert_to_numpy(found[0]) - grad * mask
    assert not added[~mask].any()
    expected = 2 * np.linalg.norm(grad * mask) / np.sqrt(grad.size)
    assert added[mask].std() == pytest.approx(expected, rel=0.02)
    assert (ops.convert_to_numpy(found[2]) != grad[0]).all()


def test_zero_noise_changes_no_gradient():
    grads = [ops.ones((2, 2))]
    assert FlipOut(0.9, noise=0.0).perturb(grads, [None], *numbers(0, 100)) is grads


@pytest.mark.parametrize(
    ("total", "factor"), [(0, 1), (1, 0.1), (2000, 0.1), (5000, 0.25), (20_000, 1), (100_000, 1)]
)
def test_noise_grows_with_the_length_of_training(total, factor):
    grads = [ops.ones((2, 2))]
    (one,) = FlipOut(0.9, noise=1.0).perturb(grads, [None], *numbers(3, total))
    (found,) = FlipOut(0.9).perturb(grads, [None], *numbers(3, total))
    one, found = (ops.convert_to_numpy(g) - 1 for g in (one, found))
    np.testing.assert_allclose(found, factor * one, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "epochs", "expected"),
    [
        (FlipOut(0.75), 20, Geometric(0.75, end=2 / 3, rate=0.5)),
        (FlipOut(0.75), 19, Cubic(0.75)),
        (FlipOut(0.75), None, Geometric(0.75, end=2 / 3, rate=0.5)),
        (FlipOut(0.75, rate=0.5), 3, Geometric(0.75, end=2 / 3, rate=0.5)),
        (FlipOut(Constant(0.75)), 3, Constant(0.75)),
    ],
)
def test_a_short_training_prunes_in_small_steps(method, epochs, expected):
    assert method.schedule_over(epochs) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"power": 0}, "power"),
        ({"noise": -1}, "noise"),
        ({"rate": 1.0}, "rate"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"pattern": "1by4"}, "pattern"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlipOut(**{"sparsity": 0.9, **arguments})


def test_a_custom_schedule_is_used():
    assert FlipOut(Constant(0.9)).schedule == Constant(0.9)
