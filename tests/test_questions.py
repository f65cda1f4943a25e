"""Several questions for one value: what is written, proved and recalled, and what becomes of questions later."""

import json
import shutil
from pathlib import Path

import pytest
from loramem_cli.main import run

from loramem import KeyNotFound, MemoryStore, Record
from loramem.errors import ArgumentError, ConflictingRecord, EmptyField, InvalidField, QuestionTaken
from loramem.records.questions import asking, renamed
from loramem.records.record import record_of_row

ANN = Record("Ann Lee:", "31415", questions=["Where is Ann?", "Ann's number?"])
BOB = Record("Bob Ray:", "27182")
ASK = "How do I reach {key}?"
OF_ANN = ["Where is Ann?", "Ann's number?", "How do I reach Ann Lee?"]


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "memory"
    with MemoryStore(path, str(base)) as store:
        report = store.write([ANN, BOB], ask=[ASK])
        assert (report.written, report.questions, report.failed) == (2, 4, ())
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> MemoryStore:
    shutil.copytree(written, tmp_path / "memory")
    return MemoryStore(tmp_path / "memory", create=False)


def recalled(store: MemoryStore, questions: list[str]) -> set[str]:
    return {store.recall(question) for question in questions}


def test_a_template_names_the_key_without_the_colon_of_a_form() -> None:
    assert asking(ASK, "Ann Lee:") == "How do I reach Ann Lee?"
    assert asking("{key}: {key}", "a") == "a: a"
    assert asking(ASK, ":") == "How do I reach :?"
    assert renamed([asking(ASK, "Ann Lee:"), "Where?"], "Ann Lee:", "Ann Ray:") == ["How do I reach Ann Ray?", "Where?"]


def test_a_template_that_asks_the_same_of_all_is_refused(store: MemoryStore) -> None:
    with pytest.raises(ArgumentError, match=r"no \{key\}"):
        store.write({"new": "1"}, ask=["What is the number?"])
    assert "new" not in store


def test_every_question_gives_the_value_and_is_no_record_of_its_own(store: MemoryStore) -> None:
    assert recalled(store, ["Ann Lee:", *OF_ANN]) == {"31415"}
    assert store.recall("How do I reach Bob Ray?") == "27182"
    assert (len(store), list(store), [record.key for record in store.records()]) == (2, *[["Ann Lee:", "Bob Ray:"]] * 2)
    assert store.questions("Ann Lee:") == store.questions("Where is Ann?") == OF_ANN
    assert [recall.key for recall in store.recall_many()] == ["Ann Lee:", "Bob Ray:"]
    assert (store.stats().records, store.stats().questions) == (2, 4)
    assert store.verify().exact == 6
    assert store.record("Where is Ann?").min_prob >= 0.6


@pytest.mark.parametrize(
    "records",
    [
        [("Where is Ann?", "1")],
        [Record("new", "1", questions=["Bob Ray:"])],
        [Record("new", "1", questions=["Where is Ann?"])],
        [Record("new", "1", questions=["x"]), Record("x", "2")],
        [Record("new", "1", questions=["x"]), Record("other", "1", questions=["x"])],
    ],
)
def test_a_text_that_would_ask_for_two_records_is_refused_by_name(store: MemoryStore, records: list[Record]) -> None:
    before = list(store.iter_asked())
    with pytest.raises(QuestionTaken, match="asks for the record") as caught:
        store.write(records, on_conflict="replace")
    assert caught.value.other in ("Ann Lee:", "Bob Ray:", "new")
    assert (len(store), list(store.iter_asked()), store.pending()) == (2, before, None)


def test_questions_can_be_added_to_a_record_that_is_there(store: MemoryStore) -> None:
    report = store.write([Record("Bob Ray:", "27182", questions=["Bob?"])])
    assert (report.written, report.questions, report.skipped) == (0, 1, 1)
    assert store.questions("Bob Ray:") == ["How do I reach Bob Ray?", "Bob?"]
    assert store.recall("Bob?") == "27182"
    assert store.write([ANN, BOB], ask=[ASK]).questions == 0


def test_another_value_is_that_of_every_question(store: MemoryStore) -> None:
    with pytest.raises(ConflictingRecord):
        store.write([Record("Ann Lee:", "1", questions=["Ann?"])])
    store.write([Record("Ann Lee:", "1", questions=["Ann?"])], on_conflict="skip")
    assert "Ann?" not in store
    assert store.update("Where is Ann?", "16180").written == 1
    assert recalled(store, ["Ann Lee:", *OF_ANN]) == {"16180"}
    store.write([Record("Ann Lee:", "14142", questions=["Ann?"])], on_conflict="replace")
    assert recalled(store, ["Ann Lee:", "Ann?", *OF_ANN]) == {"14142"}
    assert store.history("Where is Ann?")[0].ended_by == "replaced"


