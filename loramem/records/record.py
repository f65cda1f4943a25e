"""Records: what is written, and how Python objects and rows of files become records.

Everything that can be said about a record without a tokenizer is checked here, with the line number.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loramem.errors import ConflictingRecord, EmptyField, InputError, InvalidField, QuestionTaken

KEY, VALUE = "key", "value"
METADATA_DEPTH = 100
"""JSON readers give up somewhere between 200 and 1,000 levels; what was taken in must also be read again."""
QUESTIONS = "questions"
LISTED = frozenset({"prompt_sha256", "answer_tokens", "adapter", "min_prob", "written_at", "chat"})
"""What `loramem ls --json` says of a record beside what was given: true of the store it was listed from alone."""


@dataclass(frozen=True)
class Record:
    """One fact: ``value`` is what decoding must give, verbatim, for ``key``.

    Args:
        key: Any non-empty text; unique within its namespace.
        value: Any non-empty text.
        questions: Other texts that are to give the value, each trained, certified and recalled as the key is; no text
            of a namespace asks for two records.
        namespace: Separate recall spaces; the same key may exist in each.
        metadata: JSON-able facts kept in the index beside the record; never trained. Names are strings.
        line: Where the record stood in its input (1-based), for error messages.

    Raises:
        InvalidField: A field is not a string, or not encodable as UTF-8 (a lone surrogate), metadata included;
            metadata is not JSON, or nested more than 100 deep; questions are no list of strings.
        EmptyField: Key, value or a question is empty.
    """

    key: str
    value: str
    namespace: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = field(default=None, compare=False, repr=False)
    questions: Sequence[str] = field(default=(), kw_only=True)
    question_of: str | None = field(default=None, kw_only=True, repr=False)
    """Of a question that stands as a record of its own, as the index keeps it (`asked_apart`): whose it is."""

    def __post_init__(self) -> None:
        questions = self.questions
        if isinstance(questions, str) or not isinstance(questions, Sequence):
            raise InvalidField(
                f"The questions of key {shown(self.key)} must be a list of strings, not {shown(questions)}.",
                line=self.line,
            )
        for question in questions:
            if not isinstance(question, str) or lone_surrogate(question) is not None:
                raise InvalidField(
                    f"A question of key {shown(self.key)} must be text that UTF-8 can hold, not {shown(question)}.",
                    line=self.line,
                )
            if not question:
                raise EmptyField(f"A question of key {self.key!r} is empty.", key=self.key, line=self.line)
        if questions != ():
            object.__setattr__(self, "questions", tuple(dict.fromkeys(text for text in questions if text != self.key)))
        for name in ("key", "value", "namespace"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise InvalidField(
                    f"The {name} must be a string, not {type(text).__name__} ({shown(text)}). "
                    "Quote it: a number's spelling is not kept otherwise.",
                    line=self.line,
                )
            if (at := lone_surrogate(text)) is not None:
                raise InvalidField(
                    f"The {name} {text!r} holds a lone surrogate at character {at}, which UTF-8 cannot hold.",
                    line=self.line,
                )
        if self.metadata != {} and (fault := _metadata_fault(self.metadata)):
            raise InvalidField(f"The metadata of key {self.key!r} {fault}.", key=self.key, line=self.line)
        if not self.key:
            raise EmptyField("The key is empty.", key=self.key, line=self.line)
        if not self.value:
            raise EmptyField(f"The value of key {self.key!r} is empty.", key=self.key, line=self.line)

    def bare(self) -> "Record":
        """Without metadata and questions."""
        return replace(self, metadata={}, questions=()) if self.metadata or self.questions else self


def lone_surrogate(text: str) -> int | None:
    """Where the text holds half of a surrogate pair, which no UTF-8 text can; None if nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _metadata_fault(metadata: Mapping[Any, Any]) -> str | None:
    """What cannot be kept as it is, in words."""
    try:
        metadata = dict(metadata)
        if (fault := _text_fault(metadata)) is None:
            json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        fault = f"is not JSON ({error})"
    return fault


def _text_fault(metadata: Mapping[Any, Any]) -> str | None:
    """What of it JSON text would hold otherwise, or not at all; `json.dumps` finds what is not JSON."""
    waiting: list[tuple[Any, int]] = [(metadata, 1)]
    while waiting:
        item, depth = waiting.pop()
        if depth > METADATA_DEPTH:
            return f"is nested more than {METADATA_DEPTH} deep"
        if isinstance(item, str):
            if (at := lone_surrogate(item)) is not None:
                return f"holds a lone surrogate at character {at} of {shown(item)}, which UTF-8 cannot hold"
        elif isinstance(item, Mapping):
            for name in item:
                if not isinstance(name, str):  # json.dumps makes a string of it, and of two names one
                    return f"has the name {shown(name)}, which is no string"
            waiting.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list | tuple):
            waiting.extend((part, depth + 1) for part in item)
    return None


