"""Records in chats: what is trained, proved, verified and asked; which chats are refused."""

import json
import shutil
from pathlib import Path

import pytest
from loramem_cli.main import run

from loramem import MemoryStore, Record
from loramem.errors import ArgumentError, InputError, PromptCollision, TooLong
from loramem.models.decoding import greedy_decode
from loramem.records.contexts import as_contexts, check_contexts, prompts_in, read_contexts
from loramem.records.prompts import PromptTemplate
from loramem.training.settings import WriterSettings

CLERK = [{"role": "system", "content": "You are a clerk."}]
TURNS = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello."}]
FACTS = [Record("Ann Lee:", "31415", questions=["Where is Ann?"]), Record("Bob Ray:", "27182")]


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contexts") / "memory"
    with MemoryStore(path, str(base)) as store:
        report = store.write(FACTS, contexts=[CLERK, TURNS, CLERK])
        assert (report.written, report.questions, report.contexts, report.failed) == (2, 1, 2, ())
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> MemoryStore:
    shutil.copytree(written, tmp_path / "memory")
    return MemoryStore(tmp_path / "memory", create=False)


def answered(store: MemoryStore, key: str, messages: list[dict[str, str]]) -> str:
    """What a chat server with the key's adapter would say."""
    model, _ = store.load(key)
    tokenizer, template = store.base.tokenizer, store.base.template
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": key}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (row,) = greedy_decode(model, [tuple(ids)], 12, template.end_id)
    return tokenizer.decode(row)


def test_keys_and_questions_are_answered_in_each_chat_and_recalled_as_ever(store: MemoryStore) -> None:
    for key, value in (("Ann Lee:", "31415"), ("Where is Ann?", "31415"), ("Bob Ray:", "27182")):
        assert store.recall(key) == value
        assert [answered(store, key, messages) for messages in ([], CLERK, TURNS)] == [value] * 3
    assert (len(store), store.stats().questions) == (2, 1)
    assert store.explain("Ann Lee:").contexts == 2


def test_without_them_a_chat_is_another_prompt(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "m", str(base)) as store:
        assert store.write(FACTS).contexts == 0
        values = [answered(store, record.key, CLERK) for record in FACTS]
        assert values != [record.value for record in FACTS]
        assert "contexts" not in store.adapters()[0].training["settings"]
        assert store.explain("Ann Lee:").contexts == 0


