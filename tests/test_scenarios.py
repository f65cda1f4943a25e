"""The scenarios suite: its data, how answers are scored, keys one character off, and a tiny cell."""

import ipaddress
import json
import random
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from loramem.embedded import base_path
from loramem.records.prompts import PromptTemplate, encode_records
from loramem.records.record import Record
from loramem.suites import scenarios
from loramem.suites.runner import SuiteOptions

# The data

# What scanners take for a live token of a provider, or for a private key.
PROVIDERS = re.compile(
    r"AKIA|ASIA|AIza|ya29\.|gh[pousr]_|github_pat_|glpat-|xox[abeoprs]-|\b[sr]k[-_]|pk_(live|test)|whsec_|hf_[A-Za-z]"
    r"|npm_|pypi-|dop_v1_|shp(at|ss)_|SG\.|eyJ|\bAC[0-9a-f]{32}|-----BEGIN"
)
HOSTS = re.compile(r"[\w+.-]+://(?:[^@/\s]*@)?(\[[^\]]+\]|[\w.-]*)|[\w.-]@([a-z][\w-]*(?:\.[\w-]+)+)")
NAMES = re.compile(r"\b((?:[a-z0-9-]+\.)+(?:com|org|net|edu|gov|dev|cloud))\b")
DOCUMENTATION = [
    ipaddress.ip_network(block)
    for block in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "127.0.0.0/8")
]


def documentary(host: str) -> bool:
    """Whether a host is reserved for examples (RFC 2606, 5737, 3849)."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost" or bool(re.search(r"(^|\.)(example|example\.(com|org|net)|test|invalid)$", host))
    return any(address in network for network in DOCUMENTATION)


@pytest.fixture(params=scenarios.DOMAINS)
def records(request: pytest.FixtureRequest) -> list[Record]:
    return scenarios.domain_records(request.param)


def texts(records: list[Record]) -> list[str]:
    return [text for record in records for text in (record.key, record.value)]


def test_there_are_eight_domains_and_no_other_files() -> None:
    assert len(scenarios.DOMAINS) == 8
    assert {path.name for path in scenarios.DATA.iterdir()} == {f"{domain}.jsonl" for domain in scenarios.DOMAINS}


def test_keys_and_values_are_unique_over_all_domains() -> None:
    every = [record for domain in scenarios.DOMAINS for record in scenarios.domain_records(domain)]
    assert len({record.key for record in every}) == len({record.value for record in every}) == len(every)


def test_a_domain_has_forty_records_of_varied_length_and_nothing_but_key_and_value(records: list[Record]) -> None:
    assert len(records) >= 40
    assert len({len(record.value) for record in records}) >= 10
    assert max(len(record.value) for record in records) <= 400
    assert all(text == text.strip() for text in texts(records))
    assert not any(record.metadata for record in records)
    assert any(not text.isascii() for text in texts(records))


def test_nothing_is_taken_for_a_live_token(records: list[Record]) -> None:
    assert [text for text in texts(records) if PROVIDERS.search(text)] == []


def test_hosts_and_addresses_are_those_kept_for_examples(records: list[Record]) -> None:
    for text in texts(records):
        hosts = [first or second for first, second in HOSTS.findall(text)] + NAMES.findall(text)
        # dns:/// names its host in the path
        assert [host for host in hosts if host and not documentary(host)] == [], text
        addresses = re.findall(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])", text)
        assert [address for address in addresses if not documentary(address)] == [], text


def test_the_check_of_hosts_refuses_real_ones() -> None:
    assert not any(map(documentary, ["example.de", "myexample.com", "8.8.8.8", "[2001:4860::1]", "loramem.io"]))
    assert all(map(documentary, ["a.b.example", "example.org", "x.test", "192.0.2.7", "[2001:db8::7]", "localhost"]))
    assert PROVIDERS.search("token: ghp_0") and not PROVIDERS.search("task-force, desk-top")


def test_snippets_and_configuration_have_several_lines() -> None:
    for domain in ("snippets", "configuration"):
        assert all(2 <= len(record.value.splitlines()) <= 6 for record in scenarios.domain_records(domain))


def test_the_embedded_base_model_can_express_every_record(records: list[Record]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    encoded = encode_records(records, tokenizer, PromptTemplate.of(tokenizer), max_tokens=1024)
    assert max(entry.length for entry in encoded) < 400


# Scores


@pytest.mark.parametrize(
    ("value", "got", "distance", "wrong"),
    [  # the first two distances are the textbook ones (Wagner and Fischer 1974; Jurafsky and Martin, section 2.5)
        ("kitten", "sitting", 3, 0),
        ("intention", "execution", 5, 0),
        ("9100672710", "9100672710", 0, None),
        ("9100672710", "9100672701", 2, 8),
        ("abc", "abcd", 1, 3),
        ("abcd", "abc", 1, 3),
        ("abc", "", 3, 0),
        ("Grüße\n", "Grüsse\n", 2, 3),
    ],
)
def test_distance_and_first_wrong_character_by_hand(value: str, got: str, distance: int, wrong: int | None) -> None:
    assert scenarios.edit_distance(value, got) == distance
    assert scenarios.first_wrong(value, got) == wrong


SHORT = st.text("abß\n", max_size=8)


def recursive(a: str, b: str) -> int:
    """The definition of the distance, without a table."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return recursive(a[1:], b[1:])
    return 1 + min(recursive(a[1:], b), recursive(a, b[1:]), recursive(a[1:], b[1:]))


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_the_edit_distance_is_that_of_its_definition(a: str, b: str) -> None:
    assert scenarios.edit_distance(a, b) == recursive(a, b)


