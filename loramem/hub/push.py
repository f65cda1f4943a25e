"""Publish a store: one commit on a pinned parent, so that somebody else's in between is refused, not overwritten."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import ModelInfo, RepoFile
from pydantic import ValidationError

from loramem._util.events import log_event
from loramem._util.layout import ADAPTERS as STORED
from loramem.errors import ArgumentError, DeletedInWeights, HubConflict, IntegrityError, PublicRepository, StoreError
from loramem.hub import publication
from loramem.hub.card import model_card
from loramem.hub.client import Hub
from loramem.hub.description import describe
from loramem.hub.publication import ADAPTER_FILE, ADAPTERS, CARD, RECORDS, Publication, first_fault
from loramem.index.commits import commit_publication
from loramem.index.index import Index
from loramem.records.record import has_lone_surrogate
from loramem.results import PushPlan, PushReport
from loramem.serving.check import chat_keys
from loramem.store.integrity import problems
from loramem.store.manifest import Manifest

_NEUTRAL = {".gitattributes", ".gitignore", CARD, "LICENSE"}
"""Files that a repository may hold before a store is first pushed to it."""


@dataclass(frozen=True)
class _File:
    """Content to publish: bytes, or a file of the store."""

    content: bytes | Path
    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, content: bytes) -> "_File":
        return cls(content, hashlib.sha256(content).hexdigest(), len(content))

    def is_at(self, file: RepoFile | None) -> bool:
        """Whether the repository has this content: by sha256 of large files, by git's hash of others."""
        if file is None or file.size != self.size_bytes:
            return False
        if file.lfs is not None:
            return file.lfs.sha256 == self.sha256
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def push(
    store: Path,
    index: Index,
    manifest: Manifest,
    repo: str,
    *,
    include_keys: bool = False,
    include_values: bool = False,
    public: bool = False,
    replace: bool = False,
    license: str = "other",
    message: str | None = None,
    confirm: Callable[[PushPlan], None] | None = None,
) -> PushReport:
    """Make a repository hold what the store holds now; see `MemoryStore.push`, whose arguments and errors these are."""
    if include_values and not include_keys:
        raise ArgumentError(
            "Values are published with their keys: include_keys=True too (--include-keys).",
            argument="include_values",
            value=include_values,
        )
    with index.snapshot():
        if damaged := next(problems(store, index), None):
            raise IntegrityError(f"{damaged}. Damage is not published: run loramem repair first.", what="store")
        chat = chat_keys(manifest, index.records())
        description, files = _contents(store, index, manifest, keys=include_keys, values=include_values)
    files[CARD] = _File.of(model_card(description, repo, license, version("loramem"), chat).encode())
    hub = Hub(repo)
    info = hub.info_if_there()
    if info is not None and not info.private and not public:
        raise PublicRepository(
            f"{repo} is public: everyone could extract {description.records:,} records. Give --public "
            "(public=True) if they may, or push to another repository.",
            repo=repo,
        )
    there = {} if info is None else hub.files(info.sha)
    if info is not None and not replace:
        _check_parent(hub, info, there, index)
    uploads = {path: file for path, file in files.items() if not file.is_at(there.get(path))}
    superfluous = [path for path in sorted(there) if path.startswith(f"{ADAPTERS}/") and path not in files]
    plan = PushPlan(
        repo=repo,
        private=not public if info is None else bool(info.private),
        records=description.records,
        keys=include_keys,
        values=include_values,
        adapters=len(description.adapters),
        uploaded=_adapters(uploads),
        removed=_adapters(superfluous),
        size_bytes=sum(file.size_bytes for file in uploads.values()),
    )
    parent = None if info is None else info.sha
    if not uploads and not superfluous:
        assert parent is not None
        commit_publication(index, repo, parent)
        return PushReport(**vars(plan), commit=parent, changed=False)
    if confirm is not None:
        confirm(plan)
    if info is None:
        hub.create(private=not public)
        parent = hub.info().sha
    known, _ = index.publication(repo)
    commit_publication(index, repo, known, files[publication.NAME].sha256)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(path, file.content) for path, file in sorted(uploads.items())),
        *(CommitOperationDelete(path) for path in superfluous),
    ]
    title = message or f"{description.records} records in {len(description.adapters)} adapters"
    commit = hub.commit(operations, title, parent)
    commit_publication(index, repo, commit)
    log_event("pushed", records=description.records, adapters=len(plan.uploaded))
    return PushReport(**vars(plan), commit=commit, changed=True)


def _contents(
    store: Path, index: Index, manifest: Manifest, *, keys: bool, values: bool
) -> tuple[Publication, dict[str, _File]]:
    """What is said of a store, and all files but the card by their path in the repository."""
    records = list(index.records())
    adapters = list(index.adapters())
    if values and any(record.value is None for record in records):
        raise StoreError(f"{store} keeps digests of its values alone, so that they cannot be published.")
    if values and (odd := next((record for record in records if has_lone_surrogate(record.metadata)), None)):
        raise StoreError(
            f"The metadata of key {odd.key!r} hold a lone surrogate, which readers of JSON refuse. Give it others "
            "first (loramem update KEY --meta NAME=VALUE), or publish without values."
        )
    if keys and manifest.key_salt is not None:
        raise StoreError(f"{store} was pulled without its keys, so that they cannot be published.")
    if ended := sum(count for id, count in index.tombstones().items() if id in {adapter.id for adapter in adapters}):
        raise DeletedInWeights(
            f"The adapters of {store} still hold {ended:,} deleted or replaced records, which whoever may read the "
            "repository could extract. Run loramem compact --dead first.",
            records=ended,
        )
    paths = {
        f"{ADAPTERS}/{adapter.id}/{name}": (store / STORED / adapter.id / name, sha256)
        for adapter in adapters
        for name, sha256 in adapter.files.items()
    }
    files = {path: _File(local, sha256, local.stat().st_size) for path, (local, sha256) in paths.items()}
    sizes = {path: file.size_bytes for path, file in files.items()}
    try:
        description, lines = describe(manifest, adapters, records, sizes, include_keys=keys, include_values=values)
    except ValidationError as error:
        raise StoreError(f"{store} cannot be published as it is: {first_fault(error)}.") from None
    texts = {publication.NAME: description.to_bytes(), RECORDS: lines}
    return description, {**files, **{path: _File.of(content) for path, content in texts.items()}}


def _check_parent(hub: Hub, info: ModelInfo, there: Mapping[str, RepoFile], index: Index) -> None:
    """Refuse to build on a commit that this store does not know.

    Raises:
        HubConflict: What the repository holds is not what this store pushed, or was pulled from.
    """
    repo = hub.repo
    known, sent = index.publication(repo)
    if info.sha == known or (known is None and set(there) <= _NEUTRAL):
        return
    if sent and publication.NAME in there:  # a push that was killed after its commit
        with TemporaryDirectory() as folder:
            local = hub.download(publication.NAME, info.sha, Path(folder))
            if hashlib.sha256(local.read_bytes()).hexdigest() == sent:
                return
    relation = (
        "which this store has nothing to do with" if known is None else f"not {known[:12]}, which this store knows"
    )
    raise HubConflict(
        f"{repo} is at commit {(info.sha or '?')[:12]}, {relation}. Pull it into a new folder and go on from there, "
        "push to another repository, or give --replace (replace=True) to end what is there.",
        repo=repo,
        expected=known,
        got=info.sha,
    )


def _adapters(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({match[1] for path in paths if (match := ADAPTER_FILE.fullmatch(path))}))
