"""Run Python as on a CPU without AVX. Without AVX, XNNPACK uses its sparse kernels, as on ARM.

LiteRT reads the features of the CPU with CPUID instructions. The program ``objdump`` finds the
addresses of these instructions in the libraries of LiteRT. This module sets a breakpoint at each
CPUID instruction, but only in the memory of the current process. At a breakpoint, a signal handler
in ``hide_avx.c`` reports the features of the CPU without AVX, FMA, F16C and later extensions.
"""

import ctypes
import functools
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

_SOURCE = pathlib.Path(__file__).with_name("hide_avx.c")


def obstacle():
    """Return why AVX cannot be hidden on this machine, or an empty string if hiding works."""
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        return f"hiding AVX needs Linux x86_64, this is {machine}"
    if not (shutil.which("cc") and shutil.which("objdump")):
        return "hiding AVX needs a C compiler, cc, and binutils' objdump"
    return ""


@functools.cache
def _library():
    path = pathlib.Path(tempfile.mkdtemp()) / "hide_avx.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(path)], check=True)
    return path


def hide(library):
    """Hide AVX from LiteRT in this process. Call this function before you create an interpreter."""
    # This import loads the libraries of LiteRT, in which the code below sets breakpoints.
    import ai_edge_litert.interpreter

    ours = str(pathlib.Path(ai_edge_litert.__file__).resolve().parent)
    loaded = {}
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        begin, path = line.partition("-")[0], line.split(maxsplit=5)[-1]
        if path.startswith(ours):
            loaded.setdefault(path, int(begin, 16))
    places = []
    for path, begin in loaded.items():
        code = subprocess.run(["objdump", "-d", path], check=True, capture_output=True, text=True)
        found = re.findall(r"^ *([0-9a-f]+):\t0f a2 +\tcpuid", code.stdout, re.MULTILINE)
        places += [begin + int(offset, 16) for offset in found]
    addresses = (ctypes.c_void_p * len(places))(*places)
    if not places or ctypes.CDLL(library).hide_avx(addresses, len(places)):
        raise RuntimeError(f"could not set breakpoints at {len(places)} addresses in {[*loaded]}")


def run(code, *arguments):
    """Run Python code in a process that detects no AVX. Raise RuntimeError if the code fails."""
    hidden = "import sys\nfrom tests import no_avx\nno_avx.hide(sys.argv.pop(1))\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + code, str(_library()), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