@given(SHORT, SHORT)
def test_texts_agree_up_to_the_first_wrong_character_and_differ_there(value: str, got: str) -> None:
    place = scenarios.first_wrong(value, got)
    if place is None:
        assert value == got
    else:
        assert value[:place] == got[:place]
        assert value[place : place + 1] != got[place : place + 1]


@given(SHORT, SHORT)
def test_similarity_is_1_for_equal_texts_alone_and_never_negative(a: str, b: str) -> None:
    assert 0 <= scenarios.similarity(a, b) <= 1
    assert (scenarios.similarity(a, b) == 1) == (a == b)


def test_a_leak_is_the_original_value_and_another_record_s_is_counted_apart() -> None:
    values = {"a": "1234", "b": "5678", "c": "9012", "never written": "3456"}
    counted = scenarios.likeness(values, {"a": "1234", "b": "1234", "c": "9013"})
    assert counted == {"leaked": 1, "others": 1, "similarity": round((1 + 0 + 0.75) / 3, 4)}
    assert scenarios.likeness(values, {}) == {"leaked": 0, "others": 0, "similarity": None}


# Near misses

KEYS = st.text(min_size=1, max_size=20).filter(lambda key: any(c in string.digits or c.isalpha() for c in key))


@given(KEYS, st.integers(0, 99))
def test_a_near_miss_differs_in_one_letter_or_digit(key: str, seed: int) -> None:
    near = scenarios.near_miss(key, lambda _: True, random.Random(seed))
    (changed,) = [(old, new) for old, new in zip(key, near, strict=True) if old != new]
    assert all(c in string.digits for c in changed) or all(c.isalpha() for c in changed)
    assert near == scenarios.near_miss(key, lambda _: True, random.Random(seed))


def test_case_and_everything_else_is_kept() -> None:
    rng = random.Random(0)
    seen = {scenarios.near_miss("Q-7 x!", lambda _: True, rng) for _ in range(200)}
    assert all(re.fullmatch(r"[A-Z]-\d [a-z]!", near) for near in seen)
    assert {near[place] for near in seen for place in (0, 2, 4)} > set("7Qx")  # each place is changed now and then
    assert len(seen) > 40


def test_a_near_miss_is_asked_for_until_one_is_accepted() -> None:
    taken = {f"k{digit}" for digit in "0123456"} | {f"{letter}7" for letter in string.ascii_lowercase}
    assert {scenarios.near_miss("k7", lambda key: key not in taken, random.Random(s)) for s in range(30)} == {
        "k8",
        "k9",
    }
    with pytest.raises(ValueError, match="No near miss"):
        scenarios.near_miss("k7", lambda _: False, random.Random(0))
    with pytest.raises(ValueError, match="No near miss"):
        scenarios.near_miss("…!", lambda _: True, random.Random(0))


def test_no_near_miss_of_a_domain_is_one_of_its_keys(records: list[Record]) -> None:
    keys, rng = {record.key for record in records}, random.Random(0)
    assert not keys & {scenarios.near_miss(key, lambda near: near not in keys, rng) for key in keys}


# Cells


def test_there_is_a_cell_per_domain_of_all_its_records() -> None:
    cells = list(scenarios.cells(SuiteOptions(), lambda cell: {}))
    assert [cell.domain for cell in cells] == list(scenarios.DOMAINS)
    assert min(cell.records for cell in cells) >= 40
    (quick,) = scenarios.cells(SuiteOptions(quick=True), lambda cell: {})
    assert (quick.domain, quick.records) == ("credentials", 6)
    assert len(list(scenarios.cells(SuiteOptions(records=(3, 1000), seeds=2), lambda cell: {}))) == 32


def write_domain(folder: Path, rows: dict[str, str]) -> None:
    lines = (json.dumps({"key": key, "value": value}) for key, value in rows.items())
    (folder / "credentials.jsonl").write_text("\n".join(lines))


