"""Records are read exactly as they were given, or refused with a typed error that names the line."""

import csv
import io
import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramem.errors import ConflictingRecord, EmptyField, InputError, InvalidField, LoramemError
from loramem.records.input_files import read_records
from loramem.records.record import Record, as_records, deduplicate

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
ROW = {"key": "b", "value": "c"}


def read(text: str | bytes, format: str | None = None, **names: str) -> list[Record]:
    return read_records(io.BytesIO(text.encode() if isinstance(text, str) else text), format=format, **names)


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pairs(records: list[Record]) -> list[tuple[str, str]]:
    return [(record.key, record.value) for record in records]


# --- formats


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("jsonl", '{"key": "a", "value": "1"}\n{"key": "b", "value": "2"}\n'),
        ("jsonl", '{"key": "a", "value": "1"}\r\n\r\n  \n{"value": "2", "key": "b"}'),
        ("json", '{"a": "1",\n "b": "2"}'),
        ("json", '[{"key": "a", "value": "1"}, {"key": "b", "value": "2"}]'),
        ("csv", "key,value\na,1\nb,2\n"),
        ("csv", 'value,key\r\n"1","a"\r\n"2","b"'),
        ("tsv", "key\tvalue\na\t1\nb\t2\n"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_each_format_gives_the_same_records_with_and_without_a_byte_order_mark(
    format: str, text: str, mark: str
) -> None:
    assert read(mark + text, format) == [Record("a", "1"), Record("b", "2")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("facts.jsonl", jsonl({"key": "a", "value": "1"})),
        ("facts.JSON", '{"a": "1"}'),
        ("facts.csv", "key,value\na,1\n"),
        ("facts.Tsv", "key\tvalue\na\t1\n"),
    ],
)
def test_the_suffix_of_a_path_gives_the_format(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert read_records(path) == [Record("a", "1")]


def test_a_given_format_overrides_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "facts.txt"
    path.write_text("key,value\na,1\n")
    assert read_records(path, format="csv") == [Record("a", "1")]


def test_a_stream_is_jsonl_unless_a_format_is_given() -> None:
    assert read('{"key": "a", "value": "1"}\n') == [Record("a", "1")]
    assert read("key,value\na,1\n", "csv") == [Record("a", "1")]


@pytest.mark.parametrize(
    ("format", "text"), [("jsonl", ""), ("jsonl", "\n \n"), ("json", "[]"), ("json", "{}"), ("csv", "")]
)
def test_an_empty_input_gives_no_records(format: str, text: str) -> None:
    assert read(text, format) == []


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_only_a_line_feed_ends_a_line_of_jsonl(separator: str) -> None:
    rows = [{"key": f"a{separator}", "value": f"x{separator}y"}, {"key": "b", "value": "z"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if separator < " ":  # JSON wants control characters escaped
        text = "\n".join(json.dumps(row) for row in rows)
    records = read(text)
    assert pairs(records) == [(f"a{separator}", f"x{separator}y"), ("b", "z")]
    assert [record.line for record in records] == [1, 2]


@pytest.mark.parametrize(
    "value", [" lead and trail \t", "\n", "00912", "é vs e\u0301", '"quoted", and\r\nbroken', "😀"]
)
@pytest.mark.parametrize("format", ["jsonl", "json", "csv", "tsv"])
def test_values_are_kept_to_the_character(format: str, value: str) -> None:
    if format.startswith("json"):
        text = json.dumps({"key": "k", "value": value}) if format == "jsonl" else json.dumps({"k": value})
    else:
        out = io.StringIO()
        csv.writer(out, delimiter="\t" if format == "tsv" else ",").writerows([["key", "value"], ["k", value]])
        text = out.getvalue()
    assert read(text, format) == [Record("k", value)]


# --- fields


def test_other_fields_become_metadata_beside_the_metadata_field() -> None:
    row = {"key": "a", "value": "1", "source": "book", "page": 3, "metadata": {"seen": True}}
    [record] = read(jsonl(row))
    assert record.metadata == {"seen": True, "source": "book", "page": 3}


def test_other_columns_become_metadata() -> None:
    [record] = read("id,key,value\n7,a,1\n", "csv")
    assert (record.key, record.value, record.metadata) == ("a", "1", {"id": "7"})


@pytest.mark.parametrize("metadata", [None, {}])
def test_an_empty_metadata_field_adds_nothing(metadata: object) -> None:
    [record] = read(jsonl({"key": "a", "value": "1", "metadata": metadata}))
    assert record.metadata == {}


def test_key_and_value_field_names_can_be_given() -> None:
    row = {"query": "Jerry:", "target": "91006", "key": "other", "id": 4}
    [record] = read(jsonl(row), key_field="query", value_field="target")
    assert record == Record("Jerry:", "91006", metadata={"key": "other", "id": 4})


def test_the_namespace_goes_to_every_record() -> None:
    text = jsonl({"key": "a", "value": "1"}, {"key": "b", "value": "2"})
    assert {record.namespace for record in read(text, namespace="phones")} == {"phones"}
    assert read('{"a": "1"}', "json", namespace="phones") == [Record("a", "1", "phones")]


def test_lines_count_blank_ones() -> None:
    assert [record.line for record in read("\n" + jsonl(ROW) + "\n" + jsonl(ROW))] == [2, 4]
    assert [record.line for record in read("key,value\na,1\n\nb,2\n", "csv")] == [2, 4]


def test_entries_of_a_json_file_are_numbered_by_position() -> None:
    assert [
        record.line for record in read('[\n\n{"key": "a", "value": "1"},\n{"key": "b", "value": "2"}]', "json")
    ] == [
        1,
        2,
    ]


def test_a_line_number_is_no_part_of_a_records_identity() -> None:
    assert Record("a", "1", line=1) == Record("a", "1", line=2)
    with pytest.raises(FrozenInstanceError):
        Record("a", "1").value = "2"


# --- refusals of one record


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"key": "", "value": "x"}, EmptyField),
        ({"key": "x", "value": ""}, EmptyField),
        ({"key": "x"}, InvalidField),
        ({"value": "x"}, InvalidField),
        ({}, InvalidField),
        ({"key": "x", "value": 912}, InvalidField),
        ({"key": 912, "value": "x"}, InvalidField),
        ({"key": "x", "value": None}, InvalidField),
        ({"key": "x", "value": True}, InvalidField),
        ({"key": "x", "value": ["y"]}, InvalidField),
        ({"key": "x", "value": "\ud800"}, InvalidField),
        ({"key": "a\udfffb", "value": "x"}, InvalidField),
        (["x", "y"], InvalidField),
        ("x", InvalidField),
        (912, InvalidField),
        (None, InvalidField),
    ],
)
def test_a_bad_row_of_jsonl_is_refused_with_its_line(row: object, error: type[LoramemError]) -> None:
    text = jsonl({"key": "a", "value": "1"}) + "\n" + jsonl(row, ROW)
    with pytest.raises(error, match=r"^Line 3: ") as caught:
        read(text)
    assert type(caught.value) is error
    assert caught.value.line == 3


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (",x", EmptyField),
        ("x,", EmptyField),
        ("x", InvalidField),
        ("x,y,z", InvalidField),
        ("x,y,z,", InvalidField),
    ],
)
def test_a_bad_row_of_csv_is_refused_with_its_line(row: str, error: type[LoramemError]) -> None:
    with pytest.raises(error, match=r"^Line 3: ") as caught:
        read(f"key,value\na,1\n{row}\nb,2\n", "csv")
    assert type(caught.value) is error
    assert caught.value.line == 3


