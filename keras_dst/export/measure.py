"""Times `.tflite` files in the LiteRT interpreter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from keras_dst._reporting.tables import as_table
from keras_dst._utils.validation import check_integer
from keras_dst.export.decode import load

# How many turns `latencies` gives every file: at least so many, and then until so much time is up.
_LEAST_TURNS, _MOST_TURNS, _SECONDS = 15, 200, 0.3


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
    if not paths:
        raise ValueError("Expected at least one path. Received: an empty sequence.")
    for name, number, minimum in (
        ("threads", threads, 1),
        ("runs", runs, 1),
        ("warmup", warmup, 0),
        ("seed", seed, 0),
    ):
        check_integer(number, name, minimum)
    contents = [load(path) for path in paths]
    loads, interpreters = zip(*_loaded(contents, threads, batch=1, seed=seed))
    times = np.zeros((warmup + runs, len(paths)))
    for run, turn in zip(range(warmup + runs), _turns(interpreters)):
        times[run] = turn
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


def latencies(contents: Sequence[bytes], *, threads: int = 1, batch: int = 1) -> list[float]:
    """Median seconds of one inference of every file, in turns, as `bench` has them.

    Args:
        contents: the files.
        threads: threads of the interpreter.
        batch: the batch size of files that leave it open.

    Example:
        >>> dense, sparse = latencies([dense_bytes, sparse_bytes])
    """
    return loads_and_latencies(contents, threads=threads, batch=batch)[1]


def loads_and_latencies(
    contents: Sequence[bytes], *, threads: int = 1, batch: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds that loading each file took, and what `latencies` gives."""
    loads, interpreters = zip(*_loaded(contents, threads, batch))
    times: list[list[float]] = []
    begin = time.perf_counter()
    for turn in _turns(interpreters):
        times.append(turn)
        if len(times) >= _MOST_TURNS or (
            len(times) >= _LEAST_TURNS and time.perf_counter() - begin > _SECONDS
        ):
            break
    return list(loads), np.median(times, axis=0).tolist()


def _turns(interpreters: Sequence[Interpreter]) -> Iterator[list[float]]:
    """The seconds of one inference of every file, in turn, without end.

    Each file runs twice in its turn, the first time to bring its weights back into the caches.
    Inferences are timed one by one: the mean over a longer turn would hold whatever else the
    machine did meanwhile.
    """
    while True:
        times = []
        for interpreter in interpreters:
            interpreter.invoke()
            begin = time.perf_counter()
            interpreter.invoke()
            times.append(time.perf_counter() - begin)
        yield times


def _loaded(
    contents: Sequence[bytes], threads: int, batch: int = 1, seed: int = 0
) -> list[tuple[float, Interpreter]]:
    """The seconds that loading each file took, and its interpreter with its inputs set."""
    _load(contents[0], threads, batch)  # the first one of a process also sets up the runtime
    found = [_load(content, threads, batch) for content in contents]
    for _, interpreter in found:
        _feed(interpreter, seed)
    return found


def _load(content: bytes, threads: int, batch: int) -> tuple[float, Interpreter]:
    begin = time.perf_counter()
    interpreter = Interpreter(model_content=content, num_threads=threads)
    for detail in interpreter.get_input_details():
        sizes = [batch if size == -1 else size for size in detail["shape_signature"]]
        if list(detail["shape"]) != sizes:
            interpreter.resize_tensor_input(detail["index"], sizes)
    interpreter.allocate_tensors()
    return time.perf_counter() - begin, interpreter


def _feed(interpreter: Interpreter, seed: int) -> None:
    random = np.random.default_rng(seed)
    for detail in interpreter.get_input_details():
        values = random.random(detail["shape"])
        interpreter.set_tensor(detail["index"], values.astype(detail["dtype"]))
