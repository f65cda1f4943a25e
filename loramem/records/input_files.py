"""Records of files: JSONL, JSON, CSV and TSV, with the line number of whatever is wrong."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from loramem.errors import InputError, InvalidField
from loramem.records.record import KEY, VALUE, Record, is_one_record, record_of_row, shown

FORMATS = ("jsonl", "json", "csv", "tsv")
ALIASES = {"ndjson": "jsonl"}
DELIMITERS = {"csv": ",", "tsv": "\t"}
LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field: what a C long holds everywhere. Python's own limit is 131,072."""
_SEP_LINE = re.compile(r'"?sep=([^\r\n])"?(\r\n|\r|\n|$)', re.IGNORECASE)
"""How Excel is told the delimiter, and tells it."""


def read_records(source: str | Path | BinaryIO, **options: Any) -> list[Record]:
    """`stream_records`, all of them; arguments and errors are its own."""
    return list(stream_records(source, **options))


def stream_records(
    source: str | Path | BinaryIO,
    *,
    format: str | None = None,
    delimiter: str | None = None,
    key_field: str = KEY,
    value_field: str = VALUE,
    namespace: str = "",
) -> Iterator[Record]:
    """Records of a JSONL, JSON, CSV or TSV file (UTF-8, a byte-order mark is allowed), as they are asked for.

    Of JSONL a line is in memory at a time, of other formats all. JSON may be one object key -> value, a list of
    objects, or one object with the fields of a record. What a row may look like is said at
    `loramem.records.record.record_of_row`.

    Args:
        source: A path, or an open binary stream such as ``sys.stdin.buffer``.
        format: One of `FORMATS`, or "ndjson", which is JSONL; by default the path's suffix, and "jsonl" for a stream.
        delimiter: Of CSV or TSV, one character; by default what a first line ``sep=;`` says, else comma or tab.
        namespace: For rows that name none.

    Raises:
        InputError: Unreadable file, unknown format, bytes that are not UTF-8, broken JSON or CSV.
        InvalidField, EmptyField: See `Record`, with the line number.
    """
    if isinstance(source, str | Path):
        source = Path(source)
        format = source.suffix.lstrip(".").lower() if format is None else format
    format = "jsonl" if format is None else ALIASES.get(format, format)
    if format not in FORMATS:
        raise InputError(f"Unknown input format {format!r}. Use one of {', '.join(FORMATS)} (--format).")
    if delimiter is not None:
        _check_delimiter(delimiter, format)
    if format in DELIMITERS:
        rows = _read_table(_text_of(source), format, delimiter)
    elif format == "json":
        rows = _read_json(_text_of(source), key_field, value_field)
    else:
        rows = _read_jsonl(source)
    for line, row in rows:
        if isinstance(row, tuple):  # an item of {key: value}: its fields have no names
            yield Record(row[0], row[1], namespace, line=line)
        else:
            yield record_of_row(row, key_field, value_field, namespace, line)


def _check_delimiter(delimiter: str, format: str) -> None:
    if format not in DELIMITERS:
        raise InputError(
            f"A delimiter ({delimiter!r}) is for CSV and TSV, and this input is {format.upper()}. Leave it out, or say "
            "what the input is with --format csv."
        )
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise InputError(f"The delimiter must be one character that is no quote and no line end, not {delimiter!r}.")


def _lines_of(source: Path | BinaryIO) -> Iterator[bytes]:
    r"""Lines as they are read, each with its \n."""
    name = source if isinstance(source, Path) else "the stream"
    try:
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as lines:
            for line in lines:
                if not isinstance(line, bytes):
                    raise InputError(
                        "Records are read from a binary stream: open the file with mode 'rb', or give its path."
                    )
                yield line
    except OSError as error:
        raise InputError(f"Cannot read {name}: {error.strerror}.") from None
    except ValueError as error:  # a name that holds NUL, a stream that was closed
        if isinstance(error, InputError):
            raise
        raise InputError(f"Cannot read {name}: {error}.") from None


def _text_of(source: Path | BinaryIO) -> str:
    return _decode(b"".join(_lines_of(source)))


