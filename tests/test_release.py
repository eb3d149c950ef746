"""Tests that the files published with a release are consistent."""

import importlib.util
import re
import shutil
import tomllib

import keras_dst
from tests.backends import once
from tests.pages import ROOT

pytestmark = once

URL = "https://host.example/owner/name"


def script():
    """Return the module `.github/project_urls.py`."""
    path = ROOT / ".github" / "project_urls.py"
    spec = importlib.util.spec_from_file_location("project_urls", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_project_urls_makes_links_absolute():
    text = "[a](docs/a.md#b) [![c](../../actions/c.svg)](../../actions) [d](https://d/) [e](#f)"
    assert script().absolute(text, URL, "v1") == (
        f"[a]({URL}/blob/v1/docs/a.md#b) [![c]({URL}/actions/c.svg)]({URL}/actions) "
        "[d](https://d/) [e](#f)"
    )


def test_every_link_of_the_readme_is_valid_on_the_package_index(tmp_path):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    module = script()
    relative = re.findall(module.RELATIVE, (tmp_path / "README.md").read_text())
    assert len(relative) > 20
    for link in relative:
        assert link.startswith("../../actions") or (ROOT / link.split("#")[0]).exists(), link
    module.main(URL, "v0.1.0", tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert re.findall(module.RELATIVE, readme) == []
    assert f"({URL}/raw/v0.1.0/docs/images/methods.svg)" in readme
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Source"] == URL


def test_badges_refer_to_existing_workflows():
    badges = re.findall(r"actions/(workflows/[\w.-]+\.yml)/badge", (ROOT / "README.md").read_text())
    assert badges
    assert all((ROOT / ".github" / badge).is_file() for badge in badges)


def test_the_citation_contains_the_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {keras_dst.__version__}\n" in citation
