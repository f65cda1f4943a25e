"""The command line: results on stdout, everything else on stderr, one line and an exit code for a user's mistake."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from loramem_cli.main import run

from .conftest import ROOT, numbers

RECORDS = numbers(4)


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    source = folder / "records.jsonl"
    source.write_text("".join(json.dumps({"key": k, "value": v}) + "\n" for k, v in RECORDS.items()))
    assert run(["write", str(source), "--store", str(folder / "memory"), "--model", str(base)]) == 0
    return folder


@pytest.fixture
def store(written: Path) -> str:
    return str(written / "memory")


def test_write_reports_what_it_did_as_json(base: Path, written: Path, tmp_path: Path, capsys) -> None:
    arguments = [
        "write",
        str(written / "records.jsonl"),
        "--store",
        str(tmp_path / "m"),
        "--model",
        str(base),
        "--json",
    ]
    assert run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["written"], report["exact_match"]) == (4, 1.0)
    assert run(arguments) == 0  # again: everything is there
    report = json.loads(capsys.readouterr().out)
    assert (report["written"], report["skipped"]) == (0, 4)
    assert report["exact_match"] is report["min_prob"] is None  # nothing was decoded
    assert run(arguments[:-1]) == 0
    assert capsys.readouterr().out == "written  0 records\n"


def test_put_and_recall_one_value(base: Path, tmp_path: Path, capsys) -> None:
    store = ["--store", str(tmp_path / "m")]
    assert run(["put", "door", "0417#", *store, "--model", str(base)]) == 0
    assert capsys.readouterr().out == ""
    assert run(["recall", "door", *store]) == 0
    assert capsys.readouterr().out == "0417#\n"


def test_write_reads_standard_input(base: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"key\tvalue\nk\t42\n")))
    store = ["--store", str(tmp_path / "m"), "--model", str(base)]
    assert run(["write", "-", "--format", "tsv", "--json", *store]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 1


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv", "empty.json", "header.csv", "list.json"])
def test_an_input_without_records_is_refused(tmp_path: Path, capsys, name: str) -> None:
    source = tmp_path / name
    source.write_text({"header.csv": "key,value\n", "list.json": "[]"}.get(name, ""))
    for command in ("write", "capacity"):
        code, error = mistake([command, str(source), "--store", str(tmp_path / "m")], capsys)
        assert (code, error) == (1, f"Error: {source} holds no records.\n")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("name", "text", "given"),
    [
        ("a.csv", "key;value\n{};{}\n", ["--delimiter", ";"]),
        ("a.tsv", "sep=;\nkey;value\n{};{}\n", []),
        ("a.csv", "key\tvalue\n{}\t{}\n", ["--delimiter", "tab"]),
        ("a.ndjson", '{{"prompt": "{}", "completion": "{}"}}\n', []),
        (
            "a.txt",
            '{{"query": "{}", "target": "{}"}}',
            ["--format", "json", "--key-field=query", "--value-field=target"],
        ),
    ],
)
def test_forms_of_input(own: str, tmp_path: Path, capsys, name: str, text: str, given: list[str]) -> None:
    source = tmp_path / name
    source.write_text(text.format("key 0", RECORDS["key 0"]))
    assert run(["write", str(source), *given, "--store", own, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 1  # the record is the one that is there


def test_a_listing_with_values_is_written_to_another_store_as_it_was(base: Path, tmp_path: Path, capsys) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    rows = [
        {"key": "a", "value": "1", "namespace": "x", "metadata": {"page": 3}},
        {"key": "a", "value": "2"},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["write", str(source), "--store", one, "--model", str(base)]) == 0
    capsys.readouterr()

    def listed(store: str) -> list[dict]:
        assert run(["ls", "--json", "--store", store]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    values = {"x": "1", "": "2"}
    source.write_text("".join(json.dumps({**row, "value": values[row["namespace"]]}) + "\n" for row in listed(one)))
    assert run(["write", str(source), "--store", other, "--model", str(base)]) == 0
    capsys.readouterr()
    kept = ("namespace", "key", "metadata")
    there, back = ([[row[name] for name in kept] for row in listed(store)] for store in (one, other))
    assert there == back
    assert sorted(back) == [["", "a", {}], ["x", "a", {"page": 3}]]


def test_recall_many_prints_key_and_value(store: str, capsys) -> None:
    assert run(["recall", "key 0", "key 2", "--store", store]) == 0
    assert capsys.readouterr().out == f"key 0\t{RECORDS['key 0']}\nkey 2\t{RECORDS['key 2']}\n"


def test_recall_computes_in_another_dtype_if_asked(store: str, capsys) -> None:
    assert run(["recall", "key 0", "--store", store, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{RECORDS['key 0']}\n"
    assert run(["recall", "key 0", "--store", store, "--dtype", "q8_0"]) == 2


def test_recall_all_as_json_lines(store: str, capsys) -> None:
    assert run(["recall", "--all", "--store", store, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["key"]: line["value"] for line in lines} == RECORDS


def test_explain_shows_every_token(store: str, capsys) -> None:
    assert run(["explain", "key 1", "--store", store, "--json"]) == 0
    explanation = json.loads(capsys.readouterr().out)
    assert "".join(token["text"] for token in explanation["tokens"][:-1]) == RECORDS["key 1"]
    assert run(["explain", "key 1", "--store", store]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["token", "p", "p of the base", "certainty"]
    assert len(rows) == 1 + len(explanation["tokens"])


def test_ls_never_shows_values(store: str, capsys) -> None:
    assert run(["ls", "--store", store]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key in RECORDS)
    assert run(["ls", "--store", store, "--json"]) == 0
    shown += capsys.readouterr().out
    assert not any(value in shown for value in RECORDS.values())


def test_ls_of_an_adapter_takes_the_digits_that_ls_shows(store: str, capsys) -> None:
    assert run(["ls", "--store", store, "--json"]) == 0
    adapter = json.loads(capsys.readouterr().out.splitlines()[0])["adapter"]
    for given in (adapter, adapter[:12]):
        assert run(["ls", "--adapter", given, "--store", store]) == 0
        assert "key 0" in capsys.readouterr().out
    code, shown = mistake(["ls", "--adapter", "nothing", "--store", store], capsys)
    assert code == 2
    assert "no adapters" in shown


def test_an_argument_that_is_not_utf_8_is_wrong_usage(store: str, capsys) -> None:
    strange = os.fsdecode(b"key \xff")
    for arguments in (["rm", strange], ["recall", strange], ["update", "key 0", strange], ["history", strange]):
        code, shown = mistake([*arguments, "--store", store], capsys)
        assert (code, len(shown.splitlines())) == (2, 1), arguments


def test_stats_and_verify_as_json(store: str, capsys) -> None:
    assert run(["stats", "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 4
    assert run(["verify", "--store", store, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["exact"]) == (4, 4)


def test_text_output_of_stats_and_verify(store: str, capsys) -> None:
    assert run(["stats", "--store", store]) == 0
    assert run(["verify", "--store", store]) == 0
    assert "records" in capsys.readouterr().out


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run(arguments)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return code, shown.err


@pytest.fixture
def own(written: Path, tmp_path: Path) -> str:
    """A copy of the store, to be changed."""
    shutil.copytree(written / "memory", tmp_path / "memory")
    return str(tmp_path / "memory")


def test_records_are_updated_renamed_and_removed(own: str, capsys) -> None:
    assert run(["update", "key 0", "new!", "--meta", "of=Ann", "--store", own]) == 0
    assert run(["rename", "key 1", "key one", "--store", own]) == 0
    assert run(["rm", "key 2", "key 3", "--store", own, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"deleted": 2}
    assert run(["recall", "--all", "--store", own]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["key 0\tnew!", f"key one\t{RECORDS['key 1']}"]
    assert run(["ls", "--meta", "of=Ann", "--since", "2020-01-01", "--store", own, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["key"] == "key 0"
    assert run(["ls", "--until", "2020-01-01", "--store", own, "--json"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["history", "key one", "--store", own, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["key"], line["ended_by"]) for line in lines] == [("key 1", "renamed"), ("key one", None)]
    assert run(["history", "key one", "--store", own]) == 0


def test_conflicts_are_replaced_or_skipped(own: str, tmp_path: Path, capsys) -> None:
    source = tmp_path / "more.tsv"
    source.write_text("key\tvalue\nkey 0\tother\n")
    assert mistake(["write", str(source), "--store", own], capsys)[0] == 1
    assert run(["write", str(source), "--store", own, "--on-conflict", "skip"]) == 0
    assert run(["write", str(source), "--store", own, "--on-conflict", "replace"]) == 0
    capsys.readouterr()
    assert run(["recall", "key 0", "--store", own]) == 0
    assert capsys.readouterr().out == "other\n"


def test_maintenance_and_copies(own: str, tmp_path: Path, capsys) -> None:
    assert run(["rm", "key 2", "key 3", "--store", own]) == 0
    assert run(["stats", "--store", own]) == 0
    assert "loramem compact" in capsys.readouterr().err
    assert run(["compact", "--store", own, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 2
    assert run(["compact", "--store", own]) == 0
    assert run(["gc", "--grace", "0", "--store", own]) == 0
    assert run(["erase", "key 1", "--store", own]) == 0
    assert run(["repair", "--store", own]) == 0
    assert run(["verify", "--quick", "--store", own]) == 0
    assert run(["backup", str(tmp_path / "copy"), "--store", own]) == 0
    assert run(["export", str(tmp_path / "all.tar"), "--store", own]) == 0
    assert run(["import", str(tmp_path / "all.tar"), "--store", str(tmp_path / "imported")]) == 0
    capsys.readouterr()
    assert run(["recall", "--all", "--store", str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().out == f"key 0\t{RECORDS['key 0']}\n"
    assert mistake(["backup", str(tmp_path / "copy"), "--store", own], capsys)[0] == 1
    assert mistake(["import", own, "--store", str(tmp_path / "again")], capsys)[0] == 1


def test_an_unknown_key_exits_6_with_close_keys(store: str, capsys) -> None:
    code, error = mistake(["recall", "key 11", "--store", store], capsys)
    assert code == 6
    assert "'key 1'" in error
    assert len(error.splitlines()) == 1


def test_no_store_exits_10(tmp_path: Path, capsys) -> None:
    code, error = mistake(["recall", "k", "--store", str(tmp_path / "none")], capsys)
    assert code == 10
    assert "none" in error


def test_another_base_model_exits_12(store: str, base_of, capsys) -> None:
    code, _ = mistake(["recall", "key 1", "--store", store, "--model", str(base_of("llama"))], capsys)
    assert code == 12


def test_damage_exits_4_and_gives_no_value(written: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "memory"
    shutil.copytree(written / "memory", copy)
    (weights,) = (copy / "adapters").glob("*/adapter_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert run(["verify", "--store", str(copy)]) == 4
    capsys.readouterr()
    code, error = mistake(["recall", "key 1", "--store", str(copy)], capsys)
    assert code == 4
    assert RECORDS["key 1"] not in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"key": "", "value": "v"}', "Line 2: The key is empty"),
        ('{"key": "k", "value": 7}', "Line 2: The value must be a string"),
        ('{"name": "k"}', "Line 2: No field 'key'"),
        ("{", "Line 2: not JSON"),
    ],
)
def test_a_bad_record_is_one_line_with_its_line_number(tmp_path: Path, capsys, line: str, message: str) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_text('{"key": "good", "value": "v"}\n' + line + "\n")
    code, error = mistake(["write", str(source), "--store", str(tmp_path / "m")], capsys)
    assert code == 1
    assert error.startswith(f"Error: {message}")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "arguments",
    [["recall"], ["write"], ["write", "x", "--resume"], ["write", "x", "--goal", "tiny"], ["put", "k"], ["nonsense"]],
)
def test_wrong_usage_exits_2(arguments: list[str], capsys) -> None:
    code, _ = mistake(arguments, capsys)
    assert code == 2


def test_environment_variables_name_the_store(store: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LORAMEM_STORE", store)
    assert run(["recall", "key 3"]) == 0
    assert capsys.readouterr().out == RECORDS["key 3"] + "\n"


def test_every_command_names_the_default_store(capsys) -> None:
    from loramem_cli.main import cli

    for command in set(cli.commands) - {"calibrate", "law", "suite"}:
        assert run([command, "--help"]) == 0
        assert "./memory" in capsys.readouterr().out


def test_an_interrupt_exits_130(written: Path, base: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    place = str(tmp_path / "m")
    with monkeypatch.context() as patched:
        patched.setattr("loramem.training.shards.train_shard", interrupt)
        assert run(["write", str(written / "records.jsonl"), "--store", place, "--model", str(base)]) == 130
    assert run(["write", str(written / "records.jsonl"), "--store", place]) == 1  # unfinished
    assert run(["write", "--resume", "--store", place]) == 0
    assert run(["recall", "key 1", "--store", place]) == 0


def test_the_documentation_names_every_exit_code() -> None:
    from loramem_cli.main import EXIT_CODES, INTERRUPTED

    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    named = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    assert named == {0, INTERRUPTED} | {code for _, code in EXIT_CODES}


def test_a_device_that_is_not_there_is_one_line(base: Path, tmp_path: Path, capsys) -> None:
    for device in ("nonsense", "cuda:99"):
        code, error = mistake(
            ["put", "k", "v", "--store", str(tmp_path / "m"), "--model", str(base), "--device", device], capsys
        )
        assert code == 1
        assert error.startswith(f"Error: Device '{device}' cannot be used here")
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "m").exists()


def test_a_store_that_cannot_be_made_is_one_line(base: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    code, error = mistake(["put", "k", "v", "--store", str(tmp_path / "file" / "m"), "--model", str(base)], capsys)
    assert code == 1
    assert error.startswith("Error: ")


def test_the_grace_of_gc_is_the_library_s() -> None:
    from loramem_cli.gc import command

    from loramem.store.staging import GRACE_S

    assert [option.default for option in command.params if option.name == "grace_s"] == [GRACE_S]
