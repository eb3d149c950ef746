"""Compile int8 files for Arm Ethos-U NPUs with Vela, and read Vela's estimates.

Vela (PyPI ``ethos-u-vela``) is Arm's compiler for Ethos-U NPUs. Vela compresses the weights of a
dense int8 file. The more zeros a weight has, the fewer bytes it takes after compression. Vela also
estimates the number of cycles with a model of the hardware.
"""

from __future__ import annotations

import csv
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from keras_dst.export.decode import load
from keras_dst.export.encode import scale_axis, weights
from keras_dst.export.flatbuffer import op_name, read, text, write
from keras_dst.export.report import ExportError
from keras_dst.export.target_reports import ACCELERATORS, CPUOp, VelaEstimate, VelaReport

NEEDS_VELA = "Estimates for an Ethos-U NPU need Vela. Fix: pip install keras_dst[ethos]."
_SEED = 0


def vela_version() -> str | None:
    """Return the version of Vela, or None if Vela is not installed."""
    try:
        return importlib.metadata.version("ethos-u-vela")
    except importlib.metadata.PackageNotFoundError:
        return None


def compile_for_npu(content: bytes, accelerator: str) -> tuple[bytes, VelaReport]:
    """Compile a dense int8 file with Vela, and return the compiled file and Vela's estimates.

    Args:
        content: Bytes of the ``.tflite`` file.
        accelerator: NPU, one of `ACCELERATORS`. Vela uses its default settings for the NPU.

    Raises:
        ImportError: If Vela is not installed.
        ValueError: If the accelerator is unknown, or the file is damaged.
        ExportError: If Vela stops with an error.

    Example:
        >>> compiled, report = compile_for_npu(path.read_bytes(), "ethos-u85-256")
    """
    if accelerator not in ACCELERATORS:
        raise ValueError(
            f"Expected accelerator to be one of {', '.join(ACCELERATORS)}. Received: "
            f"{accelerator!r}"
        )
    version = vela_version()
    if version is None:
        raise ImportError(NEEDS_VELA)
    model = read(load(content))
    compiled, summary, log = _run_vela(content, accelerator)
    _, dense_summary, _ = _run_vela(with_dense_weights(content), accelerator)
    report = VelaReport(
        accelerator=accelerator,
        system=summary["system_config"],
        memory_mode=summary["memory_mode"],
        version=version,
        file=_estimate(summary),
        dense=_estimate(dense_summary),
        ops=sum(len(graph.operators) for graph in model.subgraphs),
        cpu_ops=_cpu_ops(compiled, _reasons(log)),
    )
    return compiled, report


def _run_vela(content: bytes, accelerator: str) -> tuple[bytes, dict[str, str], str]:
    """Run Vela. Return the compiled file, Vela's summary, and the text that Vela printed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.tflite").write_bytes(content)
        command = [sys.executable, "-m", "ethosu.vela", "model.tflite"]
        command += ["--accelerator-config", accelerator, "--output-dir", "."]
        # Use a separate process, because an error in the C++ code of Vela ends the process.
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        summaries = list(folder.glob("model_summary_*.csv"))
        if done.returncode or not summaries:
            lines = (done.stdout + done.stderr).strip().splitlines()
            reasons = [line for line in lines if "rror" in line] or lines[-1:]
            raise ExportError(
                f"Expected a file that Vela can compile for {accelerator}. Received: Vela stopped "
                f"with exit code {done.returncode}: {' '.join(reasons)} Fix: replace the layers "
                "from which the rejected ops come."
            )
        with summaries[0].open(newline="") as file:
            summary = next(csv.DictReader(file))
        return (folder / "model_vela.tflite").read_bytes(), summary, done.stdout


def _estimate(summary: dict[str, str]) -> VelaEstimate:
    memories = ("sram", "dram", "on_chip_flash", "off_chip_flash")
    accesses = {name: int(summary[f"cycles_{name}_access"]) for name in memories}
    return VelaEstimate(
        weight_bytes=int(summary["total_npu_encoded_weights"]),
        npu_cycles=int(summary["cycles_npu"]),
        memory_cycles={name.replace("_", " "): n for name, n in accesses.items() if n},
        cycles=int(summary["cycles_total"]),
        seconds=float(summary["inference_time"]),
    )


def _cpu_ops(compiled: bytes, reasons: dict[str, str]) -> list[CPUOp]:
    """Return the ops of a compiled file that run on the CPU instead of the NPU."""
    model, found = read(compiled), []
    for graph in model.subgraphs:
        for op in graph.operators:
            if text(model.operatorCodes[op.opcodeIndex].customCode) != "ethos-u":
                tensor = text(graph.tensors[op.outputs[0]].name)
                found.append(CPUOp(op_name(model, op), tensor, reasons.get(tensor, "")))
    return found


def _reasons(log: str) -> dict[str, str]:
    """Return a dict from an op's output name to Vela's reason for leaving the op to the CPU."""
    warnings = re.findall(r"operator: \w+, ofm: '(.*?)'\nReason: (.*?)\n\s*\n", log, re.DOTALL)
    return {tensor: " ".join(reason.split()) for tensor, reason in warnings}


def with_dense_weights(content: bytes) -> bytes:
    """Replace the int8 weights of a file by seeded random values without zeros.

    The random values are drawn from a normal distribution. The values of each channel are scaled so
    that the largest magnitude is 127, as in a quantized model.
    """
    model, rng = read(content), np.random.default_rng(_SEED)
    for weight in weights(model):
        if weight.values.dtype == np.int8:
            channel = scale_axis(weight)
            others = tuple(axis for axis in range(weight.values.ndim) if axis != channel)
            drawn = rng.normal(size=weight.values.shape)
            drawn = np.rint(127 * drawn / np.abs(drawn).max(axis=others, keepdims=True))
            drawn[drawn == 0] = 1
            model.buffers[weight.buffer].data = drawn.astype(np.int8).reshape(-1).view(np.uint8)
    return write(model)
