"""Tests of the ranking algorithm for accelerators, which runs on the CPU in these tests.

This file runs the tests in `tests/test_masks.py` again with the algorithm for accelerators. The
tests compare the masks with the masks of a sort in NumPy.
"""

import contextlib
import functools
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import keras_dst
from benchmarks.data import apply_method
from keras_dst import masks
from keras_dst._backend import devices, guesses, numbers, ranking, selection
from keras_dst._backend.guesses import with_guesses
from keras_dst._backend.jit import _shared, jit
from keras_dst._training.drivers import drivers_of
from keras_dst.methods.base import ScheduleState
from tests import test_contract, test_masks
from tests.backends import every, slow
from tests.test_masks import (  # noqa: F401
    small_rows,
    test_kth_is_exceeded_by_exactly_k_scores,
    test_the_threshold_search_among_zeros_takes_few_steps,
    test_top_k,
    test_top_k_equals_a_stable_sort,
    test_top_k_in_half_precision,
    test_top_k_of_each_tensor,
    test_top_k_of_each_tensor_equals_a_stable_sort,
    test_top_k_of_each_tensor_in_several_rows_bundles_and_slabs,
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
        patch.setattr(devices, "on_accelerator", lambda tensor: True)
        # With 4 instead of 8 sections, XLA compiles the search in half the time.
        patch.setattr(ranking, "_SECTIONS", 4)
        test_masks.compiled_top_k.cache_clear()
        yield
    test_masks.compiled_top_k.cache_clear()


BACKEND = keras.backend.backend()


only_torch = pytest.mark.skipif(BACKEND != "torch", reason="only PyTorch guesses")
ZEROS = np.zeros(100_000, "float32")


def tied_scores():
    rng = np.random.default_rng(0)
    scores = [rng.standard_normal(shape).astype("float32") for shape in [(300, 700), (9,), (9000,)]]
    scores[2] = np.round(scores[2], 1)  # Create ties.
    scores[0][:100] = 0
    return scores


@pytest.fixture
def searches(monkeypatch):
    """Return a list. Each search for thresholds adds an entry to the list when the search runs or
    is traced."""
    searched, search = [], ranking._Ranking.thresholds
    monkeypatch.setattr(
        ranking._Ranking, "thresholds", lambda *args: searched.append(1) or search(*args)
    )
    return searched


@pytest.fixture
def wrong_guesses(searches):
    """Return a list with one entry for each wrong guess of the thresholds.

    The ranking searches for the thresholds after each wrong guess, so this fixture returns the list
    of searches.
    """
    return searches


# With `limit` 1, the ranking does not sort all scores. Instead, the ranking guesses each threshold
# from a sample of the scores.
@only_torch
@pytest.mark.parametrize("limit", [1, 1 << 20])
@pytest.mark.parametrize(
    "kept", [70_000, 219_009, 400, 3, [70_000, 3, 700], [210_000, 0, 9000], [20, 9, 100]]
)
def test_guessed_masks_equal_the_masks_of_a_search(kept, limit, monkeypatch, wrong_guesses):
    monkeypatch.setattr(selection, "_SORTED", limit)
    scores = [ops.convert_to_tensor(s) for s in tied_scores()]
    first = None if isinstance(kept, list) else [1] * len(scores)
    kept = ops.convert_to_tensor(kept, "int32")
    found = jit(lambda scores, kept: masks.top_k(scores, kept, first=first))(scores, kept)
    assert wrong_guesses == []
    expected = masks.top_k(scores, kept, first=first)
    assert len(wrong_guesses) == 1
    test_masks.assert_equal(*([ops.convert_to_numpy(m) for m in f] for f in (found, expected)))


@only_torch
def test_the_next_update_guesses_the_branch_that_was_right():
    taken = []

    @with_guesses
    def update(x):
        return guesses.cond(x > 0, lambda: taken.append("usual"), lambda: taken.append("rare"))

    for value in (1, -1, -1, 1):
        taken.append(value)
        update(ops.convert_to_tensor(value))
    assert taken == [1, "usual", -1, "usual", "rare", -1, "rare", 1, "rare", "usual"]


@only_torch
def test_guessed_masks_with_minimums_equal_the_masks_of_a_search(wrong_guesses):
    scores, first = [ops.convert_to_tensor(s) for s in tied_scores()], [70, 9, 8000]
    found = jit(lambda *args: masks.top_k(*args, first=first))(scores, ops.convert_to_tensor(9000))
    assert wrong_guesses == []
    expected = masks.top_k(scores, 9000, first=first)
    test_masks.assert_equal(*([ops.convert_to_numpy(m) for m in f] for f in (found, expected)))


@only_torch
@pytest.mark.parametrize("limit", [1, 1 << 20])
@pytest.mark.parametrize("kept", [70_000, 400, 0, [70_000, 3, 700], [20, 9, 0]])
def test_kept_scores_exceed_the_guessed_threshold(kept, limit, monkeypatch, wrong_guesses):
    monkeypatch.setattr(selection, "_SORTED", limit)
    scores = tied_scores()
    scores[2] = np.random.default_rng(1).standard_normal(9000).astype("float32")
    scores[0][:100] += np.linspace(1e-6, 1e-5, 70_000, dtype="float32").reshape(100, 700)
    tensors = [ops.convert_to_tensor(s) for s in scores]
    found = ops.convert_to_numpy(jit(masks.kth)(tensors, ops.convert_to_tensor(kept, "int32")))
    above = [int((s > t).sum()) for s, t in zip(scores, np.broadcast_to(found, 3))]
    assert wrong_guesses == []
    assert (above if isinstance(kept, list) else sum(above)) == kept


@only_torch
@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        pytest.param([ZEROS, np.arange(500)], 20_000, id="many equal scores at the threshold"),
        pytest.param([[1, np.nan, 3]], 1, id="a score that is not finite"),
        pytest.param([[2e38, 1, 3e38]], 1, id="a score beyond the limit"),
        pytest.param([[1, -np.inf, -np.inf]], 2, id="a threshold at minus infinity"),
    ],
)
def test_a_wrong_guess_is_corrected(scores, kept, first, monkeypatch, wrong_guesses):
    monkeypatch.setattr(selection, "_SORTED", 100)
    scores = [ops.convert_to_tensor(np.array(s, "float32")) for s in scores]
    first = first and [first] * len(scores)
    update = jit(lambda scores, kept: masks.top_k(scores, kept, first=first))
    found = update(scores, ops.convert_to_tensor(kept, "int32"))
    assert wrong_guesses == [1]
    expected = masks.top_k(scores, kept, first=first)
    test_masks.assert_equal(*([ops.convert_to_numpy(m) for m in f] for f in (found, expected)))


