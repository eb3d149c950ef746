"""Files where XNNPACK has its sparse kernels, as on ARM: the same outputs as with AVX."""

import numpy as np
import pytest

from keras_dst.export.choose import UNSAFE, Goal, choose
from keras_dst.export.cost import CPUS, Modelled
from keras_dst.export.encode import Form, encode, weights
from keras_dst.export.flat import read
from tests import no_avx

from .graphs import BUILTIN, convolution, fully_connected, run, sparse_values
from .test_nchw import BODY, mean, network, pointwise, pool, unpacked

pytestmark = pytest.mark.skipif(bool(no_avx.obstacle()), reason=no_avx.obstacle())

RUN = """
import pathlib
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
for path in pathlib.Path(sys.argv[1]).glob("*.tflite"):
    for resolver in (OpResolverType.AUTO, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES):
        runner = Interpreter(str(path), experimental_op_resolver_type=resolver)
        runner = runner.get_signature_runner()
        (output,) = runner(x=np.load(path.with_suffix(".npy"))).values()
        np.save(path.with_suffix(f".{resolver.name}.npy"), output)
"""


def formed(content, form):
    return encode(content, {weight.buffer: form for weight in weights(read(content))})


CUT = network(*BODY, pool("MAX_POOL_2D"), pointwise, mean)
ARM = Goal("latency", (Modelled(CPUS["arm"]),))
FC = fully_connected(sparse_values((24, 64), 0.3, block=16))
CONV = convolution("CONV_2D", sparse_values((16, 3, 3, 16), 0.2, block=4))
FILES = {
    "moved as a whole": choose(network(*BODY, pointwise, mean), ARM).content,
    "moved in part": choose(CUT, ARM).content,
    "im2col": formed(CONV, Form(4, unpack=False, im2col=True)),
    "blocks": formed(FC, Form(4, unpack=False)),
    "blocks of int8": formed(FC, Form(16, unpack=False, int8=True)),
    "int8": formed(CONV, Form(1, unpack=True, int8=True)),
    "unguarded": unpacked(CUT),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The outputs of every file here, and without AVX on both resolvers."""
    folder = tmp_path_factory.mktemp("no_avx")
    expected = {}
    for name, content in FILES.items():
        (shape,) = (t.shape for t in read(content).subgraphs[0].tensors[:1])
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        (folder / f"{name}.tflite").write_bytes(content)
        np.save(folder / f"{name}.npy", x)
        expected[name] = run(content, x, BUILTIN)
    no_avx.run(RUN, folder)
    resolvers = ("AUTO", "BUILTIN_WITHOUT_DEFAULT_DELEGATES")
    return {
        name: (expected[name], [np.load(folder / f"{name}.{r}.npy") for r in resolvers])
        for name in FILES
    }


@pytest.mark.parametrize("name", [name for name in FILES if name != "unguarded"])
def test_the_same_without_avx(outputs, name):
    expected, found = outputs[name]
    for values in found:
        np.testing.assert_allclose(values, expected, atol=1e-4 * np.abs(expected).max())


def test_the_guard_is_needed(outputs):
    """What XNNPACK moves in part is wrong; were it right, these tests would prove nothing."""
    expected, (delegated, builtin) = outputs["unguarded"]
    np.testing.assert_allclose(builtin, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(delegated - expected).max() > 0.1 * np.abs(expected).max()
    assert UNSAFE in {choice.reason for choice in choose(CUT).choices}
