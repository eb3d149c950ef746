"""Times that can be compared on a noisy machine: all candidates take turns."""

import statistics
import time


def seconds(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_turns(works: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, run one after the other, so many times over."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    return times


def ratios(times: dict[str, list[float]], to: str) -> dict[str, float]:
    """The median over the rounds of each time by that of another piece of the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(found, times[to]))
        for name, found in times.items()
    }
