"""Masks and files against real tfmot: the same weights, gradients and schedule, step by step.

Runs where there is a Python with tf_keras and tensorflow-model-optimization: on torch in the one
that `make test` sets up in .venv-tfmot, on every backend where KERAS_DST_TFMOT_PYTHON names one.
"""

import os
import pathlib
import subprocess
from itertools import pairwise

import keras
import numpy as np
import pytest

from keras_dst import tfmot
from tests import tfmot_worker
from tests.tfmot_worker import BATCH, BATCHES, CASES, EPOCHS

ROOT = pathlib.Path(__file__).parent.parent
GIVEN = os.environ.get("KERAS_DST_TFMOT_PYTHON")
PYTHON = pathlib.Path(GIVEN or ROOT / ".venv-tfmot" / "bin" / "python")

pytestmark = [
    pytest.mark.skipif(
        not GIVEN and keras.backend.backend() != "torch",
        reason="run on torch, which needs no compiling; test_tfmot.py has all backends agree",
    ),
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="there is no environment with tfmot: `make test-torch` makes one in .venv-tfmot, or "
        "KERAS_DST_TFMOT_PYTHON names the Python of one",
    ),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What real tfmot makes of all cases."""
    folder = tmp_path_factory.mktemp("tfmot")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    environment.pop("KERAS_BACKEND", None)
    done = subprocess.run(
        [PYTHON, tfmot_worker.__file__, folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not done.returncode, done.stderr[-3000:]
    return folder


def read(folder, case):
    with np.load(folder / f"{case}.npz") as record:
        return dict(record)


def pruned(model):
    """Raw weight and mask of every pruned weight, in tfmot's order: that of the layers."""
    found = []
    for layer in model.layers:
        inside = [x for x in layer._flatten_layers() if tfmot.is_pruned(x)]
        found += [(w, state["mask"]) for x in inside for _, w, state in x.masked_weights()]
    return found


def fit(model, case, epoch, record, first):
    """Train an epoch; every step has to have the masks and weights of the record."""
    kind, *_ = CASES[case]
    x, y = tfmot_worker.data(kind)
    part = slice(epoch * BATCH * BATCHES, (epoch + 1) * BATCH * BATCHES)
    changes = []

    class Compare(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            step = first + len(changes)
            found = pruned(self.model)
            assert f"mask_{step}_{len(found)}" not in record
            for i, (weight, mask) in enumerate(found):
                where = f"{weight.path} at step {step}"
                np.testing.assert_array_equal(mask.numpy(), record[f"mask_{step}_{i}"], where)
                expected = record[f"weight_{step}_{i}"]
                np.testing.assert_allclose(weight.numpy(), expected, atol=2e-4, err_msg=where)
            changes.append([mask.numpy() for _, mask in found])

    model.fit(
        x[part],
        y[part],
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[tfmot.UpdatePruningStep(), Compare()],
    )
    return changes


def compiled(model, case):
    optimizer, rates = CASES[case][3]
    model.compile(getattr(keras.optimizers, optimizer)(**rates), "mse")
    return model


@pytest.mark.parametrize("case", CASES)
def test_masks_of_every_step(made, case):
    kind, (schedule, steps), arguments, *_ = CASES[case]
    record = read(made, case)
    model = tfmot_worker.net(keras, kind)
    for i, variable in enumerate(model.weights):
        variable.assign(record[f"start_{i}"])
    schedule = getattr(tfmot, schedule)(**steps)
    model = compiled(tfmot.prune_low_magnitude(model, schedule, **arguments), case)
    masks = [
        m for epoch in range(EPOCHS) for m in fit(model, case, epoch, record, 1 + epoch * BATCHES)
    ]
    if case == "every-step":  # weights came back, or the order of things could not be told
        assert any((b & ~a).any() for s, t in pairwise(masks) for a, b in zip(s, t))
    x, _ = tfmot_worker.data(kind)
    stripped = tfmot.strip_pruning(model)
    np.testing.assert_allclose(stripped.predict(x, verbose=0), record["final"], atol=1e-3)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][4]])
def test_a_file_of_tfmot_is_loaded_and_trained_on(made, case):
    kind, _, _, optimizer, extension = CASES[case]
    record = read(made, case)
    model = tfmot.load(made / f"{case}.{extension}")
    x, _ = tfmot_worker.data(kind)
    np.testing.assert_allclose(model.predict(x, verbose=0), record["predicted"], atol=1e-5)
    for i, (_, mask) in enumerate(pruned(model)):
        np.testing.assert_array_equal(mask.numpy(), record[f"mask_{BATCHES}_{i}"])
    if optimizer == tfmot_worker.SGD:  # which keeps nothing that a file without it would lack
        fit(compiled(model, case), case, 1, record, BATCHES + 1)
