"""Rows of the journal: the records of a write that is not finished, as many in a row as make it worth its seal."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loramem.records.record import Record, journal_fields, journalled

ROW_CHARACTERS = 8_192
"""Of JSON: some seventy short records, whose row then costs less than they do. A longer record has one to itself."""


def journal_rows(write: int, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Rows of a write's records, in their order."""
    texts, size, number = list[str](), 0, 0
    for record in records:
        text = json.dumps(journal_fields(record))
        if texts and size + len(text) > ROW_CHARACTERS:
            yield _row(write, number, texts)
            texts, size, number = [], 0, number + 1
        texts.append(text)
        size += len(text)
    if texts:
        yield _row(write, number, texts)


def _row(write: int, number: int, texts: Iterable[str]) -> dict[str, Any]:
    return {"write": write, "number": number, "record": f"[{', '.join(texts)}]"}


def journalled_in(row: Mapping[str, Any]) -> list[Record]:
    """The records of a row; older versions had one in each."""
    held = json.loads(row["record"])
    return [journalled(fields) for fields in (held if isinstance(held, list) else [held])]
