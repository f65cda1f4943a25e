"""Records: what is written, and how they are read from files and Python objects.

Everything that can be said about a record without a tokenizer is checked here, with the line number.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from loramem.errors import ConflictingRecord, EmptyField, InputError, InvalidField

FORMATS = ("jsonl", "json", "csv", "tsv")


@dataclass(frozen=True)
class Record:
    """One fact: ``value`` is what decoding must give, verbatim, for ``key``.

    Args:
        key: Any non-empty text; unique within its namespace.
        value: Any non-empty text.
        namespace: Separate recall spaces; the same key may exist in each.
        metadata: JSON-able facts kept in the index beside the record; never trained.
        line: Where the record stood in its input (1-based), for error messages.

    Raises:
        InvalidField: A field is not a string, or not encodable as UTF-8 (a lone surrogate); metadata is not JSON.
        EmptyField: Key or value is empty.
    """

    key: str
    value: str
    namespace: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("key", "value", "namespace"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise InvalidField(
                    f"The {name} must be a string, not {type(text).__name__} ({text!r}). "
                    "Quote it: a number's spelling is not kept otherwise.",
                    line=self.line,
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidField(
                    f"The {name} {text!r} holds a lone surrogate at character {error.start}, which UTF-8 cannot hold.",
                    line=self.line,
                ) from None
        try:
            json.dumps(dict(self.metadata), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidField(
                f"The metadata of key {self.key!r} is not JSON ({error}).", key=self.key, line=self.line
            ) from None
        if not self.key:
            raise EmptyField("The key is empty.", key=self.key, line=self.line)
        if not self.value:
            raise EmptyField(f"The value of key {self.key!r} is empty.", key=self.key, line=self.line)


RecordLike = Record | Mapping[str, Any] | tuple[str, str]


def as_records(source: Mapping[str, str] | Iterable[RecordLike], namespace: str = "") -> list[Record]:
    """Records from a mapping key -> value, or an iterable of Records, pairs or dicts with "key" and "value".

    A single dict is a mapping: ``[{"key": ..., "value": ...}]`` is one record, without the brackets it is two.

    Raises:
        InvalidField, EmptyField: See `Record`; an entry's position counts as its line.
    """
    if isinstance(source, Mapping):
        source = list(source.items())
    return [_as_record(entry, namespace, line) for line, entry in enumerate(source, start=1)]


def _as_record(entry: RecordLike, namespace: str, line: int) -> Record:
    if isinstance(entry, Record):
        return entry
    if isinstance(entry, Mapping):
        return _from_fields(entry, "key", "value", namespace, line)
    if isinstance(entry, tuple | list) and len(entry) == 2:
        return Record(entry[0], entry[1], namespace, line=line)
    raise InvalidField(f"Expected a Record, a (key, value) pair or a dict, got {entry!r}.", line=line)


def read_records(
    source: Path | BinaryIO,
    *,
    format: str | None = None,
    key_field: str = "key",
    value_field: str = "value",
    namespace: str = "",
) -> list[Record]:
    """Records of a JSONL, JSON, CSV or TSV file (UTF-8, a byte-order mark is allowed).

    JSON may be one object key -> value, or a list of objects. Fields other than key, value and "metadata" become
    metadata.

    Args:
        source: A path, or an open binary stream such as ``sys.stdin.buffer``.
        format: One of `FORMATS`; by default the path's suffix, and "jsonl" for a stream.

    Raises:
        InputError: Unreadable file, unknown format, bytes that are not UTF-8, broken JSON.
        InvalidField, EmptyField: See `Record`, with the line number.
    """
    if isinstance(source, Path):
        format = format or source.suffix.lstrip(".").lower()
        try:
            data = source.read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read {source}: {error.strerror}.") from None
    else:
        format = format or "jsonl"
        data = source.read()
    if format not in FORMATS:
        raise InputError(f"Unknown input format {format!r}. Use one of {', '.join(FORMATS)} (--format).")
    text = _decode(data)
    readers = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_table, "tsv": _read_table}
    rows = readers[format](text, format)
    return [
        Record(row[0], row[1], namespace, line=line)  # an item of {key: value}: its fields have no names
        if isinstance(row, tuple)
        else _from_fields(row, key_field, value_field, namespace, line)
        for line, row in rows
    ]


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        decoded = error.object  # without the byte-order mark: error.start counts from behind it
        line = decoded.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"Line {line}: byte 0x{decoded[error.start]:02x} is not UTF-8. Convert the file to UTF-8 first."
        ) from None


def _read_jsonl(text: str, _format: str) -> Iterator[tuple[int, Any]]:
    # Only \n ends a line of JSONL: str.splitlines would break at U+2028 inside a value.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse_json(line, number)


def _read_json(text: str, _format: str) -> Iterator[tuple[int, Any]]:
    data = _parse_json(text, None)
    if isinstance(data, dict):
        data = list(data.items())
    if not isinstance(data, list):
        raise InputError("A JSON input must be an object {key: value} or a list of objects.")
    yield from enumerate(data, start=1)


def _parse_json(text: str, line: int | None) -> Any:
    where = f"Line {line}: " if line else ""
    try:
        return json.loads(text, object_pairs_hook=_refuse_repeated)
    except json.JSONDecodeError as error:
        raise InputError(f"Line {line or error.lineno}: not JSON ({error.msg} at column {error.colno}).") from None
    except _RepeatedName as error:
        raise InputError(f"{where}A JSON object holds the name {error.args[0]!r} twice. Give each key once.") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested too deep
        raise InputError(f"{where}not JSON that Python reads ({error}).") from None


class _RepeatedName(Exception):
    """`json` alone would keep the last of two equal names and lose the first silently."""


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedName(_first_repeated([name for name, _ in pairs]))
    return found


def _first_repeated(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _read_table(text: str, format: str) -> Iterator[tuple[int, Any]]:
    # Not csv.DictReader: it numbers rows by their last line, and keeps the last of two columns of one name.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if format == "tsv" else ",", strict=True)
    names: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"Line {line}: not {format.upper()} ({error}).") from None
        if row is None:
            return
        if not row:  # a blank line
            continue
        if not names:
            names = row
            if len(set(names)) != len(names):
                raise InputError(f"Line {line}: a column is named {_first_repeated(names)!r} twice.")
        elif len(row) != len(names):
            raise InvalidField(
                f"{len(names)} columns expected ({', '.join(names)}), not {len(row)}; quote values that hold the "
                "delimiter.",
                line=line,
            )
        else:
            yield line, dict(zip(names, row, strict=True))


def _from_fields(row: Any, key_field: str, value_field: str, namespace: str, line: int) -> Record:
    if not isinstance(row, Mapping):
        raise InvalidField(f"Expected an object with {key_field!r} and {value_field!r}, got {row!r}.", line=line)
    missing = [name for name in (key_field, value_field) if name not in row]
    if missing:
        raise InvalidField(
            f"No field {missing[0]!r}; there are {', '.join(map(repr, row)) or 'none'}. "
            "Name them with --key-field and --value-field.",
            line=line,
        )
    others = {name: value for name, value in row.items() if name not in (key_field, value_field)}
    metadata = others.pop("metadata", None) or {}
    if not isinstance(metadata, Mapping):
        raise InvalidField(f"The field 'metadata' must be an object, not {metadata!r}.", line=line)
    metadata = {**metadata, **others}
    return Record(row[key_field], row[value_field], namespace, metadata, line)


def deduplicate(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Split into records to write and exact repetitions of an earlier one.

    Raises:
        ConflictingRecord: The same key comes twice with different values.
    """
    first: dict[tuple[str, str], Record] = {}
    repeated = []
    for record in records:
        known = first.get((record.namespace, record.key))
        if known is None:
            first[record.namespace, record.key] = record
            continue
        if known.value != record.value:
            raise ConflictingRecord(
                f"Key {record.key!r} was given before (line {known.line}) with another value: "
                f"{known.value!r}, now {record.value!r}.",
                key=record.key,
                line=record.line,
            )
        repeated.append(record)
    return list(first.values()), repeated
