"""The picture in the README is what the commands print, figures apart."""

import html
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from .conftest import ROOT

PICTURES = ROOT / "docs" / "pictures"


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record", PICTURES / "record.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(svg: str) -> list[str]:
    """Lines of the terminal; ids, other figures and the lengths of bars left out."""
    lines: dict[str, str] = {}
    for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        lines[element.attrib.get("y", "")] = lines.get(element.attrib.get("y", ""), "") + (element.text or "") + " "
    plain = (html.unescape(line).replace("\xa0", " ") for line in lines.values())
    return [re.sub(r"\s+", " ", re.sub(r"[0-9a-f]{32}|\d[\d.,]*|━+", "0", line)) for line in plain]


def test_the_picture_is_what_the_commands_print(recorder: ModuleType, tmp_path: Path) -> None:
    committed = (PICTURES / "demo.svg").read_text()
    shown = recorder.record(tmp_path)
    assert set(texts(recorder.draw(shown))) == set(texts(committed))
    values = re.findall(r'"value": "(.*?)"', recorder.FACTS)
    assert shown[3][1].strip() in values


def test_the_picture_fetches_nothing_and_is_legible_in_a_readme(recorder: ModuleType) -> None:
    svg = (PICTURES / "demo.svg").read_text()
    assert not re.search(r"url\((?!#)|href|@import|@font-face", svg)
    width = float(ElementTree.fromstring(svg).attrib["viewBox"].split()[2])
    assert 20 * 800 / width >= 14  # pixels of its letters where a README is 800 wide
    edge = max(
        float(text.attrib["x"]) + float(text.attrib["textLength"])
        for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
        if "textLength" in text.attrib
    )
    assert edge <= width  # no line is cut off
