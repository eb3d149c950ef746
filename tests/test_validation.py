"""Tests that arguments of the wrong type or outside their range raise a clear error."""

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import (
    allocation,
    callbacks,
    layers,
    masks,
    methods,
    plots,
    regularizers,
    schedules,
    tfmot,
)
from keras_dst._utils.validation import check_integer, is_integer
from keras_dst.recommendation import recommend
from tests.backends import once

pytestmark = once

ARGUMENTS = {
    "SparseTraining(epochs)": lambda n: callbacks.SparseTraining(epochs=n),
    "SparseTraining(steps_per_epoch)": lambda n: callbacks.SparseTraining(steps_per_epoch=n),
    "BackupAndRestore(save_freq)": lambda n: callbacks.BackupAndRestore("folder", n),
    "SparsityTensorBoard(update_freq)": lambda n: callbacks.SparsityTensorBoard("folder", n),
    "Schedule(begin_step)": lambda n: schedules.Cubic(0.8, begin_step=n, end_step=9),
    "Schedule(end_step)": lambda n: schedules.Cubic(0.8, begin_step=0, end_step=n),
    "Constant(begin_step)": lambda n: schedules.Constant(0.8, begin_step=n),
    "Gate(axis)": lambda n: layers.Gate(axis=n),
    "Gate(units)": lambda n: layers.Gate(units=n),
    "SET(stop_step)": lambda n: methods.SET(0.8, stop_step=n),
    "RigL(stop_step)": lambda n: methods.RigL(0.8, stop_step=n),
    "DST(frequency)": lambda n: methods.DST(0.8, frequency=n),
    "Consensus(frequency)": lambda n: methods.Consensus(0.8, frequency=n),
    "Consensus(min_kept)": lambda n: methods.Consensus(0.8, min_kept=n),
    "n_of_m(n)": lambda n: masks.n_of_m(np.ones((4, 4), "float32"), n, 4),
    "n_of_m(m)": lambda n: masks.n_of_m(np.ones((4, 4), "float32"), 2, n),
    "top_k(kept)": lambda n: masks.top_k([np.ones(9, "float32")], n),
    "kth(kept)": lambda n: masks.kth([np.ones(9, "float32")], n),
} | {
    f"{method.__name__}({name})": lambda n, method=method, name=name: method(0.8, **{name: n})
    for method, names in {
        methods.Magnitude: ("frequency", "min_kept"),
        methods.FlipOut: ("frequency", "min_kept", "seed"),
        methods.OptG: ("frequency", "min_kept"),
        methods.ST3: ("frequency", "min_kept"),
        methods.DCIL: ("frequency", "min_kept"),
        methods.SET: ("frequency", "min_kept", "seed"),
        methods.RigL: ("frequency", "min_kept", "seed"),
    }.items()
    for name in names
}


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("value", [True, False, np.True_, 1.5, 2.0, "two"])
def test_other_values_than_whole_numbers_raise(argument, value):
    with pytest.raises(ValueError, match=r"whole number|number of batches"):
        ARGUMENTS[argument](value)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_whole_number_is_accepted(argument):
    ARGUMENTS[argument](4)
    ARGUMENTS[argument](np.int64(4))


NUMBERS = {
    "Cubic(begin)": lambda n: schedules.Cubic(0.8, begin=n),
    "Cubic(end)": lambda n: schedules.Cubic(0.8, end=n),
    "Sigmoid(steepness)": lambda n: schedules.Sigmoid(0.8, steepness=n),
    "SET(drop_fraction)": lambda n: methods.SET(0.8, drop_fraction=n),
    "RigL(stop)": lambda n: methods.RigL(0.8, stop=n),
    "OptG(beta)": lambda n: methods.OptG(0.8, beta=n),
    "DST(alpha)": lambda n: methods.DST(alpha=n),
    "DST(reset_density)": lambda n: methods.DST(reset_density=n),
    "DCIL(warmup)": lambda n: methods.DCIL(0.8, warmup=n),
    "DCIL(temperature)": lambda n: methods.DCIL(0.8, temperature=n),
    "FlipOut(power)": lambda n: methods.FlipOut(0.8, power=n),
    "FlipOut(noise)": lambda n: methods.FlipOut(0.8, noise=n),
    "Consensus(lambda_act)": lambda n: methods.Consensus(0.8, lambda_act=n),
    "Gate(cost)": lambda n: layers.Gate(cost=n),
    "Gate(momentum)": lambda n: layers.Gate(momentum=n),
    "ThresholdPenalty(alpha)": lambda n: regularizers.ThresholdPenalty(n),
    "Polarization(weight)": lambda n: regularizers.Polarization(n),
    "Budget(target)": lambda n: regularizers.Budget(n),
    "Budget(weight)": lambda n: regularizers.Budget(0.5, weight=n),
    "PolynomialDecay(power)": lambda n: tfmot.PolynomialDecay(0.0, 0.5, 0, 5, power=n),
    "densities(density)": lambda n: allocation.densities("erk", [(8, 8), (8, 4)], n),
    "kept_counts(sparsity)": lambda n: allocation.kept_counts("erk", [(8, 8), (8, 4)], n),
    "floor_counts(sparsity)": lambda n: allocation.floor_counts([(8, 8), (8, 4)], n),
    "kept_counts(final_sparsity)": lambda n: allocation.kept_counts(
        {"a": 0.5}, [(8, 8)], 0.5, ["a"], n
    ),
}


