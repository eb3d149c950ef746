"""Tests that the recommended methods and the quoted figures agree with the runs in results/."""

import json
import re
import statistics
from collections import defaultdict

import numpy as np
import pytest

import keras_dst
import keras_dst_cli as cli
from benchmarks import results
from benchmarks.files import micro
from keras_dst.recommendation import FIGURES, TARGETS, Figure, recommend
from tests.backends import once
from tests.pages import PAGES, ROOT

pytestmark = once


def runs_of(folder):
    lines = (ROOT / "results" / folder / "runs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def figure(accuracies, pattern, sparsity, epochs, net, dense, source):
    """Return the accuracy and the settings of the most accurate method.

    If the mean accuracy of Magnitude is lower by at most the sum of the standard deviations of both
    methods, return the accuracy of Magnitude instead.
    """

    def deviation(name):
        return statistics.stdev(accuracies[name]) if len(accuracies[name]) > 1 else 0

    means = {name: statistics.mean(values) for name, values in accuracies.items()}
    best = max(means, key=means.get)
    if means[best] - means["Magnitude"] <= deviation(best) + deviation("Magnitude"):
        best = "Magnitude"
    return Figure(
        *(best.replace("-", ""), pattern, sparsity, epochs, net, round(means[best], 2)),
        *(round(means["Magnitude"], 2), round(statistics.mean(dense), 2) if dense else None),
        *(len(means), len(accuracies[best]), source),
    )


def measured_figures():
    found = {}
    for source in ("papers", "methods", "patterns"):
        groups, dense = defaultdict(lambda: defaultdict(list)), defaultdict(list)
        for run in runs_of(source):
            accuracy = 100 * run["test_accuracy"]
            if run["method"] == "dense":
                dense[run["net"], run["epochs"]].append(accuracy)
            elif run["method"] != "random":
                pattern = run.get("pattern", "unstructured")
                key = (run["net"], run["epochs"], pattern, run["target"])
                groups[key][run["method"]].append(accuracy)
        for (net, epochs, pattern, sparsity), accuracies in groups.items():
            if len(accuracies) > 1:
                name = net if "," in net else f"{net}, CIFAR-10"
                values = (pattern, sparsity, epochs, name, dense[net, epochs], source)
                found.setdefault((pattern, epochs, sparsity), figure(accuracies, *values))
    return found


def of_micro(variant):
    return results.runs("micro")[f"resnet_{variant}"]


def test_figures_agree_with_results():
    sparse, dense = of_micro("2:4"), of_micro("dense")
    expected = measured_figures()
    accuracies = {"Magnitude": [100 * sparse["float_accuracy"]]}
    name = micro.NETS["resnet"].title
    values = ("2:4", 0.5, sparse["epochs"], name, [100 * dense["float_accuracy"]], "micro")
    expected["2:4"] = figure(accuracies, *values)
    assert set(FIGURES) == set(expected.values())
    assert len({(row.pattern, row.epochs, row.sparsity) for row in FIGURES}) == len(FIGURES)


def test_figures_of_targets_agree_with_results():
    labels = {f"ethos-{label.lower()}": label for label in ("U55-128", "U65-256", "U85-256")}
    assert set(TARGETS) == {"micro", *labels}
    for target, variants in TARGETS.items():
        label = labels.get(target)
        names = (f"{label} weights", f"{label} cycles") if label else ("TFLM file", "TFLM arena")
        ratios_of = micro.npu_ratios if label else micro.file_ratios
        for variant, found in variants.items():
            ratios = ratios_of(of_micro(variant), of_micro("dense"))
            assert found == tuple(round(ratios[name], 3) for name in names)


@pytest.mark.parametrize("row", FIGURES, ids=lambda row: f"{row.pattern} {row.epochs}")
def test_a_measured_request_returns_its_figure_and_an_existing_method(row):
    found = recommend(row.sparsity, row.epochs, row.pattern)
    assert found.figure == row
    assert not any("nearest" in note for note in found.notes)
    method = eval(found.method, vars(keras_dst.methods))
    assert method.sparsity == row.sparsity
    assert type(method).__name__ == row.method


@pytest.mark.parametrize(
    ("request_", "epochs", "sparsity", "note"),
    [
        ((0.95, 60), 100, 0.95, "Not measured: 60 epochs."),
        ((0.99, 100), 100, 0.95, "Not measured: 99 % sparsity."),
        ((0.97, 4, "4x4"), 5, 0.95, "Not measured: the pattern 4x4, 4 epochs, 97 % sparsity."),
        ((0.875, 4, "1:8"), 4, 0.5, "Not measured: the pattern 1:8, 87.5 % sparsity."),
    ],
)
def test_an_unmeasured_request_returns_the_nearest_figure(request_, epochs, sparsity, note):
    found = recommend(*request_)
    assert (found.figure.epochs, found.figure.sparsity) == (epochs, sparsity)
    assert found.notes[0] == f"{note} The figure is the nearest one."


@pytest.mark.parametrize("sparsity", [0.9, 0.9999999, np.float64(0.9)])
@pytest.mark.parametrize("pattern", ["unstructured", "1x1"])
def test_the_recommended_expression_creates_a_method(sparsity, pattern):
    found = recommend(sparsity, 1, pattern)
    assert found == recommend(sparsity, 1)
    assert eval(found.method, vars(keras_dst.methods)).sparsity == sparsity


def test_notes_on_targets():
    def notes(target, sparsity=0.9, pattern="unstructured"):
        plain = recommend(sparsity, 3, pattern).notes
        return recommend(sparsity, 3, pattern, target).notes[len(plain) :]

    (note,) = notes("ethos-u55-128")
    assert note.startswith("ethos-u55-128, 90 % zeros: 0.16 of the bytes")
    assert "0.42 of the cycles, by estimates of Vela" in note
    nearest, note = notes("ethos-u55-32")
    assert nearest == "Not measured: ethos-u55-32. The nearest target is ethos-u55-128."
    _, faster = notes("ethos-u85-256")
    assert "cycles with another pattern: ethos-u85-256, the pattern 2:4: 0.578" in faster
    assert len(notes("ethos-u85-256", 0.5, "2:4")) == 1
    assert "0.247 of the bytes of the dense int8 file, 4.897 times" in notes("micro")[0]
    assert notes("ethos-u65-256", pattern="1x4") == (
        "No figure for the pattern 1x4 on ethos-u65-256.",
    )
    assert notes("host")[0].startswith("No figure for the target host")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 3), "sparsity must be between 0 and 1"),
        ((0.9, 0), "epochs must be a whole number >= 1"),
        ((0.9, 3, "2x"), "pattern must be"),
        ((0.9, 3, "2:4"), "The pattern 2:4 fixes the sparsity at 0.5"),
        ((0.9, 3, "channel", "gpu"), "target must be one of host, arm, any, "),
        ((0.9, 3, "channel", "ethos-u55-banana"), "target must be one of host, arm, any, "),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommend(*arguments)


