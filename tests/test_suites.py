"""The measurements: their records, one tiny cell, and resuming."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from loramem import generators
from loramem.errors import RecallError
from loramem.suites import writing


@pytest.mark.parametrize("kind", generators.KINDS)
def test_generated_records_are_seeded_and_distinct(kind: str) -> None:
    records = generators.generate(kind, 60, seed=3)
    assert records == generators.generate(kind, 60, seed=3)
    assert records != generators.generate(kind, 60, seed=4)
    assert len({record.key for record in records}) == len({record.value for record in records}) == 60


def test_phone_book_values_are_in_the_form_of_the_paper() -> None:
    for record in generators.generate("phonebook", 100):
        assert re.fullmatch(r"[6-9]\d{9}", record.value)
        assert re.fullmatch(r"\S+ \S+:", record.key)


def test_there_are_names_for_the_longest_phone_book_of_the_paper() -> None:
    records = generators.generate("phonebook", 8000)  # 32,000 tokens of four to a number
    assert len({record.key for record in records}) == 8000
    assert all(re.fullmatch(r"\S+ \S+:", record.key) for record in records)


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    def cells(base):
        yield writing.default_cell(base, "tiny", "three numbers", "phonebook", 3, 8, batch_records=3)

    monkeypatch.setitem(writing.SUITES, "placement", cells)


def run(results: Path) -> str:
    done = CliRunner().invoke(writing.main, ["placement", "--results", str(results)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_a_cell_is_proved_written_down_and_never_run_again(tiny_suite, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    table = run(results)
    (line,) = map(json.loads, results.read_text().splitlines())
    assert (line["certified"], line["exact"], line["records"]) == (3, 3, 3)
    assert line["conditions"]["dtype"] == "float32"
    assert "three numbers" in table
    assert run(results) == table
    assert len(results.read_text().splitlines()) == 1


def test_a_certified_record_that_is_not_decoded_stops_the_measurement(tiny_suite, tmp_path: Path, monkeypatch) -> None:
    def wrong(model, records, batches):
        return ((index, [0]) for batch in batches for index in batch)

    monkeypatch.setattr(writing, "decode_records", wrong)
    with pytest.raises(RecallError, match="was not decoded"):
        run(tmp_path / "results.jsonl")