def driver_of(method, *widths, use_bias=False):
    """Return the object that updates the masks of a network with dense layers of the given widths.

    The first width is the number of inputs.
    """
    layers = [keras.layers.Dense(width, use_bias=use_bias) for width in widths[1:]]
    model = keras.Sequential([keras.Input(widths[:1]), *layers])
    model.compile(apply_method(method, model, keras.optimizers.SGD(0.1)), "mse")
    (driver,) = drivers_of(model)
    for layer in getattr(driver, "layers", []):
        layer.traced_both_paths = True  # `SparseTraining` sets this in `fit`.
    return driver


# METHODS maps a name to a method and to a limit for the memory traffic of a mask update, in passes.
# A pass is one read or one write of all weights in float32, which is four bytes per weight.
METHODS = {
    "Magnitude": (keras_dst.methods.Magnitude(0.9), 20),
    "FlipOut": (keras_dst.methods.FlipOut(0.9), 20),
    "DCIL": (keras_dst.methods.DCIL(0.9), 20),
    "OptG": (keras_dst.methods.OptG(0.9), 40),
    "RigL": (keras_dst.methods.RigL(0.9), 40),
}


LARGE = (1024, 1024)  # Shape of a weight. The ranking for CPUs would split its scores into 4 slabs.


def lowered_for_cuda(shapes, each):
    """Lower `top_k` for CUDA with JAX, which needs no GPU, and return the program."""
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
    monkeypatch.setattr(devices, "on_accelerator", lambda tensor: False)
    assert lowered_for_cuda([LARGE] * 3, each).count("stablehlo.while") > 1


