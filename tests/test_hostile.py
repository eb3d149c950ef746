"""Tests of hostile input. Each call must raise a clear error or behave correctly, and must never
return a wrong result."""

import io
import json
import zipfile

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import ops

import keras_dst
from keras_dst import masks, methods
from keras_dst.allocation import NAMES
from keras_dst.callbacks import BackupAndRestore, SparseTraining
from keras_dst.masks import Layout
from keras_dst.methods import LayerMethod
from tests import stop_worker
from tests.backends import every, once
from tests.stop_worker import ALL_METHODS, x, y

pytestmark = every(48)

# JAX compiles every operation for every shape, so fewer examples are tested on JAX.
EXAMPLES = 4 if keras.backend.backend() == "jax" else 25
few = hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)

# The tests use these five pruning methods, which belong to different classes.
KINDS = {name: ALL_METHODS[name] for name in ("dst-target", "optg", "magnitude-revival", "flipout")}
KINDS["rigl"] = ALL_METHODS["rigl"]

PATTERNS = ("unstructured", "1x4", "4x1", "2x3", "channel")
VALUES = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "all equal": lambda rng, shape: np.full(shape, 0.5),
    "zeros": lambda rng, shape: np.zeros(shape),
    "ties": lambda rng, shape: rng.integers(-1, 2, shape),
    "NaN and Inf": lambda rng, shape: rng.choice([np.nan, np.inf, -np.inf, 1.0, 2.0], shape),
    "NaN": lambda rng, shape: np.full(shape, np.nan),
    "huge": lambda rng, shape: rng.choice([3e38, -3e38, 1e-45], shape),
}

shapes = st.lists(
    st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple), min_size=1, max_size=3
)


@few
@hypothesis.given(
    shapes=shapes,
    pattern=st.sampled_from(PATTERNS),
    allocation=st.sampled_from(NAMES),
    sparsity=st.floats(0, 0.999),
    values=st.sampled_from(sorted(VALUES)),
    seed=st.integers(0, 9),
)
def test_ranked_masks_have_whole_blocks_and_exact_counts(
    shapes, pattern, allocation, sparsity, values, seed
):
    rng = np.random.default_rng(seed)
    method = methods.Magnitude(sparsity, allocation=allocation, pattern=pattern)
    scores = [VALUES[values](rng, shape).astype("float32") for shape in shapes]
    layouts = [Layout()] * len(shapes)
    kept = method.kept_counts(shapes, layouts, sparsity, [str(i) for i in range(len(shapes))])
    found = method.rank(
        [ops.convert_to_tensor(s) for s in scores], layouts, ops.convert_to_tensor(kept, "int32")
    )
    found = [ops.convert_to_numpy(mask) for mask in found]
    form = masks.Pattern(pattern)
    largest = 0
    for mask, shape in zip(found, shapes):
        assert mask.shape == shape
        assert mask.dtype == bool
        assert mask.any()  # Every layer keeps at least one weight.
        block = form.block(shape)
        largest = max(largest, int(form.sizes(shape).max()))
        groups = form.scores(ops.convert_to_tensor(mask, "float32"))
        assert set(np.unique(ops.convert_to_numpy(groups))) <= {0.0, 1.0}, block
    counts = [int(mask.sum()) for mask in found]
    if allocation == "global":
        counts = [sum(counts)]
        least = largest * len(shapes)
    else:
        least = largest
    for count, wanted in zip(counts, kept):
        assert count <= max(wanted, least)
        assert count > wanted - largest


@few
@hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    m=st.integers(2, 5),
    values=st.sampled_from(sorted(VALUES)),
    data=st.data(),
)
def test_n_of_m_keeps_n_for_any_scores(shape, m, values, data):
    n = data.draw(st.integers(1, m - 1))
    scores = VALUES[values](np.random.default_rng(0), shape).astype("float32")
    mask = ops.convert_to_numpy(masks.n_of_m(ops.convert_to_tensor(scores), n, m))
    along = np.moveaxis(mask, -2, 0)
    for start in range(0, len(along), m):
        group = along[start : start + m]
        assert (group.sum(0) == min(n, len(group))).all()