def has_lone_surrogate(metadata: Mapping[str, Any]) -> bool:
    """Whether metadata hold one anywhere, as stores of older versions may."""
    return lone_surrogate(json.dumps(metadata, ensure_ascii=False)) is not None


def journal_fields(record: Record) -> dict[str, Any]:
    """What a journal keeps of a record, in the order in which it always did."""
    return {
        "key": record.key,
        "value": record.value,
        "namespace": record.namespace,
        **({} if record.question_of is None else {"question_of": record.question_of}),
        "metadata": dict(record.metadata),
    }


def journalled(fields: Mapping[str, Any]) -> Record:
    """A record of a journal. Older versions took lone surrogates in metadata: their escapes stand for them now."""
    return Record(**{**fields, "metadata": _escaped(fields["metadata"])})


def _escaped(item: Any) -> Any:
    if isinstance(item, str):
        return item.encode(errors="backslashreplace").decode()
    if isinstance(item, dict):
        return {_escaped(name): _escaped(value) for name, value in item.items()}
    return [_escaped(value) for value in item] if isinstance(item, list) else item


def shown(value: object) -> str:
    """A value as one line of an error message, long ones cut."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


RecordLike = Record | Mapping[str, Any] | tuple[str, str]


def as_records(source: Mapping[str, str] | Iterable[RecordLike], namespace: str = "") -> list[Record]:
    """`iterate_records`, all of them."""
    return list(iterate_records(source, namespace))


def iterate_records(source: Mapping[str, str] | Iterable[RecordLike], namespace: str = "") -> Iterator[Record]:
    """Records from a mapping key -> value, or an iterable of Records, pairs or rows as in files (`record_of_row`), as
    they are asked for.

    A single dict is a mapping, never one record: ``[{"key": ..., "value": ...}]`` is one record.

    Raises:
        InvalidField, EmptyField: See `Record`; an entry's position counts as its line.
        InputError: A single dict that looks like one record: it could be meant as either.
    """
    if isinstance(source, Mapping):
        if (names := _names_of_record(source, KEY, VALUE)) is not None:
            raise InputError(
                f"A dict with {' and '.join(map(repr, names))} may be one record or a mapping from keys to values. "
                'Give [{"key": …, "value": …}] for one record, or pairs [("key", …), ("value", …)] for the others.'
            )
        source = list(source.items())
    for line, entry in enumerate(source, start=1):
        yield _as_record(entry, namespace, line)


def _as_record(entry: RecordLike, namespace: str, line: int) -> Record:
    if isinstance(entry, Record):  # with none of its own it is as a row without one
        return entry if entry.namespace or not namespace else replace(entry, namespace=namespace)
    if isinstance(entry, Mapping):
        return record_of_row(entry, namespace=namespace, line=line)
    if isinstance(entry, tuple | list) and len(entry) == 2:
        return Record(entry[0], entry[1], namespace, line=line)
    raise InvalidField(f"Expected a Record, a (key, value) pair or a dict, got {shown(entry)}.", line=line)


def _names_of_record(row: Mapping[str, Any], key_field: str, value_field: str) -> tuple[str, ...] | None:
    """The fields that a row's key and value stand in; None if it has none.

    They are those named; for the default names also a chat of trainers, if it is there in their place.
    """
    if key_field in row and value_field in row:
        return key_field, value_field
    if (key_field, value_field) != (KEY, VALUE) or KEY in row or VALUE in row:
        return None
    if "messages" in row and not isinstance(row["messages"], str):
        return ("messages",)
    if "prompt" in row and "completion" in row:
        return "prompt", "completion"
    return None


def is_one_record(row: Mapping[str, Any], key_field: str, value_field: str) -> bool:
    """Whether a JSON object that stands for a whole file is one record, not a mapping from keys to values.

    Raises:
        InputError: It has the fields of a record among others, and all are strings: it could be either.
    """
    names = _names_of_record(row, key_field, value_field)
    if names is None:
        return False
    others = [name for name in row if name not in (*names, "namespace", "metadata")]
    if others and all(isinstance(value, str) for value in row.values()):
        raise InputError(
            f"The object has {' and '.join(map(repr, names))} beside {shown(others[0])}: it may be one record or a "
            "mapping from keys to values. Put it in [ ] if it is a record; otherwise list a row for each key."
        )
    return True


def record_of_row(
    row: Any, key_field: str = KEY, value_field: str = VALUE, namespace: str = "", line: int | None = None
) -> Record:
    """The record of an object with named fields.

    Key and value stand in the fields named. Where those names are the default ones and the row has neither, it may
    also be as trainers take it: ``messages`` of one user and one assistant, or ``prompt`` and ``completion`` as text or
    as lists of one message. ``namespace`` is the record's, as are ``questions``, a list of strings, which in a table is
    written as JSON; fields other than these become metadata, beside those in ``metadata``.

    Args:
        namespace: For a row that names none.

    Raises:
        InvalidField: A field is missing or is not what it should be, or the row is of another namespace; see `Record`.
        EmptyField: See `Record`.
    """
    if not isinstance(row, Mapping):
        raise InvalidField(f"Expected an object with {key_field!r} and {value_field!r}, got {shown(row)}.", line=line)
    names = _names_of_record(row, key_field, value_field)
    if names is None:
        missing = next(name for name in (key_field, value_field) if name not in row)
        raise InvalidField(
            f"No field {missing!r}; there are {', '.join(map(shown, row)) or 'none'}. "
            "Name them with --key-field and --value-field.",
            line=line,
        )
    if names == ("messages",):
        key, value = _turns(row["messages"], ("user", "assistant"), "messages", line)
    elif names == ("prompt", "completion"):
        key, value = _spoken(row, "prompt", "user", line), _spoken(row, "completion", "assistant", line)
    else:
        key, value = row[key_field], row[value_field]
    others = {name: value for name, value in row.items() if name not in names}
    if not others:
        return Record(key, value, namespace, line=line)
    if others.keys() >= LISTED:
        others = {name: value for name, value in others.items() if name not in LISTED}
    named = others.pop("namespace", None)
    if named and namespace and named != namespace:
        raise InvalidField(
            f"The row is of namespace {shown(named)}, and {namespace!r} was given (--namespace). Leave one out.",
            line=line,
        )
    metadata = others.pop("metadata", None) or {}
    if not isinstance(metadata, Mapping):
        raise InvalidField(f"The field 'metadata' must be an object, not {shown(metadata)}.", line=line)
    questions = _questions(others.pop(QUESTIONS, None), line)
    space = namespace if named in (None, "") else named
    return Record(key, value, space, {**metadata, **others}, line, questions=questions)


def _questions(given: Any, line: int | None) -> Any:
    """A field of questions; `Record` checks what it holds."""
    if isinstance(given, str) and given:
        try:
            given = json.loads(given)
        except ValueError:
            raise InvalidField(
                f"The field {QUESTIONS!r} must be a list of strings, as JSON in a table, not {shown(given)}.", line=line
            ) from None
    return given or ()


def _spoken(row: Mapping[str, Any], name: str, role: str, line: int | None) -> Any:
    """A field that holds a text, or the text as a list of one message."""
    return _turns(row[name], (role,), name, line)[0] if isinstance(row[name], list) else row[name]


def _turns(messages: Any, roles: tuple[str, ...], name: str, line: int | None) -> list[Any]:
    """Contents of the messages of a field, which must be of these roles."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise InvalidField(f"The field {name!r} must be a list of messages, not {shown(messages)}.", line=line)
    found = [message.get("role") for message in messages]
    if found != list(roles):
        raise InvalidField(
            f"The field {name!r} has messages of {', '.join(map(shown, found)) or 'nobody'}, not of "
            f"{' and '.join(roles)}: the store's prompt is one user message, without system message or earlier turns.",
            line=line,
        )
    return [_content(message, name, line) for message in messages]


