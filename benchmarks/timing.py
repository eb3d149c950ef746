"""Time several functions in turns, so that their times are comparable on a noisy machine."""

import statistics
import time
from collections.abc import Callable


def seconds(work: Callable) -> float:
    """Return the wall-clock seconds that a function takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def cpu_seconds(work: Callable) -> float:
    """Return the CPU seconds that a function takes."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def steps_of_fit(model, x, y, batch_size: int, callbacks, now=time.perf_counter) -> float:
    """Return the seconds of all steps except the first in a one-epoch fit, callbacks included.

    The start and the end of the fit are not counted. The first step is not counted either, because
    it may allocate the memory that all steps use. `now` is the clock to read.
    """
    import keras

    class Clock(keras.callbacks.Callback):
        last = -(-len(x) // batch_size) - 1

        def on_train_batch_end(self, batch, logs=None):
            if batch in (0, self.last):
                float(logs["loss"])  # waits until the step has run
            if batch == 0:
                self.begin = now()
            elif batch == self.last:
                self.seconds = now() - self.begin

    clock = Clock()
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[clock, *callbacks])
    return clock.seconds


def update_masks(driver, step: int) -> None:
    """Update the masks of a driver, and wait until the update is finished."""
    from keras import ops

    driver.advance(step)
    for state in driver.states:
        ops.convert_to_numpy(next(iter(state.values())))


def in_turns(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call the functions in turns; return the seconds that each function returns per round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(work())
    return times


def ratios(times: dict[str, list[float]], to: str) -> dict[str, float]:
    """Return the median, over the rounds, of the ratio to the function `to` in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(found, times[to]))
        for name, found in times.items()
    }
