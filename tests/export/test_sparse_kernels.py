"""Tests of files on CPUs with XNNPACK's sparse kernels: with AVX hidden, and on emulated ARM."""

import functools

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export.encode import Format, encode, weights
from keras_dst.export.flatbuffer import read
from keras_dst.export.latency_model import CPUS, LatencyModel
from keras_dst.export.selection import UNSAFE, Objective, select_formats
from tests import arm64, no_avx
from tests.backends import heavy, once

from .graphs import BUILTIN, convolution, fully_connected, run, sparse_values
from .test_int8 import integers
from .test_sparse_inference import (
    BODY,
    ENDS,
    ENTRIES,
    MIDDLES,
    entry,
    mean,
    network,
    pointwise,
    pool,
    unpacked,
)

pytestmark = once

RUN = """
import pathlib
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
for path in pathlib.Path(sys.argv[1]).glob("*.tflite"):
    for resolver in (OpResolverType.AUTO, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES):
        try:
            runner = Interpreter(str(path), experimental_op_resolver_type=resolver)
            runner = runner.get_signature_runner()
            (output,) = runner(x=np.load(path.with_suffix(".npy"))).values()
        except RuntimeError:  # The runtime refused the file.
            output = np.array(np.nan)
        np.save(path.with_suffix(f".{resolver.name}.npy"), output)
"""
RESOLVERS = ("AUTO", "BUILTIN_WITHOUT_DEFAULT_DELEGATES")


def encoded(content, format):
    return encode(content, {weight.buffer: format for weight in weights(read(content))})


CUT_BODY = (pointwise, pool("MAX_POOL_2D"), pointwise, mean)
CUT = network(entry, *CUT_BODY)
ARM = Objective("latency", (LatencyModel(CPUS["arm"]),))
FC = fully_connected(sparse_values((24, 64), 0.3, block=16))
CONV = convolution("CONV_2D", sparse_values((16, 3, 3, 16), 0.2, block=4))
FC_INTEGERS = sparse_values((24, 304), 0.1, block=16)
CONV_INTEGERS = sparse_values((16, 3, 3, 32), 0.1, block=4)
WRITTEN = {
    "region without obstacle": select_formats(network(*BODY, pointwise, mean), ARM).content,
    "region with an obstacle": select_formats(CUT, ARM).content,
    "im2col": encoded(CONV, Format(4, unpack=False, im2col=True)),
    "blocks": encoded(FC, Format(4, unpack=False)),
    "blocks of int8": encoded(FC, Format(16, unpack=False, int8=True)),
    "int8": encoded(CONV, Format(1, unpack=True, int8=True)),
    "widest blocks of int8": encoded(
        fully_connected(sparse_values((4, 4080), 1.0, block=16)),
        Format(16, unpack=False, int8=True),
    ),
    "integers, blocks": select_formats(
        integers("FULLY_CONNECTED", FC_INTEGERS), Objective("size")
    ).content,
    "integers, unpacked": select_formats(
        integers("CONV_2D", CONV_INTEGERS), Objective("size")
    ).content,
}
#: RULES maps the name of a test case to a `.tflite` file and to the result that `verdict` must
#: return. In all files of RULES, DENSIFY ops unpack the sparse weights.
RULES = {
    f"{kind}: {name}": (unpacked(network(*BODY, *before, *steps, *after)), verdict)
    for kind, cases, before, after in (
        ("middle", MIDDLES, (), (pointwise, mean)),
        ("end", ENDS, (pointwise,), ()),
    )
    for name, (steps, verdict) in cases.items()
}
RULES |= {
    f"entry: {name}": (unpacked(network(functools.partial(entry, **changes), *CUT_BODY)), "off")
    for name, changes in ENTRIES.items()
}
FILES = WRITTEN | {name: content for name, (content, _) in RULES.items()}


@pytest.fixture(scope="module", params=[no_avx, arm64], ids=["AVX hidden", "ARM emulated"])
def outputs(request, tmp_path_factory):
    """Return the outputs of each file on this CPU and on a second CPU, which has no AVX or is an
    emulated ARM CPU. On the second CPU, each file runs once with each op resolver."""
    cpu = request.param
    if cpu.obstacle():
        pytest.skip(cpu.obstacle())
    folder = tmp_path_factory.mktemp("sparse_kernels")
    names = {name: str(place) for place, name in enumerate(FILES)}
    expected = {}
    for name, content in FILES.items():
        tensor = read(content).subgraphs[0].tensors[0]
        x = np.random.default_rng(0).standard_normal(tensor.shape).astype(np.float32)
        if tensor.type == schema.TensorType.INT8:
            x = (40 * x).clip(-127, 127).astype(np.int8)
        (folder / f"{names[name]}.tflite").write_bytes(content)
        np.save(folder / f"{names[name]}.npy", x)
        expected[name] = run(content, x, BUILTIN)
    cpu.run(RUN, folder)
    return {
        name: (expected[name], *(np.load(folder / f"{names[name]}.{r}.npy") for r in RESOLVERS))
        for name in FILES
    }


def error(found, expected):
    if found.shape != expected.shape:
        return np.inf
    return np.abs(found - expected).max() / np.abs(expected).max()


@heavy
@pytest.mark.parametrize("name", WRITTEN)
def test_exported_files_agree_on_all_cpus(outputs, name):
    expected, *found = outputs[name]
    assert {values.shape for values in found} == {expected.shape}
    integers = expected.dtype == np.int8
    # Two CPUs may round differently, because XNNPACK has different code for each CPU.
    allowed = 1 if integers else 1e-4 * np.abs(expected).max()
    for values in found:
        np.testing.assert_allclose(values.astype(float), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize(
    ("name", "verdict"), [(name, verdict) for name, (_, verdict) in RULES.items()]
)
def test_verdicts_agree_with_the_runtime(outputs, name, verdict):
    """Check that LiteRT computes wrong outputs if and only if the verdict is "wrong"."""
    expected, delegated, builtin = outputs[name]
    assert error(builtin, expected) < 1e-4
    assert (verdict == "wrong") == (not error(delegated, expected) < 1e-4)


def test_an_unsafe_network_is_exported_without_densify():
    assert UNSAFE in {choice.reason for choice in select_formats(CUT, ARM).choices}
