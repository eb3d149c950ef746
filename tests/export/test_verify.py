"""Tests of the code that compares the outputs of a `.tflite` file and its Keras model."""

import math

import keras
import numpy as np
import pytest
from keras import layers

from keras_dst._utils.states import reset_states
from keras_dst.export.encode import Format, encode, weights
from keras_dst.export.flatbuffer import read
from keras_dst.export.samples import (
    BATCH,
    MAX_SAMPLES,
    random_samples,
    read_samples,
    signature_of,
)
from keras_dst.export.verify import Case, deviation, keras_cases, predictor

from . import graphs
from .graphs import fully_connected, sparse_values

WEIGHT = sparse_values((6, 8), 0.5)


def case(weight=WEIGHT, batch=4, name="output_0"):
    x = np.random.default_rng(0).standard_normal((batch, weight.shape[-1])).astype(np.float32)
    return Case({"x": x}, {name: x @ weight.T})


def test_an_equal_file_deviates_only_by_rounding():
    assert deviation(fully_connected(WEIGHT), [case(), case(batch=1)]).error < 1e-6


def test_the_error_is_relative_to_the_largest_expected_value():
    wrong = WEIGHT.copy()
    wrong[0] += 1
    expected = case()
    difference = expected.inputs["x"] @ wrong.T - expected.outputs["output_0"]
    found = deviation(fully_connected(wrong), [expected])
    scale = np.abs(expected.outputs["output_0"]).max()
    assert found.error == pytest.approx(np.abs(difference).max() / scale, rel=1e-5)
    assert found.where == "output 'output_0' (XNNPACK, batch 4)"


def test_an_output_without_a_batch():
    graph = graphs.File().graph()
    x, scalar = graph.dynamic([1, 8]), graph.constant(np.float32([3]), "scalar")
    graph.graph.tensors[scalar].shape = np.array([], np.int32)
    content = graph.finish({"x": x}, {"y": scalar, "x": x}).content()
    right = Case({"x": np.ones((4, 8), np.float32)}, {"y": np.float32(3)})
    assert deviation(content, [right]).error == 0
    wrong = Case(right.inputs, {"y": np.float32(2)})
    assert deviation(content, [wrong]).error == 0.5


def test_the_worst_case_is_reported():
    wrong = WEIGHT.copy()
    wrong[0] += 1
    zero = Case({"x": np.zeros((2, 8), np.float32)}, {"output_0": np.zeros((2, 6), np.float32)})
    assert deviation(fully_connected(wrong), [zero]).error == 0
    assert "batch 4" in deviation(fully_connected(wrong), [zero, case(), zero]).where


def test_rounding_of_a_tiny_output_passes_the_comparison():
    tiny = (WEIGHT * 1e-9).astype(np.float32)
    expected = case()
    found = deviation(
        fully_connected(tiny), [Case(expected.inputs, {"output_0": np.zeros((4, 6))})]
    )
    assert 0 < found.error < 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_fail_the_comparison(value):
    broken = WEIGHT.copy()
    broken[0, 0] = value
    assert deviation(fully_connected(broken), [case()]).error == math.inf
    expected = case()
    expected.outputs["output_0"][0, 0] = value
    assert deviation(fully_connected(WEIGHT), [expected]).error == math.inf
    assert deviation(fully_connected(broken), [expected]).error == math.inf


def test_equal_infinities_are_left_out_of_the_comparison():
    graph = graphs.File().graph()
    x = graph.dynamic([1, 3])
    content = graph.finish({"x": x}, {"y": x}).content()
    largest = np.finfo(np.float32).max
    inputs = {"x": np.float32([[-np.inf, np.inf, 2]])}
    for expected, error in (
        ([-np.inf, np.inf, 2], 0),
        ([-np.inf, np.inf, 4], 0.5),
        ([-np.inf, largest, 2], math.inf),
        ([np.inf, np.inf, 2], math.inf),
        ([0, np.inf, 2], math.inf),
    ):
        assert deviation(content, [Case(inputs, {"y": np.float32([expected])})]).error == error
    converted = Case({"x": np.float32([[-largest, largest, 2]])}, {"y": inputs["x"]})
    assert deviation(content, [converted]).error == 0


