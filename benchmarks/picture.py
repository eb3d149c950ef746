"""The picture in README.md, docs/images/methods.svg, of the JSON files in results/.

python -m benchmarks.picture
"""

import collections
import json
import pathlib
import statistics

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.common import RESULTS

PATH = pathlib.Path(__file__).parent.parent / "docs" / "images" / "methods.svg"
TASK = "mnist"
MARKERS = {0.9: "o", 0.98: "D"}


def runs() -> list[dict]:
    """Every run on this task at one of these targets, and those of the dense net."""
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"methods_{TASK}_*.json"))]
    return [run for run in found if run["method"] == "dense" or run["target"] in MARKERS]


def figures() -> dict[str, dict[str, list[float]]]:
    """Test errors in % of every run: by method and target, in the order of the mean errors."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in runs():
        error = round(100 * (1 - run["test_accuracy"]), 2)
        found[run["method"]][str(run["target"])].append(error)
    hardest = str(max(MARKERS))
    order = sorted(found, key=lambda name: statistics.mean(found[name].get(hardest, [0])))
    return {name: dict(sorted(found[name].items())) for name in order}


def draw(path: pathlib.Path) -> None:
    """Every run is a dot, so that nothing hides behind a mean; the data are in the description."""
    found = figures()
    net, epochs = runs()[0]["net"], runs()[0]["epochs"]
    dense = [error for errors in found.pop("dense").values() for error in errors]
    with mpl.rc_context({"svg.hashsalt": "methods", "svg.fonttype": "none", "font.size": 9}):
        figure = plt.figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        for place, errors in enumerate(found.values()):
            for (target, marker), colour in zip(MARKERS.items(), ("tab:blue", "tab:red")):
                values = errors[str(target)]
                label = f"{target:.0%} of the weights zero" if place == 0 else None
                style = {"marker": marker, "color": colour, "alpha": 0.6, "linewidths": 0}
                axes.scatter(values, [place] * len(values), label=label, **style)
        axes.axvline(statistics.mean(dense), color="grey", linestyle="--", label="dense net")
        axes.set_yticks(range(len(found)), found)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100 %"])
        axes.minorticks_off()
        axes.set_xlabel("test error, logarithmic; left is better")
        axes.set_title(f"{net}, {epochs} epochs, {len(dense)} seeds, no method tuned", loc="left")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="upper right")
        found["dense"] = {"": dense}
        text = json.dumps(found)
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": text})
        plt.close(figure)


if __name__ == "__main__":
    draw(PATH)
    print(f"wrote {PATH.relative_to(PATH.parents[2])}")
