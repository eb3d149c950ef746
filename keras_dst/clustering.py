r"""Weight clustering: replace the weights of a kernel by few distinct values (arXiv 1510.00149).

```text
w_i = s_i c_{l_i}        l_i = argmin_k |w_i / s_i - c_k|        s_i = max |w| of the channel
```

One-dimensional k-means finds the values c_k. After pruning, no nonzero weights are close to zero.
The initial values of k-means are evenly spaced, but none is in the gap that pruning leaves around
zero. Deviations from the paper:

* The values c_k are relative to s, the largest magnitude in each output channel. The values -1 and
  1 do not change. Int8 quantization also divides the weights of each output channel by their
  largest magnitude. All weights of a cluster therefore become the same int8 number.
* Zero is always one of the values, and its cluster contains exactly the weights that are zero.
  Clustering therefore does not change the sparsity.
* During fine-tuning, the optimizer updates each weight individually, so the weights of a cluster
  become different. After each step, the callback `KeepClusters` therefore sets c_k to the mean of
  w_i / s_i over the weights in cluster k. In the paper, the optimizer updates c_k with the sum of
  the gradients of all weights in cluster k. The mean and the sum of the gradients move the cluster
  value c_k in the same direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dst._reporting.weights import weights_of
from keras_dst._utils.filters import Filters, check_filters, select
from keras_dst._utils.validation import check_integer
from keras_dst.masks import Layout
from keras_dst.surgery import check_model

_ITERATIONS = 300
# Two weights count as equal if they differ by less than this value, because kernels are float32.
_EQUAL = 1e-6


def cluster_weights(model, clusters: int = 16, filters: Filters = None):
    """Reduce every kernel of a model to at most `clusters` distinct values, in place.

    The distinct values are relative to the largest magnitude of each output channel. If an int8
    file has one scale per channel, each weight tensor has at most `clusters` distinct integers.
    Vela, the compiler for Arm Ethos NPUs, compresses a tensor better if it has few distinct
    integers. Zero weights stay zero, and zero counts as one of the values. If a kernel already has
    at most `clusters` distinct values, its weights change only by float32 rounding.

    To fine-tune the model afterwards, use the callback `keras_dst.callbacks.KeepClusters`.

    Args:
        model: Built Keras model without sparse layers.
        clusters: Maximum number of distinct values per kernel, at least 4. Defaults to 16.
        filters: Kernels to cluster: the path of a kernel, a regular expression that matches whole
            paths, or a list of paths and expressions. A function that receives a variable and
            returns a bool is also accepted. Defaults to None, which clusters all kernels.

    Returns:
        The model.

    Raises:
        ValueError: If `clusters` is not a whole number of at least 4, or if the model has sparse
            layers. A ValueError is also raised if `filters` select no kernel, or if a kernel
            contains NaN or infinite values.

    Example:
        >>> keras_dst.cluster_weights(model, clusters=16)

    Source: arXiv 1510.00149, section 3.
    """
    for kernel in _clustered_kernels(model, clusters, filters):
        kernel.project()
    return model


class KeepClusters(keras.callbacks.Callback):
    """Callback that keeps the number of distinct values per kernel small during fine-tuning.

    When `fit` begins, the callback clusters the kernels as `keras_dst.cluster_weights` does. After
    each batch, the callback sets all weights of a cluster to their mean. Zero weights stay zero,
    and the largest weight of each output channel does not change. If `steps_per_execution` is above
    1, Keras calls the callback only after several steps. Between two calls of the callback, the
    weights of a cluster may then differ.

    Args:
        clusters: Maximum number of distinct values per kernel, at least 4. Defaults to 16.
        filters: Kernels to cluster, as for `keras_dst.cluster_weights`. Defaults to None, which
            clusters all kernels.

    Raises:
        ValueError: If `clusters` is not a whole number of at least 4. `fit` raises a ValueError for
            every model that `keras_dst.cluster_weights` rejects.

    Example:
        >>> model.fit(x, y, epochs=2, callbacks=[keras_dst.callbacks.KeepClusters(16)])
    """

    def __init__(self, clusters: int = 16, filters: Filters = None):
        super().__init__()
        self.clusters = check_integer(clusters, "clusters", 4)
        check_filters(filters)
        self.filters = filters

    def on_train_begin(self, logs=None):
        self._kernels = None

    def on_epoch_begin(self, epoch, logs=None):
        # `on_train_begin` is too early, because BackupAndRestore may later restore the weights in
        # its own `on_train_begin`.
        if self._kernels is None:
            self._kernels = _clustered_kernels(self.model, self.clusters, self.filters)
            self._project()

    def on_train_batch_end(self, batch, logs=None):
        self._project()

    def on_train_end(self, logs=None):
        # The optimizer may have overwritten the kernels with their moving averages.
        self._project()

    def _project(self):
        _ = self.model  # On JAX, reading `self.model` copies the weights of `fit` to the variables.
        for kernel in self._kernels or ():
            kernel.project()


@dataclass
class _Kernel:
    """Kernel of a layer, and the cluster to which each weight belongs.

    Attributes:
        variable: Variable of the kernel.
        scales: Largest magnitude of each output channel, in a shape that broadcasts to the kernel.
        values: Value of each cluster, before the multiplication by `scales`. The value of cluster 0
            is 0.
        labels: Cluster index of each weight, in the shape of the kernel.
    """

    variable: Any
    scales: np.ndarray
    values: np.ndarray
    labels: np.ndarray

    def project(self) -> None:
        """Set each weight to the mean of its cluster.

        Clusters with the values 0, -1 and 1 do not change.
        """
        relative, labels = _array(self.variable) / self.scales, self.labels.ravel()
        counts = np.bincount(labels, minlength=len(self.values))
        sums = np.bincount(labels, relative.ravel(), minlength=len(self.values))
        fixed = (counts == 0) | np.isin(self.values, (-1, 0, 1))
        means = np.clip(sums / np.maximum(counts, 1), -1, 1)
        self.values = np.where(fixed, self.values, means)
        self.variable.assign(self.values[self.labels] * self.scales)


def _clustered_kernels(model, clusters, filters) -> list[_Kernel]:
    """Assign the weights of the selected kernels to clusters, without changing the weights."""
    check_model(model)
    check_integer(clusters, "clusters", 4)
    weights = [weight for weight in weights_of(model) if weight.prunable]
    masked = [weight.variable.path for weight in weights if weight.mask is not None]
    if masked:
        raise ValueError(
            f"Expected a model without sparse layers. Received: masks of {', '.join(masked)}. "
            "Fix: call keras_dst.strip(model) first."
        )
    weights = [weight for weight in weights if "float" in weight.variable.dtype]
    variables = [weight.variable for weight in weights]
    chosen = select(variables, filters, [(variable.path,) for variable in variables])
    if not any(chosen):
        names = ", ".join(variable.path for variable in variables) or "none"
        raise ValueError(
            f"Expected filters that select at least one kernel of '{model.name}'. Received: "
            f"filters={filters!r}, which select no kernel. Kernels: {names}"
        )
    return [
        _clustered_kernel(w.variable, w.layout, clusters)
        for w, kept in zip(weights, chosen)
        if kept
    ]


def _clustered_kernel(variable, layout: Layout, clusters: int) -> _Kernel:
    kernel = _array(variable)
    if not np.isfinite(kernel).all():
        raise ValueError(
            f"Expected finite weights. Received: {variable.path} with NaN or infinite values."
        )
    outputs = [axis % kernel.ndim for axis in layout.outputs]
    inputs = tuple(axis for axis in range(kernel.ndim) if axis not in outputs)
    scales = np.abs(kernel).max(axis=inputs, keepdims=True)
    scales[scales == 0] = 1
    relative = kernel / scales
    nonzero = np.sort(relative[relative != 0])
    values = k_means(nonzero, clusters - (len(nonzero) < kernel.size))
    labels = np.where(relative == 0, 0, 1 + _nearest(values, relative))
    return _Kernel(variable, scales, np.concatenate([[0.0], values]), labels)


def k_means(numbers: np.ndarray, clusters: int) -> np.ndarray:
    """Return the cluster centers of one-dimensional k-means, in ascending order.

    If `numbers` contains -1 or 1, the cluster centers contain this value too.

    Args:
        numbers: Nonzero weights in ascending order, each divided by the largest magnitude of its
            channel.
        clusters: Number of centers, at least 2.

    Returns:
        At most `clusters` centers. If `numbers` has at most `clusters` distinct values, the
        function returns these values.
    """
    if not len(numbers):
        return numbers
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) > _EQUAL)
    if len(starts) <= clusters:
        return _with_fixed_ends(_means(numbers, starts), numbers)
    # After pruning, no nonzero weights are close to zero. Place no initial center in the gap that
    # pruning leaves around zero.
    split = np.searchsorted(numbers, 0)
    low, high = numbers[split - 1 : split + 1] if 0 < split < len(numbers) else (0.0, 0.0)
    values = np.linspace(numbers[0], numbers[-1] - (high - low), clusters)
    values[values > low] += high - low
    values[-1] = numbers[-1]
    for _ in range(_ITERATIONS):
        starts = np.searchsorted(numbers, (values[1:] + values[:-1]) / 2)
        starts = np.concatenate([[0], starts])
        filled = np.diff(starts, append=len(numbers)) > 0
        means = values.copy()
        means[filled] = _means(numbers, starts[filled])
        means = _with_fixed_ends(means, numbers)
        if np.array_equal(means, values):
            break
        values = means
    return values


def _means(numbers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the mean of each section of the array `numbers`.

    `starts` holds the index of the first number in each section.
    """
    return np.add.reduceat(numbers, starts) / np.diff(starts, append=len(numbers))


def _with_fixed_ends(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return `values` without rounding errors in its first and last entry. The first value becomes
    -1 if `numbers` begins with -1, and the last value becomes 1 if `numbers` ends with 1."""
    first = -1 if numbers[0] == -1 else values[0]
    last = 1 if numbers[-1] == 1 else values[-1]
    return np.concatenate([[first], values[1:-1], [last]]) if len(values) > 1 else values


def _nearest(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the index of the nearest entry of `values` for each entry of `numbers`."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, numbers, side="right")


def _array(variable) -> np.ndarray:
    """Return a variable as a float64 array, so that sums of its weights are precise."""
    return ops.convert_to_numpy(ops.convert_to_tensor(variable)).astype("float64")