def loops_of_update(name):
    """Lower a whole mask update for CUDA with JAX, and count the loops in the lowered program."""
    import jax
    from jax import export

    # Clear the cache: with a cached trace of an earlier test, JAX would not trace the search again.
    _shared.cache_clear()
    driver = driver_of(METHODS[name][0], *LARGE)
    now = ScheduleState(*map(ops.convert_to_tensor, (3, 0.3, 0.9)))
    # Compile the update again. If the compiled function of the driver had a cached trace, JAX would
    # not trace the update.
    update = jax.jit(
        lambda weights, states, kept, now: driver.method.update(
            weights, states, driver.layouts, kept, now
        )
    )
    arguments = *driver._values(), driver._counts(0.9), now
    return (
        export.export(update, platforms=["cuda"])(*arguments).mlir_module().count("stablehlo.while")
    )


@pytest.mark.skipif(BACKEND != "jax", reason="JAX lowers programs for other devices")
@pytest.mark.parametrize("name", METHODS)
def test_a_lowered_update_loops_only_to_search_for_thresholds(name, searches, monkeypatch):
    assert loops_of_update(name) == len(searches) > 0
    searches.clear()
    monkeypatch.setattr(devices, "on_accelerator", lambda tensor: False)
    # With the ranking for CPUs, the program of the update also contains loops over rows of scores.
    assert loops_of_update(name) > len(searches) > 0


class Operations:
    """Counts of the PyTorch operations that would launch a kernel on a GPU.

    Attributes:
        launched: Number of operations, without operations that only return a view of a tensor.
        moved: Number of bytes that the operations read and write.
        waits: Number of times that the host reads a value from the device.
        copies: Number of copies from the host to the device. A copied array counts as one copy.
        peak: Largest number of bytes that new tensors needed at the same time. Temporary memory
            within an operation is not counted.
    """

    def __init__(self):
        self.launched = self.moved = self.waits = self.copies = self.peak = 0

    @contextlib.contextmanager
    def counted(self):
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        # Operations in `selects` read only some entries of a tensor, and operations in
        # `changes_selected` change only some entries.
        selects = {"index", "index_select", "embedding", "take", "gather"}
        changes_selected = {"index_put_", "index_add_", "index_fill_"}
        overwrites = {"copy_", "fill_", "zero_"}
        outer, stored = self, {}

        def tensors_in(values):
            return {t for t in tree_leaves(values) if torch.is_tensor(t)}

        def size(values):
            return sum(t.numel() * t.element_size() for t in tensors_in(values))

        def wait(read):
            def waiting(*args, **kwargs):
                outer.waits += 1
                return read(*args, **kwargs)

            return waiting

        def copy(convert):
            def copying(value, *args, **kwargs):
                outer.copies += not torch.is_tensor(value)
                return convert(value, *args, **kwargs)

            return copying

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                found = func(*args, **(kwargs or {}))
                name = func.overloadpacket.__name__
                outer.waits += name in ("_local_scalar_dense", "nonzero")
                if not func.is_view:
                    unread = name in selects | changes_selected | overwrites
                    outer.launched += 1
                    outer.moved += size((args[1:] if unread else args, kwargs))
                    outer.moved += size(found if name not in changes_selected else ())
                    self.add_new(found, (args, kwargs))
                return found

            def add_new(self, found, arguments):
                """Add the memory of new tensors; subtract it when the tensors are freed."""
                old = {t.untyped_storage()._cdata for t in tensors_in(arguments)}
                for tensor in tensors_in(found):
                    storage = tensor.untyped_storage()
                    key = storage._cdata
                    if key not in old | stored.keys():
                        stored[key] = storage.nbytes()
                        weakref.finalize(storage, stored.pop, key)
                outer.peak = max(outer.peak, sum(stored.values()))

        with Count(), pytest.MonkeyPatch.context() as patch:
            for name in ("numpy", "tolist"):
                patch.setattr(torch.Tensor, name, wait(getattr(torch.Tensor, name)))
            for name in ("tensor", "as_tensor", "from_numpy"):
                patch.setattr(torch, name, copy(getattr(torch, name)))
            yield self


