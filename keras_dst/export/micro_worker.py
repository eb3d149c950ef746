"""Run a ``.tflite`` file in TensorFlow Lite for Microcontrollers, in a separate process.

If the interpreter does not support the file, the interpreter may end the whole process. The file
therefore runs in a separate process. The arguments of the script are the paths of the model, the
inputs and the outputs, and the size of the arena in bytes. The inputs are an ``.npz`` file with one
array per input, named ``input_0``, ``input_1`` and so on. In each array, `array[i]` is the input of
run i. The outputs are written to an ``.npz`` file with one array per output. The interpreter prints
its memory use to stderr.
"""

import sys

import numpy as np
from tflite_micro.python.tflite_micro.runtime import Interpreter


def main(path: str, inputs: str, outputs: str, arena: str) -> None:
    """Run the model on each row of the inputs, and save the outputs."""
    interpreter = Interpreter.from_file(path, arena_size=int(arena))
    with np.load(inputs) as loaded:
        arrays = [loaded[f"input_{place}"] for place in range(len(loaded.files) - 1)]
        count = int(loaded["outputs"])
    found = []
    for rows in zip(*arrays):
        for place, row in enumerate(rows):
            interpreter.set_input(row, place)
        interpreter.invoke()
        found.append([interpreter.get_output(place).copy() for place in range(count)])
    stacked = {f"output_{place}": np.stack(values) for place, values in enumerate(zip(*found))}
    np.savez(outputs, allow_pickle=False, **stacked)
    interpreter.print_allocations()


if __name__ == "__main__":
    main(*sys.argv[1:])
