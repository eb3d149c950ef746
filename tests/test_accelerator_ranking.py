"""Tests of the ranking algorithm for accelerators, which runs on the CPU in these tests.

This file runs the tests in `tests/test_masks.py` again with this algorithm. These tests compare the
result with a sort in NumPy.
"""

import keras
import numpy as np
import pytest
from keras import ops

import keras_dst
from keras_dst import masks
from keras_dst._backend import ranking
from tests import test_masks
from tests.test_masks import (  # noqa: F401
    test_kth_is_exceeded_by_exactly_k_scores,
    test_the_threshold_search_among_zeros_takes_few_steps,
    test_top_k,
    test_top_k_equals_a_stable_sort,
    test_top_k_in_half_precision,
    test_top_k_of_each_tensor,
    test_top_k_of_each_tensor_equals_a_stable_sort,
    test_top_k_of_groups_equals_a_stable_sort,
    test_top_k_of_scores_over_fifteen_orders_of_magnitude,
    test_top_k_of_several_rows_bundles_and_slabs,
    test_top_k_of_tied_groups,
    test_top_k_stops_at_the_first_group_that_does_not_fit,
    test_top_k_that_starts_from_a_sample,
    test_top_k_with_a_score_near_the_lowest_float,
    test_top_k_without_a_finite_score,
)


@pytest.fixture(autouse=True, scope="module")
def accelerator():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "on_accelerator", lambda tensor: True)
        patch.setattr(ranking, "_SECTIONS", 4)  # this halves the compile time
        test_masks.compiled_top_k.cache_clear()
        yield
    test_masks.compiled_top_k.cache_clear()


BACKEND = keras.backend.backend()
LARGE = (1024, 1024)  # on a CPU, the rows would be counted in 4 slabs


def lowered_for_cuda(shapes, each):
    """Lower `top_k` for CUDA with JAX, and return the program. Lowering needs no GPU."""
    import jax
    from jax import export

    kept = jax.ShapeDtypeStruct((len(shapes),) if each else (), "int32")
    scores = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    function = jax.jit(lambda scores, kept: masks.top_k(scores, kept))
    return export.export(function, platforms=["cuda"])(scores, kept).mlir_module()


@pytest.mark.skipif(BACKEND != "jax", reason="JAX lowers programs for other devices")
@pytest.mark.parametrize("each", [False, True])
def test_the_lowered_program_has_one_loop(each, monkeypatch):
    assert lowered_for_cuda([LARGE] * 3, each).count("stablehlo.while") == 1
    monkeypatch.setattr(ranking, "on_accelerator", lambda tensor: False)
    assert lowered_for_cuda([LARGE] * 3, each).count("stablehlo.while") > 1


def launched_by_torch(size):
    """Return the number of operations in `top_k`, and the bytes that the operations read and write.

    Operations on fewer than 1 % of the entries are not counted. Both results are divided by the
    number of search steps plus one, and the bytes also by the number of scores.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    calls, moved, steps = [], [], []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves((args, kwargs, found)) if torch.is_tensor(t)]
            if not func.is_view and max((t.numel() for t in tensors), default=0) >= size // 100:
                calls.append(func)
                moved.extend(t.numel() * t.element_size() for t in tensors)
            return found

    count = ranking._Ranking._count_above
    scores = ops.convert_to_tensor(np.random.default_rng(0).standard_normal(size), "float32")
    with pytest.MonkeyPatch.context() as patch, Count():
        patch.setattr(
            ranking._Ranking, "_count_above", lambda *args: steps.append(1) or count(*args)
        )
        masks.top_k([scores], size // 10, first=[1])
    return len(calls) / (len(steps) + 1), sum(moved) / size / (len(steps) + 1)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch launches every operation separately")
def test_number_of_torch_operations_does_not_depend_on_the_size():
    (few, _), (many, bytes_per_step) = launched_by_torch(1 << 18), launched_by_torch(1 << 21)
    assert few < 6
    assert many < 6
    assert bytes_per_step < 9


def test_an_update_copies_the_kept_counts_from_the_device_once(monkeypatch):
    model = keras.Sequential([keras.Input((8,)), *(keras.layers.Dense(8) for _ in range(5))])
    model.compile(keras_dst.SparseOptimizer("sgd", keras_dst.methods.Magnitude(0.5)), "mse")
    sparse = keras_dst.callbacks.SparseTraining()
    x = np.ones((4, 8), "float32")
    model.fit(x, x, batch_size=2, verbose=0, callbacks=[sparse])
    read, convert = [], ops.convert_to_numpy
    monkeypatch.setattr(ops, "convert_to_numpy", lambda t: read.append(t) or convert(t))
    sparse._measure()
    assert [tuple(counts.shape) for counts in read] == [(5,)]
