"""Tests of the ranking algorithm for accelerators, which runs on the CPU in these tests.

This file runs the tests in `tests/test_masks.py` again with this algorithm. These tests compare the
result with a sort in NumPy.
"""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_dst
from benchmarks.data import apply_method
from keras_dst import masks
from keras_dst._backend import ranking
from keras_dst._training.drivers import drivers_of
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


@pytest.mark.skipif(BACKEND != "torch", reason="only PyTorch sorts the last scores")
@pytest.mark.parametrize("each", [False, True])
def test_masks_do_not_depend_on_how_many_scores_are_sorted(each, monkeypatch):
    rng = np.random.default_rng(0)
    scores = [rng.standard_normal(shape).astype("float32") for shape in [(300, 70), (9,), (5000,)]]
    scores[2] = np.round(scores[2], 1)  # creates ties
    scores[0][:100] = 0
    kept = [5000, 3, 400] if each else 5403

    def found():
        tensors = [ops.convert_to_tensor(s) for s in scores]
        first = None if each else [1] * len(scores)
        masks_found = masks.top_k(tensors, ops.convert_to_tensor(kept, "int32"), first=first)
        return [ops.convert_to_numpy(mask) for mask in masks_found]

    by_device = []
    for most in (1 << 20, 4000, 300, 5, 0):
        monkeypatch.setattr(ranking, "_SORTED", most)
        by_device.append(found())
    monkeypatch.setattr(ranking, "on_accelerator", lambda tensor: False)
    for each_found in by_device:
        test_masks.assert_equal(each_found, found())


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


class Operations:
    """Operations that torch runs within a context, which a GPU would launch as kernels.

    Attributes:
        launched: Number of operations, without views.
        moved: Number of bytes that the operations read and write.
        waits: Number of times that the host reads a value from the device.
    """

    def __init__(self):
        self.launched = self.moved = self.waits = 0

    @contextlib.contextmanager
    def counted(self):
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        reads_rows = {"index_select", "embedding", "index_put_"}
        outer = self

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                found = func(*args, **(kwargs or {}))
                name = func.overloadpacket.__name__
                outer.waits += name in ("_local_scalar_dense", "nonzero")
                if not func.is_view:
                    # Functions that select rows do not read the whole tensor.
                    used = (args[1:], found) if name in reads_rows else (args, kwargs, found)
                    tensors = {id(t): t for t in tree_leaves(used) if torch.is_tensor(t)}
                    outer.launched += 1
                    outer.moved += sum(t.numel() * t.element_size() for t in tensors.values())
                return found

        with Count():
            yield self


METHODS = {
    "Magnitude": (keras_dst.methods.Magnitude(0.9), 20),
    "FlipOut": (keras_dst.methods.FlipOut(0.9), 22),
    "DCIL": (keras_dst.methods.DCIL(0.9), 20),
    "OptG": (keras_dst.methods.OptG(0.9), 40),
    "RigL": (keras_dst.methods.RigL(0.9), 40),
}


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch launches every operation separately")
@pytest.mark.parametrize("name", METHODS)
def test_operations_and_bytes_of_a_torch_update(name, monkeypatch):
    # The model is small, so the search sorts a smaller number of scores than for a large model.
    monkeypatch.setattr(ranking, "_SORTED", 1 << 15)
    method, passes = METHODS[name]
    model = keras.Sequential([keras.Input((1024,)), keras.layers.Dense(2048, use_bias=False)])
    model.compile(apply_method(method, model, keras.optimizers.SGD(0.1)), "mse")
    (driver,) = drivers_of(model)
    driver.begin(1000, 1000, 100)
    for layer in getattr(driver, "layers", []):
        layer.traced_both_paths = True  # DCIL sets this attribute in a training step.
    driver.advance(250)
    rng = np.random.default_rng(0)
    for state in driver.states:
        for key in {"scores", "gradient"} & state.keys():
            state[key].assign(rng.standard_normal(state[key].shape).astype("float32"))
    driver.advance(260)
    operations = Operations()
    with operations.counted():
        driver.advance(270)
        driver.measure()
    # A pass copies the weights, so it moves eight bytes per weight.
    assert operations.moved / driver.size / 8 < passes
    assert operations.launched < 50 * passes
    assert operations.waits <= passes


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
