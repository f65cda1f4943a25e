"""The SQLite index of a store: which record is in which adapter, and the journal of writes.

Only reading and the journal are here; `loramem.index.commits` holds what changes records, each change one transaction.
"""

import difflib
import heapq
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from loramem.errors import IntegrityError
from loramem.index.journal import journal_rows, journalled_in
from loramem.index.rows import (
    PENDING,
    RENAMED,
    REPLACED,
    Located,
    PendingWrite,
    StoredAdapter,
    StoredRecord,
    StoredVersion,
    adapter_of,
    hidden_names,
    now,
    record_of,
    version_of,
)
from loramem.index.sealed_database import SealedDatabase
from loramem.index.seals import is_sealed, select_keys
from loramem.records.outcome import Outcome
from loramem.records.record import Record

NAME = "index.db"
CLOSE_KEYS = 20_000
"""So many keys are compared roughly with an unknown one, a hundredth of them closely."""
_LIVE = "id not in (select adapter from retired)"
_NO_QUESTION = "question_of is null"
_PENDING = f"state = '{PENDING}'"  # a literal, which the index of these rows is found by


@dataclass(frozen=True)
class Load:
    """What of an adapter is alive."""

    records: int
    answer_tokens: int
    min_prob: float


class Index(SealedDatabase):
    """The database of one store.

    Attributes:
        key_salt: Set for a store whose rows hold digests in place of namespaces and keys: what `find` looks for then.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.key_salt: str | None = None

    # Reading

    def find(self, namespace: str, key: str) -> StoredRecord | None:
        """A live record.

        Raises:
            IntegrityError: Its row is not what was committed.
        """
        names = (namespace, key) if self.key_salt is None else hidden_names(self.key_salt, namespace, key)
        row = self._row("records", *names)
        return None if row is None else replace(record_of(row), namespace=namespace, key=key)

    def find_many(self, identities: Iterable[tuple[str, str]]) -> dict[tuple[str, str], StoredRecord]:
        """Those of these live records that there are, by namespace and key.

        Raises:
            IntegrityError: The row of one is not what was committed.
        """
        if self.key_salt is None:
            names = {identity: identity for identity in identities}
        else:
            names = {hidden_names(self.key_salt, *identity): identity for identity in identities}
        found = {}
        for row in self._some("records", names):
            namespace, key = names[row["namespace"], row["key"]]
            found[namespace, key] = replace(record_of(row), namespace=namespace, key=key)
        return found

    def locate(self, namespace: str, key: str) -> Located | None:
        """A live record and its adapter, of one state.

        Raises:
            IntegrityError: One of the rows is not what was committed, or the adapter's is not there.
        """
        with self.snapshot():
            record = self.find(namespace, key)
            return None if record is None else self.located([record])[0]

    def located(self, records: Sequence[StoredRecord]) -> list[Located]:
        """Records of one adapter, with it.

        Raises:
            IntegrityError: Its row is not what was committed, or not there.
        """
        id = records[0].adapter
        adapter = self.adapter(id)
        if adapter is None:
            raise IntegrityError(f"The index has no adapter {id!r}.", what=id)
        return [Located(record, adapter) for record in records]

    def find_prompts(self, prompts: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Keys that have one of these prompts already, by namespace and sha256 of the token ids."""
        rows = select_keys(
            self.db, "records", "namespace, prompt_sha256, key", ("namespace", "prompt_sha256"), dict.fromkeys(prompts)
        )
        return {(namespace, prompt_sha256): key for namespace, prompt_sha256, key in rows}

    def records(
        self,
        namespace: str | None = None,
        adapter: str | None = None,
        *,
        since: str | None = None,
        until: str | None = None,
        metadata: Mapping[str, str] | None = None,
        questions: bool = True,
    ) -> Iterator[StoredRecord]:
        """Committed records by adapter, in the order they were written.

        Args:
            questions: Also those that are questions for another.
            since: Written at this time or later (UTC, ISO 8601 to the second).
            until: Written before this time.
            metadata: Names and values that a record's metadata must have.

        Raises:
            IntegrityError: A row is not what was committed.
        """
        wanted = {
            "namespace = :namespace": namespace,
            "adapter = :adapter": adapter,
            "written_at >= :since": since,
            "written_at < :until": until,
        }
        conditions = [condition for condition, value in wanted.items() if value is not None]
        conditions += [] if questions else [_NO_QUESTION]
        values = {"namespace": namespace, "adapter": adapter, "since": since, "until": until}
        where = " and ".join(conditions) or None
        for row in self._rows("records", where, values, order_by="adapter, rowid"):
            record = record_of(row)
            if not metadata or record.has(metadata):
                yield record

    def in_order(self, namespace: str) -> Iterator[StoredRecord]:
        """Live records of a namespace in the order they were written, that of `keys`; no questions.

        Raises:
            IntegrityError: A row is not what was committed.
        """
        where = f"namespace = :namespace and {_NO_QUESTION}"
        rows = self._rows("records", where, {"namespace": namespace}, order_by="rowid")
        return map(record_of, rows)

    def written(self, adapters: Iterable[str]) -> list[StoredRecord]:
        """Live records of some adapters, in the order they were written.

        Raises:
            IntegrityError: A row is not what was committed.
        """
        wanted = set(adapters)
        rows = self._rows("records", order_by="rowid")
        return [record_of(row) for row in rows if row["adapter"] in wanted]

    def keys(self, namespace: str) -> Iterator[str]:
        query = f"select key from records where namespace = ? and {_NO_QUESTION} order by rowid"
        for row in self.db.query(query, [namespace]):
            yield row["key"]

    def count_questions(self) -> int:
        """Live rows that are questions for another."""
        return int(self.db.table("records").count_where("question_of not null"))

    def questions_of(self, identities: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[str]]:
        """Live questions in the order they were written, of those of these records (namespace, key) that have any."""
        found = dict[tuple[str, str], list[str]]()
        columns, key = "rowid, namespace, question_of, key", ("namespace", "question_of")
        for _, namespace, of, question in sorted(select_keys(self.db, "records", columns, key, identities)):
            found.setdefault((namespace, of), []).append(question)
        return found

    def asked_ever(self, namespace: str, key: str) -> set[str]:
        """Every question that was ever one for the record of a key."""
        rows = (f"select key from {table} where namespace = ? and question_of = ?" for table in ("records", "versions"))
        return {question for query in rows for (question,) in self.db.conn.execute(query, [namespace, key])}

    def namespaces(self) -> list[str]:
        return [row["namespace"] for row in self.db.query("select distinct namespace from records order by namespace")]

    def close_keys(self, namespace: str, key: str) -> list[str]:
        """Up to three similar keys, in a tenth of a second at 10,000 keys and at most twice that at more.

        difflib takes 0.1 ms a key: it sees those alone that share most pairs of letters.
        """
        rows = "select key from records where namespace = ? and length(key) between ? and ? order by rowid limit ?"
        bounds = [len(key) // 2, len(key) * 2, CLOSE_KEYS]
        keys = [row["key"] for row in self.db.query(rows, [namespace, *bounds])]
        pairs = set(pairwise(key))
        alike = heapq.nlargest(CLOSE_KEYS // 100, keys, key=lambda other: len(pairs.intersection(pairwise(other))))
        return difflib.get_close_matches(key, alike, n=3)

    def count(self, namespace: str | None = None) -> int:
        """Records; without a namespace all rows, questions too."""
        if namespace is None:
            return int(self.db.table("records").count)
        return int(self.db.table("records").count_where(f"namespace = ? and {_NO_QUESTION}", [namespace]))

    def versions(self, namespace: str, key: str, *, renamed: bool = False) -> dict[int, StoredVersion]:
        """What the record of a key was before, oldest first, also under the names it had; by row id.

        Rows are numbered as records end, so one that took a name after a rename is told from the one that left it.

        Args:
            renamed: Also what had the key before and has another one now.
        """
        names, found = [(key, self.next_id("versions"))], dict[int, dict[str, Any]]()
        while names:
            name, last = names.pop()
            for row in self.db.table("versions").rows_where(
                "namespace = ? and (key = ? or successor = ?) and id <= ?",
                [namespace, name, name, last],
                order_by="id desc",
            ):
                if row["key"] != name:
                    names.append((row["key"], row["id"]))
                elif row["ended_by"] == RENAMED and row["id"] != last and not (renamed and name == key):
                    break
                found[row["id"]] = row
        return {number: version_of(found[number]) for number in sorted(found)}

    def successor(self, namespace: str, key: str) -> str | None:
        """The key under which the record that had this one last can be found now, if it was renamed."""
        rows = "namespace = ? and key = ? and id > ? and ended_by != ?"
        gone = list(self.db.table("versions").rows_where(rows, [namespace, key, 0, REPLACED], order_by="id desc"))
        found = None
        while gone and gone[0]["ended_by"] == RENAMED:
            found, last = gone[0]["successor"], gone[0]["id"]
            gone = list(self.db.table("versions").rows_where(rows, [namespace, found, last, REPLACED], order_by="id"))
        return found

    def adapter(self, adapter: str) -> StoredAdapter | None:
        """An adapter, retired or not.

        Raises:
            IntegrityError: Its row is not what was committed.
        """
        row = self._row("adapters", adapter)
        return None if row is None else adapter_of(row)

    def has_adapter(self, adapter: str) -> bool:
        """Whether there is a row of it, whatever it says."""
        return bool(self.db.table("adapters").count_where("id = ?", [adapter]))

    def adapters(self) -> Iterator[StoredAdapter]:
        """Those that hold live records, oldest first.

        Raises:
            IntegrityError: A row is not what was committed.
        """
        return map(adapter_of, self._rows("adapters", _LIVE, order_by="rowid"))

    def newest_adapter(self, namespace: str) -> StoredAdapter | None:
        """The last one of a namespace that holds live records.

        Raises:
            IntegrityError: Its row is not what was committed.
        """
        where = f"namespace = :namespace and {_LIVE}"
        rows = self._rows("adapters", where, {"namespace": namespace}, order_by="rowid desc")
        return next(map(adapter_of, rows), None)

    def live(self) -> dict[str, str]:
        """Namespaces of the adapters that hold live records, whatever else their rows say; by id, oldest first."""
        query = f"select id, namespace from adapters where {_LIVE} order by rowid"
        return {row["id"]: row["namespace"] for row in self.db.query(query)}

    def retired(self) -> dict[str, str]:
        """Adapters that no live record needs, whose files are still there: id -> when that came (UTC, ISO 8601)."""
        return {row["adapter"]: row["retired_at"] for row in self.db.table("retired").rows}

    def tombstones(self) -> dict[str, int]:
        """How many keys ended in each adapter that is still there, if any: id -> count.

        A key that is live in the adapter again, since its value came back and with it the same weights, is none.
        """
        query = (
            "select adapter, count(*) as dead from (select distinct adapter, namespace, key from versions "
            "where adapter in (select id from adapters)) as ended where not exists (select 1 from records "
            "where namespace = ended.namespace and key = ended.key and adapter = ended.adapter) group by adapter"
        )
        return {row["adapter"]: row["dead"] for row in self.db.query(query)}

    def publication(self, repo: str) -> tuple[str | None, str | None]:
        """Commit of a Hub repository that this store equals or began as; sha256 of a loramem.json on its way there."""
        row = self._row("publications", repo)
        return (None, None) if row is None else (row["commit"], row["sent"])

    def adapter_ids(self) -> set[str]:
        """All adapters that there are rows of, retired ones too."""
        return {row["id"] for row in self.db.query("select id from adapters")}

    def loads(self) -> dict[str, Load]:
        """What each adapter holds, as the rows say: it looks at no seal, and keeps no row in memory."""
        query = (
            "select adapter, count(*), sum(cast(answer_tokens as integer)), min(cast(min_prob as real)) "
            "from records group by adapter"
        )
        return {adapter: Load(*held) for adapter, *held in self.db.execute(query)}

    # The journal

    def begin_write(self, records: Collection[Record], request: Mapping[str, Any]) -> int:
        """Journal a write durably before training starts; returns its id."""
        with self.change() as change:
            write = self.next_id("writes")
            change.remove("journal", "write = ?", [write])  # of a write whose row was lost
            change.add_all("journal", journal_rows(write, records))
            row = {"id": write, "state": PENDING, "started_at": now(), "ended_at": None, "count": len(records)}
            change.put("writes", {**row, "request": json.dumps(request)})
        return write

    def pending_write(self) -> PendingWrite | None:
        """The write that was journalled and neither committed nor given up.

        Raises:
            IntegrityError: It is not what was journalled.
        """
        for row in self.db.table("writes").rows_where(_PENDING, order_by="id"):
            kept = self.db.table("journal").rows_where("write = ?", [row["id"]], order_by="number")
            records = [record for each in kept if is_sealed("journal", each) for record in journalled_in(each)]
            if not is_sealed("writes", row) or len(records) != row["count"]:
                raise IntegrityError(
                    f"{self.path}: the journal of write {row['id']} is damaged. Run loramem repair, which forgets it.",
                    what="writes",
                )
            return PendingWrite(row["id"], row["started_at"], records, json.loads(row["request"]))
        return None

    def pending_count(self) -> int:
        """How many records the pending write is of; 0 without one."""
        query = f"select coalesce(cast(count as integer), 0) as count from writes where {_PENDING} order by id"
        return next((int(row["count"]) for row in self.db.query(query)), 0)

    def outcomes(self, most: int = -1) -> list[Outcome]:
        """Of the writes to this store, oldest first.

        Args:
            most: Only so many, the newest; all unless given.
        """
        rows = reversed(list(self.db.query("select * from outcomes order by id desc limit ?", [most])))
        kept = ({name: value for name, value in row.items() if name not in ("id", "noted_at")} for row in rows)
        return [Outcome(**{**fields, "certified": bool(fields["certified"])}) for fields in kept]

    def misplaced(self) -> Iterator[str]:
        """Records whose adapter is not there, or is another namespace's, in words."""
        query = (
            "select key, records.adapter, live.namespace from records left join (select id, namespace from adapters "
            f"where {_LIVE}) as live on live.id = records.adapter where live.namespace is not records.namespace "
            "order by records.adapter, records.rowid"
        )
        for row in self.db.query(query):
            if row["namespace"] is None:
                yield f"The record {row['key']!r} is in adapter {row['adapter']!r}, which the index does not have"
            else:
                yield f"The record {row['key']!r} is in an adapter of another namespace"
