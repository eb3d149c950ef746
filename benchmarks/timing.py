"""Time functions alternately, so that other work on the machine affects all functions equally."""

import statistics
import time
from collections.abc import Callable


def seconds(function: Callable) -> float:
    """Call a function and return the wall-clock seconds that the call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def cpu_seconds(function: Callable) -> float:
    """Call a function and return the CPU seconds that the call takes."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def steps_of_fit(model, x, y, batch_size: int, callbacks, now=time.perf_counter) -> float:
    """Run `fit` for one epoch, and return the seconds of all training steps except the first.

    The time before the first step and after the last step is not counted. The first step is left
    out because the first step may allocate memory for all steps. `now` is the function that reads
    the clock, such as `time.perf_counter`.
    """
    import keras

    class Clock(keras.callbacks.Callback):
        last = -(-len(x) // batch_size) - 1

        def on_train_batch_end(self, batch, logs=None):
            if batch in (0, self.last):
                float(logs["loss"])  # Wait until the step has finished.
            if batch == 0:
                self.begin = now()
            elif batch == self.last:
                self.seconds = now() - self.begin

    clock = Clock()
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[clock, *callbacks])
    return clock.seconds


def update_masks(driver, step: int) -> None:
    """Let a driver update its masks, and wait until the backend has finished the update."""
    from keras import ops

    driver.advance(step)
    for state in driver.states:
        # To wait for the update, copy one entry of the mask to the CPU. On a GPU, a copy of the
        # whole mask would take longer than the update.
        value = ops.convert_to_tensor(next(iter(state.values())))
        ops.convert_to_numpy(ops.reshape(value, (-1,))[:1])


def in_turns(functions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each function once per round.

    Return a dict from the name of each function to the list of its results.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(function())
    return times


def ratios(times: dict[str, list[float]], to: str) -> dict[str, float]:
    """Return the median ratio of each function over all rounds.

    A ratio is the time of a function divided by the time of the function `to` in the same round.
    """
    return {
        name: statistics.median(a / b for a, b in zip(found, times[to]))
        for name, found in times.items()
    }