@pytest.mark.parametrize("argument", NUMBERS)
@pytest.mark.parametrize(
    "value", [True, np.True_, "0.5", [0.5], {}, float("nan"), float("inf"), -1.0]
)
def test_other_values_than_real_numbers_raise(argument, value):
    with pytest.raises(ValueError, match=r"Received"):
        NUMBERS[argument](value)


@pytest.mark.parametrize("argument", NUMBERS)
def test_a_real_number_is_accepted(argument):
    NUMBERS[argument](0.5)
    NUMBERS[argument](np.float32(0.5))


def test_the_message_states_the_bound_and_the_received_value():
    with pytest.raises(ValueError, match=r"^runs must be a whole number >= 0. Received: runs=-1$"):
        check_integer(-1, "runs", minimum=0)
    with pytest.raises(ValueError, match=r"^axis must be a whole number. Received: axis=True$"):
        check_integer(True, "axis", minimum=None)
    check_integer(-1, "axis", minimum=None)
    assert is_integer(0)
    assert not is_integer(0, minimum=1)


BOOLEANS = {
    "ST3(sigma)": lambda flag: methods.ST3(0.8, sigma=flag),
    "Magnitude(revival)": lambda flag: methods.Magnitude(0.8, revival=flag),
    "Gate(dependent)": lambda flag: layers.Gate(dependent=flag),
    "SparseTraining(keep_memory)": lambda flag: callbacks.SparseTraining(keep_memory=flag),
    "BackupAndRestore(delete_checkpoint)": lambda flag: callbacks.BackupAndRestore(
        "folder", delete_checkpoint=flag
    ),
    "SparsityTensorBoard(histograms)": lambda flag: callbacks.SparsityTensorBoard(
        "folder", histograms=flag
    ),
}


@pytest.mark.parametrize("argument", BOOLEANS)
def test_other_values_than_booleans_raise(argument):
    for value in ("no", 0, 1.0, None, [True], float("nan")):
        with pytest.raises(ValueError, match=r"must be True or False\. Received"):
            BOOLEANS[argument](value)
    BOOLEANS[argument](np.True_)


def test_variables_are_accepted_by_regularizers():
    variable = keras.Variable(0.5)
    regularizers.ThresholdPenalty(variable)
    regularizers.Budget(variable)
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        regularizers.ThresholdPenalty(keras.Variable([0.5, 0.5]))


def small_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])


def compiled_model():
    model = small_model()
    model.compile("sgd", "mse")
    return model