def test_recommend_command(capsys):
    arguments = ["recommend", "--sparsity", "0.95", "--epochs", "100"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert out == f"{recommend(0.95, 100)}\n"
    assert out.startswith("Method: keras_dst.methods.DCIL(sparsity=0.95)\nFigure: 91.61 %")
    options = ["--pattern", "1x4", "--target", "ethos-u85-512", "--json"]
    assert cli.main([*arguments, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "DCIL(sparsity=0.95, pattern='1x4')"
    assert found["figure"]["epochs"] == 5
    assert cli.main(["recommend", "--sparsity", "2", "--epochs", "3"]) == 1
    assert "sparsity must be between 0 and 1" in capsys.readouterr().err


def test_the_page_on_recommendations_shows_every_figure():
    page = (ROOT / "docs/which_method.md").read_text()
    for row in FIGURES:
        dense = "" if row.dense is None else f"{row.dense:.2f}"
        cells = (row.pattern, f"{100 * row.sparsity:g} %", row.epochs, row.method)
        cells += (f"{row.accuracy:.2f}", f"{row.magnitude:.2f}", dense, row.compared, row.net)
        assert "| " + " | ".join(map(str, cells)) + " |" in page


METHOD_PAGES = [page for page in PAGES if re.match("docs/methods/(?!index)", page)]


@pytest.mark.parametrize("page", METHOD_PAGES)
def test_method_pages_recommend_a_length_and_quote_measured_figures(page):
    paragraph = r"^\* \*\*Training length and sparsity\.\*\* (.+?)(?=^\* |^$)"
    (advice,) = re.findall(paragraph, (ROOT / page).read_text(), re.M | re.S)
    folders = ("papers", "methods")
    tables = "".join((ROOT / f"results/{name}/index.md").read_text() for name in folders)
    quoted = re.findall(r"\d+\.\d\d", advice)
    assert quoted
    assert [number for number in quoted if f" {number} " not in tables] == []
