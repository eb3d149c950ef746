"""Train a small network with every method on one or several devices, for test_devices.py.

`python -m tests.devices.trainings SETUP FOLDER` writes the files `METHOD.RUN.COPY.npz`, one file
for each method, training run and copy of the variables. A file contains one array for each
variable. The name of an array is the path of its variable.
"""

# ruff: noqa: E402 - Set up the devices before the backend is imported.

import contextlib
import os
import pathlib
import sys
import warnings

DEVICES = {"mirrored": 2, "sharded": 4}  # Number of devices per process.

if __name__ == "__main__":  # Set up the devices before the backend is imported.
    _setup = sys.argv[1]
    if _setup == "sharded":
        flags = f"--xla_force_host_platform_device_count={DEVICES[_setup]}"
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    if _setup == "mirrored":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration()] * DEVICES[_setup]
        tf.config.set_logical_device_configuration(cpu, logical)
    # TensorFlow must create this strategy at the start of the process, and only once.
    if _setup == "workers":
        import tensorflow as tf

        options = tf.distribute.experimental.CommunicationOptions(
            implementation=tf.distribute.experimental.CommunicationImplementation.RING
        )
        workers = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)

import keras
import numpy as np

import keras_dst
from keras_dst import methods
from keras_dst.callbacks import SparseTraining
from tests.backends import short

ALL_METHODS = {
    "dst": methods.DST(sparsity=0.7, frequency=5),
    "dcil": methods.DCIL(0.7),
    "optg": methods.OptG(0.7),
    "consensus": methods.Consensus(0.3, lambda_polar=0.1, lambda_act=20.0),
    "magnitude": methods.Magnitude(0.7, revival=True),
    "flipout": methods.FlipOut(0.7),
    "set": methods.SET(0.7),
    "rigl": methods.RigL(0.7),
}
# Names of the methods that `make test` trains on each backend. TensorFlow and JAX compile every
# method for several layouts of devices, so `make test` trains only one method on each of these two
# backends. DCIL changes the layers, and RigL updates the masks in the optimizer. test_pages.py
# trains other methods with the same strategies.
SHORT = {"tensorflow": ["dcil"], "jax": ["rigl"], "torch": ["dcil", "rigl", "consensus"]}
METHODS = short(ALL_METHODS, *SHORT[keras.backend.backend()])
BATCH, EPOCHS = 16, 2
x = np.random.default_rng(0).standard_normal((128, 8)).astype("float32")
y = (x @ np.random.default_rng(1).standard_normal((8, 4))).argmax(1)


def build(method):
    """Return a compiled network for training with a method.

    Every call creates the same initial weights.
    """
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(20, "relu", name="first"),
            keras.layers.Dense(4, "softmax", name="last"),
        ],
        name="net",
    )
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9, name="sgd")
    if isinstance(method, methods.LayerMethod):
        keras_dst.sparsify(model, method)
    else:
        optimizer = keras_dst.SparseOptimizer(optimizer, method, name="sparse")
    jit = False if keras.backend.backend() == "tensorflow" else "auto"
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=jit)
    return model


def fit(model):
    with quiet():
        options = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
        model.fit(x, y, **options, callbacks=[SparseTraining()])
    return model


def variables(model):
    return {v.path: v for v in [*model.variables, *model.optimizer.variables]}


def save(folder, method, run, model, copies):
    """Write the variables of a model to one file per device.

    The function `copies` returns a list with the value of a variable on each device.
    """
    arrays = {path: copies(v) for path, v in variables(model).items()}
    for copy in range(len(next(iter(arrays.values())))):
        here = {path: values[copy] for path, values in arrays.items()}
        np.savez(folder / f"{method}.{run}.{copy}.npz", **here)


def one(variable):
    return [np.array(variable.numpy())]


# -- setups ----------------------------------------------------------------------------------------


def mirrored(folder):
    """Train with `tf.distribute.MirroredStrategy`. Every replica has a copy of each variable."""
    # All methods share one strategy object, because collective operations of two strategies would
    # conflict.
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(DEVICES["mirrored"])])
    for name, method in METHODS.items():
        save(folder, name, "single", fit(build(method)), one)
        with strategy.scope():
            model = build(method)
        save(folder, name, "mirrored", fit(model), lambda v: [c.numpy() for c in v.value.values])
    for name, error in refused(strategy).items():
        (folder / f"{name}.txt").write_text(error)


def refused(strategy):
    """Return the error messages for two optimizers that do not work with `tf.distribute`."""
    outside = keras.optimizers.SGD()
    with strategy.scope():
        net = build(ALL_METHODS["dst"])
        cases = {
            "outside": outside,
            "accumulation": keras.optimizers.SGD(gradient_accumulation_steps=2),
        }
        errors = {}
        for name, inner in cases.items():
            try:
                keras_dst.SparseOptimizer(inner, methods.SET(0.5)).build(net.trainable_variables)
            except ValueError as error:
                errors[name] = str(error)
    return errors


