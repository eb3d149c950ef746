"""Train networks with DST on MNIST with the recipe of the paper (arXiv 2005.06870): results/mnist.

python -m benchmarks.accuracy.mnist lenet-300-100 --seed 0 --target 0.975

The recipe is SGD with learning rate 0.01 and momentum 0.9, batch size 64 and 20 epochs. Pixels are
in [0, 1], and there is neither weight decay nor augmentation. The DST paper gives no recipe for
LSTMs. LSTMs are trained by Adam with learning rate 0.001. Accuracy is the test accuracy of the
stripped model after the last epoch.
"""

import argparse
import functools
import time

import keras

import keras_dst
from benchmarks import results
from benchmarks.data import mnist
from benchmarks.networks import lenet_5_caffe, lenet_300_100, lstm

MODELS = {
    "lenet-300-100": lenet_300_100,
    "lenet-5-caffe": lenet_5_caffe,
    "lstm-128": functools.partial(lstm, 128),
    "lstm-256": functools.partial(lstm, 256),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--target", type=float, help="target sparsity (default: alpha determines the sparsity)"
    )
    parser.add_argument("--alpha", type=float, default=5e-4)
    parser.add_argument("--dense", action="store_true", help="train the dense baseline")
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    train, test = mnist()
    model = MODELS[args.model]()
    callbacks = []
    if not args.dense:
        method = keras_dst.methods.DST(sparsity=args.target, alpha=args.alpha)
        keras_dst.sparsify(model, method)
        callbacks = [keras_dst.callbacks.SparseTraining()]
    recurrent = args.model.startswith("lstm")
    optimizers = keras.optimizers
    model.compile(
        optimizers.Adam(0.001) if recurrent else optimizers.SGD(0.01, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    start = time.perf_counter()
    history = model.fit(
        *train,
        batch_size=64,
        epochs=args.epochs,
        callbacks=callbacks,
        verbose=2,
        validation_data=test,
    )
    seconds = time.perf_counter() - start
    keras_dst.strip(model)
    accuracy = model.evaluate(*test, batch_size=500, verbose=0, return_dict=True)["accuracy"]
    report = keras_dst.report(model)
    kind = "dense" if args.dense else f"target{args.target}" if args.target else "alpha"
    name = f"{args.model}_{kind}_{keras.backend.backend()}_seed{args.seed}"
    results.save(
        "mnist",
        name,
        {
            "command": f"python -m benchmarks.accuracy.mnist {args.model} --seed {args.seed}",
            "arguments": vars(args),
            "test_accuracy": accuracy,
            "sparsity": report.sparsity,
            "kept": 1 - report.sparsity,
            "layers": {row.name: row.density for row in report.layers},
            "seconds": seconds,
            "history": {k: [float(v) for v in values] for k, values in history.history.items()},
        },
    )


if __name__ == "__main__":
    main()