@pytest.mark.parametrize(
    ("text", "error", "line"),
    [
        ('{"a": "1", "b": ""}', EmptyField, 2),
        ('{"": "1"}', EmptyField, 1),
        ('{"a": "1", "b": 2}', InvalidField, 2),
        ('[{"key": "a", "value": "1"}, ["b", "2"]]', InvalidField, 2),
    ],
)
def test_a_bad_entry_of_json_is_refused_with_its_position(text: str, error: type[LoramemError], line: int) -> None:
    with pytest.raises(error) as caught:
        read(text, "json")
    assert (type(caught.value), caught.value.line) == (error, line)


def test_a_lone_surrogate_in_a_namespace_is_refused() -> None:
    with pytest.raises(InvalidField, match="namespace"):
        Record("a", "1", "\ud800")


def test_an_empty_value_names_its_key() -> None:
    with pytest.raises(EmptyField, match="'x'") as caught:
        read(jsonl({"key": "x", "value": ""}))
    assert caught.value.key == "x"


def test_a_missing_field_is_named_beside_those_that_are_there() -> None:
    with pytest.raises(InvalidField, match=r"No field 'value'; there are 'query', 'key'\..*--value-field"):
        read(jsonl({"query": "a", "key": "b"}))


def test_blanks_are_text() -> None:
    assert read(jsonl({"key": " ", "value": "\n"})) == [Record(" ", "\n")]


