"""The report in a browser, where there is one: it fits a phone and a desk, and follows the reader's colour scheme."""

import html
import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from loramem.suites import reporter

from .conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None or find_spec("matplotlib") is None, reason="needs a browser and plots")
DARK, LIGHT = 0, 1  # Chromium's numbers

MEASURE = """
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const style = (node) => page.defaultView.getComputedStyle(node);
  const texts = [...page.querySelectorAll(".drawing:not(.paper) text, .drawing:not(.paper) svg")];
  document.title = JSON.stringify({
    width: root.clientWidth, needed: root.scrollWidth, paper: style(page.body).backgroundColor,
    ink: style(page.body).color, drawn: [...new Set(texts.map((text) => style(text).fill))],
    figures: page.querySelectorAll("figure svg").length,
    narrow: [...page.querySelectorAll("figure svg")].filter((one) => one.getBoundingClientRect().width < 400).length,
  });
});
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    return reporter.write(reporter.read(ROOT / "docs" / "results"), folder)[-1].read_text()


def opened(report: str, width: int, scheme: int, folder: Path) -> dict[str, object]:
    """What a browser says of the page in a frame of a width."""
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(report)}"></iframe>'
    (folder / "frame.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><script>{MEASURE}</script>{frame}")
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"),
            *(f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"),
            *("--window-size=1400,1000", (folder / "frame.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout.partition("<iframe")[0])
    assert title, done.stderr
    return json.loads(html.unescape(title[1]))


def lightness(color: object) -> float:
    return sum(map(int, re.findall(r"\d+", str(color))[:3])) / (3 * 255)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", [DARK, LIGHT])
def test_the_page_fits_and_is_drawn_in_the_reader_s_colours(
    report: str, width: int, scheme: int, tmp_path: Path
) -> None:
    seen = opened(report, width, scheme, tmp_path)
    assert seen["width"] == width
    assert seen["needed"] == width  # nothing is cut off or has to be scrolled to, but within its own frame
    assert (lightness(seen["paper"]) > 0.5) == (scheme == LIGHT)
    assert abs(lightness(seen["paper"]) - lightness(seen["ink"])) > 0.7
    assert seen["figures"]
    assert not seen["narrow"]  # which no one could read
    assert all(abs(lightness(fill) - lightness(seen["paper"])) > 0.5 for fill in seen["drawn"])
