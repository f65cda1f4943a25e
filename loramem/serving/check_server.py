"""Every key of a store asked of the server that serves its adapters, and every answer compared with its digest.

A certificate is about the arithmetic of the machine that wrote it. Servers add in another order, keep other
intermediates, hold quantised weights; whether a record comes back there, and with how much to spare, only they can
tell.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from loramem.errors import StoreError
from loramem.index.rows import StoredRecord
from loramem.records.prompts import decode_answer
from loramem.results import ServerCheck, ServerReport
from loramem.serving.endpoints import Answer, Endpoint
from loramem.serving.targets import Target
from loramem.store.session import Session


def check_server(
    session: Session,
    url: str,
    target: Target | None = None,
    *,
    at_once: int = 8,
    timeout_s: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> ServerReport:
    """Ask a server for every live record of a store; of the base model only the tokenizer is loaded.

    Args:
        url: Without the path of an API.
        target: What the server is; None asks it.
        at_once: Requests that are under way together.
        timeout_s: For one answer.
        progress: Told how many records of how many were asked.

    Raises:
        ServerError: No server, one that lacks an adapter, or one that gives something else than answers.
        StoreError: The store does not hold its keys.
        OtherBaseModel, BaseModelNotFound: As `Session.tokenizer`.
    """
    if session.manifest.key_salt is not None:
        raise StoreError(f"{session.store} holds digests of its keys, not the keys: nothing can be asked of a server.")
    with session.index.snapshot():
        records = list(session.index.records())
    adapters = list(dict.fromkeys(record.adapter for record in records))
    with Endpoint(url, target, timeout_s=timeout_s) as endpoint:
        endpoint.require(adapters)
        tokenizer, template = session.tokenizer, session.manifest.template()
        prompts = [template.stored_ids(tokenizer, record.key, record.prompt) for record in records]

        def ask(record: StoredRecord, prompt: Sequence[int]) -> Answer:
            most = record.answer_tokens + 2  # the end token, and one beyond: it must have ended
            return endpoint.ask(record.adapter, prompt, most, template.end_id)

        answers = list[tuple[StoredRecord, Answer, str | None]]()
        with ThreadPoolExecutor(at_once) as pool:
            for record, answer in zip(records, pool.map(ask, records, prompts), strict=True):
                text = answer.text if answer.ids is None else decode_answer(tokenizer, answer.ids)
                answers.append((record, answer, _failure(record, answer, text)))
                if progress is not None:
                    progress(len(answers), len(records))
        checks = (_check(name, [each for each in answers if each[0].adapter == name]) for name in adapters)
        return ServerReport(endpoint.url, endpoint.target, tuple(checks))


def _failure(record: StoredRecord, answer: Answer, text: str) -> str | None:
    """Why an answer is not the record's value; None where it is."""
    if answer.refused is not None:
        return answer.refused
    if not record.holds(text):
        return "another answer"
    return None if answer.ended else "the value, and no end"


def _check(adapter: str, answers: Sequence[tuple[StoredRecord, Answer, str | None]]) -> ServerCheck:
    told = [answer.min_prob for _, answer, why in answers if why is None and answer.min_prob is not None]
    return ServerCheck(
        adapter=adapter,
        records=len(answers),
        exact=sum(why is None for _, _, why in answers),
        failed={record.key: why for record, _, why in answers if why is not None},
        min_prob=min(told, default=None),
        committed_min_prob=min((record.min_prob for record, _, _ in answers), default=None),
    )
