"""Tests of fifty steps of every method against the equations of the papers in NumPy.

A reference class computes one pruning method in NumPy and stores its scores, counters or
thresholds. Each reference class has three methods. `effective` returns the masked weights, with
which the network computes its outputs. `step` receives the gradients of the masked weights and runs
one step of the optimizer. `between` runs between two training steps, and updates masks, scores,
counters or thresholds. The argument of `between` is the number of finished steps.
"""

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import methods, schedules
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import base
from tests import reference
from tests.reference import Momentum

STEPS, EPOCHS = 50, 8  # The schedule spans 8 epochs, but the test trains for only 1 epoch.
TOTAL = STEPS * EPOCHS
KERNELS = ("w1", "w2")
SIZE = 12 * 16 + 16 * 4
RATE = 0.05


def keep_highest(scores, kept):
    """Return one boolean mask per array, which is True for the `kept` highest scores of all arrays
    together.

    Among entries with equal scores, the first entries are kept.
    """
    flat = np.concatenate([s.ravel() for s in scores])
    mask = np.zeros(flat.size, bool)
    mask[np.lexsort((np.arange(flat.size), -flat))[:kept]] = True
    parts = np.split(mask, np.cumsum([s.size for s in scores])[:-1])
    return [m.reshape(s.shape) for m, s in zip(parts, scores)]


class Dense:
    """The dense baseline."""

    def __init__(self, p):
        self.p = p
        self.mask = {n: np.ones_like(p[n], bool) for n in KERNELS}
        self.optimizer = Momentum(p, RATE)

    def masked(self):
        return {n: w * self.mask[n] if n in KERNELS else w for n, w in self.p.items()}

    effective = masked

    def step(self, g, count):
        self.optimizer.step(self.p, g)

    def between(self, count):
        pass


class Magnitude(Dense):
    """Magnitude pruning with a cubic schedule; weights and gradients are masked."""

    def step(self, g, count):
        super().step({n: d * self.mask[n] if n in KERNELS else d for n, d in g.items()}, count)
        self.p.update(self.masked())

    def between(self, count):
        if count % 10 == 0:
            target = 0.8 * (1 - (1 - min(count / (0.75 * TOTAL), 1)) ** 3)
            found = keep_highest([abs(self.p[n]) for n in KERNELS], round((1 - target) * SIZE))
            self.mask = dict(zip(KERNELS, found))
            self.p.update(self.masked())


class Revival(Magnitude):
    """Magnitude pruning that trains dense weights with the gradients of masked weights."""

    def step(self, g, count):
        self.optimizer.step(self.p, g)

    def between(self, count):
        dense = dict(self.p)
        super().between(count)
        self.p = dense


class DST(Dense):
    """DST in NumPy: a weight is kept if its magnitude exceeds the threshold of its unit.

    The thresholds t are trained with the long-tailed derivative of the step function. The factor
    `alpha` scales the penalty sum(exp(-t)). The thresholds are reset to 0 if at most 1 % of the
    weights of a layer remain.
    """

    alpha = 0.02

    def __init__(self, p):
        super().__init__(p)
        self.t = {n: np.zeros(p[n].shape[1]) for n in KERNELS}
        self.of_t = Momentum(self.t, RATE)

    def effective(self):
        self.mask = {n: abs(self.p[n]) - self.t[n] > 0 for n in KERNELS}
        return self.masked()

    def step(self, g, count):
        g, of_t = dict(g), {}
        for n in KERNELS:
            w, q = self.p[n], abs(self.p[n]) - self.t[n]
            far = abs(q)
            slope = np.where(far <= 0.4, 2 - 4 * far, np.where(far <= 1, 0.4, 0))
            of_t[n] = -(g[n] * w * slope).sum(0) - self.alpha * np.exp(-self.t[n])
            g[n] = g[n] * self.mask[n] + g[n] * w * slope * np.sign(w)
        super().step(g, count)
        self.of_t.step(self.t, of_t)
        for n in KERNELS:
            if (abs(self.p[n]) - self.t[n] > 0).mean() <= 0.01:
                self.t[n][:] = 0


