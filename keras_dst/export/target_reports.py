"""Sections of the export report that are specific to NPUs and microcontrollers."""

from __future__ import annotations

from dataclasses import dataclass

from keras_dst._reporting.tables import as_paragraph, as_table

#: NPU configurations that Vela 5.2 supports. The number at the end of a configuration's name is the
#: number of multiply-accumulates per cycle.
ACCELERATORS = (
    *("ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256"),
    *("ethos-u65-512", "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024"),
    "ethos-u85-2048",
)


@dataclass(frozen=True)
class VelaEstimate:
    """Vela's estimates for one inference of one file.

    Attributes:
        weight_bytes: Number of bytes of all weights after Vela has compressed them.
        npu_cycles: Number of cycles during which the NPU computes.
        memory_cycles: Dict that maps the name of each memory to the number of cycles during which
            the memory is accessed. These cycles overlap with the cycles during which the NPU
            computes.
        cycles: Number of cycles of the whole inference.
        seconds: Time of the whole inference at the default clock rate of the NPU.
    """

    weight_bytes: int
    npu_cycles: int
    memory_cycles: dict[str, int]
    cycles: int
    seconds: float


@dataclass(frozen=True)
class CPUOp:
    """Op that Vela leaves to the CPU.

    Attributes:
        op: Builtin name of the op.
        tensor: Name of the first output of the op.
        reason: The reason that Vela prints, or an empty string if Vela prints no reason.
    """

    op: str
    tensor: str
    reason: str


@dataclass(frozen=True)
class VelaReport:
    """Vela's estimates for the exported file, and for a dense file of the same network.

    The estimates come from Vela's model of the hardware, not from measurements on hardware.

    The dense file has the same ops as the exported file, but its weights are normally distributed
    random values without zeros. Vela compresses random weights a few percent better than the
    trained weights of a dense network.

    Attributes:
        accelerator: Configuration of the NPU, such as ``"ethos-u55-128"``.
        system: Name of the system configuration, which sets clock rate and memory bandwidths. The
            system configuration is Vela's default.
        memory_mode: Name of the memory mode, which selects the memories for weights and
            activations. The memory mode is Vela's default.
        version: Version of Vela.
        file: Estimates for one inference of the exported file.
        dense: Estimates for one inference of the dense file.
        ops: Number of all ops in the file.
        cpu_ops: Ops that run on the CPU instead of the NPU.
    """

    accelerator: str
    system: str
    memory_mode: str
    version: str
    file: VelaEstimate
    dense: VelaEstimate
    ops: int
    cpu_ops: list[CPUOp]

    def __str__(self) -> str:
        file, dense = self.file, self.dense
        rows = [
            ("encoded weights, bytes", *_compared(file.weight_bytes, dense.weight_bytes)),
            ("cycles of the NPU", *_compared(file.npu_cycles, dense.npu_cycles)),
            *(
                (f"cycles of {name}", *_compared(file.memory_cycles.get(name, 0), cycles))
                for name, cycles in dense.memory_cycles.items()
            ),
            ("cycles of an inference", *_compared(file.cycles, dense.cycles)),
            ("microseconds", *_compared(1e6 * file.seconds, 1e6 * dense.seconds)),
        ]
        table = as_table(("estimate of Vela", "this file >", "dense >", "ratio >"), rows)
        on_npu = self.ops - len(self.cpu_ops)
        lines = [
            table,
            as_paragraph(
                f"Estimates by Vela {self.version} for {self.accelerator} ({self.system}, "
                f"{self.memory_mode}), not measurements on hardware."
            ),
            "The dense file has the same ops, with normally distributed weights without zeros.",
            f"{on_npu} of {self.ops} ops run on the NPU.",
            *(as_paragraph(f"On the CPU: {o.op} {o.tensor}. {o.reason}", 2) for o in self.cpu_ops),
        ]
        return "\n".join(lines)


def _compared(value: float, dense: float) -> tuple[str, str, str]:
    ratio = f"{value / dense:.3f}" if dense else ""
    return f"{value:,.0f}", f"{dense:,.0f}", ratio


@dataclass(frozen=True)
class MicroReport:
    """Comparison of an exported file for microcontrollers with the dense int8 file of the model.

    TFLM ran both files.

    Attributes:
        bytes: Size of the file.
        dense_bytes: Size of the dense int8 file. Both files compute bit-identical outputs.
        unread_bytes: Number of bytes that the dense int8 file contains, but TFLM does not need. The
            exported file omits metadata, scales of biases, repeated zero points and copies of equal
            values. If several ops were merged into one op, the exported file keeps only the name of
            the first op.
        dense_gzip_bytes: Size of the dense int8 file after compression with gzip.
        arena: Number of bytes of the memory arena that the exported file needs.
        dense_arena: Number of bytes of the memory arena that the dense int8 file needs.
        samples: Number of samples on which the outputs were compared.
    """

    bytes: int
    dense_bytes: int
    unread_bytes: int
    dense_gzip_bytes: int
    arena: int
    dense_arena: int
    samples: int

    def __str__(self) -> str:
        rows = [
            ("bytes", f"{self.bytes:,}", f"{self.dense_bytes:,}"),
            ("bytes after gzip", "", f"{self.dense_gzip_bytes:,}"),
            ("arena, bytes", f"{self.arena:,}", f"{self.dense_arena:,}"),
        ]
        table = as_table(("in TFLM", "this file >", "dense int8 >"), rows)
        saved = self.dense_bytes - self.bytes
        return f"{table}\n" + as_paragraph(
            f"The outputs of both files are equal on {self.samples} samples. The size of "
            f"the file is {self.bytes / self.dense_bytes:.2f}x of dense int8, and the file is not "
            f"faster. Of the {saved:,} saved bytes, {self.unread_bytes:,} are parts that TFLM "
            "does not need, such as metadata and repeated zero points."
        )
