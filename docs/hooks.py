"""What MkDocs needs to be told: formulas, figures of results/, and the files around docs/."""

import json
import pathlib
import posixpath
import re

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, InclusionLevel

ROOT = pathlib.Path(__file__).parent.parent


def on_files(files, config):
    """Pages that are not in docs/: the tables of results/, and the changes."""
    for path in [*sorted(ROOT.glob("results/*/index.md")), ROOT / "CHANGELOG.md"]:
        name = path.relative_to(ROOT).as_posix()
        kind = InclusionLevel.NOT_IN_NAV  # they may be there
        files.append(File.generated(config, name, abs_src_path=str(path), inclusion=kind))
    return files


def on_page_markdown(markdown, page, config, files):
    """Formulas become MathML, markers tables; links out of docs/ lead to the pages above."""
    markdown = re.sub(r"^```python .+$", "```python", markdown, flags=re.MULTILINE)  # what runs it
    markdown = re.sub(r"^```math\n(.*?)^```$", _formula, markdown, flags=re.DOTALL | re.MULTILINE)
    markdown = re.sub(r"^<!-- figures of (.+?) -->$", _figures, markdown, flags=re.MULTILINE)
    for marker, table in (("step times", step_times), ("mask updates", mask_updates)):
        markdown = markdown.replace(f"<!-- {marker} -->", table())
    folder = posixpath.dirname(page.file.src_uri)

    def inside(link):
        target = posixpath.normpath(posixpath.join("docs", folder, link[1]))
        if target.startswith("docs/"):
            return link[0]
        return f"]({posixpath.relpath(target, folder or '.')})"

    return re.sub(r"\]\((\.\./[^)#]+)\)", inside, markdown)


def _formula(block) -> str:
    return f"<div>{convert(block[1].strip(), display='block')}</div>"


def _figures(marker) -> str:
    return figures(marker[1], (ROOT / "results" / "methods" / "index.md").read_text())


def figures(method: str, page: str) -> str:
    """Return the rows of a method, its variants and its baselines from results/methods/index.md."""
    wanted = ("method", "---", "dense", "random", "Magnitude", method)
    lines = []
    for section in page.split("\n## ")[1:]:
        heading, *rest = section.splitlines()
        rows = [line for line in rest if line.startswith("|")]
        if rows:
            lines += ["", f"**{heading}**", ""]
            lines += [row for row in rows if re.split("[|,]", row)[1].strip() in wanted]
    return "\n".join(lines)


def step_times() -> str:
    """A table for each net: how long a step takes beside the plain model's, by backend.

    In brackets, how long compiling takes beside the plain model's, where that was timed.
    """
    runs, lines = _runs("step_time"), []
    for net in ("small-cnn", "resnet-20", "lstm-128"):
        mine = {name.split("_")[1]: run for name, run in runs.items() if name.startswith(net)}
        columns = {name: _ratios(run) for name, run in mine.items()}
        net = next(iter(mine.values()))["net"]
        lines += ["", f"**{net}**", "", *_columns(columns)]
    return "\n".join(lines)


def mask_updates() -> str:
    """What an update of 25 million masks takes: passes over the weights, and memory."""
    columns = {
        backend: {
            name: f"{of['passes']:.0f} passes, {of['memory_over_weights']:.1f}×"
            for name, of in run["methods"].items()
        }
        for backend, run in _runs("mask_update").items()
    }
    return "\n".join(["", *_columns(columns)])


def _runs(benchmark: str) -> dict[str, dict]:
    """Return the stored runs of a benchmark by name."""
    lines = (ROOT / "results" / benchmark / "runs.jsonl").read_text().splitlines()
    return {run["run"]: run for run in map(json.loads, lines)}


def _ratios(run: dict) -> dict[str, str]:
    found = {name: f"{ratio:.2f}" for name, ratio in run["ratio_to_plain"].items()}
    compiling = run["seconds_to_compile"]
    # Nothing is compiled where the first turn takes hardly longer than the others.
    if run["net"].startswith("resnet") and compiling["plain"] > 1:
        for name in found:
            found[name] += f" ({compiling[name] / compiling['plain']:.2f})"
    return found


def _columns(columns: dict[str, dict[str, str]]) -> list[str]:
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in dict.fromkeys(name for cells in columns.values() for name in cells):
        cells = [cells.get(name, "") for cells in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


class Examples(griffe.Extension):
    """Docstrings say `Example:`, in the singular, as Keras's do."""

    def on_object(self, *, obj, **kwargs):
        """Let griffe read the section as code."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