class FlipOut(Magnitude):
    """FlipOut: prune by the score |w|^2 / (flips + 1) at steps 15, 30 and 45, with gradient
    noise."""

    def __init__(self, p):
        super().__init__(p)
        self.flips = {n: np.zeros_like(p[n]) for n in KERNELS}
        self.table = np.random.default_rng(5).standard_normal((4096, 256), "float32")

    def step(self, g, count):
        g, signs = dict(g), {n: np.sign(self.p[n]) for n in KERNELS}
        for index, n in enumerate(reference.NAMES):
            mask = self.mask.get(n, 1)
            g[n] = g[n] * mask
            rows = hashed(5, count, index, np.arange(-(-g[n].size // 256))) % 4096
            noise = self.table[rows].ravel()[: g[n].size].reshape(g[n].shape)
            g[n] = g[n] + np.linalg.norm(g[n]) / np.sqrt(g[n].size) * noise * mask
        super().step(g, count)
        for n in KERNELS:
            self.flips[n] = (self.flips[n] + (np.sign(self.p[n]) != signs[n])) * self.mask[n]

    def between(self, count):
        if count in (15, 30, 45):
            density = {15: 0.5, 30: 0.25, 45: 0.2}[count]
            scores = [
                np.where(self.mask[n], self.p[n] ** 2 / (self.flips[n] + 1), -1) for n in KERNELS
            ]
            self.mask = dict(zip(KERNELS, keep_highest(scores, round(density * SIZE))))
            self.p.update(self.masked())


class OptG(Dense):
    """OptG: train a score for each weight. The gradient of the score is the weight times the
    gradient of the masked weight. The learning rate of the scores is proportional to the current
    sparsity of the schedule."""

    def __init__(self, p):
        super().__init__(p)
        self.v = {n: np.zeros_like(p[n]) for n in KERNELS}
        # `fast` contains scores that are trained with the learning rate of the weights. If a step
        # changes a score in `fast` by d, the same score in `v` changes by `rate * d`.
        self.fast = {n: np.zeros_like(p[n]) for n in KERNELS}
        self.of_v = Momentum(self.fast, RATE)
        self.rate = 0.0

    def step(self, g, count):
        before = {n: v.copy() for n, v in self.fast.items()}
        self.of_v.step(self.fast, {n: g[n] * self.p[n] for n in KERNELS})
        for n in KERNELS:
            self.v[n] = self.v[n] + self.rate * (self.fast[n] - before[n])
        super().step({n: d * self.mask[n] if n in KERNELS else d for n, d in g.items()}, count)

    def between(self, count):
        if count % 2 == 0:
            ends = [1 / (1 + np.exp(-6 * x)) for x in (-0.5, count / STEPS - 0.5, 0.5)]
            done = (ends[1] - ends[0]) / (ends[2] - ends[0])
            self.rate = max(done, 1e-9)
            kept = round((1 - 0.8 * done) * SIZE)
            self.mask = dict(zip(KERNELS, keep_highest([self.v[n] for n in KERNELS], kept)))


class ST3(Dense):
    """ST-3 in NumPy: the threshold is a quantile of all magnitudes, and is subtracted from each
    magnitude.

    The remaining weights of each unit are rescaled. The straight-through estimator gives the
    gradient, and the sparsity follows a cubic ramp.
    """

    def __init__(self, p):
        super().__init__(p)
        self.tau, self.factor = 0.0, {n: np.ones(p[n].shape[1]) for n in KERNELS}

    def effective(self):
        soft = {
            n: self.factor[n] * np.sign(self.p[n]) * (abs(self.p[n]) - self.tau) for n in KERNELS
        }
        return {n: soft[n] * self.mask[n] if n in KERNELS else w for n, w in self.p.items()}

    masked = effective

    def between(self, count):
        if count % 10:
            return
        sparsity = 0.8 * (1 - (1 - count / (TOTAL / 2)) ** 3)
        sizes = [abs(self.p[n]) for n in KERNELS]
        kept = keep_highest(sizes, round((1 - sparsity) * SIZE))
        self.mask = dict(zip(KERNELS, kept))
        self.tau = max((s[~m].max() for s, m in zip(sizes, kept) if not m.all()), default=0.0)
        for n, size in zip(KERNELS, sizes):
            share = (size * self.mask[n]).sum(0) / size.sum(0)
            self.factor[n] = 1.01 / (share + 0.01)


class SET(Magnitude):
    """SET: at each mask update, drop the smallest kept weights and grow random pruned weights.

    With ERK densities, the two kernels keep 30 and 21 weights.
    """

    kept = (30, 21)

    def growth(self, n, count):
        index, shape = KERNELS.index(n), self.p[n].shape
        found = hashed(hashed(7, count, index), np.arange(self.p[n].size))
        return ((found & 0xFFFFFF) / 2**24).reshape(shape)

    def between(self, count):
        if count == 0:
            for n, kept in zip(KERNELS, self.kept):
                (self.mask[n],) = keep_highest([SET.growth(self, n, 0)], kept)
        elif count % 10 == 0:
            drop = 0.3 / 2 * (1 + np.cos(np.pi * count / (0.75 * TOTAL)))
            for n, kept in zip(KERNELS, self.kept):
                size = np.where(self.mask[n], abs(self.p[n]), -1)
                (stay,) = keep_highest([size], kept - round(drop * kept))
                ranked = np.where(stay, np.inf, self.growth(n, count))
                (self.mask[n],) = keep_highest([ranked], kept)
                grown = self.mask[n] & ~stay
                self.p[n][grown] = 0
                self.optimizer.v[n][grown] = 0
        self.p.update(self.masked())


class RigL(SET):
    """RigL: like SET, but grow the pruned weights with the largest gradients."""

    def step(self, g, count):
        self.dense = {n: abs(g[n]) for n in KERNELS}
        super().step(g, count)

    def growth(self, n, count):
        return self.dense[n]


def hashed(*numbers):
    """Return the hash that keras_dst uses for random numbers, computed with unsigned integers."""
    with np.errstate(over="ignore"):
        state = np.uint32(0)
        for number in numbers:
            number = np.asarray(number, "int64").astype("uint32")
            state = state * np.uint32(31) + number + np.uint32(0x3C6EF372)
            state = (state ^ (state >> np.uint32(16))) * np.uint32(2246822507)
            state = (state ^ (state >> np.uint32(13))) * np.uint32(3266489909)
            state = state ^ (state >> np.uint32(16))
    return state


STAIRS = schedules.Geometric(0.8, rate=0.5, begin_step=0, end_step=45)
CURVE = schedules.Sigmoid(0.8, begin_step=0, end_step=STEPS, steepness=6.0)
METHODS = {
    "dense": (None, Dense),
    "magnitude": (methods.Magnitude(0.8, frequency=10), Magnitude),
    "magnitude-revival": (methods.Magnitude(0.8, revival=True, frequency=10), Revival),
    "dst": (methods.DST(alpha=0.02), DST),
    "flipout": (methods.FlipOut(STAIRS, seed=5), FlipOut),
    "optg": (methods.OptG(CURVE), OptG),
    "st3": (methods.ST3(0.8, frequency=10), ST3),
    "set": (methods.SET(0.8, frequency=10, seed=7), SET),
    "rigl": (methods.RigL(0.8, frequency=10, seed=7), RigL),
}


@pytest.mark.parametrize("name", METHODS)
def test_fifty_steps_equal_the_equations(name, monkeypatch):
    monkeypatch.setattr(base, "_LONG", 1)  # Treat 50 steps as a long training run.
    method, expected = METHODS[name]
    model = reference.keras_net()
    optimizer = keras.optimizers.SGD(RATE, momentum=0.9)
    if isinstance(method, methods.LayerMethod):
        keras_dst.sparsify(model, method)
    elif method is not None:
        optimizer = keras_dst.SparseOptimizer(optimizer, method)
    expected = expected(reference.parameters(model))
    start = {n: w.copy() for n, w in expected.p.items()}

    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = reference.data(STEPS)
    driver = [SparseTraining(epochs=EPOCHS)] if method else []
    model.fit(
        x.reshape(-1, x.shape[-1]), y.ravel(), batch_size=x.shape[1], shuffle=False, verbose=0,
        callbacks=driver,
    )  # fmt: skip

    expected.between(0)
    for count, (inputs, classes) in enumerate(zip(x, y)):
        g = reference.gradients(inputs, classes, expected.effective())
        expected.step(g, count)
        expected.between(count + 1)
    expected.effective()

    found = reference.parameters(keras_dst.strip(model))
    for n, w in expected.masked().items():
        assert np.abs(w - start[n]).max() > 1e-3, f"{n} has not moved"
        np.testing.assert_allclose(found[n], w, atol=1e-4, err_msg=n)
        if n in KERNELS and method:
            assert 0.1 < np.mean(found[n] == 0) < 0.95
