"""Peak memory of one inference, in a Python of its own: ``python memory.py file threads batch``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory(content: bytes, *, threads: int = 1, batch: int = 1) -> int | None:
    """Bytes that loading a file and running it once adds to a process; None where unknown.

    Args:
        content: the file.
        threads: threads of the interpreter.
        batch: the batch size of a file that leaves it open.
    """
    if not _STATUS.exists():  # not Linux
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
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    interpreter = Interpreter(path, num_threads=int(threads))
    for detail in interpreter.get_input_details():
        sizes = [int(batch) if size == -1 else size for size in detail["shape_signature"]]
        interpreter.resize_tensor_input(detail["index"], sizes)
    interpreter.allocate_tensors()
    interpreter.invoke()
    print(1024 * max(kilobytes("VmHWM") - before, 0))


def kilobytes(name: str) -> int:
    """A figure of this process's memory, such as ``"VmRSS"``, as Linux counts it."""
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


if __name__ == "__main__":
    _main(*sys.argv[1:])
