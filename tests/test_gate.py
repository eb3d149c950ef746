"""Tests of the layer `Gate`: values, gradients, training, files, `strip` and `shrink`."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_dst
from keras_dst.callbacks import SparseTraining
from keras_dst.layers import Gate
from keras_dst.methods import DST, Consensus
from tests import models
from tests.backends import every, heavy, once
from tests.gradients import gradients

# The training runs in this file are too short to reach the target, so `fit` warns.
# test_callbacks.py tests the warning.
pytestmark = [
    every(32),
    pytest.mark.filterwarnings("ignore:.*training had reached .*:UserWarning"),
]

x = np.random.default_rng(0).standard_normal((128, 12)).astype("float32")
y = (x @ np.random.default_rng(1).standard_normal((12, 2))).argmax(1)


def array(tensor):
    return ops.convert_to_numpy(tensor)


def net(structure="channel", dependent=True, method=None, width=8):
    """Return a network of four residual blocks. Each block has a gate for its whole branch, or a
    gate for every channel of the branch."""
    keras.utils.set_random_seed(0)
    method = method or Consensus(0.4 if structure == "channel" else 0.5)
    inputs = keras.Input((12,))
    h = layers.Dense(width, name="stem")(inputs)
    for i in "abcd":
        z = layers.Dense(width, name=f"{i}_1")(h)
        z = layers.BatchNormalization(name=f"{i}_norm")(z)
        if structure == "channel":
            gate = Gate(dependent=dependent, method=method, name=f"{i}_gate")
            z = gate(z, context=h) if dependent else gate(z)
        z = layers.Dense(width, name=f"{i}_2")(layers.ReLU()(z))
        if structure == "branch":
            gate = Gate(structure="branch", dependent=dependent, method=method, name=f"{i}_gate")
            z = gate(z, h) if dependent else gate(z)
        h = layers.Add()([h, z])
    return keras.Model(inputs, layers.Dense(2, activation="softmax", name="head")(h))


def gates_of(model):
    return [layer for layer in model.layers if isinstance(layer, Gate)]


def fit(model, epochs=6, **kwargs):
    return model.fit(
        x, y, batch_size=16, epochs=epochs, verbose=0, shuffle=False,
        callbacks=[SparseTraining()], **kwargs,
    )  # fmt: skip


# -- values and gradients --------------------------------------------------------------------------


@every(1)
def test_values_and_gradients_of_a_logit():
    gate = Gate(axis=1)
    gate.build((None, 3, 4))
    logit = np.float32([0.0, -0.5, 2.0])
    state = gate.sparse_state["gate"]
    inputs = np.random.default_rng(0).standard_normal((2, 3, 4)).astype("float32")
    state["logit"].assign(logit)
    # A gate with the logit 0 has the probability pi = 0.5 and is open.
    z = np.float32([1, 0, 1])
    np.testing.assert_array_equal(array(gate(inputs)), inputs * z[:, None])

    def gated(logit):
        own = {**state, "logit": logit}
        z = gate.method.gate(own, gate._layout)
        return ops.sum(z[:, None] * ops.convert_to_tensor(inputs), axis=(0, 2))

    upstream = np.float32([1.0, 2.0, -3.0])
    (found,) = gradients(gated, [ops.convert_to_tensor(logit)], ops.convert_to_tensor(upstream))
    pi = 1 / (1 + np.exp(-logit))
    # The straight-through estimator uses 1 as the derivative of a gate with respect to its
    # probability pi, even for closed gates.
    np.testing.assert_allclose(found, upstream * inputs.sum((0, 2)) * pi * (1 - pi), rtol=1e-5)


def test_values_of_the_gating_module():
    # The gating module of the paper consists of global average pooling, a dense layer, batch
    # normalization, ReLU, a second dense layer, and a sigmoid.
    keras.utils.set_random_seed(1)
    gate = Gate(dependent=True, units=5, momentum=0.75)
    rng = np.random.default_rng(0)
    a, context = rng.standard_normal((6, 4, 4, 3)), rng.standard_normal((6, 4, 4, 7))
    a, context = a.astype("float32"), context.astype("float32")
    gate.build(a.shape, context.shape)
    gate.out.kernel.assign(rng.standard_normal((5, 3)) * 2)
    gate.out.bias.assign([0.0, -1.0, 1.0])
    hidden = context.mean((1, 2)) @ gate.hidden.kernel.numpy()
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + gate.norm.epsilon)
    z = np.maximum(hidden, 0) @ gate.out.kernel.numpy() + gate.out.bias.numpy() >= 0
    assert 0.1 < z.mean() < 0.9
    np.testing.assert_array_equal(array(gate(a, context, training=True)), a * z[:, None, None])
    mean = 0.75 + 0.25 * z.mean(0)
    np.testing.assert_allclose(gate.sparse_state["gate"]["mean"].numpy(), mean, rtol=1e-6)
    # In inference, a gate is open if its running mean is at least 0.5.
    gate.sparse_state["gate"]["mean"].assign([0.5, 0.49, 1.0])
    np.testing.assert_array_equal(array(gate(a, context)), a * np.float32([1, 0, 1]))


def test_two_channels_stay_open_but_a_branch_may_close():
    a = np.ones((2, 3), "float32")
    for dependent, key, closed in [(False, "logit", -1.0), (True, "mean", 0.1)]:
        gate = Gate(dependent=dependent)
        gate.build(a.shape)
        gate.sparse_state["gate"][key].assign(np.float32([0, 0.05, 0.02]) + closed)
        np.testing.assert_array_equal(array(gate(a)), a * np.float32([0, 1, 1]))
        branch = Gate(structure="branch", dependent=dependent)
        branch.build(a.shape)
        branch.sparse_state["gate"][key].assign(closed)
        np.testing.assert_array_equal(array(branch(a)), 0 * a)


# -- training --------------------------------------------------------------------------------------


def test_a_gating_module_trains_with_a_partial_last_batch():
    """If the last batch is smaller, TensorFlow compiles the step with an unknown batch size."""
    inputs = keras.Input((12,))
    gated = Gate(dependent=True, method=Consensus(0.5))(layers.Dense(8)(inputs))
    outputs = layers.Dense(2, activation="softmax")(gated)
    model = models.compiled(keras.Model(inputs, outputs), "sgd")
    history = model.fit(x[:20], y[:20], batch_size=16, verbose=0, callbacks=[SparseTraining()])
    assert np.isfinite(history.history["loss"]).all()


@heavy
@every(16)
@pytest.mark.parametrize(
    ("structure", "dependent"),
    [
        ("channel", True),
        ("branch", False),
        pytest.param("channel", False, marks=once),
        pytest.param("branch", True, marks=once),
    ],
)
def test_gates_reach_the_target_and_can_be_saved_stripped_and_shrunk(
    structure, dependent, tmp_path
):
    model = models.compiled(net(structure, dependent), keras.optimizers.Adam(0.01))
    history = fit(model).history
    assert np.isfinite(history["loss"]).all()
    open_ = np.concatenate([np.ravel(array(gate.is_open())) for gate in gates_of(model)])
    # With gates on channels, the cost is closest to the target if 19 of the 32 gates are open. With
    # gates on branches, the cost is closest to the target if 2 of the 4 gates are open.
    assert open_.sum() == (19 if structure == "channel" else 2)
    assert history["sparsity"][-1] == pytest.approx(1 - open_.mean())

    expected = models.predict(model, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(models.predict(loaded, x), expected)
    small = keras_dst.shrink(model)  # `shrink` does not change the model.
    assert gates_of(model)

    assert keras_dst.strip(model) is model
    np.testing.assert_array_equal(models.predict(model, x), expected)
    assert not any(type(z).__module__.startswith("keras_dst") for z in model._flatten_layers())
    assert not any("hidden" in v.path or "gate" in v.path for v in model.variables)
    model.save(tmp_path / "stripped.keras")
    again = keras.saving.load_model(tmp_path / "stripped.keras")
    np.testing.assert_array_equal(models.predict(again, x), expected)
    model.fit(x, y, verbose=0)

    np.testing.assert_allclose(models.predict(small, x), expected, atol=1e-5)
    names = [layer.name for layer in small.layers]
    if structure == "branch":
        assert sum(f"{i}_1" in names for i in "abcd") == 2
    else:
        assert sum(small.get_layer(f"{i}_1").units for i in "abcd") == 19


def test_every_trainable_weight_changes_in_training():
    model = models.compiled(net(), keras.optimizers.SGD(0.1))
    before = models.arrays(model.trainable_variables)
    fit(model, 1)
    for variable, old in zip(model.trainable_variables, before):
        assert np.any(variable.numpy() != old), f"{variable.path} did not move"


def test_the_loss_of_gates_has_polarization_and_budget_terms():
    a = np.random.default_rng(0).standard_normal((32, 6)).astype("float32")
    inputs = keras.Input((6,))
    method = Consensus(0.5, lambda_polar=3.0, lambda_act=7.0)
    gates = [
        Gate(dependent=True, cost=2.0, method=method),
        Gate(method=method, name="logit"),
        Gate(dependent=True, structure="branch", cost=5.0, method=method),
    ]
    outputs = gates[2](gates[1](gates[0](inputs)))
    model = keras.Model(inputs, outputs)
    gates[0].out.bias.assign([0.3, -0.3, 0.1, -0.1, 0.0, 0.5])
    gates[1].sparse_state["gate"]["logit"].assign([1, -1, 1, 1, 1, -1])
    model.compile(keras.optimizers.SGD(0.0), lambda y, z: ops.sum(0 * z, axis=-1))
    losses = []
    model.fit(
        a, a, batch_size=32, epochs=2, verbose=0,
        callbacks=[SparseTraining(epochs=99), keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: losses.append(logs["loss"])
        )],
    )  # fmt: skip
    means, h = [], a  # The learning rate is 0, so all steps use the same gates.
    for gate in gates:
        if gate.dependent:
            z = np.asarray(array(gate._module(ops.convert_to_tensor(h))))
            means.append(z.mean(0))
            h = h * z
        else:
            means.append(np.float32([1, 0, 1, 1, 1, 0]))
            h = h * means[-1]
    g, c = np.concatenate(means), np.repeat([2, 1, 5], [6, 6, 1])
    assert 0 < g[:6].mean() < 1
    # At the first step, the target cost still equals the cost with all gates open. The ratio of the
    # target cost to the cost with all gates open is therefore 1.
    expected = 3 * (g * (1 - g)).mean() + 7 * ((c * g).sum() / c.sum() - 1) ** 2
    assert losses[-1] == pytest.approx(expected, rel=1e-3)


def test_gates_and_sparse_layers_share_a_budget():
    method = Consensus(0.5, cost="parameters")
    model = net(method=method)
    reasons = [reason for _, reason in keras_dst.sparsify(model, method).skipped]
    assert "it is the gating module of a Gate" in reasons
    models.compiled(model, keras.optimizers.Adam(0.01))
    fit(model)
    gates = np.concatenate([array(gate.is_open()) for gate in gates_of(model)])
    spent, total = gates.sum(), gates.size
    for layer in model.layers:
        for _, variable, state in getattr(layer, "masked_weights", lambda: ())():
            if not isinstance(layer, Gate):
                spent += (state["logit"].numpy() >= 0).mean() * variable.numpy().size
                total += variable.numpy().size
    assert spent / total == pytest.approx(0.5, abs=0.015)
    report = keras_dst.report(model)
    assert not any("gate" in row.name and "hidden" not in row.name for row in report.layers)


def test_resumed_training_equals_an_uninterrupted_run(tmp_path):
    def stop(epoch, logs):
        partial.stop_training = epoch == 1

    whole, partial = (models.compiled(net(), keras.optimizers.Adam(0.01)) for _ in range(2))
    fit(whole, 4)
    with pytest.warns(UserWarning, match="training ended after 16 of the 32 steps"):
        partial.fit(
            x, y, batch_size=16, epochs=4, verbose=0, shuffle=False,
            callbacks=[SparseTraining(), keras.callbacks.LambdaCallback(on_epoch_end=stop)],
        )  # fmt: skip
    partial.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    fit(resumed, 4, initial_epoch=2)
    for a, b in zip(whole.variables, resumed.variables):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


@every(32)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_training_in_mixed_precision(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = models.compiled(net(), keras.optimizers.Adam(0.01))
        history = fit(model, 4).history
    finally:
        keras.config.set_dtype_policy(before)
    assert np.isfinite(history["loss"]).all()
    expected = models.predict(model, x)
    np.testing.assert_array_equal(models.predict(keras_dst.strip(model), x), expected)


def test_a_frozen_gate_does_not_change():
    model = net()
    for gate in gates_of(model)[:2]:
        gate.trainable = False
    before = [models.arrays(gate.variables) for gate in gates_of(model)]
    models.compiled(model)
    model.fit(x, y, epochs=1, verbose=0, callbacks=[SparseTraining(epochs=9)])
    for frozen, gate, old in zip([1, 1, 0, 0], gates_of(model), before):
        means = gate.sparse_state["gate"]["mean"].numpy(), old[-3]
        assert frozen == all(
            np.array_equal(a.numpy(), b)
            for a, b in zip(gate.variables, old)
            # Training may change the cost, target and progress of a frozen gate. The names of these
            # variables begin with "gate_".
            if "gate_" not in a.name
        ), means


# -- configuration and errors ----------------------------------------------------------------------


def test_config_round_trip():
    gate = Gate(1, "branch", True, 4, 0.5, 3.0, method=Consensus(0.3), name="g")
    copy = Gate.from_config(gate.get_config())
    assert copy.get_config() == gate.get_config()
    assert copy.method == Consensus(0.3)
    assert Gate().method == Consensus()


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="structure must be 'channel' or 'branch'"):
        Gate(structure="layer")
    with pytest.raises(ValueError, match="cost must be a number above 0"):
        Gate(cost=0)
    with pytest.raises(TypeError, match=r"Expected keras_dst\.methods\.Consensus"):
        Gate(method=DST())
    model = models.compiled(net())
    with pytest.raises(ValueError, match="SparseTraining"):
        model.fit(x, y, verbose=0)


@once
@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((4,), {"axis": 0}, r"not the axis of the batch.*\(None, 4\).*axis=0"),
        ((4,), {"axis": -2, "structure": "branch"}, "not the axis of the batch.*axis=-2"),
        ((None, 4), {"axis": 1}, r"axis 1 of `x` must have a fixed size.*\(None, None, 4\)"),
        ((None,), {"dependent": True, "structure": "branch"}, "axis -1 of `context` must have"),
    ],
)
def test_axes_without_channels_raise(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        Gate(**arguments)(keras.Input(shape))
    assert Gate(structure="branch")(keras.Input((None, None))).shape == (None, None, None)


def closed_gate(inputs, closed, context=None, **arguments):
    """Return the output of a `Gate` that is closed for the given channels."""
    gate = Gate(dependent=context is not None, **arguments)
    outputs = gate(inputs) if context is None else gate(context=context, x=inputs)
    state = gate.sparse_state["gate"]
    state["mean" if gate.dependent else "logit"].assign(1.0 - 2.0 * np.float32(closed))
    return outputs


@every(2)
@pytest.mark.parametrize(
    ("shape", "axis"), [((4,), 1), ((4, 3), 1), ((4, 3, 2), 1), ((3, 4, 2), -2), ((3, 4), 2)]
)
def test_strip_keeps_the_outputs_of_gates_on_any_axis(shape, axis):
    inputs = keras.Input(shape)
    channel = closed_gate(inputs, [0, 1, 0, 1], axis=axis)
    outputs = [channel, closed_gate(inputs, 1, axis=axis, structure="branch")]
    model = keras.Model(inputs, outputs)
    data = np.random.default_rng(0).standard_normal((2, *shape)).astype("float32")
    expected = models.predict(model, data)
    assert np.all(expected[1] == 0)
    assert np.all((expected[0] == 0).sum(axis) == 2)
    for found, value in zip(models.predict(keras_dst.strip(model), data), expected):
        np.testing.assert_array_equal(found, value)


@every(2)
@pytest.mark.parametrize("with_context", [False, True])
def test_a_gate_returns_the_keras_mask_of_its_first_argument(with_context):
    tokens = keras.Input((6,), dtype="int32")
    h = layers.Embedding(10, 3, mask_zero=True, name="masked")(tokens)
    context = layers.Embedding(10, 3)(tokens) if with_context else None
    h = closed_gate(h, [0, 1, 0], context)
    model = keras.Model(tokens, layers.GlobalAveragePooling1D()(h))
    data = np.array([[1, 2, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0]])
    expected = models.predict(model, data)
    first = model.get_layer("masked").embeddings.numpy()[data] * [1, 0, 1]
    np.testing.assert_allclose(expected, [first[0, :2].mean(0), first[1, 0]], rtol=1e-5)
    np.testing.assert_array_equal(models.predict(keras_dst.strip(model), data), expected)


def test_strip_and_shrink_keep_the_first_argument_of_a_gate_called_with_keywords():
    inputs = keras.Input((3,))
    context = layers.Dense(5, name="context")(inputs)
    gated = closed_gate(layers.Dense(4, name="main")(inputs), [0, 1, 0, 0], context)
    model = keras.Model(inputs, gated)
    data = np.random.default_rng(0).standard_normal((2, 3)).astype("float32")
    expected = models.predict(model, data)
    small = keras_dst.shrink(model)
    np.testing.assert_allclose(models.predict(small, data), expected, atol=1e-6)
    np.testing.assert_array_equal(models.predict(keras_dst.strip(model), data), expected)
    # `shrink` removes layers that compute only the context of gates.
    assert "context" not in [layer.name for layer in small.layers]


def test_with_channels_first_strip_raises_before_it_changes_a_gate_on_units():
    keras.config.set_image_data_format("channels_first")
    try:
        inputs = keras.Input((4,))
        branch = closed_gate(inputs, 1, structure="branch")
        image = closed_gate(layers.Reshape((4, 1, 1))(inputs), [0, 1, 0, 1], axis=1)
        data = np.ones((2, 4), "float32")
        model = keras.Model(inputs, [branch, layers.Flatten()(image)])
        expected = models.predict(model, data)
        np.testing.assert_array_equal(models.predict(keras_dst.strip(model), data), expected)

        units = closed_gate(layers.Dense(4)(inputs), [0, 1, 0, 1])
        model = keras.Model(inputs, closed_gate(units, [0, 0, 1, 1]))
        expected = models.predict(model, data)
        with pytest.raises(ValueError, match=r"set_image_data_format\('channels_last'\)"):
            keras_dst.strip(model)
        assert len(gates_of(model)) == 2
        np.testing.assert_array_equal(models.predict(model, data), expected)
        keras.config.set_image_data_format("channels_last")
        np.testing.assert_array_equal(models.predict(keras_dst.strip(model), data), expected)
    finally:
        keras.config.set_image_data_format("channels_last")


def test_stripping_a_gate_in_a_subclassed_model_raises():
    @keras.saving.register_keras_serializable("tests")
    class Gated(keras.Model):
        def __init__(self):
            super().__init__()
            self.gate = Gate()

        def call(self, a):
            return self.gate(a)

    model = Gated()
    model(np.ones((2, 3), "float32"))
    with pytest.raises(ValueError, match="custom layer or model creates and calls"):
        keras_dst.strip(model)
    assert isinstance(model.gate, Gate)
