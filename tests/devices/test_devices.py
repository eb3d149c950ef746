"""Tests of training on several devices: every device gets the same weights as one device alone."""

import keras
import numpy as np
import pytest

from tests.backends import slow
from tests.devices import trainings
from tests.devices.launch import launch

BACKEND = keras.backend.backend()
# SETUPS lists the setups of this backend. Each setup has a name, a number of processes, and the
# names of its training runs on several devices.
SETUPS = {
    "tensorflow": [("mirrored", 1, ["mirrored"]), ("workers", 2, ["workers"])],
    "jax": [("sharded", 1, ["data", "model"])],
    "torch": [("ddp", 2, ["ddp"])],
}[BACKEND]
COPIES = 2  # Number of copies of each variable in a run on several devices.
# Methods that limit the gradients of pruned weights. On TensorFlow and PyTorch, every device
# computes the limit from its part of the batch. The trained weights therefore differ from the
# weights of a run on one device. On JAX, the limit of the gradients is computed from the whole
# batch.
LIMITED = {"dst", "optg", "consensus"} if BACKEND != "jax" else set()
# In `make test`, only tests/devices/test_pages.py trains on several TensorFlow workers.
RUNS = [
    pytest.param(setup, run, id=run, marks=[slow] if setup == "workers" else [])
    for setup, _, runs in SETUPS
    for run in runs
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains each setup once, and returns the folder of its results."""
    done = {}

    def folder(setup):
        if setup not in done:
            done[setup] = tmp_path_factory.mktemp(setup)
            processes = next(n for name, n, *_ in SETUPS if name == setup)
            command = ["-m", "tests.devices.trainings", setup, str(done[setup])]
            launch(command, processes, done[setup])
        return done[setup]

    return folder


@pytest.mark.parametrize("method", trainings.METHODS)
@pytest.mark.parametrize(("setup", "run"), RUNS)
def test_all_copies_equal_a_run_on_one_device(trained, setup, run, method):
    folder = trained(setup)
    first, *others = [np.load(folder / f"{method}.{run}.{i}.npz") for i in range(COPIES)]
    single = np.load(trained(SETUPS[0][0]) / f"{method}.single.0.npz")
    assert set(first.files) == set(single.files)
    for path in single.files:
        for other in others:  # The files also contain masks, scores, counters and momentum.
            np.testing.assert_array_equal(first[path], other[path], err_msg=path)
        if method in LIMITED:
            assert first[path].shape == single[path].shape
        elif single[path].dtype.kind == "f":
            np.testing.assert_allclose(first[path], single[path], atol=1e-5, err_msg=path)
        else:
            np.testing.assert_array_equal(first[path], single[path], err_msg=path)


@pytest.mark.parametrize("method", trainings.METHODS)
@pytest.mark.parametrize(("setup", "run"), RUNS)
def test_the_target_is_reached(trained, setup, run, method):
    arrays = np.load(trained(setup) / f"{method}.{run}.0.npz")
    keras.utils.set_random_seed(0)
    model = trainings.build(trainings.METHODS[method])
    model.optimizer.build(model.trainable_variables)
    for variable in model.variables:
        variable.assign(arrays[variable.path])
    sparsity = trainings.keras_dst.report(model).sparsity
    # Consensus prunes 6 of the 20 units in the first layer. These units have 6 * 8 = 48 of the 240
    # weights of the network.
    target = 0.2 if method == "consensus" else 0.7
    assert sparsity == pytest.approx(target, abs=0.01)


@slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="MultiWorkerMirroredStrategy is TensorFlow's")
def test_fit_without_keras_dst_fails_on_several_workers(trained):
    """`fit` fails on several workers, so docs/many_devices.md uses a custom training loop."""
    for rank in range(2):
        assert "PerReplica" in (trained("workers") / f"fit.{rank}.txt").read_text()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute is TensorFlow's")
@pytest.mark.parametrize(
    ("case", "says"), [("outside", "within strategy.scope"), ("accumulation", "larger batch")]
)
def test_unsupported_optimizers_under_a_strategy_raise(trained, case, says):
    assert says in (trained("mirrored") / f"{case}.txt").read_text()
