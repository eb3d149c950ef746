"""Measure the latency of ``.tflite`` files in the LiteRT interpreter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from keras_dst._reporting.tables import as_table
from keras_dst._utils.open_sizes import OPEN_SIZE
from keras_dst._utils.validation import check_integer
from keras_dst.export.decode import load
from keras_dst.export.memory import resize_inputs

# Minimum and maximum number of timing rounds in `latencies`, and time limit of all rounds in
# seconds.
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 15, 200, 0.3


@dataclass(frozen=True)
class Timing:
    """Latency of one file.

    Attributes:
        name: Name of the file.
        bytes: Size of the file.
        load: Seconds to load the file, which includes the allocation of all tensors.
        latency: Median seconds per inference.
        spread: Interquartile range of the seconds per inference.
        ratio: Latency of the file divided by the latency of the first file.
    """

    name: str
    bytes: int
    load: float
    latency: float
    spread: float
    ratio: float


@dataclass(frozen=True)
class BenchReport:
    """Measurements of `bench`. `str()` returns a table."""

    threads: int
    runs: int
    files: list[Timing]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict that can be written as JSON."""
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
        total = f"{self.runs} runs of each file, interleaved, {self.threads} thread(s)"
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
    """Compare the latencies of ``.tflite`` files on random inputs, in the current process.

    The files run in turns, so that a change in the speed of the machine affects all files equally.
    Files with a fixed batch size run with this batch size. Files with a dynamic batch size run with
    batch size 1. All other dynamic axes of inputs have size 32.

    Args:
        paths: Paths of the files. Latency ratios are relative to the first file.
        threads: Number of interpreter threads. Defaults to 1.
        warmup: Number of runs of each file before the timed runs. Defaults to 10.
        runs: Number of timed runs of each file. Defaults to 100.
        seed: Seed of the random inputs. Defaults to 0. Float inputs are uniform between 0 and 1,
            integer inputs are 0, and string inputs are empty.
        progress: Function that is called after each run with the number of finished runs.

    Returns:
        A `BenchReport`.

    Raises:
        ValueError: If ``paths`` is empty, a number is too small, or a file is not a ``.tflite``
            file.
        RuntimeError: If the interpreter refuses a file.
        OSError: If a path cannot be read.

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
    loads, interpreters = zip(*_load_all(contents, threads, batch=1, seed=seed))
    times = np.zeros((warmup + runs, len(paths)))
    for run, seconds in zip(range(warmup + runs), _rounds(interpreters)):
        times[run] = seconds
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
    files: Sequence[bytes],
    *,
    threads: int = 1,
    batch: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[float]:
    """Return the median seconds per inference of each file. The files take turns.

    Args:
        files: Contents of the files, each as bytes.
        threads: Number of threads of the interpreter. Defaults to 1.
        batch: Batch size for files with a dynamic batch size. Defaults to 1.
        shapes: Shapes of inputs with dynamic axes, as a dict that maps names of inputs to shapes.
            The shapes include the batch size. Defaults to None: dynamic axes other than the batch
            axis have size 32.

    Example:
        >>> dense, sparse = latencies([dense_bytes, sparse_bytes])
    """
    return loads_and_latencies(files, threads=threads, batch=batch, shapes=shapes)[1]


def loads_and_latencies(
    files: Sequence[bytes],
    *,
    threads: int = 1,
    batch: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> tuple[list[float], list[float]]:
    """Return the seconds to load each file, and the median seconds per inference of each file."""
    loads, interpreters = zip(*_load_all(files, threads, batch, shapes))
    times: list[list[float]] = []
    begin = time.perf_counter()
    for seconds in _rounds(interpreters):
        times.append(seconds)
        if len(times) >= _MAX_ROUNDS or (
            len(times) >= _MIN_ROUNDS and time.perf_counter() - begin > _SECONDS
        ):
            break
    return list(loads), np.median(times, axis=0).tolist()


def _rounds(interpreters: Sequence[Interpreter]) -> Iterator[list[float]]:
    """Run timing rounds without end.

    In each timing round, yield the list of the seconds per inference, with one entry per file.
    Each timing round runs every file twice, and times only the second run. The first run loads the
    weights into the CPU caches. A timed interval contains a single inference, because other work on
    the machine rarely disturbs such a short interval.
    """
    while True:
        times = []
        for interpreter in interpreters:
            interpreter.invoke()
            begin = time.perf_counter()
            interpreter.invoke()
            times.append(time.perf_counter() - begin)
        yield times


def _load_all(
    files: Sequence[bytes],
    threads: int,
    batch: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> list[tuple[float, Interpreter]]:
    """Return a pair for each file: the load time in seconds, and an interpreter that is ready to
    run."""
    # The first load is not timed, because it also initializes the runtime.
    _load(files[0], threads, batch, shapes or {})
    found = [_load(content, threads, batch, shapes or {}) for content in files]
    for _, interpreter in found:
        _feed(interpreter, seed)
    return found


def _load(
    content: bytes, threads: int, batch: int, shapes: Mapping[str, Sequence[int]]
) -> tuple[float, Interpreter]:
    begin = time.perf_counter()
    interpreter = Interpreter(model_content=content, num_threads=threads)
    resize_inputs(interpreter, batch, shapes, OPEN_SIZE)
    interpreter.allocate_tensors()
    return time.perf_counter() - begin, interpreter


def _feed(interpreter: Interpreter, seed: int) -> None:
    random = np.random.default_rng(seed)
    for detail in interpreter.get_input_details():
        if detail["dtype"] in (np.bytes_, np.str_, object):
            values = np.full(detail["shape"], b"", object)
        else:
            values = random.random(detail["shape"]).astype(detail["dtype"])
        interpreter.set_tensor(detail["index"], values)
