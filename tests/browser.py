"""A headless browser that opens an HTML page and reports the displayed content."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")

# JavaScript that measures a page after its images are loaded, and adds the results to the page.
_PROBE = """<script>addEventListener("load", () => {
  const size = x => [x.naturalWidth, x.naturalHeight, x.getBoundingClientRect().width, x.alt];
  const found = {
    pictures: [...document.images].map(size),
    overflow: document.documentElement.scrollWidth - innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
    text: document.body.innerText,
    clipped: [...document.querySelectorAll("pre > code")]
      .filter(code => code.scrollWidth > code.clientWidth).map(code => code.innerText),
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
  };
  const node = document.createElement("script");
  node.type = "application/json"; node.id = "probe";
  node.textContent = JSON.stringify(found).replaceAll("<", "\\\\u003c");
  document.body.append(node);
})</script>"""


@dataclasses.dataclass
class Page:
    """Properties of an HTML page, as measured in a browser."""

    dom: str
    pictures: list  # Natural width, natural height, displayed width and alt text of each image.
    overflow: int  # Width of the page minus width of the window, in pixels.
    background: str
    text: str  # Visible text.
    clipped: list[str]  # Code blocks with at least one line that is wider than the block.
    console: list[str]
    requests: list[str]  # URLs of external files that the page refers to.
    screenshot: pathlib.Path


def look_at(page: pathlib.Path, folder: pathlib.Path, width=1200, dark=False) -> Page:
    """Open a page in a browser, or skip the test if no browser is installed.

    The browser opens a copy of the page that contains the script `_PROBE`. The security policy of
    the page forbids scripts, so the copy gets a policy that allows them.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"This test needs one of these browsers: {', '.join(NAMES)}")
    text = page.read_text("utf-8")
    probed = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    copy = folder / "probed.html"
    copy.write_text(probed.replace("</body>", f"{_PROBE}</body>"), "utf-8")
    screenshot = folder / "screenshot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += [f"--window-size={width},2400", f"--screenshot={screenshot}", "--dump-dom"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [browser, *flags, copy.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    dom = done.stdout
    probe = json.loads(re.search(r'id="probe">(.*?)</script>', dom, re.DOTALL)[1])
    return Page(
        dom=dom,
        **probe,
        console=re.findall(r"CONSOLE.*", done.stderr),
        screenshot=screenshot,
    )
