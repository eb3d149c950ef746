"""Runs Python as on a CPU without AVX, on which XNNPACK takes its sparse kernels, as on ARM.

Intel CPUs can let CPUID trap, on Linux for one process. The handler in ``hide_avx.c`` then answers
with the bits of AVX, FMA, F16C and everything above cleared.
"""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

_SOURCE = pathlib.Path(__file__).with_name("hide_avx.c")


def obstacle():
    """Why AVX cannot be hidden on this machine; empty if it can."""
    cpu = pathlib.Path("/proc/cpuinfo")
    if not cpu.exists() or "cpuid_fault" not in cpu.read_text():
        return (
            "hiding AVX needs Linux on a CPU that can trap CPUID: no cpuid_fault in /proc/cpuinfo"
        )
    return "" if shutil.which("cc") else "hiding AVX needs a C compiler: there is no cc"


@functools.cache
def _library():
    path = pathlib.Path(tempfile.mkdtemp()) / "hide_avx.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(path)], check=True)
    return path


def run(code, *arguments):
    """Runs Python code in a process that sees no AVX; raises with its words where it fails."""
    hide = "import ctypes, sys; assert ctypes.CDLL(sys.argv.pop(1)).hide_avx() == 0\n"
    done = subprocess.run(
        [sys.executable, "-c", hide + code, str(_library()), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