def workers_(folder):
    """Train with `MultiWorkerMirroredStrategy`. Every process has a copy of each variable."""
    rank = int(os.environ["RANK"])
    with workers.scope():
        plain = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, "softmax")])
        plain.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    try:  # Without keras_dst, Keras raises an error here. Record the error message.
        plain.fit(x, y, verbose=0)
    except ValueError as error:
        (folder / f"fit.{rank}.txt").write_text(str(error))
    for name, method in METHODS.items():
        with workers.scope():
            model = build(method)
        arrays = {path: one(v)[0] for path, v in variables(loop(model, workers)).items()}
        np.savez(folder / f"{name}.workers.{rank}.npz", **arrays)


def loop(model, strategy):
    """Run a custom training loop on TensorFlow with SparseTraining."""
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    batches = strategy.experimental_distribute_dataset(batches)

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            loss = model.compute_loss(x=x, y=y, y_pred=y_pred, training=True)
        weights = model.trainable_variables
        model.optimizer.apply(tape.gradient(loss, weights), weights)

    @tf.function
    def train_step(x, y):
        strategy.run(replica_step, args=(x, y))

    with driven(model) as callbacks:
        for epoch in range(EPOCHS):
            callbacks.on_epoch_begin(epoch)
            for step, batch in enumerate(batches):
                train_step(*batch)
                callbacks.on_train_batch_end(step, {})
            callbacks.on_epoch_end(epoch, {})
    return model


@contextlib.contextmanager
def driven(model):
    """Return the callbacks of a custom training loop."""
    callbacks = keras.callbacks.CallbackList(
        [SparseTraining()], model=model, epochs=EPOCHS, steps=len(x) // BATCH
    )
    callbacks.on_train_begin()
    with quiet():
        yield callbacks
        callbacks.on_train_end()


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        # The training runs are so short that methods such as DST reach the target sparsity only
        # after the last step, so `fit` warns.
        warnings.filterwarnings("ignore", message=".*training had reached")
        yield


def sharded(folder):
    """Train with `keras.distribution` on JAX.

    Every device holds shards of the variables. Before a variable is saved, its shards are joined.
    """
    distribution = keras.distribution
    devices = distribution.list_devices("cpu")
    mesh = distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layout = distribution.LayoutMap(mesh)
    # The pattern ".*first/kernel.*" also matches the paths of masks and thresholds.
    layout[".*first/kernel.*"] = (None, "model")
    layout[".*first/bias"] = ("model",)
    runs = {
        "single": None,
        "data": distribution.DataParallel(devices=devices),
        "model": distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"),
    }
    for name, method in METHODS.items():
        for run, chosen in runs.items():
            distribution.set_distribution(chosen)
            model = fit(build(method))
            save(folder, name, run, model, one if chosen is None else whole_on_each)
            if run == "model":
                check_layouts(model)


def whole_on_each(variable):
    """Return two complete copies of a variable that is sharded over several devices.

    Every shard is stored on several devices. To build a copy, join one replica of every shard.
    """
    parts = {}
    for shard in variable.value.addressable_shards:
        parts.setdefault(str(shard.index), []).append((shard.index, np.asarray(shard.data)))
    copies = []
    for several in zip(*parts.values()):
        whole = np.zeros(variable.shape, several[0][1].dtype)
        for index, data in several:
            whole[index] = data
        copies.append(whole)
    # On a mesh of 2 x 2 devices, every variable has at least two copies.
    return copies[:2]


def check_layouts(model):
    """Check that all variables with the shape of a sharded kernel are sharded like this kernel."""
    kernel = model.layers[0]._kernel
    for path, variable in variables(model).items():
        if "first" in path and tuple(variable.shape) == tuple(kernel.shape):
            spec = variable.value.sharding.spec
            if tuple(spec) != (None, "model"):
                raise AssertionError(f"{path} has the sharding {spec}")


def ddp(folder):
    """Train with PyTorch's DistributedDataParallel. Every process has a copy of each variable."""
    import torch

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, method in METHODS.items():
        if rank == 0:
            save(folder, name, "single", torch_loop(build(method)), one)
        model = torch_loop(build(method), rank)
        arrays = {path: one(v)[0] for path, v in variables(model).items()}
        np.savez(folder / f"{name}.ddp.{rank}.npz", **arrays)
    torch.distributed.destroy_process_group()


def torch_loop(model, rank=None):
    """Run a custom training loop on PyTorch.

    If `rank` is given, the loop trains on the half of every batch that belongs to this process.
    """
    import torch

    parts = 1 if rank is None else 2
    module = model if rank is None else torch.nn.parallel.DistributedDataParallel(model)
    with driven(model) as callbacks:
        for epoch in range(EPOCHS):
            callbacks.on_epoch_begin(epoch)
            for step in range(len(x) // BATCH):
                first = step * BATCH + (rank or 0) * BATCH // parts
                mine = slice(first, first + BATCH // parts)
                inputs, labels = torch.as_tensor(x[mine]), torch.as_tensor(y[mine])
                model.zero_grad()
                y_pred = module(inputs, training=True)
                model.compute_loss(x=inputs, y=labels, y_pred=y_pred, training=True).backward()
                weights = model.trainable_variables
                with torch.no_grad():
                    model.optimizer.apply([v.value.grad for v in weights], weights)
                callbacks.on_train_batch_end(step, {})
            callbacks.on_epoch_end(epoch, {})
    return model


if __name__ == "__main__":
    setups = {"mirrored": mirrored, "workers": workers_, "sharded": sharded, "ddp": ddp}
    setups[_setup](pathlib.Path(sys.argv[2]))