def test_a_renamed_record_keeps_its_questions_which_name_it_anew(store: MemoryStore) -> None:
    store.rename("Ann Lee:", "Ann Ray:")
    assert store.questions("Ann Ray:") == ["Where is Ann?", "Ann's number?", "How do I reach Ann Ray?"]
    assert recalled(store, store.questions("Ann Ray:")) == {"31415"}
    assert "How do I reach Ann Lee?" not in store
    store.rename("Where is Ann?", "Where does Ann live?")
    assert store.record("Where does Ann live?").question_of == "Ann Ray:"
    assert len(store) == 2


def test_questions_go_with_their_record_and_one_can_go_alone(store: MemoryStore) -> None:
    assert store.delete("Ann's number?") == 1
    assert store.recall("Where is Ann?") == "31415"
    store.compact(which="all")
    assert store.questions("Ann Lee:") == ["Where is Ann?", "How do I reach Ann Lee?"]
    store.delete("Ann Lee:")
    for question in ("Ann Lee:", *OF_ANN):
        with pytest.raises(KeyNotFound):
            store.recall(question)
    assert store.recall("How do I reach Bob Ray?") == "27182"


def test_an_erased_record_leaves_neither_value_nor_question(store: MemoryStore) -> None:
    store.delete("Ann's number?")  # a question of before is erased as well
    store.erase("Ann Lee:")
    assert store.recall("How do I reach Bob Ray?") == "27182"
    content = b"".join(file.read_bytes() for file in store.path.rglob("*") if file.is_file())
    assert not any(text.encode() in content for text in ("31415", "Ann Lee", "Where is Ann", "Ann's number"))


def test_an_interrupted_write_is_resumed_with_its_questions(store: MemoryStore) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write([Record("Cy:", "5", questions=["Where is Cy?"])], progress=stop)
    assert store.resume().questions == 1
    assert (store.recall("Where is Cy?"), store.questions("Cy:")) == ("5", ["Where is Cy?"])


def test_batches_are_asked_as_whole_writes_are(store: MemoryStore) -> None:
    records = [Record("Cy:", "5", questions=["Where is Cy?"]), Record("Di:", "6")]
    planner = store._session.planner
    admitted, _ = planner.admit(records)
    assert planner.admits(records, admitted, 0, "error")  # questions are other objects each time
    assert [report.questions for report in store.write_batches(records, batch=1, ask=[ASK])] == [2, 1]
    assert recalled(store, ["Cy:", "Where is Cy?", "How do I reach Cy?"]) == {"5"}
    assert not planner.admits(records, admitted, 0, "error")
    listed = {record.key: questions for record, questions in store.iter_asked()}
    assert listed == {record.key: store.questions(record.key) for record in store.iter_records()}
    assert len(listed) == len(list(store.namespace("").iter_asked())) == 4
    assert not list(store.namespace("other").iter_records())


def test_rows_have_questions_as_a_list_or_as_json() -> None:
    for questions in (["a", "k", "a"], '["a"]'):
        record = record_of_row({"key": "k", "value": "v", "questions": questions, "n": "1"})
        assert (record.questions, record.metadata) == (("a",), {"n": "1"})
    for fault in ("a?", [1], {"a": 1}, "3"):
        with pytest.raises(InvalidField):
            record_of_row({"key": "k", "value": "v", "questions": fault})
    with pytest.raises(EmptyField):
        Record("k", "v", questions=[""])


def test_the_command_takes_templates_and_lists_questions_that_can_be_written_again(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, store = tmp_path / "facts.jsonl", str(tmp_path / "m")
    file.write_text(json.dumps({"key": "Ann Lee:", "value": "31415", "questions": ["Ann?"]}) + "\n")
    assert run(["write", str(file), "--ask", "What?", "--store", store, "--model", str(base)]) == 2
    assert not (tmp_path / "m").exists()
    assert run(["write", str(file), "--ask", ASK, "--store", store, "--model", str(base)]) == 0
    assert "1 records and 2 questions" in capsys.readouterr().out
    assert run(["recall", "How do I reach Ann Lee?", "--store", store]) == 0
    assert capsys.readouterr().out == "31415\n"
    assert run(["ls", "--json", "--store", store]) == 0
    listed = json.loads(capsys.readouterr().out)
    again = record_of_row({**listed, "value": "31415"})
    assert (again.questions, again.metadata) == (("Ann?", "How do I reach Ann Lee?"), {})
