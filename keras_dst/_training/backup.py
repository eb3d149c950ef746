"""Going on with a training that was killed: `BackupAndRestore`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib

import keras
import numpy as np
from keras import ops

from keras_dst import _keras
from keras_dst._backend.jit import set_torch_rng_state, torch_rng_state
from keras_dst._utils.files import atomic_write
from keras_dst._utils.validation import is_integer

_RECORD = "training.json"


class BackupAndRestore(keras.callbacks.Callback):
    """Backs up a training, and goes on with it exactly, at whatever moment it was killed.

    As `keras.callbacks.BackupAndRestore`, which a kill can leave with a file cut short, or with
    weights and an epoch number that do not belong together, which begins an epoch again with the
    weights that it had in the middle of it, and which forgets the random numbers of dropout. Here
    a backup counts from one renaming on, has these with it, and a training goes on with the
    batch after it: the batches before are drawn and left out. A backup is made when all callbacks
    are done with an epoch or a batch, whatever their order.

    The data have to come in the same order again: `fit(shuffle=False)`, or a data set whose order
    follows from the epoch. The logs of an epoch that was resumed are of the batches since then.

    Args:
        backup_dir: a folder for this training alone.
        save_freq: `"epoch"` (default), or a number of batches.
        delete_checkpoint: whether the backup is deleted once training is finished. Defaults to
            True.

    Raises:
        ValueError: for another `save_freq`, or when a model without weights is to be restored.

    Example:
        >>> backup = keras_dst.callbacks.BackupAndRestore("backup")
        >>> model.fit(x, y, shuffle=False, callbacks=[keras_dst.callbacks.SparseTraining(), backup])
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike,
        save_freq: int | str = "epoch",
        delete_checkpoint: bool = True,
    ):
        super().__init__()
        if save_freq != "epoch" and not is_integer(save_freq, minimum=1):
            raise ValueError(
                f"save_freq must be 'epoch' or a number of batches >= 1. Received: {save_freq!r}"
            )
        self.backup_dir = pathlib.Path(backup_dir)
        self.save_freq = save_freq
        self.delete_checkpoint = delete_checkpoint

    def on_train_begin(self, logs=None):
        self._epoch = None  # what trains next
        self._batch = 0
        self._since = 0  # batches trained since the last backup
        self._generator = None  # state to be restored
        self.model._initial_batch = 0
        if (self.backup_dir / _RECORD).exists():
            self._restore()

    def on_epoch_begin(self, epoch, logs=None):
        if self._epoch not in (None, epoch):  # another epoch has ended, and every callback with it
            self._batch = 0
            if self._is_due("epoch"):
                self._back_up(epoch, 0)
        self._epoch = epoch
        if self.model._initial_batch:
            _leave_out(self.model, self.model._initial_batch)
        else:
            self._restore_generator()

    def on_train_batch_begin(self, batch, logs=None):
        self._forget_start()
        if batch >= self._batch:
            self._restore_generator()
        if self._is_due("batch"):
            self._back_up(self._epoch, self._batch)

    def on_train_batch_end(self, batch, logs=None):
        self._since += max(0, batch + 1 - self._batch)
        self._batch = max(self._batch, batch + 1)

    def on_train_end(self, logs=None):
        self._forget_start()
        if not self.delete_checkpoint:
            self._back_up(self.params["epochs"], 0)
        elif self.backup_dir.exists():
            (self.backup_dir / _RECORD).unlink(missing_ok=True)
            self._clear()
            with contextlib.suppress(OSError):  # something of the user's is in it
                self.backup_dir.rmdir()

    # --------------------------------------------------------------------------------------------

    def _is_due(self, end: str) -> bool:
        if isinstance(self.save_freq, str):
            return end == "epoch"
        return self._since >= self.save_freq

    def _back_up(self, epoch, batch):
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        weights = self.backup_dir / f"backup-{epoch}-{batch}.weights.h5"
        with atomic_write(weights) as unfinished:
            self.model.save_weights(unfinished)
        seeds = [ops.convert_to_numpy(v).tolist() for v in _seeds(self.model)]
        record = {
            "epoch": epoch,
            "batch": batch,
            "weights": weights.name,
            "seeds": seeds,
            "generator": torch_rng_state(),
        }
        with atomic_write(self.backup_dir / _RECORD) as unfinished:
            unfinished.write_text(json.dumps(record))
        self._clear(keep=weights)
        self._since = 0

    def _clear(self, keep=None):
        """Remove older backups, and what kills have left unfinished."""
        for pattern in ("*backup-*.weights.h5", f".*{_RECORD}"):
            for path in self.backup_dir.glob(pattern):
                if path != keep:
                    path.unlink(missing_ok=True)

    def _restore(self):
        model, path = self.model, self.backup_dir / _RECORD
        if not model.built:
            raise ValueError(
                f"There is a backup in {self.backup_dir}, and '{model.name}' has no weights yet. "
                "Give it an Input, or call it once on data, before fit."
            )
        try:
            record = json.loads(path.read_text())
            weights = self.backup_dir / record["weights"]
            epoch, batch = int(record["epoch"]), int(record["batch"])
            seeds, self._generator = list(record["seeds"]), record["generator"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no record of a backup. Delete {self.backup_dir} to train anew."
            ) from error
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        model.load_weights(weights)
        for variable, value in zip(_seeds(model), seeds):
            variable.assign(np.array(value, variable.dtype))
        self._epoch, self._batch = epoch, batch
        _keras.set_initial_epoch(model, epoch)
        model._initial_batch = batch

    def _restore_generator(self):
        # Where the backup was made: a new epoch draws from it as well.
        if self._generator is not None:
            set_torch_rng_state(self._generator)
            self._generator = None

    def _forget_start(self):
        """Keras keeps where a fit begins for every later one."""
        _keras.set_initial_epoch(self.model, None)
        self.model._initial_batch = 0


def _seeds(model) -> list:
    """States of the random numbers of layers such as Dropout, which Keras leaves out of files."""
    known = {id(v) for v in [*model.weights, *model.metrics_variables]}
    return [v for v in model.variables if id(v) not in known]


class ActiveFit:
    """True while the fit in which it was made goes on; nobody hears of one that is interrupted."""

    def __init__(self, model):
        self.model, self.history = model, getattr(model, "history", None)

    def __bool__(self):
        return getattr(self.model, "history", None) is self.history  # every fit makes a new one


def _leave_out(model, batches: int) -> None:
    """Draw so many batches without training on them."""
    step, left, running = model.train_function, batches, ActiveFit(model)

    @functools.wraps(step, assigned=(), updated=())
    def draw(*arguments):
        nonlocal left
        if not running:  # interrupted before it was done
            model.train_function = step
            return step(*arguments)
        if keras.backend.backend() != "torch":  # where they are drawn before
            for _ in range(model.steps_per_execution):
                next(arguments[-1])
        left -= model.steps_per_execution
        if left <= 0:
            model.train_function = step
        return {} if len(arguments) == 1 else ({}, arguments[0])

    vars(draw)["ours"] = True  # as `callbacks.guard_step` marks its own
    model.train_function = draw
