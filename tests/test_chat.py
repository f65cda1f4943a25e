"""The key as a chat's user message: asked with the ids that were trained, or known not to be."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loramem_cli.main import run
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loramem import MemoryStore
from loramem.errors import IntegrityError, PromptCollision, RefusedRepository
from loramem.records.chat import CHANGED, DATED, LONG, OTHER, REFUSED, TAKEN, Chat
from loramem.records.prompts import EncodedRecord, PromptTemplate, encode_records
from loramem.records.record import Record

from .conftest import SPECIALS
from .hub_server import HubServer
from .test_architectures import recalled_by_peft_alone
from .test_integrity import execute
from .test_pull import lines

TURNS = (
    "{% for m in messages %}<user>{{ m.role }}\n{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMING = TURNS.replace("m.content", "m.content | trim")
INSTRUCTION = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}<eos>"
    "{% endif %}{% endfor %}"
)
DATE = "{% if strftime_now is defined %}{{ strftime_now('%d %b') }}\n{% endif %}"
WIDE, FED = "  two blanks", "\n\ntwo feeds"
SEAMS = {WIDE: "31", FED: "72", " one": "55"}
KEYS = {"town": "40", "tide": "41"}
TRIMMED = {"town": "40", "  town": "41"}


def tokenizer_of(template: str | None, **user: bool) -> PreTrainedTokenizerFast:
    """Bytes, blanks and line feeds that merge, and a blank that merges with a t after it.

    Args:
        user: Of the token <user>: ``rstrip`` swallows the blanks after it.
    """
    symbols = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĠ", "ĊĊ", "Ġt"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIALS[:2], AddedToken("<user>", special=True, **user), SPECIALS[3]])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = template
    return fast


def of_chat(tokenizer: PreTrainedTokenizerFast, key: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": key}], add_generation_prompt=True, return_dict=False
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, *keys: str, max_tokens: int = 99, taken: Callable[..., bool] | None = None
) -> list[EncodedRecord]:
    template, records = PromptTemplate.of(tokenizer), [Record(key, "x") for key in keys]
    return encode_records(records, tokenizer, template, max_tokens, **({"taken": taken} if taken else {}))


def joined(tokenizer: PreTrainedTokenizerFast, key: str) -> list[int]:
    return PromptTemplate.of(tokenizer).prompt_ids(tokenizer, key)


# --- which prompt a key gets


@pytest.mark.parametrize("template", [TURNS, INSTRUCTION])
def test_every_key_of_a_template_that_keeps_it_is_asked_as_a_chat_server_would(template: str) -> None:
    tokenizer = tokenizer_of(template)
    keys = [*SEAMS, *KEYS, "k\n\n", "k  ", "\n \n x", "\ttown", "Žofie 🔑", "{{ m }}"]
    for key, entry in zip(keys, encode(tokenizer, *keys), strict=True):
        assert list(entry.prompt_ids) == of_chat(tokenizer, key)
        differs = list(entry.prompt_ids) != joined(tokenizer, key)
        assert entry.prompt == ({"chat": True, "ids": list(entry.prompt_ids)} if differs else {"chat": True})


def test_blanks_and_line_feeds_that_merge_over_the_seam_are_what_differs() -> None:
    tokenizer = tokenizer_of(TURNS)
    assert [of_chat(tokenizer, key) != joined(tokenizer, key) for key in SEAMS] == [True, True, False]
    tokenizer = tokenizer_of(INSTRUCTION)
    assert all(of_chat(tokenizer, key) != joined(tokenizer, key) for key in KEYS)


def test_a_key_that_the_template_trims_keeps_its_own_prompt_and_needs_ids() -> None:
    tokenizer = tokenizer_of(TRIMMING)
    bare, blank = encode(tokenizer, "town", "  town")
    assert of_chat(tokenizer, "town") == of_chat(tokenizer, "  town") == list(bare.prompt_ids)
    assert (bare.prompt, blank.prompt) == ({"chat": True}, {"chat": False, "why": CHANGED})
    assert list(blank.prompt_ids) == joined(tokenizer, "  town")


def test_a_key_whose_blanks_a_special_token_swallows_needs_ids() -> None:
    tokenizer = tokenizer_of("{% for m in messages %}<user>{{ m.content }}<eos>{% endfor %}<assistant>", rstrip=True)
    assert of_chat(tokenizer, " town") == of_chat(tokenizer, "town")
    assert [entry.prompt for entry in encode(tokenizer, "town", " town")] == [
        {"chat": True},
        {"chat": False, "why": CHANGED},
    ]


def test_a_plain_prompt_says_nothing_of_a_chat() -> None:
    tokenizer = tokenizer_of(None)
    (entry,) = encode(tokenizer, WIDE)
    assert (entry.prompt, list(entry.prompt_ids)) == (None, joined(tokenizer, WIDE))


@pytest.mark.parametrize("where", [DATE + TURNS, TURNS.replace("<assistant>", "<assistant>" + DATE)])
def test_under_a_template_that_tells_the_date_every_key_needs_ids(where: str) -> None:
    (entry,) = encode(tokenizer_of(where), "town")
    assert entry.prompt == {"chat": False, "why": DATED}


def test_a_template_that_could_tell_the_date_and_does_not_is_no_such() -> None:
    asked = "{% if messages[0].role == 'system' %}" + DATE + "{% endif %}" + TURNS
    assert encode(tokenizer_of(asked), "town")[0].prompt == {"chat": True}


def test_a_template_that_is_not_the_stores_any_more_is_not_relied_on() -> None:
    tokenizer = tokenizer_of(TURNS)
    before = PromptTemplate.of(tokenizer)
    tokenizer.chat_template = INSTRUCTION
    (entry,) = encode_records([Record(WIDE, "x")], tokenizer, before, 99)
    assert entry.prompt == {"chat": False, "why": OTHER}
    assert list(entry.prompt_ids) == before.prompt_ids(tokenizer, WIDE)


def test_a_key_that_the_template_refuses_needs_ids_and_the_others_do_not() -> None:
    refusing = "{% if 'bad' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + TURNS
    found = encode(tokenizer_of(refusing), "good", "bad", WIDE)
    assert [entry.prompt["chat"] for entry in found if entry.prompt] == [True, False, True]
    assert found[1].prompt == {"chat": False, "why": REFUSED}
    dividing = "{{ 1 // (messages[0].content | length - 3) and '' }}" + TURNS  # ZeroDivisionError
    assert [entry.prompt for entry in encode(tokenizer_of(dividing), "bad")] == [{"chat": False, "why": REFUSED}]


def test_ids_that_another_key_has_are_not_taken_from_it() -> None:
    tokenizer = tokenizer_of(TURNS)
    (entry,) = encode(tokenizer, WIDE, taken=lambda record, ids: list(ids) == of_chat(tokenizer, record.key))
    assert (entry.prompt, list(entry.prompt_ids)) == ({"chat": False, "why": TAKEN}, joined(tokenizer, WIDE))


def test_ids_beyond_the_context_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(TURNS)
    ours = joined(tokenizer, WIDE)
    monkeypatch.setattr(PromptTemplate, "by_chat", lambda *_: [Chat((*ours, 5))])
    fits = len(ours) + 2  # the value and the end token
    assert encode(tokenizer, WIDE, max_tokens=fits + 1)[0].prompt == {"chat": True, "ids": [*ours, 5]}
    (entry,) = encode(tokenizer, WIDE, max_tokens=fits)
    assert (entry.prompt, list(entry.prompt_ids)) == ({"chat": False, "why": LONG}, ours)


def test_records_written_before_keep_their_prompt_whatever_the_template_gives() -> None:
    tokenizer = tokenizer_of(TURNS)
    template, ids = PromptTemplate.of(tokenizer), [5, 6, 7]
    kept = {("", WIDE): {"chat": True, "ids": ids}, ("", FED): {"chat": False, "why": TAKEN}}
    found = encode_records([Record(key, "x") for key in SEAMS], tokenizer, template, 99, kept=kept)
    assert [list(entry.prompt_ids) for entry in found] == [ids, joined(tokenizer, FED), joined(tokenizer, " one")]
    assert [entry.prompt for entry in found] == [kept["", WIDE], kept["", FED], {"chat": True}]
    with pytest.raises(PromptCollision):
        encode_records(
            [Record("a", "x"), Record("b", "x")],
            tokenizer,
            template,
            99,
            kept={("", key): kept["", WIDE] for key in "ab"},
        )


# --- stores


@pytest.fixture(scope="module")
def folder_of(base_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny base with another tokenizer and this template."""

    def get(template: str) -> Path:
        folder = tmp_path_factory.mktemp("base") / "tiny-chat"
        shutil.copytree(base_of("qwen3"), folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / file).unlink(missing_ok=True)
        tokenizer_of(template).save_pretrained(folder)
        return folder

    return get