@few
@hypothesis.given(
    units=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    pattern=st.sampled_from(PATTERNS),
    values=st.sampled_from(["normal", "all equal", "zeros", "ties", "huge"]),
    kind=st.sampled_from(["dst", "dcil", "optg", "consensus"]),
)
def test_strip_preserves_predictions(units, pattern, values, kind):
    method = {
        "dst": lambda: methods.DST(pattern=pattern),
        "dcil": lambda: methods.DCIL(0.5, pattern=pattern),
        "optg": lambda: methods.OptG(0.5, pattern=pattern),
        "consensus": lambda: methods.Consensus(0.5),
    }[kind]()
    rng = np.random.default_rng(len(units))
    model = keras.Sequential(
        [keras.Input((3,)), *(keras.layers.Dense(n) for n in units), keras.layers.Dense(2)]
    )
    for kernel in model.trainable_variables:
        kernel.assign(VALUES[values](rng, kernel.shape) if values != "huge" else kernel * 1e6)
    keras_dst.sparsify(model, method)
    for variable in model.variables:
        if variable.path.endswith(("threshold", "logit")):
            variable.assign(rng.standard_normal(variable.shape))
        elif variable.path.endswith("mask"):
            variable.assign(rng.random(variable.shape) < 0.5)
    data = rng.standard_normal((4, 3)).astype("float32")
    before = ops.convert_to_numpy(model(data))
    after = ops.convert_to_numpy(keras_dst.strip(model)(data))
    np.testing.assert_array_equal(after, before)


def net(method, units=(8,), inputs=12, optimizer=None):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(n, "relu") for n in units]
    model = keras.Sequential([keras.Input((inputs,)), *layers, keras.layers.Dense(4, "softmax")])
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    if isinstance(method, LayerMethod):
        keras_dst.sparsify(model, method)
    else:
        optimizer = keras_dst.SparseOptimizer(optimizer, method)
    return stop_worker.models.compiled(model, optimizer)


def kept_weights(model):
    """Return the number of kept weights of each layer."""
    if hasattr(model.optimizer, "states"):
        return [int(s["mask"].numpy().sum()) for s in model.optimizer.states]
    return [
        int(ops.convert_to_numpy(layer.method.mask(ops.convert_to_tensor(w), s, layout)).sum())
        for layer in model.layers
        for layout, w, s in layer.masked_weights()
    ]


@pytest.mark.parametrize("name", KINDS)
class TestTraining:
    @every(48)
    def test_nan_keeps_the_masks_valid(self, name):
        """After a NaN loss, masks still have the target sparsity, and every layer keeps a
        weight."""
        method = KINDS[name]
        model = net(method)
        bad = x.copy()
        bad[20] = np.nan
        kernel = [v for v in model.trainable_variables if v.path.endswith("kernel")][-1]
        value = kernel.numpy().copy()
        # One weight is NaN, too: TensorFlow's ReLU turns NaN inputs into 0, so a NaN input alone
        # may have no effect.
        value[0, 0] = np.nan
        kernel.assign(value)
        history = fit(model, bad, y, epochs=3, callbacks=[SparseTraining()])
        assert np.isnan(history["loss"][-1])
        kept = kept_weights(model)
        assert min(kept) >= 1
        if not method.learned:
            assert 1 - sum(kept) / 128 == pytest.approx(0.8, abs=0.01)
        assert np.isfinite(history["sparsity"]).all()

    @every(32)
    def test_training_with_constant_gradients_and_equal_weights(self, name):
        method = KINDS[name]
        model = net(method)
        for variable in model.trainable_variables:
            if variable.path.endswith("kernel"):
                variable.assign(np.full(variable.shape, 0.1))
        fit(model, np.ones_like(x), np.zeros_like(y), epochs=3, callbacks=[SparseTraining()])
        kept = kept_weights(model)
        assert min(kept) >= 1
        if not method.learned:
            assert 1 - sum(kept) / 128 == pytest.approx(0.8, abs=0.01)

    @every(48)
    def test_training_of_layers_with_one_weight(self, name):
        model = net(KINDS[name], units=(1, 1, 1), inputs=1)
        fit(model, x[:, :1], y, epochs=2, callbacks=[SparseTraining()])
        assert min(kept_weights(model)) >= 1

    @every(32)
    def test_training_with_one_batch_or_one_row(self, name):
        for rows in (len(x), 1):
            model = net(KINDS[name])
            history = fit(model, x[:rows], y[:rows], batch_size=rows, callbacks=[SparseTraining()])
            target = 0.7 if KINDS[name].learned else 0.8
            assert history["sparsity"][-1] == pytest.approx(target, abs=0.02)

    @every(32)
    def test_a_second_fit_with_another_sparsity(self, name):
        method = KINDS[name]
        other = type(method)(**{**method.get_config(), "sparsity": 0.5})
        model = net(method)
        fit(model, x, y, epochs=3, callbacks=[SparseTraining()])
        if isinstance(method, LayerMethod):
            keras_dst.strip(model)
            keras_dst.sparsify(model, other)
        else:
            keras_dst.strip(model)
            model.compile(
                keras_dst.SparseOptimizer("sgd", other), "sparse_categorical_crossentropy"
            )
        history = fit(model, x, y, epochs=3, callbacks=[SparseTraining()])
        assert history["sparsity"][-1] == pytest.approx(0.5, abs=0.02)


