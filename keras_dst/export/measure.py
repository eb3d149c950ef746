"""Times `.tflite` files in the LiteRT interpreter."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from ai_edge_litert.interpreter import Interpreter


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
    interpreters = [_ready(content, threads) for content in contents]
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


def _ready(content: bytes, threads: int) -> Interpreter:
    interpreter = Interpreter(model_content=content, num_threads=threads)
    interpreter.allocate_tensors()
    random = np.random.default_rng(0)
    for detail in interpreter.get_input_details():
        values = random.random(detail["shape"])
        interpreter.set_tensor(detail["index"], values.astype(detail["dtype"]))
    interpreter.invoke()
    return interpreter