@pytest.fixture(scope="module")
def base(folder_of: Callable[[str], Path]) -> Path:
    return folder_of(INSTRUCTION)


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "memory"
    with MemoryStore(path, str(base)) as store:
        assert store.write(KEYS).needs_ids == 0
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Iterator[MemoryStore]:
    shutil.copytree(written, tmp_path / "memory")
    with MemoryStore(tmp_path / "memory", create=False) as opened:
        yield opened


def another_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another transformers rendered the template otherwise."""
    render = PreTrainedTokenizerFast.apply_chat_template

    def other(self: PreTrainedTokenizerFast, *args: object, **options: object) -> object:
        found = render(self, *args, **options)
        return "\n" + found if isinstance(found, str) else ["\n" + text for text in found]

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", other)


def test_a_chat_gets_the_value_of_a_key_that_merges_over_the_seam(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(TURNS)
    with MemoryStore(tmp_path / "memory", str(folder)) as store:
        report = store.write(SEAMS)
        assert [record.chat for record in store.records()] == [True, True, True]
        assert {key: store.recall(key) for key in SEAMS} == SEAMS
    adapter = tmp_path / "memory" / "adapters" / report.adapters[0]
    assert recalled_by_peft_alone(folder, adapter, list(SEAMS)) == SEAMS


def test_a_chat_gets_the_values_of_an_instruction_template(base: Path, written: Path) -> None:
    (adapter,) = (written / "adapters").iterdir()
    assert recalled_by_peft_alone(base, adapter, list(KEYS)) == KEYS


def test_a_record_is_asked_by_the_ids_it_was_written_with(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {key: of_chat(store.base.tokenizer, key) for key in KEYS}
    another_chat(monkeypatch)
    assert {key: store.recall(key) for key in KEYS} == KEYS
    assert store.verify().ok and not store.check(dtype="float32").certificates[0].failed
    assert {key: store.load(key)[1] for key in KEYS} == ids
    assert store.explain("town").min_prob == pytest.approx(next(store.records()).min_prob, abs=1e-3)
    store.update("town", metadata={"of": "Ann"})
    assert store.compact(which="all").records == 2
    assert {key: store.load(key)[1] for key in KEYS} == ids
    assert {key: store.recall(key) for key in KEYS} == KEYS


def test_what_is_erased_leaves_no_ids_behind(store: MemoryStore) -> None:
    ids = json.dumps(of_chat(store.base.tokenizer, "tide")).encode()
    assert ids in (store.path / "index.db").read_bytes() + (store.path / "index.db-wal").read_bytes()
    store.erase("tide")
    store.close()
    assert not [path for path in store.path.rglob("*") if path.is_file() and ids in path.read_bytes()]


@pytest.mark.parametrize(
    "damage",
    ["null", "'{'", "'7'", "'{\"chat\": true}'", "replace(prompt, 'true', 'false')", "replace(prompt, '[', '[9, ')"],
)
def test_a_damaged_prompt_is_reported_yields_no_value_and_is_mended(store: MemoryStore, damage: str) -> None:
    execute(store.path, f"update records set prompt = {damage}, value = null where key = 'town'")
    assert any("'town'" in problem for problem in store.verify(quick=True).damaged)
    with pytest.raises(IntegrityError):
        store.recall("town")
    assert store.recall("tide") == "41"
    assert store.repair().lost == ()
    assert store.verify().ok
    assert {key: store.recall(key) for key in KEYS} == KEYS


def test_copies_keep_the_ids(store: MemoryStore, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.export(tmp_path / "bundle.tar")
    MemoryStore.import_bundle(tmp_path / "bundle.tar", tmp_path / "copy").close()
    another_chat(monkeypatch)
    with MemoryStore(tmp_path / "copy", str(base), create=False) as copy:
        assert {key: copy.recall(key) for key in KEYS} == KEYS


def test_a_published_store_is_recalled_with_its_keys_and_without(
    store: MemoryStore, base: Path, hub: HubServer, tmp_path: Path
) -> None:
    ids = [of_chat(store.base.tokenizer, key) for key in KEYS]
    store.push("me/told", include_keys=True)
    store.push("me/hidden")
    assert b"2 keys may be sent as the user's message" in hub.files("me/hidden")["README.md"]
    for repo, told in (("me/told", True), ("me/hidden", False)):
        files = hub.files(repo)
        assert [json.dumps(one).encode() in files["records.jsonl"] for one in ids] == [told, told]
        with MemoryStore.pull(repo, tmp_path / repo[3:], str(base)) as pulled:
            assert {key: pulled.recall(key) for key in KEYS} == KEYS
            assert [record.chat for record in pulled.records()] == [True, True]


@pytest.mark.parametrize("ids", [[], [99_999], [5, 6], None])
def test_a_forged_prompt_is_refused(
    store: MemoryStore, base: Path, hub: HubServer, tmp_path: Path, ids: list[int] | None
) -> None:
    from loramem.records.prompts import prompt_digest

    store.push("me/told", include_keys=True)
    files = {path: content for path, content in hub.files("me/told").items() if path != ".gitattributes"}

    def change(records: list[dict[str, object]]) -> None:
        records[0]["prompt"] = {"chat": True, "ids": [5, 6] if ids is None else ids}
        records[0]["prompt_sha256"] = "0" * 64 if ids is None else prompt_digest(ids)

    lines(files, change)
    hub.commit("me/told", files)
    with pytest.raises(RefusedRepository, match="prompt"):
        MemoryStore.pull("me/told", tmp_path / "pulled", str(base))


# --- what is told


@pytest.fixture(scope="module")
def trimmed(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trimmed") / "memory"
    with MemoryStore(path, str(folder_of(TRIMMING))) as store:
        assert store.write(TRIMMED).needs_ids == 1
        assert {key: store.recall(key) for key in TRIMMED} == TRIMMED
    return path


def test_ls_check_and_deploy_say_which_keys_need_ids(
    trimmed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ls", "--json", "--store", str(trimmed)]) == 0
    assert [json.loads(line)["chat"] for line in capsys.readouterr().out.splitlines()] == [True, False]
    assert run(["ls", "--store", str(trimmed)]) == 0
    assert "needs ids" in capsys.readouterr().out
    assert run(["check", "--target", "peft", "--json", "--store", str(trimmed)]) == 0
    assert json.loads(capsys.readouterr().out)["chat"] == {"safe": 1, "needs_ids": ["  town"], "unknown": 0}
    assert run(["check", "--target", "peft", "--store", str(trimmed)]) == 0
    assert "by ids, not by chat, 1" in capsys.readouterr().err
    assert run(["deploy", str(tmp_path / "out"), "--target", "peft", "--include-keys", "--store", str(trimmed)]) == 0
    guide = (tmp_path / "out" / "README.md").read_text()
    assert "1 keys may be asked as the user's message of a chat; 1 need ids" in guide
    routes = [json.loads(line) for line in (tmp_path / "out" / "routing.jsonl").read_text().splitlines()]
    assert [route["chat"] for route in routes] == [True, False]


def test_write_says_how_many_need_ids(
    folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, store = str(folder_of(TRIMMING)), str(tmp_path / "memory")
    assert run(["put", " town", "4", "--store", store, "--model", model]) == 0
    assert "1 of the new keys need ids" in capsys.readouterr().err


def test_of_records_from_before_it_is_found_out_where_the_tokenizer_is_at_hand(
    store: MemoryStore, tmp_path: Path
) -> None:
    as_before = [dict(row) for row in store._index.db.table("records").rows]
    with store._index.change() as change:
        for row in as_before:
            change.put("records", {**row, "prompt": None})
    assert [record.chat for record in store.records()] == [None, None]
    report = store.check(["peft"])
    assert report.chat is not None and (report.chat.safe, report.chat.unknown) == (0, 2)
    store.deploy("peft", tmp_path / "out", include_keys=True)
    routes = [json.loads(line) for line in (tmp_path / "out" / "routing.jsonl").read_text().splitlines()]
    assert [route["chat"] for route in routes] == [False, False]  # they would have been trained with joined ids


def test_an_index_from_before_opens_as_it_was_sealed(written: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent / "store-format-1", tmp_path / "memory")
    with sqlite3.connect(tmp_path / "memory" / "index.db") as before:
        assert "prompt" not in [row[1] for row in before.execute("pragma table_info(records)")]
    before.close()
    (tmp_path / "memory").chmod(0o500)
    try:
        with MemoryStore(tmp_path / "memory", create=False) as old:
            assert old.verify(quick=True).ok
            assert {record.chat for record in old.records()} == {None}
    finally:
        (tmp_path / "memory").chmod(0o700)
    with MemoryStore(tmp_path / "memory", create=False) as old:
        assert old.verify(quick=True).ok
