"""Measure the peak memory of one inference in a separate Python process.

The command of the process is ``python memory.py FILE THREADS BATCH SHAPES OPEN_SIZE``. ``SHAPES``
is a dict in JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def peak_memory(
    content: bytes,
    *,
    threads: int = 1,
    batch: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> int | None:
    """Return by how many bytes a process's peak memory grows when it loads and runs a file once.

    Args:
        content: Bytes of the ``.tflite`` file.
        threads: Number of interpreter threads. Defaults to 1.
        batch: Batch size for files with a dynamic batch size. Defaults to 1.
        shapes: Shapes of inputs with dynamic axes, see `resize_inputs`. Defaults to None: dynamic
            axes other than the batch axis have size 32.

    Returns:
        The number of bytes, or None if the operating system is not Linux or the file cannot be run.
    """
    # The new process runs this file as a script, and must not import keras_dst.
    from keras_dst._utils.open_sizes import OPEN_SIZE

    if not _STATUS.exists():  # The system is not Linux.
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.tflite")
        path.write_bytes(content)
        arguments = [str(path), str(threads), str(batch), json.dumps(shapes or {}), str(OPEN_SIZE)]
        command = [sys.executable, "-P", __file__, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode else int(done.stdout)


def resize_inputs(
    interpreter: Any, batch: int, shapes: Mapping[str, Sequence[int]], open_size: int
) -> None:
    """Choose sizes for the dynamic axes of all inputs of a file.

    Args:
        interpreter: Interpreter that has loaded the file.
        batch: Size of the first axis of an input, if this axis is dynamic.
        shapes: Dict that maps names of inputs to their shapes, which include the batch size. Names
            that the file lacks are ignored.
        open_size: Size of all dynamic axes after the first, in inputs that are not in ``shapes``.
    """
    named: dict[str, Any] = {}
    if shapes and interpreter.get_signature_list():
        named = interpreter.get_signature_runner().get_input_details()
    given = {detail["index"]: shapes[name] for name, detail in named.items() if name in shapes}
    for detail in interpreter.get_input_details():
        signature = detail["shape_signature"]
        sizes = given.get(detail["index"]) or concrete_sizes(signature, batch, open_size)
        if list(detail["shape"]) != list(sizes):
            interpreter.resize_tensor_input(detail["index"], sizes)


def concrete_sizes(signature: Sequence[int], batch: int, open_size: int) -> list[int]:
    """Return a size for each axis of a tensor whose dynamic axes have the size -1.

    A dynamic first axis gets the size ``batch``, and the other dynamic axes the size ``open_size``.
    """
    return [
        size if size != -1 else open_size if axis else batch for axis, size in enumerate(signature)
    ]


def _main(path: str, threads: str, batch: str, shapes: str, open_size: str) -> None:
    from ai_edge_litert.interpreter import Interpreter

    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak memory.
    interpreter = Interpreter(path, num_threads=int(threads))
    resize_inputs(interpreter, int(batch), json.loads(shapes), int(open_size))
    interpreter.allocate_tensors()
    interpreter.invoke()
    print(1024 * max(kilobytes("VmHWM") - before, 0))


def kilobytes(name: str) -> int:
    """Return a field of the memory status of the process, such as ``"VmRSS"``, in kilobytes."""
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


if __name__ == "__main__":
    _main(*sys.argv[1:])
