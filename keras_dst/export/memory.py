"""Measure the peak memory of one inference in a separate Python process.

The command of the process is ``python memory.py FILE THREADS BATCH``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory(content: bytes, *, threads: int = 1, batch: int = 1) -> int | None:
    """Return by how many bytes a process's peak memory grows when it loads and runs a file once.

    Args:
        content: Bytes of the ``.tflite`` file.
        threads: Number of interpreter threads. Defaults to 1.
        batch: Batch size for files with a dynamic batch size. Defaults to 1.

    Returns:
        The number of bytes, or None if the operating system is not Linux or the file cannot be run.
    """
    if not _STATUS.exists():  # The system is not Linux.
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.tflite")
        path.write_bytes(content)
        command = [sys.executable, "-P", __file__, str(path), str(threads), str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode else int(done.stdout)


def _main(path: str, threads: str, batch: str) -> None:
    from ai_edge_litert.interpreter import Interpreter

    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak memory.
    interpreter = Interpreter(path, num_threads=int(threads))
    for detail in interpreter.get_input_details():
        sizes = [int(batch) if size == -1 else size for size in detail["shape_signature"]]
        interpreter.resize_tensor_input(detail["index"], sizes)
    interpreter.allocate_tensors()
    interpreter.invoke()
    print(1024 * max(kilobytes("VmHWM") - before, 0))


def kilobytes(name: str) -> int:
    """Return a field of the memory status of the process, such as ``"VmRSS"``, in kilobytes."""
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


if __name__ == "__main__":
    _main(*sys.argv[1:])