def test_a_missing_output_or_a_wrong_shape_fails_the_comparison():
    assert deviation(fully_connected(WEIGHT), [case(name="other")]).error == math.inf
    expected = case()
    expected.outputs["output_0"] = expected.outputs["output_0"][..., None]
    assert deviation(fully_connected(WEIGHT), [expected]).error == math.inf


def test_a_file_refused_by_the_interpreter_fails_the_comparison():
    dense = fully_connected(WEIGHT)
    (weight,) = weights(read(dense))
    found = deviation(encode(dense, {weight.buffer: Format(block=2, unpack=False)}), [case()])
    assert found.error == math.inf
    assert "refused the file: " in found.where
    assert "Unsupported sparse fully-connected weight format." in found.where


def dense_model(weight=WEIGHT, batch=None):
    """Return a Keras model that computes the same outputs as the file `fully_connected(weight)`."""
    x = keras.Input(batch_shape=(batch, weight.shape[-1]), name="x")
    layer = layers.Dense(weight.shape[0], use_bias=False)
    model = keras.Model(x, layer(x))
    layer.set_weights([weight.T])
    return model


def cases_of(model, inputs=None):
    """Return the samples and Keras outputs with which a file of the model is compared.

    Without `inputs`, the samples are random.
    """
    samples = None if inputs is None else read_samples(model, inputs, "inputs", limit=MAX_SAMPLES)
    signature = signature_of(model, samples)
    return keras_cases(model, signature, samples or random_samples(model, signature))


def batches(cases):
    return [len(case.inputs["x"]) for case in cases]


def test_random_inputs_have_batches_of_1_and_4():
    cases = cases_of(dense_model())
    assert batches(cases) == [1, BATCH]
    assert cases[1].inputs["x"].std() > 0.5
    assert deviation(fully_connected(WEIGHT), cases).error < 1e-6
    again = cases_of(dense_model())
    np.testing.assert_array_equal(again[1].inputs["x"], cases[1].inputs["x"])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"x": x}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_compared_inputs_are_the_inputs_of_the_user(wrap, dtype):
    x = np.random.default_rng(3).standard_normal((50, 8)).astype(dtype)
    cases = cases_of(dense_model(), wrap(x))
    assert batches(cases) == [1] + [BATCH] * (MAX_SAMPLES // BATCH)
    np.testing.assert_array_equal(
        np.concatenate([case.inputs["x"] for case in cases[1:]]), x[:MAX_SAMPLES].astype(np.float32)
    )
    np.testing.assert_allclose(cases[1].outputs["output_0"], x[:4] @ WEIGHT.T, atol=1e-5)


def test_a_last_batch_may_be_smaller():
    cases = cases_of(dense_model(), np.ones((6, 8), np.float32))
    assert batches(cases) == [1, 4, 2]


def test_compared_cases_keep_a_fixed_batch_size():
    content = fully_connected(WEIGHT, batch=3)
    assert batches(cases_of(dense_model(batch=3))) == [3]
    cases = cases_of(dense_model(batch=3), np.ones((8, 8), np.float32))
    assert batches(cases) == [3, 3]
    assert deviation(content, cases).error < 1e-6


def test_predictions_at_a_fixed_batch_cover_every_sample():
    model, x = dense_model(batch=3), np.random.default_rng(0).standard_normal((8, 8))
    predict = predictor(model, fully_connected(WEIGHT, batch=3), signature_of(model))
    np.testing.assert_allclose(predict(x), x @ WEIGHT.T, atol=1e-5)


def test_predictions_on_a_generator():
    model, x = dense_model(), np.random.default_rng(0).standard_normal((8, 8))
    predict = predictor(model, fully_connected(WEIGHT), signature_of(model))
    np.testing.assert_allclose(predict(x[i : i + 3] for i in (0, 3, 6)), x @ WEIGHT.T, atol=1e-5)


def test_an_interrupt_restores_the_states_of_recurrent_layers(monkeypatch):
    lstm, gru = layers.LSTM(2, stateful=True), layers.GRU(2, stateful=True, return_sequences=True)
    model = keras.Sequential([keras.Input(batch_shape=(1, 3, 2)), gru, lstm])
    model(np.ones((1, 3, 2), np.float32))
    before = keras.ops.convert_to_numpy(gru.states[0]).copy()
    assert before.any()

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(lstm, "reset_state", interrupt)
    with pytest.raises(KeyboardInterrupt), reset_states(model):
        pass
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(gru.states[0]), before)


