"""Test of a sparse student in `keras.distillation.Distiller`."""

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import methods
from tests.backends import every

pytestmark = every(16)

distillation = pytest.importorskip("keras.distillation")

x = np.random.default_rng(0).standard_normal((128, 16)).astype("float32")
y = (x @ np.random.default_rng(1).standard_normal((16, 4))).argmax(1)


def network(units):
    return keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(units, "relu"), keras.layers.Dense(4, "softmax")]
    )


@every(16)
@pytest.mark.parametrize(
    "method", [methods.Magnitude(0.8), methods.OptG(0.8), methods.DST(0.8)], ids=repr
)
@pytest.mark.filterwarnings("ignore:.*training had reached .*:UserWarning")
def test_distillation_prunes_the_student_only(method):
    keras.utils.set_random_seed(0)
    teacher, student = network(32), network(24)
    before = [w.copy() for w in teacher.get_weights()]
    start = student.get_weights()[1].copy()
    losses = distillation.LogitsDistillation(temperature=2.0)
    distiller = distillation.Distiller(teacher, student, losses)
    distiller.compile("adam", "sparse_categorical_crossentropy")
    distiller(x[:1])
    keras_dst.sparsify(distiller, method)
    callbacks = [keras_dst.callbacks.SparseTraining()]
    distiller.fit(x, y, epochs=4, batch_size=16, verbose=0, callbacks=callbacks)

    keras_dst.strip(distiller)
    kernels = [layer.kernel.numpy() for layer in student.layers]
    zeros = sum(int((k == 0).sum()) for k in kernels) / sum(k.size for k in kernels)
    assert zeros == pytest.approx(0.8, abs=0.01)
    assert np.abs(student.get_weights()[1] - start).max() > 1e-4
    for old, new in zip(before, teacher.get_weights()):
        np.testing.assert_array_equal(new, old)
    assert {type(layer).__module__.split(".")[0] for layer in student.layers} == {"keras"}
