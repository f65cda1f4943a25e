"""Inputs broken at random: each gives records or a typed error, and by the command one line and an untouched store."""

import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from loramem_cli.main import run

from loramem import MemoryStore
from loramem.errors import LoramemError
from loramem.records.input_files import read_records
from loramem.records.record import Record

ROWS = [("key 0", "0417#"), ("caf\u00e9; \u2603", "a,b\tc;d"), ('"quoted"', "two\r\nlines \U0001f600"), ("k", "\u2028")]


def chat(key: str, value: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": key}, {"role": "assistant", "content": value}]}


def table(delimiter: str) -> str:
    rows = [("key", "value", "namespace", ""), *((key, value, "n", "") for key, value in ROWS)]
    quoted = (['"{}"'.format(cell.replace('"', '""')) if cell else "" for cell in row] for row in rows)
    return "\r\n".join(map(delimiter.join, quoted))


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


FACTS = [
    {"key": key, "value": value, "namespace": "n", "metadata": {"pages": [1, {"note": "a text as long as the others"}]}}
    for key, value in ROWS
]
WHOLE = {
    "facts.jsonl": lines(*FACTS),
    "chat.ndjson": lines(*(chat(*row) for row in ROWS)),
    "pairs.ndjson": lines(*({"prompt": key, "completion": value} for key, value in ROWS)),
    "mapping.json": json.dumps(dict(ROWS)),
    "list.json": json.dumps(FACTS, ensure_ascii=False, indent=1),
    "one.json": json.dumps(FACTS[0]),
    "comma.csv": table(","),
    "said.csv": "sep=;\r\n" + table(";"),
    "tab.tsv": table("\t"),
}


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.choices(range(len(data) + 1), k=2))
    return data[:first] + data[last:] if rng.random() < 0.5 else data[first:last]


def insert(data: bytes, rng: random.Random) -> bytes:
    odd = [
        b"\0",
        b"\r",
        b"\xff",
        b'"',
        b"\\ud800",
        b"\xed\xa0\x80",
        b"[" * 2000,
        b"\xef\xbb\xbf",
        b"\n",
        b"\xe2\x80\xa8",
    ]
    odd += [b",", b";", b"\t", b"{", b"}", b"NaN", b"9" * 5000, b"1e999", b'"key": "x", ', b"sep=\x00\n", b"null"]
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(odd) + data[place:]


def recode(data: bytes, rng: random.Random) -> bytes:
    return data.decode().encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"]), "replace")


def exchange(data: bytes, rng: random.Random) -> bytes:
    old, new = rng.sample(
        [b",", b";", b"\t", b"\n", b"\r", b"\r\n", b"|", b'"', b"'", b":", b"\xe2\x80\xa8", b"user"], 2
    )
    return data.replace(old, new)


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [flip, cut, insert, exchange]


def broken(name: str, seed: int) -> bytes:
    """A file that was whole, after one to three mutations; each is drawn from the seed alone."""
    rng = random.Random(f"{name} {seed}")
    data = WHOLE[name].encode()
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(MUTATIONS)(data, rng) if data else data
    return data if rng.random() < 0.9 else recode(WHOLE[name].encode(), rng)


def refusal(data: bytes, name: str, **given: str) -> LoramemError | None:
    """The error that an input ends in; None if it gives records. Anything else fails the test that asks."""
    try:
        records = read_records(io.BytesIO(data), format=name.partition(".")[2], **given)
    except LoramemError as error:
        return error
    assert all(isinstance(record, Record) for record in records)
    json.dumps([vars(record) for record in records], ensure_ascii=False, allow_nan=False).encode()  # can be kept
    return None


@pytest.mark.parametrize("name", WHOLE)
def test_the_files_are_whole_before_they_are_broken(name: str) -> None:
    assert refusal(WHOLE[name].encode(), name) is None


@pytest.mark.parametrize("name", WHOLE)
def test_a_broken_file_gives_records_or_a_typed_error(name: str) -> None:
    ends = [type(refusal(broken(name, seed), name)) for seed in range(400)]
    assert len(set(ends)) >= 3  # it is read, and it is refused for more than one reason


@pytest.mark.parametrize("name", [name for name in WHOLE if name.endswith("sv")])
@pytest.mark.parametrize("delimiter", [";", "\t", "e", "\u2603"])
def test_a_table_read_with_any_delimiter_gives_records_or_a_typed_error(name: str, delimiter: str) -> None:
    for seed in range(40):
        refusal(broken(name, seed), name, delimiter=delimiter)


def test_the_command_refuses_a_broken_file_in_one_line_and_leaves_the_store(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    with MemoryStore(store, str(base)) as made:
        made.write({"k": "1"})
    before, tried = contents(store), 0
    for seed in range(12):
        for name in WHOLE:
            data = broken(name, seed)
            if refusal(data, name) is None:
                continue
            source = tmp_path / name
            source.write_bytes(data)
            code = run(["write", str(source), "--store", str(store)])
            shown, tried = capsys.readouterr(), tried + 1
            assert (code, shown.out, len(shown.err.splitlines())) == (1, "", 1), (name, seed)
    assert tried > 50
    assert contents(store) == before


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
