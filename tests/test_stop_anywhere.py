"""Tests that a training process can be killed and resumed without any effect on the result."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst.callbacks import BackupAndRestore, SparseTraining
from keras_dst.methods import ST3
from tests import models, stop_worker
from tests.backends import every, heavy, once

KILLS = int(os.environ.get("KERAS_DST_KILLS", "1"))
SEED = int(os.environ.get("KERAS_DST_SEED", "0"))
LINES = len(stop_worker.METHODS) * stop_worker.EPOCHS * stop_worker.STEPS


def run(folders, save_freq, kill_after=None, delay=0.0):
    """Run the worker, kill it after `kill_after` lines, and return whether it ended by itself."""
    command = [sys.executable, "-m", "tests.stop_worker", str(save_freq), *map(str, folders)]
    errors = folders[0] / "errors.txt"
    with errors.open("w") as stream:
        worker = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
            cwd=pathlib.Path(__file__).parent.parent,
        )
        with worker:
            for count, line in enumerate(worker.stdout, start=1):
                if count == kill_after:
                    print(f"killed {1000 * delay:.1f} ms after: {line.strip()}")
                    time.sleep(delay)
                    worker.kill()
    assert worker.returncode in (0, -signal.SIGKILL), errors.read_text()
    return worker.returncode == 0


def test_killed_and_resumed_training_equals_an_uninterrupted_run(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    rng = random.Random(SEED)
    kills = 0
    for _ in range(KILLS):
        # The process is killed at a random time, which may be between two backups, during a backup,
        # or during a step.
        lines = rng.randint(1, max(1, 2 * LINES // (KILLS + 1)))
        kills += not run([killed], rng.choice(["epoch", 3]), lines, 0.03 * rng.random())
    assert kills or not KILLS
    # The last process resumes the killed training runs, and then trains without interruption.
    assert run([killed, whole], "epoch")
    for name in stop_worker.METHODS:
        expected, got = (np.load(folder / f"{name}.npz") for folder in (whole, killed))
        assert list(expected) == list(got)
        for key in expected:
            np.testing.assert_array_equal(got[key], expected[key], err_msg=f"{name}: {key}")


class Crash(keras.callbacks.Callback):
    """Callback that interrupts `fit` after a given batch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.moment = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.moment:
            raise KeyboardInterrupt


def crash(model, moment, *callbacks):
    with pytest.raises(KeyboardInterrupt):
        stop_worker.fit(model, *callbacks, Crash(*moment))


def check_same(model, other):
    expected, got = stop_worker.state(model), stop_worker.state(other)
    assert list(expected) == list(got)
    for key, value in expected.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)


@pytest.fixture(scope="module")
def whole():
    """Train a model with RigL without an interruption, and return the method and the model."""
    method = stop_worker.ALL_METHODS["rigl"]
    model = stop_worker.build(method)
    stop_worker.fit(model, SparseTraining())
    return method, model


@heavy
@once
@pytest.mark.parametrize(("save_freq", "first"), [("epoch", False), (3, True)])
def test_the_order_of_callbacks_does_not_matter(save_freq, first, whole, tmp_path):
    method, model = whole

    def callbacks():
        both = [BackupAndRestore(tmp_path / "b", save_freq), SparseTraining()]
        return both if first else both[::-1]

    for moment in ((1, 6), (3, 7)):
        crash(stop_worker.build(method), moment, *callbacks())
    resumed = stop_worker.build(method)
    stop_worker.fit(resumed, *callbacks())
    check_same(model, resumed)
    assert not (tmp_path / "b").exists()


