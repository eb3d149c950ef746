"""Measure the step time of tfmot relative to the dense baseline: results/step_time.

tfmot does not support Keras 3. The module therefore runs in a separate environment with tf_keras.
"""

import os
import sys
from functools import partial

# Use one core for this process, before any library starts its threads.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ["TF_USE_LEGACY_KERAS"] = "1"

import tf_keras  # noqa: E402

sys.modules["keras"] = tf_keras  # Make benchmarks.networks use Keras 2.

import tensorflow_model_optimization as tfmot  # noqa: E402

from benchmarks import results  # noqa: E402
from benchmarks.timing import steps_of_fit  # noqa: E402
from benchmarks.training_cost.step_time import BATCH, SETTINGS, TOTAL, compared, data  # noqa: E402


def main():
    setting = SETTINGS["resnet-20"]
    x, y = data(setting)
    pruned = {
        "pruning_schedule": tfmot.sparsity.keras.PolynomialDecay(
            0.0, 0.9, begin_step=0, end_step=TOTAL // 2, frequency=100
        )
    }

    def build(arguments):
        tf_keras.utils.set_random_seed(0)
        model = setting.net()
        if arguments:
            model = tfmot.sparsity.keras.prune_low_magnitude(model, **arguments)
        optimizer = tf_keras.optimizers.SGD(0.01, momentum=0.9)
        model.compile(optimizer, "sparse_categorical_crossentropy")
        callbacks = [tfmot.sparsity.keras.UpdatePruningStep()] if arguments else []
        return partial(steps_of_fit, model, x, y, BATCH, callbacks)

    turns = {"plain": build({}), "prune_low_magnitude": build(pruned)}
    result = compared("resnet-20", turns)
    print(result["ratio_to_plain"])
    results.save("step_time", "resnet-20_tfmot", result)


if __name__ == "__main__":
    main()
