"""Tests of `save_sparse` and `load_sparse`: small files, exact weights, errors for bad files."""

import contextlib
import io

import h5py
import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import sparse_files
from keras_dst.methods import DCIL, DST, Magnitude
from tests.backends import every, once

pytestmark = every(16)

rng = np.random.default_rng(0)
X = rng.standard_normal((32, 64)).astype("float32")
Y = np.arange(32) % 10


def network(width=300):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(width, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(10),
        ]
    )


def with_zeros(model, sparsity=0.9):
    """Set the smallest weights of every kernel to zero."""
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            w = variable.numpy()
            variable.assign(np.where(np.abs(w) > np.quantile(np.abs(w), sparsity), w, 0))
    return model


def bits(variable):
    """Return the bit pattern of a variable, so that -0.0 and NaN are compared exactly."""
    values = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
    return values.reshape(-1).view("uint8")


def check_same(model, loaded):
    assert len(model.weights) == len(loaded.weights)
    for a, b in zip(model.weights, loaded.weights):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(a), bits(b), err_msg=a.path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.sparse"


def test_sparse_files_are_small_with_exact_weights(path):
    model = with_zeros(network(2000))
    kernel = model.layers[0].kernel
    special = kernel.numpy()
    special[0, :4] = [-0.0, np.nan, np.inf, 1e-45]  # Also test special values.
    kernel.assign(special)
    keras_dst.save_sparse(model, path)
    loaded = keras_dst.load_sparse(path)
    check_same(model, loaded)
    assert not loaded.compiled
    kernels = sum(v.numpy().nbytes for v in model.weights if len(v.shape) > 1)
    others = sum(v.numpy().nbytes for v in model.weights if len(v.shape) == 1)
    # The size of a kernel in the file is (density + 1/32) times its dense size. The names of the
    # weights and the structure of the file need a few thousand bytes.
    assert path.stat().st_size < (0.1 + 1 / 32) * kernels + others + 6000


@every(16)
@pytest.mark.parametrize("method", [DST(0.9), DCIL(0.9), Magnitude(0.9)], ids=repr)
def test_a_loaded_sparse_model_predicts_equally_and_continues_training(method, path):
    model = network()
    optimizer = "adam"
    if isinstance(method, Magnitude):
        optimizer = keras_dst.SparseOptimizer(optimizer, method)
    else:
        keras_dst.sparsify(model, method)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    training = [keras_dst.callbacks.SparseTraining()]
    with pytest.MonkeyPatch.context() as patch:
        # The training run is too short to reach the target.
        patch.setattr("warnings.warn", lambda *_, **__: None)
        model.fit(X, Y, epochs=12, verbose=0, callbacks=training)
    before = [bits(v) for v in model.variables]
    keras_dst.save_sparse(model, path, include_optimizer=True)
    for old, variable in zip(before, model.variables):  # Saving must not change the model.
        np.testing.assert_array_equal(old, bits(variable))
    loaded = keras_dst.load_sparse(path)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    assert keras_dst.report(loaded).sparsity == keras_dst.report(model).sparsity
    assert loaded.compiled
    loaded.fit(X, Y, verbose=0, callbacks=training)


@every(1)  # JAX skips the tests of float64.
@pytest.mark.parametrize("policy", ["float64", "bfloat16", "mixed_float16"])
def test_sparse_files_with_other_dtypes(policy, path):
    if policy == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX needs jax_enable_x64 for float64")
    keras.config.set_dtype_policy(policy)
    try:
        model = with_zeros(network()) if policy != "bfloat16" else network()
    finally:
        keras.config.set_dtype_policy("float32")
    keras_dst.save_sparse(model, path)
    check_same(model, keras_dst.load_sparse(path))