# --- refusals of the whole input


@pytest.mark.parametrize("format", ["jsonl", "json", "csv", "tsv"])
def test_bytes_that_are_not_utf_8_are_refused_with_their_line_and_value(format: str) -> None:
    with pytest.raises(InputError, match=r"^Line 2: byte 0xe9 "):
        read(b'{"key": "a", "value": "b"}\n{"key": "caf\xe9", "value": "c"}\n', format)


def test_the_line_of_a_bad_byte_is_right_after_a_byte_order_mark() -> None:
    with pytest.raises(InputError, match=r"^Line 2: byte 0xff "):
        read(b'\xef\xbb\xbf{"key": "a", "value": "b"}\n\xff\n')


@pytest.mark.parametrize("broken", ["{", "key", "{'key': 'a'}", '{"key": "a", "value": "b"} x', '{"key": "a\tb"}'])
def test_broken_jsonl_is_refused_with_its_line(broken: str) -> None:
    with pytest.raises(InputError, match=r"^Line 3: not JSON"):
        read(jsonl(ROW) + "\n" + broken + "\n" + jsonl(ROW))


def test_broken_json_is_refused_with_its_line() -> None:
    with pytest.raises(InputError, match=r"^Line 3: not JSON"):
        read('{"a": "1",\n "b": "2",\n "c" "3"}', "json")


@pytest.mark.parametrize("text", ["3", '"a"', "null", "true"])
def test_json_that_is_neither_object_nor_list_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="object"):
        read(text, "json")


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("json", '{"a": "1", "b": "2", "a": "3"}'),
        ("json", '[{"key": "k", "value": "1", "a": 1, "a": 1}]'),
        ("jsonl", '{"key": "k", "value": "1", "deep": {"a": 1, "a": 2}}'),
    ],
)
def test_a_name_given_twice_in_a_json_object_is_refused(format: str, text: str) -> None:
    with pytest.raises(InputError, match="'a' twice"):
        read(text, format)


def test_a_name_given_twice_in_jsonl_is_refused_with_its_line() -> None:
    with pytest.raises(InputError, match=r"^Line 2: .*'key' twice"):
        read(jsonl(ROW) + '{"key": "a", "key": "b", "value": "c"}\n')


@pytest.mark.parametrize("row", ["x", "x,y,z"])
def test_a_row_of_another_number_of_columns_says_how_many_there_should_be(row: str) -> None:
    with pytest.raises(InvalidField, match=r"2 columns expected \(key, value\)"):
        read(f"key,value\n{row}\n", "csv")


@pytest.mark.parametrize("row", ['c,"d" e', 'c,"open\nx,y'])
def test_broken_quoting_in_csv_is_refused_with_the_line_of_its_row(row: str) -> None:
    with pytest.raises(InputError, match=r"^Line 3: not CSV"):
        read(f"key,value\na,b\n{row}\n", "csv")


def test_a_row_over_several_lines_of_csv_stands_where_it_begins() -> None:
    assert [record.line for record in read('key,value\na,"x\ny"\nb,z\n', "csv")] == [2, 4]


def test_a_column_name_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="'value' twice"):
        read("key,value,value\na,b,c\n", "csv")


@pytest.mark.parametrize("metadata", ["text", 3, ["ab"]])
def test_metadata_that_is_no_object_is_refused_with_its_line(metadata: object) -> None:
    with pytest.raises(InvalidField, match="metadata") as caught:
        read(jsonl(ROW, ROW | {"metadata": metadata}))
    assert caught.value.line == 2


def test_the_field_named_metadata_may_hold_the_value() -> None:
    assert read(jsonl({"key": "a", "metadata": "b"}), value_field="metadata") == [Record("a", "b")]


