"""Worker process that `test_stop_anywhere` stops.

For each folder, `python -m tests.stop_worker SAVE_FREQ FOLDER ...` trains a small network with
every method, one after the other. During training, the process saves backups in the folder. The
process prints a line after every step. After the training run of a method, the process writes all
trained variables to `METHOD.npz`. A restarted process skips the methods that have a file
`METHOD.npz`.
"""

import pathlib
import sys
import warnings

import keras
import numpy as np

import keras_dst
from keras_dst import methods
from keras_dst.callbacks import BackupAndRestore, SparseTraining
from keras_dst.methods import LayerMethod
from tests import models
from tests.backends import short

ALL_METHODS = {
    "dst": methods.DST(),
    "dst-target": methods.DST(sparsity=0.7),
    "dcil": methods.DCIL(0.8),
    "consensus": methods.Consensus(0.5),
    "magnitude": methods.Magnitude(0.8),
    "magnitude-revival": methods.Magnitude(0.8, revival=True),
    "flipout": methods.FlipOut(0.8),
    "optg": methods.OptG(0.8),
    "set": methods.SET(0.8),
    "rigl": methods.RigL(0.8),
}
# Names of the methods that `make test` trains on each backend. DST and DCIL change the layers. RigL
# and FlipOut update the masks in the optimizer.
SHORT = {"tensorflow": ["dst-target"], "jax": ["rigl"], "torch": ["dcil", "flipout"]}
METHODS = short(ALL_METHODS, *SHORT[keras.backend.backend()])
EPOCHS, STEPS, BATCH = 5, 8, 8

x = np.random.default_rng(0).standard_normal((STEPS * BATCH, 12)).astype("float32")
y = (x @ np.random.default_rng(1).standard_normal((12, 4))).argmax(1)


class Lines(keras.callbacks.Callback):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def on_train_batch_end(self, batch, logs=None):
        print(self.name, batch, flush=True)


def build(method):
    # Keras numbers layer names, such as `dense_1`, until the session is cleared. After
    # `clear_session`, the layers have the same names in every process.
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(16),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(4, "softmax"),
        ]
    )
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    if isinstance(method, LayerMethod):
        keras_dst.sparsify(model, method)
    else:
        optimizer = keras_dst.SparseOptimizer(optimizer, method)
    return models.compiled(model, optimizer)


def state(model):
    """Return the values of all variables that training changes, by name."""
    variables = [*model.variables, *model.optimizer.variables]
    return {f"{i} {v.path}": np.array(v.numpy()) for i, v in enumerate(variables)}


def fit(model, *callbacks):
    with warnings.catch_warnings():
        # In 40 steps, training does not reach the target, so `SparseTraining` must meet the target
        # after the last step.
        warnings.filterwarnings("ignore", ".*training had reached .*")
        model.fit(
            x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=callbacks
        )


def main(folder, save_freq):
    folder = pathlib.Path(folder)
    for name, method in METHODS.items():
        result = folder / f"{name}.npz"
        if result.exists():
            continue
        model = build(method)
        backup = BackupAndRestore(folder / name, save_freq, delete_checkpoint=False)
        fit(model, backup, SparseTraining(), Lines(name))
        with keras_dst._utils.files.atomic_write(result) as unfinished:
            np.savez(unfinished, **state(model))


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    freq, *folders = sys.argv[1:]
    for each in folders:
        main(each, freq if freq == "epoch" else int(freq))
