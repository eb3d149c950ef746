"""Tests of sample data in all forms that `model.predict` accepts, on every backend."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers

from keras_dst.export.samples import (
    MAX_CALIBRATION_SAMPLES,
    InputSpec,
    Signature,
    random_samples,
    read_labeled,
    read_samples,
    signature_of,
)
from tests.backends import every

pytestmark = every(2)

X = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
Y = np.arange(20) % 3
EXTRA = np.arange(40, dtype=np.float32).reshape(20, 2)


def one_input():
    x = keras.Input((8,), name="x")
    return keras.Model(x, layers.Dense(3)(x))


def two_inputs(optional=False):
    x, extra = keras.Input((8,), name="x"), keras.Input((2,), name="extra", optional=optional)
    return keras.Model([x, extra], layers.Dense(3)(x))


class Batches(keras.utils.PyDataset):
    """PyDataset with batches of 8 samples and labels."""

    def __init__(self, length=3):
        super().__init__()
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]


def tf_dataset(*arrays):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0])


def data_loader(*arrays):
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(*map(torch.as_tensor, arrays))
    return torch.utils.data.DataLoader(dataset, batch_size=8)


def sparse_tensor():
    tf = pytest.importorskip("tensorflow")
    return tf.sparse.from_dense(X)


ONE_INPUT = {
    "array": lambda: X,
    "float64": lambda: X.astype(np.float64),
    "list": lambda: [X],
    "dict": lambda: {"x": X},
    "backend tensor": lambda: keras.ops.convert_to_tensor(X),
    "sparse tensor": sparse_tensor,
    "tf.data": lambda: tf_dataset(X).batch(8),
    "tf.data with labels": lambda: tf_dataset(X, Y).batch(8),
    "tf.data of dicts": lambda: tf_dataset(X).batch(8).map(lambda x: {"x": x}),
    "DataLoader": lambda: data_loader(X),
    "DataLoader with labels": lambda: data_loader(X, Y),
    "PyDataset": Batches,
    "generator": lambda: (X[i : i + 8] for i in (0, 8, 16)),
    "generator of lists": lambda: ([X[i : i + 1]] for i in range(20)),
    "generator with labels": lambda: ((X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)),
    "iterator of one batch": lambda: iter([X]),
}


@pytest.mark.parametrize("make", ONE_INPUT.values(), ids=ONE_INPUT)
def test_samples_in_every_form_for_one_input(make):
    samples = read_samples(one_input(), make(), "inputs")
    np.testing.assert_allclose(samples.arrays[0], X)
    assert len(read_samples(one_input(), make(), "inputs", limit=5)) == 5


TWO_INPUTS = {
    "list": lambda: [X, EXTRA],
    "tuple": lambda: (X, EXTRA),
    "dict": lambda: {"extra": EXTRA, "x": X},
    "tf.data": lambda: tf_dataset(X, EXTRA).batch(8).map(lambda x, extra: ((x, extra),)),
    "tf.data of dicts": lambda: (
        tf_dataset(X, EXTRA, Y).batch(8).map(lambda x, extra, y: ({"x": x, "extra": extra}, y))
    ),
    "generator": lambda: (((X[i : i + 8], EXTRA[i : i + 8]), Y[i : i + 8]) for i in (0, 8, 16)),
    "generator of lists": lambda: ([X[i : i + 1], EXTRA[i : i + 1]] for i in range(20)),
    "DataLoader": lambda: data_loader(X, EXTRA),
}


@pytest.mark.parametrize("make", TWO_INPUTS.values(), ids=TWO_INPUTS)
def test_samples_in_every_form_for_two_inputs(make):
    samples = read_samples(two_inputs(), make(), "inputs")
    np.testing.assert_array_equal(samples.arrays[0], X)
    np.testing.assert_array_equal(samples.arrays[1], EXTRA)


def test_samples_for_input_names_that_a_file_cannot_contain():
    x, y = keras.Input((8,), name="b-1"), keras.Input((2,), name="a.1")
    for inputs in ([x, y], {"b-1": x, "a.1": y}):
        model = keras.Model(inputs, layers.Dense(3)(x))
        order = [0, 1] if isinstance(inputs, list) else [1, 0]
        for data in ({"b-1": X, "a.1": EXTRA}, {"b_1": X, "a_1": EXTRA}):
            arrays = read_samples(model, data, "inputs").arrays
            np.testing.assert_array_equal(arrays[order[0]], X)
            np.testing.assert_array_equal(arrays[order[1]], EXTRA)
        with pytest.raises(
            ValueError, match=r"dict with the keys \[.*'b-1'.*\] in inputs.*\['x', 'a.1'\]"
        ):
            read_samples(model, {"x": X, "a.1": EXTRA}, "inputs")


def test_samples_for_nested_dicts_of_inputs():
    x, y, z = (keras.Input((size,), name=name) for size, name in ((8, "b"), (2, "a"), (1, "z")))
    model = keras.Model({"z": z, "c": {"b": x, "a": y}}, layers.Dense(3)(x))
    data = {"z": Y[:, None], "c": {"a": EXTRA, "b": X}}
    samples = read_samples(model, data, "inputs")
    for tensor, array in zip(model.inputs, samples.arrays, strict=True):
        assert tensor.shape[1:] == array.shape[1:]
    np.testing.assert_array_equal(samples.packed()["c"]["b"], X)


LABELED = {
    "pair": lambda: (X, Y),
    "tf.data": lambda: tf_dataset(X, Y).batch(8),
    "DataLoader": lambda: data_loader(X, Y),
    "PyDataset": Batches,
    "generator with weights": lambda: ((X[i : i + 8], Y[i : i + 8], None) for i in (0, 8, 16)),
}


@pytest.mark.parametrize("make", LABELED.values(), ids=LABELED)
def test_labeled_samples_in_every_form(make):
    samples, labels = read_labeled(one_input(), make())
    np.testing.assert_array_equal(samples.arrays[0], X)
    np.testing.assert_array_equal(labels, Y)


def test_an_endless_data_set_is_read_up_to_the_limit():
    model = one_input()
    endless = (X for _ in itertools.count())
    samples = read_samples(model, endless, "representative", streamed=MAX_CALIBRATION_SAMPLES)
    assert len(samples) == MAX_CALIBRATION_SAMPLES
    repeated = tf_dataset(X, Y).batch(8).repeat()
    assert len(read_samples(model, repeated, "inputs", limit=32)) == 32
    with pytest.raises(ValueError, match=r"finite data set in evaluate.*Fix: .*take"):
        read_labeled(model, repeated)


def test_batches_of_different_lengths_raise():
    model = keras.Sequential([keras.Input((None, 4)), layers.Dense(3)])
    batches = [np.ones((2, length, 4), np.float32) for length in (5, 7, 9)]
    message = r"same shape in all batches of {}.*shapes \(5, 4\), \(7, 4\), \(9, 4\). Fix: pad"
    with pytest.raises(ValueError, match=message.format("inputs")):
        read_samples(model, iter(batches), "inputs")
    labeled = [(np.ones((2, 9, 4), np.float32), np.ones((2, length))) for length in (5, 7)]
    with pytest.raises(ValueError, match=r"batches of evaluate.*shapes \(5,\), \(7,\). Fix: pad"):
        read_labeled(model, iter(labeled))


def test_an_optional_input_in_some_batches_raises():
    batches = [{"x": X, "extra": EXTRA}, {"x": X, "extra": None}]
    for data in (batches, batches[::-1]):
        with pytest.raises(ValueError, match="an optional input in all batches or in none"):
            read_samples(two_inputs(optional=True), iter(data), "inputs")


def test_missing_last_axes_are_added_as_in_keras():
    x = keras.Input((1,), name="x")
    model = keras.Model(x, layers.Dense(3)(x))
    assert read_samples(model, X[:, 0], "inputs").arrays[0].shape == (20, 1)
    assert read_samples(one_input(), X[..., None], "inputs").arrays[0].shape == (20, 8)


def test_an_optional_input_may_be_none():
    model = two_inputs(optional=True)
    for inputs in ([X, None], {"x": X, "extra": None}, {"x": X}):
        signature = signature_of(model, read_samples(model, inputs, "inputs"))
        assert [spec.present for spec in signature.specs] == [True, False]
    assert [spec.present for spec in signature_of(model).specs] == [True, True]
    with pytest.raises(ValueError, match=r"Expected inputs in a form that model.predict accepts"):
        read_samples(two_inputs(), [X, None], "inputs")


def test_labels_are_not_read_as_an_optional_input():
    for inputs in ({"x": X}, [X, None]):
        batches = iter([(inputs, EXTRA)])
        assert read_samples(two_inputs(optional=True), batches, "inputs").arrays[1] is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (1.0, "that model.predict accepts.*Received: float"),
        (object(), "that model.predict accepts.*Received: object"),
        ("text", "that model.predict accepts.*Received: str"),
        ([[1.0, 2.0]], r"Expected input arrays for \['x'\].*Received: 2 arrays"),
        ([X, X], r"Expected input arrays for \['x'\].*Received: 2 arrays"),
        (X[:, :7], r"shape \(batch, 8\) for the input 'x'. Received: an array of shape \(20, 7\)"),
        (X[0], r"Received: an array of shape \(8,\). Fix: add a batch axis"),
        (X.astype(str), "of type float32 for the input 'x'. Received: an array of type"),
        (iter([]), "at least one batch in inputs. Received: no batch"),
        (iter([(X, Y, Y, Y)]), "Received: a tuple of 4 entries"),
        (np.where(X > 0, X, np.nan), "finite numbers in inputs.*Received: .* NaN or infinity"),
        (
            iter([X, np.full_like(X, np.inf)]),
            "finite numbers in inputs.*Received: .* NaN or infinity",
        ),
        (X[:0], "at least 1 samples in inputs.*Received: 0 samples"),
    ],
)
def test_samples_that_do_not_fit_raise(inputs, message):
    with pytest.raises(ValueError, match=message):
        read_samples(one_input(), inputs, "inputs")


def test_too_few_samples_for_a_fixed_batch_raise():
    x = keras.Input(batch_shape=(3, 8))
    with pytest.raises(ValueError, match=r"at least 3 samples in inputs.*Received: 2 samples"):
        read_samples(keras.Model(x, layers.Dense(3)(x)), X[:2], "inputs")


def test_a_limit_never_cuts_a_fixed_batch():
    x = keras.Input(batch_shape=(12, 8))
    model = keras.Model(x, layers.Dense(3)(x))
    assert len(read_samples(model, X, "inputs", limit=5)) == 12
    for options in ({"limit": 5}, {"streamed": 5}):
        batches = (X[i : i + 4] for i in range(0, 20, 4))
        assert len(read_samples(model, batches, "inputs", **options)) == 12


def test_inputs_with_fixed_and_dynamic_batch_sizes():
    x, y, z = keras.Input((8,), batch_size=6), keras.Input((8,)), keras.Input((8,), batch_size=1)
    model = keras.Model([x, y], layers.Dense(3)(x + y))
    arrays = random_samples(model, signature_of(model)).arrays
    assert [array.shape for array in arrays] == [(6, 8), (6, 8)]
    with pytest.raises(ValueError, match=r"same batch size .*Received: \{.*: 6, .*: 1\}.*Fix: "):
        read_samples(keras.Model([x, z], layers.Dense(3)(x + z)), [X, X], "inputs")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("x", r"Expected evaluate=\(x, y\).*Received: str"),
        ((X, Y, Y), r"Expected evaluate=\(x, y\).*Received: tuple"),
        ((X, Y[:5]), "Received: 20 samples and 5 labels"),
        ((X, {"a": Y, "b": Y}), "Expected one array of labels.*Received: 2 arrays"),
        (iter([X]), "Expected one array of labels.*Received: none"),
        ((iter([X]), Y), "Expected arrays in evaluate.*Fix: pass the data set alone"),
    ],
)
def test_labeled_samples_that_do_not_fit_raise(data, message):
    with pytest.raises(ValueError, match=message):
        read_labeled(one_input(), data)


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: [keras.Input(batch_shape=(2, 3)), layers.Dense(4)], 2),
        (lambda: [keras.Input((3,)), layers.Dense(4)], None),
        (lambda: [layers.Dense(4)], None),
    ],
    ids=["Input with a batch size", "Input", "built from data"],
)
def test_the_batch_size_of_a_sequential_model(make, batch):
    model = keras.Sequential(make())
    if not model.built:
        model(np.ones((7, 3), np.float32))
    assert signature_of(model).specs[0].shape == (batch, 3)


@pytest.mark.parametrize("options", [{"stateful": True, "unroll": True}, {}])
def test_recurrent_layers_keep_the_batch_size_after_loading(tmp_path, options):
    sequence = keras.Input(batch_shape=(1, 6, 8))
    model = keras.Sequential([sequence, layers.LSTM(4, **options), layers.Dense(3)])
    model.save(tmp_path / "model.keras")
    for found in (model, keras.saving.load_model(tmp_path / "model.keras")):
        assert signature_of(found).specs[0].shape == (1, 6, 8)


def test_random_samples_for_strings_raise():
    signature = Signature([InputSpec("word", (None, 1), "string")], 0)
    with pytest.raises(
        ValueError, match=r"Expected inputs= for a model with string inputs .*'word'"
    ):
        random_samples(keras.Sequential(), signature)


def test_random_samples_have_a_length_that_the_model_accepts():
    x = keras.Input((None, 4))
    model = keras.Model(x, x + np.ones((8, 4), "float32"))
    (array,) = random_samples(model, signature_of(model)).arrays
    assert array.shape[1:] == (8, 4)


def test_a_model_that_accepts_no_tested_length_raises():
    x = keras.Input((None, 4))
    model = keras.Model(x, keras.ops.matmul(np.ones((7, 7), "float32"), x))
    with pytest.raises(ValueError, match=r"Fix: pass inputs=.* Received for size 32: "):
        random_samples(model, signature_of(model))
