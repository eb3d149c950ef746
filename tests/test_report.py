"""Tests of `report` against manual counts and against NumPy."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_dst
from keras_dst._reporting.sparsity import report
from keras_dst.methods import DST, Magnitude
from tests.backends import once


@pytest.fixture(autouse=True)
def quick_weights(monkeypatch):
    """Set all initial weights to 0.5: JAX would compile a random initializer for each shape."""

    def halves(self, shape, dtype=None):
        return keras.ops.convert_to_tensor(np.full(shape, 0.5, "float32"), dtype)

    for name in ("GlorotUniform", "Orthogonal", "RandomUniform"):
        monkeypatch.setattr(getattr(keras.initializers, name), "__call__", halves)


def sequential(shape, *inner, **kwargs):
    return keras.Sequential([keras.Input(shape, **kwargs), *inner])


def lenet():
    inner = [layers.Dense(300, "relu"), layers.Dense(100, "relu"), layers.Dense(10)]
    return keras.Sequential([keras.Input((784,)), *inner], name="lenet")


def zeroed(variable, keep, seed=0):
    """Set `keep` random entries of a variable to 1 and all other entries to 0."""
    value = np.zeros(variable.shape, "float32")
    value.flat[np.random.default_rng(seed).permutation(value.size)[:keep]] = 1
    variable.assign(value)


def figures(found):
    return [(row.shape, row.nonzeros, row.flops, row.dense_flops) for row in found.layers]


# -- counts ----------------------------------------------------------------------------------------


def test_lenet_300_100():
    # Kernels have 784 * 300 + 300 * 100 + 100 * 10 = 266,200 weights, biases 300 + 100 + 10 = 410.
    model = lenet()
    found = report(model)
    assert found.model == "lenet"
    assert found.parameters == 266_610
    assert found.nonzeros == 266_200  # All biases are 0.
    assert found.bytes == 4 * 266_610
    assert found.sparsity == 0
    assert found.total_sparsity == pytest.approx(410 / 266_610)
    assert found.flops == found.dense_flops == 2 * 266_200
    assert found.reason is None
    assert [row.name for row in found.layers] == [layer.kernel.path for layer in model.layers]
    assert [row.shape for row in found.layers] == [(784, 300), (300, 100), (100, 10)]
    assert [row.parameters for row in found.layers] == [235_200, 30_000, 1_000]
    assert [row.dense_flops for row in found.layers] == [470_400, 60_000, 2_000]
    assert {row.layer for row in found.layers} == {"Dense"}
    assert not any(row.sparse for row in found.layers)


@once
def test_report_counts_zeros_of_dense_models():
    model = lenet()
    for layer, keep in zip(model.layers, (23_520, 1_500, 1_000)):
        zeroed(layer.kernel, keep)
    found = report(model)
    assert [row.nonzeros for row in found.layers] == [23_520, 1_500, 1_000]
    assert [row.density for row in found.layers] == pytest.approx([0.1, 0.05, 1.0])
    assert [row.sparsity for row in found.layers] == pytest.approx([0.9, 0.95, 0.0])
    assert found.sparsity == pytest.approx(1 - 26_020 / 266_200)
    assert found.total_sparsity == pytest.approx(1 - 26_020 / 266_610)
    assert [row.flops for row in found.layers] == [47_040, 3_000, 2_000]
    assert (found.flops, found.dense_flops) == (52_040, 532_400)


def test_report_of_a_small_convolutional_model():
    model = sequential(
        (9, 9, 4),
        # The convolution has 5 x 5 = 25 output positions.
        layers.Conv2D(8, 3, strides=2, padding="same"),
        layers.BatchNormalization(),
        # The convolution has 3 x 3 = 9 output positions. With 2 groups, each filter reads 8 / 2 = 4
        # channels.
        layers.Conv2D(6, 3, groups=2),
        # The padding is "same", so the layer has 3 x 3 = 9 output positions.
        layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same"),
        layers.Flatten(),
        layers.Dense(5),  # The layer reads 3 * 3 * 12 = 108 values.
    )
    first, second, depthwise, dense = (model.layers[i] for i in (0, 2, 3, 5))
    for layer, keep in zip((first, second, depthwise, dense), (72, 54, 27, 60)):
        zeroed(layer.kernel, keep)
    found = report(model)
    assert figures(found) == [
        ((3, 3, 4, 8), 72, 2 * 72 * 25, 2 * 288 * 25),
        ((3, 3, 4, 6), 54, 2 * 54 * 9, 2 * 216 * 9),
        ((3, 3, 6, 2), 27, 2 * 27 * 9, 2 * 108 * 9),
        ((108, 5), 60, 2 * 60, 2 * 540),
    ]
    # Kernels have 288 + 216 + 108 + 540 weights, biases 8 + 6 + 12 + 5, batch normalization 4 * 8.
    assert found.parameters == model.count_params() == 1_152 + 31 + 32
    weights = model.get_weights()
    assert found.nonzeros == sum(np.count_nonzero(w) for w in weights) == 213 + 16
    assert found.total_sparsity == pytest.approx(1 - 229 / 1_215)
    assert found.sparsity == pytest.approx(1 - 213 / 1_152)


# Columns: layer, input shape, and number of multiplications (the number of kernel entries times how
# often each entry is used).
ONE_LAYER = [
    (lambda: layers.Dense(3), (6, 4), 12 * 6),
    (lambda: layers.Conv1D(6, 3, padding="causal"), (10, 4), 72 * 10),
    (lambda: layers.Conv1D(6, 3, strides=3), (10, 4), 72 * 3),
    (lambda: layers.Conv2D(8, 3, dilation_rate=2), (9, 9, 4), 288 * 25),
    (lambda: layers.Conv2D(8, 3, data_format="channels_first"), (4, 9, 8), 288 * 7 * 6),
    (lambda: layers.Conv3D(2, 2), (4, 4, 4, 3), 48 * 27),
    (lambda: layers.Conv1DTranspose(6, 3, strides=2), (5, 4), 72 * 5),
    (lambda: layers.Conv2DTranspose(6, 3, strides=2, padding="same"), (5, 5, 4), 216 * 25),
    (lambda: layers.DepthwiseConv1D(3), (9, 4), 12 * 7),
    (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (9, 9, 4), 72 * 49),
    (lambda: layers.SeparableConv1D(6, 3), (9, 4), (12 + 24) * 7),
    (lambda: layers.SeparableConv2D(6, 3, strides=2, padding="same"), (9, 9, 4), (36 + 24) * 25),
    (lambda: layers.EinsumDense("...x,xy->...y", output_shape=7), (5, 2, 4), 28 * 10),
    (lambda: layers.EinsumDense("abc,bcd->abd", output_shape=(5, 3)), (5, 4), 5 * 4 * 3),
    (lambda: layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3)), (5, 4), 24 * 5),
    (lambda: layers.Embedding(11, 4), (6,), 0),
    (lambda: layers.SimpleRNN(5), (7, 3), (15 + 25) * 7),
    (lambda: layers.LSTM(5), (7, 3), (60 + 100) * 7),
    (lambda: layers.GRU(5, return_sequences=True, dropout=0.5), (7, 3), (45 + 75) * 7),
    (lambda: layers.Bidirectional(layers.LSTM(5)), (7, 3), (160 + 160) * 7),
    (lambda: layers.RNN([layers.LSTMCell(5), layers.SimpleRNNCell(4)]), (7, 3), (160 + 36) * 7),
    (lambda: layers.ConvLSTM2D(2, 3), (4, 6, 6, 3), (216 + 144) * 16 * 4),
    (lambda: layers.TimeDistributed(layers.Conv1D(2, 3)), (7, 5, 4), 24 * 3 * 7),
    (lambda: layers.SpectralNormalization(layers.Dense(3)), (4,), 12),
    (lambda: layers.PReLU(), (4, 5), 0),
]


@pytest.mark.parametrize(
    ("make", "shape", "products"), ONE_LAYER, ids=lambda v: None if callable(v) else str(v)
)
def test_flops_of_one_layer(make, shape, products):
    model = sequential(shape, make())
    found = report(model)
    assert found.dense_flops == found.flops == 2 * products
    assert found.parameters == model.count_params()


@once
def test_report_counts_projections_of_attention():
    inputs = keras.Input((6, 8))
    outputs = layers.MultiHeadAttention(num_heads=2, key_dim=4)(inputs, inputs)
    # The projections of query, key and value have 8 x 2 x 4 weights each, and the output projection
    # has 2 x 4 x 8 weights. The input has 6 positions, and each projection is applied at every
    # position. All biases are 0.
    found = report(keras.Model(inputs, outputs))
    assert [row.parameters for row in found.layers] == [64] * 4
    assert found.dense_flops == 4 * 2 * 64 * 6


@once
@pytest.mark.skipif(
    not hasattr(layers, "ReversibleEmbedding"), reason="this Keras has no ReversibleEmbedding"
)
@pytest.mark.parametrize("tied", [True, False])
def test_reverse_calls_of_an_embedding_count_as_products(tied):
    embedding = layers.ReversibleEmbedding(11, 4, tie_weights=tied)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, embedding(embedding(inputs), reverse=True))
    found = report(model)
    assert found.parameters == (44 if tied else 88)
    assert [row.dense_flops for row in found.layers] == ([528] if tied else [0, 528])


@once
def test_a_fixed_batch_counts_as_one_sample():
    model = sequential((7, 3), layers.LSTM(5, stateful=True), batch_size=4)
    assert report(model).dense_flops == 2 * 160 * 7


@once
def test_bytes_follow_from_the_dtypes_of_variables():
    half = layers.Dense(3, dtype="bfloat16")
    # The first layer has 4 * 3 + 3 weights of two bytes each. The second layer has 3 * 2 + 2
    # weights of four bytes each.
    assert report(sequential((4,), half, layers.Dense(2))).bytes == 15 * 2 + 8 * 4


@once
def test_report_of_a_model_without_prunable_weights():
    found = report(sequential((4,), layers.BatchNormalization()))
    assert (found.layers, found.sparsity, found.flops) == ([], 0.0, 0)
    assert found.parameters == 16
    assert "all weights" in str(found)


# -- kinds of models -------------------------------------------------------------------------------


@once
def test_a_shared_layer_counts_once_and_costs_twice():
    inner = sequential((4,), layers.Dense(4, name="one"), layers.Dense(4, name="two"))
    shared = layers.Dense(3, name="shared")
    inputs = keras.Input((4,))
    outputs = layers.Add()([shared(inner(inputs)), shared(inputs)])
    found = report(keras.Model(inputs, outputs))
    assert found.parameters == 20 + 20 + 15
    assert [(row.parameters, row.dense_flops) for row in found.layers] == [
        (16, 32),
        (16, 32),
        (12, 2 * 24),
    ]


class Subclassed(keras.Model):
    """Model that calls `first` twice, `second` once, and `helper` only in training."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(4)
        self.second = layers.Dense(3)
        self.helper = layers.Dense(2)

    def call(self, x, training=True):
        x = self.first(self.first(x))
        if training:
            x = x + keras.ops.mean(self.helper(x))
        return self.second(x)


