"""Tests that compare the masks and files of `keras_dst.tfmot` with the original tfmot, step by
step.

The tests need a Python with tf_keras and tensorflow-model-optimization. On PyTorch, the tests use
`.venv-tfmot`, which `make test` creates. If the environment variable KERAS_DST_TFMOT_PYTHON is set,
the tests use that Python on every backend.
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
from tests.backends import short
from tests.tfmot_worker import BATCH, BATCHES, EPOCHS

ROOT = pathlib.Path(__file__).parent.parent
GIVEN = os.environ.get("KERAS_DST_TFMOT_PYTHON")
CASES = short(tfmot_worker.CASES, "every-step", "convolutions", "blocks-avg", "2-of-4")
PYTHON = pathlib.Path(GIVEN or ROOT / ".venv-tfmot" / "bin" / "python")

pytestmark = [
    pytest.mark.skipif(
        not GIVEN and keras.backend.backend() != "torch",
        reason="runs on PyTorch only, the fastest backend; test_tfmot.py runs on all backends",
    ),
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="needs a Python with tfmot: create .venv-tfmot with `make test-torch`, or set "
        "KERAS_DST_TFMOT_PYTHON",
    ),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Train all cases with the original tfmot, and return the folder of the recorded values."""
    folder = tmp_path_factory.mktemp("tfmot")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    environment.pop("KERAS_BACKEND", None)
    done = subprocess.run(
        [PYTHON, tfmot_worker.__file__, folder, *CASES],
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
    """Return the raw variable and the mask of every pruned weight, in the order of the layers."""
    found = []
    for layer in model.layers:
        inside = [x for x in layer._flatten_layers() if tfmot.is_pruned(x)]
        found += [(w, state["mask"]) for x in inside for _, w, state in x.masked_weights()]
    return found


def fit(model, case, epoch, record, first):
    """Train for an epoch, and compare the masks and weights of every step with the record of tfmot.

    After each comparison, replace the weights with the recorded weights of tfmot. Otherwise, the
    rounding differences of many steps could add up and change a mask.
    """
    kind, *_ = CASES[case]
    x, y = tfmot_worker.data(kind)
    part = slice(epoch * BATCH * BATCHES, (epoch + 1) * BATCH * BATCHES)
    masks = []

    class Compare(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            step = first + len(masks)
            found = pruned(self.model)
            assert f"mask_{step}_{len(found)}" not in record
            for i, (weight, mask) in enumerate(found):
                where = f"{weight.path} at step {step}"
                np.testing.assert_array_equal(mask.numpy(), record[f"mask_{step}_{i}"], where)
                expected = record[f"weight_{step}_{i}"]
                np.testing.assert_allclose(weight.numpy(), expected, atol=2e-4, err_msg=where)
                weight.assign(expected)
            masks.append([mask.numpy() for _, mask in found])

    model.fit(
        x[part],
        y[part],
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[tfmot.UpdatePruningStep(), Compare()],
    )
    return masks


def compiled(model, case):
    optimizer, rates = CASES[case][3]
    model.compile(getattr(keras.optimizers, optimizer)(**rates), "mse")
    return model


@pytest.mark.parametrize("case", CASES)
def test_masks_of_every_step_equal_those_of_tfmot(records, case):
    kind, (schedule, steps), arguments, *_ = CASES[case]
    record = read(records, case)
    model = tfmot_worker.net(keras, kind)
    for i, variable in enumerate(model.weights):
        variable.assign(record[f"start_{i}"])
    schedule = getattr(tfmot, schedule)(**steps)
    model = compiled(tfmot.prune_low_magnitude(model, schedule, **arguments), case)
    masks = [
        m for epoch in range(EPOCHS) for m in fit(model, case, epoch, record, 1 + epoch * BATCHES)
    ]
    if case == "every-step":  # Some pruned weights are kept again later.
        assert any((b & ~a).any() for s, t in pairwise(masks) for a, b in zip(s, t))
    x, _ = tfmot_worker.data(kind)
    stripped = tfmot.strip_pruning(model)
    np.testing.assert_allclose(stripped.predict(x, verbose=0), record["final"], atol=1e-3)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][4]])
def test_training_continues_from_a_tfmot_file(records, case):
    kind, _, _, optimizer, extension = CASES[case]
    record = read(records, case)
    model = tfmot.load(records / f"{case}.{extension}")
    x, _ = tfmot_worker.data(kind)
    np.testing.assert_allclose(model.predict(x, verbose=0), record["predicted"], atol=1e-5)
    for i, (_, mask) in enumerate(pruned(model)):
        np.testing.assert_array_equal(mask.numpy(), record[f"mask_{BATCHES}_{i}"])
    # Plain SGD has no state that must be restored from the file, so training can continue.
    if optimizer == tfmot_worker.SGD:
        fit(compiled(model, case), case, 1, record, BATCHES + 1)
