"""Inputs as others make them: Excel's tables, rows of trainers, listings of ours; each read exactly or refused."""

import codecs
import csv
import io
import json
import re
from pathlib import Path

import pytest

from loramem import MemoryStore
from loramem.errors import EmptyField, InputError, InvalidField
from loramem.records.input_files import read_records
from loramem.records.record import METADATA_DEPTH, Record, as_records, journalled


def read(text: str | bytes, format: str | None = None, **given: str) -> list[Record]:
    return read_records(io.BytesIO(text.encode() if isinstance(text, str) else text), format=format, **given)


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


# --- delimiters, Excel


@pytest.mark.parametrize("delimiter", [";", "|", "\t", " ", "\u2502"])
def test_a_delimiter_can_be_given(delimiter: str) -> None:
    assert read(f'key{delimiter}value\na{delimiter}1,5\nb{delimiter}"x{delimiter}y"\n', "csv", delimiter=delimiter) == [
        Record("a", "1,5"),
        Record("b", f"x{delimiter}y"),
    ]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("first", ["sep=;\n", "sep=;\r\n", "SEP=;\r", '"sep=;"\n'])
def test_the_delimiter_of_a_first_line_sep_is_taken_and_lines_still_count_it(mark: str, first: str) -> None:
    records = read(f"{mark}{first}key;value\na;1,5\n", "csv")
    assert (records, records[0].line) == ([Record("a", "1,5")], 3)
    assert read(f"{mark}{first}key;value\na;1,5\n", "csv", delimiter=";") == records


def test_a_delimiter_that_contradicts_the_first_line_is_refused() -> None:
    with pytest.raises(InputError, match=r"^Line 1: .*sep=;.*','"):
        read("sep=;\nkey;value\na;1\n", "csv", delimiter=",")


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n", "\r", "\0"])
def test_a_delimiter_that_cannot_be_one_is_refused(delimiter: str) -> None:
    with pytest.raises(InputError, match="one character"):
        read("key,value\n", "csv", delimiter=delimiter)


@pytest.mark.parametrize("format", [None, "jsonl", "json", "ndjson"])
def test_a_delimiter_of_json_is_refused(format: str | None) -> None:
    with pytest.raises(InputError, match="--format csv"):
        read(jsonl({"key": "a", "value": "1"}), format, delimiter=";")


@pytest.mark.parametrize(
    ("text", "format", "remedy"),
    [
        ("key;value\na;1\n", "csv", "--delimiter ';'"),
        ("key;value\na;1,5\n", "csv", "--delimiter ';'"),
        ("key\tvalue\na\t1\n", "csv", "--delimiter tab"),
        ("key,value\na,1\n", "tsv", "--delimiter ','"),
    ],
)
def test_a_wrong_delimiter_is_named_with_the_one_that_it_seems_to_be(text: str, format: str, remedy: str) -> None:
    with pytest.raises(InputError, match=rf"^Line 1: .*{re.escape(remedy)}"):
        read(text, format)


def test_empty_columns_and_rows_at_the_end_of_a_sheet_are_left_out() -> None:
    records = read("key,value,,\r\na,1,,\r\n,,,\r\nb,2\r\nc,3,,,,\r\n,,,\r\n", "csv")
    assert records == [Record("a", "1"), Record("b", "2"), Record("c", "3")]
    assert [record.line for record in records] == [2, 4, 5]
    assert [record.metadata for record in records] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("text", "line"),
    [("key,value,,\na,1,,\nb,2,,x\n", 3), (",key,value\n0,a,1\n", 2), ("key,,value\na,,1\nb,c,2\n", 3)],
)
def test_a_cell_under_a_column_without_a_name_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(InvalidField, match="no name") as caught:
        read(text, "csv")
    assert caught.value.line == line


@pytest.mark.parametrize("row", ["a,1,x", "a"])
def test_a_row_of_other_width_is_still_refused(row: str) -> None:
    with pytest.raises(InvalidField, match=r"2 columns expected \(key, value\)"):
        read(f"key,value\n{row}\n", "csv")


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF16_LE])
@pytest.mark.parametrize("format", ["csv", "tsv", "json", "jsonl"])
def test_utf_16_is_said_to_be_it(mark: bytes, format: str) -> None:
    with pytest.raises(InputError, match=r"UTF-16.*UTF-8"):
        read(mark + "key\tvalue\r\na\t1\r\n".encode("utf-16-le"), format)
    with pytest.raises(InputError, match="UTF-16"):
        read("key,value\n".encode("utf-16-be"), format)


def test_a_field_of_csv_may_be_longer_than_128_kib() -> None:
    long = "x" * (2 << 17)
    assert read(f"key,value\na,{long}\n", "csv") == [Record("a", long)]
    csv.field_size_limit(131_072)  # as another library in the process may set it
    assert read(f"key,value\na,{long}\n", "csv") == [Record("a", long)]