def two_inputs(names):
    """Return a file whose two outputs are its two inputs.

    The dtype of the second input is int32.
    """
    graph = graphs.File().graph()
    tensors = [graph.dynamic([1, 5]), graph.dynamic([1, 5, 3], "int32")]
    inputs = dict(sorted(zip(names, tensors, strict=True)))
    outputs = {"output_0": tensors[0], "output_1": tensors[1]}
    return graph.finish(inputs, outputs).content()


@pytest.mark.parametrize("declared", [list, dict])
@pytest.mark.parametrize("given", [list, dict])
def test_several_inputs_are_matched_by_name_not_by_order(declared, given):
    b, a = keras.Input((5,), name="b"), keras.Input((5, None), dtype="int32", name="a")
    outputs = [layers.Identity()(b), layers.Identity()(a)]
    model = keras.Model([b, a] if declared is list else {"b": b, "a": a}, outputs)
    x = {"b": np.ones((4, 5), np.float32), "a": np.full((4, 5, 3), 2)}
    in_order = ["b", "a"] if declared is list else ["a", "b"]  # Keras sorts dicts by key.
    cases = cases_of(model, x if given is dict else [x[name] for name in in_order])
    assert cases[1].inputs["b"].shape == (4, 5)
    np.testing.assert_array_equal(cases[1].inputs["a"], x["a"])
    assert cases[1].inputs["a"].dtype == np.int32
    assert deviation(two_inputs(["b", "a"]), cases).error == 0


def test_random_inputs_for_integers_and_unknown_axes():
    b, a = keras.Input((5,), name="b"), keras.Input((5, None), dtype="int32", name="a")
    model = keras.Model({"b": b, "a": a}, [layers.Identity()(b), layers.Identity()(a)])
    cases = cases_of(model)
    assert cases[1].inputs["a"].shape == (BATCH, 5, 32)
    assert set(np.unique(cases[1].inputs["a"])) == {0, 1}


class Subclassed(keras.Model):
    """Subclassed model, which does not record the shapes of its inputs."""

    def call(self, inputs):
        return list(inputs) if isinstance(inputs, list | tuple) else inputs * 1.0


def test_a_subclassed_model_with_one_input_needs_no_inputs():
    graph = graphs.File().graph()
    x = graph.dynamic([1, 7])
    content = graph.finish({"args_0": x}, {"output_0": x}).content()
    model = Subclassed()
    model(np.ones((2, 7), np.float32))
    cases = cases_of(model)
    assert [case.inputs["args_0"].shape for case in cases] == [(1, 7), (4, 7)]
    assert deviation(content, cases).error == 0


def test_a_subclassed_model_with_several_inputs_needs_inputs():
    content = two_inputs(["args_0", "args_0_1"])
    with pytest.raises(ValueError, match="Fix: pass inputs="):
        cases_of(Subclassed())
    x = [np.ones((4, 5), np.float32), np.ones((4, 5, 3), np.int32)]
    assert deviation(content, cases_of(Subclassed(), x)).error == 0
    with pytest.raises(
        ValueError, match=r"equal numbers of samples.*Received: arrays of .4, 3. samples"
    ):
        cases_of(Subclassed(), [x[0], x[1][:3]])


def test_outputs_are_matched_by_key_or_by_position():
    graph = graphs.File().graph()
    x = graph.dynamic([1, 2])
    content = graph.finish({"x": x}, {f"output_{i}": x for i in range(12)}).content()
    symbol = keras.Input((2,), name="x")
    outputs = [layers.Identity()(symbol) for _ in range(12)]
    assert deviation(content, cases_of(keras.Model(symbol, outputs))).error == 0
    named = {f"output_{i}": y for i, y in enumerate(outputs)}
    assert deviation(content, cases_of(keras.Model(symbol, named))).error == 0
    named = {f"other_{i}": y for i, y in enumerate(outputs)}
    assert deviation(content, cases_of(keras.Model(symbol, named))).error == math.inf
