"""Tests of SET and RigL: densities, dropped and grown weights, and optimizer variables."""

import functools
from itertools import pairwise

import keras
import numpy as np
import pytest
from keras import ops

import keras_dst
from keras_dst._backend.jit import jit
from keras_dst.callbacks import SparseTraining
from keras_dst.masks import KERNEL
from keras_dst.methods import SET, RigL
from keras_dst.methods.base import ScheduleState
from tests import models
from tests.backends import every
from tests.test_optimizers import train_step

pytestmark = every(48)

both = pytest.mark.parametrize("cls", [SET, RigL])
x, y = models.data(size=128)


@functools.cache
def compiled_update(method):
    return jit(lambda w, s, kept, now: method.update(w, s, [KERNEL], kept, now))


def update(method, w, mask, gradient, kept, step=50, progress=0.1):
    """Return the new mask of one weight tensor, and a mask of the grown entries, as NumPy
    arrays."""
    dtypes = ("int32", "float32", "float32")
    now = ScheduleState(
        *(ops.convert_to_tensor(n, d) for n, d in zip((step, progress, 0.5), dtypes))
    )
    state = {"mask": ops.convert_to_tensor(mask), "gradient": ops.convert_to_tensor(gradient)}
    kept = ops.convert_to_tensor([kept], "int32")
    (found,) = compiled_update(method)([ops.convert_to_tensor(w)], [state], kept, now)
    return {k: ops.convert_to_numpy(v) for k, v in found.items()}


def problem(seed=0, kept=60):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((20, 10)).astype("float32")
    mask = np.zeros(200, bool)
    mask[rng.permutation(200)[:kept]] = True
    mask = mask.reshape(w.shape)
    return w * mask, mask, rng.standard_normal(w.shape).astype("float32")


@every(24)
@both
@pytest.mark.parametrize("progress", [0.1, 0.4, 0.75, 0.9])
def test_the_dropped_fraction_follows_a_cosine(cls, progress):
    w, mask, gradient = problem()
    found = update(cls(0.7), w, mask, gradient, 60, progress=progress)
    drop = round(60 * 0.15 * (1 + np.cos(np.pi * min(progress / 0.75, 1))))
    stayed = mask & found["mask"] & ~found["grown"]
    assert found["mask"].sum() == 60
    assert stayed.sum() == 60 - drop
    assert found["grown"].sum() == drop
    assert abs(w[stayed]).min() >= abs(w[mask & ~stayed]).max(initial=0)


def test_rigl_grows_weights_with_the_largest_gradients():
    w, mask, gradient = problem()
    found = update(RigL(0.7), w, mask, gradient, 60)
    free = ~found["mask"] | found["grown"]
    assert found["grown"].any()
    assert abs(gradient[found["grown"]]).min() > abs(gradient[free & ~found["grown"]]).max()


def test_set_grows_random_weights():
    w, mask, gradient = problem()
    grown = [update(SET(0.7), w, mask, gradient, 60, step)["grown"] for step in range(200)]
    assert (np.sum(grown, axis=0)[~mask] > 0).all()
    assert (grown[0] != grown[1]).any()


@both
def test_the_first_mask_is_random_and_grows_no_weight(cls):
    w, _, gradient = problem()
    full = np.ones_like(w, bool)
    # The random numbers of an update are hashes of the seed and the step. The masks of 40 different
    # steps are therefore as independent as the masks of 40 different seeds.
    found = [update(cls(0.7), w, full, gradient, 60, step) for step in range(40)]
    assert all(f["mask"].sum() == 60 and not f["grown"].any() for f in found)
    often = np.mean([f["mask"] for f in found], axis=0)
    assert abs(np.corrcoef(often.ravel(), abs(w).ravel())[0, 1]) < 0.25


@every(24)
@both
@pytest.mark.parametrize(("pattern", "group"), [("1x4", 4), ("channel", 20)])
def test_blocks_and_channels(cls, pattern, group):
    w, _, gradient = problem()
    full = np.ones_like(w, bool)
    method = cls(0.5, pattern=pattern)
    first = update(method, w, full, gradient, 100, 0)["mask"]
    found = update(method, w * first, first, gradient, 100)
    blocks = found["mask"].T.reshape(-1, group)
    assert (blocks.all(1) | ~blocks.any(1)).all()
    assert found["mask"].sum() == 100


