"""A two-layer network with batch normalization in NumPy (float64), written from its equations.

    a = x w1    n = gamma (a - mean) / sqrt(var + eps) + beta    h = max(n, 0)    z = h w2 + b2

`keras_net` builds the same network in Keras. The tests train this network in NumPy with the methods
of the papers, and compare each training step with keras_dst.
"""

import keras
import numpy as np

EPSILON = 1e-3
MOMENTUM = 0.99  # Momentum of the moving mean and variance in batch normalization.
SIZES = (12, 16, 4)  # Inputs, hidden units, classes.

NAMES = ("w1", "gamma", "beta", "w2", "b2")


def keras_net(dense=keras.layers.Dense, **arguments):
    """Return the Keras network. The outputs are logits; the weights are in the order of NAMES."""
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((SIZES[0],)),
            dense(SIZES[1], use_bias=False, **arguments),
            keras.layers.BatchNormalization(epsilon=EPSILON, momentum=MOMENTUM),
            keras.layers.ReLU(),
            dense(SIZES[2], **arguments),
        ]
    )


def data(steps, batch=16, seed=0):
    """Return batches of inputs and class labels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((steps, batch, SIZES[0])).astype("float32")
    teacher = rng.standard_normal((SIZES[0], SIZES[2]))
    return x, (x @ teacher).argmax(-1)


def forward(x, p):
    """Return the logits, and a dict with the values that `backward` needs. Normalize with batch
    statistics."""
    x = np.asarray(x, "float64")
    a = x @ p["w1"]
    mean, var = a.mean(0), a.var(0)
    normal = (a - mean) / np.sqrt(var + EPSILON)
    n = p["gamma"] * normal + p["beta"]
    h = np.maximum(n, 0)
    cache = {"x": x, "mean": mean, "var": var, "normal": normal, "n": n, "h": h}
    return h @ p["w2"] + p["b2"], cache


def backward(dz, p, cache):
    """Return the gradients of all weights, computed from the gradients `dz` of the logits."""
    dn = dz @ p["w2"].T * (cache["n"] > 0)
    normal = cache["normal"]
    dnormal = dn * p["gamma"]
    da = (dnormal - dnormal.mean(0) - normal * (dnormal * normal).mean(0)) / np.sqrt(
        cache["var"] + EPSILON
    )
    return {
        "w1": cache["x"].T @ da,
        "gamma": (dn * normal).sum(0),
        "beta": dn.sum(0),
        "w2": cache["h"].T @ dz,
        "b2": dz.sum(0),
    }


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(z, y):
    """Return the mean cross-entropy of a batch and its gradient with respect to the logits."""
    p = softmax(z)
    rows = np.arange(len(y))
    dz = p.copy()
    dz[rows, y] -= 1
    return -np.log(p[rows, y]).mean(), dz / len(y)


def gradients(x, y, p):
    """Return the gradients of the mean cross-entropy of a batch with respect to weights `p`."""
    z, cache = forward(x, p)
    return backward(cross_entropy(z, y)[1], p, cache)


class Momentum:
    """SGD with momentum, as in Keras, for a dict of weights.

    A step with the gradient g updates the velocity, `v = momentum * v - rate * g`, and adds the
    velocity to the weight.
    """

    def __init__(self, p, rate=0.1, momentum=0.9):
        self.rate, self.momentum = rate, momentum
        self.v = {name: np.zeros_like(w) for name, w in p.items()}

    def step(self, p, g):
        for name in p:
            self.v[name] = self.momentum * self.v[name] - self.rate * g[name]
            p[name] = p[name] + self.v[name]


def parameters(model):
    """Return the weights of `keras_net` in float64, as a dict whose keys are NAMES."""
    weights = [v.numpy().astype("float64") for v in stock_weights(model)]
    return dict(zip(NAMES, weights))


def stock_weights(model):
    """Return the trainable variables of a stock network, in the order of NAMES."""
    ends = ("/kernel", "/gamma", "/beta", "/bias")
    found = [v for v in model.trainable_variables if v.path.endswith(ends)]
    assert len(found) == len(NAMES)
    return found
