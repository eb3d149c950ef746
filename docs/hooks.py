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
    for path in [*sorted(ROOT.glob("results/*.md")), ROOT / "CHANGELOG.md"]:
        name = path.relative_to(ROOT).as_posix()
        kind = InclusionLevel.NOT_IN_NAV  # they may be there
        files.append(File.generated(config, name, abs_src_path=str(path), inclusion=kind))
    return files


def on_page_markdown(markdown, page, config, files):
    """Formulas become MathML, markers tables; links out of docs/ lead to the pages above."""
    markdown = re.sub(r"^```python .+$", "```python", markdown, flags=re.MULTILINE)  # what runs it
    markdown = re.sub(r"^```math\n(.*?)^```$", _formula, markdown, flags=re.DOTALL | re.MULTILINE)
    markdown = re.sub(r"^<!-- figures of (.+?) -->$", _figures, markdown, flags=re.MULTILINE)
    markdown = markdown.replace("<!-- step times -->", step_times())
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
    return figures(marker[1], (ROOT / "results" / "methods.md").read_text())


def figures(method: str, page: str) -> str:
    """The rows of a method, its variants, and what it is read against, of results/methods.md."""
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
    """A table for each net: how long a step takes beside the plain model's, by backend."""
    paths = [*ROOT.glob("results/step_time_*.json"), *ROOT.glob("results/overhead_*.json")]
    runs = [run for run in map(_read, sorted(paths)) if "ratio_to_plain" in run]
    lines = []
    for net in dict.fromkeys(run["net"] for run in runs):
        ratios = {run["backend"]: run["ratio_to_plain"] for run in runs if run["net"] == net}
        names = dict.fromkeys(name for ratio in ratios.values() for name in ratio)
        lines += [
            "",
            f"**{net}**",
            "",
            f"| | {' | '.join(ratios)} |",
            "|---|" + "---|" * len(ratios),
        ]
        for name in names:
            cells = [f"{r[name]:.2f}" if name in r else "" for r in ratios.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _read(path) -> dict:
    return json.loads(path.read_text())


class Examples(griffe.Extension):
    """Docstrings say `Example:`, in the singular, as Keras's do."""

    def on_object(self, *, obj, **kwargs):
        """Let griffe read the section as code."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
