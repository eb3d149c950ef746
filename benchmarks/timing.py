"""Times that can be compared on a noisy machine: all candidates take turns."""

import statistics
import time
from collections.abc import Callable


def seconds(work: Callable) -> float:
    """How long a piece of work takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def cpu_seconds(work: Callable) -> float:
    """How much time of a processor a piece of work takes: on one core, whoever else is at it."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def steps_of_fit(model, x, y, batch_size: int, callbacks, now=time.perf_counter) -> float:
    """Seconds of the steps of a fit of one epoch but the first, and of callbacks between them.

    What a fit does once, at its beginning and end, is not in it; nor is the first step, which may
    have to fetch the memory that all of them use. `now` is the clock to read.
    """
    import keras

    class Clock(keras.callbacks.Callback):
        last = -(-len(x) // batch_size) - 1

        def on_train_batch_end(self, batch, logs=None):
            if batch in (0, self.last):
                float(logs["loss"])  # waits for the step, where the backend does not
            if batch == 0:
                self.begin = now()
            elif batch == self.last:
                self.seconds = now() - self.begin

    clock = Clock()
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[clock, *callbacks])
    return clock.seconds


def update_masks(driver, step: int) -> None:
    """Let a driver update its masks, and wait until it has, where the backend does not."""
    from keras import ops

    driver.advance(step)
    for state in driver.states:
        ops.convert_to_numpy(next(iter(state.values())))


def in_turns(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each piece of work returns, one after the other, so many times over."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(work())
    return times


def ratios(times: dict[str, list[float]], to: str) -> dict[str, float]:
    """The median over the rounds of each time by that of another piece of the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(found, times[to]))
        for name, found in times.items()
    }