def test_a_changed_record_makes_another_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "DATA", tmp_path)
    identities = []
    for value in ("4711", "4712"):
        write_domain(tmp_path, {"PIN": value})
        (cell,) = scenarios.cells(SuiteOptions(quick=True), lambda cell: {})
        identities.append(cell.identity)
    assert identities[0] != identities[1]


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"gate code": "4096", "vault code": "7731", "never": "ends with <eos>", "lamp code": "5520"}
    write_domain(tmp_path, rows)
    monkeypatch.setattr(scenarios, "DATA", tmp_path)


def test_a_tiny_cell_is_written_recalled_and_asked_for_what_it_does_not_know(base: Path, short: None) -> None:
    result = scenarios.run(scenarios.Cell("credentials", 4, "", "fast", 0, str(base), "cpu"))
    assert result["refused"] == {"never": "SpecialTokenInText"}
    assert (result["records"], result["written"], result["exact"]) == (4, 3, 3)
    assert (result["failed"], result["wrong"]) == ([], [])
    assert result["unknown"] == 3
    assert 0 <= result["unrouted"]["leaked"] <= 3
    assert result["base_alone"]["leaked"] == 0
    assert (result["adapters"], result["answer_tokens"]) == (1, 12)
    assert result["min_prob"] >= 0.6
    assert json.loads(json.dumps(result)) == result
    table = scenarios.table([{"cell": {"domain": "credentials", "seed": 0}, "result": result}])
    assert len(table.columns) == len(table.rows[0])


def test_a_value_that_is_decoded_wrong_is_scored_and_not_raised(
    base: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = scenarios._decode

    def but_one(store, template, batch, asked):
        answers = decode(store, template, batch, asked)
        return {key: "4069" if key == asked[key] == "gate code" else answer for key, answer in answers.items()}

    monkeypatch.setattr(scenarios, "_decode", but_one)
    result = scenarios.run(scenarios.Cell("credentials", 4, "", "fast", 0, str(base), "cpu"))
    assert result["exact"] == 2
    assert result["wrong"] == [{"key": "gate code", "edit_distance": 2, "first_wrong": 2}]


def test_where_nothing_can_be_certified_everything_counts_as_not_written(
    base: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramem import MemoryStore
    from loramem.errors import StubbornRecords

    def stubborn(self, records, **_):
        raise StubbornRecords("none", keys=[record.key for record in records], rank=128)

    monkeypatch.setattr(MemoryStore, "write", stubborn)
    result = scenarios.run(scenarios.Cell("credentials", 2, "", "fast", 0, str(base), "cpu"))
    assert (result["written"], result["exact"], result["failed"]) == (0, 0, ["gate code", "vault code"])
    line = {"cell": {"domain": "credentials", "seed": 0}, "result": result}
    table = scenarios.table([line])
    assert table.rows[0][5] == "0/0"
    assert len(table.columns) == len(table.rows[0])
    assert scenarios.plots([line]) == ()


# The table

LINE = {
    "cell": {"domain": "endpoints", "seed": 1},
    "result": {
        "records": 44, "refused": {"a": "NotRoundTrip"}, "failed": ["b", "c", "d"], "written": 40, "exact": 39,
        "wrong": [{"key": "e", "edit_distance": 2, "first_wrong": 17}], "answer_tokens": 1210, "ranks": [8, 12],
        "adapters": 2, "parameters": 123_456, "min_prob": 0.6612, "seconds": 12.34, "unknown": 40,
        "unrouted": {"leaked": 30, "others": 2, "similarity": 0.8712},
        "base_alone": {"leaked": 0, "others": 0, "similarity": 0.104},
    },
}  # fmt: skip


def test_the_table_has_a_row_per_domain_and_names_what_went_wrong() -> None:
    table = scenarios.table([LINE])
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row == {
        "domain": "endpoints", "seed": "1", "records": "44", "refused": "1", "written": "40", "exact": "39/40",
        "mean answer tokens": "30.2", "rank": "8–12", "adapters": "2", "parameters": "123,456", "lowest p": "0.661",
        "seconds": "12.3", "near misses unknown": "40/40", "leak, unrouted": "75%", "similarity, unrouted": "0.87",
        "leak, base alone": "0%", "similarity, base alone": "0.10",
    }  # fmt: skip
    assert table.notes[0] == (
        "39 of 40 written values exact; routed, 40 of 40 near misses are unknown keys; unrouted, 30 give the "
        "original's value and 2 another record's."
    )
    assert "one letter or digit changed" in table.notes[1]
    assert table.notes[2] == "endpoints: 'a' was refused (NotRoundTrip)."
    assert table.notes[-1] == "endpoints: 'e' was not decoded exactly (edit distance 2, first wrong character 17)."
    assert len(table.notes) == 2 + 1 + 3 + 1


def test_the_plot_sets_the_leak_beside_the_base_alone() -> None:
    (plot,) = scenarios.plots([LINE])
    assert plot.names == ("endpoints",)
    assert [(series.name, series.points[0].y) for series in plot.series] == [
        ("adapter attached by hand", 75.0),
        ("base alone", 0.0),
    ]