def test_a_subclassed_model():
    model = Subclassed()
    model(np.ones((5, 4), "float32"))
    found = report(model)
    assert found.parameters == 20 + 15 + 10
    assert [row.dense_flops for row in found.layers] == [2 * 2 * 16, 2 * 12, 0]


@once
def test_report_of_a_model_with_several_inputs():
    a, b = keras.Input((4,), name="z"), keras.Input((5,), name="b")
    x = layers.Concatenate()([a, b])
    assert report(keras.Model({"z": a, "b": b}, layers.Dense(3)(x))).flops == 2 * 27
    assert report(keras.Model([a, b], layers.Dense(3)(x))).flops == 2 * 27


class Tied(layers.Layer):
    """A layer that multiplies its input by a weight that belongs to another layer."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def call(self, x):
        return keras.ops.matmul(x, self.kernel)


@once
def test_a_weight_shared_by_two_layers_counts_once_and_costs_twice():
    dense = layers.Dense(4)
    dense.build((None, 4))
    found = report(sequential((4,), dense, Tied(dense.kernel)))
    assert found.parameters == 20
    assert [(row.layer, row.dense_flops) for row in found.layers] == [("Dense", 2 * 2 * 16)]


@once
@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_kernels_are_prunable(when):
    dense = layers.Dense(3, trainable=when == "after")
    model = sequential((4,), dense)
    dense.trainable = False
    zeroed(dense.kernel, 3)
    assert report(model).sparsity == 0.75


@once
def test_quantized_kernels_are_prunable():
    dense = layers.Dense(3)
    model = sequential((4,), dense)
    zeroed(dense.kernel, 3)
    dense.quantize("int8")
    found = report(model)
    assert (found.sparsity, found.dense_flops) == (0.75, 24)


@once
def test_a_single_layer_can_be_reported():
    dense = layers.Dense(3)
    dense.build((None, 4))
    assert report(dense).dense_flops == 24


# -- masks -----------------------------------------------------------------------------------------


def masked_model():
    """Return a model in which one Dense layer uses DST.

    The table shows the magnitudes of the kernel, the thresholds, and the mask.

    | w |            0.1  0.5  0.9      1[|w| > t]   0  1  1
                     0.3  0.0  0.9                   1  0  1
                     0.5  0.4  0.2                   1  1  0
    threshold        0.2  0.0  0.5      The weight 0.0 is zero without a mask.
    """
    model = sequential((3,), layers.Dense(3, name="masked"), layers.Dense(2, name="plain"))
    keras_dst.sparsify(model, DST(sparsity=0.5), filters="masked")
    layer = model.layers[0]
    ((_, kernel, state),) = layer.masked_weights()
    kernel.assign([[0.1, 0.5, -0.9], [-0.3, 0.0, 0.9], [0.5, 0.4, -0.2]])
    state["threshold"].assign(np.reshape([0.2, 0.0, 0.5], state["threshold"].shape))
    zeroed(model.layers[1].kernel, 6)
    return model


def test_masked_weights_count_as_zeros():
    found = report(masked_model())
    masked, plain = found.layers
    assert (masked.layer, masked.sparse, masked.nonzeros) == ("Dense", True, 6)
    assert (masked.flops, masked.dense_flops) == (12, 18)
    assert (plain.layer, plain.sparse, plain.nonzeros) == ("Dense", False, 6)
    assert found.sparsity == pytest.approx(3 / 15)
    # Thresholds and other states of the method are not counted as weights of the model.
    assert (found.parameters, found.nonzeros, found.bytes) == (20, 12, 80)


def test_report_is_equal_before_and_after_strip():
    model = masked_model()
    sparse = report(model).to_dict()
    stripped = report(keras_dst.strip(model)).to_dict()
    assert stripped["layers"][0].pop("layer") == "Dense"
    assert stripped["layers"][0].pop("sparse") is False
    del sparse["layers"][0]["layer"], sparse["layers"][0]["sparse"]
    assert stripped == sparse


def test_report_lists_the_channels_that_leave_together(tmp_path):
    inputs = keras.Input((4,))
    x = layers.Dense(8, name="one")(inputs)
    x = layers.Add(name="sum")([x, layers.Dense(8, name="two")(x)])
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    assert report(model).groups is None
    assert report(model).to_dict()["groups"] is None
    found = report(model, groups=True)
    assert found == report(model)
    assert found.to_dict()["groups"][0] == {
        "channels": 8,
        "layers": ["one", "two"],
        "chain": "one → sum ← two",
        "reason": "",
    }
    assert "one → sum ← two" in str(found)
    found.save_html(tmp_path / "report.html")
    assert "one → sum ← two" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.hdf5", "model.tflite"])
def test_an_html_report_replaces_no_model(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"a model")
    found = report(sequential((4,), layers.Dense(2)))
    with pytest.raises(ValueError, match=r"path that ends with \.html. Received: .*Fix: choose"):
        found.save_html(path)
    assert path.read_bytes() == b"a model"


def test_report_of_a_sparse_optimizer():
    model = sequential((4,), layers.Dense(8), layers.Dense(2))
    optimizer = keras_dst.SparseOptimizer("sgd", Magnitude(0.75))
    model.compile(optimizer, "mse")
    assert not any(row.sparse for row in report(model).layers)  # The optimizer is not built yet.
    optimizer.build(model.trainable_variables)
    assert report(model).sparsity == 0
    rng = np.random.default_rng(0)
    masks = [rng.random(kernel.shape) < 0.25 for kernel in optimizer.kernels]
    optimizer.update_masks([{"mask": keras.ops.convert_to_tensor(mask)} for mask in masks])
    found = report(model)
    assert [row.nonzeros for row in found.layers] == [mask.sum() for mask in masks]
    assert found.nonzeros == sum(np.count_nonzero(w) for w in model.get_weights())
    assert all(row.sparse for row in found.layers)
    assert not any(row.sparse for row in report(keras_dst.strip(model)).layers)


# -- unknown FLOPs ---------------------------------------------------------------------------------


@once
def test_unknown_input_sizes_make_flops_unknown():
    model = sequential(
        (None, None, 3), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(2)
    )
    found = report(model)
    conv, dense = found.layers
    assert conv.flops is None
    assert conv.dense_flops is None
    assert "size" in conv.reason
    assert dense.flops == 16
    assert (found.flops, found.dense_flops) == (None, None)
    assert found.reason == conv.reason
    assert conv.reason in str(found)


@once
def test_flops_of_a_model_that_accepts_only_short_inputs():
    class Short(layers.Layer):
        def call(self, x):
            if x.shape[1] > 20:
                raise ValueError("Expected at most 20 positions.")
            return x

        def compute_output_spec(self, x):
            return self.call(x) if x.shape[1] else keras.KerasTensor(x.shape)

    layer_list = Short(), layers.GlobalAveragePooling1D(), layers.Dense(2)
    assert report(sequential((None, 3), *layer_list)).flops == 2 * 3 * 2
    found = report(sequential((None, 3), Short(), layers.Dense(2)))
    assert found.reason == "they depend on a size that the Input leaves open"


def test_an_unknown_input_shape_makes_flops_unknown():
    class Shapeless(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)
            self.dense.build((None, 4))
            self.built = True

        def call(self, x):
            return self.dense(x)

    found = report(Shapeless())
    assert found.flops is None
    assert "call the model once" in found.reason
    assert found.parameters == 15


@once
def test_an_unbuilt_layer_makes_flops_unknown():
    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.late = layers.Dense(3), layers.Dense(2, name="late")

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            return self.late(self.dense(x))

    model = Late()
    model.build((None, 4))
    found = report(model)
    assert found.flops is None
    assert "late" in found.reason
    assert not model.late.built


class Own(layers.Layer):
    """A custom layer with a matrix, a class token, and a weight whose role `report` cannot know."""

    def build(self, shape):
        self.matrix = self.add_weight(shape=(shape[-1], 3), name="matrix")
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="class_token")
        self.unclear = self.add_weight(shape=(7, 9), name="unclear")

    def call(self, x):
        return keras.ops.matmul(x + self.token, self.matrix) + keras.ops.sum(self.unclear)


@once
def test_report_of_custom_layers():
    matrix, token, unclear = report(sequential((8, 5), Own())).layers
    assert matrix.dense_flops == 2 * 15 * 8
    assert token.dense_flops == 0
    assert unclear.dense_flops is None
    assert "Own" in unclear.reason


# -- `report` does not change the model ------------------------------------------------------------


class Fails(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        raise RuntimeError("no luck", self.dense(x))


def fails():
    model = Fails()
    model.build((None, 4))
    return model


def recurrent():
    return sequential((6, 4), layers.LSTM(3, return_sequences=True), layers.Dense(2))


@pytest.mark.parametrize("make", [fails, recurrent, masked_model])
def test_report_does_not_change_the_model(make):
    def state():
        return [
            (
                layer.built,
                "call" in vars(layer),
                len(layer._inbound_nodes),
                len(layer._outbound_nodes),
                [id(v) for v in layer.variables],
            )
            for layer in model._flatten_layers()
        ]

    model = make()
    before, values = state(), model.get_weights()
    found = report(model)
    assert state() == before
    for old, new in zip(values, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    if make is fails:
        assert found.flops is None
        assert "no luck" in found.reason
        assert "call" not in vars(model.dense)


# -- output ----------------------------------------------------------------------------------------


@once
def test_to_dict_can_be_stored_as_json():
    found = report(masked_model())
    figures = json.loads(json.dumps(found.to_dict()))
    assert figures == found.to_dict()
    assert set(figures) == {
        "model",
        "groups",
        "sparsity",
        "total_sparsity",
        "parameters",
        "nonzeros",
        "bytes",
        "flops",
        "dense_flops",
        "reason",
        "layers",
    }
    row = figures["layers"][0]
    assert row["shape"] == [3, 3]
    assert row["density"] == pytest.approx(6 / 9)
    assert row["sparsity"] == pytest.approx(3 / 9)
    assert (row["flops"], row["dense_flops"]) == (12, 18)


@once
def test_report_is_printed_as_a_table():
    model = lenet()
    zeroed(model.layers[0].kernel, 23_520)
    lines = str(report(model)).splitlines()
    assert lines[0] == "lenet: 79.52 % sparse, 1,066,440 bytes if dense"
    row = next(line for line in lines if line.startswith("| lenet/dense"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == [
        "784x300", "235,200", "23,520", "90.00 %", "47,040", "470,400", ""
    ]  # fmt: skip
    total = next(line for line in lines if line.startswith("| all prunable"))
    for figure in ("266,200", "54,520", "79.52 %", "109,040", "532,400"):
        assert figure in total
    assert "266,610" in lines[-1]
    # All lines of the printed report have the same length, and are short enough for the pages of
    # the site.
    (width,) = {len(line) for line in lines[1:]}
    assert width <= 96
    assert "yes" in str(report(masked_model()))


@once
def test_names_are_printed_literally():
    # Rich would interpret the two parts of the name as a style and an emoji.
    found = report(masked_model())
    row = dataclasses.replace(found.layers[0], name="[bold]:smile:")
    assert "[bold]:smile:" in str(dataclasses.replace(found, layers=[row]))


# -- errors ----------------------------------------------------------------------------------------


@once
@pytest.mark.parametrize("wrong", [None, "model.keras", 3, keras.layers.Dense])
def test_report_of_other_objects_than_models_raises(wrong):
    with pytest.raises(TypeError, match="Expected a Keras 3 model"):
        report(wrong)


@once
def test_report_of_a_symbolic_tensor_raises():
    with pytest.raises(TypeError, match=r"keras\.Model\(inputs, outputs\)"):
        report(layers.Dense(3)(keras.Input((4,))))


@once
def test_report_of_an_unbuilt_model_raises():
    with pytest.raises(ValueError, match="has no weights yet"):
        report(keras.Sequential([layers.Dense(3)]))