def operations_of_update(method, widths, monkeypatch):
    """Update the masks of a network, and measure its sparsity. Return the driver and two
    `Operations` objects: the operations of the update and the operations of the measurement."""
    # The ranking sorts all scores of a model only if the model has few weights. Lower the largest
    # number of weights to sort, so that the ranking does not sort the scores of this small model.
    monkeypatch.setattr(selection, "_SORTED", 1 << 15)
    driver = driver_of(method, *widths)
    driver.begin(1000, 1000, 100)
    driver.advance(250)
    rng = np.random.default_rng(0)
    for state in driver.states:
        for key in {"scores", "gradient"} & state.keys():
            state[key].assign(rng.standard_normal(state[key].shape).astype("float32"))
    driver.advance(260)
    # Set the pruned weights to 0, as training does.
    for weight, state in zip(driver.weights, driver.states):
        if "gradient" in state:
            trained = ops.convert_to_numpy(state["mask"]) * rng.standard_normal(weight.shape)
            weight.assign(trained.astype("float32"))
    update, measurement = Operations(), Operations()
    with update.counted():
        driver.advance(270)
    with measurement.counted():
        driver.measure()
    return driver, update, measurement


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch launches every operation separately")
@pytest.mark.parametrize("widths", [(1024, 2048), (1024, 3072, 1536, 512)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_operations_bytes_and_memory_of_a_torch_update(name, widths, monkeypatch):
    method, passes = METHODS[name]
    driver, update, measurement = operations_of_update(method, widths, monkeypatch)
    assert update.moved / driver.size / 4 <= passes
    assert update.peak / driver.size / 4 <= 2
    assert update.launched < (6 + 3 * len(driver.weights)) * passes
    assert (update.waits, measurement.waits) == (1, 1)
    assert update.copies <= 12


@only_torch
@pytest.mark.parametrize(("pattern", "sparsity"), [("1x4", 0.9), ("4x4", 0.9), ("2:4", 0.5)])
def test_an_update_of_blocks_or_n_of_m_needs_no_search(pattern, sparsity, searches, monkeypatch):
    method = keras_dst.methods.Magnitude(sparsity, pattern=pattern)
    driver, update, _ = operations_of_update(method, (1024, 2048), monkeypatch)
    assert not searches
    assert update.moved / driver.size / 4 <= 20
    assert update.waits <= 1


@only_torch
@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
@pytest.mark.parametrize("name", [*METHODS, "DST", "ST3"])
def test_an_update_of_small_weights_waits_once(name, pattern):
    # The ranking arranges the scores in rows of equal width. The number of weights is not a
    # multiple of this width, so the ranking pads the last row.
    method = getattr(keras_dst.methods, name)(sparsity=0.9, pattern=pattern)
    driver = driver_of(method, 8, *[8] * 6, use_bias=True)
    first, later = Operations(), Operations()
    with first.counted():
        driver.begin(1000, 1000, 100)
    # The host also reads three values: the step of the optimizer, the step of the schedule, and the
    # length of the schedule. RigL guesses that a mask update is not the first update. If this guess
    # is wrong, RigL computes the update again, and the host waits once more.
    assert first.waits <= 4 + (name == "RigL")
    driver.advance(250)
    with later.counted():
        driver.advance(260)
    assert later.waits == 1


def copies_of_an_update(name, pattern, layers):
    """Return how many numbers and arrays a mask update copies from the host to the device."""
    sparsity = 0.5 if pattern == "2:4" else 0.9
    method = getattr(keras_dst.methods, name)(sparsity=sparsity, pattern=pattern)
    driver = driver_of(method, 8, *[8] * layers, use_bias=True)
    driver.begin(1000, 1000, 100)
    driver.advance(250)
    with Operations().counted() as update:
        driver.advance(260)
    return update.copies


@only_torch
@pytest.mark.parametrize("pattern", ["unstructured", "channel", "1x4", "2:4"])
@pytest.mark.parametrize("name", [*METHODS, "SET", "DST", "ST3"])
def test_the_copies_to_the_device_do_not_grow_with_the_number_of_layers(name, pattern):
    refused = {"1x4": {"ST3"}, "2:4": {"RigL", "SET", "DST", "ST3"}}
    if name in refused.get(pattern, ()):
        pytest.skip(f"{name} does not support the pattern {pattern}")
    copies = copies_of_an_update(name, pattern, layers=3)
    assert copies_of_an_update(name, pattern, layers=6) == copies <= 12


@only_torch
@pytest.mark.parametrize("name", ["Magnitude", "RigL"])
def test_an_optimizer_step_holds_one_copy_of_the_weights(name):
    # An optimizer step creates masked gradients, frees the masked gradients, and then creates
    # masked weights.
    kernels = [keras.Variable(np.ones((64, 64), "float32"), name=f"kernel_{i}") for i in range(3)]
    method = getattr(keras_dst.methods, name)(0.9)
    optimizer = keras_dst.SparseOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), method)
    optimizer.build(kernels)
    optimizer.driver_active = True
    grads = [ops.ones(kernel.shape) for kernel in kernels]
    with Operations().counted() as step:
        optimizer.apply(grads, kernels)
    assert step.peak / 4 < 1.1 * 3 * 64 * 64