def test_ndjson_is_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "facts.ndjson"
    path.write_text('{"key": "a", "value": "1"}\n')
    assert read_records(path) == read_records(str(path)) == [Record("a", "1")]
    assert read(path.read_bytes(), "ndjson") == [Record("a", "1")]


@pytest.mark.parametrize(
    ("format", "text"), [("csv", "key,value\n"), ("csv", ",,\n,,\n"), ("csv", "sep=;\n"), ("json", ""), ("tsv", "\n")]
)
def test_a_header_alone_holds_no_records(format: str, text: str) -> None:
    assert read(text, format) == []


def test_a_source_that_gives_no_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="binary"):
        read_records(io.StringIO("{}"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Cannot read"):
        read_records(tmp_path / "a\0b.csv")


# --- one object as a file


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"key": "a", "value": "1"}, {}),
        ({"value": "1", "key": "a", "namespace": ""}, {}),
        ({"key": "a", "value": "1", "metadata": {}}, {}),
        ({"query": "a", "target": "1"}, {"key_field": "query", "value_field": "target"}),
        ({"prompt": "a", "completion": "1"}, {}),
        ({"messages": [user("a"), assistant("1")]}, {}),
    ],
)
def test_one_object_with_the_fields_of_a_record_is_one_record(row: dict[str, object], names: dict[str, str]) -> None:
    assert read(json.dumps(row), "json", **names) == [Record("a", "1")]


def test_one_object_with_further_fields_that_are_no_strings_is_one_record() -> None:
    assert read('{"key": "a", "value": "1", "page": 3}', "json") == [Record("a", "1", metadata={"page": 3})]


@pytest.mark.parametrize(
    "mapping", [{"key": "1"}, {"value": "1", "b": "2"}, {"prompt": "x", "b": "2"}, {"messages": "1", "b": "2"}]
)
def test_other_objects_are_mappings(mapping: dict[str, str]) -> None:
    assert [(record.key, record.value) for record in read(json.dumps(mapping), "json")] == list(mapping.items())
    assert [(record.key, record.value) for record in as_records(mapping)] == list(mapping.items())


def test_an_object_that_may_be_a_record_or_a_mapping_is_refused() -> None:
    with pytest.raises(InputError, match="'key' and 'value' beside 'b'"):
        read('{"key": "a", "value": "1", "b": "2"}', "json")
    assert len(read('[{"key": "key", "value": "a"}, {"key": "value", "value": "1"}]', "json")) == 2


@pytest.mark.parametrize("row", [{"key": "a", "value": "1"}, {"prompt": "a", "completion": "1"}])
def test_a_dict_that_looks_like_one_record_is_refused_with_both_spellings(row: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r'\[\{"key".*\[\("key"'):
        as_records(row)
    assert as_records([row]) == [Record("a", "1")]
    assert len(as_records(row.items())) == 2


# --- rows of trainers


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("a"), assistant("1")]},
        {"messages": [user([{"type": "text", "text": "a"}]), assistant([{"type": "text", "text": "1"}])]},
        {"messages": [user("a"), {**assistant("1"), "tool_calls": None, "refusal": None}]},
        {"prompt": "a", "completion": "1"},
        {"prompt": [user("a")], "completion": [assistant("1")]},
        {"prompt": [user("a")], "completion": "1"},
    ],
)
def test_rows_of_trainers_are_records(row: dict[str, object]) -> None:
    [record] = read(jsonl({**row, "source": "book", "namespace": "n"}))
    assert record == Record("a", "1", "n", {"source": "book"})
    assert as_records([row]) == [Record("a", "1")]


def test_columns_of_trainers_are_records() -> None:
    assert read("prompt,completion\na,1\n", "csv") == [Record("a", "1")]


def test_a_chat_beside_a_prompt_is_the_record() -> None:
    assert read(jsonl({"prompt": "p", "messages": [user("a"), assistant("1")]})) == [
        Record("a", "1", metadata={"prompt": "p"})
    ]