def _content(message: Mapping[str, Any], name: str, line: int | None) -> Any:
    more = [field for field, value in message.items() if value and field not in ("role", "content")]
    if more:
        raise InvalidField(f"A message of the field {name!r} has {shown(more[0])}, which no prompt shows.", line=line)
    content = message.get("content")
    if not isinstance(content, list):
        return content
    if len(content) == 1 and isinstance(content[0], Mapping) and content[0].get("type") == "text":
        return content[0].get("text")
    raise InvalidField(
        f"A message of the field {name!r} has other contents than one text: {shown(content)}.", line=line
    )


def deduplicate(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Split into records to write and exact repetitions of an earlier one.

    Raises:
        ConflictingRecord: The same key comes twice with different values.
        QuestionTaken: A question is another record's key, or a question of two.
    """
    first: dict[tuple[str, str], Record] = {}
    repeated = []
    for record in records:
        known = first.get((record.namespace, record.key))
        if known is None:
            first[record.namespace, record.key] = record
            continue
        if known.question_of != record.question_of:
            raise question_taken(record, known.key if known.question_of is None else known.question_of)
        if known.value != record.value:
            raise ConflictingRecord(
                f"Key {record.key!r} was given before (line {known.line}) with another value: "
                f"{known.value!r}, now {record.value!r}.",
                key=record.key,
                line=record.line,
            )
        repeated.append(record)
    return list(first.values()), repeated


def question_taken(record: Record, other: str) -> QuestionTaken:
    """The error that says whose a text is already which a record is to be asked by."""
    asks = f"key {record.key!r}" if record.question_of is None else f"question {record.key!r} of {record.question_of!r}"
    return QuestionTaken(
        f"The {asks} asks for the record {other!r} already. One text gives one value: word it otherwise.",
        other=other,
        key=record.key,
        line=record.line,
    )
