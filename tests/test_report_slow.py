"""The report in headless Chromium without a network, at the width of a phone and of a desktop.

Chromium windows are at least 500 pixels wide, so the page is loaded in a frame.
"""

import json
import re
import shutil
import subprocess

import pytest

from tests.test_report import run  # noqa: F401 - a fixture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH"),
]

# Posts its measurements to the parent frame, which may not inspect a file in a frame itself.
PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const wide = [...document.querySelectorAll("body *")].filter(
    (e) => !e.closest(".wide, pre") && e.getBoundingClientRect().right > innerWidth + 1);
  parent.postMessage({
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    images: images.length,
    broken: images.filter((i) => !(i.complete && i.naturalWidth)).length,
    wide: wide.map((e) => e.tagName + " " + e.textContent.slice(0, 40)),
    text: parseFloat(getComputedStyle(document.body).fontSize),
  }, "*");
});
</script>"""
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body><script>
addEventListener("message", (e) => { document.body.dataset.probe = JSON.stringify(e.data); });
</script><iframe src="page.html" style="width:WIDTHpx;height:3000px;border:0"></iframe>"""


def probe_page(folder, page, width):
    """Returns the probe's measurements of a page in a frame of this width, and console lines."""
    (folder / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--disable-background-networking", "--enable-logging=stderr"]
    # Every network request fails: nothing listens on the proxy's port.
    command += ["--proxy-server=127.0.0.1:1", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width + 40},3000", "--virtual-time-budget=10000"]
    command += [(folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    match = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert match, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(match.group(1).replace("&quot;", '"')), console


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_without_a_network_and_fits(run, tmp_path, width):  # noqa: F811
    page = (run[0] / "report.html").read_text()
    probe, console = probe_page(tmp_path, page, width)
    assert console == []
    assert probe["width"] == width
    assert probe["scroll"] <= width, probe["wide"]
    assert probe["wide"] == []
    assert probe["images"] > 30 and probe["broken"] == 0
    assert probe["text"] >= 16


def test_the_probe_detects_faults_of_a_page(tmp_path):
    page = (
        '<html><body><img src="https://localhost/a.png"><div style="width:900px">x</div>'
        "<script>console.error('wrong')</script></body></html>"
    )
    probe, console = probe_page(tmp_path, page, 390)
    assert probe["broken"] == 1 and probe["scroll"] > 390
    assert any("wrong" in line for line in console)