def test_named_fields_win_over_those_of_trainers() -> None:
    row = {"messages": [user("x"), assistant("y")], "key": "a", "value": "1"}
    assert read(jsonl(row))[0].key == "a"
    row = {"prompt": "x", "completion": "y", "query": "a", "target": "1"}
    assert read(jsonl(row), key_field="query", value_field="target")[0].key == "a"
    assert read(jsonl(row), key_field="prompt", value_field="target")[0].key == "x"
    with pytest.raises(InvalidField, match="No field 'q'"):
        read(jsonl(row), key_field="q", value_field="target")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "a",
        [user("a")],
        [assistant("1"), user("a")],
        [{"role": "system", "content": "s"}, user("a"), assistant("1")],
        [user("a"), assistant("1"), user("b"), assistant("2")],
        [user("a"), {"role": ["x"], "content": "1"}],
        [user("a"), "1"],
        [user(None), assistant("1")],
        [user("a"), {"role": "assistant"}],
        [user([{"type": "image"}]), assistant("1")],
        [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant("1")],
        [user([{"type": "text"}]), assistant("1")],
        [user("a"), {**assistant("1"), "tool_calls": [{"id": 1}]}],
    ],
)
def test_a_chat_that_is_no_record_is_refused_with_its_line(messages: object) -> None:
    with pytest.raises(InvalidField) as caught:
        read(jsonl({"key": "a", "value": "1"}, {"messages": messages}))
    assert caught.value.line == 2


def test_a_system_message_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidField, match=r"'system', 'user', 'assistant'.*one user message"):
        read(jsonl({"messages": [{"role": "system", "content": "s"}, user("a"), assistant("1")]}))
    with pytest.raises(EmptyField):
        read(jsonl({"messages": [user("a"), assistant("")]}))


# --- namespaces


def test_a_row_names_its_namespace() -> None:
    rows = [{"key": "a", "value": "1", "namespace": name} for name in ("x", "", None)]
    assert [record.namespace for record in read(jsonl(*rows))] == ["x", "", ""]
    assert [record.namespace for record in read(jsonl(*rows), namespace="x")] == ["x", "x", "x"]
    assert not any(record.metadata for record in read(jsonl(*rows)))
    assert read("key,value,namespace\na,1,x\nb,2,\n", "csv") == [Record("a", "1", "x"), Record("b", "2")]
    assert as_records(rows[:1]) == [Record("a", "1", "x")]


def test_a_row_of_another_namespace_than_the_one_given_is_refused() -> None:
    with pytest.raises(InvalidField, match=r"^Line 1: .*'x'.*'y'.*--namespace"):
        read(jsonl({"key": "a", "value": "1", "namespace": "x"}), namespace="y")


@pytest.mark.parametrize("name", [3, ["x"], True, "\ud800"])
def test_a_namespace_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(InvalidField, match="namespace"):
        read(jsonl({"key": "a", "value": "1", "namespace": name}))


# --- metadata


@pytest.mark.parametrize(
    "metadata",
    [{"a": "\ud800"}, {"\udfff": 1}, {"a": {"b": ["x", "\ud83d"]}}, {"a": {"\ud800": 1}}, {"a": ("\ud800",)}],
)
def test_a_lone_surrogate_anywhere_in_metadata_is_refused(metadata: dict[str, object]) -> None:
    with pytest.raises(InvalidField, match="metadata of key 'k' holds a lone surrogate") as caught:
        Record("k", "v", metadata=metadata)
    assert caught.value.key == "k"
    with pytest.raises(InvalidField, match=r"^Line 1: "):
        read(jsonl({"key": "k", "value": "v", "metadata": metadata}))


@pytest.mark.parametrize("metadata", [{1: "a"}, {None: 1}, {"a": {True: 1}}, {"a": [{1.5: 2}]}])
def test_a_name_in_metadata_that_is_no_string_is_refused(metadata: dict[object, object]) -> None:
    with pytest.raises(InvalidField, match="no string"):
        Record("k", "v", metadata=metadata)  # type: ignore[arg-type]


def nested(depth: int) -> dict[str, object]:
    return {"a": nested(depth - 1)} if depth else {}


def test_metadata_nest_as_deep_as_every_reader_takes_them() -> None:
    assert Record("k", "v", metadata=nested(METADATA_DEPTH - 1))
    endless: list[object] = []
    endless.append(endless)
    for metadata in (nested(METADATA_DEPTH), nested(900), {"a": endless}):
        with pytest.raises(InvalidField, match="nested"):
            Record("k", "v", metadata=metadata)


def test_metadata_that_are_no_json_are_refused() -> None:
    for metadata in ({"a": float("nan")}, {"a": {1}}, 3, None, {"a": 10**5000}):
        with pytest.raises(InvalidField, match="not JSON"):
            Record("k", "v", metadata=metadata)  # type: ignore[arg-type]


def test_a_journal_of_an_older_version_with_a_lone_surrogate_is_read_with_its_escape() -> None:
    fields = {"key": "k", "value": "v", "namespace": "", "metadata": {"\ud800": ["a\udfff", 1]}}
    assert journalled(fields) == Record("k", "v", metadata={"\\ud800": ["a\\udfff", 1]})


# --- nothing to write


def test_writing_nothing_claims_nothing(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", str(base)) as store:
        report = store.write([])
    assert (report.written, report.skipped, report.exact_match, report.min_prob) == (0, 0, None, None)
