"""Times `.tflite` files in the LiteRT interpreter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from keras_dst.export.decode import load
from keras_dst.export.report import as_table


@dataclass(frozen=True)
class Timing:
    """How fast one file is.

    ``latency`` is the median of one inference and ``spread`` its interquartile range, ``load`` the
    time to make the interpreter and allocate its tensors, all in seconds; ``ratio`` is the latency
    as a fraction of the first file's.
    """

    name: str
    bytes: int
    load: float
    latency: float
    spread: float
    ratio: float


@dataclass(frozen=True)
class BenchReport:
    """What `bench` measured. `str()` is a table."""

    threads: int
    runs: int
    files: list[Timing]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (
                file.name,
                f"{file.bytes:,}",
                f"{1e3 * file.load:.3g}",
                f"{1e3 * file.latency:.3g}",
                f"{1e3 * file.spread:.2g}",
                f"{file.ratio:.2f}",
            )
            for file in self.files
        ]
        headings = ("file", "bytes >", "load, ms >", "latency, ms >", "spread, ms >", "ratio >")
        total = f"{self.runs} runs of each file in turn, {self.threads} thread(s)"
        return f"{as_table(headings, rows)}\n{total}"


def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    threads: int = 1,
    warmup: int = 10,
    runs: int = 100,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> BenchReport:
    """Times ``.tflite`` files against each other, on random inputs, in this process.

    The files take turns at every run, so that a machine whose speed drifts slows all of them
    alike. Each is run at the batch size that it was saved with; an open one counts as 1.

    Args:
        paths: the files; the first is what the others are compared with.
        threads: threads of the interpreter.
        warmup: runs of each file that are not counted.
        runs: runs of each file that are.
        seed: of the inputs: uniform between 0 and 1, and zeros for integers.
        progress: called with the number of runs done so far.

    Returns:
        A `BenchReport`.

    Raises:
        ValueError: no path, a number below 1 (0 for ``warmup``), or a file that is no ``.tflite``
            file.
        RuntimeError: what the interpreter says when it refuses a file.
        OSError: a path that cannot be read.

    Example:
        >>> print(bench(["dense.tflite", "sparse.tflite"]))
    """
    if not paths or min(threads, runs) < 1 or warmup < 0:
        raise ValueError(
            "Expected one path or more, 1 thread and 1 run or more, and no negative warmup. "
            f"Received: {len(paths)} path(s), threads={threads}, runs={runs}, warmup={warmup}."
        )
    contents = [load(path) for path in paths]
    _loaded(contents[0], threads)  # the first one of a process also sets up the runtime
    loads, interpreters = zip(*(_loaded(content, threads) for content in contents))
    for interpreter in interpreters:
        _feed(interpreter, seed)
    times = np.zeros((warmup + runs, len(paths)))
    for run in range(warmup + runs):
        for place, interpreter in enumerate(interpreters):
            begin = time.perf_counter()
            interpreter.invoke()
            times[run, place] = time.perf_counter() - begin
        progress(run + 1)
    low, middle, high = np.percentile(times[warmup:], [25, 50, 75], axis=0)
    files = [
        Timing(
            name=Path(path).name,
            bytes=len(contents[place]),
            load=loads[place],
            latency=float(middle[place]),
            spread=float(high[place] - low[place]),
            ratio=float(middle[place] / middle[0]),
        )
        for place, path in enumerate(paths)
    ]
    return BenchReport(threads, runs, files)


def latencies(
    contents: Sequence[bytes], rounds: int = 30, seconds: float = 0.02, threads: int = 1
) -> list[float]:
    """Median seconds of one inference of every file, at the batch size the file was saved with.

    The files take turns, so that a machine whose speed drifts slows all of them alike; an open
    batch size counts as 1.

    Args:
        contents: the files.
        rounds: how often every file has its turn.
        seconds: length of a turn.
        threads: threads of the interpreter.

    Example:
        >>> dense, sparse = latencies([dense_bytes, sparse_bytes])
    """
    interpreters = [_loaded(content, threads)[1] for content in contents]
    for interpreter in interpreters:
        _feed(interpreter, seed=0)
        interpreter.invoke()
    times: list[list[float]] = [[] for _ in contents]
    for _ in range(rounds):
        for interpreter, found in zip(interpreters, times):
            begin = now = time.perf_counter()
            runs = 0
            while now - begin < seconds:
                interpreter.invoke()
                runs += 1
                now = time.perf_counter()
            found.append((now - begin) / runs)
    return [float(np.median(found)) for found in times]


def _loaded(content: bytes, threads: int) -> tuple[float, Interpreter]:
    """The seconds that loading a file took, and its interpreter."""
    begin = time.perf_counter()
    interpreter = Interpreter(model_content=content, num_threads=threads)
    interpreter.allocate_tensors()
    return time.perf_counter() - begin, interpreter


def _feed(interpreter: Interpreter, seed: int) -> None:
    random = np.random.default_rng(seed)
    for detail in interpreter.get_input_details():
        values = random.random(detail["shape"])
        interpreter.set_tensor(detail["index"], values.astype(detail["dtype"]))
