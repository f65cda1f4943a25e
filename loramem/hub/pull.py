"""A published store made a store here: the files of one commit, every one of them checked before it counts.

What is pulled is untrusted. It is put together beside the target and renamed at the end, so that nothing of a
repository that breaks a rule is left.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.hf_api import RepoFile

from loramem._util.events import log_event
from loramem._util.files import PRIVATE_FILE, beside, make_directory, rename_new
from loramem._util.layout import ADAPTERS as STORED
from loramem.errors import NotAPublication, RecordError, RefusedRepository
from loramem.hub.client import Hub
from loramem.hub.publication import (
    ADAPTER_FILE,
    ADAPTERS,
    NAME,
    RECORDS,
    Publication,
    PublishedRecord,
    read_lines,
    read_publication,
)
from loramem.index.commits import commit_publication, commit_records, seal_index
from loramem.index.index import NAME as INDEX
from loramem.index.index import Index
from loramem.index.rows import StoredAdapter, StoredRecord
from loramem.models.adapter_header import WEIGHTS
from loramem.records.record import Record
from loramem.store.manifest import Manifest
from loramem.store.session import ModelOptions, Session

MAX_DESCRIPTION_BYTES, MAX_RECORDS_BYTES, MAX_TEXT_BYTES = 64 * 2**20, 2**30, 2**20
"""Of loramem.json, of records.jsonl, and of config and card of an adapter: far more than one would share."""
MAX_BYTES = 16 * 2**30
"""Of the adapters, unless the caller allows more."""
ORDERED = 0.5
_TIDY = re.compile(r"[^/\\]+(/[^/\\]+)*")
"""A relative path without empty parts or backslashes."""
SAID_CHARACTERS = 300
"""Of what a repository is refused for: names in it may be of any length."""


class Fetched:
    """A repository's publication at one commit, as files in a folder."""

    def __init__(self, hub: Hub, folder: Path, revision: str | None, max_bytes: int) -> None:
        self.repo, self.folder, self._hub = hub.repo, folder, hub
        self.commit = str(hub.info(revision).sha)
        self._there = hub.files(self.commit)
        self._check_paths()
        self.publication = self._read_description()
        self.records = self._read_records()
        self._download_adapters(max_bytes)

    def refused(self, what: str, why: object) -> RefusedRepository:
        """The error for a file that breaks a rule, whose names may be made for the terminal that shows it."""
        said = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in f"{what}: {why}")
        said = said if len(said) <= SAID_CHARACTERS else f"{said[:SAID_CHARACTERS]}…"
        return RefusedRepository(
            f"{self.repo} at {self.commit[:12]} is refused: {said.rstrip('.')}.", repo=self.repo, what=what
        )

    def _check_paths(self) -> None:
        for path in self._there:
            if not _TIDY.fullmatch(path) or not path.isprintable() or {".", ".."} & set(path.split("/")):
                raise self.refused(path, "no file of a store has such a path")
        if NAME not in self._there or RECORDS not in self._there:
            plain = "adapter_config.json" in self._there
            raise NotAPublication(
                f"{self.repo} holds no store that loramem published, "
                + ("but a plain PEFT adapter: load that with peft." if plain else "only something else."),
                repo=self.repo,
            )
        for path in self._there:
            if path.startswith(f"{ADAPTERS}/") and not ADAPTER_FILE.fullmatch(path):
                raise self.refused(path, "the folder of an adapter holds its three files alone")

    def _read_description(self) -> Publication:
        content = self._download(NAME, MAX_DESCRIPTION_BYTES).read_bytes()
        try:
            return read_publication(content)
        except ValueError as error:
            raise self.refused(NAME, error) from None

    def _read_records(self) -> list[PublishedRecord]:
        content = self._download(RECORDS, MAX_RECORDS_BYTES).read_bytes()
        try:
            records = read_lines(content, self.publication)
            for record in records:
                Record(record.key, record.value or "?", record.namespace, record.metadata or {})
        except (ValueError, RecordError) as error:
            raise self.refused(RECORDS, error) from None
        return records

    def _download_adapters(self, max_bytes: int) -> None:
        sizes = self.publication.sizes
        if unlisted := {path for path in self._there if path.startswith(f"{ADAPTERS}/")} ^ set(sizes):
            raise self.refused(min(unlisted), f"it is not both in the repository and in {NAME}")
        if sum(sizes.values()) > max_bytes:
            raise self.refused(
                ADAPTERS, f"they have {sum(sizes.values()):,} bytes, {max_bytes:,} are allowed (--max-bytes)"
            )
        for path, size in sizes.items():
            if not path.endswith(WEIGHTS) and size > MAX_TEXT_BYTES:
                raise self.refused(path, f"it has {size:,} bytes, {MAX_TEXT_BYTES:,} are allowed")
            if self._there[path].size != size:
                raise self.refused(path, f"it has {self._there[path].size:,} bytes, {NAME} says {size:,}")
            self._download(path, size)

    def _download(self, path: str, limit: int) -> Path:
        file: RepoFile = self._there[path]
        if file.size > limit:
            raise self.refused(path, f"it has {file.size:,} bytes, {limit:,} are allowed")
        local = self._hub.download(path, self.commit, self.folder)
        if local.is_symlink() or not local.resolve().is_relative_to(self.folder.resolve()):
            raise self.refused(path, "it does not lie in the folder of the download")
        if local.stat().st_size != file.size:
            raise self.refused(path, f"{local.stat().st_size:,} bytes came, {file.size:,} were announced")
        return local


