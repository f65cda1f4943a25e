"""Certificates looked at again: every record of adapters decoded and scored, in the store's dtype or a server's.

A server casts the base model and the adapters to the dtype it serves in. p moves there, and with it what the
certificates of a store in float32 are worth: this measures it, through PEFT, in the batches that a proof decodes in and
of every record alone, and says the lowest.
"""

from collections.abc import Callable, Iterator, Sequence

from loramem.errors import IntegrityError
from loramem.index.rows import StoredAdapter, StoredRecord
from loramem.models.certificate import examine, free_running, least_certain, lowest_probabilities, misrecalled
from loramem.models.dtypes import Dtype
from loramem.records.prompts import encode_record
from loramem.records.record import Record
from loramem.results import AdapterCheck
from loramem.store.read import decode_batches
from loramem.store.session import Session


def check_certificates(
    session: Session,
    adapters: Sequence[str] | None = None,
    dtype: Dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[AdapterCheck]:
    """Decode every live record of adapters, as read from disk now, and score its tokens.

    Args:
        adapters: Ids; every adapter with live records if None.
        dtype: "float32", "bfloat16" or "float16": base model and adapters are cast to it, as servers do; "q8_0" is as
            llama.cpp computes a file in Q8_0. None is what the certificates were made in: the store's dtype for the
            base model, float32 for the adapters.
        progress: Told how many records of how many were looked at, after every adapter.

    Returns:
        One entry per adapter, in the order given or committed. A record that does not come back is listed, not raised.

    Raises:
        IntegrityError: No such adapter, or its files or rows are not what was committed.
        OtherBaseModel: The base model at hand is not the store's.
        UnsupportedBaseModel: Unknown dtype, or one that the device cannot compute in.
    """
    with session.index.snapshot():
        committed = {adapter.id: adapter for adapter in session.index.adapters()}
        chosen = list(committed) if adapters is None else list(adapters)
        records = {adapter: list(session.index.records(adapter=adapter)) for adapter in chosen}
    if missing := [adapter for adapter in chosen if adapter not in committed]:
        raise IntegrityError(f"The index has no adapter {missing[0]!r} with live records.", what=missing[0])
    served = session if dtype is None else session.served_in(dtype)
    done, total = 0, sum(map(len, records.values()))
    checks = []
    for adapter, rows in records.items():
        checks.append(_check(served, committed[adapter], rows))
        done += len(rows)
        if progress is not None:
            progress(done, total)
    return checks


def _check(session: Session, adapter: StoredAdapter, rows: Sequence[StoredRecord]) -> AdapterCheck:
    reader, base, model = session.reader, session.base, session.adapted.model
    if session.adapted.is_loaded(adapter.id):
        session.adapted.remove(adapter.id)  # what counts is the file, not what an earlier call read of it
    template = session.manifest.template()
    known = dict(_values(session, rows))
    encoded = [
        encode_record(Record(row.key, known[row.key], row.namespace), base.tokenizer, template, reader.prompt_ids(row))
        for row in rows
        if row.key in known  # unique: an adapter holds one namespace
    ]
    with reader.active(adapter):
        found = examine(model, encoded)
        alone = [[index] for index in least_certain(found.min_probs)]
        singly = [[index] for index in range(len(encoded))]
        elsewhere = lowest_probabilities(model, encoded, [free_running(encoded), singly])
        wrong = {encoded[index].record.key for index in (*found.wrong, *misrecalled(model, encoded, alone))}
    failed = tuple(row.key for row in rows if row.key in wrong or row.key not in known)
    return AdapterCheck(
        adapter=adapter.id,
        records=len(rows),
        exact=len(rows) - len(failed),
        failed=failed,
        unscored=len(rows) - len(encoded),
        min_prob=min((*found.min_probs, *elsewhere), default=None),
        committed_min_prob=min((row.min_prob for row in rows), default=None),
        dtypes=dict(session.adapted.dtypes),
        device=base.device.type,
        batches={**found.batch_sizes, "alone": [1] if alone else []},
    )


def _values(session: Session, rows: Sequence[StoredRecord]) -> Iterator[tuple[str, str]]:
    """Key and committed value: as the index keeps it, else as decoded now, if it is the one that was committed."""
    kept = {row.key: row.value for row in rows if row.value is not None and row.holds(row.value)}
    yield from kept.items()
    for batch in decode_batches(row for row in rows if row.key not in kept):
        for row, value in session.reader.try_decode(batch):
            if value is not None:
                yield row.key, value
