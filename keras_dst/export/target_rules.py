"""Rules of `lint` for files that run on microcontrollers or NPUs."""

from __future__ import annotations

from collections.abc import Iterator

from keras_dst.export.decode import type_name
from keras_dst.export.ethos import compile_for_npu
from keras_dst.export.findings import Finding, LintReport
from keras_dst.export.flatbuffer import indices, op_name, read, text
from keras_dst.export.micro import DECODE, unsupported_ops
from keras_dst.export.report import ExportError

_FLOATS = ("float16", "float32", "float64")


def check_for_target(name: str, content: bytes, target: str) -> LintReport:
    """Check a ``.tflite`` file for TFLM or for an Ethos-U NPU, and return the `lint` report.

    Raises:
        ImportError: If the target is an NPU, and Vela is not installed.
    """
    model = read(content)
    fix = f"Export the Keras model with target={target!r}."
    found = [finding for graph in model.subgraphs for finding in _sparse(graph, fix)]
    found += [finding for graph in model.subgraphs for finding in _floats(model, graph, target)]
    found += _missing_in_tflm(model) if target == "micro" else _on_cpu(model, content, target)
    ordered = sorted(found, key=lambda finding: finding.level != "error")
    return LintReport(name, False, "", ordered, target)


def _sparse(graph, fix: str) -> Iterator[Finding]:
    for tensor in graph.tensors:
        if tensor.sparsity is not None:
            found = (
                "is a sparse constant. The runtime refuses the file, or it reads the values as a "
                "dense constant and computes wrong results"
            )
            yield Finding("error", "sparse-constant", repr(text(tensor.name)), found, fix)


def _floats(model, graph, target: str) -> Iterator[Finding]:
    for op in graph.operators:
        tensors = [graph.tensors[i] for i in (*indices(op.inputs), *indices(op.outputs))]
        if any(type_name(tensor) in _FLOATS for tensor in tensors):
            name, output = op_name(model, op), graph.tensors[op.outputs[0]]
            effect = "takes more memory and time" if target == "micro" else "runs on the CPU"
            yield Finding(
                "advice",
                "float-op",
                f"{name} {text(output.name)!r}",
                f"computes with floats, so it {effect}",
                "Quantize all values: export with quantize='full' and representative samples.",
            )


def _missing_in_tflm(model) -> Iterator[Finding]:
    for name, output, _ in unsupported_ops(model):
        fix = "Replace the layer from which the op comes."
        if name == "DENSIFY":
            fix = "Export the Keras model with target='micro'."
        found = "is an op that TFLM lacks, so TFLM refuses the file"
        yield Finding("error", "missing-op", f"{name} {output!r}", found, fix)


def _on_cpu(model, content: bytes, target: str) -> Iterator[Finding]:
    if any(text(code.customCode) == DECODE for code in model.operatorCodes):
        found = "holds weights without zeros for TFLM, which Vela cannot compile"
        fix = f"Export the Keras model with target={target!r}."
        yield Finding("error", "decode", "the file", found, fix)
        return
    try:
        ops = compile_for_npu(content, target)[1].cpu_ops
    except ExportError as error:
        yield Finding("error", "vela", "the file", str(error), "Replace these layers.")
        return
    for op in ops:
        found = f"runs on the CPU instead of the NPU. {op.reason}".rstrip(". ")
        fix = "Replace the layer from which the op comes by layers that the NPU runs."
        yield Finding("advice", "cpu-op", f"{op.op} {op.tensor!r}", found, fix)