WRONG = {
    "Budget(costs)": lambda: regularizers.Budget(0.5, costs=[1.0, -1.0]),
    "allocation: one shape": lambda: allocation.densities("erk", (8, 8), 0.5),
    "allocation: no names": lambda: allocation.densities({"a": 0.5}, [(8, 8)], 0.5),
    "allocation: unknown": lambda: allocation.kept_counts("layerwise", [(8, 8)], 0.5),
    "SparseTraining(metric_at_target)": lambda: callbacks.SparseTraining(metric_at_target=True),
    "KeepClusters(filters)": lambda: callbacks.KeepClusters(filters=3),
    "BackupAndRestore(backup_dir)": lambda: callbacks.BackupAndRestore(""),
    "SparseOptimizer(filters)": lambda: keras_dst.SparseOptimizer(
        "sgd", methods.Magnitude(0.5), filters=True
    ),
    "SparseOptimizer(None)": lambda: keras_dst.SparseOptimizer(None, methods.Magnitude(0.5)),
    "Gate(axis)": lambda: layers.Gate(axis=7).build((None, 4)),
    "n_of_m(axis)": lambda: masks.n_of_m(np.ones((4, 4), "float32"), 2, 4, axis=2),
    "top_k(sizes: shape)": lambda: masks.top_k([np.ones(9, "float32")], 2, [np.ones(8, "int32")]),
    "top_k(sizes: type)": lambda: masks.top_k([np.ones(9, "float32")], 2, [np.ones(9)]),
    "top_k(sizes: count)": lambda: masks.top_k([np.ones(9, "float32")], 2, []),
    "top_k(first: type)": lambda: masks.top_k([np.ones(9, "float32")], 2, first=1),
    "top_k(first: value)": lambda: masks.top_k([np.ones(9, "float32")], 2, first=[10]),
    "top_k(first: count)": lambda: masks.top_k([np.ones(9, "float32")], 2, first=[1, 1]),
    "Layout(outputs)": lambda: masks.Layout(outputs=-1),
    "Layout(outputs: sign)": lambda: masks.Layout(outputs=(0,)),
    "Layout(inputs)": lambda: masks.Layout(inputs=(True,)),
    "Layout: one axis twice": lambda: masks.Layout(outputs=(-1,), inputs=(-1,)),
    "Layout(channels)": lambda: masks.Layout(channels=[0, 1]),
    "top_k(one tensor)": lambda: masks.top_k(np.ones(9, "float32"), 2),
    "kth(no tensors)": lambda: masks.kth([], 2),
    "cluster_weights(model)": lambda: keras_dst.cluster_weights("model.keras"),
    "couple_channels(optimizer)": lambda: keras_dst.couple_channels(small_model(), "sgd"),
    "shrink_report(latency)": lambda: keras_dst.shrink_report(small_model(), latency="yes"),
    "save_sparse(include_optimizer)": lambda: keras_dst.save_sparse(
        small_model(), "unused.sparse", include_optimizer=None
    ),
    "recalibrate(data)": lambda: keras_dst.recalibrate(
        keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()]), {}
    ),
    "save_sparse(path)": lambda: keras_dst.save_sparse(small_model(), None),
    "load_sparse(path)": lambda: keras_dst.load_sparse(2.5),
    "load_sparse(safe_mode)": lambda: keras_dst.load_sparse("unused.sparse", safe_mode=None),
    "load_sparse(custom_objects)": lambda: keras_dst.load_sparse("unused.sparse", []),
    "recommend(sparsity)": lambda: recommend(None, 5),
    "recommend(sparsity: type)": lambda: recommend("0.9", 5),
    "recommend(target)": lambda: recommend(0.9, 5, target=["micro"]),
    "export_tflite(path)": lambda: keras_dst.export_tflite(small_model(), None),
    "export_tflite(progress)": lambda: keras_dst.export_tflite(
        small_model(), "unused.tflite", progress=None
    ),
    "export_tflite(optimize)": lambda: keras_dst.export_tflite(
        small_model(), "unused.tflite", optimize=np.zeros(2)
    ),
    "lint(target)": lambda: keras_dst.lint(small_model(), np.zeros(2)),
    "sparsity_at_latency(round_to)": lambda: keras_dst.sparsity_at_latency(
        small_model(), 0.5, round_to=0
    ),
    "sparsity_at_latency(allocation)": lambda: keras_dst.sparsity_at_latency(
        small_model(), 0.5, allocation="best"
    ),
    "sensitivity(data)": lambda: keras_dst.sensitivity(compiled_model(), None),
    "sensitivity(sparsities)": lambda: keras_dst.sensitivity(
        compiled_model(), (np.ones((2, 4)), np.ones((2, 2))), 0.5
    ),
    "sensitivity(metric)": lambda: keras_dst.sensitivity(
        compiled_model(), (np.ones((2, 4)), np.ones((2, 2))), metric=["loss"], verbose=0
    ),
    "prune_low_magnitude(pruning_policy)": lambda: tfmot.prune_low_magnitude(
        small_model(), pruning_policy="xnnpack"
    ),
    "is_pruned(layer)": lambda: tfmot.is_pruned("dense"),
    "plots.density(report)": lambda: plots.density({"density": 0.5}),
    "plots.sensitivity(report)": lambda: plots.sensitivity(None),
    "plots.history(history)": lambda: plots.history("history"),
    "plots.history(ax)": lambda: plots.history({"loss": [0.5]}, ax=3),
    "plots.trade_off(results)": lambda: plots.trade_off([(0.5, 0.9)]),
    "plots.trade_off(pairs)": lambda: plots.trade_off({"DST": [0.5, 0.9]}),
    "plots.trade_off(dense)": lambda: plots.trade_off({"DST": [(0.5, 0.9)]}, dense="0.9"),
}


@pytest.mark.parametrize("call", WRONG)
def test_wrong_arguments_raise_an_error_that_shows_them(call):
    with pytest.raises((ValueError, TypeError), match=r"Received"):
        WRONG[call]()
