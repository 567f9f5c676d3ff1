"""The page in a browser: headless Chromium without a network, at the width of a phone and a desk.

Chromium makes no window narrower than 500 pixels, so the page is looked at in a frame.
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
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH"),
]

# Says to the frame's parent how it came out, and so needs no permission to look into a file.
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
addEventListener("message", (e) => { document.body.dataset.found = JSON.stringify(e.data); });
</script><iframe src="page.html" style="width:WIDTHpx;height:3000px;border:0"></iframe>"""


def look(folder, page, width):
    """What the probe says of a page in a frame of this width, and the lines of the console."""
    (folder / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--disable-background-networking", "--enable-logging=stderr"]
    # Whatever asks for the network meets a port where nobody listens.
    command += ["--proxy-server=127.0.0.1:1", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width + 40},3000", "--virtual-time-budget=10000"]
    command += [(folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(found.group(1).replace("&quot;", '"')), console


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_without_a_network_and_fits(run, tmp_path, width):  # noqa: F811
    page = (run[0] / "report.html").read_text()
    found, console = look(tmp_path, page, width)
    assert console == []
    assert found["width"] == width
    assert found["scroll"] <= width, found["wide"]
    assert found["wide"] == []
    assert found["images"] > 30 and found["broken"] == 0
    assert found["text"] >= 16


def test_what_is_wrong_with_a_page_would_be_seen(tmp_path):
    page = (
        '<html><body><img src="https://localhost/a.png"><div style="width:900px">x</div>'
        "<script>console.error('wrong')</script></body></html>"
    )
    found, console = look(tmp_path, page, 390)
    assert found["broken"] == 1 and found["scroll"] > 390
    assert any("wrong" in line for line in console)