def fit(model, x, y, epochs=1, batch_size=16, **kwargs):
    import warnings

    with warnings.catch_warnings():
        # The training runs in this file are too short for the controller of DST to reach its
        # target. If the loss is NaN, DST never reaches its target.
        warnings.filterwarnings("ignore", ".*(training had reached|missed by) .*")
        return model.fit(
            x, y, epochs=epochs, batch_size=batch_size, shuffle=False, verbose=0, **kwargs
        ).history


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a model as .keras and as .weights.h5, and return the folder."""
    folder = tmp_path_factory.mktemp("saved")
    model = stop_worker.build(ALL_METHODS["optg"])
    model.optimizer.build(model.trainable_variables)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    return folder


def load(path):
    if path.suffix == ".keras":
        return keras.saving.load_model(path)
    model = stop_worker.build(ALL_METHODS["optg"])
    model.load_weights(path)
    return model


@once
@pytest.mark.parametrize("ending", ["keras", "weights.h5"])
@pytest.mark.parametrize("part", [0, 0.3, 0.9, 0.999])
def test_a_truncated_file_raises(ending, part, saved, tmp_path):
    content = (saved / f"model.{ending}").read_bytes()
    path = tmp_path / f"model.{ending}"
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises((OSError, ValueError)):
        load(path)


@once
def test_a_damaged_file_raises(saved, tmp_path):
    content = bytearray((saved / "model.keras").read_bytes())
    for place in range(len(content) // 4, len(content) // 2):
        content[place] ^= 0xFF
    path = tmp_path / "model.keras"
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError, KeyError, zipfile.BadZipFile)):
        load(path)


def rewritten(source, target, change_config=None, change_weights=None):
    """Write a copy of a .keras file with a changed config or changed weights."""
    import h5py

    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json" and change_config:
                content = json.dumps(change_config(json.loads(content))).encode()
            if name == "model.weights.h5" and change_weights:
                file = io.BytesIO(content)
                with h5py.File(file, "r+") as store:
                    change_weights(store)
                content = file.getvalue()
            new.writestr(name, content)
    return target


def test_a_mask_of_the_wrong_shape_raises(saved, tmp_path):
    def smaller(store):
        found = []
        store.visit(lambda name: found.append(name) if name.endswith("kernel_mask") else None)
        assert found
        for name in found:
            del store[name]
            store[name] = np.ones((2, 2), bool)

    path = rewritten(saved / "model.keras", tmp_path / "model.keras", change_weights=smaller)
    with pytest.raises(ValueError, match="shape"):
        load(path)


def change_methods(config, new):
    """Return a copy of a config in which `new` replaces the config of every `OptG` method."""
    if isinstance(config, dict):
        if config.get("registered_name", "") == "keras_dst>OptG":
            return new
        return {key: change_methods(value, new) for key, value in config.items()}
    return [change_methods(c, new) for c in config] if isinstance(config, list) else config


CODE = {
    "a lambda": {
        "class_name": "__lambda__",
        "config": {"value": "4wEAAAAAAAAAAAAAAAABAAAAAwAAAPMEAAAAlwB5AA==\n", "defaults": None},
    },
    "a function by its path": {
        "class_name": "function",
        "config": "system",
        "module": "os",
        "registered_name": "function",
    },
    "a class by its path": {
        "class_name": "Popen",
        "config": {"args": ["true"]},
        "module": "subprocess",
        "registered_name": None,
    },
}


@once
@pytest.mark.parametrize("what", CODE)
def test_code_instead_of_a_method_raises_in_safe_mode(what, saved, tmp_path):
    def change(config):
        new = change_methods(config, CODE[what])
        assert new != config
        return new

    path = rewritten(saved / "model.keras", tmp_path / "model.keras", change)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        keras.saving.load_model(path, safe_mode=True)


@once
@pytest.mark.parametrize("name", ALL_METHODS)
def test_saved_files_load_in_safe_mode(name, tmp_path):
    model = stop_worker.build(ALL_METHODS[name])
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert "__lambda__" not in archive.read("config.json").decode()


@once
@pytest.mark.parametrize("filters", [lambda v: v.shape[0] == 12, "net/first/kernel"])
def test_filters_are_saved_as_the_selected_paths(filters, tmp_path):
    def make():
        optimizer = keras_dst.SparseOptimizer("sgd", methods.Magnitude(0.5), filters)
        model = keras.Sequential(
            [
                keras.Input((12,)),
                keras.layers.Dense(8, name="first"),
                keras.layers.Dense(4, "softmax"),
            ],
            name="net",
        )
        return stop_worker.models.compiled(model, optimizer)

    model = make()
    fit(model, x, y, callbacks=[SparseTraining()])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert [path[-12:] for path in loaded.optimizer.kernel_names] == ["first/kernel"]
    fit(loaded, x, y, callbacks=[SparseTraining()])


def test_an_unbuilt_optimizer_with_a_lambda_filter_cannot_be_saved():
    unbuilt = keras_dst.SparseOptimizer("sgd", methods.Magnitude(0.5), lambda v: True)
    with pytest.raises(ValueError, match="filters"):
        unbuilt.get_config()


@once
@pytest.mark.parametrize(
    "record", ["", "{", "[]", "{}", '{"epoch": "one"}', '{"epoch": 1, "batch": 0}']
)
def test_a_damaged_backup_record_raises(record, tmp_path):
    (tmp_path / "training.json").write_text(record)
    model = stop_worker.build(ALL_METHODS["magnitude"])
    with pytest.raises(ValueError, match="to be a file that BackupAndRestore wrote"):
        stop_worker.fit(model, SparseTraining(), BackupAndRestore(tmp_path))


@once
def test_a_backup_without_its_weights_raises(tmp_path):
    record = {"epoch": 1, "batch": 0, "weights": "x.weights.h5", "seeds": [], "generator": None}
    (tmp_path / "training.json").write_text(json.dumps(record))
    with pytest.raises(OSError, match=r"x\.weights\.h5"):
        stop_worker.fit(stop_worker.build(ALL_METHODS["magnitude"]), BackupAndRestore(tmp_path))


@pytest.mark.parametrize("save_freq", [0, -1, 1.5, "batch", True])
def test_an_invalid_save_freq_raises(save_freq):
    with pytest.raises(ValueError, match="save_freq must be"):
        BackupAndRestore("backup", save_freq)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="on other backends fit builds the model before it calls callbacks",
)
def test_a_backup_of_a_model_without_weights_raises(tmp_path):
    (tmp_path / "training.json").write_text("{}")
    model = keras.Sequential([keras.layers.Dense(4, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="has no weights yet"):
        model.fit(x, y, verbose=0, callbacks=[BackupAndRestore(tmp_path)])
