"""An explanation as HTML: whole, escaped, and legible on a light page and a dark one."""

from html.parser import HTMLParser

import pytest

from loramem import Explanation, TokenProbability

NASTY = "<script>alert('x & \"y\"')</script>"


def explanation(*probs: tuple[str, float, float]) -> Explanation:
    tokens = tuple(TokenProbability(text, 1, prob, base, prob > 0.5) for text, prob, base in probs)
    return Explanation(NASTY, "".join(text for text, *_ in probs), "a" * 32, tokens)


class Reader(HTMLParser):
    """Tags in order, attributes of each, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = list[str](), set[str](), list[tuple[str, str | None]](), ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_notebook_shows_every_token_with_and_without_the_adapter() -> None:
    read = Reader(explanation(("9", 0.97, 0.02), (" a", 0.7, 0.1), ("<|end|>", 0.3, 0.6))._repr_html_())
    assert read.open == []
    assert [part in read.text for part in ("9", "␣a", "<|end|>", "0.97", "0.02", "0.70", "0.30", "0.60")] == [True] * 8
    titles = [value for name, value in read.attributes if name == "title"]
    assert titles[:2] == ["p with the adapter: 0.9700", "p without it: 0.0200"]


def test_what_a_record_holds_is_text() -> None:
    source = explanation((NASTY, 0.9, 0.1), ("\n\x1b", 0.9, 0.1))._repr_html_()
    read = Reader(source)
    assert read.tags == {"div", "b", "span"}
    assert {name for name, _ in read.attributes} == {"style", "title"}
    assert NASTY.replace(" ", "␣") in read.text
    assert "\\n\\x1b" in read.text


def test_it_needs_nothing_else_and_brings_no_ground_of_its_own() -> None:
    source = explanation(("9", 0.97, 0.02))._repr_html_()
    assert "http" not in source
    assert "url(" not in source
    styles = [value or "" for name, value in Reader(source).attributes if name == "style"]
    grounds = [part for style in styles for part in style.split(";") if "color" in part or "background" in part]
    assert grounds
    assert all(ground.startswith("background:rgba(") and ground.endswith(",.35)") for ground in grounds)


@pytest.mark.parametrize(
    ("prob", "certainty"),
    [(1.0, "certain"), (0.9, "certain"), (0.89, "near"), (0.51, "near"), (0.5, "below"), (0.0, "below")],
)
def test_how_sure_a_token_is(prob: float, certainty: str) -> None:
    [token] = explanation(("9", prob, 0.0)).tokens
    assert token.certainty == certainty
    assert (token.certainty == "below") != token.ordered
