"""How sure a token is, in three words, and an explanation as HTML, such as notebooks show.

The HTML needs nothing else: no style sheet, no script. Its colours are tints of whatever the background is, so that it
reads in a light page as in a dark one.
"""

from collections.abc import Iterable
from html import escape
from typing import Literal

from loramem._util.printable import printable

Certainty = Literal["certain", "near", "below"]

CERTAIN, ORDERED = 0.9, 0.5
TINTS: dict[Certainty, str] = {"certain": "46,160,67", "near": "210,153,34", "below": "248,81,73"}
"""Red, green and blue."""
MEANINGS: dict[Certainty, str] = {
    "certain": f"p ≥ {CERTAIN}",
    "near": f"p > {ORDERED}",
    "below": f"p ≤ {ORDERED}",
}
_BOX = "display:inline-block;margin:0 2px 4px 0;vertical-align:top;text-align:center"
_CELL = "padding:0 .4em;border-radius:3px"
_MONO = "font-family:ui-monospace,Menlo,Consolas,monospace"


def certainty(prob: float) -> Certainty:
    """Certain is what training aims at; above 0.5 greedy decoding cannot choose another token."""
    return "certain" if prob >= CERTAIN else "near" if prob > ORDERED else "below"


def visible(text: str) -> str:
    """A token's text with its blanks, line ends and control characters to be seen."""
    return printable(text).replace(" ", "␣")


def as_html(key: str, adapter: str, tokens: Iterable[tuple[str, float, float]]) -> str:
    """Every token with its probability, and under it the one without the adapter.

    Args:
        tokens: Text, p, and p of the base model alone.
    """
    boxes = "".join(
        f'<span style="{_BOX}"><span style="{_CELL};{_MONO}">{escape(visible(text))}</span>'
        f"{_prob(prob, 'with the adapter')}{_prob(base, 'without it')}</span>"
        for text, prob, base in tokens
    )
    legend = " ".join(
        f'<span style="{_CELL};{_tint(level)}">{level}</span> {meaning}' for level, meaning in MEANINGS.items()
    )
    return (
        f'<div style="font-size:14px;line-height:1.6;overflow-wrap:anywhere"><div><b>{escape(printable(key))}</b></div>'
        f'<div style="margin:.4em 0">{boxes}</div>'
        '<div style="font-size:12px;opacity:.8">'
        f"Below each token: p with adapter {escape(adapter[:12])}, p without it. "
        f"{legend}</div></div>"
    )


def _prob(prob: float, of: str) -> str:
    style = f"display:block;margin-top:2px;font-size:12px;{_CELL};{_tint(certainty(prob))}"
    return f'<span style="{style}" title="p {of}: {prob:.4f}">{prob:.2f}</span>'


def _tint(level: Certainty) -> str:
    return f"background:rgba({TINTS[level]},.35)"
