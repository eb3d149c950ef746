"""Allocation: how a model's sparsity is shared out among its weights."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from keras_dst.schedules import check_sparsity

__all__ = ["densities", "kept_counts"]

NAMES = ("global", "uniform", "erk")


def check(allocation) -> None:
    """Raise unless this is `"global"`, `"uniform"`, `"erk"` or a dict of sparsities by name."""
    if isinstance(allocation, Mapping):
        for name, sparsity in allocation.items():
            try:
                re.compile(name)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"allocation: {name!r} is no name and no regular expression: {error}"
                ) from error
            check_sparsity(sparsity, f"allocation[{name!r}]")
    elif allocation not in NAMES:
        raise ValueError(
            f"allocation must be one of {', '.join(map(repr, NAMES))} or a dict from weight names "
            f"or regular expressions to sparsities. Received: {allocation!r}"
        )


def densities(
    allocation: str | Mapping[str, float],
    shapes: Sequence[Sequence[int]],
    density: float,
    names: Sequence[str] = (),
) -> np.ndarray:
    """Density of every weight, float64 in [0, 1].

    The whole has the density asked for, except under a dict, which may ask for another.

    Args:
        allocation: `"uniform"`: the same for all. `"erk"` (Erdős-Rényi-Kernel): proportional to
            `sum(shape) / prod(shape)`, at most 1, so that small layers stay denser. A dict: the
            named weights get 1 - their sparsity, all others `density`; a name is the weight's
            path, or else a regular expression found in it; where several fit, the last one counts.
        shapes: shapes of the weights.
        density: fraction of weights kept, overall.
        names: paths of the weights, for a dict.

    Raises:
        ValueError: for another allocation, or when a name in the dict fits no weight.

    Example:
        >>> keras_dst.allocation.densities("erk", [(10, 10), (1000, 1000)], 0.1)

    Source: arXiv 1911.11134, section 3 (ERK).
    """
    check(allocation)
    if isinstance(allocation, Mapping):
        return _by_name(allocation, density, names)
    if allocation == "erk":
        return _erk(shapes, density)
    return np.full(len(shapes), float(density))


def _erk(shapes, density):
    sizes = np.array([math.prod(s) for s in shapes], "float64")
    raw = np.array([sum(s) for s in shapes], "float64") / sizes
    full = np.zeros(len(sizes), bool)
    while True:
        # Weights that would exceed density 1 are kept whole; the others share what is left.
        budget = density * sizes.sum() - sizes[full].sum()
        result = np.where(full, 1.0, 0.0)
        if not full.all():
            result[~full] = raw[~full] * budget / (raw * sizes)[~full].sum()
        if (result <= 1).all():
            return result
        full |= result > 1


def _by_name(allocation, density, names):
    result = np.full(len(names), float(density))
    for key, sparsity in allocation.items():
        fitting = [i for i, name in enumerate(names) if key == name]
        fitting = fitting or [i for i, name in enumerate(names) if re.search(key, name)]
        if not fitting:
            raise ValueError(
                f"allocation[{key!r}] fits no weight. The weights are: {', '.join(names)}"
            )
        result[fitting] = 1 - sparsity
    return result


def kept_counts(
    allocation: str | Mapping[str, float],
    shapes: Sequence[Sequence[int]],
    sparsity: float,
    names: Sequence[str] = (),
    final_sparsity: float | None = None,
) -> np.ndarray:
    """How many weights to keep: one count for all when global, else one per weight (int64).

    The counts add up to the exact number for the whole, `round((1 - sparsity) * size)`, except
    under a dict, where each weight has its own.

    Args:
        allocation, shapes, names: as for `densities`.
        sparsity: fraction of zeros now.
        final_sparsity: what the sparsities of a dict stand for; they are scaled to `sparsity`
            while it grows.

    Example:
        >>> keras_dst.allocation.kept_counts("uniform", [(10, 10), (30, 10)], 0.9)
        array([10, 30])
    """
    sizes = np.array([math.prod(s) for s in shapes], "int64")
    if allocation == "global":
        return np.array([round((1 - sparsity) * int(sizes.sum()))])
    if isinstance(allocation, Mapping) and final_sparsity:
        allocation = {k: v * sparsity / final_sparsity for k, v in allocation.items()}
    exact = densities(allocation, shapes, 1 - sparsity, names) * sizes
    counts = np.floor(exact + 1e-9).astype("int64")
    by_name = isinstance(allocation, Mapping)
    total = round(float(exact.sum()) if by_name else (1 - sparsity) * int(sizes.sum()))
    # The largest remainders take what rounding down left over.
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: max(0, total - int(counts.sum()))]] += 1
    return np.minimum(counts, sizes)


def equal_drop(
    sparsities: Sequence[float], drops: np.ndarray, sizes: Sequence[int], sparsity: float
) -> np.ndarray:
    """Sparsity of every weight, such that the largest drop of all is as small as can be.

    Every weight becomes as sparse as one drop, common to all, lets it, read off its curve between
    the points measured; the common drop is the one at which the whole has the sparsity asked for.
    Drops below 0, and smaller ones at higher sparsities, count as none further; where that leaves
    a choice, sparsities are even.

    Args:
        sparsities: where the drops were measured, from 0 on, increasing.
        drops: what is lost at each of them when one weight alone is pruned: an array of shape
            (weights, sparsities).
        sizes: numbers of entries of the weights.
        sparsity: fraction of zeros, overall.

    Returns:
        float64 in [0, max(sparsities)], one number per weight.

    Raises:
        ValueError: for a sparsity beyond those measured, or drops that are no finite numbers.

    Example:
        >>> drops = [[0.0, 0.1, 0.5], [0.0, 0.0, 0.1]]
        >>> keras_dst.allocation.equal_drop([0.0, 0.5, 0.9], drops, [10, 10], 0.7)
        array([0.5, 0.9])
    """
    check_sparsity(sparsity)
    grid, drops, counts = (np.asarray(x, "float64") for x in (sparsities, drops, sizes))
    if sparsity > grid[-1]:
        raise ValueError(
            f"Expected a sparsity of at most {grid[-1]:g}, the highest that was measured. "
            f"Received: {sparsity:g}"
        )
    if not np.isfinite(drops).all():
        raise ValueError(f"Expected drops that are finite numbers. Received: {drops.tolist()}")
    drops = np.maximum.accumulate(np.maximum(drops, 0), axis=1)
    # The slope decides ties alone: it makes the curves invertible.
    drops = drops / (drops.max() or 1.0) + 1e-6 * grid
    common = np.unique(drops)  # between these the sparsities are linear in the common drop
    shares = np.array([np.interp(common, curve, grid) for curve in drops])
    return np.array([np.interp(sparsity * counts.sum(), counts @ shares, row) for row in shares])