@heavy
@once
@pytest.mark.parametrize("rename", range(2))
def test_training_killed_during_a_backup_can_be_resumed(rename, whole, tmp_path, monkeypatch):
    """The process is killed while it saves a backup, before a new file gets its final name."""
    method, model = whole
    seen = []

    def replace(source, target):
        seen.append(target)
        if len(seen) == rename + 3:
            pathlib.Path(source).write_bytes(b"cut short")
            raise KeyboardInterrupt
        os.rename(source, target)

    def callbacks():
        return SparseTraining(), BackupAndRestore(tmp_path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            stop_worker.fit(stop_worker.build(method), *callbacks())
    resumed = stop_worker.build(method)
    stop_worker.fit(resumed, *callbacks())
    check_same(model, resumed)


@once
def test_only_unfinished_backup_files_are_removed(tmp_path):
    (tmp_path / "mine.txt").write_text("not ours")
    (tmp_path / ".123.backup-1-0.weights.h5").write_text("cut short")
    (tmp_path / ".123.training.json").write_text("{")
    model = stop_worker.build(stop_worker.ALL_METHODS["magnitude"])
    stop_worker.fit(model, SparseTraining(), BackupAndRestore(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@every(16)
@pytest.mark.parametrize("name", ["dst-target", "flipout"])
def test_resuming_from_a_final_backup_trains_no_further(name, tmp_path):
    """If a process was killed after its last backup, resuming does not train the model again."""
    model = stop_worker.build(stop_worker.ALL_METHODS[name])
    stop_worker.fit(model, SparseTraining(), BackupAndRestore(tmp_path, delete_checkpoint=False))
    again = stop_worker.build(stop_worker.ALL_METHODS[name])
    stop_worker.fit(again, SparseTraining(), BackupAndRestore(tmp_path, delete_checkpoint=False))
    check_same(model, again)


@heavy
@once
@pytest.mark.parametrize("driven", [True, False])
def test_an_interruption_while_batches_are_skipped(driven, tmp_path):
    """Interrupt `fit` while it skips batches of an earlier run. A later `fit` without a backup
    callback must not skip batches."""
    method = stop_worker.ALL_METHODS["magnitude" if driven else "dst"]
    callbacks = [SparseTraining()] if driven else []
    crash(stop_worker.build(method), (1, 7), *callbacks, BackupAndRestore(tmp_path, 3))
    model = stop_worker.build(method)
    crash(model, (1, 0), *callbacks, BackupAndRestore(tmp_path, 3))
    before = int(model.optimizer.iterations)
    assert before == stop_worker.STEPS + 7
    stop_worker.fit(model, *callbacks)
    steps = stop_worker.EPOCHS * stop_worker.STEPS
    assert int(model.optimizer.iterations) == before + steps


@heavy
@once
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(("name", "moment"), [("dst-target", (0, 6)), ("flipout", (2, 1))])
def test_training_on_data_of_unknown_length_can_be_resumed(name, moment, tmp_path):
    import torch

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(stop_worker.x, stop_worker.y))

    def fit(model, *callbacks):
        data = torch.utils.data.DataLoader(Rows(), batch_size=stop_worker.BATCH)
        model.fit(data, epochs=4, shuffle=False, verbose=0, callbacks=callbacks)

    def build():
        return stop_worker.build(stop_worker.ALL_METHODS[name])

    def callbacks():
        return SparseTraining(epochs=8), BackupAndRestore(tmp_path, 3)

    model = build()
    fit(model, SparseTraining(epochs=8))
    with pytest.raises(KeyboardInterrupt):
        fit(build(), *callbacks(), Crash(*moment))
    resumed = build()
    fit(resumed, *callbacks())
    check_same(model, resumed)


@heavy
@once
def test_training_with_skipped_steps_can_be_resumed(tmp_path):
    """`LossScaleOptimizer` skips steps in which the scaled gradients overflow."""

    def build():
        model = stop_worker.build(ST3(0.8))
        optimizer = keras.optimizers.SGD(1e-4)
        scaled = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=3e38)
        return models.compiled(model, scaled, loss_weights=[1000.0])

    model = build()
    stop_worker.fit(model, SparseTraining())
    steps = stop_worker.EPOCHS * stop_worker.STEPS
    assert int(model.optimizer.inner_optimizer.iterations) < steps - 4
    crash(build(), (2, 4), SparseTraining(), BackupAndRestore(tmp_path))
    resumed = build()
    stop_worker.fit(resumed, SparseTraining(), BackupAndRestore(tmp_path))
    check_same(model, resumed)


@heavy
@once
def test_a_later_fit_starts_at_its_first_batch(tmp_path):
    method = stop_worker.ALL_METHODS["magnitude"]
    crash(stop_worker.build(method), (2, 3), SparseTraining(), BackupAndRestore(tmp_path, 3))
    model = stop_worker.build(method)
    stop_worker.fit(model, SparseTraining(), BackupAndRestore(tmp_path, 3))
    iterations = int(model.optimizer.iterations)
    assert iterations == stop_worker.EPOCHS * stop_worker.STEPS
    stop_worker.fit(model, SparseTraining())
    assert int(model.optimizer.iterations) == 2 * iterations


@heavy
@once
@pytest.mark.parametrize("name", ["dst-target", "magnitude"])
def test_the_keras_backup_callback_within_an_epoch_reaches_the_target(name, tmp_path):
    """Keras repeats the interrupted epoch, so training has more steps than the schedule expects."""
    method = stop_worker.ALL_METHODS[name]
    own = keras.callbacks.BackupAndRestore
    crash(stop_worker.build(method), (2, 5), SparseTraining(), own(tmp_path / "b", 3))
    model = stop_worker.build(method)
    stop_worker.fit(model, SparseTraining(), own(tmp_path / "b", 3))
    steps = stop_worker.EPOCHS * stop_worker.STEPS
    assert int(model.optimizer.iterations) > steps
    target = getattr(method, "sparsity", 0.7)
    assert keras_dst.report(model).sparsity == pytest.approx(target, abs=0.01)
