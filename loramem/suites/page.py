"""The report of the suites as one HTML page that needs nothing else: styles and plots are in it, and no scripts."""

import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined

from loramem.suites.figures import HeatMap
from loramem.suites.report import TITLE, Report
from loramem.suites.runner import Table

TEMPLATE = "report.html.jinja"
THEMED = {
    "#000000": "currentColor",
    "#ffffff": "var(--page)",
    "#dddddd": "var(--rule)",
    "#555555": "var(--soft)",
    "#777777": "var(--soft)",
}
"""Colours of the page for those that `loramem.suites.figures` draws with, besides the series' own."""


def page(report: Report, remarks: Sequence[str], drawings: Mapping[str, bytes]) -> str:
    """The page of a report.

    Args:
        remarks: What belongs at its head (`Report.remarks`).
        drawings: SVG files by the stems of the plots (`Part.stem`); plots without one are left out.
    """
    environment = Environment(
        loader=PackageLoader("loramem.suites", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["numeric"] = numeric
    environment.tests["heat_map"] = lambda plot: isinstance(plot, HeatMap)
    plots = {part.stem(plot): plot for part in report.parts for plot in part.plots}
    inlined = {
        stem: svg if isinstance(plots[stem], HeatMap) else themed(svg)
        for stem, svg in ((stem, inline(svg, stem)) for stem, svg in drawings.items())
    }
    return environment.get_template(TEMPLATE).render(title=TITLE, report=report, remarks=remarks, drawings=inlined)


def inline(svg: bytes, prefix: str) -> str:
    """An SVG file as part of a page: without prologue, metadata, style sheet and size of its own.

    Args:
        prefix: Put before all ids, which several figures would share.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): _renamed(_local(name), text, prefix) for name, text in element.attrib.items()}
        element.tail = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": f"{prefix}-caption"}
    return ElementTree.tostring(root, encoding="unicode")


def themed(svg: str) -> str:
    """An SVG element whose ink, paper and lines are those of the page, in a light scheme as in a dark one.

    A heat map stays as it is: its numbers are black or white by the field that they stand on.
    """
    return re.sub("|".join(THEMED), lambda found: THEMED[found[0]], svg)


def numeric(table: Table) -> tuple[bool, ...]:
    """Which columns hold numbers (a dash where there is none) and no words, but after a bound such as "> 5"."""
    number = re.compile(r"-|> .+|[^a-z]*\d[^a-z]*", re.IGNORECASE)
    return tuple(all(number.fullmatch(row[place]) for row in table.rows) for place in range(len(table.columns)))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _renamed(name: str, text: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{text}"
    if name == "href":
        return text.replace("#", f"#{prefix}-", 1)
    return text.replace("url(#", f"url(#{prefix}-")