def _decode(data: bytes, first: int = 1) -> str:
    """
    Args:
        first: Number of its first line; a byte-order mark is looked for in the first of all alone.
    """
    if first > 1:
        return _utf8(data, "utf-8", first)
    # Without a byte-order mark: no text of any of the formats has NUL so early in UTF-8.
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in data[:2]:
        raise InputError(
            "The input is UTF-16, such as Excel's Unicode text. Convert it to UTF-8 first (Excel: save as CSV UTF-8; "
            "iconv -f UTF-16 -t UTF-8)."
        )
    return _utf8(data, "utf-8-sig", 1)


def _utf8(data: bytes, encoding: str, first: int) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        decoded = error.object  # without the byte-order mark: error.start counts from behind it
        line = decoded.count(b"\n", 0, error.start) + first
        raise InputError(
            f"Line {line}: byte 0x{decoded[error.start]:02x} is not UTF-8. Convert the file to UTF-8 first."
        ) from None


def _read_jsonl(source: Path | BinaryIO) -> Iterator[tuple[int, Any]]:
    # Only \n ends a line of JSONL: str.splitlines would break at U+2028 inside a value.
    for number, content in enumerate(_lines_of(source), start=1):
        line = _decode(content, number)
        if line.strip():
            yield number, _parse_json(line.removesuffix("\n"), number)


def _read_json(text: str, key_field: str, value_field: str) -> Iterator[tuple[int, Any]]:
    data = _parse_json(text, None) if text.strip() else []
    if isinstance(data, dict):
        data = [data] if is_one_record(data, key_field, value_field) else list(data.items())
    if not isinstance(data, list):
        raise InputError("A JSON input must be an object {key: value} or a list of objects.")
    yield from enumerate(data, start=1)


def _parse_json(text: str, line: int | None) -> Any:
    where = f"Line {line}: " if line else ""
    try:
        return _decoder.decode(text)
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


_decoder = json.JSONDecoder(object_pairs_hook=_refuse_repeated)  # made once: `json.loads` makes one a call


def _first_repeated(names: Sequence[str]) -> str:
    seen = set[str]()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _read_table(text: str, format: str, delimiter: str | None) -> Iterator[tuple[int, Any]]:
    """Rows by column name. Columns without a name and rows without content are left out: Excel adds both at will."""
    # For the whole process, since csv has no other; never lowered, so that whoever wants a larger one keeps it.
    csv.field_size_limit(max(LONGEST_FIELD, csv.field_size_limit()))
    before = 0
    if said := _SEP_LINE.match(text):
        if delimiter not in (None, said[1]):
            raise InputError(f"Line 1: the input says sep={said[1]}, and the delimiter {delimiter!r} was given.")
        delimiter, text, before = said[1], text[said.end() :], 1
        _check_delimiter(delimiter, format)
    delimiter = delimiter or DELIMITERS[format]
    # Not csv.DictReader: it numbers rows by their last line, and keeps the last of two columns of one name.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        line = before + reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"Line {line}: not {format.upper()} ({error}).") from None
        if row is None:
            return
        if not any(row):  # a blank line, or delimiters alone
            continue
        if not names:
            names = row
            _check_names(names, delimiter, line)
        else:
            yield line, _by_name(row, names, line)


def _check_names(names: Sequence[str], delimiter: str, line: int) -> None:
    """Refuse a header that cannot be meant."""
    named = [name for name in names if name]
    if len(set(named)) != len(named):
        raise InputError(f"Line {line}: a column is named {_first_repeated(named)!r} twice.")
    if len(named) == 1:
        inside = next((other for other in ";\t|," if other != delimiter and other in named[0]), None)
        if inside:
            raise InputError(
                f"Line {line}: there is one column, {shown(named[0])}, whose name holds {inside!r}. If that is the "
                f"delimiter, say so: --delimiter {'tab' if inside == chr(9) else repr(inside)}."
            )


def _by_name(row: list[str], names: Sequence[str], line: int) -> dict[str, str]:
    last = max(place for place, name in enumerate(names) if name)
    if len(row) <= last or any(row[len(names) :]):
        listed = ", ".join(repr(name)[1:-1] for name in names if name)
        raise InvalidField(
            f"{last + 1} columns expected ({listed}), not {len(row)}; quote values that hold the delimiter.", line=line
        )
    for place, (name, cell) in enumerate(zip(names, row, strict=False), start=1):
        if cell and not name:
            raise InvalidField(
                f"Column {place} has {shown(cell)} and no name. Name it in the header, or remove it (pandas: "
                "index=False).",
                line=line,
            )
    return {name: cell for name, cell in zip(names, row, strict=False) if name}