def pull(
    repo: str,
    target: Path,
    *,
    revision: str | None = None,
    model: ModelOptions,
    verify: bool = True,
    max_bytes: int = MAX_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make a store at ``target`` of a published one; see `MemoryStore.pull`, whose arguments and errors these are."""
    from loramem.models.find_base import location_of

    with beside(target) as partial:
        fetched = Fetched(Hub(repo), partial / "download", revision, max_bytes)
        folder = partial / "store"
        make_directory(folder)
        index = Index(folder / INDEX)
        try:
            manifest = fetched.publication.manifest(location_of(model.name) if model.name else None)
            _assemble(fetched, folder, index, manifest)
            _admit(fetched, Session(folder, index, manifest, model), verify, progress)
        finally:
            index.close()
        rename_new(folder, target)
        log_event("pulled", records=len(fetched.records), adapters=len(fetched.publication.adapters))


def _assemble(fetched: Fetched, folder: Path, index: Index, manifest: Manifest) -> None:
    """Files, index and manifest of the store, from what was downloaded."""
    published = fetched.publication
    make_directory(folder / STORED)
    for path in sorted(published.sizes):
        local = folder / path.replace(ADAPTERS, STORED, 1)
        make_directory(local.parent)
        (fetched.folder / path).rename(local)  # and synced with all of the store
        local.chmod(PRIVATE_FILE)
    adapters = [
        StoredAdapter(
            id=adapter.id,
            namespace=adapter.namespace,
            rank=adapter.rank,
            parameters=adapter.parameters,
            size_bytes=sum(file.size_bytes for file in adapter.files.values()),
            files={name: file.sha256 for name, file in adapter.files.items()},
            placement=(adapter.placement or published.placement).model_dump(),
            training=adapter.training.model_dump(),
            proof=adapter.proof.model_dump(),
            created_at=adapter.created_at,
        )
        for adapter in published.adapters
    ]
    records = [
        StoredRecord(**{**line.model_dump(), "metadata": line.metadata or {}, "prompt": _prompt(line)})
        for line in fetched.records
    ]
    if published.values:
        for record in records:
            if record.value is None or not record.holds(record.value):
                raise fetched.refused(RECORDS, f"the value of {record.key!r} is not the one of its digest")
    index.migrate()
    commit_records(index, records, adapters)
    commit_publication(index, fetched.repo, fetched.commit)
    seal_index(index, manifest.sha256)
    manifest.save(folder)


def _prompt(line: PublishedRecord) -> dict[str, Any] | None:
    return None if line.prompt is None else line.prompt.model_dump(exclude_none=True)


def _told(line: PublishedRecord) -> bool:
    return line.prompt is not None and line.prompt.ids is not None


def _admit(fetched: Fetched, session: Session, verify: bool, progress: Callable[[int, int], None] | None) -> None:
    """Check every adapter, and with ``verify`` what it says and answers on the base model here."""
    from loramem.hub.admission import inspect_adapter, placement_of
    from loramem.models.placement import tensor_shapes
    from loramem.records.prompts import decode_answer, prompt_digest
    from loramem.store.certificates import check_certificates

    for adapter in fetched.publication.adapters:
        where = f"{ADAPTERS}/{adapter.id}"
        placement = placement_of(adapter, fetched.publication)
        shapes = tensor_shapes(session.base.model, placement, adapter.rank) if verify else None
        try:
            inspect_adapter(session.store / STORED / adapter.id, adapter, fetched.publication, shapes)
        except ValueError as error:
            raise fetched.refused(where, error) from None
    if not verify:
        return
    if session.base.template != session.manifest.template():
        raise fetched.refused(NAME, "its prompt is not the one of the base model")
    if longest := [line for line in fetched.records if line.answer_tokens >= session.base.max_tokens]:
        raise fetched.refused(RECORDS, f"{longest[0].answer_tokens:,} answer tokens exceed the base model's context")
    if fetched.publication.key_salt is not None:
        return  # there is nothing to ask for: recall checks every value against its digest
    tokenizer = session.base.tokenizer
    for line in fetched.records:
        prompt = session.base.template.stored_ids(tokenizer, line.key, _prompt(line))
        if _told(line) and (max(prompt) >= len(tokenizer) or line.key not in decode_answer(tokenizer, prompt)):
            raise fetched.refused(RECORDS, f"the ids of the prompt of key {line.key!r} do not say it")
        if len(prompt) + line.answer_tokens >= session.base.max_tokens:
            raise fetched.refused(RECORDS, f"key {line.key!r} and its value exceed the base model's context")
        if prompt_digest(prompt) != line.prompt_sha256:
            raise fetched.refused(RECORDS, f"the prompt of key {line.key!r} is another one")
    for check in check_certificates(session, progress=progress):
        where = f"{ADAPTERS}/{check.adapter}"
        if check.failed:
            raise fetched.refused(
                where, f"it does not give back {len(check.failed)} of its {check.records} records here"
            )
        if check.min_prob is not None and check.min_prob <= ORDERED:
            raise fetched.refused(where, f"a token has p = {check.min_prob:.3f} here, which certifies nothing")