@pytest.mark.parametrize("broken", ["1" * 5000, "[" * 100_000], ids=["5000 digits", "100000 brackets"])
def test_json_beyond_the_parsers_limits_is_refused_with_its_line(broken: str) -> None:
    with pytest.raises(InputError, match=r"^Line 2: "):
        read(jsonl(ROW) + broken + "\n")


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'xml'.*jsonl, json, csv, tsv"):
        read("", "xml")
    (tmp_path / "facts").write_text("")
    with pytest.raises(InputError, match="format"):
        read_records(tmp_path / "facts")


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        read_records(tmp_path / "nowhere.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match="directory"):
        read_records(tmp_path / "folder.jsonl")


# --- Python objects


@pytest.mark.parametrize(
    "source",
    [
        {"a": "1", "b": "2"},
        [("a", "1"), ["b", "2"]],
        iter([{"key": "a", "value": "1"}, {"key": "b", "value": "2"}]),
        [Record("a", "1"), ("b", "2")],
    ],
    ids=["mapping", "pairs", "dicts", "mixed"],
)
def test_records_come_from_mappings_pairs_dicts_and_records(source: object) -> None:
    assert as_records(source) == [Record("a", "1"), Record("b", "2")]


def test_the_position_of_an_entry_counts_as_its_line() -> None:
    assert [record.line for record in as_records([("a", "1"), {"key": "b", "value": "2"}])] == [1, 2]
    with pytest.raises(EmptyField) as caught:
        as_records([("a", "1"), ("b", "")])
    assert caught.value.line == 2


def test_a_namespace_goes_to_pairs_and_dicts() -> None:
    for source in ({"a": "1"}, [("a", "1")], [{"key": "a", "value": "1"}]):
        assert as_records(source, "phones") == [Record("a", "1", "phones")]


@pytest.mark.parametrize("entry", [("a",), ("a", "1", "x"), "ab", 3, None, ("a", 1), {"key": "a"}])
def test_an_entry_that_is_no_record_is_refused_with_its_position(entry: object) -> None:
    with pytest.raises(InvalidField) as caught:
        as_records([("b", "2"), entry])
    assert caught.value.line == 2


# --- repetitions


def test_the_same_record_again_is_set_aside() -> None:
    records = as_records([("a", "1"), ("b", "2"), ("a", "1"), ("a", "1")])
    kept, repeated = deduplicate(records)
    assert pairs(kept) == [("a", "1"), ("b", "2")]
    assert [(record.key, record.line) for record in repeated] == [("a", 3), ("a", 4)]


def test_a_repetition_with_other_metadata_is_set_aside_and_the_first_stays() -> None:
    first, again = Record("a", "1", metadata={"page": 3}), Record("a", "1", metadata={"page": 4})
    assert deduplicate([first, again]) == ([first], [again])


def test_another_value_for_a_key_is_a_conflict_with_both_lines() -> None:
    with pytest.raises(ConflictingRecord, match=r"^Line 3: .*line 1.*'1', now '9'") as caught:
        deduplicate(as_records([("a", "1"), ("b", "2"), ("a", "9")]))
    assert (caught.value.key, caught.value.line) == ("a", 3)


def test_a_key_may_have_another_value_in_another_namespace() -> None:
    records = [Record("a", "1", "home"), Record("a", "2", "work")]
    assert deduplicate(records) == (records, [])


def test_the_same_object_given_twice_is_a_repetition() -> None:
    record = Record("a", "1")
    assert deduplicate([record, record]) == ([record], [record])


# --- write -> read


@given(
    rows=st.lists(st.tuples(TEXT, TEXT, st.dictionaries(TEXT, TEXT, max_size=2)), max_size=4),
    ascii=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_records_written_as_jsonl_are_read_back_equal(
    rows: list[tuple[str, str, dict[str, str]]], ascii: bool, newline: str
) -> None:
    records = [Record(key, value, metadata=metadata) for key, value, metadata in rows]
    lines = [
        json.dumps({"key": record.key, "value": record.value, "metadata": record.metadata}, ensure_ascii=ascii)
        for record in records
    ]
    assert read(newline.join(lines)) == records


@given(rows=st.lists(st.tuples(TEXT, TEXT), max_size=4), table=st.sampled_from([("csv", ","), ("tsv", "\t")]))
def test_records_written_as_a_table_are_read_back_equal(rows: list[tuple[str, str]], table: tuple[str, str]) -> None:
    format, delimiter = table
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([("key", "value"), *rows])
    assert read(out.getvalue(), format) == [Record(*row) for row in rows]


@given(text=st.binary(max_size=60), format=st.sampled_from(["jsonl", "json", "csv", "tsv"]))
def test_arbitrary_bytes_give_records_or_an_error_of_ours(text: bytes, format: str) -> None:
    try:
        records = read(text, format)
    except LoramemError:
        return
    assert all(isinstance(record, Record) for record in records)
