"""Several questions, one value: templates that make questions of keys, and questions as records of their own.

To training, proof and recall a question is a record like any other, whose value is that of the record it asks for. So
each has a row of its own in the index, with its own certificate, which names that record's key.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from loramem.errors import ArgumentError
from loramem.records.record import Record

KEY_HERE = "{key}"


def check_templates(templates: Iterable[str]) -> None:
    """
    Raises:
        ArgumentError: A template would ask the same of every record.
    """
    for template in templates:
        if KEY_HERE not in template:
            raise ArgumentError(
                f"The question {template!r} has no {KEY_HERE}, so that it would ask for no record in particular. Write "
                f"one such as 'What is the phone number of {KEY_HERE}?'.",
                argument="ask",
                value=template,
            )


def ask(records: Iterable[Record], templates: Sequence[str]) -> Iterator[Record]:
    """Records with questions made of templates beside those they have.

    Args:
        templates: With ``{key}``, which stands for the key without a colon at its end, where a key like a form's has
            one.
    """
    for record in records:
        asked = (asking(template, record.key) for template in templates)
        yield replace(record, questions=(*record.questions, *asked)) if templates else record


def asking(template: str, key: str) -> str:
    """The question that a template makes of a key."""
    return template.replace(KEY_HERE, name_in(key))


def name_in(key: str) -> str:
    """A key as it stands in a sentence."""
    return key.rstrip().removesuffix(":").rstrip() or key


def asked_apart(records: Iterable[Record]) -> Iterator[Record]:
    """Every record, and after it each of its questions as a record."""
    for record in records:
        yield record
        for question in record.questions:
            yield Record(question, record.value, record.namespace, line=record.line, question_of=record.key)


def renamed(questions: Iterable[str], key: str, new_key: str) -> list[str]:
    """Questions of a record that gets another key: those that name it name the new one."""
    return [question.replace(name_in(key), name_in(new_key)) for question in questions]