SHAPES = [(10, 10), (30, 50), (50, 10)]


@pytest.mark.parametrize(
    ("allocation", "sparsity", "expected"),
    [
        # With the allocation "uniform", SET and RigL leave the first weight tensor dense.
        ("uniform", 0.75, [100, 319, 106]),
        # If the first tensor stayed dense, its 100 weights would be half of all kept weights. The
        # first tensor is therefore pruned, too.
        ("uniform", 0.9, [10, 150, 50]),
        ({"a": 0.5}, 0.75, [50, 375, 125]),
    ],
)
def test_densities(allocation, sparsity, expected):
    method = SET(sparsity, allocation=allocation)
    counts = method.kept_counts(SHAPES, [KERNEL] * 3, sparsity, ["a", "b", "c"])
    assert counts.tolist() == expected


@every(16)
@both
def test_grown_weights_and_their_slots_start_at_zero(cls):
    keras.utils.set_random_seed(0)
    optimizer = keras_dst.SparseOptimizer(keras.optimizers.Adam(0.01), cls(0.7, frequency=4))
    model = models.compiled(models.residual(), optimizer)
    seen = []

    class Watch(keras.callbacks.Callback):
        """Callback that checks that grown weights and their optimizer states start at 0."""

        def on_train_batch_end(self, batch, logs=None):
            # On JAX, Keras updates the variables of the model only when a callback reads
            # `self.model`.
            _ = self.model
            masks = [s["mask"].numpy().copy() for s in optimizer.states]
            if seen:
                for kernel, old, new in zip(optimizer.kernels, seen[-1], masks):
                    grown = new & ~old
                    slots = optimizer._slots(kernel)
                    assert len(slots) == 2
                    for values in (kernel, *slots):
                        assert not values.numpy()[grown].any()
            seen.append(masks)

    model.fit(x, y, batch_size=16, epochs=3, verbose=0, callbacks=[SparseTraining(), Watch()])
    changes = [sum((a != b).sum() for a, b in zip(*pair)) for pair in pairwise(seen)]
    assert max(changes) > 10
    # The masks are not updated in the last quarter of the 24 steps.
    assert not any(changes[18:])
    assert len({sum(m.sum() for m in masks) for masks in seen}) == 1


@both
def test_a_custom_loop(cls):
    keras.utils.set_random_seed(0)
    method = cls(0.8, stop_step=12, frequency=3)
    model = models.compiled(models.residual(), keras_dst.SparseOptimizer("sgd", method))
    step = train_step(model, keras.losses.SparseCategoricalCrossentropy())
    masks = []
    for i in range(16):
        part = slice(8 * i, 8 * i + 8)
        step(x[part], y[part])
        masks.append(np.concatenate([s["mask"].numpy().ravel() for s in model.optimizer.states]))
        for kernel, state in zip(model.optimizer.kernels, model.optimizer.states):
            assert not kernel.numpy()[~state["mask"].numpy()].any()
    assert all(abs(m.mean() - 0.2) < 1e-2 for m in masks)
    changed = [bool((a != b).any()) for a, b in pairwise(masks)]
    assert changed == [i in (3, 6, 9) for i in range(2, 17)]


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocation": "global"}, "erk"),
        ({"pattern": "2:4", "sparsity": 0.5}, "N:M"),
        ({"drop_fraction": 1.0}, "drop_fraction"),
        ({"stop": 0}, "stop"),
        ({"stop_step": 0.5}, "stop_step"),
        ({"stop": 0.5, "stop_step": 100}, "Expected only one of stop and stop_step"),
        ({"stop": 0.75, "stop_step": 100}, "Expected only one of stop and stop_step"),
        ({"sparsity": 1}, "sparsity"),
    ],
)
def test_invalid_arguments_raise(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**{"sparsity": 0.9, **arguments})


@pytest.mark.parametrize("cls", [SET, RigL])
def test_an_old_config_with_stop_and_stop_step_loads(cls):
    config = {**cls(0.9, stop_step=100).get_config(), "stop": 0.75}
    again = cls.from_config(config)
    assert (again.stop, again.stop_step) == (None, 100)
