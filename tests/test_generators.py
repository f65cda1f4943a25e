"""Records that are made up for measurements."""

import re

import pytest

from loramem.planning import samples


@pytest.mark.parametrize("kind", samples.KINDS)
def test_generated_records_are_seeded_and_distinct(kind: str) -> None:
    records = samples.generate(kind, 60, seed=3)
    assert records == samples.generate(kind, 60, seed=3)
    assert records != samples.generate(kind, 60, seed=4)
    assert len({record.key for record in records}) == len({record.value for record in records}) == 60


def test_phone_book_values_are_in_the_form_of_the_paper() -> None:
    for record in samples.generate("phonebook", 100):
        assert re.fullmatch(r"[6-9]\d{9}", record.value)
        assert re.fullmatch(r"\S+ \S+:", record.key)


def test_there_are_names_for_the_longest_phone_book_of_the_paper() -> None:
    records = samples.generate("phonebook", 8000)  # 32,000 tokens of four to a number
    assert len({record.key for record in records}) == 8000
    assert all(re.fullmatch(r"\S+ \S+:", record.key) for record in records)
