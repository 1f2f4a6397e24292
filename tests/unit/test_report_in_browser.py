"""The report page in a real browser: nothing overflows, all text can be read, no image is mute."""

import html
import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from report_run import HOSTILE, write_full_run

from post_dist.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")

WIDTHS = (390, 820, 1280)
LEAST_CONTRAST = 4.5
DARK = "(prefers-color-scheme: dark)"
MEASURE = """
function light(color) {
  const parts = color.match(/[0-9.]+/g).slice(0, 3).map(part => part / 255);
  const [r, g, b] = parts.map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(element) {
  for (; element; element = element.parentElement) {
    const color = element.ownerDocument.defaultView.getComputedStyle(element).backgroundColor;
    if (color !== 'rgba(0, 0, 0, 0)') return color;
  }
  return 'rgb(255, 255, 255)';
}
function measure(frame) {
  const page = frame.contentDocument;
  page.querySelectorAll('details').forEach(each => each.open = true);
  const texts = [];
  for (const element of page.querySelectorAll('body *')) {
    const own = [...element.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
    const box = element.getBoundingClientRect();
    if (!own.length || !box.width || element.tagName === 'title') continue;
    const style = frame.contentWindow.getComputedStyle(element);
    const drawn = element.namespaceURI.endsWith('svg');
    const one = light(drawn ? style.fill : style.color), other = light(background(element));
    texts.push({
      text: own[0].data.trim().slice(0, 40), right: box.right, left: box.left,
      scrolls: !!element.closest('.scroll, pre'),
      contrast: (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05),
    });
  }
  const images = [...page.querySelectorAll('svg:not([aria-hidden]), img')];
  return {
    dark: light(background(page.body)) < 0.2,
    width: page.documentElement.clientWidth, needed: page.documentElement.scrollWidth, texts,
    images: images.map(each => [each.getAttribute('role'), each.getAttribute('aria-label')]),
  };
}
window.onload = () => {
  const found = [...document.querySelectorAll('iframe')].map(measure);
  document.body.innerHTML = '<pre id=out></pre>';
  document.getElementById('out').textContent = JSON.stringify(found);
};
"""
RUN_AXE = """
axe.run(document).then(found => {
  const failed = found.violations.map(each => [each.id, each.impact, each.nodes[0].html]);
  document.body.innerHTML = '<pre id=out></pre>';
  document.getElementById('out').textContent =
    JSON.stringify({failed, passed: found.passes.map(each => each.id)});
});
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the browser measures at each width, in light and dark colors."""
    folder = tmp_path_factory.mktemp("page")
    page = write_report(write_full_run(folder / "demo", task=HOSTILE + "long" * 60)).read_text()
    frames = []
    # The dark colors are forced here, because a headless browser has no preference.
    for text in (page.replace(DARK, "not all"), page.replace(DARK, "all")):
        for width in WIDTHS:
            source = html.escape(text)
            frames.append(f'<iframe style="width:{width}px;height:900px" srcdoc="{source}">')
    frames_html = "</iframe>".join(frames)
    return answer_of(
        folder, f"<meta charset=utf-8>{frames_html}</iframe><script>{MEASURE}</script>"
    )


def answer_of(folder: Path, source: str) -> Any:
    """Return what the scripts of a page write as JSON into its element `out`."""
    page = folder / "harness.html"
    page.write_text(source)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    # Virtual time runs ahead until all promises are kept. The profile stays out of the home folder.
    command += ["--virtual-time-budget=20000", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    answer = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert answer is not None, done.stderr[-2000:]
    return json.loads(html.unescape(answer[1]))


def test_every_width_is_measured_in_both_colors(measured: list[dict]) -> None:
    assert [each["dark"] for each in measured] == 3 * [False] + 3 * [True]
    assert all(len(each["texts"]) > 50 for each in measured)


def test_nothing_overflows(measured: list[dict]) -> None:
    for each in measured:
        assert each["needed"] <= each["width"]
        # The table scrolls in a box of its own.
        fixed = [text for text in each["texts"] if not text["scrolls"]]
        outside = [t for t in fixed if t["right"] > each["width"] + 1 or t["left"] < -1]
        assert outside == []


def test_all_text_has_contrast(measured: list[dict]) -> None:
    for each in measured:
        assert [text for text in each["texts"] if text["contrast"] < LEAST_CONTRAST] == []


def test_every_drawing_has_a_role_and_a_text(measured: list[dict]) -> None:
    for each in measured:
        assert len(each["images"]) == 4
        assert all(role == "img" and label for role, label in each["images"])


@pytest.mark.parametrize("colors", ["not all", "all"], ids=["light", "dark"])
def test_axe_finds_nothing(tmp_path: Path, colors: str) -> None:
    axe = files("axe_core_python").joinpath("axe.min.js").read_text()
    page = write_report(write_full_run(tmp_path / "demo", task=HOSTILE)).read_text()
    opened = page.replace(DARK, colors).replace("<details", "<details open")
    found = answer_of(tmp_path, f"{opened}<script>{axe}</script><script>{RUN_AXE}</script>")
    assert found["failed"] == []
    assert {"document-title", "html-has-lang", "svg-img-alt"} <= set(found["passed"])
