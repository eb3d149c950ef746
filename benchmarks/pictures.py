"""Draw the pictures in README.md and docs/benchmarks.md from the runs in results/.

python -m benchmarks.pictures

For each picture, `PICTURES` lists a function that returns the data and a function that draws the
data. The data are also stored in the description inside the SVG file.
"""

import collections
import json
import pathlib
import statistics

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks import results
from benchmarks.files.tflite_grid import NETS, PATTERNS, SPARSITIES, TITLES
from benchmarks.training_cost.scaling import SECTIONS, SIZES

IMAGES = results.ROOT / "docs" / "images"
TASK = "mnist"
MARKERS = {0.9: "o", 0.98: "D"}


def draw(name: str, path: pathlib.Path) -> None:
    """Draw the picture of the given name. Store the plotted data in the description of the SVG."""
    data, onto, size = PICTURES[name]
    shown = data()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        figure = plt.figure(figsize=size, layout="constrained")
        onto(figure, shown)
        text = json.dumps(shown)
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": text})
        plt.close(figure)


# -- Test errors of all methods --------------------------------------------------------------------


def errors() -> dict:
    """Return a dict with the network, the number of epochs, and the test errors of all runs in
    percent.

    In the entry `"sparse"`, `["sparse"][method][target]` is the list of the test errors of all
    seeds. The methods are sorted by their mean error at the highest target sparsity.
    """
    stored = results.runs("methods")
    runs = [run for name, run in stored.items() if name.startswith(f"{TASK}_")]
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in runs:
        if run["method"] == "dense" or run["target"] in MARKERS:
            error = round(100 * (1 - run["test_accuracy"]), 2)
            found[run["method"]][str(run["target"])].append(error)
    hardest = str(max(MARKERS))
    order = sorted(found, key=lambda name: statistics.mean(found[name].get(hardest, [0])))
    sparse = {name: dict(sorted(found[name].items())) for name in order if name != "dense"}
    (dense,) = found["dense"].values()
    told = {"net": runs[0]["net"], "epochs": runs[0]["epochs"]}
    return told | {"dense": dense, "sparse": sparse}


def draw_errors(figure, shown) -> None:
    """Draw one dot per training run."""
    axes = figure.subplots()
    for place, of_method in enumerate(shown["sparse"].values()):
        for (target, marker), color in zip(MARKERS.items(), ("tab:blue", "tab:red")):
            values = of_method[str(target)]
            label = f"{target:.0%} of the weights zero" if place == 0 else None
            style = {"marker": marker, "color": color, "alpha": 0.6, "linewidths": 0}
            axes.scatter(values, [place] * len(values), label=label, **style)
    dense = shown["dense"]
    axes.axvline(statistics.mean(dense), color="grey", linestyle="--", label="dense network")
    axes.set_yticks(range(len(shown["sparse"])), shown["sparse"])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100 %"])
    axes.minorticks_off()
    axes.set_xlabel("test error, logarithmic; left is better")
    title = f"{shown['net']}, {shown['epochs']} epochs, {len(dense)} seeds,\nno method tuned"
    axes.set_title(title, loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper right", fontsize="small")


# -- Step time by network size ---------------------------------------------------------------------


def step_time_ratios() -> dict:
    """Return the relative step times of each method on JAX, from the runs of `scaling`."""
    axes = results.runs("scaling")["jax"]["axes"]
    return {
        axis: {
            "sizes": [row[SIZES[axis]] for row in rows],
            "ratios": {
                name: [round(row["ratio_to_plain"][name], 3) for row in rows]
                for name in rows[0]["ratio_to_plain"]
            },
        }
        for axis, rows in axes.items()
    }


def draw_step_time_ratios(figure, shown) -> None:
    every = figure.subplots(len(shown), sharey=True)
    for axes, (axis, found) in zip(every, shown.items()):
        for name, ratios in found["ratios"].items():
            axes.plot(found["sizes"], ratios, marker=".", label=name)
        axes.axhline(1, color="grey", linestyle="--")
        axes.set_xscale("log")
        axes.set_xlabel(SECTIONS[axis].lower())
        axes.grid(alpha=0.3)
    figure.supylabel("time of a step, dense network = 1")
    figure.legend(*every[0].get_legend_handles_labels(), ncols=3, loc="outside upper center")


# -- Latency of exported files ---------------------------------------------------------------------

KINDS = {"AVX": ("sparse", "latency"), "no AVX": ("arm", "latency_no_avx")}


def files() -> dict:
    """Return the latency ratio of each file to the dense float32 file, by network and pattern."""
    found = {}
    for net in NETS:
        cells = results.runs("tflite_grid")[net]["cells"]
        of = {(p, s): cells[f"{p}, {s:.0%}"]["files"] for p in PATTERNS for s in SPARSITIES}
        found[net] = {
            pattern: {
                cpu: [
                    round(of[pattern, s][file][key] / of[pattern, s]["float32"][key], 3)
                    for s in SPARSITIES
                ]
                for cpu, (file, key) in KINDS.items()
            }
            for pattern in PATTERNS
        }
    return found


def draw_files(figure, shown) -> None:
    every = figure.subplots(2, len(shown) // 2, sharex=True, sharey=True)
    places = range(len(SPARSITIES))
    for axes, (net, found) in zip(every.flat, shown.items()):
        for number, (pattern, latencies) in enumerate(found.items()):
            for (cpu, values), line in zip(latencies.items(), ("-", ":")):
                style = {"color": f"C{number}", "linestyle": line, "marker": "."}
                axes.plot(places, values, label=f"{pattern}, {cpu}", **style)
        axes.axhline(1, color="grey", linestyle="--")
        axes.set_yscale("log")
        axes.set_xticks(places, [f"{s:.0%}" for s in SPARSITIES])
        axes.set_title(TITLES[net])
        axes.grid(alpha=0.3)
    figure.supxlabel("sparsity")
    figure.supylabel("latency, dense float32 file = 1")
    lines = every[0, 0].get_legend_handles_labels()
    figure.legend(*lines, ncols=3, loc="outside upper center", fontsize="small")


PICTURES = {
    "methods": (errors, draw_errors, (5.2, 3.8)),
    "growth": (step_time_ratios, draw_step_time_ratios, (5.2, 6.6)),
    "files": (files, draw_files, (5.2, 5.2)),
}

if __name__ == "__main__":
    for name in PICTURES:
        draw(name, IMAGES / f"{name}.svg")
        print(f"wrote docs/images/{name}.svg")