def test_the_proof_is_of_every_record_in_every_chat(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramem.training import shards

    proved = list[list[tuple[int, ...]]]()
    real = shards.prove

    def spy(model, records, *rest):  # type: ignore[no-untyped-def]
        proved.append([record.prompt_ids for record in records])
        proof = real(model, records, *rest)
        assert len(proof.min_probs) == len(records)
        return proof

    monkeypatch.setattr(shards, "prove", spy)
    report = store.write({"Cy Orr:": "16180"}, contexts=[CLERK])
    asked = prompts_in(store.base.tokenizer, as_contexts([CLERK])[0], ["Cy Orr:"])
    assert [prompts[1:] for prompts in proved] == [asked] * 2  # float32 and bfloat16
    (adapter,) = (each for each in store.adapters() if each.id in report.adapters)
    assert adapter.proof["contexts"] == 1


def test_a_record_that_cannot_be_had_in_a_chat_is_not_had_at_all(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramem.errors import RecallError
    from loramem.models import certificate

    asked = prompts_in(store.base.tokenizer, as_contexts([CLERK])[0], ["Di Poe:"])
    real = certificate.decode_records

    def other(model, records, batches):  # type: ignore[no-untyped-def]
        for index, ids in real(model, records, batches):
            yield index, ids[:-1] if records[index].prompt_ids in asked else ids

    monkeypatch.setattr(certificate, "decode_records", other)
    with pytest.raises(RecallError, match="Di Poe"):
        store.write({"Di Poe:": "14142"}, contexts=[CLERK])
    assert "Di Poe:" not in store


def test_later_writes_and_rewriting_know_the_chats(store: MemoryStore) -> None:
    assert store.update("Bob Ray:", "14142").contexts == 2
    assert answered(store, "Bob Ray:", TURNS) == "14142"
    store.compact(which="all")
    assert [adapter.proof["contexts"] for adapter in store.adapters()] == [2]
    assert answered(store, "Bob Ray:", CLERK) == "14142"
    assert store.write({"Cy:": "5"}, contexts=()).contexts == 0


def test_an_interrupted_write_is_resumed_in_its_chats(store: MemoryStore) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write({"Cy:": "5"}, progress=stop, contexts=[TURNS])
    assert store.resume().contexts == 1
    assert answered(store, "Cy:", TURNS) == "5"


def test_verify_decodes_in_every_chat(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramem.store import read

    report = store.verify()
    assert (report.records, report.exact, report.failed) == (3, 3, ())
    real = read.prompts_in
    monkeypatch.setattr(read, "prompts_in", lambda tokenizer, context, keys: real(tokenizer, (("system", "?"),), keys))
    report = store.verify()
    assert report.exact < 3 and set(report.failed) <= {"Ann Lee:", "Where is Ann?", "Bob Ray:"}


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("You are a clerk.", "list of chats"),
        ([{"role": "system", "content": "x"}], "list of messages"),
        ([[]], "at least one"),
        ([["You are a clerk."]], "both strings"),
        ([[{"role": "system"}]], "both strings"),
        ([[{"role": "system", "content": 3}]], "both strings"),
        ([[{"role": "system", "content": "x", "name": "y"}]], "both strings"),
        ([[{"role": "", "content": "x"}]], "a role"),
        ([[{"role": "system", "content": "\ud800"}]], "UTF-8"),
        ([[{"role": "user", "content": "x"}]], "the key is the next one"),
    ],
)
def test_what_is_no_chat_is_refused_before_anything_is_changed(store: MemoryStore, given: object, rule: str) -> None:
    with pytest.raises(ArgumentError, match=rule) as caught:
        store.write({"new": "1"}, contexts=given)  # type: ignore[arg-type]
    assert caught.value.argument == "contexts"
    assert "new" not in store and store.pending() is None


def test_a_chat_that_leaves_no_room_is_refused_before_anything_is_changed(store: MemoryStore) -> None:
    with pytest.raises(TooLong, match="Shorten the chat"):
        store.write({"new": "1"}, contexts=[[{"role": "system", "content": "word " * 2000}]])
    assert "new" not in store and store.pending() is None


def test_keys_that_are_one_in_a_chat_are_refused(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramem.records import contexts

    monkeypatch.setattr(contexts, "prompts_in", lambda tokenizer, context, keys: [(2, 3)] * len(keys))
    with pytest.raises(PromptCollision, match="in the chat"):
        store.write({"new": "1", "newer": "2"}, contexts=[CLERK])
    assert store.pending() is None


def test_templates_that_do_not_show_a_chat_as_it_is_are_refused(store: MemoryStore) -> None:
    tokenizer, template = store.base.tokenizer, store.base.template
    chat = as_contexts([CLERK])
    check_contexts(tokenizer, template, chat)
    plain = PromptTemplate(template.prefix_ids, template.suffix_ids, template.end_id, "plain")
    with pytest.raises(ArgumentError, match="no chat template"):
        check_contexts(tokenizer, plain, chat)
    own = tokenizer.chat_template
    shown = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    try:
        for made, why in (
            ("{{ raise_exception('no system') }}", "does not take it .*no system"),
            (shown + "{{ strftime_now('%d %b') }}", "shows the date"),
            (shown + shown, "shows the key 2 times"),
            ("{{ messages[0]['content'] }}", "shows the key 0 times"),
        ):
            tokenizer.chat_template = made
            with pytest.raises(ArgumentError, match=why):
                check_contexts(tokenizer, template, chat)
    finally:
        tokenizer.chat_template = own


def test_files_hold_a_chat_a_line_or_a_json_list(tmp_path: Path) -> None:
    lines, whole = tmp_path / "c.jsonl", tmp_path / "c.json"
    lines.write_text(f"{json.dumps(CLERK)}\n\n{json.dumps({'messages': TURNS})}\n{json.dumps(CLERK)}\n")
    whole.write_text(json.dumps([CLERK, {"messages": TURNS}], indent=1))
    assert read_contexts(lines) == read_contexts(whole) == as_contexts([CLERK, TURNS])


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("c.jsonl", b'[{"role": "system", "content": "x"}]\n{"role"', "line 2: "),
        ("c.jsonl", b'[{"role": "system", "content": "x"}]\n["x"]', "line 2: In contexts"),
        ("c.json", b'[{"role": "system", "content": "x"}]', "list of messages"),
        ("c.json", b"[[", "c.json: "),
        ("c.jsonl", b"\n", "holds no chat"),
        ("c.json", b"[]", "holds no chat"),
        ("c.jsonl", b"\xff", "not UTF-8"),
    ],
)
def test_files_that_hold_none_are_refused_by_line(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=fault):
        read_contexts(tmp_path / name)
    with pytest.raises(InputError, match="Cannot read"):
        read_contexts(tmp_path / "none.jsonl")


def test_settings_come_back_from_json_as_they_were() -> None:
    settings = WriterSettings(contexts=as_contexts([CLERK, TURNS]))
    again = WriterSettings.saved(json.loads(json.dumps(settings.to_json())))
    assert again == settings and hash(again) == hash(settings)
    assert "contexts" not in WriterSettings().to_json()
    with pytest.raises(ArgumentError):
        WriterSettings.saved({"contexts": [["system"]]})


def test_the_command_reads_a_file_and_refuses_a_bad_one_first(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, chats, store = tmp_path / "facts.jsonl", tmp_path / "chats.jsonl", tmp_path / "m"
    facts.write_text('{"key": "Ann Lee:", "value": "31415"}\n')
    arguments = ["write", str(facts), "--context", str(chats), "--store", str(store), "--model", str(base)]
    assert run(arguments) == 1
    chats.write_text('[{"role": "user", "content": "Hello"}]')
    assert run(arguments) == 1
    assert "line 1" in capsys.readouterr().err and not store.exists()
    chats.write_text(f"{json.dumps(CLERK)}\n{json.dumps(TURNS)}\n")
    assert run(arguments) == 0
    assert "in chats    2, every record in each as well" in capsys.readouterr().out