@once
def test_a_stripped_model_keeps_layers_with_a_vocabulary(path):
    pytest.importorskip("tensorflow", reason="layers with a vocabulary need TensorFlow")
    lookup = keras.layers.IntegerLookup()
    lookup.adapt(np.arange(20))
    model = keras.Sequential(
        [keras.Input((4,), dtype="int64"), lookup, keras.layers.Embedding(22, 8)]
    )
    keras_dst.save_sparse(with_zeros(model), path)
    loaded = keras_dst.load_sparse(path)
    check_same(model, loaded)
    x = np.arange(8).reshape(2, 4)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@once
def test_an_interrupt_restores_pruned_weights(path, monkeypatch):
    model = network()
    keras_dst.sparsify(model, DST(0.9))
    before = [bits(v).copy() for v in model.variables]
    zeros = iter([np.zeros(model.layers[0].kernel.shape)])

    def masked(w, mask):
        try:
            return next(zeros)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("keras_dst.sparse_files.masked", masked)
    with pytest.raises(KeyboardInterrupt):
        keras_dst.save_sparse(model, path)
    for old, variable in zip(before, model.variables):
        np.testing.assert_array_equal(old, bits(variable))


@once
def test_optimizers_of_nested_models_are_left_out(path):
    model = keras.Sequential([keras.Input((64,)), network(), keras.layers.Dense(10)])
    keras_dst.save_sparse(model, path)
    size = path.stat().st_size
    for compiled in (model, model.layers[0]):
        compiled.compile("adam", "mse")
        compiled.optimizer.build(compiled.trainable_variables)
    keras_dst.save_sparse(model, path)
    assert path.stat().st_size == size
    loaded = keras_dst.load_sparse(path)
    check_same(model, loaded)
    assert not loaded.compiled
    assert not loaded.layers[0].compiled
    assert model.optimizer.built
    assert model.layers[0].optimizer.built
    keras_dst.save_sparse(model, path, include_optimizer=True)
    assert keras_dst.load_sparse(path).layers[0].optimizer.built


@once
def test_complex_weights_are_stored():
    values = np.array([0, -0.0, 1j, complex(0, -0.0)] * 50, "complex128")
    with h5py.File(io.BytesIO(), "w") as weights:
        weights["w"] = values
        structure, tensors = sparse_files._encode(weights)
    content = sparse_files._decode(structure, tensors)
    with h5py.File(io.BytesIO(content)) as weights:
        assert weights["w"][()].tobytes() == values.tobytes()


class DamagedFile(Exception):
    pass


def load(path):
    """Load a file; raise DamagedFile if `load_sparse` rejects it with the expected message."""
    try:
        return keras_dst.load_sparse(path)
    except ValueError as error:
        if "was not written by save_sparse, or it is damaged" in str(error):
            raise DamagedFile from error
        raise


@once
def test_damaged_files_raise(path):
    keras_dst.save_sparse(with_zeros(network()), path)
    content = path.read_bytes()
    places = np.random.default_rng(0).integers(len(content), size=20)
    damaged = [content[:n] for n in (0, 100, len(content) // 2, len(content) - 1)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 0xFF
        damaged.append(bytes(changed))
    # Number of damaged files that still load as the same model, for example if only a date in the
    # archive has changed.
    harmless = 0
    for data in damaged:
        path.write_bytes(data)
        with contextlib.suppress(DamagedFile):
            check_same(with_zeros(network()), load(path))
            harmless += 1
    assert harmless < len(damaged) / 4


@once
def test_errors_leave_no_file(path, tmp_path):
    with pytest.raises(TypeError, match="Expected a Keras 3 model"):
        keras_dst.save_sparse("model", path)
    with pytest.raises(ValueError, match="has no weights yet"):
        keras_dst.save_sparse(keras.Sequential([keras.layers.Dense(2)]), path)
    with pytest.raises(FileNotFoundError, match="existing folder"):
        keras_dst.save_sparse(network(), tmp_path / "missing" / "model.sparse")
    with pytest.raises(FileNotFoundError, match="Expected a file that save_sparse wrote"):
        keras_dst.load_sparse(path)
    network().save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="was not written by save_sparse"):
        keras_dst.load_sparse(tmp_path / "model.keras")
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]