def operations_of_steps(method):
    """Train six steps, and return the counts of PyTorch operations of each step."""
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    optimizer = keras.optimizers.SGD(0.1)
    optimizer = apply_method(method, model, optimizer) if method else optimizer
    model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
    steps, contexts = [], contextlib.ExitStack()

    def begin(batch, logs=None):
        steps.append(contexts.enter_context(Operations().counted()))

    first = keras.callbacks.LambdaCallback(on_train_batch_begin=begin)
    last = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: contexts.close())
    sparse = [keras_dst.callbacks.SparseTraining()] if method else []
    x, y = np.ones((6, 8), "float32"), np.ones((6, 2), "float32")
    model.fit(x, y, batch_size=1, verbose=0, callbacks=[first, *sparse, last])
    return steps


@only_torch
@pytest.mark.filterwarnings("ignore:.*but the target is .*:UserWarning")
@pytest.mark.parametrize("name", [*METHODS, "SET", "DST", "ST3", "Consensus"])
def test_a_torch_step_waits_and_copies_no_more_than_a_dense_step(name):
    # Without a target sparsity, the masks of DST are not changed after the last step.
    method = keras_dst.methods.DST() if name == "DST" else getattr(keras_dst.methods, name)(0.9)
    method = type(method).from_config({**method.get_config(), "frequency": 1000})
    # Compare the second step, in which no mask is updated. Keras copies one number to the device
    # for each loss. DCIL computes three losses instead of one.
    step, dense = operations_of_steps(method)[1], operations_of_steps(None)[1]
    assert step.waits == dense.waits
    assert step.copies == dense.copies + (2 if name == "DCIL" else 0)


@only_torch
def test_a_stored_result_is_computed_again_after_an_assignment():
    calls, variable = [], keras.Variable([1.0, 2.0])

    def doubled(value):
        calls.append(1)
        return value * 2

    for values in ([1.0, 2.0], [3.0, 4.0]):
        variable.assign(values)
        for _ in range(2):
            found = numbers.stored_result(doubled, ops.convert_to_tensor(variable))
            assert found.tolist() == [2 * value for value in values]
    assert len(calls) == 2


@functools.cache
def train_small_model(name, policy):
    """Train a small model, and return the number of kept weights and the measured sparsity."""
    method, _, _ = test_contract.METHODS[name]
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = test_contract.build(method)
        test_contract.fit(model, epochs=1)
    finally:
        keras.config.set_dtype_policy(before)
    assert all(np.isfinite(weight.astype("float32")).all() for weight in model.get_weights())
    (driver,) = drivers_of(model)
    return driver.measure()


@every(48)
@pytest.mark.filterwarnings("ignore:.*training had reached .*:UserWarning")
@pytest.mark.parametrize("policy", ["mixed_float16", pytest.param("mixed_bfloat16", marks=slow)])
@pytest.mark.parametrize("name", ["magnitude", "set", *test_contract.KINDS])
def test_mixed_precision_gives_the_same_sparsity(name, policy):
    kept, removed = train_small_model(name, policy)
    expected, expected_removed = train_small_model(name, "float32")
    if test_contract.METHODS[name][0].learned:
        # In each of the two training runs, the removed FLOPs may differ from the target by the
        # FLOPs of one unit. One unit has up to 2 % of the FLOPs of the model.
        assert removed == pytest.approx(expected_removed, abs=0.04)
    else:
        assert kept == expected


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
